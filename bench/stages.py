"""Runs a plan of stages within a fixed time, each in processes of its own.

Every stage has a share of the time, in seconds. It may also use what the stages before it left
over, but never a later stage's share: at its limit it is interrupted, and killed a few seconds
later. So a stage that hangs, or a compilation that takes twice as long as expected, costs no other
stage its time, and the whole ends in time.

What the processes print goes to one log, line by line, with the stage's name in front. The result
file says of each stage what became of it; the rows are written by the stages themselves.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .record import ROOT

SECONDS_TO_LEAVE = 8.0  # between the interrupt at a stage's limit and the kill
SECONDS_TO_DIE = 1.0  # after the kill
PASSED_ON = 0.85  # of a command's time, as its {seconds}: the case under way still has to end
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1


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
    """

    name: str
    seconds: float
    about: str
    commands: tuple[Command, ...]
    jobs: int = 1
    skip: str = ""


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
    """The order of the stages and their shares, to print before anything runs."""
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
    start: float | None = None,
) -> list[dict[str, Any]]:
    """Run the stages in order; returns one record each.

    Args:
        total: seconds for all stages together; at least the sum of their shares.
        report: called with the records so far whenever a stage begins or ends.
        start: of time.monotonic, when the time began to run; None: now.

    Raises:
        ValueError: the shares do not fit into ``total``.
    """
    shares = [0.0 if stage.skip else stage.seconds for stage in stages]
    if sum(shares) > total:
        raise ValueError(f"shares of {sum(shares):.0f} s do not fit into {total:.0f} s")
    deadline = (time.monotonic() if start is None else start) + total
    records: list[dict[str, Any]] = []
    for position, stage in enumerate(stages):
        if stage.skip:
            log.write(stage.name, f"skipped: {stage.skip}")
            records.append({"stage": stage.name, "outcome": "skipped", "reason": stage.skip})
            report(records)
            continue
        until = deadline - sum(shares[position + 1 :])
        limit = until - time.monotonic()
        record: dict[str, Any] = {"stage": stage.name, "outcome": "running"}
        record |= {"share_s": stage.seconds, "limit_s": round(limit, 1), "commands": []}
        records.append(record)
        report(records)
        log.write(stage.name, f"{stage.about}; at most {limit:.0f} s")
        began = time.monotonic()
        record["commands"] = _run_stage(stage, until, log)
        outcomes = {command["outcome"] for command in record["commands"]}
        worst = [name for name in ("stopped", "failed", "passed") if name in outcomes]
        record["outcome"] = worst[0] if worst else "stopped"
        record["took_s"] = round(time.monotonic() - began, 1)
        log.write(stage.name, f"{record['outcome']} after {record['took_s']} s")
        report(records)
    return records


def _run_stage(stage: Stage, until: float, log: Log) -> list[dict[str, Any]]:
    """Records of the stage's commands; none of their processes is alive when it returns."""
    grace = min(SECONDS_TO_LEAVE, (until - time.monotonic()) / 4)
    waiting, running, done = list(stage.commands), [], []
    try:
        while waiting or running:
            left = until - grace - time.monotonic()
            if left <= 0:
                break
            while waiting and len(running) < stage.jobs:
                rounds = -(-len(waiting) // stage.jobs)  # commands that share the time that is left
                running.append(_Running(stage.name, waiting.pop(0), PASSED_ON * left / rounds, log))
            running, ended = _partition(running)
            done += [process.record() for process in ended]
            time.sleep(POLL_SECONDS)
    finally:
        for process in running:
            process.send(signal.SIGINT)
        while any(process.is_alive() for process in running) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        for process in running:
            process.send(signal.SIGKILL)
        done += [process.record(stopped=True) for process in running]
    left_out = [{"command": c.name, "outcome": "stopped", "took_s": 0.0} for c in waiting]
    return done + left_out


def _partition(processes: list[_Running]) -> tuple[list[_Running], list[_Running]]:
    alive = [process for process in processes if process.is_alive()]
    return alive, [process for process in processes if process not in alive]


def _die_with_parent() -> None:
    """In the child: Linux kills it when this process ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Running:
    """A command's process group, and the thread that copies its output to the log."""

    def __init__(self, stage: str, command: Command, seconds: float, log: Log) -> None:
        self.command, self.began = command, time.monotonic()
        self.error = ""
        self.process: subprocess.Popen[bytes] | None = None
        label = stage if command.name == stage else command.name
        arguments = [part.replace("{seconds}", f"{seconds:.0f}") for part in command.arguments]
        log.write(label, f"$ {' '.join(arguments)}")
        try:
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | command.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            self.error = str(error)
            log.write(label, self.error)
            return
        self.reader = threading.Thread(target=self._copy, args=(label, log), daemon=True)
        self.reader.start()

    def _copy(self, label: str, log: Log) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            log.write(label, line.decode(errors="replace"))

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        """To all processes of the group; those of a leader that has ended too."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def record(self, stopped: bool = False) -> dict[str, Any]:
        """What became of it; what it left behind in its group is killed."""
        self.send(signal.SIGKILL)
        found: dict[str, Any] = {"command": self.command.name}
        found["took_s"] = round(time.monotonic() - self.began, 1)
        if self.process is None:
            return found | {"outcome": "failed", "reason": self.error}
        try:
            code = self.process.wait(timeout=SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:  # it hangs in the driver, where no signal reaches it
            return found | {"outcome": "stopped", "reason": "does not die by SIGKILL"}
        self.reader.join(timeout=SECONDS_TO_DIE)
        if stopped:
            return found | {"outcome": "stopped"}
        return found | {"outcome": "failed" if code else "passed", "exit_status": code}
