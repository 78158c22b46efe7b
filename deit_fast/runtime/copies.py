"""Local copies of what lies in object storage: their size, their last use, and how one is deleted.

Each process that uses a copy holds a shared lock on a file of it, so that a process that needs room
deletes only those that nobody uses.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from deit_fast.errors import InputError
from deit_fast.runtime.files import NO_FLOCK, open_shared


def allocated_bytes(path: Path) -> int:
    """That a file, which may have holes, takes on the disk; 0 if it is gone."""
    with suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def last_use(path: Path) -> int:
    """When ``hold`` was called last for a file, ns; 0 if it is gone."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def hold(path: Path) -> int:
    """Descriptor of a file of a copy, which may be new. The copy stays until it is closed.

    Raises:
        InputError: the path is not a regular file.
        OSError: names the path.
    """
    while True:
        descriptor = open_shared(path)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            except OSError as error:  # without locks nothing is deleted
                if error.errno not in NO_FLOCK:
                    raise
            os.utime(descriptor)
            if _is_same(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was deleted just before


def delete_unused(path: Path, delete: Callable[[], object]) -> bool:
    """Delete a copy that no process holds; returns whether it did.

    Args:
        path: the file that its users hold.
        delete: deletes the copy.
    """
    try:
        descriptor = open_shared(path)
    except (OSError, InputError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        delete()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False
