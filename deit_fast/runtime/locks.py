"""One owner of a file or of a folder, by flock(2) on a lock file.

The system releases a lock when its process ends, killed or not, on this host and over NFS. The text
of a lock file says who holds it. It is for messages only: process ids, host names and /proc decide
nothing, so containers and zombies need no rule of their own.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from deit_fast.errors import InputError
from deit_fast.runtime.files import NO_FLOCK

log = logging.getLogger("deit_fast")

RETRY_SECONDS = 1.0  # another process may hold a lock for a moment, to see whether it is held
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV)  # open(2): a link, folder, socket
_MAX_FILE_BYTES = 4096
_open: set[Lock] = set()  # of this process


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


class Lock:
    """A lock file that this process holds until ``release`` or its end.

    Raises:
        InputError: something else than a regular file is in its place.
        BlockingIOError: another process holds it.
        OSError: as from open(2).
    """

    def __init__(self, path: Path, what: str, owner: Owner) -> None:
        self.path, self._what = path, what
        self._descriptor = _open_file(path)
        _open.add(self)
        try:
            self._lock(owner)
        except BaseException:
            self._close()
            raise

    def _lock(self, owner: Owner) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # the answer of some network file systems
            raise BlockingIOError(error.errno, error.strerror, str(self.path)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            _warn_without_locks(self.path.parent, str(error))
        if not self.is_held():  # its last owner deleted it after it was opened here
            raise BlockingIOError(errno.EAGAIN, "deleted meanwhile", str(self.path))
        with suppress(OSError):  # a full disk: the text is missing, the lock holds
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps(asdict(owner)).encode())

    def is_held(self) -> bool:
        """Whether the file of this name is still the one that was locked."""
        if self not in _open:
            return False
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def require_held(self) -> None:
        """To be called before each write: costs two calls of stat(2).

        Raises:
            InputError: the file, or a folder above it, was moved, deleted or replaced.
        """
        if not self.is_held():
            raise InputError(
                f"{self.path} was moved, deleted or replaced while {self._what} was being written; "
                f"nothing more is written: start again, with the new name of a moved folder"
            )

    def release(self) -> None:
        """Delete the file and unlock it."""
        if self in _open:
            if self.is_held():
                self.path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        _open.discard(self)
        os.close(self._descriptor)


def acquire(
    path: Path, what: str, owner: Owner | None = None, creates_folder: bool = False
) -> Lock:
    """Lock a file, which is created where it is absent.

    Args:
        what: is written under this lock; for messages.
        owner: what the file says; none: this process.
        creates_folder: also where another process deletes it at this moment.

    Raises:
        InputError: another process keeps it locked; names its pid and host, and the file.
        OSError: as from open(2).
    """
    owner = owner or Owner(socket.gethostname(), os.getpid())
    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            if creates_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            return Lock(path, what, owner)
        except (FileNotFoundError, FileExistsError):  # the second one if mkdir lost a race
            if not creates_folder or path.parent.is_file() or time.monotonic() > deadline:
                raise
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{path}: {what} is being written by {read_owner(path)}; wait for it or end it"
                ) from None
        time.sleep(0.02)


@contextmanager
def owned_folder(folder: Path, name: str, what: str) -> Iterator[Lock]:
    """Own a folder by its lock file ``name`` while the block runs; raises as ``acquire``.

    The folder is created where it is absent, and deleted again if it is empty at the end.
    """
    is_new = not folder.exists()
    lock = acquire(folder / name, what, creates_folder=True)
    try:
        yield lock
    finally:
        is_owned = lock.is_held()
        lock.release()
        if is_new and is_owned:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def one_at_a_time(path: Path, what: str = "") -> Iterator[None]:
    """Run the block in one process of a machine at a time; the others wait.

    For work that only saves time: where the lock file cannot be made or locked, for example in a
    folder that is read-only, each process runs the block at once. The file stays.

    Args:
        path: of the lock file; its folder is created.
        what: the block does, such as `lists DIR`; for the line of a process that waits. Empty: a
            process waits without a line.
    """
    with ExitStack() as stack:
        with suppress(OSError, InputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_file(path)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if what:
                    log.info("waiting for another process, which %s", what)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def read_owner(path: Path) -> Owner:
    """Who locked the file last, as far as it says."""
    try:
        descriptor = _open_file(path, os.O_RDONLY)
    except (OSError, InputError):
        return Owner()
    try:
        owner = Owner(**json.loads(os.read(descriptor, _MAX_FILE_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return Owner()
    finally:
        os.close(descriptor)
    values, types = asdict(owner), asdict(Owner())
    right = all(type(values[name]) is type(types[name]) for name in types)
    return owner if right else Owner()


def _open_file(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        raise InputError(
            f"{path} belongs to another user: remove it if that user's job has ended"
        ) from None
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise InputError(f"{path} is not a regular file, so it cannot be a lock: remove it")


@functools.cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    log.warning("%s: no locks here (%s): start no second job in this folder", folder, reason)


def _forget_in_child() -> None:
    """A forked process shares its parent's locks until it closes them: a loader's process must not
    keep the lock of a writer that was killed."""
    for lock in list(_open):
        lock._close()


os.register_at_fork(after_in_child=_forget_in_child)
