"""Two writers of one block: a live one keeps it, a dead one loses it, the bytes stay the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast.cache import LogitCacheWriter, build_manifest, verify
from deit_fast.cache.locks import BlockLocks
from deit_fast.config import CodecConfig
from deit_fast.errors import InputError
from deit_fast.runtime import locks
from helpers.caches import file_bytes, pending_blocks

SAMPLES, CLASSES, BLOCK, VIEWS = 200, 20, 16, 3


@pytest.fixture(autouse=True)
def short_retry(monkeypatch):
    monkeypatch.setattr(locks, "RETRY_SECONDS", 0.1)


def manifest():
    return build_manifest(
        CodecConfig(name="topk", k=4), num_classes=CLASSES, num_samples=SAMPLES, tau=1.0,
        fingerprint={"a": 1}, block_records=BLOCK,
    )  # fmt: skip


def logits_of(view: int) -> torch.Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(view))


def write_all(path, rank: int = 0, world: int = 1, seconds: float = 0.0) -> None:
    """As precompute: this rank's blocks, in two calls each, the next claimed ahead."""
    with LogitCacheWriter(path, manifest(), rank=rank, world_size=world) as writer:
        pending = pending_blocks(writer, range(VIEWS))
        mine = [key for key in pending if (key[0] * writer.num_blocks + key[1]) % world == rank]
        for index, (view, block) in enumerate(mine):
            if index + 1 < len(mine):
                writer.locks.acquire(*mine[index + 1])
            start, stop = writer.block_range(block)
            for ids in np.array_split(np.arange(start, stop), 2):
                writer.write(ids, view, logits_of(view)[ids])
                time.sleep(seconds)


def locks_in(path: Path) -> list[Path]:
    return sorted(path.glob(".lock-*"))


def fork(function, *args):
    context = multiprocessing.get_context("forkserver")
    worker = context.Process(target=function, args=args)
    worker.start()
    return worker


def test_a_locked_block_is_refused_and_its_owner_named(tmp_path):
    with (
        LogitCacheWriter(tmp_path, manifest()) as first,
        LogitCacheWriter(tmp_path, manifest()) as second,
    ):
        first.write(np.arange(3), 0, logits_of(0)[:3])
        with pytest.raises(InputError) as error:
            second.write(np.arange(5), 0, logits_of(0)[:5])
        text = str(error.value)
        assert ".lock-view-00000-block-0000000: view 0 block 0 is being written by" in text
        assert f"pid {os.getpid()} on host" in text and "\n" not in text
        second.write(np.arange(16, 32), 0, logits_of(0)[16:32])  # another block is free
        first.write(np.arange(3, 16), 0, logits_of(0)[3:16])
        second.write(np.arange(5), 0, logits_of(0)[:5])  # committed meanwhile: skipped
        assert locks_in(tmp_path) == []
    assert verify(tmp_path)["complete"] == 2


def test_locks_go_with_the_writer_and_with_an_exception(tmp_path):
    with pytest.raises(KeyError), LogitCacheWriter(tmp_path, manifest()) as writer:
        writer.locks.acquire(0, 1)
        writer.locks.acquire(2, 0)
        assert len(locks_in(tmp_path)) == 2
        raise KeyError
    assert locks_in(tmp_path) == []


def test_rivals_are_found_at_the_start_and_ranks_of_one_job_are_none(tmp_path):
    def start(rank: int, world: int) -> LogitCacheWriter:
        return LogitCacheWriter(tmp_path, manifest(), rank=rank, world_size=world)

    with start(0, 3) as running:
        running.locks.acquire(1, 0)
        for rank in (1, 2):
            with start(rank, 3) as sibling:
                sibling.locks.refuse_rivals(range(VIEWS))
        for rank, world in [(0, 3), (1, 2), (0, 1)]:
            with start(rank, world) as rival:
                rival.locks.refuse_rivals([0, 2])
                with pytest.raises(InputError, match=r"pid \d+ on host .* \(rank 0 of 3\)"):
                    rival.locks.refuse_rivals(range(VIEWS))
        running.locks.refuse_rivals(range(VIEWS))  # its own lock is no rival


def test_a_killed_writer_loses_its_lock_at_once(tmp_path):
    worker = fork(write_all, tmp_path, 0, 1, 0.05)
    while not locks_in(tmp_path):
        time.sleep(0.005)
    worker.kill()
    worker.join()
    write_all(tmp_path)
    write_all(tmp_path.with_name("whole"))
    assert file_bytes(tmp_path) == file_bytes(tmp_path.with_name("whole"))


def test_files_of_dead_writers_are_deleted_whatever_they_hold(tmp_path):
    texts = ["", "[]", '{"pid": ' * 900, '{"pid": "x"}', '{"token": "a", "space": ""}']
    for block, text in enumerate(texts):
        (tmp_path / f".lock-view-00000-block-{block:07d}").write_text(text)
    LogitCacheWriter(tmp_path, manifest()).close()
    assert locks_in(tmp_path) == []


def test_a_torn_file_of_a_live_writer_is_refused_too(tmp_path):
    with LogitCacheWriter(tmp_path, manifest()) as first:
        first.locks.acquire(0, 0)
        locks_in(tmp_path)[0].write_text('{"host": 5, "pid": 1, "rank": 0, "world_size": 1}')
        with (
            LogitCacheWriter(tmp_path, manifest()) as second,
            pytest.raises(InputError, match="is being written by another process; wait for it"),
        ):
            second.locks.acquire(0, 0)


def test_of_many_that_lock_one_block_one_wins(tmp_path):
    """Eight at once, twenty times, beside others that look for dead writers."""
    for round_ in range(20):
        found = [BlockLocks(tmp_path) for _ in range(8)]
        barrier, won = threading.Barrier(8), []

        def take(one, round_=round_, barrier=barrier, won=won):
            barrier.wait()
            try:
                one.remove_dead()
                one.acquire(0, round_)
                won.append((one, json.loads(locks_in(tmp_path)[0].read_text())["pid"]))
            except InputError:
                pass

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(take, found))
        assert [pid for _, pid in won] == [os.getpid()]
        won[0][0].close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["deleted", "replaced", "moved"])
def test_a_writer_whose_lock_was_taken_away_by_hand_stops_before_its_commit(tmp_path, harm):
    cache = tmp_path / "cache"
    with LogitCacheWriter(cache, manifest()) as writer:
        writer.write(np.arange(3), 0, logits_of(0)[:3])
        lock = locks_in(cache)[0]
        if harm == "moved":
            cache.rename(tmp_path / "away")
        else:
            lock.unlink()
        if harm == "replaced":
            lock.write_text("{}")
        with pytest.raises(InputError, match="was moved, deleted or replaced while view 0 block 0"):
            writer.write(np.arange(3, 16), 0, logits_of(0)[3:16])
    assert lock.exists() == (harm == "replaced"), "the file of another is not deleted"
    assert cache.exists() == (harm != "moved")
    if harm == "moved":
        cache = tmp_path / "away"
    assert verify(cache)["complete"] == 0
    write_all(cache)
    assert verify(cache)["pending"] == 0


@pytest.mark.dist
def test_killed_at_20_random_moments_under_changing_world_sizes(tmp_path):
    """Kills of the whole command are in test_precompute.py."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    write_all(whole)
    draw = random.Random(5)
    kills = left = 0
    while kills < 20:
        world = draw.choice([1, 2, 4])
        workers = [fork(write_all, torn, rank, world, 0.01) for rank in range(world)]
        deadline = time.monotonic() + 60  # on a loaded machine a process takes seconds to start
        while not locks_in(torn) and any(worker.is_alive() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25))
        for worker in workers:
            worker.kill()
            worker.join()
        kills += 1
        left += bool(locks_in(torn))
        if kills % 6 == 0:  # a damaged block in between; or all would be done before the end
            for path in sorted(torn.glob("view-*.dlc"))[:1]:
                with open(path, "r+b") as file:
                    file.seek(-draw.randrange(1, 2000), 2)
                    file.write(b"\xff\xfe\xfd")
    assert left >= 3, "no kill met a writer at work"
    write_all(torn, 0, 2)
    write_all(torn, 1, 2)
    assert file_bytes(torn) == file_bytes(whole)
