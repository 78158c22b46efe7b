"""Two scripts for the first minutes on a GPU.

    python -m bench gpu         --out FOLDER    # make bench-gpu OUT=FOLDER
    python -m bench gpu-profile --out FOLDER    # make profile-gpu OUT=FOLDER

Each ends within nine minutes even if a stage hangs, needs no network, and installs nothing but this
project. The first script runs the most important measurements first: correctness of the kernels,
speed of the compiled step and of timm's, cost of teacher and cache, then kernels, loss and cache
with their peers, then all tests. The second script explains the figures: hardware counters, one
step kernel by kernel, sanitizers, repeats, NCCL, tiles, apex.

FOLDER receives results.json, tests.jsonl, log.txt and summary.txt; the second script adds ncu.csv,
tiles.json and two traces. All are written as the run goes, so a run that is killed keeps what it
has. On a machine without a GPU every stage runs its CPU form or reports why it is skipped. The exit
status is 1 if a stage failed or was interrupted; the results up to then are valid.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import record
from .record import find_tool
from .stages import Command, Log, Stage, plan_text, run_stages

TOTAL = 495.0  # seconds of all stages
TOTAL_WITH_START = 530.0  # from the start of this process, with imports, to the summary

PYTHON = sys.executable
JOBS = max(1, min(5, (os.cpu_count() or 1) // 3))  # processes that compile side by side

# One small shape of each kernel, forward and backward: a broken kernel shows in the first minute.
FIRST_TESTS = (
    "tests/test_attention.py::test_accuracy_on_a_gpu[198-64-bfloat16]",
    "tests/test_attention.py::test_accuracy_on_a_gpu[198-32-bfloat16]",  # other descriptors
    "tests/test_add_layer_norm.py::test_accuracy_on_a_gpu[keep-float32,bfloat16,float32]",
    "tests/test_bias_gelu.py::test_accuracy_on_a_gpu[plain-bfloat16,float32]",
    "tests/test_bias_gelu_linear.py::test_accuracy_on_a_gpu[128x128-33-384-bfloat16]",
    "tests/test_distillation_loss_kernel.py::test_accuracy_on_a_gpu[dense-torch.bfloat16]",
    "tests/test_ingest.py::test_the_compiled_kernel_gives_the_bits_of_the_cpu[nchw-6-torch.float32]",
)
# What must also hold when it is repeated, watched or replayed.
REPEATED = "250_repeats or wait_for or waits_for or graph_replay or nccl"
SMALL_STUDENT = r"deit_small student"


def bench(out: Path, device: str, *arguments: str, name: str = "") -> Command:
    """A bench that adds its rows to the result file."""
    command = (PYTHON, "-m", "bench", *arguments, "--device", device, "--seconds", "{seconds}")
    return Command(name or arguments[0], (*command, "--out", str(out / "results.json"), "--resume"))


def compile_ahead(device: str, *arguments: str, implementation: str = "") -> Command:
    """A process that fills the caches of Inductor and Triton and measures nothing."""
    command = (PYTHON, "-m", "bench", *arguments, "--device", device)
    name = f"compile {arguments[0]} {implementation}".rstrip()
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    return Command(name, (*command, f"--compile-only={implementation}"), threads)


def pytest(out: Path, *arguments: str, name: str = "tests", wrapper: Sequence[str] = ()) -> Command:
    """A run of pytest that writes the outcome of each test as it ends."""
    options = ("-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider")
    outcomes = ("--outcomes", str(out / "tests.jsonl"))
    return Command(name, (*wrapper, PYTHON, "-m", "pytest", *options, *outcomes, *arguments))


def build(device: str, seconds: float) -> Stage:
    """Install the project. The only command of its stage, so that it has all of its time."""
    command = Command("build", (PYTHON, "-m", "bench.install", "--device", device))
    about = "install the project from this folder, offline"
    return Stage("build", seconds, about, (command,), is_required=True)


def card() -> tuple[Command, ...]:
    """Writes the card and its state to the log."""
    tool = find_tool("nvidia-smi")
    return (Command("card", (tool,)),) if tool else ()


def gpu_test_files() -> tuple[str, ...]:
    files = (record.ROOT / "tests").glob("test_*.py")
    return tuple(
        sorted(f"tests/{path.name}" for path in files if "mark.gpu" in path.read_text("utf-8"))
    )


def plan(out: Path, device: str) -> tuple[Stage, ...]:
    """The first script: the most important measurements first."""
    cuda = device == "cuda"
    no_gpu = "" if cuda else "no CUDA device"
    small = r"H=6 N=198|,384\]|,1536\]|B=256 S=224" if cuda else r"H=3 N=198|,192\]|,768\]|B=32"
    loss = "C=1000 B=256 |C=21841 B=4096 " if cuda else "C=1000 B=64 "
    teacher = "small teacher" if cuda else "teacher"
    students = "(small|tiny) student"
    cache = "on the device" if cuda else "encode top-16"
    workers = ("-n", str(max(1, (os.cpu_count() or 1) * 3 // 4)))
    ahead = (
        compile_ahead(device, "step", "--only", SMALL_STUDENT, implementation="ours"),
        compile_ahead(device, "step", "--only", SMALL_STUDENT, implementation="timm, compiled"),
        compile_ahead(device, "step", "--only", "tiny student", implementation="ours"),
        compile_ahead(device, "step", "--only", "tiny student", implementation="timm, compiled"),
        compile_ahead(device, "step", "--only", teacher, implementation="ours, online teacher"),
        compile_ahead(device, "step", "--only", teacher, implementation="timm, online teacher"),
        compile_ahead(device, "attention", "add_layer_norm", "--only", small),
        compile_ahead(device, "bias_gelu", "bias_gelu_linear", "ingest", "--only", small),
        compile_ahead(device, "distillation_loss", "--only", loss),
    )
    ready = (pytest(out, *FIRST_TESTS, name="first"), *card(), *ahead)
    kernels = ("attention", "add_layer_norm", "bias_gelu", "bias_gelu_linear", "ingest")
    return (
        build(device, 100),
        Stage("first", 95, "kernels at one small shape; meanwhile the steps compile", ready,
              jobs=1 + JOBS, skip=no_gpu),
        Stage("step", 100, "the compiled step, ours beside timm's, DeiT-S then DeiT-Ti",
              (bench(out, device, "step", "--only", students),)),
        Stage("teacher", 65, "the step with a cached and an online teacher",
              (bench(out, device, "step", "--only", teacher, name="teacher"),)),
        Stage("kernels", 50, "kernels at DeiT-S shapes beside cuDNN, Flash, Inductor, Liger",
              (bench(out, device, *kernels, "--only", small, name="kernels"),)),
        Stage("loss", 25, "distillation loss at 1,000 and 21,841 classes",
              (bench(out, device, "distillation_loss", "--only", loss, name="loss"),)),
        Stage("cache", 20, "encode and decode of cached logits on the device",
              (bench(out, device, "cache", "--only", cache),)),
        Stage("tests", 40, "all tests that need a GPU, in the time that is left",
              (pytest(out, *workers, *gpu_test_files()),), skip=no_gpu),
    )  # fmt: skip


def profile_plan(out: Path, device: str) -> tuple[Stage, ...]:
    """The second script: explains and verifies the figures of the first one."""
    cuda = device == "cuda"
    no_gpu = "" if cuda else "no CUDA device"

    no_ncu = no_gpu or ("" if find_tool("ncu") else "Nsight Compute (ncu) is not here")
    sanitizer = find_tool("compute-sanitizer")
    apex = os.environ.get("APEX", "")
    no_apex = no_gpu or ("" if apex else "no source of NVIDIA's apex: name its folder by APEX=")
    results = ("--out", str(out))
    options = ("--error-exitcode", "99", "--report-api-errors", "no", "--target-processes", "all")
    without_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitized(tool: str) -> Command:
        command = pytest(
            out, *FIRST_TESTS, name=tool, wrapper=(sanitizer, *options, "--tool", tool)
        )
        return Command(tool, command.arguments, without_cache)

    ways = ("ours", "timm, compiled", "ours, bfloat16 stream", "ours, CUDA graphs",
            "ours, compile=model", "ours, bfloat16 stream, mlp_backward")  # fmt: skip
    steps = [compile_ahead(device, "step", "--only", "small ways", implementation=name)
             for name in ways]  # fmt: skip
    steps += [compile_ahead(device, "step", "--only", "base student", implementation=name)
              for name in ways[:2]]  # fmt: skip
    blocks = [
        compile_ahead(device, "block", "--only", "small.*compiled", implementation=name)
        for name in ("timm", "ours, all kernels", "ours, no kernel", "ours, all but attention",
                     "ours, all but add_layer_norm", "ours, all but bias_gelu and mlp_backward",
                     "ours, all but mlp_backward")
    ]  # fmt: skip
    # In the order of the stages that need them: trace, choice, ways.
    ahead = (*steps[:2], *blocks, *steps[2:])
    sanitizers = (sanitized("memcheck"), sanitized("racecheck")) if sanitizer else ()
    missing = "" if sanitizer else "; compute-sanitizer is not here"
    return (
        build(device, 90),
        Stage("ncu", 60, "hardware counters of attention, LayerNorm and the loss",
              (Command("ncu", (PYTHON, "-m", "bench.counters", *results)),), skip=no_ncu),
        Stage("sanitizer", 75, f"memcheck and racecheck; meanwhile the models compile{missing}",
              (*sanitizers, *ahead), jobs=2 + JOBS, skip=no_gpu),
        Stage("trace", 35, "one step of ours and of timm's, kernel by kernel",
              (Command("trace", (PYTHON, "-m", "bench.trace", "--device", device, *results)),)),
        Stage("choice", 55, "each kernel on and off in the compiled model",
              (bench(out, device, "block", "--only", "small.*compiled" if cuda else "block"),)),
        Stage("repeats", 35, "250 repeats bit-equal, no waiting for the device, graphs, NCCL",
              (pytest(out, "-n", str(JOBS), "-k", REPEATED, *gpu_test_files()),), skip=no_gpu),
        Stage("tiles", 35, "attention's tiles and pipeline stages by measurement",
              (Command("tiles", (PYTHON, "-m", "deit_fast.kernels.attention", "--tune",
                                 "--out", str(out / "tiles.json"))),), skip=no_gpu),
        Stage("ways", 50, "the step with options, by CUDA graphs, compiled as a whole; DeiT-B",
              (bench(out, device, "step", "--only", "small ways|base student", name="ways"),),
              skip=no_gpu),
        Stage("fed", 20, "a step fed by a loader beside the same step with a batch at hand",
              (bench(out, device, "step", "--only", "small.*fed by packed" if cuda
                     else "fed by packed", name="fed"),)),
        Stage("apex", 40, "NVIDIA's apex, built from source: optimiser test, LayerNorm bench",
              (Command("apex", ("bash", "bench/apex.sh", apex, str(out), PYTHON)),),
              skip=no_apex),
    )  # fmt: skip


def read_tests(path: Path) -> dict[str, Any]:
    """Counts and failures of tests.jsonl, which tests/conftest.py writes.

    A test counts once in each run of pytest; if it has several lines there, the worst counts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    collected = 0
    tests: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        collected += entry.get("collected", 0)
        key = entry["run"], entry.get("test", "")
        if key[1] and tests.get(key, {}).get("outcome") != "failed":
            tests[key] = entry
    outcomes = [entry["outcome"] for entry in tests.values()]
    counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
    failures = [
        {"test": entry["test"], "message": entry["message"]}
        for entry in tests.values()
        if entry["outcome"] == "failed"
    ]
    missing = max(0, collected - len(tests))
    return {"collected": collected, **counts, "not_run": missing, "failures": failures}


def main(arguments: Sequence[str]) -> None:
    start = time.monotonic()
    script = arguments[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {script}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = Path("build") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    parser.add_argument("--out", type=Path, default=folder, help="folder (build/SCRIPT-TIME)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for the whole script")
    parser.add_argument("--commit", help="commit that is measured, where git cannot tell")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="STAGE", help="leave these out, such as build"
    )
    options = parser.parse_args(arguments[1:])

    out = options.out.resolve()
    prepare(out)
    # For bench.install where pip cannot install, and for tests that run Python elsewhere.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(record.ROOT), os.environ.get("PYTHONPATH")))
    )

    from .common import choose_device  # after the arguments: --help must not wait for torch

    device = choose_device(options.device)
    command = f"python -m bench {' '.join(arguments)}"
    meta = record.collect_meta(device, command, options.commit)
    file = record.ResultFile.create(out / "results.json", meta)
    total = min(options.seconds, TOTAL_WITH_START - (time.monotonic() - start))
    stages = (plan if script == "gpu" else profile_plan)(out, device)
    stages = without(scaled(stages, total / TOTAL), options.skip)

    log = Log(out / "log.txt")
    log.write("", f"{command}\n{meta['device']}, commit {meta['commit']}\n")
    log.write("", plan_text(stages, total) + "\n")

    def report(records: list[dict[str, Any]]) -> None:
        """Stages write rows while they run; this process writes only between them."""
        try:
            current = record.ResultFile.resume(file.path)
        except ValueError as error:  # a stage that breaks the file must not end the others
            log.write("", str(error))
            return
        current.content |= {"stages": records, "tests": read_tests(out / "tests.jsonl")}
        current.save()

    records: list[dict[str, Any]] = []
    try:
        records = run_stages(stages, total, log, report)
        status = int(any(entry["outcome"] not in ("passed", "skipped") for entry in records))
    except KeyboardInterrupt:
        status = 130
    from .summary import page

    text = page(record.read(file.path))
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    (out / ".results.json.part").unlink(missing_ok=True)
    log.write("", f"\n{text}\n\nwritten to {out}, {time.monotonic() - start:.0f} s in all")
    log.close()
    if status:
        raise SystemExit(status)


def prepare(out: Path) -> None:
    """Make the folder of results.

    Raises:
        SystemExit: it has results already, or cannot be written.
    """
    found = [name for name in ("results.json", "tests.jsonl") if (out / name).exists()]
    if found:
        raise SystemExit(f"--out {out}: has {found[0]} of an earlier run; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")
    except OSError as error:
        raise SystemExit(f"--out {out}: cannot be written: {error.strerror}") from None


def scaled(stages: Sequence[Stage], factor: float) -> tuple[Stage, ...]:
    """The same plan for another total."""
    return tuple(replace(stage, seconds=stage.seconds * factor) for stage in stages)


def without(stages: Sequence[Stage], names: Sequence[str]) -> tuple[Stage, ...]:
    """The same plan with the named stages skipped.

    Raises:
        SystemExit: a name that no stage has.
    """
    known = [stage.name for stage in stages]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--skip {unknown[0]}: the stages are {', '.join(known)}")
    return tuple(
        replace(stage, skip="by --skip") if stage.name in names else stage for stage in stages
    )
