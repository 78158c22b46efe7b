"""metrics.jsonl of a run, its rows as text, and the progress bar.

The columns come from `train/step.py` (losses) and `runtime/speed.py` (speed); `train/loop.py`
makes the rows.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from deit_fast.config import RunConfig
from deit_fast.runtime.trackers import Trackers

log = logging.getLogger("deit_fast")

METRICS = "metrics.jsonl"  # in the run's folder


class MetricsFile:
    """Appends one JSON object a line to metrics.jsonl, and passes each row to the run's trackers.

    Args:
        config: `track` names the trackers.
        output: the run's folder.
        step: where the run resumes; later rows of the file are dropped.

    Raises:
        InputError: a tracker cannot start, see ``Trackers``.
    """

    def __init__(self, config: RunConfig, output: Path, step: int) -> None:
        self.path = output / METRICS
        rows = read_metrics(self.path)
        logged = {row["kind"]: row["step"] for row in rows}  # the newest step of each kind of row
        self.trackers = Trackers(config, output, step, logged)
        self._rewrite(rows, step)

    def _rewrite(self, rows: list[dict[str, Any]], step: int) -> None:
        """Write the rows up to ``step`` and open the file for more."""
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        self.path.write_text("".join(kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (line buffered, lives with the run)

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append a row with its kind, `train` or `eval`, and the time in seconds since the epoch.

        Raises:
            OSError: the file's name and the reason, such as a full disk.
        """
        line = json.dumps({"kind": kind, **row, "time": round(time.time(), 3)}) + "\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.trackers.write(kind, row)

    def roll_back(self, step: int) -> None:
        """Drop the rows after ``step``, to which the run was rolled back."""
        self._close_file()
        self._rewrite(read_metrics(self.path), step)
        self.trackers.roll_back(step)

    def close(self, finished: bool) -> None:
        """Close the file and the trackers; ``finished``: the run made its last step."""
        self._close_file()
        self.trackers.close(finished)

    def _close_file(self) -> None:
        with suppress(OSError):  # of a row that `write` could not write either
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a metrics file, none if it does not exist.

    A line that a crash cut off is left out with a warning.
    """
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a torn line was left out", path)
    return rows


def row_text(row: dict[str, Any], total: int) -> str:
    """A training row as text for the terminal and the log; ``total``: steps of the run."""
    parts = [
        f"step {row['step']}/{total}",
        f"loss {row['loss']:.4f} (base {row['base_loss']:.4f}, "
        f"distillation {row['distill_loss']:.4f})",
        f"lr {row['lr']:.2e}",
        f"gradient {row['grad_norm']:.3g}",
        f"{row['step_ms']:.0f} ms",
        f"{row['images_per_s']:.0f} img/s",
        f"data wait {100 * row['data_wait']:.0f} %",
        f"MFU {100 * row['mfu']:.0f} %" if "mfu" in row else "MFU n/a",
        f"{row['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in row else "",
        f"{timedelta(seconds=round(row['seconds_left']))} left",
    ]
    return "  ".join(part for part in parts if part)


class Progress:
    """A rich progress bar on a terminal, elsewhere log lines.

    Args:
        label: names the work.
        total, done: number of units, and how many an earlier process did.
        unit: name of a unit.
        paced: show the rate beside the bar, and log it with the time left every 30 s, and every
            5 % that took a second. Otherwise the caller gives notes.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, unit: str = "step", paced: bool = True
    ) -> None:
        self._label, self._total, self._units, self._paced = label, total, f"{unit}s", paced
        self._done = self._earlier = self._logged = done
        self._started = self._logged_at = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn(self._units + "  {task.fields[note]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Advance the bar. ``note`` is shown beside it; without a bar the note is logged."""
        self._done += count
        if self._paced:
            note = self._pace()
        if self._bar is None and note:
            log.info("%s", note)
        if self._bar is not None:
            self._bar.advance(self._task, count)
            if note is not None:
                self._bar.update(self._task, note=note)

    def _pace(self) -> str | None:
        """The rate for the bar; for the log a line, where one is due."""
        now = time.perf_counter()
        rate = (self._done - self._earlier) / max(now - self._started, 1e-9)
        if self._bar is not None:
            return f"{rate:.0f} {self._units}/s"
        since, share = now - self._logged_at, (self._done - self._logged) / self._total
        if since < 1 or (since < 30 and share < 0.05):
            return None
        self._logged_at, self._logged = now, self._done
        return (
            f"{self._label}: {self._done} of {self._total} {self._units} "
            f"({100 * self._done / self._total:.0f} %), {rate:.0f} {self._units}/s, "
            f"{duration((self._total - self._done) / rate)} left"
        )


def duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 5 s`, `6 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
