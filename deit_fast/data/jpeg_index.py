"""Which files DALI may decode: those whose pixels come out exactly as Pillow decodes them.

One broken file ends a DALI pipeline for good, so both decoders decode each file once before the
first pipeline is built. Plain JPEGs pass. All others (PNG, CMYK, 16 bits, animations, broken files,
and files on which the two disagree) are left to Pillow, which can also say what is wrong with them.

The results are stored by path, size and modification time in the user's cache folder, never beside
the images: `$XDG_CACHE_HOME/deit-fast/files/`, by default below `~/.cache`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from deit_fast.data.sources import Source, UnreadableImage, decode
from deit_fast.errors import InputError
from deit_fast.runtime.files import cache_folder, read_arrays, write_arrays
from deit_fast.runtime.locks import one_at_a_time

log = logging.getLogger("deit_fast")

_FORMAT = 1
_PART = 64  # files per task of a thread
_SECONDS_BETWEEN_LINES = 10.0


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
            "data.loader=dali-cpu and dali-gpu need NVIDIA DALI: pip install deit-fast[dali], or "
            "choose data.loader=pillow"
        ) from None
    except (ImportError, OSError) as error:
        raise InputError(f"NVIDIA DALI does not load: {error}") from None


@dataclass(frozen=True)
class FileIndex:
    """What is known of each file of a data set.

    Attributes:
        sizes: int32 [n, 2], width and height of the files that DALI may decode; 0 for the others.
        lengths: int64 [n], bytes of every file when it was checked.
    """

    sizes: np.ndarray
    lengths: np.ndarray

    def check(self, sample: int, encoded: bytes, path: str) -> None:
        """Decode a file by both decoders and store the result."""
        passes = decodes_like_pillow(encoded, path)
        self.sizes[sample] = header_size(encoded) if passes else 0
        self.lengths[sample] = len(encoded)

    def is_unchanged(self, sample: int, encoded: bytes) -> bool:
        """Whether length and header are those of the file that was checked."""
        size = tuple(self.sizes[sample].tolist())
        return len(encoded) == self.lengths[sample] and header_size(encoded) == size


def decodes_like_pillow(encoded: bytes, path: str) -> bool:
    """Whether DALI's decoder on the CPU gives Pillow's pixels."""
    if not encoded.startswith(b"\xff\xd8\xff"):
        return False
    try:
        image = decode(encoded, path)
    except UnreadableImage:
        return False
    with PIL.Image.open(io.BytesIO(encoded)) as header:
        if header.format != "JPEG" or header.mode not in ("RGB", "L"):
            return False
    if header_size(encoded) != image.size:
        return False
    pixels = _thread_decoder()(encoded)
    return pixels is not None and np.array_equal(pixels, np.asarray(image))


def header_size(encoded: bytes) -> tuple[int, int]:
    """Width and height in a JPEG's header, without decoding; (0, 0) if there is none.

    Takes two microseconds, so every read can check whether the file is still the same.
    """
    offset = 2
    while offset + 9 <= len(encoded) and encoded[offset] == 0xFF:
        marker = encoded[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", encoded, offset + 5)
            return width, height
        else:
            offset += 2 + int.from_bytes(encoded[offset + 2 : offset + 4], "big")
    return 0, 0


_thread = threading.local()


def _thread_decoder() -> Callable[[bytes], np.ndarray | None]:
    """This thread's decoder: bytes to uint8 [H, W, 3], or None."""
    if not hasattr(_thread, "decode"):
        from nvidia import nvimgcodec

        decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )
        parameters = nvimgcodec.DecodeParams(
            apply_exif_orientation=False, sample_format=nvimgcodec.SampleFormat.I_RGB
        )

        def decode_one(encoded: bytes) -> np.ndarray | None:
            image = decoder.decode(encoded, params=parameters)
            return None if image is None else np.asarray(image.cpu())

        _thread.decode = decode_one
    return _thread.decode


def index_files(source: Source, threads: int, folder: Path | None = None) -> FileIndex:
    """Check the files that no earlier call has checked.

    The first call costs about two decodes a file; under torchrun one process of a machine does it
    and the others wait. Unreadable files are checked again by every call.

    Args:
        threads: files at once.
        folder: where results are stored; none: the user's cache folder.
    """
    stamps = _stamps(source)
    path = (folder or cache_folder() / "files") / f"{_name(source)}.npz"
    with one_at_a_time(path.with_suffix(".lock"), "checks the same files"):
        index, is_known = _look_up(path, stamps)
        if not is_known.all():
            try:
                _check_files(source, index, is_known, threads)
            finally:  # also after an interruption
                _save(path, stamps[is_known], index.sizes[is_known], index.lengths[is_known])
    others = int((index.sizes[:, 0] == 0).sum())
    if others:
        log.info("%d of %d files are not plain JPEGs: Pillow decodes them", others, len(stamps))
    return index


def _check_files(source: Source, index: FileIndex, is_known: np.ndarray, threads: int) -> None:
    """Fill in the unknown files of the index."""

    def check(part: np.ndarray) -> int:
        for sample in part.tolist():
            try:
                encoded = source.read(sample)
            except UnreadableImage:
                continue
            index.check(sample, encoded, source.paths[sample])
            is_known[sample] = True
        return len(part)

    unknown = np.flatnonzero(~is_known)
    if len(unknown) > _PART:
        log.info("checking %d files for DALI, once for this data set", len(unknown))
    parts = [unknown[first : first + _PART] for first in range(0, len(unknown), _PART)]
    started = last_line = time.monotonic()
    done = 0
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="check-files")
    try:
        for count in pool.map(check, parts):
            done += count
            now = time.monotonic()
            if now - last_line > _SECONDS_BETWEEN_LINES:
                last_line, rate = now, done / (now - started)
                log.info(
                    "checked %d of %d files, %.0f files/s, %.0f s left",
                    done, len(unknown), rate, (len(unknown) - done) / rate,
                )  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# Results on disk
# ---------------------------------------------------------------------------------------------


def _stamps(source: Source) -> np.ndarray:
    """uint64 [n], a digest of path, size and modification time of each file.

    A member of an archive has no time, so the fingerprint of the data set takes its place.
    """
    stamps = np.empty(source.num_samples, np.uint64)
    whole: bytes | None = None
    for index in range(source.num_samples):
        path = source.paths[index]
        try:
            status = os.stat(path)
            text = b"%d %d" % (status.st_size, status.st_mtime_ns)
        except OSError:
            whole = whole or repr(sorted(source.fingerprint().items())).encode()
            text = whole
        digest = hashlib.blake2b(os.fsencode(os.path.abspath(path)) + b"\0" + text, digest_size=8)
        stamps[index] = int.from_bytes(digest.digest(), "little")
    return stamps


def _name(source: Source) -> str:
    ends = [os.path.abspath(source.paths[index]) for index in (0, -1)]
    return hashlib.blake2b(os.fsencode(os.path.commonpath(ends)), digest_size=16).hexdigest()


def _look_up(path: Path, stamps: np.ndarray) -> tuple[FileIndex, np.ndarray]:
    """The stored results, and for which files there are any, bool [n]."""
    count = len(stamps)
    index = FileIndex(np.zeros((count, 2), np.int32), np.zeros(count, np.int64))
    stored = _load(path)
    if stored is None:
        return index, np.zeros(count, bool)
    order = np.argsort(stored["stamps"])
    rows = np.searchsorted(stored["stamps"], stamps, sorter=order)
    rows = order[np.minimum(rows, len(order) - 1)]
    is_known = stored["stamps"][rows] == stamps
    index.sizes[is_known] = stored["sizes"][rows[is_known]]
    index.lengths[is_known] = stored["lengths"][rows[is_known]]
    return index, is_known


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """The stored results; None if they are missing, damaged or of other decoders."""
    dtypes = {"stamps": np.uint64, "sizes": np.int32, "lengths": np.int64, "sha256": np.uint8}
    try:
        stored = read_arrays(path, dtypes)
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError):
        stored = None
    if stored is not None:
        content = [stored[name] for name in ("stamps", "sizes", "lengths")]
        count = content[0].size
        shapes = [array.shape for array in content]
        fits = count > 0 and shapes == [(count,), (count, 2), (count,)]
        if fits and stored["sha256"].tobytes() == _sha256(*content):
            return stored
    log.warning("%s is damaged or of other decoders: checking the files again", path)
    return None


def _save(path: Path, stamps: np.ndarray, sizes: np.ndarray, lengths: np.ndarray) -> None:
    digest = np.frombuffer(_sha256(stamps, sizes, lengths), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, {"stamps": stamps, "sizes": sizes, "lengths": lengths, "sha256": digest})
    except OSError as error:
        log.warning("%s: %s: the files will be checked again next time", path, error.strerror)


def _sha256(*arrays: np.ndarray) -> bytes:
    """Of the arrays and the versions of both decoders."""
    from nvidia import nvimgcodec

    made_by = f"{_FORMAT} pillow {PIL.__version__} nvimgcodec {nvimgcodec.__version__}"
    digest = hashlib.sha256(made_by.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()
