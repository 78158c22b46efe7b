"""Reading ahead, and how little a reader costs."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast import _C
from deit_fast.cache import CODECS, CacheError, LogitCache, reader
from deit_fast.cache.format import view_path
from deit_fast.data.batch import map_teacher, teacher_tensors
from deit_fast.errors import InputError
from helpers.caches import (
    SAMPLES,
    equal,
    make_logits,
    make_manifest,
    reading_threads,
    view_start,
    write_cache,
)

BATCH = 9


def make_batches(seed=0, views=(0, 2), samples=SAMPLES, count=12):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, samples, BATCH), rng.choice(views, BATCH).astype(np.int32))
        for _ in range(count)
    ]


def bytes_read() -> int:
    """By read(2) and pread(2) of this process, cached or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


# ---------------------------------------------------------------------------------------------
# Reading ahead
# ---------------------------------------------------------------------------------------------


def test_what_was_read_ahead_is_not_read_again(tmp_path):
    cache = write_cache(tmp_path, make_manifest("dense-fp32", samples=4000, block=100), (0, 2))
    samples, views = np.arange(4000).repeat(2), np.tile([0, 2], 4000)
    with cache.prefetch([(samples, views)], ahead=0) as ahead:
        assert ahead.wait() == 80
    before = bytes_read()
    stored = cache.gather(samples, views)
    assert bytes_read() - before < 4000  # of 640,000: only what this test itself reads
    assert torch.equal(stored[::2], make_logits(0, 4000))
    before = bytes_read()
    LogitCache.open(tmp_path).gather(samples, views)
    assert bytes_read() - before > 640_000  # without: read to be verified


def test_read_ahead_goes_no_further_than_asked(tmp_path):
    cache = write_cache(tmp_path, make_manifest(samples=400, block=10))
    batches = [(np.arange(i * 10, i * 10 + 10), 0) for i in range(40)]
    with cache.prefetch(batches, ahead=3, start=5) as ahead:
        assert ahead.wait() == 4  # 5, 6, 7, 8
        ahead.advance(6)
        assert ahead.wait() == 5
        ahead.advance(6)
        ahead.advance(2)  # going back asks for nothing new
        assert ahead.wait() == 5
        ahead.advance(39)
        assert ahead.wait() == 6  # the steps between were passed over
    assert ahead.wait() == 6  # closed: nothing to wait for
    seen = [samples[0] for samples, _ in cache.prefetch(batches, start=38)]
    assert seen == [380, 390]


def test_read_ahead_ends_its_threads(tmp_path):
    write_cache(tmp_path, make_manifest("dense-fp32", samples=5000, block=5))
    assert reading_threads() == 0
    for _ in range(20):
        ahead = LogitCache.open(tmp_path).prefetch([(np.arange(5000), 0)])
        assert 1 <= reading_threads() <= 2
        ahead.close()  # with most of 1,000 blocks still to come
        assert reading_threads() == 0


def test_a_damaged_block_is_left_for_gather_to_name(tmp_path):
    cache = write_cache(tmp_path, make_manifest())
    with open(tmp_path / "view-00000.dlc", "r+b") as file:
        file.seek(8192 + 17 * 72)
        file.write(b"\xff\xff")
    with cache.prefetch([(np.arange(SAMPLES), 0)]) as ahead:
        assert ahead.wait() == 2
        with pytest.raises(CacheError, match="view 0 block 1 is damaged"):
            cache.gather([17], 0)
    with pytest.raises(CacheError, match="view 9 is not in the cache"):
        cache.prefetch([([0], 9)])
    with pytest.raises(InputError, match="sample id 45 is not"):
        cache.prefetch([([45], 0)])


def forked_close(ahead) -> None:
    ahead.close()


@pytest.mark.dist
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(tmp_path):
    cache = write_cache(tmp_path, make_manifest("dense-fp32", samples=5000, block=5))
    with cache.prefetch([(np.arange(5000), 0)]) as ahead:
        child = multiprocessing.get_context("fork").Process(target=forked_close, args=(ahead,))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert ahead.wait() == 1000


def test_gather_lets_other_threads_run(tmp_path):
    """Eight threads gather and read ahead at once, one view after another dropped and reopened."""
    cache = write_cache(tmp_path, make_manifest("dense-fp32", samples=400, block=7), range(6))
    expected = torch.stack([make_logits(view, 400) for view in range(6)])
    wrong = []

    def work(seed: int) -> None:
        batches = make_batches(seed, range(6), 400, 30)
        with cache.prefetch(batches, ahead=4) as ahead:
            for samples, views in ahead:
                if not torch.equal(cache.gather(samples, views), expected[views, samples]):
                    wrong.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []


def test_a_view_that_another_thread_opened_meanwhile_stays(tmp_path, monkeypatch):
    """It knows which blocks are verified; the view of the slower thread would forget them."""
    write_cache(tmp_path, make_manifest("dense-fp32"), (0,))
    whole = np.arange(SAMPLES), np.zeros(SAMPLES, np.int64)
    plain, opened = reader._open_view, []

    def slowly(*args, **options):
        view = plain(*args, **options)
        opened.append(view)
        if len(opened) == 1:  # what the faster thread does now
            cache.gather(*whole)
        return view

    monkeypatch.setattr(reader, "_open_view", slowly)
    cache = LogitCache.open(tmp_path)
    cache.gather([0], [0])
    assert len(opened) == 2 and cache.unread_blocks(*whole) == []


def test_more_views_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("deit_fast.cache.reader._OPEN_VIEWS", 2)
    cache = write_cache(tmp_path, make_manifest("dense-fp32"), range(5))
    views = np.arange(SAMPLES) % 5
    expected = torch.stack([make_logits(view) for view in range(5)])[views, np.arange(SAMPLES)]
    for _ in range(3):
        assert torch.equal(cache.gather(np.arange(SAMPLES), views), expected)
        open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                      if os.path.lexists(f"/proc/self/fd/{fd}")]  # fmt: skip
        assert sum(name.startswith(str(tmp_path)) for name in open_files) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODECS)
def test_logits_gathered_to_cuda_are_those_of_the_host(tmp_path, name):
    codec = {"temperatures": (1.0, 3.0)} if name == "topk" else {}
    cache = write_cache(tmp_path, make_manifest(name, **codec), (0, 2))
    for samples, views in [*make_batches(), ([], [])]:
        ids = np.asarray(samples, np.int64), np.asarray(views, np.int64)
        found = cache.gather(*ids, tau=3.0, device="cuda")
        assert all(tensor.is_cuda for tensor in teacher_tensors(found))
        assert equal(map_teacher(found, torch.Tensor.cpu), cache.gather(*ids, tau=3.0))


# ---------------------------------------------------------------------------------------------
# Cost: sparse files of ImageNet's size
# ---------------------------------------------------------------------------------------------

LARGE = {"samples": 1_281_167, "classes": 1000, "block": 4096}


def write_sparse(folder: Path, views: int) -> None:
    """Views of zeros, which are valid records, with truncate. In format 2 all have one table."""
    manifest = make_manifest(**LARGE) | {"format": 2}
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    count, size, per_block = (manifest[k] for k in ("num_samples", "record_bytes", "block_records"))
    blocks = -(-count // per_block)
    last = count - (blocks - 1) * per_block
    crcs = [_C.crc32c(bytes(per_block * size))] * (blocks - 1) + [_C.crc32c(bytes(last * size))]
    for view in range(views):
        start = view_start(manifest, view, crcs)
        with open(view_path(folder, view), "wb") as file:
            file.write(start)
            file.truncate(len(start) + count * size)


MEASURE = """
import sys, time, threading
import numpy as np
from deit_fast.cache import LogitCache
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
LogitCache.open(sys.argv[1]).gather([0], 0)
before = anonymous()
cache = LogitCache.open(sys.argv[1])
rng = np.random.default_rng(0)
batches = [(rng.integers(0, 1281167, 256), rng.integers(0, 4, 256)) for _ in range(30)]
with cache.prefetch(batches) as ahead:
    for samples, views in ahead:
        cache.gather(samples, views)
views = np.arange(300)
cache.gather(np.zeros(300, np.int64), views)
print(anonymous() - before)
"""


@pytest.fixture(scope="module")
def large_cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "cache"
    write_sparse(folder, 300)
    return folder


def test_opening_a_large_cache_is_quick(large_cache):
    seconds = []
    for _ in range(5):
        start = time.process_time()
        cache = LogitCache.open(large_cache)
        views = cache.views
        stored = cache.gather([0, 1_281_166], [0, 299])
        seconds.append(time.process_time() - start)
        assert views == list(range(300))
        assert stored.ids.shape == (2, 16)
    print(f"opened in {min(seconds) * 1e3:.1f} ms")
    assert min(seconds) < 0.05


@pytest.mark.dist
def test_a_reader_takes_little_memory_of_its_own(large_cache):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_cache)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print(f"{float(done.stdout):.1f} MB")
    assert float(done.stdout) < 50


def test_ids_in_every_form(tmp_path):
    cache = write_cache(tmp_path, make_manifest("dense-fp32"), (0, 2))
    expected = make_logits(2)[[7, 3]]
    for samples in ([7, 3], np.array([7, 3], np.uint8), torch.tensor([7, 3]),
                    torch.tensor([7, 0, 3, 0])[::2], np.array([3, 7])[::-1]):  # fmt: skip
        for views in (2, np.int32(2), [2, 2], torch.tensor(2), torch.tensor([2, 2]).int()):
            assert torch.equal(cache.gather(samples, views), expected)
    for samples, views in (([[7]], 2), (7, 2), ([7, 3], [2]), ([7], [[2]]), ([7, 3], [2, 2, 2])):
        with pytest.raises(InputError, match=r"must be \[n\]"):
            cache.gather(samples, views)
