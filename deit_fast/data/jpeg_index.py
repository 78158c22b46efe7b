"""Which files DALI may decode: those of which its decoder makes the very pixels that Pillow makes.

One broken file ends a DALI pipeline for good, so each file is decoded once by both before the first
pipeline is built. Plain JPEGs pass. All others (PNG, CMYK, 16 bits, animations, broken files, and
what the two disagree about) are left to Pillow, which can also say what is wrong with them.

The verdicts are kept by path, size and modification time in the user's cache folder, never beside
the images: `$XDG_CACHE_HOME/deit-fast/files/`, by default below `~/.cache`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from deit_fast.data.sources import Source, UnreadableImage, decode
from deit_fast.errors import InputError
from deit_fast.runtime.files import cache_folder, write_atomically

log = logging.getLogger("deit_fast")

_FORMAT = 1
_PART = 64  # files per task of a thread
_JPEG = b"\xff\xd8\xff"
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class FileIndex:
    """What is known of each file of a data set.

    Attributes:
        sizes: int32 [n, 2], width and height of the files that DALI decodes; 0 for the others.
        lengths: int64 [n], bytes of those files; another length means that the file was replaced.
    """

    sizes: np.ndarray
    lengths: np.ndarray


def require_dali() -> None:
    """
    Raises:
        InputError: DALI is not installed, or does not load.
    """
    try:
        import nvidia.dali
        import nvidia.nvimgcodec  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            "data.loader=dali and dali-triton need NVIDIA DALI: pip install deit-fast[dali], or "
            "choose data.loader=pillow"
        ) from None
    except (ImportError, OSError) as error:
        raise InputError(f"NVIDIA DALI does not load: {error}") from None


def index_files(source: Source, threads: int, folder: Path | None = None) -> FileIndex:
    """Check the files that no earlier call has checked.

    The first takes about two decodes a file; under torchrun one process of a machine does it and
    the others wait. Files that cannot be read at all are checked again the next time.

    Args:
        threads: files at once.
        folder: where verdicts are kept; none: the user's cache folder.
    """
    folder = cache_folder() / "files" if folder is None else folder
    stamps = _stamps(source)
    path = folder / f"{_name(source)}.npz"
    with _lock(path):
        sizes, lengths, is_known = _look_up(path, stamps)
        if not is_known.all():
            try:
                _check(source, np.flatnonzero(~is_known), threads, sizes, lengths, is_known)
            finally:  # also what an interrupted check has found
                _save(path, stamps[is_known], sizes[is_known], lengths[is_known])
    others = int((sizes[:, 0] == 0).sum())
    if others:
        log.info("%d of %d files are no plain JPEGs: Pillow decodes them", others, len(sizes))
    return FileIndex(sizes, lengths)


def examine(encoded: bytes, path: str) -> tuple[int, int]:
    """Width and height, where DALI's decoder gives Pillow's pixels; else (0, 0)."""
    if not encoded.startswith(_JPEG):
        return 0, 0
    try:
        image = decode(encoded, path)
    except UnreadableImage:
        return 0, 0
    with PIL.Image.open(io.BytesIO(encoded)) as header:
        if header.format != "JPEG" or header.mode not in ("RGB", "L"):
            return 0, 0
    found = _decoder()(encoded)
    return image.size if found is not None and np.array_equal(found, np.asarray(image)) else (0, 0)


def header_size(encoded: bytes) -> tuple[int, int]:
    """Width and height that a JPEG's header promises, without decoding it; (0, 0) where none does.

    Two microseconds: a file can be asked at every reading whether it is still the one examined.
    """
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", encoded, at + 5)
            return width, height
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return 0, 0


_local = threading.local()


def _decoder() -> Any:
    """This thread's decoder: bytes to uint8 [H, W, 3], or None."""
    if not hasattr(_local, "decode"):
        from nvidia import nvimgcodec

        decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )
        as_it_is = nvimgcodec.DecodeParams(
            apply_exif_orientation=False, sample_format=nvimgcodec.SampleFormat.I_RGB
        )

        def decode_one(encoded: bytes) -> np.ndarray | None:
            image = decoder.decode(encoded, params=as_it_is)
            return None if image is None else np.asarray(image.cpu())

        _local.decode = decode_one
    return _local.decode


def _check(
    source: Source,
    wanted: np.ndarray,
    threads: int,
    sizes: np.ndarray,
    lengths: np.ndarray,
    is_known: np.ndarray,
) -> None:
    """Fill in the rows of the wanted files."""

    def check(part: np.ndarray) -> int:
        for index in part.tolist():
            try:
                encoded = source.read(index)
            except UnreadableImage:
                continue
            lengths[index], sizes[index] = len(encoded), examine(encoded, source.paths[index])
            is_known[index] = True
        return len(part)

    started = told = time.monotonic()
    done = 0
    if len(wanted) > _PART:
        log.info("checking %d files for DALI, once for this data set", len(wanted))
    parts = [wanted[first : first + _PART] for first in range(0, len(wanted), _PART)]
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="check-files")
    try:
        for count in pool.map(check, parts):
            done += count
            now = time.monotonic()
            if now - told > _SECONDS_BETWEEN_LINES:
                told, rate = now, done / (now - started)
                log.info(
                    "checked %d of %d files, %.0f files/s, %.0f s left",
                    done, len(wanted), rate, (len(wanted) - done) / rate,
                )  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# Verdicts on disk
# ---------------------------------------------------------------------------------------------


def _stamps(source: Source) -> np.ndarray:
    """uint64 [n], a digest of path, size and modification time of each file.

    A member of an archive has no time of its own: the data set's fingerprint stands in for it.
    """
    stamps = np.empty(source.num_samples, np.uint64)
    whole: bytes | None = None
    for index in range(source.num_samples):
        path = source.paths[index]
        try:
            facts = os.stat(path)
            text = b"%d %d" % (facts.st_size, facts.st_mtime_ns)
        except OSError:
            whole = whole or repr(sorted(source.fingerprint().items())).encode()
            text = whole
        digest = hashlib.blake2b(os.fsencode(os.path.abspath(path)) + b"\0" + text, digest_size=8)
        stamps[index] = int.from_bytes(digest.digest(), "little")
    return stamps


def _name(source: Source) -> str:
    ends = [os.path.abspath(source.paths[index]) for index in (0, -1)]
    return hashlib.blake2b(os.fsencode(os.path.commonpath(ends)), digest_size=16).hexdigest()


def _made_by() -> str:
    from nvidia import nvimgcodec

    return f"{_FORMAT} pillow {PIL.__version__} nvimgcodec {nvimgcodec.__version__}"


def _look_up(path: Path, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, lengths, and whether there is a verdict."""
    count = len(stamps)
    sizes, lengths = np.zeros((count, 2), np.int32), np.zeros(count, np.int64)
    stored = _load(path)
    if stored is None:
        return sizes, lengths, np.zeros(count, bool)
    order = np.argsort(stored["stamps"])
    places = np.searchsorted(stored["stamps"], stamps, sorter=order)
    places = order[np.minimum(places, len(order) - 1)]
    is_known = stored["stamps"][places] == stamps
    sizes[is_known] = stored["sizes"][places[is_known]]
    lengths[is_known] = stored["lengths"][places[is_known]]
    return sizes, lengths, is_known


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """The stored verdicts, or None where they are absent, damaged or of other decoders."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in ("stamps", "sizes", "lengths", "sha256")}
        content = (stored["stamps"], stored["sizes"], stored["lengths"])
        count = len(stored["stamps"])
        right = (
            count > 0
            and [array.dtype for array in content] == [np.uint64, np.int32, np.int64]
            and [array.shape for array in content] == [(count,), (count, 2), (count,)]
            and stored["sha256"].tobytes() == _digest(*content)
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        right = False
    if not right:
        log.warning("%s is damaged or of other decoders: checking the files again", path)
        return None
    return stored


def _save(path: Path, stamps: np.ndarray, sizes: np.ndarray, lengths: np.ndarray) -> None:
    digest = np.frombuffer(_digest(stamps, sizes, lengths), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, stamps=stamps, sizes=sizes, lengths=lengths, sha256=digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        log.warning("%s: %s: the files will be checked again next time", path, error.strerror)


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.sha256(_made_by().encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; where the folder cannot be written, each works for itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
