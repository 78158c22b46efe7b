"""Listing a split in one pass, and its stored index, which is trusted only while it is right."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bench.two_passes import TwoPasses, size_of
from deit_fast import _C
from deit_fast.data import folder_index, folder_listing
from deit_fast.data.folder_listing import Listing, ListingPass
from deit_fast.data.image_folder import ImageFolder
from deit_fast.errors import InputError
from deit_fast.inputs import class_folders
from deit_fast.runtime.files import crc32c

ODD_TREE_SHA256 = "a227bda31f265737e0f6890aa35e21bb44bd17e0f14dbc766ce87b2ec82ccf65"


@pytest.fixture(autouse=True)
def indices(tmp_path_factory, monkeypatch) -> Path:
    """The folder of the indices; every split is large enough for one."""
    base = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    monkeypatch.setattr(folder_index, "FEWEST", 0)
    return base / "deit-fast" / "folders"


@pytest.fixture
def later(monkeypatch) -> None:
    """A clock by which the folders of the test were changed long ago."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The folders of the passes that were made to their end."""
    made: list[str] = []
    listing = ListingPass.listing

    def noted(self: ListingPass) -> Listing:
        made.append(self._folder)
        return listing(self)

    monkeypatch.setattr(ListingPass, "listing", noted)
    return made


def write_odd_tree(root: Path) -> Path:
    """A split with nested, linked, hidden, missing and badly named files; its folder."""
    far, split = root / "far", root / "data" / "train"
    files = [
        "a/1.jpg", "a/B.PNG", "a/deep/er/2.jpeg", "a/deep/0.jpg", "a/deep-1/3.jpg", "a/notes.txt",
        "b/.hidden.jpg", "a/.git/4.jpg", "a/dir.jpg/5.webp", "a/deep/.DS_Store", "a/deep/a.gif",
        "b/6.Tiff", os.fsdecode(b"b/caf\xe9.jpg"), "b/\ue000.jpg", os.fsdecode(b"b/\xff.bmp"),
        "b/new\nline.jpg", os.fsdecode(b"caf\xe9/7.ppm"), "beside.jpg", ".cache/8.jpg",
        "a/deep-1/.DS_Store", "a/dir.jpg/.DS_Store", "a/deep/er/.DS_Store",
    ]  # fmt: skip
    for number, name in enumerate(files):
        path = split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (number * 37))
    (far / "inner").mkdir(parents=True)
    (far / "inner" / "9.jpg").write_bytes(b"far")
    (split / "empty").mkdir()
    (split / "a" / "link").symlink_to(far)
    (split / "b" / "linked.jpg").symlink_to(far / "inner" / "9.jpg")
    (split / "b" / "gone.jpg").symlink_to("/nowhere/x.jpg")
    (split / "b" / "gone").symlink_to("/nowhere/y")
    (split / "b" / "loop.jpg").symlink_to("loop.jpg")
    return split


def open_listing(split: Path, verify: str = "names") -> Listing:
    return folder_index.open_listing(str(split), class_folders(str(split)), verify)


def names(listing: Listing) -> list[str]:
    return [listing.name(index) for index in range(listing.num_images)]


def kinds(left_out: str) -> list[str]:
    """In one order: the system decides which kind is met first."""
    return sorted(left_out.split("; "))


def require_equal(one: Listing, other: Listing) -> None:
    for name in ("names", "ends", "labels", "sizes", "stamps"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("classes", "folders", "left_out", "digest"):
        assert getattr(one, name) == getattr(other, name), name


# ---------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow_server", [False, True], ids=["fast", "slow"])
def test_one_pass_finds_what_two_passes_find(tmp_path, monkeypatch, slow_server):
    if slow_server:  # sizes in threads from the second folder on
        monkeypatch.setattr(folder_listing, "_SLOW_STAT", -1.0)
        monkeypatch.setattr(folder_listing, "_ENOUGH", 0)
    split = write_odd_tree(tmp_path)
    listing, reference = open_listing(split), TwoPasses(str(split), class_folders(str(split)))
    assert [os.path.join(split, name) for name in names(listing)] == list(reference.paths)
    assert np.array_equal(listing.labels, reference.labels) and listing.labels.dtype == np.int64
    assert listing.sizes.tolist() == [size_of(path) for path in reference.paths]
    assert kinds(listing.left_out) == kinds(reference.left_out)
    assert listing.digest == reference.sha256()
    assert listing.sizes.min() == -1 and listing.num_images == 16
    assert listing.classes == ["a", "b", "caf\udce9", "empty"]
    assert "a/link/inner" in listing.folders and "a/dir.jpg" in listing.folders
    entries = dict(zip(listing.folders, listing.stamps[:, -1].tolist(), strict=True))
    assert {name: entries[name] for name in ("", "a", "empty")} == {"": 6, "a": 8, "empty": 0}


@pytest.mark.parametrize("seed", range(3))
def test_names_of_any_bytes_are_ordered_as_text(tmp_path, seed):
    """Bytes that are no text are surrogates in Python, which sort otherwise than the bytes."""
    random, folder = np.random.default_rng(seed), os.fsencode(tmp_path / "train" / "a")
    os.makedirs(folder)
    letters = [b"a", b"B", b"\xff", b"\xc3\xa9", b"\xee\x80\x80", b"\xf0\x9f\x98\x80", b"\x80"]
    for _ in range(300):
        stem = b"".join(random.choice(letters, random.integers(1, 6)))
        with open(os.path.join(folder, stem + random.choice([b".jpg", b".JPeG", b".txt"])), "wb"):
            pass
    split = str(tmp_path / "train")
    listing, reference = open_listing(Path(split)), TwoPasses(split, class_folders(split))
    assert [os.path.join(split, name) for name in names(listing)] == list(reference.paths)
    assert listing.digest == reference.sha256()
    assert kinds(listing.left_out) == kinds(reference.left_out)


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> str:
    """60,000 images, a listing of which takes tens of milliseconds."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "0.jpg").touch()
    for number in range(1, 60_000):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    return str(folder)


@pytest.mark.parametrize("threads", [1, 16])
def test_ctrl_c_ends_the_listing_of_a_large_folder(large_folder, threads):
    """A handler that raises at its third call: without a look at signals, a listing has but one."""
    called = []

    def handle(number: int, frame: object) -> None:
        called.append(number)
        if len(called) == 3:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGPROF, handle)
    try:
        signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)  # of the processor's time
        with pytest.raises(KeyboardInterrupt):
            _C.list_folder(os.fsencode(large_folder), (".jpg",), threads)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


BROKEN_STAT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
int fstatat(int folder, const char* name, struct stat* status, int flags) {
  int (*real)(int, const char*, struct stat*, int) = dlsym(RTLD_NEXT, "fstatat");
  if (strncmp(name, "broken", 6) != 0) return real(folder, name, status, flags);
  errno = EIO;
  return -1;
}
"""


@pytest.mark.parametrize("threads", [1, 16])
def test_a_passing_error_is_no_link_to_nothing(tmp_path, threads):
    """As of a server: the wrong size would stay in the index."""
    (tmp_path / "a").mkdir()
    for name in ("1.jpg", "broken.jpg", "notes.txt"):
        (tmp_path / "a" / name).touch()
    (tmp_path / "shim.c").write_text(BROKEN_STAT)
    shim = str(tmp_path / "shim.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, str(tmp_path / "shim.c")], check=True)
    code = (
        "import sys; from deit_fast import _C\n"
        "_C.list_folder(sys.argv[1].encode(), ['.jpg'], int(sys.argv[2]))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a"), str(threads)]
    done = subprocess.run(
        words, env=os.environ | {"LD_PRELOAD": shim}, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert last == f"OSError: [Errno 5] Input/output error (looking up): '{tmp_path}/a/broken.jpg'"


def test_a_listing_in_a_thread_does_not_abort_a_process_that_ends(large_folder):
    """A thread that asks for the GIL is ended while the interpreter ends."""
    code = (
        "import sys, threading, time; from deit_fast import _C\n"
        "words = sys.argv[1].encode(), ['.none'] * 20_000, 1  # takes seconds\n"
        "threading.Thread(target=_C.list_folder, args=words, daemon=True).start()\n"
        "time.sleep(0.2)"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, large_folder], check=True)


def test_the_digest_of_existing_caches_stays(tmp_path):
    """The literal was computed by the code of earlier versions."""
    split = write_odd_tree(tmp_path)
    assert open_listing(split).digest == ODD_TREE_SHA256
    assert open_listing(split, "sizes").digest == ODD_TREE_SHA256


def test_a_pass_can_stop_and_go_on(tmp_path):
    split = write_odd_tree(tmp_path)
    whole, parts = (ListingPass(str(split), class_folders(str(split))) for _ in range(2))
    assert whole.run()
    assert not parts.run(most=1) and not parts.run(most=10) and parts.run()
    require_equal(whole.listing(), parts.listing())


def test_a_pass_shows_how_many_images_it_has_found(tmp_path, monkeypatch):
    shown: list[str] = []

    class Bar(folder_listing.Progress):
        def show(self, figures):
            shown.append(f"{self._done} of {self._total}: {figures['found']}")
            super().show(figures)

    monkeypatch.setattr(folder_listing, "Progress", Bar)
    monkeypatch.setattr(folder_listing, "_MOMENT", 1e9)
    split = write_odd_tree(tmp_path)
    open_listing(split)
    assert not shown
    monkeypatch.setattr(folder_listing, "_MOMENT", 0.0)
    open_listing(split, "sizes")
    assert shown[-1] == "3 of 4: 16 images" and len(shown) == 10


# ---------------------------------------------------------------------------------------------
# When the index is used
# ---------------------------------------------------------------------------------------------


def test_the_second_start_asks_for_the_folders_alone(tmp_path, later, passes, monkeypatch):
    split = write_odd_tree(tmp_path)
    first = open_listing(split)
    classes, asked, stat = class_folders(str(split)), [], os.stat
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "listdir", None)
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(str(path)) or stat(path))
    second = folder_index.open_listing(str(split), classes, "names")
    monkeypatch.undo()
    assert passes == [str(split)]
    require_equal(first, second)
    assert not any(array.flags.writeable for array in (second.names, second.ends, second.labels))
    within = {path for path in asked if path.startswith(str(split))}
    assert within == {os.path.join(split, name) for name in second.folders} | {str(split)}


def test_a_source_from_an_index_is_the_same(tmp_path, later, passes):
    write_odd_tree(tmp_path)
    one, two = (ImageFolder(str(tmp_path / "data"), "train") for _ in range(2))
    assert len(passes) == 1 and list(one.paths) == list(two.paths)
    assert one.fingerprint() == two.fingerprint() and one.left_out == two.left_out
    two.follow(["empty", *one.classes[:3]], "the run")
    assert two.labels.tolist() == (one.labels + 1).tolist()


def test_a_small_split_has_no_index(tmp_path, later, passes, indices, monkeypatch):
    monkeypatch.setattr(folder_index, "FEWEST", 17)
    split = write_odd_tree(tmp_path)
    open_listing(split)
    open_listing(split)
    assert len(passes) == 2 and not indices.exists()


def rename(split: Path) -> None:
    (split / "b/6.Tiff").rename(split / "b/5.Tiff")


def replace(split: Path) -> None:
    (split / "new").write_bytes(b"other")
    (split / "new").rename(split / "a/1.jpg")


def exchange(split: Path) -> None:
    """Two folders that look alike."""
    for old, new in (("b", "c"), ("a", "b"), ("c", "a")):
        (split / old).rename(split / new)


def add_with_old_times(split: Path) -> None:
    folder = split / "a/deep/er"
    times = folder.stat()
    (folder / "new.jpg").touch()
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {
    "added": lambda split: (split / "a/new.jpg").touch(),
    "added deep": lambda split: (split / "a/link/inner/new.jpg").touch(),
    "removed": lambda split: (split / "a/1.jpg").unlink(),
    "renamed": rename,
    "replaced": replace,
    "exchanged": exchange,
    "times set back": add_with_old_times,
    "new class": lambda split: (split / "new").mkdir(),
    "beside": lambda split: (split / "new.txt").touch(),
    "no class": lambda split: (split / "empty").rmdir(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=[n.replace(" ", "-") for n in CHANGES])
def test_a_changed_folder_is_listed_again(tmp_path, later, passes, change, caplog):
    split = write_odd_tree(tmp_path)
    open_listing(split)
    change(split)
    caplog.set_level(logging.INFO, "deit_fast")
    listing, reference = open_listing(split), TwoPasses(str(split), class_folders(str(split)))
    assert len(passes) == 2 and "since it was indexed" in caplog.text
    assert listing.digest == reference.sha256()
    assert kinds(listing.left_out) == kinds(reference.left_out)
    require_equal(open_listing(split), listing)
    assert len(passes) == 2


def test_a_class_that_another_link_target_takes_is_listed_again(tmp_path, later, passes):
    split = write_odd_tree(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    open_listing(split)
    (tmp_path / "far").rename(tmp_path / "moved")
    (tmp_path / "far").symlink_to(other)  # what a/link leads to
    assert open_listing(split).num_images == 15 and len(passes) == 2


def test_another_folder_of_the_same_name_has_its_own_index(tmp_path, later, passes):
    split = write_odd_tree(tmp_path)
    open_listing(split)
    split.rename(tmp_path / "old")
    (split / "a").mkdir(parents=True)
    (split / "a" / "1.jpg").touch()
    assert names(open_listing(split)) == ["a/1.jpg"]


def test_a_folder_that_was_just_changed_is_not_trusted(tmp_path, passes, caplog):
    """Its clock may not have ticked since, so a further change would leave no trace."""
    split = write_odd_tree(tmp_path)
    open_listing(split)
    caplog.set_level(logging.INFO, "deit_fast")
    open_listing(split)
    assert len(passes) == 2 and "a folder was changed shortly before it was indexed" in caplog.text


def test_sizes_are_those_of_the_indexing_unless_they_are_asked_for(tmp_path, later, passes, caplog):
    split = write_odd_tree(tmp_path)
    old = open_listing(split)
    (split / "a/deep/0.jpg").write_bytes(b"other size")
    caplog.set_level(logging.WARNING, "deit_fast")
    assert open_listing(split).digest == old.digest and len(passes) == 1 and not caplog.messages
    new = open_listing(split, "sizes")
    assert new.digest == TwoPasses(str(split), class_folders(str(split))).sha256() != old.digest
    [line] = caplog.messages
    assert line.startswith(
        f"files of {split} have other sizes than at the last indexing: 1, the first is a/deep/0.jpg"
    )
    assert open_listing(split).digest == new.digest and len(passes) == 2
    open_listing(split, "sizes")
    assert len(passes) == 3 and len(caplog.messages) == 1


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def other_version(content: bytearray) -> None:
    content[16] += 1
    content[4092:4096] = crc32c(bytes(content[:4092])).to_bytes(4, "little")


def ends_backwards(content: bytearray) -> None:
    """Right checksums over wrong content, as of a program with a fault."""
    fields = list(folder_index._HEADER.unpack_from(content))
    start = 4096 + -(-fields[9] // 4096) * 4096
    content[start : start + 8] = (10**12).to_bytes(8, "little")
    fields[12] = crc32c(bytes(content[start : start + fields[11]]))
    content[: folder_index._HEADER.size] = folder_index._HEADER.pack(*fields)
    content[4092:4096] = crc32c(bytes(content[:4092])).to_bytes(4, "little")


def flipped(position: float):
    def flip(content: bytearray) -> None:
        content[int(position * 4096)] ^= 1

    return flip


DAMAGE = {
    "empty": bytearray.clear,
    "no-header": lambda content: content.__delitem__(slice(4000, None)),
    "short": lambda content: content.__delitem__(slice(-1, None)),
    "long": lambda content: content.append(0),
    "other-version": other_version,
    "ends": ends_backwards,
} | {f"flipped-{page}": flipped(page + 0.001) for page in range(9)}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_made_again_with_one_warning(
    tmp_path, later, passes, indices, caplog, damage
):
    split = write_odd_tree(tmp_path)
    whole = open_listing(split)
    [path] = indices.glob("*.index")
    content = bytearray(path.read_bytes())
    damage(content)
    path.unlink()  # what is mapped stays
    path.write_bytes(content)
    require_equal(open_listing(split), whole)
    [line] = caplog.messages
    assert line == f"the index {path} is damaged, or of another folder or version: it is made again"
    require_equal(open_listing(split), whole)
    assert len(passes) == 2 and len(caplog.messages) == 1


def test_the_index_of_another_folder_is_refused(tmp_path, later, indices, caplog):
    one, two = (write_odd_tree(tmp_path / name) for name in ("one", "two"))
    open_listing(one)
    [path] = indices.glob("*.index")
    (two / "a/1.jpg").unlink()
    whole = open_listing(two)
    [other] = {*indices.glob("*.index")} - {path}
    os.replace(path, other)
    require_equal(open_listing(two), whole)
    assert "damaged, or of another folder or version" in caplog.text


@pytest.mark.parametrize("kind", ["file", "folder-of-index", "fifo", "lock-fifo"])
def test_an_index_that_cannot_be_written_is_no_error(
    tmp_path, later, passes, indices, caplog, kind
):
    split = write_odd_tree(tmp_path)
    path = folder_index._path_of(str(split))
    if kind == "file":  # in place of the folder; also root cannot write below it
        indices.parent.mkdir(parents=True)
        indices.touch()
    else:
        indices.mkdir(parents=True)
        make = {"folder-of-index": os.mkdir}.get(kind, os.mkfifo)
        make(path.with_suffix(".lock") if kind == "lock-fifo" else path)
    for _ in range(2):
        assert open_listing(split).num_images == 16
    if kind in ("file", "lock-fifo"):
        assert not caplog.messages
    assert len(passes) == (1 if kind == "lock-fifo" else 2)


def test_a_user_without_a_home_needs_no_index(tmp_path, later, passes, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    split = write_odd_tree(tmp_path)
    for _ in range(2):
        assert open_listing(split).num_images == 16
    assert len(passes) == 2 and not caplog.messages


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["names", "sizes"])
def test_one_lists_and_the_others_wait(tmp_path, passes, monkeypatch, caplog, verify):
    """Those that waited take the index even of folders that were just changed, and of sizes."""
    split = write_odd_tree(tmp_path)
    waits = threading.Semaphore(0)
    caplog.set_level(logging.INFO, "deit_fast")
    info, listing = folder_index.log.info, ListingPass.listing

    def noted(text: str, *values: object) -> None:
        info(text, *values)
        if text.startswith("waiting for another process"):
            waits.release()

    def held(self: ListingPass) -> Listing:
        for _ in range(3):
            assert waits.acquire(timeout=60)
        return listing(self)

    monkeypatch.setattr(folder_index.log, "info", noted)
    monkeypatch.setattr(ListingPass, "listing", held)
    found: list[Listing] = []
    threads = [
        threading.Thread(target=lambda: found.append(open_listing(split, verify))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(passes) == 1 and len(found) == 4
    for other in found[1:]:
        require_equal(found[0], other)
    assert caplog.text.count(f"waiting for another process, which lists {split}") == 3


def test_a_killed_process_leaves_no_lock(tmp_path, later, passes, indices):
    split = write_odd_tree(tmp_path)
    code = (
        "import os, sys\n"
        "from deit_fast.data import folder_index\n"
        "from deit_fast.inputs import class_folders\n"
        "folder_index.FEWEST = 0\n"
        "folder_index.struct.pack = lambda *values: os.kill(os.getpid(), 9)\n"
        "folder_index.open_listing(sys.argv[1], class_folders(sys.argv[1]), 'names')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(split)], timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in indices.glob(".tmp-*")]
    require_equal(open_listing(split), open_listing(split))
    assert len(passes) == 1 and not [*indices.glob(".tmp-*")]


def test_refusals_are_those_of_a_pass(tmp_path, later, indices):
    split = write_odd_tree(tmp_path)
    open_listing(split)
    (split / "b" / "again").symlink_to(tmp_path / "far")
    with pytest.raises(InputError, match=r"b/again and .*a/link are one folder, through a link"):
        open_listing(split)
    (split / "b" / "again").unlink()
    (split / "c").symlink_to("b")
    with pytest.raises(InputError, match=r"classes 'b' and 'c' of .* are one folder: a link"):
        open_listing(split)
