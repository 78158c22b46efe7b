"""Tar shards that are damaged, incomplete or unusual: every sample of them, or one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import random
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deit_fast.config import DataConfig
from deit_fast.data import open_source, tar_shards
from deit_fast.data.left_out import LeftOut
from deit_fast.data.shard_files import stamps_of
from deit_fast.data.tar_index import samples_of
from deit_fast.data.tar_members import members
from deit_fast.data.tar_shards import TarShards, _load_index
from deit_fast.errors import InputError
from helpers.tars import tar_of

BLOCK = 512
LINK = {"type": tarfile.LNKTYPE, "size": 0, "linkname": "0.png"}
DEEP = "folder/" * 20  # longer than a ustar name


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(root: Path, **shards: bytes) -> TarShards:
    """The training split of the given shards."""
    (root / "train").mkdir(exist_ok=True)
    for name, content in shards.items():
        (root / "train" / f"{name}.tar").write_bytes(content)
    return TarShards(str(root), "train")


def pair(key: str, label: int = 0) -> list[tuple[str, bytes]]:
    """An image of five blocks, its content of its own, and its label."""
    image = os.fsencode(f"{key} ") * 2500
    return [(f"{key}.png", image[: 4 * BLOCK + 7]), (f"{key}.cls", b"%d" % label)]


def archive(count: int = 6, form: int = tarfile.GNU_FORMAT, folder: str = "") -> bytes:
    return tar_of((m for i in range(count) for m in pair(f"{folder}{i:04d}", i % 3)), form)


def names(source: TarShards) -> list[str]:
    return [os.path.relpath(path, source.folder) for path in source.paths]


def with_size(content: bytes, header: int, size: bytes) -> bytes:
    """The archive with another size field in one header, whose checksum is right."""
    changed = bytearray(content)
    changed[header + 124 : header + 136] = size
    changed[header + 148 : header + 156] = b" " * 8
    changed[header + 148 : header + 156] = b"%06o\0 " % sum(changed[header : header + BLOCK])
    return bytes(changed)


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------

SAMPLE = 8 * BLOCK  # image: header and five blocks; label: header and one block
GOOD = archive()
HEADER = 2 * SAMPLE  # of 0002.png


def flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def zeroed(content: bytes, start: int, length: int) -> bytes:
    return content[:start] + bytes(length) + content[start + length :]


def sparse(**headers: str) -> bytes:
    return tar_of([("a.png", b"abc", {"pax_headers": headers})], tarfile.PAX_FORMAT)


DAMAGE = {
    "bit-in-a-header": (flipped(GOOD, HEADER + 5), f"the header at byte {HEADER} is damaged"),
    "bit-in-a-checksum": (flipped(GOOD, HEADER + 150), f"header at byte {HEADER} is damaged"),
    "zeroed-header": (zeroed(GOOD, HEADER, BLOCK), f"data follows the zeros at byte {HEADER}"),
    "zeroed-page": (zeroed(GOOD, HEADER, 4096), f"data follows the zeros at byte {HEADER}"),
    "cut-between-members": (GOOD[:HEADER], f"ends at byte {HEADER} without the two blocks"),
    "cut-in-a-header": (GOOD[: HEADER + 100], "ends at byte .* without the two blocks"),
    "cut-in-an-image": (GOOD[: HEADER + 1500], "ends within '0002.png'"),
    "one-block-of-zeros": (GOOD[: 6 * SAMPLE + BLOCK], "without the two blocks of zeros"),
    "joined-by-cat": (GOOD + archive(3, folder="b"), "joined by `cat`; join them with `tar -A`"),
    "a-tail-of-zeros": (GOOD + bytes(1 << 20), r"\d+ zeros follow byte"),
    "zeros-only": (bytes(10240), "has no members"),
    "empty": (b"", "ends at byte 0 without"),
    "compressed": (gzip.compress(GOOD, 0), "at byte 0 is none: is it compressed"),
    "size-minus-512": (with_size(GOOD, HEADER, b"\xff" * 10 + b"\xfe\0"), "no number of bytes"),
    "size-minus-2048": (with_size(GOOD, HEADER, b"\xff" * 10 + b"\xf8\0"), "no number of bytes"),
    "size-2-to-80": (with_size(GOOD, HEADER, b"\x80" + b"\x7f" * 11), "ends within '0002.png'"),
    "size-of-letters": (with_size(GOOD, HEADER, b"0000000zz\0\0\0"), "no number of bytes"),
    "pax-size-negative": (sparse(size="-100"), "has size b'-100'"),
    "pax-size-of-letters": (sparse(size="1e3"), "has size b'1e3'"),
    "pax-path-with-zero": (sparse(path="a\0b"), "zero byte in its path"),
    "pax-sparse-map": (sparse(**{"GNU.sparse.map": "a,b"}), "without `tar --sparse`"),
    "pax-sparse-1": (sparse(**{"GNU.sparse.major": "1"}), "without `tar --sparse`"),
    "pax-record-too-long": (
        tar_of([("p", b"99 path=b.png\n", {"type": b"x"}), *pair("a")]), "pax header.* damaged",
    ),
    "pax-global-path": (
        tar_of([("p", b"14 path=b.png\n", {"type": b"g"}), *pair("a")]), "sets names or sizes",
    ),
    "long-name-for-nobody": (tar_of([("l", b"a.png\0", {"type": b"L"})]), "block of zeros at byte"),
    "long-name-too-long": (
        tar_of([("l", bytes(2 << 20), {"type": b"L"}), *pair("a")]), "2097152 bytes of extensions",
    ),
    "old-gnu-sparse": (tar_of([("a.png", b"", {"type": b"S"})]), "'a.png' is of type b'S'"),
    "part-of-a-file": (tar_of([("a.png", b"abc", {"type": b"M"})]), "'a.png' is of type b'M'"),
    "hard-link": (tar_of([*pair("0"), ("1.png", b"", LINK)]), "'1.png' is a link .*--hard-deref"),
    "symbolic-link": (
        tar_of([*pair("0"), ("1.cls", b"", LINK | {"type": tarfile.SYMTYPE})]), "is a link",
    ),
    "the-same-member-twice": (tar_of(pair("0") * 2), "'0' has two images"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_archives_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        opened(tmp_path, a=content, b=GOOD)
    assert "\n" not in str(caught.value) and "a.tar" in str(caught.value)


SWEPT = {
    "ustar": archive(form=tarfile.USTAR_FORMAT),
    "gnu": archive(4, folder=DEEP),
    "pax": archive(4, tarfile.PAX_FORMAT, folder=f"{DEEP}é"),
}


def contents(path: Path) -> tuple[list[tuple[bytes, int, bytes]], str]:
    """Name, label and content of each sample of a shard, and what is left out."""
    left_out = LeftOut()
    with path.open("rb") as file:
        rows = samples_of(file, str(path), path.name, left_out)
    whole = path.read_bytes()
    found = [(m.name, label, whole[m.offset : m.offset + m.size]) for m, label in rows]
    return found, str(left_out)


def damages(content: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Kind and content of damaged copies: flipped bits of headers and elsewhere, whole blocks.

    A run of blocks is shorter than a sample: a whole sample less is a well-formed archive.
    """
    rng = random.Random(seed)
    blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    all_bits = [(i * BLOCK + at, bit) for i in headers for at in range(BLOCK) for bit in range(8)]
    for position, bit in rng.sample(all_bits, min(2 * count, len(all_bits))):
        yield "header bit", flipped(content, position, bit)
    for position in range(0, len(content), BLOCK):
        yield "cut", content[:position]
    for _ in range(count):
        at, other = rng.randrange(len(blocks)), rng.randrange(len(blocks))
        run = blocks[at : at + rng.randrange(1, 7)]
        end = at + len(run)
        yield "bit", flipped(content, rng.randrange(len(content)), rng.randrange(8))
        for kind, parts in (
            ("zeroed", [*blocks[:at], bytes(BLOCK * len(run)), *blocks[end:]]),
            ("removed", [*blocks[:at], *blocks[end:]]),
            ("twice", [*blocks[:end], *blocks[at:]]),
            ("copied", [*blocks[:at], blocks[other], *blocks[at + 1 :]]),
            ("moved", [*blocks[:at], *blocks[end:], *run]),
            ("joined", [*blocks, *blocks[at:]]),
        ):
            yield kind, b"".join(parts)


@pytest.mark.parametrize("form", SWEPT)
def test_no_damage_drops_a_sample_in_silence(tmp_path: Path, form: str) -> None:
    """Refused; the same samples; other bytes in an image or label; or fewer, and it is said."""
    content, path = SWEPT[form], tmp_path / "a.tar"
    path.write_bytes(content)
    whole, nothing = contents(path)
    assert len(whole) == 6 - 2 * (form != "ustar") and not nothing
    outcomes: Counter[str] = Counter()
    for kind, damaged in damages(content, int(os.environ.get("SWEEP", "25")), seed=17):
        path.write_bytes(damaged)
        try:
            found, left_out = contents(path)
        except InputError as error:
            assert "\n" not in str(error)
            outcomes[f"{kind}: refused"] += 1
            continue
        if found == whole:
            outcomes[f"{kind}: same"] += 1
        elif [row[0] for row in found] == [row[0] for row in whole]:
            outcomes[f"{kind}: other content"] += 1  # tar has no checksum of contents
            assert kind != "header bit"
        else:
            outcomes[f"{kind}: said"] += 1
            lost = {row[0] for row in whole} - {row[0] for row in found}
            assert left_out.count("without a known image") and lost, (kind, found)
    print(form, sum(outcomes.values()), dict(sorted(outcomes.items())))
    assert outcomes["header bit: refused"] > 0 and not outcomes["cut: said"]


# ---------------------------------------------------------------------------------------------
# Names and labels
# ---------------------------------------------------------------------------------------------


def test_names_with_dots_keep_every_sample(tmp_path: Path) -> None:
    """WebDataset ends a key at the first dot, which makes these 4 images one sample."""
    keys = [f"img_v1.5_{i:03d}" for i in range(4)]
    source = opened(tmp_path, a=tar_of(m for i, key in enumerate(keys) for m in pair(key, i)))
    assert names(source) == [f"a.tar/{key}.png" for key in keys]
    assert source.labels.tolist() == [0, 1, 2, 3] and not source.left_out


def test_members_of_a_key_need_not_be_neighbours(tmp_path: Path) -> None:
    members = [*pair("a", 1), *pair("b", 2)]
    source = opened(tmp_path, a=tar_of([members[i] for i in (3, 0, 2, 1)]))
    assert names(source) == ["a.tar/a.png", "a.tar/b.png"] and source.labels.tolist() == [1, 2]


def test_the_fingerprint_is_that_of_paths_below_the_folder(tmp_path: Path, monkeypatch) -> None:
    """As in all versions, also of names that are no normal paths; hashed in parts of any length."""
    keys = ["0", "./1", "a//2", "a/../3", "a/./4", "é", "b.c/5", "b/.."]
    source = opened(
        tmp_path,
        a=tar_of(m for i, key in enumerate(keys) for m in pair(f"{key}x", i)),
        b=tar_of(pair("0", 3)),
    )
    source.classes = [f"class {label}" for label in range(len(source.classes))]
    digest = hashlib.sha256()
    for path, size, label in zip(source.paths, source._size, source.labels, strict=True):
        name = os.path.relpath(path, source.folder)
        digest.update(f"{name}\0{size}\0class {label}\n".encode())
    for lines in (1, 3, 4096):
        monkeypatch.setattr(tar_shards, "_LINES", lines)
        assert source._sha256() == digest.hexdigest()


def test_what_is_left_out_is_said_at_every_start(tmp_path: Path, caplog) -> None:
    extra = [
        ("0001.gif", b"GIF89a"), ("0001.cls", b"1"), ("0002.cls", b"2"),  # no known image
        ("0000.mask.png", b"x"), ("0000.boxes.json", b"[[1, 2]]"), ("0000.top5.cls", b"1 2 3"),
        ("0000.txt", b"text"), ("README", b"text"), ("latest", b"", LINK),
        ("._0000.png", b"x"), (".hidden/0003.png", b"x"), ("__MACOSX/0000.png", b"x"),
        ("0000/.ipynb_checkpoints/0000.png", b"x"), ("0000", b"", {"type": tarfile.DIRTYPE}),
    ]  # fmt: skip
    opened(tmp_path, a=tar_of([*pair("0000"), *pair("9999", 1)]), b=tar_of([*pair("0000"), *extra]))
    for name in ("._a.tar", "c.tar.gz"):
        (tmp_path / "train" / name).write_bytes(b"x")
    caplog.set_level(logging.INFO, "deit_fast")
    for _ in range(2):  # the second start reads the stored index
        caplog.clear()
        source = open_source(DataConfig(root=str(tmp_path), source="tar"), "train", 24)
        assert names(source) == ["a.tar/0000.png", "a.tar/9999.png", "b.tar/0000.png"]
        [line] = caplog.messages
        for words in (
            "2 files beside the shards (first: '._a.tar')",
            "2 labels without a known image (first: 'b.tar/0001.cls')",
            "3 further fields of samples (first: 'b.tar/0000.mask.png')",
            "3 files that are no image and no label (first: 'b.tar/0001.gif')",
            "1 links that are no image and no label (first: 'b.tar/latest')",
            "4 hidden files (first: 'b.tar/._0000.png')",
        ):
            assert words in line


def test_a_long_tail_of_zeros_is_said(tmp_path: Path) -> None:
    """A copy that ends at a member's border, in a file of the full size."""
    content = archive(10)
    source = opened(tmp_path, a=content[: 2 * SAMPLE] + bytes(len(content) - 2 * SAMPLE))
    assert (
        source.num_samples == 2 and "are the copies complete? (first: 'a.tar')" in source.left_out
    )


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([("cls", b"1"), ("json", b'{"label": 2}')], "disagree: 'a.cls' says 1, 'a.json' says 2"),
        ([("cls", b"1"), ("cls", b"2")], "disagree: 'a.cls' says 1, 'a.cls' says 2"),
        ([("json", b'{"label": 1, "cls": 2}')], r"a label and another cls: \[1, 2\]"),
        ([("json", b'{"label": 1, "label": 2}')], "must hold a class number"),
        ([("json", b"[" * 100_000)], "must hold a class number"),
        ([("json", b'{"label":' * 100_000)], "must hold a class number"),
        *(
            ([("json", b'{"label": %b}' % value)], "'a.json' must hold a class number")
            for value in (
                b"%d" % 2**80,
                b"%d" % 2**31,
                b"9" * 5000,
                b"-1",
                b"true",
                b"1.0",
                b'"1"',
                b"[1]",
            )
        ),
        *(
            ([("cls", value)], "'a.cls' must hold a class number")
            for value in (b"", b"\0", b"1_0", b"0x1", b"true", b"1.0", "\u0661".encode(), b"null")
        ),
        ([("cls", b"1" + b" " * (1 << 20))], "1048577 bytes, too many for a label"),
        ([("json", b'{"caption": "a cat"}')], "'a.png' has no label"),
        ([], "'a.png' has no label"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: list, words: str) -> None:
    files = [(f"a.{extension}", content) for extension, content in labels]
    with pytest.raises(InputError, match=words) as caught:
        opened(tmp_path, a=tar_of([("a.png", b"x"), *files]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_labels_that_agree(tmp_path: Path) -> None:
    files = [("a.PNG", b"x"), ("a.CLS", b"2\n"), ("a.json", b'{"label": 2, "cls": null}')]
    assert opened(tmp_path, a=tar_of(files)).labels.tolist() == [2]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    keys = ["a", "./b", "../../c", "/etc/d", "é" * 40, "folder/" * 12 + "e", "caf\udce9"]
    keys += [] if form == tarfile.USTAR_FORMAT else [DEEP * 3 + "f", "é" * 200]
    path.write_bytes(tar_of((m for key in keys for m in pair(key)), form))
    with path.open("rb") as file:
        ours = [(os.fsdecode(m.name), m.offset, m.size) for m in members(file, str(path))]
    with tarfile.open(path) as theirs:
        assert ours == [(m.name, m.offset_data, m.size) for m in theirs]
    assert len(ours) == 2 * len(keys)


def test_the_fingerprint_of_a_whole_archive_stays(tmp_path: Path) -> None:
    """Caches hold it: as it was when tarfile read the shards."""
    shards = {}
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        files = []
        for i in range(4):
            key = ("folder/" * (12 * i) + "é" * i + f"{i:03d}") if number else f"./x/{i:03d}"
            label = b"%d\n" % (i % 3) if i % 2 else json.dumps({"label": i % 3, "w": 3}).encode()
            files += [(f"{key}.jpg", b"image" * (200 * i + number)), (f"{key}.txt", b"text")]
            files += [(f"{key}.{'cls' if i % 2 else 'json'}", label), (f"{key}.seg.png", b"mask")]
        shards[str(number)] = tar_of(files, form)
    assert opened(tmp_path, **shards).fingerprint()["dataset.sha256"] == (
        "8989f8caa9a4339540bbae54f4dd72b67773f4b25055a02711f354409e7aa550"
    )


def test_paths_stay_below_their_shard(tmp_path: Path) -> None:
    """An absolute member is no file of this machine; a moved data set stays the same."""
    shards = {"a": tar_of([*pair("/etc/a"), *pair("caf\udce9", 1)])}
    for root in ("here", "far/away"):
        (tmp_path / root).mkdir(parents=True)
    here, there = (opened(tmp_path / root, **shards) for root in ("here", "far/away"))
    assert here.fingerprint() == there.fingerprint()
    assert names(here) == ["a.tar/etc/a.png", "a.tar/caf\udce9.png"]


# ---------------------------------------------------------------------------------------------
# The stored index
# ---------------------------------------------------------------------------------------------

INDEX = "train/.deit-fast-index.npz"


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"format": np.array(2)},
        lambda a: {"format": np.array([3, 3])},
        lambda a: {"format": np.array(3.0)},
        lambda a: {"label": a["label"][:-1]},
        lambda a: {"label": np.array(0)},
        lambda a: {"label": a["label"] - 3},
        lambda a: {"label": a["label"] + (1 << 40)},
        lambda a: {"shard": a["shard"] + 1},
        lambda a: {"offset": a["offset"] + (1 << 40)},
        lambda a: {"offset": a["offset"] * 0 + (1 << 62), "size": a["size"] * 0 + (1 << 62)},
        lambda a: {"size": a["size"] - (1 << 40)},
        lambda a: {"names": a["names"][:-1]},
        lambda a: {"name_end": a["name_end"][::-1].copy()},
        lambda a: {"name_end": a["name_end"] * 0 + len(a["names"]), "names": a["names"][:0]},
        lambda a: {"stamps": a["stamps"][:0]},
        lambda a: {"left_out": np.zeros(3)},
    ],
)
def test_a_stored_index_is_not_believed(tmp_path: Path, change) -> None:
    source = opened(tmp_path, a=GOOD)
    arrays = dict(np.load(tmp_path / INDEX))
    np.savez(tmp_path / INDEX, **(arrays | change(arrays)))
    again = opened(tmp_path)
    assert again.paths[:] == source.paths[:] and again.labels.tolist() == source.labels.tolist()
    assert [again.read(i) for i in range(6)] == [source.read(i) for i in range(6)]
    assert int(np.load(tmp_path / INDEX)["format"]) == 3


def test_a_shard_rewritten_with_equal_size_and_time_is_indexed_again(tmp_path: Path) -> None:
    shard = tmp_path / "train/a.tar"
    assert opened(tmp_path, a=tar_of([*pair("0", 0), *pair("1", 1)])).labels.tolist() == [0, 1]
    before = shard.stat()
    time.sleep(0.05)  # a file system's clock may tick every 10 ms
    shard.write_bytes(tar_of([*pair("0", 1), *pair("1", 0)]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = shard.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    source = opened(tmp_path)
    assert source.labels.tolist() == [1, 0]
    shard.chmod(0o600)
    assert source.read(0)  # in use, rights and names may change


def test_no_bit_of_a_stored_index_matters(tmp_path: Path) -> None:
    source, rng = opened(tmp_path, a=GOOD), random.Random(17)
    content, path = (tmp_path / INDEX).read_bytes(), tmp_path / "cut.npz"
    expected = [source._offset.tolist(), source._size.tolist(), source.labels.tolist()]
    stamps = stamps_of([str(tmp_path / "train/a.tar")])
    outcomes: Counter[str] = Counter()
    for _ in range(8 * int(os.environ.get("SWEEP", "25"))):
        at = rng.randrange(len(content))
        path.write_bytes(rng.choice([content[:at], flipped(content, at, rng.randrange(8))]))
        index = _load_index(path, ["a.tar"], stamps)
        if index is not None:
            assert [index[name].tolist() for name in ("offset", "size", "label")] == expected
            assert index["names"].tobytes() == b"".join(b"%04d.png" % i for i in range(6))
        outcomes["same" if index else "made again"] += 1
    print(dict(outcomes))
    assert outcomes["made again"] > outcomes["same"]


@pytest.mark.parametrize("name", [INDEX, "train/a.tar", "classes.txt"])
def test_a_fifo_is_refused_at_once(tmp_path: Path, name: str) -> None:
    opened(tmp_path, a=GOOD)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a FIFO, not a file"):
        opened(tmp_path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_shard_counts_twice_through_a_link(tmp_path: Path, link) -> None:
    opened(tmp_path, a=GOOD)
    link(tmp_path / "train/a.tar", tmp_path / "train/b.tar")
    with pytest.raises(InputError, match=r"/b\.tar and .*/a\.tar are one file, through a link"):
        opened(tmp_path)


def test_names_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text, words in (
        ("ant\n\ncat\n", "line 2 is empty"), ("", "line 1 is empty"), ("ant\nbee\n", "of class 2"),
        ("\udcff", "cannot read"),
    ):  # fmt: skip
        (tmp_path / "classes.txt").write_bytes(os.fsencode(text))
        with pytest.raises(InputError, match=words):
            opened(tmp_path, a=GOOD)
    (tmp_path / "classes.txt").write_text("ant\r\nbee \ncat\n\n", newline="")
    assert opened(tmp_path).classes == ["ant", "bee", "cat"]
    (tmp_path / "classes.txt").write_text("crane\nbee\ncrane\n")
    assert opened(tmp_path).classes == ["crane", "bee", "crane #2"]
    assert "lines 1 and 3 both name class 'crane'" in caplog.text
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.txt").symlink_to("nowhere")
    with pytest.raises(InputError, match="is a link to nowhere"):
        opened(tmp_path)
