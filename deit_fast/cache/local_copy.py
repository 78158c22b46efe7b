"""The local copy of a cache in object storage: blocks are fetched when they are needed, and stay.

A copy is a folder of the user's cache folder with manifest, statistics and pixel digests, and with
view files that fill block by block. All processes of a machine share it: one fetches a view's
blocks while the others wait for it. Nothing that arrives is trusted: a block's checksum is compared
when it arrives, and again when it is first read from the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from deit_fast import _C
from deit_fast.cache.format import FILE_NAME, format_errors, view_path, view_specs
from deit_fast.cache.remote import (
    STATISTICS,
    Listing,
    RemoteCache,
    blocks_in,
    pull_parts,
    read_manifest,
    read_view_parts,
)
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.files import cache_folder, temporary_path, write_atomically
from deit_fast.storage.objects import Objects

log = logging.getLogger("deit_fast")

LIMIT_VARIABLE = "DEIT_FAST_LOCAL_GB"  # bound of all copies of a machine
_DEFAULT_GB = 100.0
_PAGES_BYTES = 4 << 12  # of a view file beside its records: header, table, pages begun
_TOGETHER_BYTES = 64 << 20  # of blocks in memory at once


def limit_bytes() -> int:
    """Bound of the copies of all caches together, bytes.

    Raises:
        InputError: the variable is no number above 0.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        value = float(text) if text else _DEFAULT_GB
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise InputError(
            f"{LIMIT_VARIABLE} in the environment must be a number of GB above 0, not "
            f"{text[:100]!r}"
        )
    return int(value * 1e9)


class LocalCopy:
    """What is here of a cache at a URL. Safe to use from several threads.

    Args:
        url: of the cache.

    Attributes:
        folder: of the copy.
        url: for messages.

    Raises:
        CacheError: no cache is there, or a damaged manifest.
        StorageError: it cannot be read.
    """

    def __init__(self, url: str) -> None:
        objects = Objects(url)
        self.url = str(objects)
        self.manifest, content = read_manifest(objects)
        digest = hashlib.sha256(objects.url.encode() + b"\0" + content).hexdigest()
        name = objects.url.rpartition("/")[2]
        self.folder = _copies() / f"{name[:40]}-{digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / FILE_NAME).exists():
            write_atomically(self.folder / FILE_NAME, content)
        self._remote = RemoteCache(objects, self.manifest)
        self._listing = Listing.of(objects)
        small = {
            view_path(Path(), view_id, ".pixels.json").name: stamp
            for view_id, stamp in self._listing.pixels.items()
        }
        if self._listing.has_statistics:
            small[STATISTICS] = objects.stat(STATISTICS)
        pull_parts(objects, small, self.folder)
        self._specs = view_specs(self.manifest)
        self._lock = threading.RLock()
        self._is_here: dict[int, np.ndarray] = {}  # bool [blocks], of the views held
        self._held: dict[int, int] = {}  # descriptor with a shared lock, by view; oldest use first

    @property
    def views(self) -> list[int]:
        """Ids of the views whose every block is published."""
        return self._remote.complete_views(self._listing)

    def require(self, positions: np.ndarray, views: np.ndarray) -> bool:
        """Fetch the blocks of these records that are not here.

        Returns:
            Whether views were given up for them, so that open readers of views are outdated.

        Raises:
            CacheError: a block is not published; or the copy would exceed the bound.
            StorageError: a block cannot be read, or is damaged.
        """
        with self._lock:
            missing: dict[int, list[int]] = {}
            needed = blocks_in(positions, views, self.manifest["block_records"])
            for view_id, blocks in needed.items():
                here = self._hold(view_id)
                if left := [block for block in blocks if not here[block]]:
                    missing[view_id] = left
            if not missing:
                return False
            data = sum(self._remote.block_bytes(b) for blocks in missing.values() for b in blocks)
            size = data + _PAGES_BYTES * len(missing)
            is_outdated = self._make_room(size, {*needed})
            for view_id, blocks in missing.items():
                self._fetch(view_id, blocks)
            return is_outdated

    def repair(self, positions: np.ndarray, views: np.ndarray) -> None:
        """Fetch the blocks of these records again that are damaged here."""
        with self._lock:
            for view_id, blocks in blocks_in(
                positions, views, self.manifest["block_records"]
            ).items():
                writer = self._writer(view_id)
                damaged = [
                    block
                    for block in blocks
                    if writer.check_block(block)[0] != _C.BlockState.complete
                ]
                if damaged:
                    log.warning(
                        "%s: %d blocks of view %d are damaged; they are fetched again",
                        self.folder, len(damaged), view_id,
                    )  # fmt: skip
                    self._fetch(view_id, damaged, is_repair=True)

    def fetch_view(self, view_id: int) -> None:
        """Fetch all blocks of a view."""
        count = self.manifest["num_samples"]
        self.require(np.arange(0, count, self.manifest["block_records"]), np.array([view_id]))

    def _writer(self, view_id: int) -> _C.ViewWriter:
        name = view_path(self.folder, view_id)
        with format_errors():
            spec = self._specs(view_id=view_id)
            return _C.ViewWriter(str(name), str(temporary_path(name)), spec, reserve=False)

    def _hold(self, view_id: int) -> np.ndarray:
        """Which blocks of a view are here; its file is not deleted while this process holds it."""
        if view_id in self._held:
            self._held[view_id] = self._held.pop(view_id)  # the youngest
            return self._is_here[view_id]
        if view_id not in self._listing.blocks and view_id not in self._listing.files:
            raise CacheError(f"view {view_id} is not in the cache {self._remote.objects}")
        name = view_path(self.folder, view_id)
        while True:
            writer = self._writer(view_id)
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            with suppress(OSError):  # without locks nothing is deleted
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # it was deleted just before
        os.utime(name)  # the order of deletion
        states = writer.table_states()
        self._is_here[view_id] = np.array([s == _C.BlockState.complete for s in states])
        self._held[view_id] = descriptor
        return self._is_here[view_id]

    def _fetch(self, view_id: int, blocks: list[int], is_repair: bool = False) -> None:
        with self._one_fetches(view_id):
            writer, here = self._writer(view_id), self._is_here[view_id]
            if not is_repair:
                states = writer.table_states()
                here[:] = [state == _C.BlockState.complete for state in states]
                blocks = [block for block in blocks if not here[block]]
            parts, tail = read_view_parts(self._remote, self._listing, view_id, blocks)
            together = max(1, _TOGETHER_BYTES // self._remote.block_bytes(0))
            for first in range(0, len(parts), together):
                contents = self._remote.objects.read_parts(parts[first : first + together])
                for block, content in zip(blocks[first:], contents, strict=False):
                    records = np.frombuffer(content, np.uint8, len(content) - tail)
                    with format_errors():
                        writer.commit(block, records.ctypes.data, records.nbytes)
                    here[block] = True

    @contextmanager
    def _one_fetches(self, view_id: int) -> Iterator[None]:
        """One process of the machine at a time fetches blocks of a view."""
        path = self.folder / f".fetch-{view_id:05d}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # without locks several fetch the same blocks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # -----------------------------------------------------------------------------------------
    # The bound
    # -----------------------------------------------------------------------------------------

    def _make_room(self, size: int, needed: set[int]) -> bool:
        """Delete the views that were not used longest, of all copies, until ``size`` bytes fit.

        Raises:
            CacheError: what processes of this machine read at once does not fit.
        """
        limit = limit_bytes()
        is_outdated = False
        for _ in range(2):
            files = sorted(_copies().glob("*/view-*.dlc"), key=_used)
            used = sum(map(_allocated, files))
            for path in files:
                if used + size <= limit:
                    return is_outdated
                used -= _delete_unused(path)
            if used + size <= limit:
                return is_outdated
            for view_id in [view for view in self._held if view not in needed]:
                os.close(self._held.pop(view_id))
                del self._is_here[view_id]
                is_outdated = True
        raise CacheError(
            f"the local copies of caches would take {(used + size) / 1e9:.3g} GB, and "
            f"{LIMIT_VARIABLE}={limit / 1e9:g} allows less: raise it, or copy the cache "
            f"{self._remote.objects} to a disk (`deit-fast cache copy`)"
        )


def _copies() -> Path:
    return cache_folder() / "caches"


def _used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _allocated(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def _delete_unused(path: Path) -> int:
    """Bytes that deleting a view's file freed; 0 where a process holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(descriptor).st_blocks * 512
        path.unlink(missing_ok=True)
        return size
    except OSError:
        return 0
    finally:
        os.close(descriptor)
