"""Tiles of the attention kernels: the table, its measurement, and the choice for a call.

A *kind* names a row of the table: "whole" and "forward" are forward kernels, "both", "queries" and
"keys" are roles of the backward kernel. The table (attention_tiles.json) has rows per architecture;
those of architecture 0 serve every GPU that has no rows of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton.testing
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .launching import Launch, clear_plans, recording

AUTOTUNE = os.environ.get("DEIT_FAST_AUTOTUNE") == "1"


class Tiles(NamedTuple):
    """Tile and options of a kernel.

    rows: of the block that a program keeps. block: rows of each block that it streams; 0 for
    "whole". per_head: 1 in "both" where one program does a whole head. Its keys then read what its
    queries computed, which saves a fifth of the instructions; but work is dealt out in whole heads.
    """

    rows: int
    block: int
    warps: int
    stages: int
    per_head: int = 0


Key = tuple[int, str, int, int]  # architecture, kind, bytes of an element, D

TILES_FILE = Path(__file__).with_name("attention_tiles.json")


def read_tiles(path: Path = TILES_FILE) -> dict[Key, Tiles]:
    return {
        (row["architecture"], row["kernel"], row["bytes"], row["width"]): Tiles(*row["tiles"])
        for row in json.loads(path.read_text())
    }


def write_tiles(table: dict[Key, Tiles], path: Path = TILES_FILE) -> None:
    """Merge rows into the table in a file, one row per line; creates the file if needed."""
    names = ("architecture", "kernel", "bytes", "width")
    whole = (read_tiles(path) if path.exists() else {}) | table
    rows = [
        json.dumps(
            dict(zip(names, key, strict=True))
            | {"tiles": list(tiles if tiles.per_head else tiles[:4])}
        )
        for key, tiles in sorted(whole.items(), key=lambda item: (item[0][0], item[0][2]))
    ]
    path.write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")


# Rows of architecture 0 were chosen by the figures of `python -m deit_fast.kernels.aot`: no spills
# under any triton, then the most resident warps, then the largest tile. Elements of 4 bytes do not
# use tensor cores, because float32 products are exact. The depth of the pipeline (stages) follows
# from the same figures. Under triton 3.6 "both" with 3 stages and "queries" with 2 spill on sm_100,
# and "keys" with 3 has one resident block on sm_90 instead of two; under 3.9 "whole" with 2 stages
# uses 254 registers.
TILES = read_tiles()

_STREAMED = [Tiles(*t) for t in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
CANDIDATES = dict.fromkeys(("forward", "both", "queries", "keys"), _STREAMED)
PER_HEAD = Tiles(64, 32, 4, 1, per_head=1)  # the best of its kind by its machine code
_PER_HEAD = [PER_HEAD._replace(block=block, stages=n) for block in (32, 64) for n in (1, 2, 3)]
CANDIDATES["both"] = [*_STREAMED, *_PER_HEAD]
CANDIDATES["whole"] = [Tiles(*t) for t in itertools.product((64, 128), (0,), (4, 8), (1, 2))]

measured: dict[Key, Tiles] = {}  # in this process; preferred to the table


def architecture(capability: tuple[int, int]) -> int:
    """80, 86, 90 or 100, whose rows of the table serve GPUs of this compute capability.

    86 stands for GPUs with the matrix instructions of Ampere and 99 KiB of shared memory per block:
    GeForce and related cards up to Blackwell (8.6, 8.9, 12.x). An A100's blocks have 163 KiB.
    """
    if capability[0] in (9, 10, 11):
        return 90 if capability[0] == 9 else 100
    return 80 if capability in ((8, 0), (8, 7)) else 86


def key_of(kind: str, qkv: Tensor) -> Key:
    arch = architecture(torch.cuda.get_device_capability(qkv.device)) if qkv.is_cuda else 0
    return arch, kind, qkv.dtype.itemsize, qkv.shape[-1]


def tiles_of(key: Key) -> Tiles:
    return measured.get(key) or TILES.get(key) or TILES[(0, *key[1:])]


def choose_tiles(kind: str, qkv: Tensor, launcher: Callable[[Tiles], None]) -> Tiles:
    """Tiles for a call; with DEIT_FAST_AUTOTUNE=1 measured first, except in a graph's capture.

    Args:
        launcher: launches the kernel of this kind with given tiles, before any other kernel.
    """
    key = key_of(kind, qkv)
    capturing = qkv.is_cuda and torch.cuda.is_current_stream_capturing()
    if AUTOTUNE and key not in measured and not capturing and not qkv.is_meta:
        tune(key, launcher, qkv.device)
    return tiles_of(key)


def tune(key: Key, launcher: Callable[[Tiles], None], device: torch.device) -> dict[Tiles, float]:
    """Milliseconds of each candidate that fits. The fastest serves this key from now on."""
    candidates = CANDIDATES[key[1]]
    if device.type == "cuda":
        compile_all([recorded_launch(launcher, tiles) for tiles in candidates], device)
    times = {}
    for tiles in candidates:
        with contextlib.suppress(OutOfResources, PTXASError):  # too large for this GPU
            times[tiles] = _milliseconds(recorded_launch(launcher, tiles), device)
    if not times:
        raise RuntimeError(f"attention: none of {len(candidates)} tiles of {key} launches")
    measured[key] = min(times, key=times.__getitem__)
    clear_plans()  # some may hold the former tiles
    return times


def recorded_launch(launcher: Callable[[Tiles], None], tiles: Tiles) -> Launch:
    with recording() as recorded:
        launcher(tiles)
    return recorded.launches[0]


def compile_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Compile all candidates in parallel: each takes seconds."""

    def compile_one(launch: Launch) -> None:
        # A launch that does not compile raises again when it is timed.
        with torch.cuda.device(device), contextlib.suppress(OutOfResources, PTXASError):
            launch.kernel.warmup(grid=launch.grid, **launch.arguments)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, launches))


def _milliseconds(launch: Launch, device: torch.device) -> float:
    """Median time of the kernel alone, by the GPU's clock, each run with an empty L2 cache."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(launch, return_mode="median"))
    start = time.perf_counter()  # in the interpreter the time says nothing
    launch()
    return 1e3 * (time.perf_counter() - start)
