"""Reading in a known order: blocks ahead of their batches, batches ahead of their steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deit_fast import _C
from deit_fast.cache.records import decode_rows
from deit_fast.kernels import TopK

if TYPE_CHECKING:
    from deit_fast.cache.reader import LogitCache

_SLOTS = 2  # one is filled while the other is decoded


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


class _Slot:
    """Buffers of one batch in flight: pinned on the host, its copy on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        self.ids: tuple[Any, Any] = (), ()
        self.host = self.on_device = torch.empty((0, 0), dtype=torch.uint8)
        self.copied = self.decoded = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.copied, self.decoded = torch.cuda.Event(), torch.cuda.Event()

    def resize(self, count: int, record_bytes: int) -> None:
        if self.host.shape[0] >= count and self.host.shape[1] == record_bytes:
            return
        on_cuda = self.device.type == "cuda"
        self.host = torch.empty((count, record_bytes), dtype=torch.uint8, pin_memory=on_cuda)
        self.on_device = torch.empty_like(self.host, device=self.device) if on_cuda else self.host


class StreamedLogits:
    """Answers on a device, batch by batch in a known order; see ``LogitCache.stream``.

    A thread gathers the next batch's records into pinned memory and copies them on a stream of its
    own; the device decodes them on the consumer's current stream, which waits for that copy and
    for nothing else. Records cross the bus, not decoded answers. Iterate once; close it, or use it
    as a context manager, where the iteration may end early.
    """

    def __init__(
        self,
        cache: LogitCache,
        batches: Sequence,
        device: torch.device,
        *,
        tau: float,
        tail: str,
        ahead: int,
        start: int,
    ) -> None:
        self._cache, self._batches, self._device = cache, batches, device
        self._tau, self._tail, self._ahead = tau, tail, ahead
        self._left = len(batches) - start
        self.ids: tuple[Any, Any] = (), ()
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        for _ in range(_SLOTS):
            self._free.put(_Slot(device))
        self._thread = threading.Thread(
            target=self._fill, args=(start,), name="deit-fast-stream", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> StreamedLogits:
        return self

    def __next__(self) -> Tensor | TopK:
        if self._left <= 0:
            self.close()
            raise StopIteration
        slot = self._ready.get()
        if isinstance(slot, BaseException):
            self.close()
            raise slot
        self._left -= 1
        self.ids = slot.ids
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        raw = slot.on_device[: slot.count]
        answer = decode_rows(self._cache.codec, raw, None, self._tau, self._tail)
        if slot.decoded is not None:
            slot.decoded.record(torch.cuda.current_stream(self._device))
        self._free.put(slot)
        return answer

    def close(self) -> None:
        """End the thread; answers that were handed out stay valid."""
        self._left = 0
        self._free.put(None)
        self._thread.join()

    def __enter__(self) -> StreamedLogits:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(self, start: int) -> None:
        try:
            side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            with self._cache.prefetch(self._batches, ahead=self._ahead, start=start) as batches:
                for samples, views in batches:
                    slot = self._free.get()
                    if slot is None or self._left <= 0:
                        return
                    self._load(slot, samples, views, side)
                    self._ready.put(slot)
        except BaseException as error:  # the consumer raises it, at the step that it belongs to
            self._ready.put(error)

    def _load(self, slot: _Slot, samples: Any, views: Any, side: torch.cuda.Stream | None) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()  # this thread alone: the pinned buffer is still being read
        slot.count, slot.ids = len(samples), (samples, views)
        if side is None:
            slot.resize(slot.count, self._cache.codec.record_bytes)
            self._cache.gather_records(samples, views, out=slot.host)
            return
        assert slot.copied is not None and slot.decoded is not None
        with torch.cuda.stream(side):
            side.wait_event(slot.decoded)
            slot.resize(slot.count, self._cache.codec.record_bytes)
            self._cache.gather_records(samples, views, out=slot.host)
            slot.on_device[: slot.count].copy_(slot.host[: slot.count], non_blocking=True)
            slot.copied.record(side)
