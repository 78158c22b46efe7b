"""One harness for every bench: what a case is, how it is timed, what a result file holds.

All implementations of a case are timed in the same run: one call of each per round, the order
rotated from round to round, so that clocks and neighbours disturb all of them alike. Medians with
the 20th and 80th percentile, after a warm-up. A peer that is missing or fails is a line with the
reason, never a number.

On CUDA every call finds a cold L2: a buffer larger than it is overwritten first. The overwriting
is also repeated until the host is ahead, so that the time between the two events is the device's.
Bandwidth counts the bytes that the best implementation must move, not those that one does move;
roofline_pct is its share of what a large copy reached on the same device in the same run.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
DRIVER_FILE = Path("/proc/driver/nvidia/version")
META = ("device", "driver", "versions", "commit", "date", "command")
PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy", "pillow", "liger-kernel")
FLUSH_BYTES = 256 << 20  # more than any L2, H100: 50 MB
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
WARMUP_CALLS = 3
MIN_ROUNDS, MAX_ROUNDS = 3, 200
NO_TIME = "no time left, give --seconds more"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One workload and the implementations to time on it.

    name: readable and unique within the bench, e.g. "C=1000 B=256 soft bf16".
    build: makes the inputs and returns {implementation: callable}. Ours begin with "ours". A string
        in place of a callable is the reason why that implementation is skipped.
    bytes_moved: least memory traffic of one call, for gbps and roofline_pct.
    items: images or records of one call, for items_per_s.
    on_host: it is the host's work, timed by its clock whatever the device is.
    before: called with the implementation's name before each of its calls, not timed.
    facts: more fields of an implementation's row, by its name; called once, after the timing.
    """

    name: str
    build: Callable[[], dict[str, Callable[[], Any] | str]]
    bytes_moved: int | None = None
    items: int | None = None
    on_host: bool = False
    before: Callable[[str], None] = lambda name: None
    facts: Callable[[], dict[str, Row]] = dict


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------


class Timer:
    """Times single calls on one device, in seconds."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.copy_gbps: float | None = None
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.flush_seconds = statistics.median(self.wall(self.flush.zero_) for _ in range(5))
        size = COPY_BYTES[device]
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        seconds = statistics.median(self.call(lambda: target.copy_(source)) for _ in range(9))
        self.copy_gbps = 2 * size / seconds / 1e9

    def wall(self, function: Callable[[], Any]) -> float:
        """Host time until the device has finished."""
        start = time.perf_counter()
        function()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def call(self, function: Callable[[], Any], host_seconds: float = 0.0) -> float:
        """Time of one call; ``host_seconds``: what the host needs to launch it."""
        if not self.cuda:
            return self.wall(function)
        for _ in range(1 + math.ceil(host_seconds / self.flush_seconds)):
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def clear(self) -> None:
        """Give back what a failed call left behind, or the next one may find too little memory."""
        if not self.cuda:
            return
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether this process can use its GPU no more, as after a wrong access to memory."""
        if not self.cuda:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


def time_case(
    bench: str, case: Case, timer: Timer, seconds: float, until: float = math.inf
) -> list[Row]:
    """Rows of one case, timed for about ``seconds``.

    ``until``, of time.perf_counter: implementations not begun by then, but two, are left out.
    """
    start = time.perf_counter()
    ready: dict[str, Callable[[], Any]] = {}
    walls: dict[str, float] = {}
    rows: list[Row] = []
    try:
        implementations = case.build()
    except Exception as error:  # a case that cannot be built must not end the other benches
        rows = [skipped(bench, case.name, "all", error)]
    if rows:
        timer.clear()  # here no more traceback holds what build has made
        return rows
    for name, function in implementations.items():
        if isinstance(function, str):
            rows.append(skipped(bench, case.name, name, function))
            continue
        if len(ready) > 1 and time.perf_counter() > until:  # a compilation can take a minute
            rows.append(skipped(bench, case.name, name, NO_TIME))
            continue
        try:
            for call in range(1 + WARMUP_CALLS):  # the first one compiles
                case.before(name)
                wall = timer.wall(function)
                walls[name] = min(wall, walls.get(name, wall)) if call > 1 else wall
            ready[name] = function
        except Exception as error:  # a peer's failure is a result of its own
            rows.append(skipped(bench, case.name, name, error))
        if name not in ready:
            timer.clear()
    if not ready:
        return rows
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(MAX_ROUNDS):
        if not times or (turn >= MIN_ROUNDS and time.perf_counter() - start > seconds):
            break
        names = list(times)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                case.before(name)
                if case.on_host:
                    took = timer.wall(ready[name])
                else:
                    took = timer.call(ready[name], walls[name])
                times[name].append(took)
            except Exception as error:  # as above, though it went well at first
                rows.append(skipped(bench, case.name, name, error))
                del times[name]
    if not times:
        return rows
    measured = measured_rows(bench, case, times, timer)
    try:
        facts = case.facts()
    except Exception as error:
        facts, rows = {}, [*rows, skipped(bench, case.name, "facts", error)]
    return [row | facts.get(row["impl"], {}) for row in measured] + rows


def measured_rows(bench: str, case: Case, times: dict[str, list[float]], timer: Timer) -> list[Row]:
    """Medians in ms; ``ratio`` is how many times faster than the fastest peer, ``ratio_to``."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    peers = [name for name in medians if not name.startswith("ours")]
    best = min(peers, key=lambda name: medians[name]) if peers else None
    rows = []
    for name, median in medians.items():
        low, high = percentile(times[name], 0.2), percentile(times[name], 0.8)
        row: Row = {"bench": bench, "case": case.name, "impl": name, "ms": median * 1e3}
        row |= {"ms_p20": low * 1e3, "ms_p80": high * 1e3}
        if case.bytes_moved is not None:
            row["gbps"] = case.bytes_moved / median / 1e9
            # a CPU's caches are warm: no roofline there
            if timer.cuda and timer.copy_gbps and not case.on_host:
                row["roofline_pct"] = 100 * row["gbps"] / timer.copy_gbps
        if case.items is not None:
            row["items_per_s"] = case.items / median
        if best is not None and name != best:
            row |= {"ratio": medians[best] / median, "ratio_to": best}
        rows.append(row)
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    """Value at the nearest rank."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def skipped(bench: str, case: str, implementation: str, reason: Exception | str) -> Row:
    """A line without a number."""
    if isinstance(reason, Exception):
        text = str(reason).strip().splitlines()
        reason = f"{type(reason).__name__}: {text[0] if text else ''}".rstrip(": ")
    return {"bench": bench, "case": case, "impl": implementation, "skipped": reason}


def training_step(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward of ``loss``.

    Not by backward(): into a leaf with padded rows that copies a gradient which has such rows.
    """
    return lambda: torch.autograd.grad(loss(), leaves)


def compile_every_shape() -> None:
    """From here on torch.compile makes a graph for each shape and model that a bench shows it.

    Of one function it would stop after eight, and run the next ones eagerly under its own name.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True


# ---------------------------------------------------------------------------------------------
# Result file
# ---------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """First line that a command prints; empty where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True, cwd=HERE
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def driver_version() -> str:
    """Of NVIDIA's driver; where neither it nor its tool says, the CUDA that it supports."""
    if said := output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        return said
    with suppress(OSError):
        if found := re.search(r" (\d+\.[\d.]+) ", DRIVER_FILE.read_text()):
            return found[1]
    supported = ctypes.c_int()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    major, minor = divmod(supported.value // 10, 100)
    return f"CUDA {major}.{minor}" if major else ""


def collect_meta(device: str, command: str, commit: str | None) -> Row:
    """What a figure depends on. ``commit`` stands in where there is no git repository."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "driver": driver_version() if cuda else f"{platform.system()} {platform.release()}",
        "versions": {name: version for name, version in versions.items() if version},
        "commit": commit or output_of("git", "describe", "--always", "--dirty", "--abbrev=9"),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def default_path(device: str, meta: Row, what: str = "all") -> Path:
    """bench/results/<GPU name or cpu>/<date>-<commit>.json; of a part ...-<what>.json"""
    folder = meta["device"].lower().replace(" ", "-") if device == "cuda" else "cpu"
    part = "" if what == "all" else f"-{what}"
    return HERE / "results" / folder / f"{meta['date']}-{meta['commit']}{part}.json"


def require_meta(meta: Row, path: Path) -> None:
    """
    Raises:
        ValueError: a field of ``META`` is missing or empty: a figure without it is worth nothing.
    """
    missing = [name for name in META if not meta.get(name)]
    if missing:
        raise ValueError(f"no result file without meta {', '.join(missing)}: {path} is not written")


def write_results(path: Path, meta: Row, rows: list[Row]) -> None:
    """Write the result file, or replace it whole.

    Raises:
        ValueError: as ``require_meta``.
    """
    require_meta(meta, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    os.replace(part, path)


def print_table(rows: list[Row]) -> None:
    """Aligned table of the measured rows of one case; skipped ones follow with their reason."""
    widths = (42, 26, 10, 19, 9, 7, 11)
    for row in rows:
        if "skipped" in row:
            print(f"{row['case']:<42} {row['impl']:<26} skipped: {row['skipped']}", flush=True)
            continue
        cells = (
            row["case"],
            row["impl"],
            f"{row['ms']:.4g} ms",
            f"{row['ms_p20']:.4g} to {row['ms_p80']:.4g}",
            f"{row['gbps']:.4g} GB/s" if "gbps" in row else "",
            f"{row['roofline_pct']:.0f} %" if "roofline_pct" in row else "",
            f"{row['items_per_s']:.5g}/s" if "items_per_s" in row else "",
        )
        line = " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        note = "" if row["impl"].startswith("ours") else "best peer"
        if "ratio" in row:
            note = f"{row['ratio']:.2f}x of {row['ratio_to']}"
        print(f"{line} {note}", flush=True)
