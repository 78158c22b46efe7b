"""The two scripts for a machine with a GPU, rehearsed without one: plans, outcomes of tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, install, record
from bench.__main__ import choose
from deit_fast.models.fuse import KERNELS

ROOT = Path(__file__).parent.parent


def test_wrong_arguments_give_one_clear_line(tmp_path: Path) -> None:
    for name in ("results.json", "tests.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--out", f"{tmp_path}/results.json"], "has results.json of an earlier run; name another"),
        (["--out", f"{tmp_path}/tests.jsonl"], "has tests.jsonl of an earlier run; name another"),
        (["--out", f"{tmp_path}/file"], "file: cannot be written: File exists"),
        (["--out", f"{tmp_path}/file/x"], "file/x: cannot be written: Not a directory"),
        (["--out", f"{tmp_path}/x", "--skip", "all"], "--skip all: the stages are build, first"),
        (["--out", f"{tmp_path}/y", "--device", "cuda"], "torch finds no CUDA device"),
    ):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit, match=re.escape(words)):
            gpu.main(["gpu", *arguments])
    assert (tmp_path / "results.json" / "results.json").read_text() == "{}"


# ---------------------------------------------------------------------------------------------
# The build
# ---------------------------------------------------------------------------------------------


def test_where_pip_cannot_install_the_folder_itself_is_used(tmp_path: Path) -> None:
    """A pip that fails lies in the folder."""
    tree = tmp_path / "tree"
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("bench", "csrc", "deit_fast", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    (tree / "deit_fast" / "kernels").unlink(missing_ok=True)
    (tree / "pip").mkdir()
    (tree / "pip" / "__init__.py").write_text("raise SystemExit('no pip')")
    done = subprocess.run(
        [sys.executable, "-m", "bench.install"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("failed: ") == 2
    paths = subprocess.check_output(
        [sys.executable, "-c", install.CHECK],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tree)}, text=True,
    ).split()  # fmt: skip
    assert len(paths) == 2 and all(path.startswith(str(tree)) for path in paths)


def test_pip_is_not_tried_where_it_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"DEIT_FAST_CUDA_ARCHITECTURES": "90"}
    for writable, first in ((True, install.WITH_PIP), (False, install.IN_PLACE)):
        monkeypatch.setattr(install, "can_write_packages", lambda writable=writable: writable)
        attempts = install.attempts(chosen)
        assert attempts[0] == (first, chosen)
        assert attempts[-1] == (install.IN_PLACE, install.WITHOUT_CUDA)


# ---------------------------------------------------------------------------------------------
# The plans
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_the_plans_fit_into_nine_minutes_in_order_of_importance(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX", "somewhere")
    monkeypatch.setattr(gpu, "find_tool", lambda tool: tool)
    first, second = gpu.plan(tmp_path, device), gpu.profile_plan(tmp_path, device)
    for stages in (first, second):
        assert sum(stage.seconds for stage in stages) <= gpu.TOTAL < gpu.TOTAL_WITH_START < 540
    names = [stage.name for stage in first]
    assert names == ["build", "first", "step", "teacher", "kernels", "loss", "cache", "tests"]
    assert {"ncu", "trace", "sanitizer", "repeats", "tiles", "apex"} <= {s.name for s in second}
    if device == "cuda":
        assert not any(stage.skip for stage in (*first, *second))


def test_the_page_shows_the_plans(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    for script, make in (("bench-gpu", gpu.plan), ("profile-gpu", gpu.profile_plan)):
        section = text.split(f"| `{script}` | share, s |")[1].split("\n\n")[0]
        shown = re.findall(r"^\| (\w+) \| (\d+) \|", section, re.M)
        assert shown == [(stage.name, f"{stage.seconds:.0f}") for stage in make(tmp_path, "cpu")]


def test_every_bench_of_the_plans_finds_cases_and_every_implementation_its_name(
    tmp_path: Path,
) -> None:
    """A regex without a match would silently measure nothing."""
    commands = [
        command
        for stages in (gpu.plan(tmp_path, "cuda"), gpu.profile_plan(tmp_path, "cuda"))
        for stage in stages
        for command in stage.commands
        if command.arguments[1:3] == ("-m", "bench")
    ]
    assert len(commands) > 15
    for command in commands:
        words = command.arguments[3:]
        names = list(words[: next(i for i, w in enumerate(words) if w.startswith("--"))])
        only = re.compile(words[words.index("--only") + 1])
        for name in names:
            assert choose(name, "cuda", only), (name, only.pattern)
    chosen = [case.name for case in choose("attention", "cuda", re.compile("H=6 N=198"))]
    assert len(chosen) == 2  # not all of B=256


def steps_of(commands: Sequence[Any], option: str) -> dict[str, set[str]]:
    """Case -> implementations of the commands with this option that run whole steps.

    Without --compile-only=NAME a command runs all implementations of its cases.
    """
    found: dict[str, set[str]] = {}
    for command in commands:
        words = command.arguments[3:]
        if words[:1] != ("step",) or not any(word.startswith(option) for word in words):
            continue
        only = re.compile(words[words.index("--only") + 1])
        _, _, chosen = words[-1].partition("--compile-only=")
        for case in choose("step", "cuda", only):
            if "fed by" not in case.name:  # the models of the other cases, with a loader
                found.setdefault(case.name, set()).update([chosen] if chosen else case.build())
    return found


@pytest.mark.parametrize("make", (gpu.plan, gpu.profile_plan))
def test_every_model_of_a_measured_step_is_compiled_before_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]
) -> None:
    """A cold compilation of one implementation can cost the figures of all that follow."""
    from bench import bench_block, bench_step

    monkeypatch.setattr(bench_step, "synthetic_batch", lambda config, device: None)
    monkeypatch.setattr(bench_step, "random_logits", lambda size, device: torch.zeros(1, 1))
    commands = [command for stage in make(tmp_path, "cuda") for command in stage.commands]
    ahead, measured = steps_of(commands, "--compile-only"), steps_of(commands, "--seconds")
    assert len(measured) >= 2
    for case, implementations in measured.items():
        # The code of these is that of others, or none.
        needed = {name for name in implementations
                  if not re.search("eager|cached|search", name)}  # fmt: skip
        assert needed == ahead.get(case, set()), case
    names = [command.name for command in commands if command.name.startswith("compile")]
    if make is gpu.profile_plan:
        assert names[:2] == ["compile step ours", "compile step timm, compiled"]  # for the trace
        blocks = {name.removeprefix("compile block ") for name in names if " block " in name}
        assert blocks == {"timm", *bench_block.kernel_sets(compiled=True)}


@pytest.mark.parametrize("compiled", (True, False), ids=("compiled", "eager"))
def test_every_set_of_kernels_that_is_compared_can_be_fused(compiled: bool) -> None:
    """A kernel is a default where the model is faster with it: no set may be missing."""
    from bench import bench_block
    from deit_fast import fuse

    sets = bench_block.kernel_sets(compiled)
    for kernels in sets.values():
        fuse(bench_block.model_of("tiny", 1, "cpu"), kernels=kernels)
    assert len(set(sets.values())) == len(sets) and all(
        f"all but {k}" in str(sets) for k in KERNELS
    )


@pytest.mark.parametrize("make", (gpu.plan, gpu.profile_plan))
def test_commands_in_a_row_have_time_to_start_and_the_build_has_all_of_its_stage(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    """Imports, the CUDA context and the copy bandwidth take about seven seconds of each."""
    for stage in make(tmp_path, "cuda"):
        assert stage.jobs > 1 or stage.seconds / len(stage.commands) >= 20, stage.name
        assert not stage.is_required or len(stage.commands) == 1


def test_cudnn_searches_the_convolutions_of_timms_step() -> None:
    """As in timm's training script; ours leaves the choice to cuDNN."""
    from bench import bench_step

    seen: list[bool] = []

    def step(*arguments: Any) -> None:
        seen.append(torch.backends.cudnn.benchmark)

    device = torch.device("cpu")
    config = bench_step.settings(bench_step.TINY, 32, 2)
    batch = bench_step.synthetic_batch(config, device)
    at_hand = bench_step.TeacherAtHand(bench_step.random_logits(2, device))
    theirs = bench_step.timms(config, batch, at_hand, device, compiled=False)
    at_hand.register_forward_pre_hook(step)
    theirs()
    bench_step.searched(step)()
    step()
    assert seen == [True, True, False]


def test_the_compiled_step_puts_its_peer_second() -> None:
    """The last implementations are skipped when time runs out; the peer must not be among them."""
    from bench import bench_step

    names = list(student_names("cuda"))
    assert names[:2] == ["ours", "timm, compiled"]
    chosen = choose("step", "cuda", re.compile("student"))
    assert [case.name.split()[0] for case in chosen] == ["deit_small", "deit_tiny", "deit_base"]
    assert all(case.repeats == bench_step.STEPS_IN_A_ROW == 30 for case in chosen)


def student_names(device: str) -> list[str]:
    from bench import bench_step

    class Cuda:  # stands for torch.device("cuda"): nothing is built before it is called
        type = device

    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(bench_step, "synthetic_batch", lambda config, device: None)
        patch.setattr(bench_step, "random_logits", lambda size, device: torch.zeros(1, 1))
        return list(bench_step.student_steps(bench_step.TINY, 96, 2, Cuda()))  # type: ignore[arg-type]


def test_the_tests_of_the_first_minute_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *gpu.FIRST_TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert sorted(found) == sorted(gpu.FIRST_TESTS)
    assert {"attention", "add_layer_norm", "distillation_loss"} <= {
        re.sub(r"tests/test_|_kernel|\.py.*", "", name) for name in found
    }


def test_make_targets_run_both_scripts_in_the_given_folder() -> None:
    for target, script in (("bench-gpu", "gpu"), ("profile-gpu", "gpu-profile")):
        done = subprocess.run(
            ["make", "-n", target, "OUT=/tmp/x y", "PYTHON=python3", "COMMIT=abc"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        expected = f"python3 -m bench {script} --out '/tmp/x y' --commit abc"
        assert expected in done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_the_whole_first_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """In a minute: every stage runs or is stopped at its limit, and all files are valid."""
    out = tmp_path / "out of the way"
    total = 60.0
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--out", str(out),
         "--seconds", str(total), "--skip", "build"],  # which would replace the tested package
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    content = record.read(out / "results.json")
    stages = {entry["stage"]: entry for entry in content["stages"]}
    assert list(stages) == [stage.name for stage in gpu.plan(out, "cpu")]
    assert stages.pop("build") == {"stage": "build", "outcome": "skipped", "reason": "by --skip"}
    for name in ("first", "tests"):
        assert stages.pop(name)["reason"] == "no CUDA device"
    for entry in stages.values():
        assert entry["limit_s"] >= entry["share_s"] - 3, entry
    log = (out / "log.txt").read_text()
    assert log.index("share  what it does") < log.index("first     | ")  # printed first
    assert (out / "summary.txt").read_text().strip() in done.stdout
    written = {path.name for path in out.iterdir()}
    assert written == {"results.json", "log.txt", "summary.txt"}


# ---------------------------------------------------------------------------------------------
# Outcomes of tests
# ---------------------------------------------------------------------------------------------


def pytest_in(folder: Path, text: str, *options: str) -> list[dict[str, Any]]:
    """Lines of --outcomes, with this project's conftest."""
    (folder / "test_x.py").write_text(text)
    outcomes = folder / "tests.jsonl"
    paths = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider",
         "--rootdir", str(folder), "--outcomes", str(outcomes), *options, str(folder)],
        cwd=folder, env=os.environ | paths, capture_output=True,
    )  # fmt: skip
    return [json.loads(line) for line in outcomes.read_text().splitlines()]


TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no card")
def test_skipped(): pass
def test_killed():
    if os.environ.get("KILL"): os.kill(os.getpid(), 9)
"""


def test_outcomes_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = pytest_in(tmp_path, TESTS)
    assert lines[0].keys() == {"run", "collected"} and lines[0]["collected"] == 4
    found = gpu.read_tests(tmp_path / "tests.jsonl")
    assert (found["passed"], found["failed"], found["skipped"], found["not_run"]) == (2, 1, 1, 0)
    (failure,) = found["failures"]
    assert (
        failure["test"].endswith("test_x.py::test_bad") and "one is not two" in failure["message"]
    )
    (tmp_path / "tests.jsonl").unlink()
    monkeypatch.setenv("KILL", "1")
    pytest_in(tmp_path, TESTS)
    with (tmp_path / "tests.jsonl").open("a") as file:
        file.write('{"test": "cut sh')
    found = gpu.read_tests(tmp_path / "tests.jsonl")
    assert (found["passed"], found["failed"], found["skipped"], found["not_run"]) == (1, 1, 1, 1)
    # Another run of the same tests counts too; a test with two lines in one run counts once.
    one = (
        '{"run": 1, "collected": 2}\n{"run": 1, "test": "x", "outcome": "passed", "message": ""}\n'
    )
    crash = '{"run": 1, "test": "x", "outcome": "failed", "message": "worker crashed"}\n'
    (tmp_path / "tests.jsonl").write_text(one + one.replace('"run": 1', '"run": 2') + crash)
    found = gpu.read_tests(tmp_path / "tests.jsonl")
    assert (found["passed"], found["failed"], found["not_run"]) == (1, 1, 2)
    assert gpu.read_tests(tmp_path / "absent")["collected"] == 0


def test_a_worker_with_a_lost_gpu_is_replaced(tmp_path: Path) -> None:
    """Otherwise one bad kernel would make every later test of that worker fail."""
    text = """
import torch, pytest
def test_breaks_the_context():
    def fails(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = fails
    assert False
@pytest.mark.parametrize("i", range(5))
def test_later(i): assert not torch.cuda.is_initialized()
"""
    lines = pytest_in(tmp_path, text, "-n", "1")
    outcomes = {line["test"].split("::")[1]: line["outcome"] for line in lines if "test" in line}
    assert outcomes["test_breaks_the_context"] == "failed"
    assert [outcomes[f"test_later[{i}]"] for i in range(5)] == ["passed"] * 5
