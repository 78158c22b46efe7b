"""SIGTERM and SIGUSR1: the run saves what it has and leaves with status 75.

The handler only notes the signal; the loop asks after every step and all ranks leave after the same
one. Where there is nothing to lose, before the first step is done, it ends the run at once:
compiling takes minutes, and who sends SIGTERM waits ten seconds.
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


class Preempted(Exception):
    """A signal ended the run; the same command goes on from where it says."""


class Signals:
    """Notes SIGTERM and SIGUSR1 while its block runs."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = False

    def __enter__(self) -> Signals:
        # Only the main thread may set handlers; elsewhere signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        else:
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number).name
        if self._at_once:
            raise Preempted(
                f"{self.received}: nothing was lost, the run goes on when started again"
            )
        if first:
            log.info("%s: saving after this step", self.received)

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """A signal inside the block raises ``Preempted`` there."""
        self._at_once = True
        try:
            if self.received is not None:
                raise Preempted(f"{self.received}: nothing was lost")
            yield
        finally:
            self._at_once = False
