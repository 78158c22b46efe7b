"""metrics.jsonl of a run, and its rows as text.

The columns come from `training/step.py` (losses) and `runtime/speed.py` (speed); `training/run.py`
makes the rows.
"""

from __future__ import annotations

import json
import logging
import os
import time
import typing
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from deit_fast.config import RunConfig, Target
from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import (
    SEAL_KEY,
    SEAL_ZEROS,
    has_seal,
    is_intact,
    open_regular,
    parse_object,
    read_file,
    seal,
    write_atomically,
)
from deit_fast.runtime.trackers import Trackers

log = logging.getLogger("deit_fast")

METRICS = "metrics.jsonl"  # in the run's folder
FEATURES = tuple(target for target in typing.get_args(Target) if target != "logits")


class MetricsFile:
    """Appends one JSON object a line to metrics.jsonl, and passes each row to the run's trackers.

    Args:
        config: `track` names the trackers.
        output: the run's folder.
        step: where the run resumes; later rows of the file are dropped, damaged ones too.
        least: rows that the run had when the checkpoint of this step was saved.

    Attributes:
        rows: number of rows in the file.
        lost: number of rows that other programs took from the file.

    Raises:
        InputError: metrics.jsonl is not a file, or a tracker cannot start, see ``Trackers``.
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, config: RunConfig, output: Path, step: int, least: int = 0) -> None:
        self.path = output / METRICS
        rows = read_metrics(self.path)
        logged = {row["kind"]: row["step"] for row in rows}  # the newest step of each kind of row
        self.trackers = Trackers(config, output, step, logged)
        self._open(rows, step)
        self.lost, self._failed = max(0, least - self.rows), False
        if self.lost:
            log.warning("%s lost %d of its %d rows", self.path, self.lost, least)

    def _open(self, rows: list[dict[str, Any]], step: int) -> None:
        """Drop the rows after ``step`` and open the file for more."""
        kept = [_line(row) for row in rows if row["step"] <= step]
        self.rows, content = len(kept), b"".join(kept)
        if not self.path.exists() or read_file(self.path) != content:
            write_atomically(self.path, content)
        self._append()

    def _append(self) -> None:
        """Open the file for more rows."""
        self._file, self._reader = open_regular(self.path, append=True), open_regular(self.path)
        self._folder, self._size = self.path.parent.stat(), self.path.stat().st_size
        self._is_watched = self._is_ours()  # not where a file system's numbers change

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Append a row with its kind (`train`, `eval`, `failure`) and the time, s since the epoch.

        Raises:
            OSError: the file's name and the reason, such as a full disk.
        """
        line = _line({"kind": kind, **row, "time": round(time.time(), 3)})
        self._restore()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._size += len(line)
        self.rows += 1
        self.trackers.write(kind, row)

    def sync(self) -> None:
        """Return when all rows are on the disk; a checkpoint must not be newer than its rows."""
        self._restore()
        os.fsync(self._file.fileno())

    def _is_ours(self) -> bool:
        """Whether the path still leads to the open file, and that has what was written."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        is_same = os.path.samestat(found, os.fstat(self._file.fileno()))
        return is_same and found.st_size == self._size

    def _restore(self) -> None:
        """Where the file was deleted, replaced or cut off, write the rows that are left of it.

        In a folder that is not the run's any more nothing is written: the next checkpoint ends
        the run. Rows that cannot be written wait in the open file.
        """
        if not self._is_watched or self._is_ours():
            return
        try:
            if not os.path.samestat(self._folder, self.path.parent.stat()):
                return
            self._reader.seek(0)
            content = self._reader.read()
            content = content[: content.rfind(b"\n") + 1]
            write_atomically(self.path, content)
        except (OSError, InputError) as error:
            if not self._failed:
                log.warning("%s was deleted, replaced or cut off: %s", self.path, error)
            self._failed = True
            return
        self._close_file()
        self._append()
        rows, self.rows, self._failed = self.rows, content.count(b"\n"), False
        lost = max(0, rows - self.rows)
        self.lost += lost
        log.warning(
            "%s was deleted, replaced or cut off while the run wrote it: "
            "%d of its %d rows were written again, %d are lost",
            self.path, min(rows, self.rows), rows, lost,
        )  # fmt: skip

    def roll_back(self, step: int) -> None:
        """Drop the rows after ``step``, to which the run was rolled back."""
        self._close_file()
        self._open(read_metrics(self.path), step)
        self.trackers.roll_back(step)

    def close(self, finished: bool) -> None:
        """Close the file and the trackers; ``finished``: the run made its last step."""
        self._close_file()
        self.trackers.close(finished)

    def _close_file(self) -> None:
        with suppress(OSError):  # of a row that `write` could not write either
            self._file.close()
        self._reader.close()


def _line(row: dict[str, Any]) -> bytes:
    """A row of the file, which ends with the checksum of its line."""
    line = json.dumps({**row, SEAL_KEY: SEAL_ZEROS}).encode()
    return b"".join([*seal(line), b"\n"])


def read_metrics(path: Path, strict: bool = False) -> list[dict[str, Any]]:
    """The rows of a metrics file, none if it does not exist.

    A last line that a crash cut off is left out with a warning.

    Args:
        strict: refuse a damaged row; otherwise it is left out with a warning.

    Raises:
        InputError: a row is damaged, or the path is not a file.
    """
    try:
        lines = read_file(path).split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            if line:
                rows.append(_parse_row(line, where))
        except InputError as error:
            # A crash leaves the start of a line: without its end, the checksum and a line feed.
            is_torn = number == len(lines) and is_intact(line) is None and b"\0" not in line
            if strict and not is_torn:
                raise
            log.warning(
                "%s; %s", error, "a torn line was left out" if is_torn else "it is left out"
            )
    return rows


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    row = parse_object(line, where)
    if has_seal(row) and not is_intact(line):
        raise InputError(f"{printable(where)} is damaged: its checksum differs")
    row.pop(SEAL_KEY, None)
    if type(row.get("step")) is not int or type(row.get("kind")) is not str:
        raise InputError(f"{printable(where)} is damaged: it has no step or kind")
    return row


def row_text(row: dict[str, Any], total: int) -> str:
    """A training row as text for the terminal and the log; ``total``: steps of the run."""
    losses = {"base": row["base_loss"], "distillation": row["distill_loss"]}
    for name, value in row.items():
        if name.partition("_loss")[0] in FEATURES:
            losses[name.replace("_loss", "").replace("_", " ")] = value
    text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    parts = [
        f"step {row['step']}/{total}",
        f"loss {row['loss']:.4f} ({text})",
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


def row_figures(row: dict[str, Any]) -> dict[str, str]:
    """A training row as the texts beside the bar, see ``progress.FIGURES``."""
    return {
        "speed": f"{row['images_per_s']:.0f} img/s",
        "loss": f"loss {row['loss']:.3f}",
        "lr": f"lr {row['lr']:.1e}",
        "wait": f"wait {100 * row['data_wait']:.0f} %",
    }
