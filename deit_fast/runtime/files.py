"""Files that are complete or absent (a temporary name, a sync, a rename), and arrays in them."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_temporary_numbers = itertools.count()


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A new file, which replaces ``path`` when the block ends.

    Raises:
        OSError: names ``path``; the old file, or none, is there, and no part of the new one.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself must survive a power cut
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file; raises as ``open_atomically``."""
    with open_atomically(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def cache_folder() -> Path:
    """The user's folder for data that can be recomputed: $XDG_CACHE_HOME/deit-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deit-fast"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file atomically; the zip format has a checksum for each array."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(path, content.getbuffer())


def read_arrays(path: Path, dtypes: Mapping[str, npt.DTypeLike]) -> dict[str, np.ndarray]:
    """Named arrays of an .npz file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or an array is missing or has another dtype.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in dtypes}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name, dtype in dtypes.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"{path}: {name} must be {np.dtype(dtype)}, not {arrays[name].dtype}")
    return arrays


# ---------------------------------------------------------------------------------------------
# Temporary names
# ---------------------------------------------------------------------------------------------


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other process and no other call of this one uses."""
    pid = os.getpid()
    owner = f"{_namespace_digest()}-{pid}-{_process_start(pid) or 0}-{next(_temporary_numbers)}"
    return path.with_name(f".tmp-{owner}-{path.name}")


def remove_orphans(folder: Path) -> None:
    """Delete temporary files of killed processes; they may be as large as a view of a cache.

    Files of another boot, host or container stay: their process may be alive.
    """
    pattern = re.compile(rf"\.tmp-{_namespace_digest()}-(\d+)-(\d+)-")
    for path in folder.glob(".tmp-*"):
        owner = pattern.match(path.name)
        if owner and (_process_start(int(owner[1])) or 0) != int(owner[2]):
            path.unlink(missing_ok=True)


@functools.cache
def _namespace_digest() -> str:
    """Identifies the processes whose pids this process can see; random if the system hides it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        space = os.urandom(16).hex()
    return hashlib.sha256(space.encode()).hexdigest()[:12]


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), stat); None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
