"""python -m bench all|kernels|NAME [--device cuda] [--seconds 300] [--out FILE], or bench plot"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Row, Timer

HERE = Path(__file__).parent


def select(what: str) -> list[str]:
    """Names of the benches that ``what`` stands for; a kernel's bench has the kernel's name."""
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
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
    out = options.out or common.default_path(device, meta)

    timer = common.Timer(device)  # measures the copy, which is not on the benches' time
    deadline = time.perf_counter() + options.seconds
    rows: list[common.Row] = []
    for position, name in enumerate(names):
        print(f"\n{name} on {meta['device']}, copy {timer.copy_gbps:.0f} GB/s", flush=True)
        share = (deadline - time.perf_counter()) / (len(names) - position)
        for row in run_bench(name, device, timer, share):
            rows += row
            common.print_table(row)
    try:
        common.write_results(out, meta, rows)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"\n{out}")


def run_bench(name: str, device: str, timer: Timer, seconds: float) -> Iterator[list[Row]]:
    """Rows of one bench, case by case; time that one case leaves over goes to those after it."""
    from .common import skipped, time_case

    try:
        cases = importlib.import_module(f"bench.bench_{name}").cases(device)
    except Exception as error:  # one broken bench must not cost the figures of the others
        yield [skipped(name, "import", "all", error)]
        return
    deadline = time.perf_counter() + seconds  # imports are not on the bench's time
    for position, case in enumerate(cases):
        left = deadline - time.perf_counter()
        if left <= 0:
            yield [skipped(name, case.name, "all", "no time left, give --seconds more")]
            continue
        yield time_case(name, case, timer, left / (len(cases) - position))


if __name__ == "__main__":
    main()
