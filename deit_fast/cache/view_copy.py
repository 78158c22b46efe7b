"""The local copy of a cache in object storage: blocks are fetched when they are needed, and stay.

A copy is a folder of the user's cache folder with manifest, statistics and pixel digests, and with
view files that fill block by block. All processes of a machine share it: one fetches a view's
blocks while the others wait for it. Nothing that arrives is trusted: a block's checksum is compared
when it arrives, and again when it is first read from the file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path

import numpy as np

from deit_fast import _C
from deit_fast.cache.format import FILE_NAME, format_errors, view_path
from deit_fast.cache.remote import (
    Listing,
    RemoteCache,
    block_parts,
    blocks_in,
    damage_errors,
    pull_small,
    read_manifest,
)
from deit_fast.errors import CacheError
from deit_fast.runtime.copies import allocated_bytes, delete_unused, hold, last_use
from deit_fast.runtime.files import (
    cache_folder,
    require_writable,
    temporary_path,
    write_atomically,
)
from deit_fast.runtime.locks import one_at_a_time
from deit_fast.storage.objects import Objects

log = logging.getLogger("deit_fast")

COPY_BYTES = 50 * 10**9  # as `data.local_copy_gb` where nobody says otherwise
_PAGES_BYTES = 4 << 12  # of a view file beside its records: header, table, pages begun
_TOGETHER_BYTES = 64 << 20  # of blocks in memory at once


class ViewCopy:
    """What is here of a cache at a URL. Safe to use from several threads.

    Args:
        url: of the cache.
        limit: bytes of the copies of all caches of this user on this machine.

    Attributes:
        folder: of the copy.
        url: for messages.

    Raises:
        CacheError: no cache is there, or a damaged manifest.
        StorageError: it cannot be read.
    """

    def __init__(self, url: str, limit: int = COPY_BYTES) -> None:
        self._limit = limit
        objects = Objects(url)
        self.url = str(objects)
        self.manifest, content = read_manifest(objects)
        digest = hashlib.sha256(objects.url.encode() + b"\0" + content).hexdigest()
        name = objects.url.rpartition("/")[2]
        self.folder = _copies() / f"{name[:40]}-{digest[:16]}"
        require_writable("XDG_CACHE_HOME", self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / FILE_NAME).exists():
            write_atomically(self.folder / FILE_NAME, content)
        self._remote = RemoteCache(objects, self.manifest)
        self._listing = Listing.of(objects)
        pull_small(objects, self._listing, self.manifest, self.folder)
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
            CacheError: a block is damaged or not published; or the copy would exceed the bound.
            StorageError: a block cannot be read.
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
            spec = self._remote.spec(view_id)
            return _C.ViewWriter(str(name), str(temporary_path(name)), spec, reserve=False)

    def _hold(self, view_id: int) -> np.ndarray:
        """Which blocks of a view are here; its file is not deleted while this process holds it."""
        if view_id in self._held:
            self._held[view_id] = self._held.pop(view_id)  # the youngest
            return self._is_here[view_id]
        if view_id not in self._listing.blocks and view_id not in self._listing.files:
            raise CacheError(f"view {view_id} is not in the cache {self._remote.objects}")
        descriptor = hold(_use_file(view_path(self.folder, view_id)))
        writer = self._writer(view_id)
        states = writer.table_states()
        self._is_here[view_id] = np.array([s == _C.BlockState.complete for s in states])
        self._held[view_id] = descriptor
        return self._is_here[view_id]

    def _fetch(self, view_id: int, blocks: list[int], is_repair: bool = False) -> None:
        lock = self.folder / f".fetch-{view_id:05d}"
        with one_at_a_time(lock):
            writer, here = self._writer(view_id), self._is_here[view_id]
            if not is_repair:
                states = writer.table_states()
                here[:] = [state == _C.BlockState.complete for state in states]
                blocks = [block for block in blocks if not here[block]]
            parts = block_parts(self._remote, self._listing, view_id, blocks)
            together = max(1, _TOGETHER_BYTES // self._remote.block_bytes(0))
            for first in range(0, len(parts), together):
                with damage_errors():
                    contents = self._remote.objects.read_parts(parts[first : first + together])
                for block, content in zip(blocks[first:], contents, strict=False):
                    records = np.frombuffer(content, np.uint8, self._remote.block_bytes(block))
                    with format_errors():
                        writer.commit(block, records.ctypes.data, records.nbytes)
                    here[block] = True

    # -----------------------------------------------------------------------------------------
    # The bound
    # -----------------------------------------------------------------------------------------

    def _make_room(self, size: int, needed: set[int]) -> bool:
        """Delete the views that were not used longest, of all copies, until ``size`` bytes fit.

        Raises:
            CacheError: what processes of this machine read at once does not fit.
        """
        is_outdated = False
        for _ in range(2):
            files = sorted(
                _copies().glob("*/view-*.dlc"), key=lambda path: last_use(_use_file(path))
            )
            sizes = [*map(allocated_bytes, files)]
            used = sum(sizes)
            for path, freed in zip(files, sizes, strict=True):
                if used + size <= self._limit:
                    return is_outdated
                used -= freed * delete_unused(_use_file(path), path.unlink)
            if used + size <= self._limit:
                return is_outdated
            for view_id in [view for view in self._held if view not in needed]:
                os.close(self._held.pop(view_id))
                del self._is_here[view_id]
                is_outdated = True
        raise CacheError(
            f"the local copies of caches would take {(used + size) / 1e9:.3g} GB, and "
            f"data.local_copy_gb={self._limit / 1e9:g} allows less: raise it, or copy the cache "
            f"{self._remote.objects} to a disk (`deit-fast cache copy`)"
        )


def _copies() -> Path:
    return cache_folder() / "caches"


def _use_file(view: Path) -> Path:
    """The file that users of a view's file hold."""
    return view.with_name(f".use-{view.name}")
