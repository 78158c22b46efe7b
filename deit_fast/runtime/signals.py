"""SIGTERM, SIGUSR1 and Ctrl-C: the run saves its state and ends with exit status 75, or 130.

The handler only records the signal. `training/loop.py` polls it after every step, and all ranks
leave after the same step. Before the first step there is nothing to save, so the handler ends the
run at once: compiling takes minutes, and a scheduler kills the process about ten seconds after
SIGTERM.

A second Ctrl-C ends the run without saving. The terminal sends Ctrl-C to every process, and
torchrun passes it on to each of them again: one that follows within a second is the same one.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("deit_fast")

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
RELAY_SECONDS = 1.0
_NOTHING_LOST = "nothing was lost, the same command resumes the run"


class Preempted(BaseException):  # no handler of errors may keep it
    """A signal ended the run; the same command resumes it.

    Args:
        received: the signal's name, or what is known of it.
        message: what became of the run.
    """

    def __init__(self, received: str, message: str) -> None:
        super().__init__(f"{received}: {message}")
        self.status = 130 if received == SIGNALS[signal.SIGINT] else EXIT_STATUS


class Signals:
    """Records SIGTERM, SIGUSR1 and SIGINT while its block runs."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._raises = False
        self._interrupted_at: float | None = None

    def __enter__(self) -> Signals:
        self._before = {}
        # Only the main thread may set handlers; in other threads signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A job in the background of a script ignores SIGINT, and must go on ignoring it.
                if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at >= RELAY_SECONDS:
                raise KeyboardInterrupt
        name = SIGNALS[signal.Signals(number)]
        is_first, self.received = self.received is None, name
        if self._raises:
            raise Preempted(name, _NOTHING_LOST)
        if is_first:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            log.info("%s: saving after this step%s", name, again)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A signal received before or inside the block raises ``Preempted``."""
        self._raises = True
        try:
            if self.received is not None:
                raise Preempted(self.received, _NOTHING_LOST)
            yield
        finally:
            self._raises = False
