"""Who writes which block: one lock file a block, sound on network file systems too.

A lock is a small JSON file beside the views that appears by link(2), which is exclusive on every
POSIX file system, NFS included. Its modification time is the heartbeat. All times are the file
system's own, read from files just touched, so the clocks of two hosts are never compared. Readers
ignore locks; the bytes of a cache never depend on them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit_fast.cache.format import temporary_path
from deit_fast.errors import CacheError
from deit_fast.runtime.environment import pid_namespace, process_start

log = logging.getLogger("deit_fast")

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0  # without a heartbeat; eight missed ones are no busy disk any more
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class Owner:
    """What a lock file says about the process that made it."""

    token: str  # random, of one lock
    host: str
    space: str  # machine boot and pid namespace; a pid means something only inside one
    pid: int
    started: int  # of the process, in ticks since boot: a pid may be used again
    rank: int
    world: int

    def __str__(self) -> str:
        share = f" (rank {self.rank} of {self.world})" if self.world > 1 else ""
        return f"pid {self.pid} on host {self.host}{share}"


class BlockLocks:
    """The locks of one writer, kept alive by a thread until they are released.

    Args:
        folder: of the cache.
        rank, world: the writer's share of the blocks. Writers of one ``world`` have disjoint ones.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        self._folder, self._rank, self._world = folder, rank, world
        self._held: dict[tuple[int, int], str] = {}  # token by (view, block)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, view_id: int, block: int) -> None:
        """Take the lock of a block, if need be from a writer that is dead.

        A lock of another host is watched for up to STALE_SECONDS, until it beats or is stale.

        Raises:
            CacheError: a live writer holds it; names host, pid, age and file.
        """
        if (view_id, block) in self._held:
            return
        path = self._path(view_id, block)
        owner = _this_process(self._rank, self._world)
        with self._temporary(path, owner) as temporary:
            while not _link(temporary, path):
                other = _read(path)
                if other is None:
                    continue  # released in between
                self._refuse_live(path, other, temporary, f"view {view_id} block {block}")
                if _replace(path, other, temporary):
                    log.warning("%s: taken over from %s, which is dead", path, other)
                    break
                time.sleep(0.01)  # another writer is taking it over
        self._held[view_id, block] = owner.token
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="cache locks", daemon=True)
            self._thread.start()

    def require_held(self, view_id: int, block: int) -> None:
        """Before a commit: this writer may have been stopped for so long that it counted as dead.

        Raises:
            CacheError: the lock was taken over.
        """
        path = self._path(view_id, block)
        now = _read(path)
        if now is None or now.token != self._held.get((view_id, block)):
            whom = "it was removed" if now is None else f"it was taken over by {now}"
            raise CacheError(f"{path}: this writer lost its lock: {whom}")

    def release(self, view_id: int, block: int) -> None:
        token = self._held.pop((view_id, block), None)
        if token is not None:
            self._remove(self._path(view_id, block), token)

    def refuse_rivals(self, view_ids: Iterable[int]) -> None:
        """Look for live writers of these views that may want this writer's blocks.

        Raises:
            CacheError: there is one; names host, pid, age and file.
        """
        wanted = set(view_ids)
        for path in self._locks():
            other = _read(path)
            if other is None or int(path.name.split("-")[2]) not in wanted:
                continue
            if other.world == self._world and other.rank != self._rank:
                continue
            if other.token not in self._held.values():
                with self._temporary(path, _this_process(self._rank, self._world)) as temporary:
                    self._refuse_live(path, other, temporary, f"view {path.name.split('-')[2]}")

    def remove_dead(self) -> None:
        """Delete the locks that killed writers left; those of other hosts once they are stale."""
        for path in self._locks():
            other = _read(path)
            if other is None or other.token in self._held.values():
                continue
            owner = _this_process(self._rank, self._world)
            with self._temporary(path, owner) as temporary:
                if _is_dead(path, other, temporary) and _replace(path, other, temporary):
                    self._remove(path, owner.token)
        for path in self._folder.glob(".takeover-*"):
            with contextlib.suppress(FileNotFoundError), self._temporary(path, None) as temporary:
                _remove_stale_guard(path, temporary)

    def close(self) -> None:
        """Release all; the thread ends."""
        self._stop.set()
        for key in list(self._held):
            self.release(*key)

    def _path(self, view_id: int, block: int) -> Path:
        return self._folder / f".lock-view-{view_id:05d}-block-{block:07d}"

    def _locks(self) -> list[Path]:
        return sorted(
            path
            for path in self._folder.glob(".lock-view-*-block-*")
            if path.name.split("-")[2].isdecimal()
        )

    @contextlib.contextmanager
    def _temporary(self, path: Path, owner: Owner | None) -> Iterator[Path]:
        temporary = temporary_path(path)
        try:
            temporary.write_text(json.dumps(vars(owner) if owner else None))
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _refuse_live(self, path: Path, other: Owner, temporary: Path, what: str) -> None:
        """Return when the lock's owner is dead or the lock is gone; raise when it is alive."""
        told = False
        first = _modified(path)
        while True:
            if _is_dead(path, other, temporary):
                return
            seen, now = _modified(path), _touch(temporary)
            if seen is None or getattr(_read(path), "token", "") != other.token:
                return  # released, or taken over by another writer: look again
            if other.space == pid_namespace() or seen != first:
                raise CacheError(
                    f"{path}: {what} is being written by {other}, last heartbeat "
                    f"{max(0.0, now - seen):.0f} s ago; wait for it or end it"
                )
            if not told:
                told = True
                log.warning("%s: waiting for a sign of life of %s", path, other)
            time.sleep(min(1.0, HEARTBEAT_SECONDS / 10))

    def _remove(self, path: Path, token: str) -> None:
        now = _read(path)
        if now is not None and now.token == token:
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for key in list(self._held):
                with contextlib.suppress(OSError):  # lost or released: the commit finds out
                    os.utime(self._path(*key))


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _link(temporary: Path, path: Path) -> bool:
    """Give the file its second name; over NFS an answer may be lost, the link count is not."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return os.stat(temporary).st_nlink == 2
    return True


def _replace(path: Path, dead: Owner, temporary: Path) -> bool:
    """Put ``temporary`` in the place of a dead owner's lock, unless somebody else is doing so.

    Its right to do so is a link named by the dead lock's token, which one process can have.
    """
    guard = path.with_name(f".takeover-{dead.token}")
    if not _link(temporary, guard):
        _remove_stale_guard(guard, temporary)
        return False
    try:
        now = _read(path)
        if now is None or now.token != dead.token:
            return False
        os.replace(temporary, path)
        return True
    finally:
        guard.unlink(missing_ok=True)


def _remove_stale_guard(guard: Path, temporary: Path) -> None:
    other = _read(guard)
    if other is not None and _is_dead(guard, other, temporary):
        guard.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """The owner of a lock; none where the file is gone. A torn file has an unknown owner."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return None
    unknown = Owner("unknown", "unknown", "", 0, 0, 0, 1)
    try:
        values: Any = json.loads(raw)
        owner = Owner(**values)
    except (ValueError, TypeError, RecursionError):
        return unknown
    right = all(type(value) is type(getattr(unknown, name)) for name, value in values.items())
    return owner if right and owner.token.isalnum() else unknown


def _is_dead(path: Path, owner: Owner, temporary: Path) -> bool:
    """Inside this process's own pid namespace by the pid, elsewhere by the heartbeat."""
    if owner.space and owner.space == pid_namespace():
        return process_start(owner.pid) != owner.started
    seen = _modified(path)
    return seen is not None and _touch(temporary) - seen >= STALE_SECONDS


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _touch(path: Path) -> float:
    """Now, by the clock of the file system."""
    os.utime(path)
    return path.stat().st_mtime


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def _this_process(rank: int, world: int) -> Owner:
    pid = os.getpid()
    started = process_start(pid)
    return Owner(
        secrets.token_hex(8), socket.gethostname(), pid_namespace(), pid, started or 0, rank, world
    )
