"""The home of reading and writing files.

A written file is complete or absent: a locked temporary file, a sync, a rename. A file that is
written and read again carries a checksum of all its bytes, its seal. A reader opens regular files
only, so that a FIFO or a device in place of a file cannot make it wait.

numpy and the extension are imported late: `doctor` runs without them.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import operator
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from deit_fast.errors import InputError, printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without locks

# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def open_regular(path: str | Path, append: bool = False) -> BinaryIO:
    """Open a file for reading, or for writing at its end, without waiting.

    Raises:
        InputError: the path is not a regular file but a folder, FIFO, socket, device or a link to
            nothing.
        OSError: names the path.
    """
    access = os.O_WRONLY | os.O_APPEND if append else os.O_RDONLY
    if "\0" in str(path):
        raise InputError(f"{printable(path)} is no path: it holds a NUL character")
    try:
        descriptor = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (
            errno.ENXIO,
            errno.EISDIR,
        ):  # a socket, a FIFO without a reader, a folder
            _require_regular(path, os.stat(path).st_mode)
        _require_no_dangling_link(path)
        raise
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except InputError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "ab" if append else "rb")


def _require_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise InputError(f"{printable(path)} is {kind}, not a file: choose another path or remove it")


def _require_no_dangling_link(path: str | Path) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        target = printable(os.readlink(path))
        raise InputError(f"{printable(path)} is a link to {target}, which does not exist")


def open_shared(path: Path) -> int:
    """A descriptor to read and write a regular file that processes share; it may be new.

    Raises:
        InputError: the path is something else.
        OSError: names the path.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except InputError:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: str | Path, limit: int = 1 << 30) -> bytes:
    """The content of a regular file.

    Raises:
        InputError: as ``open_regular``, or the file has more than ``limit`` bytes.
        OSError: names the path.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise InputError(f"{printable(path)} has more than {limit} bytes")
        return file.read()


def map_file(path: str | Path) -> np.ndarray:
    """The bytes of a regular file, uint8 [n], mapped read-only: processes share their memory.

    For files that are replaced by a rename and never written to: a process that reads the mapping
    of a file that was shortened is killed.

    Raises:
        InputError: as ``open_regular``.
        OSError: names the path.
    """
    import mmap

    import numpy as np

    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:  # nothing can be mapped
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def require_replaceable(path: Path) -> None:
    """Raise InputError if ``path`` is there and is not a regular file, or is a link to nothing."""
    _require_no_dangling_link(path)
    if path.exists():
        _require_regular(path, path.stat().st_mode)


@contextmanager
def open_atomically(
    path: Path, publish: Callable[[Path, Path], None] = os.replace
) -> Iterator[BinaryIO]:
    """A new file, which replaces ``path``, or what a link there leads to, when the block ends.

    Args:
        publish: gives the complete file its name; os.link: only if no file has it.

    Raises:
        InputError: ``path`` is there and is not a regular file, or is a link to nothing.
        OSError: names ``path``; the old file, or none, is there, and no part of the new one.
    """
    require_replaceable(path)
    path = path.resolve() if path.is_symlink() else path
    temporary = None
    try:
        temporary, descriptor = _create_temporary(path)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            publish(temporary, path)  # before the file is closed, which would release its lock
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file; raises as ``open_atomically``."""
    with open_atomically(path) as file:
        file.write(content)


_KEPT = {
    "config.json", "result.json", "metrics.jsonl", "analysis.json", "trackers.json",
    "manifest.json", "model.safetensors", "ema.safetensors", "best.safetensors",
}  # fmt: skip


def require_writable(name: str, path: str | Path, *, is_folder: bool = True) -> None:
    """Find out, before the work for it starts, whether an output can be made. Changes nothing.

    Args:
        name: what the message calls it, such as the flag.
        path: folder or file; its parents need not exist.

    Raises:
        InputError: it cannot be written there, or a file of a run or a cache is there; says why.
    """
    import tempfile  # slow to import

    path = nearest = Path(path)
    try:
        if not is_folder:
            require_replaceable(path)
            if path.name in _KEPT and path.exists():
                raise InputError(f"{printable(path)} is of a run or a cache: choose another name")
        for nearest in [path, *path.absolute().parents][not is_folder :]:
            with suppress(FileNotFoundError):
                nearest.lstat()
                break
        with tempfile.TemporaryFile(dir=nearest):  # without a name, where the system can
            return
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except OSError as error:
        raise InputError(
            f"{name} {printable(path)}: {printable(nearest)} cannot be written "
            f"({error.strerror}); choose another path"
        ) from None


def create_atomically(path: Path, content: bytes) -> None:
    """Write a file unless there is one; of several processes that do so at once, one writes.

    Raises as ``open_atomically``.
    """
    with suppress(FileExistsError), open_atomically(path, os.link) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Make the names of new files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """The user's folder for data that can be recomputed: $XDG_CACHE_HOME/deit-fast.

    Without a home, as for a container's user without an account, it is one that cannot be made.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "deit-fast"
    try:
        return Path.home() / ".cache" / "deit-fast"
    except RuntimeError:
        return Path(os.devnull) / "deit-fast"


# ---------------------------------------------------------------------------------------------
# Seals
# ---------------------------------------------------------------------------------------------

SEAL_KEY, SEAL_ZEROS = "crc32c", "00000000"
# The seal, of which the digits become the CRC32C of the content with zeros in their place.
SEAL = f'"{SEAL_KEY}": "{SEAL_ZEROS}"'.encode()
_SEAL = re.compile(rb'"crc32c": ?"([0-9a-f]{8})"')
_CHUNK_BYTES = 1 << 22


def seal(content: bytes, end: int | None = None, crc: int = 0) -> list[bytes | memoryview]:
    """The content in parts, with the checksum in the digits of its last seal.

    Args:
        end: the seal is before this position.
        crc: of what stands before the content in the file.
    """
    match = _find_seal(content, end)
    assert match is not None
    start, stop = match.span(1)
    view = memoryview(content)
    return [view[:start], b"%08x" % crc32c(content, crc), view[stop:]]


def is_intact(content: bytes, end: int | None = None) -> bool | None:
    """Whether the checksum in the last seal before ``end`` is right; None where there is none."""
    match = _find_seal(content, end)
    if match is None:
        return None
    start, stop = match.span(1)
    view = memoryview(content)
    crc = crc32c(SEAL_ZEROS.encode(), crc32c(view[:start]))
    return crc32c(view[stop:], crc) == int(match[1], 16)


def has_seal(keys: Iterable[str]) -> bool:
    """Whether a seal is among the keys of an object, also one with a letter that was changed."""
    return any(
        len(key) == len(SEAL_KEY) and sum(map(operator.ne, key, SEAL_KEY)) <= 1 for key in keys
    )


def is_end_intact(file: BinaryIO) -> bool | None:
    """As ``is_intact`` of a file that ends with its seal; needs little memory."""
    size = max(0, file.seek(0, os.SEEK_END) - len(SEAL))
    file.seek(size)
    end = file.read()
    match = _SEAL.fullmatch(end)
    if match is None:  # a seal with a changed letter, or none
        letters = zip(end[:-9] + end[-1:], SEAL[:-9] + SEAL[-1:], strict=False)
        is_seal = len(end) == len(SEAL) and sum(one != other for one, other in letters) <= 1
        return False if is_seal else None
    file.seek(0)
    crc, chunk = 0, memoryview(bytearray(_CHUNK_BYTES))
    while size > 0 and (count := file.readinto(chunk[:size])):  # type: ignore[attr-defined]
        crc, size = crc32c(chunk[:count], crc), size - count
    return size == 0 and crc32c(SEAL, crc) == int(match[1], 16)


def _find_seal(content: bytes, end: int | None) -> re.Match[bytes] | None:
    match = None
    for match in _SEAL.finditer(content, 0, len(content) if end is None else end):  # noqa: B007
        pass
    return match


def crc32c(content: bytes | memoryview, crc: int = 0) -> int:
    """CRC32C of the content, or of more content whose first part has ``crc``."""
    from deit_fast._C import crc32c

    return crc32c(content, crc)


# ---------------------------------------------------------------------------------------------
# JSON and arrays
# ---------------------------------------------------------------------------------------------

_MAX_JSON_BYTES = 1 << 28
_MAX_ARRAYS_BYTES = 1 << 34


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON object atomically; its last key is the seal."""
    write_atomically(path, sealed_json(content))


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """An indented JSON object with a seal as its last key."""
    text = json.dumps({**content, SEAL_KEY: SEAL_ZEROS}, indent=2) + "\n"
    return b"".join(seal(text.encode()))


def read_json(path: Path, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, without its seal. A file without a seal is accepted.

    Raises:
        InputError: the file is damaged, or holds something else; names it and the remedy.
        OSError: names the path.
    """
    return parse_json(read_file(path, limit), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """As ``read_json`` of a file with this content; ``where`` starts the message."""
    values = parse_object(content, where)
    if has_seal(values) and not is_intact(content):
        raise InputError(
            f"{printable(where)} is damaged or was edited: its checksum differs; to use it as it "
            f"is, remove its line crc32c"
        )
    values.pop(SEAL_KEY, None)
    return values


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``content``; ``where`` starts the message of what is wrong with it.

    Raises:
        InputError: not UTF-8, not JSON, not an object, or a key twice.
    """
    where = printable(where)
    try:
        value = json.loads(content.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise InputError(f"{where} is damaged: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is damaged: {printable(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} is damaged: not a JSON object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`; a key that is there twice is a ValueError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return values


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file atomically; the zip format has a checksum for each array."""
    write_atomically(path, pack_arrays(arrays))


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of an .npz file; equal arrays give equal bytes."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def read_arrays(path: Path, dtypes: Mapping[str, npt.DTypeLike]) -> dict[str, np.ndarray]:
    """Named arrays of an .npz file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as ``open_regular``.
        OSError: names the path.
        ValueError: it is damaged, or an array is missing or has another dtype.
    """
    return parse_arrays(read_file(path, _MAX_ARRAYS_BYTES), str(path), dtypes)


def parse_arrays(
    content: bytes, path: str, dtypes: Mapping[str, npt.DTypeLike]
) -> dict[str, np.ndarray]:
    """As ``read_arrays`` of a file with this content; ``path`` starts the message."""
    import numpy as np

    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in dtypes}
    except Exception as error:  # numpy and zipfile raise nearly anything on a broken file
        raise ValueError(f"{path} is damaged: {printable(error)}") from None
    for name, dtype in dtypes.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"{path}: {name} must be {np.dtype(dtype)}, not {arrays[name].dtype}")
    return arrays


# ---------------------------------------------------------------------------------------------
# Temporary files
# ---------------------------------------------------------------------------------------------


def temporary_path(path: Path) -> Path:
    """An unused name beside ``path`` that nobody can predict."""
    return path.with_name(f".tmp-{os.urandom(8).hex()}.part")  # torch.save needs a suffix


def remove_orphans(folder: Path) -> None:
    """Delete temporary files of killed processes; they may be as large as a view of a cache.

    A process holds a lock on its temporary file while it writes. The system releases the lock when
    the process ends, on this host and over NFS. Without such locks nothing is deleted.
    """
    for path in folder.glob(".tmp-*"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            pass  # somebody writes it, or it cannot be deleted
        finally:
            os.close(descriptor)


def _create_temporary(path: Path) -> tuple[Path, int]:
    """Name and descriptor of a new, locked file beside ``path``."""
    while True:
        temporary = temporary_path(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process checks whether it is an orphan
            os.close(descriptor)
            continue
        except OSError as error:
            if error.errno not in NO_FLOCK:
                os.close(descriptor)
                raise
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # it was deleted as an orphan before it was locked
