"""Runs a plan of stages within a fixed time, each in separate processes.

Every stage has a share of the time, in seconds. It may also use time that earlier stages left over,
but never the share of a later stage: at its limit it is interrupted, and killed a few seconds
later. So a stage that hangs, or a compilation that takes twice as long as expected, takes no time
from other stages, and the plan ends in time. Consecutive commands of a stage share its time in the
same way.

The output of all processes goes to one log, line by line, with the stage's name in front. The
result file records the outcome of each stage; the stages write the rows themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TextIO

from .record import ROOT

SECONDS_TO_LEAVE = 8.0  # between the interrupt at a stage's limit and the kill
SECONDS_TO_DIE = 1.0  # after the kill
PASSED_ON = 0.85  # of a command's time, as its {seconds}: the case under way still has to end
POLL_SECONDS = 0.05
LEASH = Path(__file__).with_name("leash.py")


@dataclass(frozen=True)
class Command:
    """One process of a stage.

    arguments: what to run; "{seconds}" in one stands for the seconds that the command has.
    env: variables on top of this process's own.
    """

    name: str
    arguments: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Part of a plan.

    seconds: its share of the time.
    about: one line for a person.
    commands: run ``jobs`` at a time, in this order.
    skip: why the stage is left out; empty where it runs.
    is_required: without it the stages after it would measure nothing; they are left out then.
    """

    name: str
    seconds: float
    about: str
    commands: tuple[Command, ...]
    jobs: int = 1
    skip: str = ""
    is_required: bool = False


class Log:
    """Standard output and one file; lines of several threads do not mix."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8", errors="replace")
        self._lock = threading.Lock()

    def write(self, source: str, line: str) -> None:
        text = f"{source:<9} | {line.rstrip()}" if source else line.rstrip()
        with self._lock:
            for stream in (self._file, sys.stdout):
                stream.write(text + "\n")
                stream.flush()

    def close(self) -> None:
        self._file.close()


def plan_text(stages: Sequence[Stage], total: float) -> str:
    """The order and shares of the stages; printed before anything runs."""
    lines = [f"{'stage':<10} {'share':>6}  what it does; in all at most {total:.0f} s"]
    for stage in stages:
        share = "-" if stage.skip else f"{stage.seconds:.0f} s"
        lines.append(f"{stage.name:<10} {share:>6}  {stage.about}")
        if stage.skip:
            lines.append(f"{'':<10} {'':>6}  skipped: {stage.skip}")
    return "\n".join(lines)


def run_stages(
    stages: Sequence[Stage],
    total: float,
    log: Log,
    report: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run the stages in order; returns one record each.

    Args:
        total: seconds for all stages together; at least the sum of their shares.
        report: called with the records so far whenever a stage begins or ends.

    Raises:
        ValueError: the shares do not fit into ``total``.
    """
    shares = [0.0 if stage.skip else stage.seconds for stage in stages]
    if sum(shares) > total + 0.01:  # scaled shares add up to it but for rounding
        raise ValueError(f"shares of {sum(shares):.0f} s do not fit into {total:.0f} s")
    deadline = monotonic() + total
    records: list[dict[str, Any]] = []
    missing = ""
    for position, stage in enumerate(stages):
        if reason := stage.skip or missing:
            log.write(stage.name, f"skipped: {reason}")
            records.append({"stage": stage.name, "outcome": "skipped", "reason": reason})
            report(records)
            continue
        until = deadline - sum(shares[position + 1 :])
        limit = until - monotonic()
        record: dict[str, Any] = {"stage": stage.name, "outcome": "running"}
        record |= {"share_s": stage.seconds, "limit_s": round(limit, 1), "commands": []}
        records.append(record)
        report(records)
        log.write(stage.name, f"{stage.about}; at most {limit:.0f} s")
        began = monotonic()
        try:
            record["commands"] = _run_stage(stage, until, log)
        except KeyboardInterrupt:
            record["outcome"] = "interrupted"
            report(records)
            raise
        outcomes = {command["outcome"] for command in record["commands"]}
        order = ("not started", "stopped", "failed", "passed")
        record["outcome"] = next(name for name in order if name in outcomes)
        record["took_s"] = round(monotonic() - began, 1)
        log.write(stage.name, f"{record['outcome']} after {record['took_s']} s")
        report(records)
        if stage.is_required and record["commands"][0]["outcome"] != "passed":
            missing = f"stage {stage.name} did not pass"
    return records


def _run_stage(stage: Stage, until: float, log: Log) -> list[dict[str, Any]]:
    """Records of the stage's commands; none of their processes is alive when it returns."""
    waiting, done = list(stage.commands), []
    running: list[Any] = []
    try:
        while waiting or running:
            now = monotonic()
            if now >= until:
                break
            while waiting and len(running) < stage.jobs:
                # One after the other they share the time that is left; side by side each has all.
                left = (until - now) / (len(waiting) if stage.jobs == 1 else 1)
                running.append(_Running(stage.name, waiting.pop(0), left, log))
            for process in [process for process in running if process.has_ended()]:
                running.remove(process)
                done.append(process.record())
            sleep(POLL_SECONDS)
    finally:
        done += [process.record() for process in running]
    return done + [{"command": command.name, "outcome": "not started"} for command in waiting]


class _Running:
    """A command's process group, and the thread that copies its output to the log."""

    def __init__(self, stage: str, command: Command, seconds: float, log: Log) -> None:
        self.command, self.began = command, monotonic()
        grace = min(SECONDS_TO_LEAVE, seconds / 4)
        self.kill_at = self.began + seconds
        self.interrupt_at = self.kill_at - grace
        self.is_stopped = False
        label = stage if command.name == stage else command.name
        budget = f"{PASSED_ON * (seconds - grace):.0f}"
        arguments = [part.replace("{seconds}", budget) for part in command.arguments]
        log.write(label, f"$ {' '.join(arguments)}")
        self.process = subprocess.Popen(
            [sys.executable, "-S", str(LEASH), *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | command.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._copy, args=(label, log), daemon=True)
        self.reader.start()

    def _copy(self, label: str, log: Log) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            log.write(label, line.decode(errors="replace"))

    def has_ended(self) -> bool:
        """Whether it has ended, or its time has; interrupts it shortly before that."""
        if self.process.poll() is not None:
            return True
        now = monotonic()
        if now >= self.interrupt_at and not self.is_stopped:
            self.is_stopped = True
            self._send(signal.SIGINT)
        return now >= self.kill_at

    def _send(self, number: int) -> None:
        """To all processes of the group, those of a leader that has ended too."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def record(self) -> dict[str, Any]:
        """What became of it; every process of its group is killed."""
        is_stopped = self.is_stopped or self.process.poll() is None
        self._send(signal.SIGKILL)
        found: dict[str, Any] = {"command": self.command.name}
        found["took_s"] = round(monotonic() - self.began, 1)
        try:
            status = self.process.wait(timeout=SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:  # it hangs in the driver, where no signal reaches it
            return found | {"outcome": "stopped", "reason": "does not die by SIGKILL"}
        self.reader.join(timeout=SECONDS_TO_DIE)
        if is_stopped:
            return found | {"outcome": "stopped"}
        return found | {"outcome": "failed" if status else "passed", "exit_status": status}
