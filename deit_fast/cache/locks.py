"""Which process writes which block, so that no block is computed twice.

Two writers of one block would write the same bytes, so locks only save work; readers ignore them. A
lock is a small file beside the views, see `runtime/locks.py`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from deit_fast.runtime.locks import Lock, Owner, acquire, read_owner


class BlockLocks:
    """The locks of one writer.

    Args:
        folder: of the cache.
        rank, world_size: the writer's share of the blocks. Writers of one ``world_size`` have
            disjoint shares.
    """

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        self._folder = folder
        self._owner = Owner(socket.gethostname(), os.getpid(), rank, world_size)
        self._held: dict[tuple[int, int], Lock] = {}  # by (view, block)

    def acquire(self, view_id: int, block: int) -> None:
        """Lock a block.

        Raises:
            InputError: another writer has locked it; names its pid and host, and the file.
        """
        if (view_id, block) not in self._held:
            what = f"view {view_id} block {block}"
            self._held[view_id, block] = acquire(self._path(view_id, block), what, self._owner)

    def require_held(self, view_id: int, block: int) -> None:
        """To be called before the block is committed.

        Raises:
            InputError: the lock's file or the cache's folder was moved, deleted or replaced.
        """
        self._held[view_id, block].require_held()

    def release(self, view_id: int, block: int) -> None:
        lock = self._held.pop((view_id, block), None)
        if lock is not None:
            lock.release()

    def refuse_rivals(self, view_ids: Iterable[int]) -> None:
        """Stop before any work where another job is writing these views.

        Raises:
            InputError: a writer of another ``world_size``, or of the same rank, has locked a block
                of one of the views; names its pid and host, and the file.
        """
        requested = set(view_ids)
        for view_id, path in self._unheld_files():
            other = read_owner(path)
            sibling = other.world_size == self._owner.world_size and other.rank != self._owner.rank
            if view_id in requested and not sibling and path.exists():
                acquire(path, f"view {view_id}").release()

    def remove_dead(self) -> None:
        """Delete the files of killed writers."""
        for _, path in self._unheld_files():
            try:
                Lock(path, "", self._owner).release()
            except BlockingIOError:
                continue

    def close(self) -> None:
        """Release all locks."""
        for key in list(self._held):
            self.release(*key)

    def _path(self, view_id: int, block: int) -> Path:
        return self._folder / f".lock-view-{view_id:05d}-block-{block:07d}"

    def _unheld_files(self) -> list[tuple[int, Path]]:
        """(view, path) of the locks of other writers, alive or not."""
        held = {self._path(*key) for key in self._held}
        found = []
        for path in sorted(self._folder.glob(".lock-view-*")):
            name = re.fullmatch(r"\.lock-view-(\d+)-block-\d+", path.name)
            if name and path not in held:
                found.append((int(name[1]), path))
        return found
