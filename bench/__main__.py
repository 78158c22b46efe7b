"""python -m bench all|kernels|NAME [--device cuda] [--seconds 300] [--out FILE], or bench plot

The file is written after each bench: a run that is cut short keeps what it has measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Row, Timer

HERE = Path(__file__).parent
HOSTS = ("cache", "loader")  # mostly the host's work: last, as a GPU waits for it


def select(what: str) -> list[str]:
    """Names of the benches that ``what`` stands for; a kernel's bench has the kernel's name."""
    names = [path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")]
    names.sort(key=lambda name: (name in HOSTS, name))
    if what == "all":
        return names
    if what == "kernels":
        return [name for name in names if (HERE.parent / "kernels" / f"{name}.py").exists()]
    if what not in names:
        raise SystemExit(
            f"unknown bench {what!r}: all, kernels or one of {', '.join(names)}; "
            f"`plot` draws what they wrote"
        )
    return [what]


def main() -> None:
    if sys.argv[1:2] == ["plot"]:
        from .plot import main as plot

        plot(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "what",
        help="all, kernels, or the NAME of a file bench/bench_NAME.py, such as loader, cache or "
        "step; `plot` draws what they wrote",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=300, help="time for all benches together")
    parser.add_argument(
        "--out", type=Path, help="result file (bench/results/DEVICE/DATE-COMMIT.json)"
    )
    parser.add_argument("--commit", help="commit that is measured, where git cannot tell")
    parser.add_argument(
        "--go-on", action="store_true", help="keep the rows of the result file, run what it lacks"
    )
    options = parser.parse_args()
    names = select(options.what)

    import torch  # after the arguments: --help must not wait for it

    from . import common

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device")
    meta = common.collect_meta(device, f"python -m bench {' '.join(sys.argv[1:])}", options.commit)
    out = options.out or common.default_path(device, meta, options.what)
    try:
        common.require_meta(meta, out)  # now, not when all is measured
    except ValueError as error:
        raise SystemExit(f"{error}; --commit names what git cannot tell") from None
    rows: list[common.Row] = []
    if options.go_on and out.exists():
        found = json.loads(out.read_text())
        meta, rows = found["meta"], found["rows"]
    names = [name for name in names if name not in {row["bench"] for row in rows}]

    common.compile_every_shape()
    timer = common.Timer(device)  # measures the copy, which is not on the benches' time
    deadline = time.perf_counter() + options.seconds
    for position, name in enumerate(names):
        print(f"\n{name} on {meta['device']}, copy {timer.copy_gbps:.0f} GB/s", flush=True)
        share = (deadline - time.perf_counter()) / (len(names) - position)
        for row in run_bench(name, device, timer, share):
            rows += row
            common.print_table(row)
        common.write_results(out, meta, rows)
        if timer.is_lost():
            start_again(out, deadline - time.perf_counter())
    print(f"\n{out}")


def start_again(out: Path, seconds: float) -> None:
    """The benches that are left, in this process made new: one wrong kernel must not end them."""
    print("the GPU is lost to this process: starting again", flush=True)
    more = ["--go-on", "--out", str(out), "--seconds", f"{max(seconds, 0):.0f}"]
    os.execv(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:], *more])


def run_bench(name: str, device: str, timer: Timer, seconds: float) -> Iterator[list[Row]]:
    """Rows of one bench, case by case; time that one case leaves over goes to those after it.

    The first is timed even where no time is left: a bench that took too long costs no other bench.
    """
    from .common import NO_TIME, skipped, time_case

    try:
        cases = importlib.import_module(f"bench.bench_{name}").cases(device)
    except Exception as error:  # one broken bench must not cost the figures of the others
        yield [skipped(name, "import", "all", error)]
        return
    deadline = time.perf_counter() + seconds  # imports are not on the bench's time
    for position, case in enumerate(cases):
        left = deadline - time.perf_counter()
        if left <= 0 and position > 0:
            yield [skipped(name, case.name, "all", NO_TIME)]
            continue
        yield time_case(name, case, timer, left / (len(cases) - position), deadline)


if __name__ == "__main__":
    main()
