"""Reading teacher logits: random records of many views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from deit_fast import _C
from deit_fast.cache.codec_base import Codec
from deit_fast.cache.codecs import keys_of
from deit_fast.cache.format import (
    codec_of,
    format_errors,
    read_manifest,
    require_equal,
    say_unproved,
    view_path,
    view_specs,
    views_on_disk,
)
from deit_fast.cache.record_order import host_ids, record_order
from deit_fast.cache.view_copy import COPY_BYTES, ViewCopy
from deit_fast.errors import CacheError, InputError
from deit_fast.storage.urls import is_url

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deit_fast.cache.sampled import ViewKeys
    from deit_fast.kernels.distillation_loss import TopK

# Memory maps kept open after a call. A step uses view.repeats views; a view that returns after so
# many others is mapped and verified again.
_OPEN_VIEWS = 256
# Bytes of blocks that the system is asked to read at once, and of the batches that are read ahead.
_READ_TOGETHER = 5 << 20
_THREADS = 3  # two wait for the disk while one verifies
_READ_AHEAD = 320 << 20
# A record of at least a page: when its block is verified, each one is asked for by itself. Smaller
# ones come with their neighbours, and a whole view of them stays in memory.
_LARGE_RECORD = 4096

_Block: TypeAlias = tuple[_C.ViewReader, int]


class LogitCache:
    """A cache opened for reading. Safe to use from several threads and across fork.

    A view is opened at its first use. A block's checksum is compared before its first record is
    returned. Anything missing, incomplete or damaged raises; nothing is ever filled in.

    Args:
        path: its folder.
        manifest: in it.
        copy: where ``path`` is the local copy of a cache at a URL.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], copy: ViewCopy | None = None) -> None:
        self.path, self.manifest, self._copy = path, manifest, copy
        self.codec: Codec = codec_of(manifest, str(path))
        self.order = record_order(manifest, str(path))
        self._spec = view_specs(manifest)
        self._open_views = self._new_views()
        self._layout = cache(self.codec.layout)  # by temperature
        self._raw = _C.RecordLayout(
            _C.RecordKind.copy,
            record_bytes=self.codec.record_bytes,
            num_classes=0,
        )
        # of the last `gather`, by number of samples
        self._like: tuple[int, tuple[Tensor, ...]] = -1, ()

    @classmethod
    def open(cls, path: str | Path, copy_bytes: int = COPY_BYTES) -> LogitCache:
        """Open the cache in a folder, or at a URL: blocks are then fetched when they are needed,
        and stay on this machine.

        Args:
            copy_bytes: bound of what stays of all caches at URLs.

        Raises:
            CacheError: no manifest there, or a damaged one.
            StorageError: the URL cannot be read.
        """
        if is_url(path):
            copy = ViewCopy(str(path), copy_bytes)
            return cls(copy.folder, copy.manifest, copy)
        manifest = read_manifest(Path(path))
        say_unproved(Path(path), manifest)
        return cls(Path(path), manifest)

    @property
    def where(self) -> str:
        """The folder or URL that was opened, for messages."""
        return str(self.path) if self._copy is None else self._copy.url

    @property
    def views(self) -> list[int]:
        """Ids of the views whose every block is marked complete, in order.

        Raises:
            CacheError: a view file's header or block table is damaged.
        """
        if self._copy is not None:
            return self._copy.views
        complete = []
        for view_id in views_on_disk(self.path):
            with format_errors():
                file = _C.ViewFile(str(view_path(self.path, view_id)), self._spec(view_id=view_id))
                if file.first_incomplete() is None:
                    complete.append(view_id)
        return complete

    def require(self, expected: Mapping[str, Any]) -> None:
        """Compare some of the manifest's fields with what a run expects.

        Args:
            expected: fields by dotted name (fingerprint keys, `codec.k`, `num_samples`), or parts
                of a manifest in its own nested form.

        Raises:
            CacheMismatch: names every field that differs or is absent, with both values.
        """
        require_equal(self.where, self.manifest, expected)

    def gather(
        self,
        sample_ids: Any,
        view_ids: Any,
        *,
        tau: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Tensor | TopK:
        """The teacher's logits of views, in a form that ``kernels.distillation_loss`` takes, or its
        features; those of `int8-standard` as they are stored, see ``FeatureCache``.

        Args:
            sample_ids: integers [n].
            view_ids: integers [n], or one for all.
            tau: temperature of the distillation loss; `topk` must have recorded it.
            device: of the result. On CUDA the records are copied from pinned memory and decoded on
                the current stream, without waiting for the device.

        Returns:
            Dense logits [n, C], a TopK, or labels int64 [n]; features [n, T, D].

        Raises:
            InputError: a sample id out of range, shapes that differ.
            CacheError: a view that is not there, is incomplete or damaged, naming file and block;
                a temperature that was not recorded.
        """
        import torch

        if device != "cpu" and torch.device(device).type != "cpu":
            # Records cross the bus rather than decoded logits, which are up to four times as large.
            pinned = torch.device(device).type == "cuda"
            records = self.gather_records(sample_ids, view_ids, pin_memory=pinned)
            return self.codec.decode(records.to(device, non_blocking=True), tau)
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        layout = self._layout(tau)
        known, like = self._like
        if known != samples.size:
            like = self.codec.empty(samples.size, None)
            self._like = samples.size, like
        outputs = tuple(map(torch.empty_like, like))  # takes half as long as `empty`
        positions = self.order.positions(samples, views)
        self._gather(positions, views, layout, [output.data_ptr() for output in outputs])
        return self.codec.form(outputs, tau)

    def gather_arrays(self, samples: np.ndarray, views: np.ndarray, tau: float) -> list[np.ndarray]:
        """As ``gather``, in numpy: the tensors of ``Codec.outputs``, bfloat16 as float32.

        Args:
            samples, views: int64 [n], contiguous.
        """
        return self.arrays_at(self.order.positions(samples, views), views, tau)

    def arrays_at(self, positions: np.ndarray, views: np.ndarray, tau: float) -> list[np.ndarray]:
        """As ``gather_arrays``, by the records' positions in their files."""
        names = {"bfloat16": "uint16"}
        outputs = self.codec.outputs(len(positions))
        arrays = [np.empty(shape, names.get(dtype, dtype)) for shape, dtype in outputs]
        layout = self._layout(tau)
        self._gather(positions, views, layout, [array.ctypes.data for array in arrays])
        return [
            (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array
            for array, (_, dtype) in zip(arrays, outputs, strict=True)
        ]

    def gather_records(self, sample_ids: Any, view_ids: Any, *, pin_memory: bool = False) -> Tensor:
        """The stored bytes, uint8 [n, record_bytes], that ``gather`` decodes. Raises as it does."""
        import torch

        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        shape = samples.size, self.codec.record_bytes
        if pin_memory:
            records = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            records = torch.empty(shape, dtype=torch.uint8)  # half as long as with `False`
        positions = self.order.positions(samples, views)
        self._gather(positions, views, self._raw, [records.data_ptr()])
        return records

    def keys(self, sample_ids: Any, view_ids: Any) -> ViewKeys | None:
        """What ``codec.encode`` needs to make the records of these views again."""
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        return keys_of(self.codec, self.manifest["fingerprint"], samples, views)

    def prefetch(self, batches: Sequence, *, ahead: int = 16, start: int = 0) -> ReadAhead:
        """Read and verify the blocks of the coming batches in background threads.

        Args:
            batches: [step] -> (sample ids, view ids), as ``views.order.TrainBatches``.
            ahead: most batches to read ahead; fewer where they would take over 320 MiB.
            start: the first step.

        Raises:
            InputError, CacheError: as ``gather``, when a batch is requested.
        """
        return ReadAhead(self, batches, ahead, start)

    def _gather(
        self,
        positions: np.ndarray,
        views: np.ndarray,
        layout: _C.RecordLayout,
        addresses: list[int],
    ) -> None:
        try:
            if self._copy is not None:
                self._gather_copied(self._copy, positions, views, layout, addresses)
            else:
                self._open_views.gather(positions, views, layout, addresses)
        except _C.IdError as error:
            raise InputError(str(error)) from None
        except _C.FormatError as error:
            remedy = "make it again with the command that precomputed the cache"
            raise CacheError(f"cache {self.where}: {error}; {remedy}") from None

    def _gather_copied(
        self,
        copy: ViewCopy,
        positions: np.ndarray,
        views: np.ndarray,
        layout: _C.RecordLayout,
        addresses: list[int],
    ) -> None:
        self._require_copied(copy, positions, views)
        try:
            self._open_views.gather(positions, views, layout, addresses)
        except _C.FormatError:
            copy.repair(positions, views)
            self._open_views = self._new_views()
            self._open_views.gather(positions, views, layout, addresses)

    def _require_copied(self, copy: ViewCopy, positions: np.ndarray, views: np.ndarray) -> None:
        outside = positions[(positions < 0) | (positions >= self.manifest["num_samples"])]
        if len(outside):
            raise InputError(f"sample {outside[0]} is not in [0, {self.manifest['num_samples']})")
        if copy.require(positions, views):
            self._open_views = self._new_views()

    def _new_views(self) -> _C.CacheViews:
        is_growing = self._copy is not None
        opener = partial(_open_view, self.path, self._spec, is_growing)
        return _C.CacheViews(self.manifest["num_samples"], opener, _OPEN_VIEWS)

    def fetch(self, sample_ids: Any, view_ids: Any) -> None:
        """Fetch the blocks of these records, where the cache is at a URL. Raises as ``gather``."""
        if self._copy is not None:
            self._require_copied(self._copy, *self._located(sample_ids, view_ids))

    @property
    def is_remote(self) -> bool:
        """Whether blocks may have to be fetched."""
        return self._copy is not None

    def unread_blocks(self, sample_ids: Any, view_ids: Any) -> list[_Block]:
        """The blocks of these records that are not verified yet, in the files' order. Raises as
        ``gather``."""
        try:
            return self._open_views.unread_blocks(*self._located(sample_ids, view_ids))
        except _C.IdError as error:
            raise InputError(str(error)) from None

    def will_need(self, sample_ids: Any, view_ids: Any) -> int:
        """Ask the system to read those of these records whose blocks are verified, in the files'
        order; returns the number of ranges, without waiting. Raises as ``gather``."""
        try:
            return self._open_views.will_need(*self._located(sample_ids, view_ids))
        except _C.IdError as error:
            raise InputError(str(error)) from None

    def _located(self, sample_ids: Any, view_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Positions and view ids."""
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        return self.order.positions(samples, views), views


class ReadAhead:
    """Keeps the blocks of the next batches read and verified; see ``LogitCache.prefetch``.

    Call ``advance(step)`` before each step, or iterate to get the batches themselves. Blocks go to
    the system's page cache, which all processes of a host share; ``gather`` reports damaged ones.
    A block is read whole once, to be verified. Later passes ask for large records alone, which may
    have left the memory since. Close it, or use it as a context manager.
    """

    def __init__(self, cache: LogitCache, batches: Sequence, ahead: int, start: int) -> None:
        self._cache, self._batches, self._ahead = cache, batches, ahead
        record_bytes = cache.codec.record_bytes
        if start < len(batches):
            batch_bytes = max(1, len(batches[start][0])) * record_bytes
            self._ahead = min(ahead, max(1, _READ_AHEAD // batch_bytes))
        self._together = max(1, _READ_TOGETHER // (cache.manifest["block_records"] * record_bytes))
        self._is_large = record_bytes >= _LARGE_RECORD
        self._next = self._start = start
        self._pool = ThreadPoolExecutor(_THREADS, "dlc-read-ahead")
        self._tasks: dict[Future[int], list[_Block]] = {}  # queued or running
        self._blocks_read = 0
        self.advance(start)

    def advance(self, step: int) -> None:
        """The consumer is at ``step``: request the batches up to ``step + ahead``."""
        self._drop_finished()
        stop = min(step + self._ahead + 1, len(self._batches))
        for upcoming in range(max(self._next, step), stop):
            if self._cache.is_remote:
                self._tasks[self._pool.submit(_fetch, self._cache, *self._batches[upcoming])] = []
                continue
            requested = {block for blocks in self._tasks.values() for block in blocks}
            unread = self._cache.unread_blocks(*self._batches[upcoming])
            unread = [block for block in unread if block not in requested]
            if self._is_large:  # after the above, which opens the views: once
                self._tasks[self._pool.submit(_ask, self._cache, *self._batches[upcoming])] = []
            for first in range(0, len(unread), self._together):
                blocks = unread[first : first + self._together]
                self._tasks[self._pool.submit(_read, blocks)] = blocks
        self._next = max(self._next, stop)

    def wait(self) -> int:
        """Wait until all requested blocks have been read; returns their number since the start."""
        wait(self._tasks)
        self._drop_finished()
        return self._blocks_read

    def close(self) -> None:
        """Drop requests that have not been read yet and end the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._tasks.clear()

    def _drop_finished(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            del self._tasks[task]
            self._blocks_read += task.result()

    def __iter__(self) -> Iterator[Any]:
        for step in range(self._start, len(self._batches)):
            self.advance(step)
            yield self._batches[step]

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(cache: LogitCache, samples: Any, views: Any) -> int:
    """Ask for records of verified blocks; reads no block. `gather` names what is wrong."""
    with suppress(InputError, OSError):
        cache.will_need(samples, views)
    return 0


def _fetch(cache: LogitCache, samples: Any, views: Any) -> int:
    """Fetch, read and verify the blocks of a batch; returns their number. `gather` names what is
    wrong."""
    with suppress(InputError, OSError):
        cache.fetch(samples, views)
        return _read(cache.unread_blocks(samples, views))
    return 0


def _read(blocks: list[_Block]) -> int:
    """Read and verify blocks; returns their number without damaged ones, which `gather` names."""
    for reader, block in blocks:
        reader.will_need(block)  # the disk reads the next ones while one is verified
    count = 0
    for reader, block in blocks:
        with suppress(_C.FormatError, OSError):
            reader.read_block(block)
            count += 1
    return count


def _open_view(path: Path, spec: Any, is_growing: bool, view_id: int) -> _C.ViewReader:
    """A view, its header and size checked; complete, unless its blocks come while it is open.

    Raises:
        CacheError: the view is not there, incomplete or damaged; names view and block.
    """
    name = view_path(path, view_id)
    try:
        with format_errors():
            reader = _C.ViewReader(str(name), spec(view_id=view_id), is_growing)
            block = None if is_growing else reader.first_incomplete()
    except FileNotFoundError:
        raise CacheError(f"view {view_id} is not in the cache: there is no {name}") from None
    if block is not None:
        raise CacheError(f"{name}: view {view_id} is incomplete: block {block} is not written yet")
    return reader
