"""Which process writes which block, so that no block is computed twice.

Two writers of one block would write the same bytes, so locks only save work; readers ignore them. A
lock is a small file beside the views, locked with flock(2). The kernel releases it when its process
ends, killed or not, on this host and over NFS. Its text says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deit_fast.errors import CacheError

log = logging.getLogger("deit_fast")

RETRY_SECONDS = 1.0  # another process may hold a lock for a moment, to see whether it is held
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_MAX_FILE_BYTES = 4096
_descriptors: set[int] = set()  # of all locks of this process


@dataclass(frozen=True)
class Owner:
    """What a lock file says about the process that locked it."""

    host: str = ""
    pid: int = 0
    rank: int = 0
    world_size: int = 1

    def __str__(self) -> str:
        if not self.host:
            return "another process"
        share = f" (rank {self.rank} of {self.world_size})" if self.world_size > 1 else ""
        return f"pid {self.pid} on host {self.host}{share}"


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
        self._held: dict[tuple[int, int], int] = {}  # file descriptor by (view, block)

    def acquire(self, view_id: int, block: int) -> None:
        """Lock a block.

        Raises:
            CacheError: another writer has locked it; names its pid and host, and the file.
        """
        if (view_id, block) in self._held:
            return
        descriptor = _lock(self._path(view_id, block), f"view {view_id} block {block}")
        os.write(descriptor, json.dumps(asdict(self._owner)).encode())
        self._held[view_id, block] = descriptor

    def release(self, view_id: int, block: int) -> None:
        descriptor = self._held.pop((view_id, block), None)
        if descriptor is not None:
            _remove(self._path(view_id, block), descriptor)

    def refuse_rivals(self, view_ids: Iterable[int]) -> None:
        """Stop before any work where another job is writing these views.

        Raises:
            CacheError: a writer of another ``world_size``, or of the same rank, has locked a block
                of one of the views; names its pid and host, and the file.
        """
        requested = set(view_ids)
        for view_id, path in self._unheld_files():
            other = _read(path)
            sibling = other.world_size == self._owner.world_size and other.rank != self._owner.rank
            if view_id in requested and not sibling and path.exists():
                _remove(path, _lock(path, f"view {view_id}"))

    def remove_dead(self) -> None:
        """Delete the files of killed writers."""
        for _, path in self._unheld_files():
            descriptor = _try_lock(path)
            if descriptor is not None:
                _remove(path, descriptor)

    def close(self) -> None:
        """Release all locks."""
        for key in list(self._held):
            self.release(*key)

    def _path(self, view_id: int, block: int) -> Path:
        return self._folder / f".lock-view-{view_id:05d}-block-{block:07d}"

    def _unheld_files(self) -> list[tuple[int, Path]]:
        """(view, path) of the locks of other writers, alive or not."""
        held = {self._path(*key) for key in self._held}
        paths = sorted(self._folder.glob(".lock-view-*-block-*"))
        return [(int(path.name.split("-")[2]), path) for path in paths if path not in held]


def _lock(path: Path, what: str) -> int:
    """Descriptor of the locked, empty file.

    Raises:
        CacheError: another process keeps it locked.
    """
    deadline = time.monotonic() + RETRY_SECONDS
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise CacheError(
                f"{path}: {what} is being written by {_read(path)}; wait for it or end it"
            )
        time.sleep(0.02)
    return descriptor


def _try_lock(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                os.close(descriptor)
                if isinstance(error, (BlockingIOError, PermissionError)):
                    return None
                raise
            _warn_without_locks(path.parent, str(error))
        try:
            is_current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            is_current = False
        if is_current:
            os.ftruncate(descriptor, 0)
            _descriptors.add(descriptor)
            return descriptor
        os.close(descriptor)  # its last owner deleted it in between


@functools.cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    log.warning("%s: no locks here (%s): two jobs may do the same work", folder, reason)


def _remove(path: Path, descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.discard(descriptor)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _read(path: Path) -> Owner:
    try:
        with open(path, "rb") as file:
            owner = Owner(**json.loads(file.read(_MAX_FILE_BYTES)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return Owner()
    values, types = asdict(owner), asdict(Owner())
    right = all(type(values[name]) is type(types[name]) for name in types)
    return owner if right else Owner()


def _forget_in_child() -> None:
    """A forked process shares its parent's locks until it closes them: a loader's process must not
    keep the lock of a writer that was killed."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_forget_in_child)
