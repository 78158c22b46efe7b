"""The two scripts for a machine with a GPU, rehearsed without one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bench import counters, gpu, record, summary, trace
from bench.__main__ import choose
from bench.stages import Command, Log, Stage, plan_text, run_stages

ROOT = Path(__file__).parent.parent
META = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "versions": {"torch": "2.11.0"},
    "commit": "c0ffee",
    "date": "2026-01-01",
    "command": "python -m bench gpu",
}
CASE = "deit_small student 224px B=256"


def python(name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-c", code))


def stage(name: str, seconds: float, *codes: str, jobs: int = 1) -> Stage:
    commands = tuple(python(f"{name}{i or ''}", code) for i, code in enumerate(codes))
    return Stage(name, seconds, f"about {name}", commands, jobs)


def run(stages: list[Stage], total: float, folder: Path) -> tuple[list[dict[str, Any]], str]:
    log = Log(folder / "log.txt")
    records = run_stages(stages, total, log, lambda records: None)
    log.close()
    return records, (folder / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------

HANG = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"
)


def test_a_stage_that_hangs_costs_no_other_stage_its_time(tmp_path: Path) -> None:
    """It ignores the interrupt; the stage after it still has its share, and all ends in time."""
    start = time.monotonic()
    records, log = run(
        [stage("one", 2, HANG), stage("two", 2, HANG), stage("three", 3, "print('alive')")],
        7,
        tmp_path,
    )
    took = time.monotonic() - start
    assert [entry["outcome"] for entry in records] == ["stopped", "stopped", "passed"]
    assert took < 7.5
    assert all(entry["limit_s"] >= entry["share_s"] - 0.3 for entry in records)
    assert records[0]["took_s"] < 2.5 and records[1]["took_s"] < 2.5
    assert "three     | alive" in log


def test_time_that_is_left_over_goes_to_later_stages(tmp_path: Path) -> None:
    records, log = run(
        [stage("quick", 20, "pass"), stage("slow", 1, "import time; time.sleep(2); print('done')")],
        21,
        tmp_path,
    )
    assert [entry["outcome"] for entry in records] == ["passed", "passed"]
    assert records[1]["limit_s"] > 10 and "done" in log


def test_shares_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares of 5 s do not fit into 4 s"):
        run([stage("a", 2, "pass"), stage("b", 3, "pass")], 4, tmp_path)


def test_commands_of_a_stage_run_side_by_side_and_each_outcome_is_kept(tmp_path: Path) -> None:
    nap = "import time; time.sleep(1.5)"
    start = time.monotonic()
    (entry,), log = run(
        [stage("s", 20, nap, nap, nap, f"{nap}; raise SystemExit(3)", jobs=4)], 20, tmp_path
    )
    assert time.monotonic() - start < 5
    assert entry["outcome"] == "failed"
    by_name = {command["command"]: command for command in entry["commands"]}
    assert by_name["s3"]["exit_status"] == 3 and by_name["s"]["outcome"] == "passed"
    (entry,), log = run(
        [Stage("s", 5, "", (Command("missing", ("no-such-program",)),))], 5, tmp_path
    )
    assert entry["outcome"] == "failed" and "no-such-program" in log


def test_a_command_knows_its_time_and_a_skipped_stage_has_a_reason(tmp_path: Path) -> None:
    echo = Command("echo", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"))
    stages = [Stage("a", 8, "", (echo, echo)), Stage("b", 5, "", (), skip="no card")]
    records, log = run(stages, 8, tmp_path)
    seconds = [int(value) for value in re.findall(r"echo      \| (\d+)$", log, re.M)]
    assert 1 <= seconds[0] <= 4 and seconds[1] >= seconds[0]  # half of it, then what is left
    assert records[1] == {"stage": "b", "outcome": "skipped", "reason": "no card"}
    text = plan_text(stages, 8)
    assert text.index("a ") < text.index("b ") and "skipped: no card" in text


def test_commands_of_a_stage_have_limits_of_their_own(tmp_path: Path) -> None:
    """The first one hangs, and the others still have their parts of the time."""
    (entry,), log = run([stage("s", 12, HANG, "print('second')", "print('third')")], 12, tmp_path)
    outcomes = [command["outcome"] for command in entry["commands"]]
    assert outcomes == ["stopped", "passed", "passed"] and entry["outcome"] == "stopped"
    assert 3 < entry["commands"][0]["took_s"] < 5
    assert "second" in log and "third" in log


def test_nothing_is_measured_without_a_stage_that_is_required(tmp_path: Path) -> None:
    build = Stage("build", 5, "", (python("build", "raise SystemExit(1)"),), is_required=True)
    records, _ = run([build, stage("step", 5, "print('measures a mixture')")], 10, tmp_path)
    assert records[0]["outcome"] == "failed"
    expected = {"stage": "step", "outcome": "skipped", "reason": "stage build did not pass"}
    assert records[1] == expected


def test_what_a_command_leaves_behind_is_killed(tmp_path: Path) -> None:
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid())); {HANG}"
    code = (
        f"import subprocess, sys, time, os\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL)\n"
        f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\n"
        f"time.sleep(0.3)"
    )
    (entry,), _ = run([stage("s", 20, code)], 20, tmp_path)
    assert entry["outcome"] == "passed"
    assert not is_alive(int((tmp_path / "pid").read_text()))


def is_alive(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


DRIVER = """
import sys
from pathlib import Path
from bench import gpu, record
from bench.stages import Command, Stage

def plan(out, device):
    code = '''
import os, subprocess, sys, time
from pathlib import Path
from bench.record import ResultFile
name, out = sys.argv[1:]
tool = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
row = {"bench": "b", "case": name, "impl": "ours", "ms": 1.0, "ms_p20": 1.0, "ms_p80": 1.0}
ResultFile.resume(Path(out) / "results.json").put([row])
print(f"stage {name} is measured", os.getpid(), tool.pid)
if name == KILLED: time.sleep(60)
tool.kill()
'''.replace("KILLED", repr(sys.argv[2]))
    command = lambda name: Command(name, (sys.executable, "-c", code, name, str(out)))
    return tuple(Stage(name, 30, "", (command(name),)) for name in ("one", "two", "three"))

gpu.plan = plan
gpu.TOTAL = 90.0
gpu.main(["gpu", "--out", sys.argv[1], "--device", "cpu", "--seconds", "90"])
"""


@pytest.mark.parametrize("killed", ("one", "two", "three"))
def test_a_kill_in_any_stage_leaves_what_was_measured(tmp_path: Path, killed: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), killed],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(rf"stage {killed} is measured (\d+) (\d+)", line):
            started = int(found[1]), int(found[2])
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Neither the stage's process nor the tool that it runs may hold the GPU of the next run.
    assert not any(is_alive(pid) for pid in started)
    content = record.read(tmp_path / "results.json")
    names = ["one", "two", "three"]
    assert [row["case"] for row in content["rows"]] == names[: names.index(killed) + 1]
    *earlier, last = content["stages"]
    assert all(entry["outcome"] == "passed" for entry in earlier) and last["outcome"] == "running"
    assert f"stage {killed} is measured" in (tmp_path / "log.txt").read_text()
    assert f"stage {killed}: running" in summary.page(content)


def test_wrong_calls_end_with_one_clear_line(tmp_path: Path) -> None:
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
# The plans
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_the_plans_fit_into_nine_minutes_in_the_order_that_matters(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX", "somewhere")
    monkeypatch.setattr(gpu, "find_tool", lambda tool: tool)
    first, second = gpu.plan(tmp_path, device), gpu.profile_plan(tmp_path, device)
    for stages in (first, second):
        assert sum(stage.seconds for stage in stages) <= gpu.TOTAL < gpu.PROMISED < 540
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
    """A regex without a match would measure nothing and say nothing."""
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


def test_the_compiled_step_puts_its_peer_second() -> None:
    """What no time is left for comes last: never the peer."""
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


def test_makefile_runs_both_scripts_where_the_caller_says() -> None:
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
def test_a_compilation_that_takes_for_ever_costs_one_row_and_no_other_stage(tmp_path: Path) -> None:
    """Two real benches; the C++ compiler that Inductor calls never ends."""
    compiler = tmp_path / "slow-g++"
    compiler.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\nexec sleep 600\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    record.ResultFile.create(tmp_path / "results.json", META)

    def measure(name: str, only: str) -> Command:
        command = gpu.bench(tmp_path, "cpu", name, "--only", only)
        return Command(name, command.arguments, environment)

    share = 45.0
    stages = [
        Stage("slow", share, "", (measure("bias_gelu", r",768\] float32 fwd$"),)),
        Stage("quick", share, "", (measure("ingest", "B=32"),)),
    ]
    (slow, quick), log = run(stages, 2 * share, tmp_path)
    assert (tmp_path / "slow-g++.calls").exists(), log
    assert slow["outcome"] == "stopped" and slow["took_s"] < share + 2
    assert quick["outcome"] == "passed" and quick["limit_s"] > share - 2, log
    rows = {
        (row["bench"], row["impl"]): row for row in record.read(tmp_path / "results.json")["rows"]
    }
    assert rows["bias_gelu", "ours"]["ms"] > 0  # on disk before its peer began to compile
    assert rows["ingest", "ours"]["ratio"] > 0


@pytest.mark.slow
def test_the_first_script_as_a_whole_on_a_cpu(tmp_path: Path) -> None:
    """A rehearsal in a minute: every stage runs or is cut at its limit, and the files are whole."""
    out = tmp_path / "out of the way"
    total = 60.0
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--out", str(out),
         "--seconds", str(total), "--skip", "build"],  # which would replace the tested package
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert time.monotonic() - start < total + 30, "imports of this process, and the summary"
    content = record.read(out / "results.json")
    stages = {entry["stage"]: entry for entry in content["stages"]}
    assert list(stages) == [stage.name for stage in gpu.plan(out, "cpu")]
    assert stages.pop("build") == {"stage": "build", "outcome": "skipped", "reason": "by --skip"}
    for entry in stages.values():
        assert entry["limit_s"] >= entry["share_s"] - 1, entry
        assert entry["took_s"] <= entry["limit_s"] + 2, entry
    log = (out / "log.txt").read_text()
    assert log.index("share  what it does") < log.index("first     | ")  # printed first
    assert (out / "summary.txt").read_text().strip() in done.stdout
    written = {path.name for path in out.iterdir()}
    assert written == set(gpu.WRITTEN)


def test_an_interrupted_run_ends_with_its_summary(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), "two"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "stage two is measured" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130 and "Traceback" not in rest
    content = record.read(tmp_path / "results.json")
    assert [entry["outcome"] for entry in content["stages"]] == ["passed", "interrupted"]
    assert "stage two: interrupted" in (tmp_path / "summary.txt").read_text()


# ---------------------------------------------------------------------------------------------
# Outcomes of tests
# ---------------------------------------------------------------------------------------------


def pytest_in(folder: Path, text: str, *options: str) -> list[dict[str, Any]]:
    """Lines of --outcomes, with this project's conftest."""
    (folder / "test_x.py").write_text(text)
    outcomes = folder / "tests.jsonl"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider",
         "--rootdir", str(folder), "--outcomes", str(outcomes), *options, str(folder)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")}, capture_output=True,
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
    """Or every later test of that worker would fail because of one bad kernel."""
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


# ---------------------------------------------------------------------------------------------
# Result file and predictions
# ---------------------------------------------------------------------------------------------


def row(impl: str = "ours", **changes: Any) -> dict[str, Any]:
    base = {"bench": "step", "case": CASE, "impl": impl, "ms": 24.0, "ms_p20": 23.9, "ms_p80": 24.2}
    return base | changes


def test_rows_carry_the_prediction_for_this_device(tmp_path: Path) -> None:
    file = record.ResultFile.create(tmp_path / "r.json", META)
    file.put([row(), row("timm, compiled", ms=31.0), row("ours, other")])
    ours, timm, other = record.read(file.path)["rows"]
    assert ours["predicted"][0] < ours["predicted"][1] and timm["predicted"] != ours["predicted"]
    assert "predicted" not in other
    elsewhere = record.ResultFile.create(tmp_path / "a.json", META | {"device": "NVIDIA A100"})
    elsewhere.put([row()])
    assert "predicted" not in record.read(elsewhere.path)["rows"][0]


def test_a_row_that_cannot_be_right_costs_no_other_row(tmp_path: Path) -> None:
    """A profiler that sees nothing gives 0 ms, ncu may print nan."""
    file = record.ResultFile.create(tmp_path / "r.json", META)
    bad = {"case": "other"}
    file.put([row("good"), row("zero", ms=0.0), row("nan", gbps=float("nan"))])
    file.put([row("inf", ratio=float("inf"), **bad)])
    rows = {one["impl"]: one for one in record.read(file.path)["rows"]}
    assert rows["good"]["ms"] == 24.0
    assert (
        rows["zero"]["skipped"] == "ms is 0.0, not a positive number" and "ms" not in rows["zero"]
    )
    assert rows["nan"]["skipped"] == "gbps is nan" and rows["inf"]["skipped"] == "ratio is inf"


def test_every_prediction_is_for_a_case_that_the_scripts_measure(tmp_path: Path) -> None:
    measured: set[tuple[str, str]] = set()
    for stage in (*gpu.plan(tmp_path, "cuda"), *gpu.profile_plan(tmp_path, "cuda")):
        for command in stage.commands:
            words = command.arguments
            if words[1:3] == ("-m", "bench") and "--resume" in words:
                only = re.compile(words[words.index("--only") + 1])
                measured |= {(words[3], case.name) for case in choose(words[3], "cuda", only)}
    entries = record.predictions()["rows"]
    assert len(entries) > 20
    for entry in entries:
        assert (entry["bench"], entry["case"]) in measured, entry
        low, high = entry["ms"]
        assert 0 < low < high and entry["from"]
    keys = [record.key_of(entry) for entry in entries]
    assert len(set(keys)) == len(keys)


def test_faults_of_a_result_file_are_named(tmp_path: Path) -> None:
    good = {"meta": META, "rows": [row(), row("peer", ms=3), row("x", skipped="why")]}
    del good["rows"][2]["ms"]
    assert record.find_faults(good) == []
    for change, words in (
        ({"meta": META | {"commit": ""}}, "meta lacks commit"),
        ({"rows": [row(), row()]}, "repeats"),
        ({"rows": [row(ms=-1.0)]}, "ms is -1.0, not a positive number"),
        ({"rows": [row(gbps=float("nan"))]}, "gbps is nan"),
        ({"rows": [row(skipped="and measured")]}, "needs either ms or skipped"),
        ({"rows": [{"bench": "b"}]}, "row 0 lacks bench, case or impl"),
        ({"rows": {}}, "no list 'rows'"),
    ):
        (fault,) = record.find_faults(good | change)
        assert words in fault
        path = tmp_path / "r.json"
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=re.escape(f"{path}: not a result")):
            record.read(path)
    path.write_text('{"meta": ')
    with pytest.raises(ValueError, match=r"r\.json: Expecting"):
        record.read(path)


def test_a_tree_without_git_names_itself_by_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain copy of the tree has no commit to show."""
    for name, text in (("kernels/a.py", "1"), ("csrc/b.cpp", "2"), ("bench/results/r.json", "3")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    first = record.tree_checksum(tmp_path)
    assert re.fullmatch(r"tree-[0-9a-f]{12}", first)
    (tmp_path / "kernels" / "__pycache__").mkdir()
    (tmp_path / "kernels/__pycache__/a.pyc").write_text("made by running it")
    (tmp_path / "bench/results/new.json").write_text("made by measuring")
    assert record.tree_checksum(tmp_path) == first
    (tmp_path / "csrc/b.cpp").write_text("2 ")
    assert record.tree_checksum(tmp_path) != first
    monkeypatch.setattr(record, "output_of", lambda *command: "")
    meta = record.collect_meta("cpu", "x", None)
    assert meta["commit"] == record.tree_checksum()
    assert record.collect_meta("cpu", "x", "abc")["commit"] == "abc"


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def test_the_page_says_what_a_person_asks_first(tmp_path: Path, capsys: Any) -> None:
    kernel = {"bench": "attention", "case": "B=256 H=6 N=198 D=64 bfloat16 forward"}
    rows = [
        row(items_per_s=10667.0, ratio=1.29, ratio_to="timm, compiled", device_ms=22.5,
            host_ms=9.0),
        row("timm, compiled", ms=31.0, items_per_s=8258.0),
        kernel | {"impl": "ours", "ms": 0.09, "ms_p20": 0.09, "ms_p80": 0.09, "gbps": 1740.0,
                  "roofline_pct": 58.0, "ratio": 1.1, "ratio_to": "sdpa cudnn"},
        kernel | {"impl": "liger", "skipped": "not installed"},
        {"bench": "trace", "case": "deit_small, ours", "impl": "ours", "ms": 22.5,
         "kernels": [{"kernel": "gemm", "calls": 72.0, "us": 10400.0}]},
        {"bench": "ncu", "case": "attention 1: backward_kernel", "impl": "ours", "ms": 0.16,
         "us": 160.0, "issue_active_pct": 71.0, "stall": "gmma 3.20"},
        row("ours, cached", provisional=True),
    ]  # fmt: skip
    file = record.ResultFile.create(tmp_path / "results.json", META)
    for one in rows:
        file.content["rows"].append(file._with_prediction(one))
    file.content["stages"] = [
        {"stage": "step", "outcome": "passed", "took_s": 60.0, "commands": []},
        {"stage": "ncu", "outcome": "skipped", "reason": "ncu is not on PATH"},
        {"stage": "loss", "outcome": "failed", "took_s": 3.0,
         "commands": [{"command": "loss", "outcome": "failed", "exit_status": 1}]},
    ]  # fmt: skip
    file.save()
    (tmp_path / "tests.jsonl").write_text(
        '{"run": 1, "collected": 3}\n{"run": 1, "test": "a", "outcome": "passed", "message": ""}\n'
        '{"run": 1, "test": "tests/test_attention.py::x", "outcome": "failed", '
        '"message": "wrong"}\n'
    )
    summary.main(["summary", str(tmp_path)])
    page = capsys.readouterr().out
    for words in (
        "1.29x of timm, compiled",
        "10,667",
        "22.5",
        "58",
        "1.10x of sdpa cudnn",
        "20.9 to 26.7, met",
        "0.06 to 0.075, 20 % slower",
        "not measured",
        "gmma 3.20",
        "10400.0",
        "stage ncu: skipped: ncu is not on PATH",
        "loss: failed, exit status 1",
        "tests: 1 passed, 1 failed, 0 skipped, 1 not run",
        "FAILED tests/test_attention.py::x: wrong",
        "no figure: attention: B=256 H=6 N=198 D=64 bfloat16 forward, liger: not installed",
        "provisional: step: deit_small student 224px B=256, ours, cached",
    ):
        assert words in page, words
    assert page.index("The training step") < page.index("Kernels") < page.index("Outcome")
    with pytest.raises(SystemExit, match=r"absent\.json: "):
        summary.main(["summary", str(tmp_path / "absent.json")])


def test_committed_results_make_a_page() -> None:
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        content = json.loads(path.read_text())
        if content.get("rows") and "bench" in content["rows"][0] and "meta" in content:
            assert record.find_faults(content) == [], path
            assert "Outcome" in summary.page(content)


# ---------------------------------------------------------------------------------------------
# Counters and traces
# ---------------------------------------------------------------------------------------------

NCU_COLUMNS = {  # a counter's name: its unit, its values for two kernels
    "ID": ("", "0", "1"),
    "Process ID": ("", "7", "7"),
    "Kernel Name": ("", "backward_kernel", "reduce(float *)"),
    "gpu__time_duration.sum": ("us", "161.25", "2.10"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "72.5", "5.0"),
    "dram__bytes_read.sum": ("Mbyte", "1,024.5", "1"),
    "launch__registers_per_thread": ("register/thread", "136", "24"),
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": ("inst", "3.25", ""),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "0.50", "1.5"),
    "sm__inst_executed_pipe_tensor_op_dmma.avg.pct_of_peak_sustained_active": ("%", "0", "0"),
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": ("%", "38.1", "0"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61.5", "nan"),
    "FBPA.TriageCompute.dramc__x": ("%", "n/a", ""),
}
NCU_LINES = [NCU_COLUMNS, *([column[i] for column in NCU_COLUMNS.values()] for i in range(3))]
NCU = "==PROF== Connected to process 7\n==PROF== Profiling: 0%....100% - 9 passes\n" + "\n".join(
    ",".join(f'"{cell}"' for cell in line) for line in NCU_LINES
)


def test_counters_are_read_from_the_tools_own_table() -> None:
    backward, reduce = counters.read_csv(NCU)
    assert backward["kernel"] == "backward_kernel" and backward["us"] == 161.25
    assert backward["issue_active_pct"] == 72.5 and backward["registers"] == 136
    assert backward["dram_read_bytes"] == 1024.5e6
    assert backward["stall"] == "gmma 3.25 wait 0.50"
    assert backward["tensor_pct"] == 38.1 and backward["dram_pct"] == 61.5
    assert "dram_pct" not in reduce
    assert reduce["us"] == 2.1 and reduce["stall"] == "wait 1.50" and "dram_bytes" not in reduce
    nanoseconds = NCU.replace('"us"', '"ns"')
    assert counters.read_csv(nanoseconds)[0]["us"] == pytest.approx(0.16, abs=0.01)
    assert counters.read_csv("==ERROR== no permission\n") == []


def test_counters_leave_the_cards_clocks_alone_and_name_one_case_each() -> None:
    for bench, case, implementation in counters.TARGETS:
        command = counters.command(bench, case, implementation)
        at = command.index("--clock-control")
        assert command[at + 1] == "none"
        assert len(choose(bench, "cuda", re.compile(case))) == 1


def event(
    name: str, start: float, end: float, device: DeviceType, is_region: bool = False
) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=is_region
    )


def test_the_device_is_busy_while_any_kernel_runs() -> None:
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("step: forward", 0, 9, cpu, True),
        event("step: forward", 10, 90, cuda, True),  # the region's twin on the device
        event("gemm", 10, 30, cuda),
        event("teacher", 20, 40, cuda),  # on another stream
        event("gemm", 60, 70, cuda),
        event("inside", 62, 65, cuda),
        # Inductor names the launch of its kernel on the host like the kernel.
        event("triton_poi_fused_add_0", 1, 2, cpu),
        event("triton_poi_fused_add_0", 70, 75, cuda),
    ]
    intervals = trace.device_intervals(events)
    assert trace.busy_us(intervals) == 45
    table = trace.by_kernel(intervals, calls=2)
    assert table[0] == {"kernel": "gemm", "calls": 1.0, "us": 15.0}
    assert "37.5%" in trace.table_text(table, 40)
    assert trace.busy_us([]) == 0
