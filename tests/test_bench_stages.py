"""Stages of a script: limits, kills, interrupts, and what they leave on the disk."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, record, stages, summary
from bench.stages import Command, Log, Stage, plan_text, run_stages
from helpers.bench import META

ROOT = Path(__file__).parent.parent


class Clock:
    """Counts the pauses between polls: a busy machine makes them longer, not more."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stages, "monotonic", clock.monotonic)
    monkeypatch.setattr(stages, "sleep", clock.sleep)
    return clock


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


def test_a_stage_that_hangs_takes_no_time_from_other_stages(tmp_path: Path, clock: Clock) -> None:
    """It ignores the interrupt; the stage after it still has its share, and all ends in time."""
    records, log = run(
        [stage("one", 2, HANG), stage("two", 2, HANG), stage("three", 30, "print('alive')")],
        34,
        tmp_path,
    )
    assert [entry["outcome"] for entry in records] == ["stopped", "stopped", "passed"]
    assert clock.now < 34
    assert all(entry["limit_s"] >= entry["share_s"] - 0.2 for entry in records)
    assert [entry["took_s"] for entry in records[:2]] == pytest.approx([2, 2], abs=0.2)
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


def test_scaled_shares_fit_whatever_rounding_adds(tmp_path: Path) -> None:
    """A slow start of Python scales the plan, and its shares then add up to a little more."""
    shares = (1.1, 2.2)
    assert sum(shares) > 3.3
    records, _ = run([stage("a", shares[0], "pass"), stage("b", shares[1], "pass")], 3.3, tmp_path)
    assert len(records) == 2
    totals = [gpu.TOTAL - 0.37 * i for i in range(500)]
    assert any(
        sum(s.seconds for s in gpu.scaled(gpu.plan(tmp_path, "cpu"), total / gpu.TOTAL)) > total
        for total in totals
    ), "the case does not occur"


def test_commands_of_a_stage_run_side_by_side_and_each_outcome_is_kept(tmp_path: Path) -> None:
    # Each ends when all four have begun: one after the other they would hang.
    meets = (
        f"import os, time; folder = {str(tmp_path)!r}\n"
        "open(f'{folder}/{os.getpid()}.met', 'w')\n"
        "while sum(name.endswith('.met') for name in os.listdir(folder)) < 4: time.sleep(0.02)\n"
    )
    (entry,), log = run(
        [stage("s", 60, *[meets] * 3, f"{meets}raise SystemExit(3)", jobs=4)], 60, tmp_path
    )
    assert entry["outcome"] == "failed"
    by_name = {command["command"]: command for command in entry["commands"]}
    assert by_name["s3"]["exit_status"] == 3 and by_name["s"]["outcome"] == "passed"
    (entry,), log = run(
        [Stage("s", 30, "", (Command("missing", ("no-such-program",)),))], 30, tmp_path
    )
    assert entry["outcome"] == "failed" and "no-such-program" in log


def test_a_command_knows_its_time_and_a_skipped_stage_has_a_reason(tmp_path: Path) -> None:
    echo = Command("echo", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"))
    stages = [Stage("a", 40, "", (echo, echo)), Stage("b", 5, "", (), skip="no card")]
    records, log = run(stages, 40, tmp_path)
    seconds = [int(value) for value in re.findall(r"echo      \| (\d+)$", log, re.M)]
    assert 1 <= seconds[0] <= 20 and seconds[1] >= seconds[0]  # half of it, then what is left
    assert records[1] == {"stage": "b", "outcome": "skipped", "reason": "no card"}
    text = plan_text(stages, 40)
    assert text.index("a ") < text.index("b ") and "skipped: no card" in text


def test_each_command_of_a_stage_has_its_own_limit(tmp_path: Path, clock: Clock) -> None:
    """The first one hangs, and the others still have their parts of the time."""
    (entry,), log = run([stage("s", 18, HANG, "print('second')", "print('third')")], 18, tmp_path)
    outcomes = [command["outcome"] for command in entry["commands"]]
    assert outcomes == ["stopped", "passed", "passed"] and entry["outcome"] == "stopped"
    assert entry["commands"][0]["took_s"] == pytest.approx(6, abs=0.2)
    assert "second" in log and "third" in log


def test_nothing_is_measured_without_a_stage_that_is_required(tmp_path: Path) -> None:
    build = Stage("build", 30, "", (python("build", "raise SystemExit(1)"),), is_required=True)
    records, _ = run([build, stage("step", 5, "print('measures a mixture')")], 35, tmp_path)
    assert records[0]["outcome"] == "failed"
    expected = {"stage": "step", "outcome": "skipped", "reason": "stage build did not pass"}
    assert records[1] == expected


def test_processes_that_a_command_leaves_behind_are_killed(tmp_path: Path) -> None:
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
    deadline = time.monotonic() + 60
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


@pytest.mark.slow
def test_an_endless_compilation_loses_one_row_and_no_other_stage(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real benches; the C++ compiler that Inductor calls never ends.

    The time of the first stage passes when the compiler has been called, so a busy machine may take
    as long as it needs until then.
    """
    compiler = tmp_path / "slow-g++"
    compiler.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\nexec sleep 600\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    record.ResultFile.create(tmp_path / "results.json", META)

    def measure(name: str, only: str, seconds: str = "{seconds}") -> Command:
        command = gpu.bench(tmp_path, "cpu", name, "--only", only)
        arguments = (text.replace("{seconds}", seconds) for text in command.arguments)
        return Command(name, tuple(arguments), environment)

    share, calls = 400.0, tmp_path / "slow-g++.calls"

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if calls.exists():
            clock.now = max(clock.now, share - 9)

    monkeypatch.setattr(stages, "sleep", sleep)
    plan = [
        Stage("slow", share, "", (measure("bias_gelu", r",768\] float32 fwd$"),)),
        Stage("quick", share, "", (measure("ingest", "B=32", "5"),)),
    ]
    (slow, quick), log = run(plan, 2 * share, tmp_path)
    assert calls.exists(), log
    assert slow["outcome"] == "stopped" and slow["took_s"] <= share
    assert quick["outcome"] == "passed" and quick["limit_s"] >= share, log
    rows = {
        (row["bench"], row["impl"]): row for row in record.read(tmp_path / "results.json")["rows"]
    }
    assert rows["bias_gelu", "ours"]["ms"] > 0  # on disk before its peer began to compile
    assert rows["ingest", "ours"]["ratio"] > 0


def test_an_interrupted_run_ends_with_its_summary(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), "two"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell lets its background jobs ignore interrupts, and they pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
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
