"""Hardware counters of single kernels, by Nsight Compute.

    python -m bench.counters --out FOLDER

Runs ncu over one call of each implementation named in TARGETS. It collects whole sections of
counters, because counters have different names on different cards. FOLDER/ncu.csv has all of them;
results.json gets one row per kernel with the most important ones: share of cycles that issue, of
DRAM and tensor-core peak, and the longest stalls of the warps. The clocks of the card are not
changed (--clock-control none).
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import ROOT, ResultFile, find_tool

# (bench, case as a regex, implementation): the kernels whose predictions matter most come first
TARGETS = (
    ("attention", r"H=6 N=198 .*forward\+backward", "ours"),
    ("add_layer_norm", r",384\] keep bfloat16 float32 stream fwd\+bwd", "ours"),
    ("distillation_loss", r"C=21841 B=4096 padded rows soft bfloat16", "ours"),
    ("bias_gelu", r",1536\] .*fwd\+bwd", "ours"),
)
SECTIONS = (
    *("SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis"),
    *("ComputeWorkloadAnalysis", "LaunchStats", "Occupancy"),
)
METRICS = (  # that the sections may lack
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
)
COLUMNS = {  # field of a row: patterns of a counter's name in ncu's raw page, best first
    "us": (r"^gpu__time_duration\.(sum|avg)$",),
    "issue_active_pct": (
        r"^smsp?__issue_active\.avg\.pct_of_peak_sustained_active$",
        r"^smsp?__inst_issued\.avg\.pct_of_peak_sustained_active$",
        r"^sm__inst_issued\.avg\.pct_of_peak_sustained_(active|elapsed)$",
    ),
    "dram_pct": (r"dram_+throughput\.avg\.pct_of_peak_sustained_elapsed$",),
    "dram_bytes": (r"^dram__bytes\.sum$",),
    "dram_read_bytes": (r"^dram__bytes_read\.sum$",),
    "dram_write_bytes": (r"^dram__bytes_write\.sum$",),
    "tensor_pct": (
        r"^sm__pipe_tensor_cycles_active\.avg\.pct_of_peak_sustained_(active|elapsed)$",
        r"^sm__(inst_executed_)?pipe_tensor.*\.pct_of_peak_sustained_(active|elapsed)$",
    ),
    "registers": (r"^launch__registers_per_thread$",),
    "occupancy_pct": (r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$",),
}
STALL = re.compile(r"average_warps?_(?:latency_)?issue_stalled_(\w+?)_per_issue_active\.ratio$|"
                   r"average_warp_latency_issue_stalled_(\w+?)\.ratio$")  # fmt: skip
TO_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
TO_MICROSECONDS |= {"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}
TO_BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def command(bench: str, case: str, implementation: str) -> list[str]:
    """The call of ncu for one target, whose CSV goes to standard output."""
    sections = [part for name in SECTIONS for part in ("--section", name)]
    target = (sys.executable, "-m", "bench.counters", "--call", bench, case, implementation)
    return [
        *(find_tool("ncu") or "ncu", "--csv", "--page", "raw", "--profile-from-start", "off"),
        *("--target-processes", "all", "--clock-control", "none"),
        *(*sections, "--metrics", ",".join(METRICS), *target),
    ]


def call_once(bench: str, case: str, implementation: str) -> None:
    """One call of a bench's implementation between the marks that ncu waits for."""
    import torch

    from .__main__ import choose

    chosen = choose(bench, "cuda", re.compile(case))
    if len(chosen) != 1:
        raise SystemExit(f"{bench}: {case!r} names {len(chosen)} cases, not one")
    function = chosen[0].build()[implementation]
    if isinstance(function, str):
        raise SystemExit(f"{bench} {implementation}: {function}")
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    function()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def read_csv(text: str) -> list[dict[str, Any]]:
    """The kernels in ncu's raw CSV: "kernel" and the fields of ``COLUMNS`` that it has.

    Lines before the head are the program's own. The line below the head holds the units.
    """
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[head:]))))
    if not rows:
        return []
    units, *kernels = rows
    return [_read_kernel(row, units) for row in kernels if row.get("Kernel Name")]


def _read_kernel(row: dict[str, str], units: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": re.sub(r"\s+", " ", row["Kernel Name"])[:120]}
    for field, patterns in COLUMNS.items():
        for pattern in patterns:
            names = [name for name in row if name and re.search(pattern, name)]
            scale = TO_MICROSECONDS if field == "us" else TO_BYTES
            values = [
                value * scale.get(units.get(name) or "", 1.0)
                for name in names
                if (value := _number(row[name] or "")) is not None
            ]
            if values:  # of several units of one kind the one that worked most
                found[field] = round(max(values), 2)
                break
    stalls = {}
    for name, text in row.items():
        match = STALL.search(name or "")
        value = _number(text or "")
        if match and value:
            stalls[match[1] or match[2]] = value
    longest = sorted(stalls, key=lambda name: -stalls[name])[:3]
    if longest:
        found["stall"] = " ".join(f"{name} {stalls[name]:.2f}" for name in longest)
        found["stalls"] = {name: round(value, 3) for name, value in stalls.items()}
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder with results.json")
    parser.add_argument("--call", nargs=3, metavar=("BENCH", "CASE", "IMPL"), help="for ncu")
    options = parser.parse_args(arguments)
    if options.call:
        call_once(*options.call)
        return
    if options.out is None:
        parser.error("--out FOLDER is missing")
    failed = False
    for bench, case, implementation in TARGETS:
        print(f"ncu: {bench} {case}", flush=True)
        done = subprocess.run(
            command(bench, case, implementation), cwd=ROOT, capture_output=True, text=True
        )
        with (options.out / "ncu.csv").open("a", encoding="utf-8") as file:
            file.write(f"# {bench} {case}\n{done.stdout}\n")
        kernels = read_csv(done.stdout)
        if done.returncode or not kernels:
            failed = True
            print(done.stdout[-1500:], done.stderr[-1500:], sep="\n", flush=True)
            continue
        rows = []
        for number, kernel in enumerate(kernels):
            print(kernel, flush=True)
            if "us" in kernel:
                name = f"{bench} {number}: {kernel['kernel']}"
                row = {"bench": "ncu", "case": name, "impl": implementation}
                rows.append(row | {"ms": kernel["us"] / 1e3} | kernel)
        ResultFile.resume(options.out / "results.json").put(rows)
    if failed:
        raise SystemExit("ncu gave no counters for at least one kernel")


if __name__ == "__main__":
    main()
