"""Whether the processes and threads that load images still work.

A loader waits as long as files are finished. It ends with an error where one file takes a minute (a
mount that does not answer, a stopped process), or where no process has work and no batch arrives.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np

log = logging.getLogger("deit_fast")

POLL_SECONDS = 5.0
_WARN_AFTER = 6  # polls
_GIVE_UP_AFTER = 10  # polls, so that the error appears within a minute
_STATES = {
    "D": "it waits for a disk or a mount",
    "T": "it was stopped by a signal",
    "R": "it computes",
    "S": "it waits",
}
_TASK, _STEPS, _SAMPLE = range(3)  # columns; a worker without work has sample -1

_this_thread = threading.local()


def note_sample(sample: int) -> None:
    """Record that this worker begins with a sample, or has no work (-1). Others record nothing."""
    row = getattr(_this_thread, "row", None)
    if row is not None:
        row[_SAMPLE] = sample
        row[_STEPS] += 1


class Watch:
    """What each worker, a process or a thread, does at the moment, in shared memory.

    Time is counted in polls of the waiting process, so a job that is suspended as a whole and
    continued loses nothing.

    Args:
        kind: "process" or "thread".
        workers: number of workers.
        name_of: the file of a sample, for messages.
    """

    def __init__(self, kind: str, workers: int, name_of: Callable[[int], str]) -> None:
        self._memory = RawArray(ctypes.c_int64, workers * 3)
        self._kind, self._name_of = kind, name_of
        self._seen = np.zeros(workers, np.int64)
        self._quiet = np.zeros(workers, np.int64)  # polls since the worker's last step

    def join(self, worker: int) -> None:
        """Called by a worker, in the thread that loads."""
        row = self._rows()[worker]
        row[:] = threading.get_native_id(), row[_STEPS] + 1, -1
        _this_thread.row = row

    def waited(self) -> None:
        """Called after each `POLL_SECONDS` without a batch.

        Raises:
            ChildProcessError: no batch will come; says which worker is stuck in which file, or what
                may be short.
        """
        rows = self._rows().copy()
        self._quiet = np.where(rows[:, _STEPS] == self._seen, self._quiet + 1, 0)
        self._seen = rows[:, _STEPS]
        has_begun, is_idle = rows[:, _TASK] != 0, rows[:, _SAMPLE] < 0
        quiet = np.where(has_begun & ~is_idle, self._quiet, 0)
        worker = int(quiet.argmax())
        if quiet[worker] in (_WARN_AFTER, _GIVE_UP_AFTER):
            text = self._describe(rows[worker], int(quiet[worker]))
            if quiet[worker] == _GIVE_UP_AFTER:
                raise ChildProcessError(text)
            log.warning("%s", text)
        if (has_begun & is_idle).all() and self._quiet.min() >= _GIVE_UP_AFTER:
            raise ChildProcessError(
                f"all that load images have no work, but a batch did not arrive within "
                f"{_GIVE_UP_AFTER * POLL_SECONDS:.0f} s ({shared_memory_text()}): enlarge /dev/shm "
                f"or the limit of open files (`ulimit -n`)"
            )

    def file_of(self, task: int) -> str:
        """The file that a worker, alive or dead, began last; empty where it had none."""
        rows = self._rows()
        found = rows[(rows[:, _TASK] == task) & (rows[:, _SAMPLE] >= 0), _SAMPLE].tolist()
        return self._name_of(found[0]) if found else ""

    def stuck(self) -> list[int]:
        """Ids of the workers that are stuck in a file."""
        rows = self._rows()
        return rows[(self._quiet >= _GIVE_UP_AFTER) & (rows[:, _SAMPLE] >= 0), _TASK].tolist()

    def _describe(self, row: np.ndarray, polls: int) -> str:
        task, state = row[_TASK], ""
        with contextlib.suppress(OSError):
            letter = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[0]
            state = f" ({_STATES[letter]})" if letter in _STATES else ""
        return (
            f"no batch for {polls * POLL_SECONDS:.0f} s: {self._kind} {task}{state} does not get "
            f"past {self._name_of(int(row[_SAMPLE]))}; look at the disk or the mount"
        )

    def _rows(self) -> np.ndarray:
        return np.frombuffer(memoryview(self._memory), np.int64).reshape(-1, 3)


def shared_memory_text() -> str:
    """Free space of /dev/shm, for messages."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        return f"/dev/shm: {error.strerror}"
    return f"/dev/shm has {status.f_bavail * status.f_frsize / 2**20:.0f} MiB free"
