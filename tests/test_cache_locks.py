"""Two writers of one block: the live one keeps it, the dead one loses it, the bytes stay."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast.cache import CacheError, LogitCacheWriter, build_manifest, locks, verify
from deit_fast.config import CodecConfig

SAMPLES, CLASSES, BLOCK, VIEWS = 200, 20, 16, 3


def manifest():
    return build_manifest(
        CodecConfig(name="topk", k=4, block_records=BLOCK),
        num_classes=CLASSES, num_samples=SAMPLES, tau=1.0, fingerprint={"a": 1},
    )  # fmt: skip


def logits_of(view: int) -> torch.Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(view))


def write_all(path, rank: int = 0, world: int = 1, seconds: float = 0.0) -> None:
    """As precompute: this rank's blocks, in two calls each, the next claimed ahead."""
    with LogitCacheWriter(path, manifest(), rank=rank, world=world) as writer:
        pending = writer.pending(range(VIEWS))
        mine = [key for key in pending if (key[0] * writer.num_blocks + key[1]) % world == rank]
        for place, (view, block) in enumerate(mine):
            if place + 1 < len(mine):
                writer.claim(*mine[place + 1])
            start, stop = writer.block_range(block)
            for ids in np.array_split(np.arange(start, stop), 2):
                writer.write(ids, view, logits_of(view)[ids])
                time.sleep(seconds)


def content(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(path.iterdir())}


def locks_in(path: Path) -> list[Path]:
    return sorted(path.glob(".lock-*"))


@pytest.fixture
def other_host(monkeypatch):
    """Locks made inside look as if a host wrote them whose pids cannot be seen from here."""

    def become(name: str) -> None:
        monkeypatch.setattr(locks, "_space", lambda: name)

    yield become
    monkeypatch.undo()


def test_a_live_lock_is_refused_and_named(tmp_path):
    with (
        LogitCacheWriter(tmp_path, manifest()) as first,
        LogitCacheWriter(tmp_path, manifest()) as second,
    ):
        first.write(np.arange(3), 0, logits_of(0)[:3])
        with pytest.raises(CacheError) as error:
            second.write(np.arange(5), 0, logits_of(0)[:5])
        text = str(error.value)
        assert ".lock-view-00000-block-0000000: view 0 block 0 is being written by" in text
        assert f"pid {os.getpid()} on host" in text and "\n" not in text
        second.write(np.arange(16, 32), 0, logits_of(0)[16:32])  # another block is nobody's
        first.write(np.arange(3, 16), 0, logits_of(0)[3:16])
        second.write(np.arange(5), 0, logits_of(0)[:5])  # committed meanwhile: skipped
        assert locks_in(tmp_path) == []
    assert verify(tmp_path)["complete"] == 2


def test_locks_go_with_the_writer_and_with_an_exception(tmp_path):
    with pytest.raises(KeyError), LogitCacheWriter(tmp_path, manifest()) as writer:
        writer.claim(0, 1)
        writer.claim(2, 0)
        assert len(locks_in(tmp_path)) == 2
        raise KeyError
    assert locks_in(tmp_path) == []


def test_rivals_are_found_at_the_start_and_ranks_of_one_job_are_none(tmp_path):
    def start(rank: int, world: int) -> LogitCacheWriter:
        return LogitCacheWriter(tmp_path, manifest(), rank=rank, world=world)

    with start(0, 3) as running:
        running.claim(1, 0)
        for rank in (1, 2):
            with start(rank, 3) as sibling:
                sibling.refuse_rivals(range(VIEWS))
        for rank, world in [(0, 3), (1, 2), (0, 1)]:
            with start(rank, world) as rival:
                rival.refuse_rivals([0, 2])
                with pytest.raises(CacheError, match=r"pid \d+ on host .* \(rank 0 of 3\)"):
                    rival.refuse_rivals(range(VIEWS))
        running.refuse_rivals(range(VIEWS))  # its own lock is no rival


def test_a_killed_writer_of_this_host_loses_its_lock_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 1e9)  # who waits for that ends at the time limit
    worker = fork(write_all, tmp_path, 0, 1, 0.05)
    while not locks_in(tmp_path):
        time.sleep(0.005)
    worker.kill()
    worker.join()
    write_all(tmp_path)
    write_all(tmp_path.with_name("whole"))
    assert content(tmp_path) == content(tmp_path.with_name("whole"))


def test_a_zombie_is_dead():
    process = subprocess.Popen(["true"])
    while locks._start_of(process.pid) is not None:
        time.sleep(0.005)  # it stays in the process table until it is waited for
    assert Path(f"/proc/{process.pid}").exists()
    process.wait()


def test_a_pid_that_was_given_to_another_process_is_no_sign_of_life(tmp_path):
    with LogitCacheWriter(tmp_path, manifest()) as first:
        first.claim(0, 0)
        path = locks_in(tmp_path)[0]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1}))
        with LogitCacheWriter(tmp_path, manifest()) as second:
            second.claim(0, 0)


def test_another_hosts_lock_is_taken_over_when_it_is_stale(tmp_path, other_host, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 100.0)
    other_host("far away")
    first = LogitCacheWriter(tmp_path, manifest())
    first.write(np.arange(9), 0, logits_of(0)[:9])
    other_host("here")
    path = locks_in(tmp_path)[0]
    os.utime(path, (time.time() - 121,) * 2)
    with LogitCacheWriter(tmp_path, manifest()) as second:
        second.write(np.arange(7), 0, logits_of(0)[:7])
        with pytest.raises(CacheError, match="lost its lock: it was taken over by pid"):
            first.write(np.arange(9, 16), 0, logits_of(0)[9:16])
        second.write(np.arange(7, 16), 0, logits_of(0)[7:16])
    first.close()
    assert verify(tmp_path)["complete"] == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_another_hosts_lock_is_watched_until_it_beats(tmp_path, other_host, monkeypatch):
    """One that beats is refused; one that stays silent for the whole time is taken over."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(locks, "STALE_SECONDS", 3.0)
    other_host("far away")
    first = LogitCacheWriter(tmp_path, manifest())
    first.claim(0, 0)
    other_host("here")
    with LogitCacheWriter(tmp_path, manifest()) as second:
        with pytest.raises(CacheError, match="is being written by"):
            second.claim(0, 0)
        first._locks._stop.set()  # as if its host had lost power
        started = time.perf_counter()
        second.claim(0, 0)
        assert time.perf_counter() - started > 1.5
    first.close()


def test_the_lock_of_a_writer_killed_after_its_commit_does_not_stay(tmp_path):
    write_all(tmp_path)
    before = content(tmp_path)
    process = subprocess.Popen(["true"])
    process.wait()
    with LogitCacheWriter(tmp_path, manifest()) as writer:
        writer.claim(0, 3)
        path = locks_in(tmp_path)[0]
        text = json.dumps(json.loads(path.read_text()) | {"pid": process.pid, "token": "a" * 16})
    path.write_text(text)
    (tmp_path / f".takeover-{'b' * 16}").write_text(text)
    write_all(tmp_path)
    assert content(tmp_path) == before


def test_torn_and_hostile_locks_count_by_age_alone(tmp_path):
    with LogitCacheWriter(tmp_path, manifest()) as writer:
        for block, text in enumerate(["", "[]", '{"token": "../../x"}', '{"pid": ' * 900]):
            path = tmp_path / f".lock-view-00000-block-{block:07d}"
            path.write_text(text)
            os.utime(path, (1e9, 1e9))
            writer.claim(0, block)
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_of_many_that_take_over_one_wins(tmp_path):
    """Eight at once find the same dead lock, twenty times."""
    LogitCacheWriter(tmp_path, manifest()).close()
    for round_ in range(20):
        path = tmp_path / f".lock-view-00000-block-{round_:07d}"
        path.write_text("")
        os.utime(path, (1e9, 1e9))
        found = [locks.BlockLocks(tmp_path) for _ in range(8)]
        barrier, won = threading.Barrier(8), []

        def take(one, round_=round_, barrier=barrier, won=won):
            barrier.wait()
            try:
                one.acquire(0, round_)
                won.append(one)
            except CacheError:
                pass

        threads = [threading.Thread(target=take, args=(one,)) for one in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].require_held(0, round_)
        won[0].close()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


# ---------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------


def fork(function, *args):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deit_fast.cache"])
    worker = context.Process(target=function, args=args)
    worker.start()
    return worker


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
    assert content(torn) == content(whole)
