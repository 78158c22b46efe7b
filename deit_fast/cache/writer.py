"""Writing teacher logits: samples come in any order, whole blocks reach the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deit_fast import _C
from deit_fast.cache.codecs import keys_of
from deit_fast.cache.format import (
    codec_of,
    format_errors,
    publish_manifest,
    read_manifest,
    require_equal,
    say_unproved,
    view_path,
    view_specs,
)
from deit_fast.cache.locks import BlockLocks
from deit_fast.cache.record_order import host_ids, record_order
from deit_fast.errors import CacheError, InputError, RowError, SampleError
from deit_fast.runtime.files import remove_orphans, temporary_path

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.cache.remote import Publisher

log = logging.getLogger("deit_fast")

_OPEN_VIEWS = 64  # file handles kept; a view beyond them is opened again when it is needed


class _Buffer:
    """The records of one incomplete block."""

    def __init__(self, start: int, stop: int, record_bytes: int) -> None:
        self.start = start
        self.records = np.zeros((stop - start, record_bytes), np.uint8)
        self.filled = np.zeros(stop - start, bool)


class LogitCacheWriter:
    """Writes blocks of a cache; creates the cache, or continues one of the same manifest.

    A block is buffered until all its samples have come, then committed: data, sync, table entry.
    Several processes may write, in any order and with any interruption; the bytes of the files
    depend on the logits alone. If two write one block, the first complete one stays. With locks, a
    block is locked from its first sample until it is committed, and one that another process has
    locked is refused. Not for use from several threads at once.

    Args:
        path: folder of the cache.
        manifest: as ``build_manifest`` makes it.
        rank, world_size: this writer's share of the blocks, where several divide them. Writers of
            one ``world_size`` do not refuse one another in ``locks.refuse_rivals``.
        locked: lock blocks, so that none is computed twice.
        publisher: publishes each block after it was committed; what it has published is done.
        reserve: a new view file gets all its disk space at once, so that a full disk is found
            before the first block; False: as it fills.

    Attributes:
        locks: ``acquire`` locks a block before its first sample comes, until the block is committed
            or the writer closes; ``refuse_rivals`` finds another job that writes the same views.
            None without locks.

    Raises:
        CacheMismatch: the folder holds a cache made under other settings.
        CacheError: a manifest or header there is damaged.
        OSError: as from the file system, with the file's name; a view that does not fit the disk
            is refused before its first block.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: dict[str, Any],
        *,
        rank: int = 0,
        world_size: int = 1,
        locked: bool = True,
        publisher: Publisher | None = None,
        reserve: bool = True,
    ) -> None:
        self.path = Path(path)
        self.manifest = publish_manifest(self.path, manifest)
        say_unproved(self.path, self.manifest)
        self.codec = codec_of(self.manifest, str(self.path))
        self.order = record_order(self.manifest, str(self.path))
        remove_orphans(self.path)
        self.locks = BlockLocks(self.path, rank, world_size) if locked else None
        if self.locks is not None:
            self.locks.remove_dead()
        self._publisher = publisher
        self._block_records: int = self.manifest["block_records"]
        self._num_samples: int = self.manifest["num_samples"]
        self._done: set[tuple[int, int]] = set()  # verified or committed
        self._committed: set[tuple[int, int]] = set()  # by this object
        self._warned: set[tuple[int, int]] = set()
        self._others = 0  # blocks of which another writer stored other bytes
        self._buffers: dict[tuple[int, int], _Buffer] = {}
        self._open = lru_cache(_OPEN_VIEWS)(
            partial(_open_view, self.path, view_specs(self.manifest), reserve)
        )
        self._closed = False

    @property
    def num_blocks(self) -> int:
        """Blocks per view."""
        return -(-self._num_samples // self._block_records)

    def block_range(self, block: int) -> tuple[int, int]:
        """Positions [start, stop) of a block's records; ``block_samples`` says whose they are."""
        if not 0 <= block < self.num_blocks:
            raise InputError(f"block {block} is not in [0, {self.num_blocks})")
        start = block * self._block_records
        return start, min(start + self._block_records, self._num_samples)

    def block_samples(self, view_id: int, block: int) -> np.ndarray:
        """Sample ids of a block, int64, in the file's order."""
        return self.order.samples(_checked_view(view_id), *self.block_range(block))

    def is_done(self, view_id: int, block: int) -> bool:
        """Whether the block is on the disk and its checksum is right: reads and verifies it once. A
        damaged block counts as pending; the log has a warning."""
        self.block_range(block)
        key = (_checked_view(view_id), block)
        if key in self._done:
            return True
        if self._publisher is not None and self._publisher.is_there(view_id, block):
            self._done.add(key)
            return True
        if not view_path(self.path, view_id).exists():
            return False
        with format_errors():
            state, why = self._open(view_id).check_block(block)
        if state == _C.BlockState.complete:
            self._done.add(key)
            return True
        if state == _C.BlockState.broken and key not in self._warned:
            self._warned.add(key)
            log.warning("%s; it will be written again", why)
        return False

    def create(self, view_id: int) -> None:
        """Create the file of a view, unless it is there.

        Raises:
            CacheError: it is there and damaged.
            OSError: it does not fit the disk.
        """
        self._open(_checked_view(view_id))

    def write(self, sample_ids: Any, view_id: int, logits: Tensor) -> None:
        """Take the teacher's logits or features of one view of some samples.

        Samples of blocks that were complete before this object was made are skipped.

        Args:
            sample_ids: integers [n], in any order.
            view_id: the view of all of them.
            logits: float [n, num_classes], or features [n, tokens, width], on any device.

        Raises:
            InputError: an id twice or out of range, another shape, a value that is not finite or
                does not fit the codec. Nothing of the call is stored then.
            InputError: another process has locked the block, or its lock was deleted by hand.
            OSError: a commit failed; its block stays pending.
        """
        if self._closed:
            raise InputError(f"the writer of cache {self.path} is closed")
        view_id = _checked_view(view_id)
        ids = self._checked_samples(sample_ids, view_id)
        if len(logits) != len(ids):
            raise InputError(f"{len(ids)} sample ids came with {len(logits)} rows of logits")
        views = np.full(len(ids), view_id)
        keys = keys_of(self.codec, self.manifest["fingerprint"], ids, views)
        try:
            records = self.codec.encode(logits, keys).cpu().numpy()
        except RowError as error:
            raise SampleError(view_id, int(ids[error.row]), error.reason) from None
        positions = self.order.positions(ids, np.asarray(view_id))
        for block, rows in self._rows_by_block(ids, positions, view_id):
            self._fill(view_id, block, positions[rows], records[rows])

    def close(self) -> None:
        """Sync committed blocks and drop incomplete ones, which stay pending.

        Raises:
            CacheError: a file was deleted or replaced, so committed blocks are lost; names it.
        """
        if self._closed:
            return
        self._closed = True
        if self.locks is not None:
            self.locks.close()
        if self._others:
            log.warning(
                "%s: other writers had stored %d blocks meanwhile, with other last bits than this "
                "device computes; theirs stay", self.path, self._others,
            )  # fmt: skip
        if self._buffers:
            log.info("%s: %d incomplete blocks dropped", self.path, len(self._buffers))
            self._buffers.clear()
        with format_errors():
            for view_id in sorted({view_id for view_id, _ in self._committed}):
                self._open(view_id).sync()
                self._require_committed(view_id)
        self._open.cache_clear()
        if self._committed:
            require_equal(self.path, read_manifest(self.path), self.manifest, only=False)

    def _require_committed(self, view_id: int) -> None:
        """A view that this object has closed and opened again may be another file."""
        states = self._open(view_id).table_states()
        for view, block in self._committed:
            if view == view_id and states[block] != _C.BlockState.complete:
                name = view_path(self.path, view_id)
                raise CacheError(
                    f"{name}: block {block} was written and is gone: the file was replaced while "
                    f"the cache was written; write it again"
                )

    def __enter__(self) -> LogitCacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked_samples(self, sample_ids: Any, view_id: int) -> np.ndarray:
        ids = host_ids(sample_ids, "sample")
        if ids.ndim != 1:
            raise InputError(f"sample ids must be integers [n], not {list(ids.shape)}")
        outside = ids[(ids < 0) | (ids >= self._num_samples)]
        if len(outside):
            raise InputError(f"sample id {outside[0]} is not in [0, {self._num_samples})")
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            twice = values[counts > 1][0]
            raise InputError(f"view {view_id} sample {twice} was written twice")
        return ids

    def _rows_by_block(
        self, ids: np.ndarray, positions: np.ndarray, view_id: int
    ) -> list[tuple[int, np.ndarray]]:
        """Blocks to fill, each with its rows; refuses samples that came before."""
        blocks = positions // self._block_records
        found = []
        for block in np.unique(blocks).tolist():
            rows = np.flatnonzero(blocks == block)
            key = (view_id, block)
            again = ids[rows]
            if key in self._buffers:
                buffer = self._buffers[key]
                again = again[buffer.filled[positions[rows] - buffer.start]]
            elif key not in self._committed:
                if not self.is_done(view_id, block):
                    found.append((block, rows))
                continue
            if len(again):
                raise InputError(f"view {view_id} sample {again[0]} was written twice")
            found.append((block, rows))
        return found

    def _fill(self, view_id: int, block: int, positions: np.ndarray, records: np.ndarray) -> None:
        key = (view_id, block)
        if key not in self._buffers:
            if self.locks is not None:
                self.locks.acquire(view_id, block)
                if self.is_done(view_id, block):  # by another process, since this one looked
                    self.locks.release(view_id, block)
                    return
            self._open(view_id)  # finds a full disk before the work of a whole block
            start, stop = self.block_range(block)
            self._buffers[key] = _Buffer(start, stop, self.codec.record_bytes)
        buffer = self._buffers[key]
        buffer.records[positions - buffer.start] = records
        buffer.filled[positions - buffer.start] = True
        if not buffer.filled.all():
            return
        del self._buffers[key]
        if self.locks is not None:
            self.locks.require_held(view_id, block)
        with format_errors():
            records = buffer.records
            found = self._open(view_id).commit(block, records.ctypes.data, records.nbytes)
        self._others += found == _C.Committed.kept_others
        if self._publisher is not None:
            self._others += not self._publisher.publish(view_id, block, records)
        self._done.add(key)
        self._committed.add(key)
        if self.locks is not None:
            self.locks.release(view_id, block)


def _open_view(
    folder: Path, specs: Callable[..., _C.ViewSpec], reserve: bool, view_id: int
) -> _C.ViewWriter:
    name = view_path(folder, view_id)
    with format_errors():
        return _C.ViewWriter(str(name), str(temporary_path(name)), specs(view_id=view_id), reserve)


def _checked_view(view_id: int) -> int:
    if not 0 <= int(view_id) < 2**31:
        raise InputError(f"view id {view_id} is not in [0, 2^31)")
    return int(view_id)
