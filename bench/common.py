"""One harness for every bench: what a case is and how it is timed.

All implementations of a case are timed in the same run: one call of each per round, in an order
that rotates from round to round, so that changes of the clock rate and other processes affect all
of them alike. Results are medians with the 20th and 80th percentile, after a warm-up. A peer that
is missing or fails gives a row with the reason and without a time.

On CUDA a buffer larger than the L2 is read before every timed call, so that the L2 is cold and
clean. (Writing a buffer would leave dirty lines, and the timed kernel would pay for their
write-back.) The read is repeated until the host has enqueued the timed call, so that the time
between the two events is device time. This hides the launch overhead of the host; a whole training
step is therefore timed as wall-clock time of ``Case.repeats`` consecutive calls.

Bandwidth is the least traffic that any implementation needs, divided by the time; roofline_pct is
the ratio of that bandwidth to the one of a large copy on the same device in the same run.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from deit_fast.errors import first_line

from .record import NO_TIME, Row

FLUSH_BYTES = 256 << 20  # larger than any L2; that of the H100 has 50 MB
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
WARMUP_CALLS = 3
MIN_ROUNDS, MAX_ROUNDS = 3, 200
MAX_ROUNDS_OF_REPEATS = 6  # for cases whose timing covers many calls


@dataclass(frozen=True)
class Case:
    """One workload and the implementations to time on it.

    name: readable and unique within the bench, e.g. "C=1000 B=256 soft bf16".
    build: makes the inputs and returns {implementation: callable}. The names of ours begin with
        "ours". A string in place of a callable is the reason why the implementation is skipped.
    bytes_moved: least memory traffic of one call, for gbps and roofline_pct.
    items: images or records of one call, for items_per_s.
    on_host: the work runs on the host, so the host's clock times it on every device.
    repeats: consecutive calls of one timing, by the host's clock from an idle device to an idle
        device; "ms" is the time of one call. For whole steps, where launch overhead counts.
    before: called with the implementation's name before each of its calls; not timed.
    quick_facts: takes an implementation's name and returns more fields of its row; called when the
        case is timed, so it takes little time and leaves later timings as they are.
    facts: the same; called when all cases are timed and only while time is left.
    """

    name: str
    build: Callable[[], Mapping[str, Callable[[], Any] | str]]
    bytes_moved: int | None = None
    items: int | None = None
    on_host: bool = False
    repeats: int = 1
    before: Callable[[str], None] = lambda name: None
    quick_facts: Callable[[str], Row] = lambda name: {}
    facts: Callable[[str], Row] = lambda name: {}


class Lazy:
    """Calls a function that it builds on the first call: a process that times or compiles only one
    implementation of a case does not build the others."""

    def __init__(self, make: Callable[[], Callable[[], Any]]) -> None:
        self._make = make
        self._function: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self._function is None:
            self._function = self._make()
        return self._function()


def choose_device(name: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:
        SystemExit: "cuda" without a CUDA device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device")
    return name


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
        """Free memory that a failed call left allocated; the next call may need it."""
        if not self.cuda:
            return
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether this process can no longer use its GPU, for example after an illegal access."""
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
    """An implementation after its warm-up."""

    function: Callable[[], Any]
    first_call_s: float  # includes its compilation
    wall: float  # seconds of a warm call, with launch overhead
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
        until: time of the timer's clock; implementations that are not ready by then are left out,
            except the first two: ours and the peer to compare it with.
        report: called with all rows so far, marked "provisional", whenever an implementation is
            ready, so that a process that is killed keeps what it has measured.
    """
    try:
        implementations = case.build()
    except Exception as error:  # a case that cannot be built must not end the other benches
        rows = [skipped(bench, case.name, "all", error)]
    else:
        rows = _time_implementations(bench, case, timer, seconds, until, report, implementations)
        del implementations
    timer.clear()  # no traceback refers to the inputs any more
    return rows


def _time_implementations(
    bench: str, case: Case, timer: Timer, seconds: float, until: float, report: Report,
    implementations: Mapping[str, Callable[[], Any] | str],
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
        except Exception as error:  # reported as a row
            problems.append(skipped(bench, case.name, name, error))
        if name not in ready:
            timer.clear()
        problems += _round(bench, case, timer, ready, 0)
        rows = measured_rows(bench, case, ready, timer) + problems
        report([row | {"provisional": True} for row in rows])
    for timed in ready.values():
        timed.seconds.clear()  # all figures of a case come from the same rounds
    for turn in range(MAX_ROUNDS if case.repeats == 1 else MAX_ROUNDS_OF_REPEATS):
        if not ready or (turn >= MIN_ROUNDS and timer.clock() - start > seconds):
            break
        problems += _round(bench, case, timer, ready, turn)
    rows = measured_rows(bench, case, ready, timer)
    return [part for row in rows for part in _with(case.quick_facts, row, "quick facts")] + problems


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
        except Exception as error:  # although the warm-up succeeded
            failed.append(skipped(bench, case.name, name, error))
            del ready[name]
    return failed


def with_facts(case: Case, rows: list[Row], timer: Timer, until: float) -> list[Row]:
    """The rows of a case with the facts that can be collected by ``until`` of the timer's clock.

    Call it after all cases of the process are timed: a profiler may slow down later calls.
    """
    whole = []
    for row in rows:
        if "ms" not in row or timer.clock() > until:
            whole.append(row)
            continue
        whole += _with(case.facts, row, "facts")
    return whole


def _with(facts: Callable[[str], Row], row: Row, name: str) -> list[Row]:
    """The row with more fields; where they fail, the row, and one of this name with the reason."""
    try:
        return [row | facts(row["impl"])]
    except Exception as error:
        return [row, skipped(row["bench"], row["case"], f"{row['impl']}, {name}", error)]


def measured_rows(bench: str, case: Case, ready: dict[str, _Timed], timer: Timer) -> list[Row]:
    """Medians in ms; ``ratio`` is the speed relative to the fastest peer, ``ratio_to``."""
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
                row["copy_gbps"] = timer.copy_gbps
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
    """A row without a time."""
    if isinstance(reason, Exception):
        reason = first_line(reason, with_type=True)
    return {"bench": bench, "case": case, "impl": implementation, "skipped": reason}


def training_step(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward of ``loss``.

    backward() would copy the gradient of a leaf with padded rows; autograd.grad does not.
    """
    return lambda: torch.autograd.grad(loss(), leaves)


def compile_every_shape() -> None:
    """Let torch.compile make a graph for every shape and model of a bench.

    By default it stops after eight graphs of a function and runs further shapes eagerly.
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
