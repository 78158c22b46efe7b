"""python -m bench all|kernels|NAME... [--device cuda] [--seconds 300] [--only REGEX] [--out FILE]
python -m bench gpu|gpu-profile    the two scripts for a machine with a GPU (bench/gpu.py)
python -m bench summary FILE       a result file as a page to read
python -m bench plot [FILE...]     charts and tables
python -m bench fashion run|page|plan    distillation on Fashion-MNIST (bench/fashion/README.md)

The result file is written after every case, and within a case whenever another implementation has
been compiled: a run that is cut short keeps what it has measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Case, Report, Timer
    from .record import ResultFile, Row

STARTED = time.perf_counter()  # --seconds includes the time of the imports
HERE = Path(__file__).parent
HOST_BENCHES = ("cache", "loader")  # run last: the GPU is idle during most of them
NOT_IN_ALL = ("startup", "scale")  # millions of files or samples; nothing to do with the device
PROGRAMS = {
    "plot": "plot", "summary": "summary", "gpu": "gpu", "gpu-profile": "gpu",
    "traffic": "traffic", "roofline": "roofline", "fashion": "fashion.run",
}  # fmt: skip


def select(what: str) -> list[str]:
    """Names of the benches that ``what`` stands for; a kernel's bench has the kernel's name."""
    names = [path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")]
    names.sort(key=lambda name: (name in HOST_BENCHES, name))
    if what == "all":
        return [name for name in names if name not in NOT_IN_ALL]
    if what == "kernels":
        return [name for name in names if (HERE.parent / "kernels" / f"{name}.py").exists()]
    if what not in names:
        raise SystemExit(
            f"unknown bench {what!r}: all, kernels or one of {', '.join(names)}; "
            f"{', '.join(PROGRAMS)} are separate programs"
        )
    return [what]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="+",
        help="all, kernels, or names of files bench/bench_NAME.py, such as loader, cache or step",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=300, help="time for all benches together")
    parser.add_argument("--only", type=re.compile, help="cases whose name matches this regex")
    parser.add_argument(
        "--out", type=Path, help="result file (bench/results/DEVICE/DATE-COMMIT.json)"
    )
    parser.add_argument("--commit", help="commit that is measured, where git cannot tell")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the result file, run what it lacks"
    )
    parser.add_argument(
        "--compile-only",
        metavar="IMPLEMENTATION",
        nargs="?",
        const="",
        help="call each implementation (or this one) once and write no file: later processes find "
        "the compiled code in the caches of Inductor and Triton",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and (program := PROGRAMS.get(arguments[0])):
        importlib.import_module(f"bench.{program}").main(arguments)
        return
    options = parse(arguments)
    names = list(dict.fromkeys(name for what in options.what for name in select(what)))

    from . import common, record  # after the arguments: --help must not wait for torch

    device = common.choose_device(options.device)
    common.compile_every_shape()
    deadline = STARTED + options.seconds
    if options.compile_only is not None:
        compile_ahead(names, device, options.only, options.compile_only)
        return
    meta = record.collect_meta(device, f"python -m bench {' '.join(arguments)}", options.commit)
    out = options.out or record.default_path(device, meta, "-".join(options.what))
    file = open_file(out, meta, options.resume)

    timer = common.Timer(device)
    for position, name in enumerate(names):
        print(f"\n{name} on {meta['device']}, copy {timer.copy_gbps:.0f} GB/s", flush=True)
        share = (deadline - time.perf_counter()) / (len(names) - position)
        for rows in run_bench(name, device, timer, share, options.only, file):
            common.print_table(rows)
            if timer.is_lost():
                restart(arguments, out, deadline - time.perf_counter())
    print(f"\n{out}")


def open_file(out: Path, meta: Row, resume: bool) -> ResultFile:
    """The result file, written once before anything is measured."""
    from .record import ResultFile

    try:
        if resume and out.exists():
            return ResultFile.resume(out)
        return ResultFile.create(out, meta)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def restart(arguments: Sequence[str], out: Path, seconds: float) -> None:
    """Measure the remaining cases in a new process image, whose CUDA context is intact."""
    print("the CUDA context of this process is broken: restarting", flush=True)
    more = ["--resume", "--out", str(out), "--seconds", f"{max(seconds, 0):.0f}"]
    os.execv(sys.executable, [sys.executable, "-m", "bench", *arguments, *more])


def choose(name: str, device: str, only: re.Pattern[str] | None) -> list[Case]:
    """The cases of a bench whose name matches."""
    cases: list[Case] = importlib.import_module(f"bench.bench_{name}").cases(device)
    return [case for case in cases if only is None or only.search(case.name)]


def run_bench(
    name: str, device: str, timer: Timer, seconds: float, only: re.Pattern[str] | None = None,
    file: ResultFile | None = None,
) -> Iterator[list[Row]]:  # fmt: skip
    """Rows of one bench, case by case; time that a case does not use goes to the following cases.

    The first case is timed even if no time is left, so a slow bench does not prevent another one.

    Args:
        only: the cases to run, by name.
        file: receives rows as soon as they are measured; cases that it already has are left out.
    """
    from .common import skipped, time_case, with_facts
    from .record import NO_TIME

    def write(rows: list[Row]) -> None:
        if file is not None:
            file.put(rows)

    report: Report = write
    try:
        cases = choose(name, device, only)
    except Exception as error:  # one broken bench must not cost the figures of the others
        rows = [skipped(name, "import", "all", error)]
        write(rows)
        yield rows
        return
    known = file.finished_cases() if file is not None else set()
    cases = [case for case in cases if (name, case.name) not in known]
    deadline = timer.clock() + seconds  # does not include the imports of the bench
    timed = []
    for position, case in enumerate(cases):
        now = timer.clock()
        share = (deadline - now) / (len(cases) - position)
        if share <= 0 and position > 0:
            rows = [skipped(name, case.name, "all", NO_TIME)]
        else:
            rows = time_case(name, case, timer, share, now + share, report)
        write(rows)
        timed.append((case, rows))
        yield rows
    for case, rows in timed:
        write(with_facts(case, rows, timer, deadline))


def compile_ahead(
    names: Sequence[str], device: str, only: re.Pattern[str] | None, implementation: str
) -> None:
    """Call each implementation of the chosen cases once; failures are printed, not raised.

    Inductor's choices between configurations are not cached: other processes use the device at the
    same time, and the process that measures must choose on an idle device.

    Raises:
        SystemExit: no chosen case has this implementation.
    """
    import torch
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False
    found = False
    for name in names:
        for case in choose(name, device, only):
            try:
                implementations = case.build()
            except Exception as error:
                print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
                continue
            for key, function in implementations.items():
                if isinstance(function, str) or implementation not in ("", key):
                    continue
                found = True
                start = time.perf_counter()
                try:
                    case.before(key)
                    function()
                    if device == "cuda":
                        torch.cuda.synchronize()
                except Exception as error:
                    print(f"{case.name}, {key}: {type(error).__name__}: {error}", flush=True)
                    continue
                took = time.perf_counter() - start
                print(f"{case.name}, {key}: first call {took:.1f} s", flush=True)
    if not found:
        raise SystemExit(f"--compile-only {implementation}: no chosen case has it")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # at a stage's time limit; the rows are on disk
        print("interrupted", flush=True)
        sys.exit(130)
