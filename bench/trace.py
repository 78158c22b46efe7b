"""One training step of DeiT-S, ours and timm's, kernel by kernel.

    python -m bench.trace --out FOLDER [--device cuda]

Adds one row for each to FOLDER/results.json: the time in which the device was busy, and the calls
and time of each kernel. FOLDER/trace-NAME.json.gz are traces for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Interval = tuple[str, float, float]
STEPS = {"ours": "ours", "timm, compiled": "timm", "timm, eager": "timm"}  # file names
CALLS = 2
SHOWN = 25


def device_intervals(events: Iterable[Any]) -> list[Interval]:
    """(name, start, end) in microseconds of all kernels, copies and fills on the device.

    Args:
        events: of torch.profiler, host and device. A region that the program has named also has an
            event on the device, which is not a kernel.
    """
    from torch.autograd import DeviceType

    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def busy_us(intervals: Iterable[Interval]) -> float:
    """Time in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(intervals, key=lambda interval: interval[1]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def by_kernel(intervals: Iterable[Interval], calls: int) -> list[dict[str, Any]]:
    """Launches and microseconds of each kernel in one step, the longest first."""
    found: dict[str, list[float]] = {}
    for name, start, end in intervals:
        found.setdefault(name, []).append(end - start)
    table = [
        {"kernel": name[:160], "calls": len(times) / calls, "us": round(sum(times) / calls, 1)}
        for name, times in found.items()
    ]
    return sorted(table, key=lambda row: -row["us"])


def table_text(table: Sequence[dict[str, Any]], busy: float) -> str:
    lines = [f"{'us':>9} {'share':>6} {'calls':>6}  kernel"]
    for row in table[:SHOWN]:
        name = re.sub(r"\s+", " ", row["kernel"])[:90]
        share = 100 * row["us"] / busy if busy else 0.0
        lines.append(f"{row['us']:>9.1f} {share:>5.1f}% {row['calls']:>6.1f}  {name}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder with results.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)

    import torch

    from . import bench_step
    from .common import compile_every_shape
    from .record import ResultFile, Row

    compile_every_shape()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    shape = (bench_step.SMALL, 224, 256) if cuda else (bench_step.TINY, 96, 16)
    case = f"{bench_step.short(shape[0])} {shape[1]}px B={shape[2]}"
    steps = bench_step.student_steps(*shape, device)
    for name, stem in STEPS.items():
        step = steps.pop(name, None)
        if step is None or (stem == "timm" and cuda and name == "timm, eager"):
            continue
        for _ in range(2):
            step()
        profiler, _ = bench_step.profiled(step, device, CALLS)
        profiler.export_chrome_trace(str(options.out / f"trace-{stem}.json.gz"))
        events = list(profiler.events())
        if cuda:
            intervals = device_intervals(events)
        else:  # without a GPU, host operators take the place of kernels
            intervals = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in events
                if event.name.startswith("aten::")
            ]
        busy, table = busy_us(intervals), by_kernel(intervals, CALLS)
        print(f"\n{case}, {name}: {busy / CALLS / 1e3:.2f} ms busy")
        print(table_text(table, busy / CALLS), flush=True)
        if not busy:
            print("the profiler recorded no kernel on the device")
            continue
        row: Row = {"bench": "trace", "case": f"{case}, {name}", "impl": name}
        row |= {"ms": busy / CALLS / 1e3, "kernels": table[:60]}
        ResultFile.resume(options.out / "results.json").put([row])


if __name__ == "__main__":
    main()
