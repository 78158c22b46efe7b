"""SIGTERM and SIGUSR1: the run saves its state and ends with exit status 75.

The handler only records the signal. `train/loop.py` polls it after every step, and all ranks leave
after the same step. Before the first step there is nothing to save, so the handler ends the run at
once: compiling takes minutes, and a scheduler kills the process about ten seconds after SIGTERM.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("deit_fast")

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):  # no handler of errors may keep it
    """A signal ended the run; the same command resumes it."""


class Signals:
    """Records SIGTERM and SIGUSR1 while its block runs."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._raises = False

    def __enter__(self) -> Signals:
        # Only the main thread may set handlers; in other threads signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        else:
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        is_first, self.received = self.received is None, signal.Signals(number).name
        if self._raises:
            raise Preempted(f"{self.received}: nothing was lost, the same command resumes the run")
        if is_first:
            log.info("%s: saving after this step", self.received)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A signal received before or inside the block raises ``Preempted``."""
        self._raises = True
        try:
            if self.received is not None:
                raise Preempted(f"{self.received}: nothing was lost")
            yield
        finally:
            self._raises = False
