"""Files of a cache in the wrong place, gone, changed while they are read, or no files at all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast import cli
from deit_fast.cache import CacheError, LogitCache, LogitCacheWriter, verify
from deit_fast.cache.verify import sampled_ids, write_pixels
from deit_fast.errors import InputError
from helpers.caches import (
    BLOCK,
    SAMPLES,
    edit_manifest,
    equal,
    file_bytes,
    make_logits,
    make_manifest,
    pending_blocks,
    write_cache,
    write_view,
)

TABLE, DATA, RECORD, BLOCKS = 4096, 8192, 72, 3
NAME = "view-00000.dlc"
ALL = np.arange(SAMPLES)


@pytest.fixture
def cache_folder(tmp_path) -> Path:
    write_cache(tmp_path / "cache", make_manifest(), (0, 1))
    return tmp_path / "cache"


def write_digests(folder: Path, view: int) -> None:
    manifest = LogitCache.open(folder).manifest
    samples = sampled_ids(manifest, view).tolist()
    write_pixels(folder, manifest, view, dict.fromkeys(samples, "0" * 32))


def run(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------
# Blocks in the wrong place
# ---------------------------------------------------------------------------------------------


def take_block(file: Path, block: int) -> tuple[bytes, bytes]:
    """Table entry and records of a block."""
    raw = file.read_bytes()
    step = BLOCK * RECORD
    return raw[TABLE + 8 * block :][:8], raw[DATA + step * block :][:step]


def put_block(file: Path, block: int, content: tuple[bytes, bytes]) -> None:
    entry, records = content
    with open(file, "r+b") as opened:
        opened.seek(TABLE + 8 * block)
        opened.write(entry)
        opened.seek(DATA + BLOCK * RECORD * block)
        opened.write(records)


def test_a_block_is_right_in_its_place_alone(cache_folder, tmp_path):
    """Whole blocks with their table entries, from every other place that a block may come from."""
    sibling = make_manifest()
    sibling["fingerprint"]["view.seed"] = 8
    write_cache(tmp_path / "sibling", sibling, (0, 1))
    files = [folder / f"view-0000{view}.dlc" for folder in (cache_folder, tmp_path / "sibling")
             for view in (0, 1)]  # fmt: skip
    places = [(file, block) for file in files for block in (0, 1)]  # blocks of the same size
    contents = {place: take_block(*place) for place in places}
    tried = 0
    for (file, block), source in itertools.permutations(places, 2):
        put_block(file, block, contents[source])
        view = int(file.stem[-1])
        with pytest.raises(CacheError, match=rf"{file.name}: view {view} block {block} is damaged"):
            LogitCache.open(file.parent).gather([block * BLOCK], view)
        put_block(file, block, contents[file, block])
        tried += 1
    assert tried == 56
    put_block(files[0], 0, contents[files[1], 0])
    assert [(row["file"], row["block"]) for row in verify(cache_folder)["broken"]] == [(NAME, 0)]


def test_a_cache_of_format_2_is_read_continued_and_called_what_it_is(tmp_path, capsys, caplog):
    """Written after the format page, not by the writer, which writes format 3."""
    new, old = make_manifest(), make_manifest() | {"format": 2}
    expected = write_cache(tmp_path / "new", new)
    records = expected.gather_records(ALL, 0).numpy().tobytes()
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(old))
    file = write_view(folder, old, 0, records)
    caplog.clear()
    cache = LogitCache.open(folder)
    cache = LogitCache.open(folder)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "cannot show whether a block stands in its place" in lines[0]
    assert equal(cache.gather(ALL, 0), expected.gather(ALL, 0))

    before = file.read_bytes()
    with LogitCacheWriter(folder, new) as writer:
        assert pending_blocks(writer, [0, 1]) == [(1, block) for block in range(BLOCKS)]
        writer.write(ALL, 1, make_logits(1))
    assert file.read_bytes() == before
    continued = (folder / "view-00001.dlc").read_bytes()
    assert continued == write_view(folder, old, 1, continued[DATA:]).read_bytes()
    assert equal(LogitCache.open(folder).gather(ALL, 1), make_cache_logits(tmp_path, new, 1))
    with pytest.raises(CacheError, match=r"one field: view\.seed is 7, expected 8"):
        LogitCacheWriter(folder, new | {"fingerprint": new["fingerprint"] | {"view.seed": 8}})

    for verb in ("info", "verify"):
        status, out, _ = run(capsys, "cache", verb, folder)
        assert status == 0 and out.count("cannot show whether a block stands in its place") == 1
        status, out, _ = run(capsys, "cache", verb, tmp_path / "new")
        assert status == 0 and "cannot show" not in out
    put_block(file, 0, take_block(file, 1))
    assert verify(folder)["ok"]  # as the line says


def make_cache_logits(tmp_path: Path, manifest: dict, view: int):
    return write_cache(tmp_path / f"only-{view}", manifest, (view,)).gather(ALL, view)


def test_a_manifest_and_views_of_different_formats_are_refused(cache_folder):
    edit_manifest(cache_folder, format=2)
    with pytest.raises(CacheError, match=f"{NAME}: header has format version 3, expected 2"):
        LogitCache.open(cache_folder).gather([0], 0)
    assert len(verify(cache_folder)["broken"]) == 2


# ---------------------------------------------------------------------------------------------
# Files that are gone
# ---------------------------------------------------------------------------------------------


def test_verify_misses_view_files_that_are_gone(cache_folder, capsys):
    write_digests(cache_folder, 0)
    assert run(capsys, "cache", "verify", cache_folder)[0] == 0
    shutil.move(cache_folder / NAME, cache_folder / "elsewhere")
    status, out, _ = run(capsys, "cache", "verify", cache_folder)
    assert status == 1 and f"{NAME}: is gone; its pixel digests are there" in out
    (cache_folder / "view-00000.pixels.json").unlink()
    assert run(capsys, "cache", "verify", cache_folder)[0] == 0  # 1 is whole, 0 was never there
    (cache_folder / "view-00001.dlc").unlink()
    status, out, _ = run(capsys, "cache", "verify", cache_folder)
    assert status == 1 and "there is no view file" in out


@pytest.mark.parametrize("stem", ["view-" + "1" * 23, "view-0", "view-x", "view-2147483648"])
@pytest.mark.parametrize("suffix", [".dlc", ".pixels.json"])
def test_a_name_that_no_view_has_is_reported(cache_folder, capsys, stem, suffix):
    """A view id of 23 digits does not fit the header, and was a traceback."""
    shutil.copy(cache_folder / NAME, cache_folder / (stem + suffix))
    assert LogitCache.open(cache_folder).views == [0, 1]
    assert run(capsys, "cache", "info", cache_folder)[0] == 0
    status, out, _ = run(capsys, "cache", "verify", cache_folder)
    assert status == 1 and f"{stem}{suffix}: no view has this name" in out


@pytest.mark.parametrize("text", ["0:" + "1" * 23, "1" * 4096 + ":2", "0:2147483649", "2:1", "a:b"])
def test_view_ids_that_cannot_be_are_refused(cache_folder, tmp_path, capsys, text):
    status, _, err = run(
        capsys, "cache", "export", cache_folder, "--output", tmp_path / "a.pt", "--views", text
    )
    assert status == 2 and err.count("\n") == 1 and "--views" in err and len(err) < 300
    status, _, err = run(capsys, "cache", "export", cache_folder, "--output", tmp_path / "a.pt",
                         "--views", "0:2147483648")  # fmt: skip
    assert status == 2 and "does not have view 2 complete" in err


@pytest.mark.parametrize("change", ["delete", "replace", "move the folder"])
@pytest.mark.parametrize("moment", ["commit", "close"])
def test_a_view_that_its_writer_lost_is_an_error(tmp_path, change, moment):
    folder = tmp_path / "cache"

    def lose() -> None:
        if change == "move the folder":
            folder.rename(tmp_path / "moved")
            return
        (folder / NAME).rename(tmp_path / "old")
        if change == "replace":
            shutil.copy(tmp_path / "old", folder / NAME)

    how = "replaced" if change == "replace" else "deleted"
    message = rf"{NAME}: was {how} while it was written, so its new blocks are lost"
    if change == "move the folder":
        message += (
            "|was moved, deleted or replaced"  # what the lock says, before anything is written
        )
    writer = LogitCacheWriter(folder, make_manifest())
    writer.write(ALL[:40], 0, make_logits(0)[:40])
    if moment == "commit":
        lose()
        with pytest.raises(InputError, match=message):
            writer.write(ALL[40:], 0, make_logits(0)[40:])
        assert (0, 2) not in writer._committed
        with pytest.raises(CacheError, match=message):
            writer.close()
    else:
        writer.write(ALL[40:], 0, make_logits(0)[40:])
        lose()
        with pytest.raises(CacheError, match=message):
            writer.close()


def test_a_view_that_is_lost_while_it_is_closed_is_an_error(tmp_path, monkeypatch):
    """A writer of many views closes the oldest and opens it again: it would create a new file."""
    monkeypatch.setattr("deit_fast.cache.writer._OPEN_VIEWS", 1)
    writer = LogitCacheWriter(tmp_path, make_manifest())
    writer.write(ALL[:32], 0, make_logits(0)[:32])
    writer.write(ALL, 1, make_logits(1))
    (tmp_path / NAME).unlink()
    writer.write(ALL[32:], 0, make_logits(0)[32:])
    with pytest.raises(CacheError, match=rf"{NAME}: block \d was written and is gone"):
        writer.close()


def test_a_manifest_that_its_writer_lost_is_an_error(tmp_path):
    for change in ("delete", "replace"):
        folder = tmp_path / change
        writer = LogitCacheWriter(folder, make_manifest())
        writer.write(ALL, 0, make_logits(0))
        (folder / "manifest.json").unlink()
        if change == "replace":
            other = make_manifest()
            other["fingerprint"]["view.seed"] = 8
            LogitCacheWriter(folder, other).close()
        with pytest.raises(CacheError, match=r"has no manifest\.json|view\.seed is 8, expected 7"):
            writer.close()


# ---------------------------------------------------------------------------------------------
# Files that change while they are read
# ---------------------------------------------------------------------------------------------

READER = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from deit_fast.cache import CacheError, LogitCache
folder = Path(sys.argv[1])
name, whole = folder / "view-00000.dlc", (folder / "view-00000.dlc").read_bytes()
pages, rows = len(whole) // 4096 + 1, np.arange(1000)
expected = LogitCache.open(folder).gather_records(rows, 0)
for page in range(pages):
    cache = LogitCache.open(folder)
    cache.gather(rows, 0)  # all blocks are verified: the next call reads the map alone
    os.truncate(name, 4096 * page)
    for _ in range(2):
        try:
            cache.gather(rows, 0)
        except CacheError as error:
            assert str(name) in str(error) and "\\n" not in str(error), error
        else:
            raise SystemExit(f"page {page}: read what is not there")
    if page % 2:  # written again, in place or as another file
        name.write_bytes(whole)
    else:
        (folder / "new").write_bytes(whole)
        os.replace(folder / "new", name)
    assert cache.gather_records(rows, 0).equal(expected), page
print(pages)
"""


@pytest.mark.dist
@pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]])
def test_a_file_cut_off_at_any_page_is_an_error_and_the_process_lives(tmp_path, options):
    """In a process of its own, which SIGBUS would kill."""
    write_cache(tmp_path, make_manifest("dense-fp32", samples=1000, block=128))
    command = [sys.executable, *options, "-c", READER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_bytes_rewritten_in_place_after_their_check_are_refused(cache_folder):
    """With their length, and with the time of the last write set back."""
    cache = LogitCache.open(cache_folder)
    expected = cache.gather(ALL, 0)
    file = cache_folder / NAME
    before = file.stat()
    content = take_block(file, 1)
    put_block(file, 1, (content[0], bytes(len(content[1]))))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CacheError, match=f"{NAME}: view 0 block 1 is damaged"):
        cache.gather(ALL, 0)
    assert equal(cache.gather(ALL[:BLOCK], 0), first_rows(expected, BLOCK))
    put_block(file, 1, content)
    assert equal(cache.gather(ALL, 0), expected)  # the repaired block is checked again


def first_rows(logits, count: int):
    return type(logits)(*(part[:count] for part in logits[:3]), logits.tail)


def test_a_file_that_is_touched_stays_readable(cache_folder):
    cache = LogitCache.open(cache_folder)
    expected = cache.gather(ALL, 0)
    for step in range(5):
        os.utime(cache_folder / NAME)
        os.chmod(cache_folder / NAME, 0o644 if step % 2 else 0o600)
        assert equal(cache.gather(ALL, 0), expected)


FAULT = """
import ctypes, mmap, os, sys
from deit_fast.cache import LogitCache
if sys.argv[2] == "later":
    LogitCache.open(sys.argv[1]).gather([0], 0)
    import faulthandler
    faulthandler.enable(all_threads=False)
LogitCache.open(sys.argv[1]).gather([0], 0)
if sys.argv[2] == "sent":
    os.kill(os.getpid(), 7)
with open(sys.argv[1] + "/own", "w+b") as file:
    file.truncate(8192)
    pages = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    pages[5000]
"""


@pytest.mark.dist
@pytest.mark.parametrize("way", ["plain", "faulthandler", "later", "sent"])
def test_a_bus_error_elsewhere_ends_the_process_as_ever(cache_folder, way):
    """The handler passes on what does not lie in a map of a view."""
    options = ["-X", "faulthandler"] if way == "faulthandler" else []
    command = [sys.executable, *options, "-c", FAULT, str(cache_folder), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -7, done.stderr
    assert done.stderr.count("Fatal Python error: Bus error") == (way in ("faulthandler", "later"))


# ---------------------------------------------------------------------------------------------
# What is no regular file
# ---------------------------------------------------------------------------------------------


def replace_by(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            os.chdir(path.parent)  # a socket's path is short
            opened.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")


@pytest.mark.parametrize("name", ["manifest.json", NAME, "view-00000.pixels.json"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "device", "dangling link"])
def test_what_is_no_file_is_refused_at_once(cache_folder, monkeypatch, capsys, name, kind):
    monkeypatch.chdir(cache_folder)  # restores the folder afterwards
    write_digests(cache_folder, 0)
    replace_by(kind, cache_folder / name)
    is_manifest = name == "manifest.json"
    for words in (["info"], ["verify"], ["export", "--output", cache_folder / "out.pt"]):
        status, out, err = run(capsys, "cache", words[0], cache_folder, *words[1:])
        assert "Traceback" not in err
        if is_manifest:
            assert status == 2 and err.count("\n") == 1 and "manifest.json" in err
        elif words == ["verify"]:
            assert status == 1 and name in out
        elif words == ["export"]:
            assert status == 2 and name in err
    if name != "view-00000.pixels.json":
        with (
            pytest.raises((InputError, OSError), match=name),
            LogitCacheWriter(cache_folder, make_manifest()) as writer,
        ):
            writer.write(ALL, 0, make_logits(0))
    if name == NAME:
        with pytest.raises((CacheError, OSError), match=name):
            LogitCache.open(cache_folder).gather([0], 0)


# ---------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "parquet"])
def test_an_exported_file_has_the_rights_of_any_new_file(cache_folder, tmp_path, suffix):
    from deit_fast.cache.export import export

    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    old = os.umask(0o027)
    try:
        export(cache_folder, tmp_path / f"out.{suffix}")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / f"out.{suffix}").stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", f"out.{suffix}"]


# ---------------------------------------------------------------------------------------------
# Sweep: damages of every file, through every verb
# ---------------------------------------------------------------------------------------------

DAMAGES = int(os.environ.get("CACHE_DAMAGES", "250"))
EVERY_BIT = "CACHE_DAMAGES" in os.environ


def damage(rng: np.random.Generator, folder: Path) -> str:
    """Change one file in a random way; returns how."""
    path = folder / str(rng.choice([path.name for path in sorted(folder.iterdir())]))
    raw = bytearray(path.read_bytes())
    kind = str(rng.choice(["bit", "byte", "cut", "longer", "zeros", "noise", "moved", "block"]))
    at = int(rng.integers(len(raw)))
    size = int(rng.integers(1, 600))
    if kind == "bit":
        raw[at] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        raw[at] = int(rng.integers(256))
    elif kind == "cut":
        del raw[at:]
    elif kind == "longer":
        raw += rng.bytes(size)
    elif kind == "zeros":
        raw[at : at + size] = bytes(len(raw[at : at + size]))
    elif kind == "noise":
        raw[at : at + size] = rng.bytes(len(raw[at : at + size]))
    elif kind == "moved":
        source = int(rng.integers(len(raw)))
        part = raw[source : source + size]
        raw[at : at + len(part)] = part[: len(raw) - at]
    elif path.suffix == ".dlc":
        a, b = (int(x) for x in rng.choice(2, 2, False))
        entry, step = raw[TABLE + 8 * a :][:8], BLOCK * RECORD
        raw[TABLE + 8 * b : TABLE + 8 * b + 8] = entry
        raw[DATA + step * b : DATA + step * (b + 1)] = raw[DATA + step * a :][:step]
    path.write_bytes(raw)
    return f"{kind} of {path.name} at {at}"


def outcome(folder: Path, expected: list, capsys) -> str:
    """`refused`, `harmless` or a description of a wrong result."""
    refused = False
    for view, logits in enumerate(expected):
        try:
            found = LogitCache.open(folder).gather(ALL, view)
        except (CacheError, OSError) as error:
            assert "\n" not in str(error)
            refused = True
            continue
        if not equal(found, logits):
            return "wrong"
    status, _, err = run(capsys, "cache", "verify", folder)
    assert status in (0, 1, 2) and "Traceback" not in err
    if refused and status == 0:
        return "refused, and verify says nothing"
    return "refused" if status else "harmless"


def test_damages_are_refused_or_harmless(cache_folder, tmp_path, capsys):
    """Bits, bytes, cuts, moved bytes and moved blocks of every file of a cache."""
    write_digests(cache_folder, 0)
    expected = [LogitCache.open(cache_folder).gather(ALL, view) for view in (0, 1)]
    whole = file_bytes(cache_folder)
    rng = np.random.default_rng(17)
    counts: Counter[str] = Counter()
    for _ in range(DAMAGES):
        how = damage(rng, cache_folder)
        found = outcome(cache_folder, expected, capsys)
        assert found in ("refused", "harmless"), how
        counts[found] += 1
        for name, raw in whole.items():
            if (cache_folder / name).read_bytes() != raw:
                (cache_folder / name).write_bytes(raw)
    print(dict(counts))
    assert counts["refused"] > DAMAGES / 2


@pytest.mark.skipif(not EVERY_BIT, reason="every bit takes minutes")
def test_every_bit_of_a_small_cache(tmp_path, capsys):
    manifest = make_manifest("hard", samples=6, block=4)
    folder = tmp_path / "cache"
    write_cache(folder, manifest)
    write_digests(folder, 0)
    expected = LogitCache.open(folder).gather(np.arange(6), 0)
    counts: Counter[str] = Counter()
    for name, raw in file_bytes(folder).items():
        # Of the zeros between header, table and data one bit in twenty.
        for bit in (bit for bit in range(8 * len(raw)) if raw[bit // 8] or bit % 20 == 0):
            changed = bytearray(raw)
            changed[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(changed)
            try:
                found = LogitCache.open(folder).gather(np.arange(6), 0)
                assert torch.equal(found, expected), (name, bit)
                is_ok = verify(folder)["ok"]
            except (CacheError, OSError):
                is_ok = False
            counts[f"{name} {'harmless' if is_ok else 'refused'}"] += 1
        (folder / name).write_bytes(raw)
    print(dict(counts))
