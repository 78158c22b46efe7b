"""Shards are read through a bounded number of open files, and never as something else."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deit_fast.data import shard_files
from deit_fast.data.shard_files import ShardFiles, stamps_of
from deit_fast.errors import InputError

BYTES = 64


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    for number in range(40):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]) * BYTES)
    return [str(tmp_path / f"{number}.bin") for number in range(40)]


@pytest.fixture
def files(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> ShardFiles:
    monkeypatch.setattr(shard_files, "_MOST_OPEN", 8)
    return ShardFiles(paths, stamps_of(paths))


def open_now(paths: list[str]) -> int:
    folder = os.path.dirname(paths[0])
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # listdir's own
            continue
    return sum(link.startswith(folder) for link in links)


def test_open_files_are_bounded_and_closed(
    paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "_MOST_OPEN", 8)
    files = ShardFiles(paths, stamps_of(paths))
    for number in [*range(40), *range(40)]:
        assert files.read(number, 3, 5) == bytes([number]) * 5
        assert open_now(paths) <= 8
    assert open_now(paths) == 8
    del files
    assert open_now(paths) == 0


@pytest.mark.parametrize(("soft", "most"), [(1024, 256), (400, 100), (2, 1), (-1, 256)])
def test_the_bound_leaves_descriptors_for_others(
    soft: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert shard_files._most_open() == most


def test_threads_never_read_another_file(files: ShardFiles) -> None:
    """A descriptor that is closed too early would be the number of the next file."""
    start = threading.Barrier(8)

    def read(seed: int) -> int:
        rng = np.random.default_rng(seed)
        start.wait()
        wrong = 0
        for number in rng.integers(0, 40, 400).tolist():
            wrong += files.read(number, 0, BYTES) != bytes([number]) * BYTES
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(read, range(8))) == 0


def _wrong_reads(files: ShardFiles, numbers: Iterable[int] = range(40)) -> int:
    return sum(files.read(n, 0, BYTES) != bytes([n]) * BYTES for n in numbers)


def _read_at_once(files: ShardFiles) -> None:
    last = list(range(32, 40))  # those that the parent left open
    assert _wrong_reads(files, last * 1000) == 0
    assert _wrong_reads(files) == 0


@pytest.mark.dist
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_too(files: ShardFiles, method: str) -> None:
    assert _wrong_reads(files) == 0
    if method == "spawn":  # what it is sent
        assert _wrong_reads(pickle.loads(pickle.dumps(files))) == 0
        return
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_read_at_once, args=(files,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert _wrong_reads(files) == 0


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("change", ["cut", "rewritten", "replaced"])
def test_a_changed_file_is_refused(
    files: ShardFiles, paths: list[str], change: str, is_open: bool
) -> None:
    if is_open:
        files.read(3, 0, BYTES)
    path = Path(paths[3])
    if change == "cut":
        os.truncate(path, 10)
    elif change == "rewritten":
        path.write_bytes(b"x" * BYTES)
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
        path.write_bytes(b"x" * BYTES)
        os.utime(path, ns=(1, 1))
    if change == "replaced" and is_open:  # the old content is still there
        assert files.read(3, 0, BYTES) == b"\x03" * BYTES
    else:
        with pytest.raises(InputError, match=r"3\.bin was changed while it was in use"):
            files.read(3, 0, BYTES)
    assert files.read(4, 0, 1) == b"\x04"


@pytest.mark.parametrize("kind", ["FIFO", "folder", "dangling-link", "device"])
def test_what_is_no_file_is_refused_at_once(files: ShardFiles, paths: list[str], kind: str) -> None:
    path = Path(paths[5])
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    with pytest.raises(InputError, match=r"5\.bin"):
        files.read(5, 0, 1)


def test_a_read_in_parts_is_whole(files: ShardFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at))
    assert files.read(9, 2, 50) == b"\x09" * 50
