"""One harness for every bench: what a case is and how it is timed.

All implementations of a case are timed in the same run: one call of each per round, the order
rotated from round to round, so that clocks and neighbours disturb all of them alike. Medians with
the 20th and 80th percentile, after a warm-up. A peer that is missing or fails is a line with the
reason, never a number.

On CUDA every call finds a cold and clean L2: a buffer larger than it is read first. (Writing one
would leave up to the whole L2 dirty, and the timed kernel would pay for the write-back.) The
reading is also repeated until the host is ahead, so that the time between the two events is the
device's. That hides what the host needs to launch, so a whole training step is timed otherwise: as
wall-clock time of ``Case.repeats`` calls back to back.

Bandwidth counts the bytes that the best implementation must move, not those that one does move;
roofline_pct is its share of what a large copy reached on the same device in the same run.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from deit_fast.errors import first_line

from .record import NO_TIME, Row

FLUSH_BYTES = 256 << 20  # more than any L2, H100: 50 MB
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
WARMUP_CALLS = 3
MIN_ROUNDS, MAX_ROUNDS = 3, 200
MAX_ROUNDS_IN_A_ROW = 6  # where one timing already is many calls


@dataclass(frozen=True)
class Case:
    """One workload and the implementations to time on it.

    name: readable and unique within the bench, e.g. "C=1000 B=256 soft bf16".
    build: makes the inputs and returns {implementation: callable}. Ours begin with "ours". A string
        in place of a callable is the reason why that implementation is skipped.
    bytes_moved: least memory traffic of one call, for gbps and roofline_pct.
    items: images or records of one call, for items_per_s.
    on_host: it is the host's work, timed by its clock whatever the device is.
    repeats: calls of one timing, back to back, by the host's clock from an idle device to an idle
        device; "ms" is the time of one call. For whole steps, whose launches cost time too.
    before: called with the implementation's name before each of its calls, not timed.
    facts: more fields of the row of the implementation with this name; called after the timing.
    """

    name: str
    build: Callable[[], dict[str, Callable[[], Any] | str]]
    bytes_moved: int | None = None
    items: int | None = None
    on_host: bool = False
    repeats: int = 1
    before: Callable[[str], None] = lambda name: None
    facts: Callable[[str], Row] = lambda name: {}


class Lazy:
    """What its first call builds and every call runs: a process that times one implementation of
    a case, or compiles it ahead, does not pay for the others."""

    def __init__(self, make: Callable[[], Callable[[], Any]]) -> None:
        self._make = make
        self._function: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self._function is None:
            self._function = self._make()
        return self._function()


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------


class Timer:
    """Times calls on one device, in seconds.

    clock: seconds since any moment; a test replaces it.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.copy_gbps: float | None = None
        if self.cuda:
            self.buffer = torch.randn(FLUSH_BYTES // 4, device=device)
            self.flush_result = torch.empty((), device=device)
            self.flush()  # loads the kernel
            self.flush_seconds = statistics.median(self.wall(self.flush) for _ in range(5))
        size = COPY_BYTES[device]
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = statistics.median(self.call(lambda: target.copy_(source)) for _ in range(9))
        self.copy_gbps = 2 * size / seconds / 1e9

    def flush(self) -> None:
        """Fill the L2 with clean lines of a buffer that no bench reads."""
        torch.sum(self.buffer, 0, out=self.flush_result)

    def wall(self, function: Callable[[], Any], repeats: int = 1) -> float:
        """Host time of ``repeats`` calls in a row until the device has finished, per call."""
        start = self.clock()
        for _ in range(repeats):
            function()
        if self.cuda:
            torch.cuda.synchronize()
        return (self.clock() - start) / repeats

    def call(self, function: Callable[[], Any], host_seconds: float = 0.0) -> float:
        """Device time of one call; ``host_seconds``: what the host needs to launch it."""
        if not self.cuda:
            return self.wall(function)
        for _ in range(1 + math.ceil(host_seconds / self.flush_seconds)):
            self.flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def time(self, case: Case, function: Callable[[], Any], host_seconds: float) -> float:
        """Time of one call of a case's implementation, by the clock that the case asks for."""
        if case.on_host or case.repeats > 1:
            return self.wall(function, case.repeats)
        return self.call(function, host_seconds)

    def clear(self) -> None:
        """Give back what a failed call left behind, or the next one may find too little memory."""
        if not self.cuda:
            return
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether this process can use its GPU no more, as after a wrong access to memory."""
        return self.cuda and is_gpu_lost()


def is_gpu_lost() -> bool:
    """Whether this process has used its GPU and every further call fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@dataclass
class _Timed:
    """One implementation that is ready to be timed."""

    function: Callable[[], Any]
    first_call_s: float  # holds its compilation
    wall: float  # seconds of a warm call, launches and device
    seconds: list[float]


Report = Callable[[list[Row]], None]


def time_case(
    bench: str,
    case: Case,
    timer: Timer,
    seconds: float,
    until: float = math.inf,
    report: Report = lambda rows: None,
) -> list[Row]:
    """Rows of one case, timed for about ``seconds``.

    Args:
        until: of the timer's clock; implementations that are not ready by then are left out, but
            the first two: ours, and the peer to compare it with.
        report: called with all rows so far, marked "provisional", whenever an implementation is
            ready: a process that is killed leaves what it has measured.
    """
    try:
        implementations = case.build()
    except Exception as error:  # a case that cannot be built must not end the other benches
        rows = [skipped(bench, case.name, "all", error)]
    else:
        rows = _time_implementations(bench, case, timer, seconds, until, report, implementations)
        del implementations
    timer.clear()  # here no more traceback holds what build has made
    return rows


def _time_implementations(
    bench: str, case: Case, timer: Timer, seconds: float, until: float, report: Report,
    implementations: dict[str, Callable[[], Any] | str],
) -> list[Row]:  # fmt: skip
    start = timer.clock()
    ready: dict[str, _Timed] = {}
    problems: list[Row] = []
    for name, function in implementations.items():
        if isinstance(function, str):
            problems.append(skipped(bench, case.name, name, function))
            continue
        if len(ready) > 1 and timer.clock() > until:  # a compilation can take a minute
            problems.append(skipped(bench, case.name, name, NO_TIME))
            continue
        try:
            ready[name] = _warm_up(case, name, function, timer)
        except Exception as error:  # a peer's failure is a result of its own
            problems.append(skipped(bench, case.name, name, error))
        if name not in ready:
            timer.clear()
        problems += _round(bench, case, timer, ready, 0)
        rows = measured_rows(bench, case, ready, timer) + problems
        report([row | {"provisional": True} for row in rows])
    for timed in ready.values():
        timed.seconds.clear()  # all figures of a case come from the same rounds
    for turn in range(MAX_ROUNDS if case.repeats == 1 else MAX_ROUNDS_IN_A_ROW):
        if not ready or (turn >= MIN_ROUNDS and timer.clock() - start > seconds):
            break
        problems += _round(bench, case, timer, ready, turn)
    return measured_rows(bench, case, ready, timer) + problems


def _warm_up(case: Case, name: str, function: Callable[[], Any], timer: Timer) -> _Timed:
    walls = []
    for _ in range(1 + WARMUP_CALLS):
        case.before(name)
        walls.append(timer.wall(function))
    return _Timed(function, walls[0], min(walls[1:]), [])


def _round(bench: str, case: Case, timer: Timer, ready: dict[str, _Timed], turn: int) -> list[Row]:
    """Time each implementation once; drops those that fail and returns their rows."""
    failed = []
    names = list(ready)
    shift = turn % max(len(names), 1)
    for name in names[shift:] + names[:shift]:
        try:
            case.before(name)
            ready[name].seconds.append(timer.time(case, ready[name].function, ready[name].wall))
        except Exception as error:  # although it succeeded at first
            failed.append(skipped(bench, case.name, name, error))
            del ready[name]
    return failed


def with_facts(case: Case, rows: list[Row], timer: Timer, until: float) -> list[Row]:
    """The rows of a case with their facts, as far as they are known by ``until`` of its clock.

    To call when every case of the process is timed: a profiler may slow down what comes after it.
    """
    whole = []
    for row in rows:
        whole.append(row)
        if "ms" not in row or timer.clock() > until:
            continue
        try:
            whole[-1] = row | case.facts(row["impl"])
        except Exception as error:
            whole.append(skipped(row["bench"], case.name, f"{row['impl']}, facts", error))
    return whole


def measured_rows(bench: str, case: Case, ready: dict[str, _Timed], timer: Timer) -> list[Row]:
    """Medians in ms; ``ratio`` is how many times faster than the fastest peer, ``ratio_to``."""
    medians = {name: statistics.median(timed.seconds) for name, timed in ready.items()}
    peers = [name for name in medians if not name.startswith("ours")]
    best = min(peers, key=lambda name: medians[name]) if peers else None
    rows = []
    for name, median in medians.items():
        times = ready[name].seconds
        low, high = percentile(times, 0.2), percentile(times, 0.8)
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
        row["first_call_s"] = round(ready[name].first_call_s, 3)
        rows.append(row)
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    """Value at the nearest rank."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def skipped(bench: str, case: str, implementation: str, reason: Exception | str) -> Row:
    """A line without a number."""
    if isinstance(reason, Exception):
        reason = first_line(reason, with_type=True)
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
