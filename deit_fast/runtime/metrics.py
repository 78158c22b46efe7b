"""metrics.jsonl, and what a person sees while a run goes on."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deit_fast.runtime.trackers import Trackers

log = logging.getLogger("deit_fast")

METRICS = "metrics.jsonl"  # in the run's folder


class MetricsFile:
    """Appends one JSON object a line; on resume, rows after the checkpoint's step are cut off.

    Each row goes to the run's trackers too.
    """

    def __init__(self, path: Path, start_step: int, trackers: Trackers) -> None:
        self.path, self.trackers = path, trackers
        self._cut(start_step)

    def _cut(self, step: int) -> None:
        rows = []
        if self.path.exists() and step > 0:
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (line buffered, lives with the run)

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append a row with its kind, `train` or `eval`, and the wall clock in seconds.

        Raises:
            OSError: with the file's name; the disk is full.
        """
        line = json.dumps({"kind": kind, **row, "time": round(time.time(), 3)}) + "\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.trackers.write(kind, row)

    def rewind(self, step: int) -> None:
        """Cut off the rows after ``step``, where the run goes back to it."""
        self._close_file()
        self._cut(step)
        self.trackers.rewind(step)

    def close(self, finished: bool) -> None:
        """No more rows come; ``finished``: the run came to its end."""
        self._close_file()
        self.trackers.close(finished)

    def _close_file(self) -> None:
        with suppress(OSError):  # of a row that `write` could not write either
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; a last line torn by a crash is left out."""
    rows, torn = _parse(path)
    for _ in range(torn):
        log.warning("%s: a torn line was left out", path)
    return rows


def highest_steps(path: Path) -> dict[str, int]:
    """Newest step in a metrics file, by the rows' kind; empty where there is no file."""
    highest: dict[str, int] = {}
    for row in _parse(path)[0] if path.exists() else []:
        highest[row["kind"]] = max(highest.get(row["kind"], 0), row["step"])
    return highest


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole rows, and the number of torn ones."""
    rows, torn = [], 0
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            torn += 1
    return rows, torn


class Progress:
    """A rich progress bar on a terminal; elsewhere log lines alone."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "step") -> None:
        self._bar = None
        if sys.stderr.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn(unit + "s  {task.fields[note]}"),
                progress.TimeRemainingColumn(),
                console=_stderr_console(),
            )
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """``note`` stands beside the bar; without a bar it is a line of the log."""
        if self._bar is None and note:
            log.info("%s", note)
        if self._bar is not None:
            self._bar.advance(self._task, count)
            if note is not None:
                self._bar.update(self._task, note=note)


def _stderr_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
