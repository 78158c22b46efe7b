"""Reading in a known order: blocks ahead of their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deit_fast import _C

if TYPE_CHECKING:
    from deit_fast.cache.reader import LogitCache


class ReadAhead:
    """Keeps the blocks of the next batches read and verified; see ``LogitCache.prefetch``.

    Call ``advance(step)`` before each step, or iterate over it for the batches themselves. Blocks
    go to the system's page cache, which all processes of a host share; a block that turns out to
    be damaged is left for ``gather`` to report. Close it, or use it as a context manager.
    """

    def __init__(
        self, cache: LogitCache, batches: Sequence, *, ahead: int, start: int, threads: int
    ) -> None:
        self._cache, self._batches, self._ahead = cache, batches, ahead
        self._next = self._start = start
        self._threads: _C.ReadAhead | None = _C.ReadAhead(threads)
        self.advance(start)

    def advance(self, step: int) -> None:
        """The consumer comes to ``step``: ask for the batches up to ``step + ahead``."""
        if self._threads is None:
            return
        stop = min(step + self._ahead + 1, len(self._batches))
        for place in range(max(self._next, step), stop):
            self._cache._ask(self._threads, *self._batches[place])
        self._next = max(self._next, stop)

    def wait(self) -> int:
        """Until all that was asked for has been read. Returns the blocks read since the start."""
        if self._threads is None:
            return 0
        self._threads.wait()
        return self._threads.blocks_read

    def close(self) -> None:
        """Drop what has not been read yet and end the threads."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.stop()

    def __iter__(self) -> Iterator[Any]:
        for step in range(self._start, len(self._batches)):
            self.advance(step)
            yield self._batches[step]

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
