"""metrics.jsonl, and what a person sees while a run goes on."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger("deit_fast")


class MetricsFile:
    """Appends one JSON object a line; on resume, rows after the checkpoint's step are cut off."""

    def __init__(self, path: Path, start_step: int) -> None:
        rows = []
        if path.exists() and start_step > 0:
            rows = [row for row in read_metrics(path) if row["step"] <= start_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (line buffered, lives with the run)

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append a row with its kind, `train` or `eval`, and the wall clock in seconds."""
        self._file.write(json.dumps({"kind": kind, **row, "time": round(time.time(), 3)}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; a last line torn by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a torn line was left out", path)
    return rows


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
