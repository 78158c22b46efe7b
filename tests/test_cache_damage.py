"""Damage, interruptions and full disks: an error that names the file, or the same bytes as ever."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast.cache import CacheError, LogitCache, LogitCacheWriter, info, verify
from helpers.caches import (
    BLOCK,
    SAMPLES,
    block_checksum,
    edit_manifest,
    file_bytes,
    make_logits,
    make_manifest,
    pending_blocks,
    write_cache,
)

TABLE, DATA, RECORD, BLOCKS = 4096, 8192, 72, 3
NAME = "view-00000.dlc"


@pytest.fixture
def cache_folder(tmp_path) -> Path:
    write_cache(tmp_path / "cache", make_manifest())
    return tmp_path / "cache"


def flip(file: Path, bit: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(bit // 8)
        byte = handle.read(1)[0]
        handle.seek(bit // 8)
        handle.write(bytes([byte ^ (1 << (bit % 8))]))


def gather_block(folder: Path, block: int):
    stop = min(SAMPLES, (block + 1) * BLOCK)
    return LogitCache.open(folder).gather(np.arange(block * BLOCK, stop), 0)


def test_every_bit_of_the_header_matters(cache_folder):
    file = cache_folder / NAME
    unused = np.random.default_rng(0).integers(80, 4092, 20)
    for byte in [*range(80), *range(4092, 4096), *unused.tolist()]:
        for bit in range(8):
            flip(file, 8 * byte + bit)
            cache = LogitCache.open(cache_folder)
            with pytest.raises(CacheError, match=NAME):
                cache.gather([0], 0)
            with pytest.raises(CacheError, match=NAME):
                _ = cache.views
            flip(file, 8 * byte + bit)
    assert gather_block(cache_folder, 0).ids.shape == (16, 16)


def test_a_header_with_something_where_zeros_belong_is_refused(cache_folder):
    """Found by tests/native/fuzz: such a file was read where its checksum was right."""
    from deit_fast import _C

    file = cache_folder / NAME
    raw = bytearray(file.read_bytes())
    for offset in (80, 2000, 4091):
        raw[offset] = 1
        struct.pack_into("<I", raw, 4092, _C.crc32c(bytes(raw[:4092])))
        file.write_bytes(raw)
        with pytest.raises(CacheError, match=rf"{NAME}: header is damaged \(bytes that must be"):
            gather_block(cache_folder, 0)
        raw[offset] = 0


def test_every_bit_of_the_block_table_matters(cache_folder):
    file = cache_folder / NAME
    for block in range(BLOCKS):
        for bit in range(64):
            flip(file, 8 * (TABLE + 8 * block) + bit)
            with pytest.raises(CacheError, match=rf"{NAME}: view 0 block {block} ") as caught:
                gather_block(cache_folder, block)
            assert ("invalid state" if bit >= 32 else "is damaged") in str(caught.value)
            flip(file, 8 * (TABLE + 8 * block) + bit)


def test_a_flipped_bit_in_the_data_is_found_and_other_blocks_stay_readable(cache_folder):
    file = cache_folder / NAME
    rng = np.random.default_rng(0)
    exact = [gather_block(cache_folder, block) for block in range(BLOCKS)]
    for bit in rng.integers(0, 8 * SAMPLES * RECORD, 100).tolist():
        flip(file, 8 * DATA + bit)
        damaged = bit // 8 // RECORD // BLOCK
        for block in range(BLOCKS):
            if block == damaged:
                with pytest.raises(CacheError, match=rf"{NAME}: view 0 block {block} is damaged"):
                    gather_block(cache_folder, block)
                continue
            assert torch.equal(gather_block(cache_folder, block).log_probs, exact[block].log_probs)
        report = verify(cache_folder)
        assert not report["ok"]
        assert [(row["file"], row["block"]) for row in report["broken"]] == [(NAME, damaged)]
        flip(file, 8 * DATA + bit)
    assert verify(cache_folder)["ok"]


def test_a_block_stays_refused_after_the_first_error(cache_folder):
    flip(cache_folder / NAME, 8 * DATA)
    cache = LogitCache.open(cache_folder)
    for _ in range(2):
        with pytest.raises(CacheError, match="block 0 is damaged"):
            cache.gather([0], 0)
    assert cache.gather([16], 0).ids.shape == (1, 16)


def test_truncated_and_lengthened_files_are_refused(cache_folder):
    file = cache_folder / NAME
    whole = file.read_bytes()
    sizes = [0, 1, 7, 8, 79, 80, 4091, 4095, 4096, 4097, 8191, 8192, len(whole) - 1]
    for size in [*sizes, *range(100, len(whole), 611)]:
        file.write_bytes(whole[:size])
        with pytest.raises(CacheError, match=NAME):
            LogitCache.open(cache_folder).gather([0], 0)
        with pytest.raises(CacheError, match=NAME):
            pending_blocks(LogitCacheWriter(cache_folder, make_manifest()), [0])
        report = verify(cache_folder)
        assert [(row["file"], row["block"]) for row in report["broken"]] == [(NAME, None)]
        assert NAME in info(cache_folder)["views"][0]["error"]
    file.write_bytes(whole + b"\0")
    with pytest.raises(CacheError, match=rf"{NAME}: has 11433 bytes, expected 11432"):
        LogitCache.open(cache_folder).gather([0], 0)


def test_a_file_shortened_under_the_reader_is_an_error(cache_folder):
    cache = LogitCache.open(cache_folder)
    cache.gather(np.arange(SAMPLES), 0)
    os.truncate(cache_folder / NAME, DATA + 100)
    with pytest.raises(CacheError, match=rf"{NAME}: has 8292 bytes"):
        cache.gather(np.arange(SAMPLES), 0)


def test_a_view_under_another_name_is_refused(cache_folder):
    shutil.copy(cache_folder / NAME, cache_folder / "view-00001.dlc")
    with pytest.raises(CacheError, match=r"view-00001\.dlc: header has view_id 0, expected 1"):
        LogitCache.open(cache_folder).gather([0], 1)


def test_a_class_id_out_of_range_is_refused_though_its_checksum_holds(cache_folder):
    """The file of somebody who computes checksums: the id would index past a student's logits."""
    file = cache_folder / NAME
    raw = bytearray(file.read_bytes())
    struct.pack_into("<H", raw, DATA + 17 * RECORD + 2, 20)
    block = bytes(raw[DATA + BLOCK * RECORD : DATA + 2 * BLOCK * RECORD])
    struct.pack_into("<I", raw, TABLE + 8, block_checksum(make_manifest(), 0, 1, block))
    file.write_bytes(raw)
    with pytest.raises(CacheError, match=f"{NAME}: view 0 block 1 holds class id 20 of 20 classes"):
        LogitCache.open(cache_folder).gather([3, 17], 0)
    assert [row["block"] for row in verify(cache_folder)["broken"]] == [1]


def test_random_bytes_never_give_an_answer(tmp_path):
    """A file with a valid header and table of its own, and noise where anything else stands."""
    write_cache(tmp_path, make_manifest())
    file = tmp_path / NAME
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for start in (0, 8, 80, TABLE, TABLE + 4, DATA):
        for _ in range(10):
            file.write_bytes(whole[:start] + rng.bytes(len(whole) - start))
            with pytest.raises(CacheError, match=NAME):
                LogitCache.open(tmp_path).gather(np.arange(SAMPLES), 0)


@pytest.mark.parametrize(
    ("codec", "sizes"),
    [
        ({"k": 15}, {"record_bytes": 68}),
        ({"k": 17}, {"record_bytes": 76}),
        ({"num_classes": 19}, {}),
        ({"num_classes": 70000}, {"record_bytes": 104}),
        ({"temperatures": [2.0]}, {}),
        ({"temperatures": [1.0, 2.0]}, {"record_bytes": 80}),
        ({"name": "dense-fp16", "k": None, "temperatures": [], "num_classes": 36}, {}),
    ],
)
def test_a_manifest_edited_to_another_codec_never_reads_shifted_bytes(cache_folder, codec, sizes):
    """A manifest that agrees with itself, as somebody makes who opens a cache with the wrong K or
    class count: the views say that they were written under another one."""
    codec = make_manifest()["codec"] | codec
    edit_manifest(cache_folder, codec=codec, **sizes)
    tau = (codec["temperatures"] or [1.0])[0]
    with pytest.raises(CacheError, match=rf"{NAME}: (header has record_bytes|was written under)"):
        LogitCache.open(cache_folder).gather([0], 0, tau=tau)
    assert [row["file"] for row in verify(cache_folder)["broken"]] == [NAME]
    with pytest.raises(CacheError, match="differs in"):
        LogitCacheWriter(cache_folder, make_manifest())


def test_a_file_removed_under_the_reader_stays_readable_and_is_missed_when_opened(cache_folder):
    """The map outlives the name: what was read stays right, a block not yet read can be."""
    cache = LogitCache.open(cache_folder)
    exact = gather_block(cache_folder, 2)
    cache.gather([0], 0)
    (cache_folder / NAME).unlink()
    assert torch.equal(cache.gather(np.arange(32, SAMPLES), 0).log_probs, exact.log_probs)
    with pytest.raises(CacheError, match=rf"view 0 is not in the cache: there is no .*{NAME}"):
        LogitCache.open(cache_folder).gather([0], 0)


def without_rights(folder: Path, uid: int) -> None:
    """In a process of its own: root may read all, so it becomes somebody else."""
    if os.geteuid() == 0:
        os.setuid(uid)
    reader = LogitCache.open(folder)
    reader.gather([0], 0)  # its map outlives the right to open the file
    with pytest.raises(PermissionError) as caught:
        reader.gather([0], 1)
    assert caught.value.filename == str(folder / "view-00001.dlc")
    assert "\n" not in str(caught.value)
    with pytest.raises(PermissionError) as caught, LogitCacheWriter(folder, make_manifest()) as w:
        w.write(np.arange(SAMPLES), 2, make_logits(2))
    assert str(folder) in str(caught.value)


@pytest.mark.dist
def test_rights_that_were_lost_are_an_error_that_names_the_file(tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, make_manifest(), (0, 1))
    before = file_bytes(folder)
    for path in [tmp_path, *tmp_path.parents]:
        if path.name.startswith(("test_", "pytest-", "popen-")):
            path.chmod(0o755)  # pytest's own folders are its user's alone
    (folder / "view-00001.dlc").chmod(0)
    folder.chmod(0o555)
    try:
        context = multiprocessing.get_context("forkserver")
        worker = context.Process(target=without_rights, args=(folder, 65534))
        worker.start()
        worker.join(60)
    finally:
        folder.chmod(0o755)
        (folder / "view-00001.dlc").chmod(0o644)
    assert worker.exitcode == 0
    assert file_bytes(folder) == before


# ---------------------------------------------------------------------------------------------
# Torn writes and killed writers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tear", ["data lost", "half of the data", "state", "crc only"])
def test_a_torn_block_is_written_again_with_a_warning(cache_folder, caplog, tear):
    file = cache_folder / NAME
    whole = file.read_bytes()
    raw = bytearray(whole)
    start, stop = DATA + BLOCK * RECORD, DATA + 2 * BLOCK * RECORD
    if tear == "data lost":
        raw[start:stop] = bytes(stop - start)
    elif tear == "half of the data":
        raw[(start + stop) // 2 : stop] = bytes(stop - (start + stop) // 2)
    elif tear == "state":
        raw[TABLE + 12] ^= 1
    else:
        raw[TABLE + 12 : TABLE + 16] = bytes(4)  # the entry's second word never came
    file.write_bytes(raw)
    with (
        caplog.at_level(logging.WARNING, "deit_fast"),
        LogitCacheWriter(cache_folder, make_manifest()) as writer,
    ):
        assert pending_blocks(writer, [0]) == [(0, 1)]
        assert pending_blocks(writer, [0]) == [(0, 1)]
        writer.write(np.arange(SAMPLES), 0, make_logits(0))
        assert pending_blocks(writer, [0]) == []
    assert file.read_bytes() == whole
    warnings = [record.getMessage() for record in caplog.records]
    if tear == "crc only":
        assert warnings == []  # not marked complete, so nothing is wrong with it
    else:
        assert len(warnings) == 1
        assert f"{NAME}: view 0 block 1 " in warnings[0]
        assert "written again" in warnings[0]


KILL_SAMPLES, KILL_BLOCK = 1200, 4


def kill_manifest() -> dict:
    return make_manifest(samples=KILL_SAMPLES, block=KILL_BLOCK)


def write_slowly(path: str, seed: int) -> None:
    """All samples of view 0 in random order of blocks and batches that straddle them."""
    logits = make_logits(0, KILL_SAMPLES)
    rng = np.random.default_rng(seed)
    with LogitCacheWriter(path, kill_manifest()) as writer:
        ids = np.arange(KILL_SAMPLES).reshape(-1, 2 * KILL_BLOCK)
        ids = rng.permutation(ids).reshape(-1)
        for part in np.array_split(ids, 170):
            writer.write(part, 0, logits[part])


@pytest.mark.dist
def test_a_killed_writer_leaves_nothing_that_another_does_not_finish(tmp_path):
    write_slowly(str(tmp_path / "whole"), 0)
    expected = file_bytes(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    rng = np.random.default_rng()  # moments differ from run to run; the result must not
    blocks = KILL_SAMPLES // KILL_BLOCK
    interrupted = 0
    path = tmp_path / "killed"
    for round_ in range(6):
        if round_ % 3 == 0:
            shutil.rmtree(path, ignore_errors=True)
        worker = context.Process(target=write_slowly, args=(str(path), round_))
        worker.start()
        target = (round_ % 3) * 80 + int(rng.integers(0, 80))
        deadline = time.monotonic() + 60
        while count_done(path / NAME) < target and worker.is_alive():
            assert time.monotonic() < deadline
        time.sleep(rng.uniform(0, 0.003))
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        done = count_done(path / NAME)
        interrupted += 0 < done < blocks
        if done:
            assert verify(path)["ok"]
            assert verify(path)["complete"] == done
        if round_ % 3 == 2:
            write_slowly(str(path), 100 + round_)
            assert file_bytes(path) == expected
    assert interrupted >= 2


def count_done(file: Path) -> int:
    if not file.exists():
        return 0
    with open(file, "rb") as handle:
        handle.seek(TABLE)
        return handle.read(8 * KILL_SAMPLES // KILL_BLOCK).count(b"DONE")


# ---------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------


def fill_up(path: Path) -> None:
    """View 0 fits, view 1 does not."""
    needed = 8192 + SAMPLES * RECORD
    with LogitCacheWriter(path, make_manifest()) as writer:
        writer.write(np.arange(SAMPLES), 0, make_logits(0))
        with pytest.raises(OSError, match=f"a view needs {needed} bytes") as caught:
            for view in range(1, 100):
                writer.write(np.arange(SAMPLES), view, make_logits(view))
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert "view-" in caught.value.filename
        assert "\n" not in str(caught.value)
    assert not [item.name for item in path.iterdir() if item.name.startswith(".tmp-")]
    report = verify(path)
    assert report["ok"]
    assert report["pending"] == 0
    assert torch.equal(
        LogitCache.open(path).gather(np.arange(SAMPLES), 0).ids.long(),
        make_logits(0).argsort(1, descending=True)[:, :16],
    )


def test_a_full_disk_is_one_clear_line(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a tmpfs")
    try:
        fill_up(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def write_under_a_limit(path: Path) -> None:
    write_cache(path, make_manifest())
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    with LogitCacheWriter(path, make_manifest()) as writer:
        needed = 8192 + SAMPLES * RECORD
        with pytest.raises(OSError, match=f"a view needs {needed} bytes") as caught:
            writer.write(np.arange(SAMPLES), 1, make_logits(1))
        assert caught.value.errno == errno.EFBIG


@pytest.mark.dist
def test_a_file_size_limit_is_one_clear_line(tmp_path):
    context = multiprocessing.get_context("forkserver")
    worker = context.Process(target=write_under_a_limit, args=(tmp_path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert LogitCache.open(tmp_path).views == [0]
    assert verify(tmp_path)["ok"]


def test_io_errors_name_the_file(cache_folder):
    shutil.move(cache_folder / NAME, cache_folder / "elsewhere")
    os.mkdir(cache_folder / NAME)
    with pytest.raises(CacheError, match=rf"{NAME}: is not a regular file"):
        LogitCache.open(cache_folder).gather([0], 0)
    with pytest.raises(OSError, match=NAME) as caught:
        LogitCacheWriter(cache_folder, make_manifest()).write([0], 0, make_logits(0)[:1])
    assert caught.value.errno == errno.EISDIR
    assert caught.value.filename == str(cache_folder / NAME)
