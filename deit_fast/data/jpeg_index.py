"""Which files DALI may decode: those whose pixels come out exactly as Pillow decodes them.

One broken file ends a DALI pipeline for good, so both decoders decode each file once before DALI is
given it: at its first use, by the threads that read. Plain JPEGs pass. All others (PNG, CMYK, 16
bits, animations, broken files, and files on which the two disagree) are left to Pillow, which can
also say what is wrong with them.

The check is of the very bytes that are then decoded. A start checks nothing, and a run checks those
files alone that it uses; each process checks its own. The results are stored by path, size and
modification time in the user's cache folder, never beside the images:
`$XDG_CACHE_HOME/deit-fast/files/`, by default below `~/.cache`.
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
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL

from deit_fast.data.sources import Source, UnreadableImage, decode
from deit_fast.errors import InputError
from deit_fast.runtime.files import cache_folder, read_arrays, write_arrays
from deit_fast.runtime.locks import one_at_a_time

log = logging.getLogger("deit_fast")

_FORMAT = 1
_SECONDS_BETWEEN_SAVES = 300.0


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


_UNKNOWN, _STORED, _NEW, _REPLACED = range(4)


class FileIndex:
    """What is known of each file of a data set: by earlier runs, or since its first use in this.

    Threads may share it.

    Args:
        folder: where results are stored; none: the user's cache folder.

    Attributes:
        sizes: int32 [n, 2], width and height of the files that DALI may decode; 0 for those that it
            may not decode and for those that were not used yet.

    Raises:
        InputError: the source has no encoded images; something else than a file is in the place
            of the results.
        OSError: the machine cannot read the images.
    """

    def __init__(self, source: Source, folder: Path | None = None) -> None:
        with suppress(UnreadableImage):
            source.read(0)  # refuses a source of decoded pixels
        count = source.num_samples
        self.sizes = np.zeros((count, 2), np.int32)
        self._source, self._lengths = source, np.zeros(count, np.int64)
        self._stamps, self._states = np.zeros(count, np.uint64), np.full(count, _UNKNOWN, np.uint8)
        self._path = (folder or cache_folder() / "files") / f"{_name(source)}.npz"
        self._stored = _load(self._path) or _NOTHING
        self._saved, self._process, self._can_save = time.monotonic(), os.getpid(), True
        if len(self._stored["stamps"]) < count:
            log.info(
                "files that no run has used before are checked for DALI at their first use, which "
                "takes two more decodes of each"
            )

    def is_left_to_pillow(self, sample: int) -> bool:
        """Whether it is known that DALI may not decode the file, without reading it."""
        if self._states[sample] == _UNKNOWN:
            self._recall(sample)
        return bool(self._states[sample] != _UNKNOWN and self.sizes[sample, 0] == 0)

    def passes(self, sample: int, encoded: bytes) -> bool:
        """Whether DALI may decode these bytes of a file that is not left to Pillow.

        Decodes them by both decoders if the file is used for the first time or was replaced: a crop
        of the old size could leave a replaced image, and a few bytes can claim more pixels than
        there is memory.
        """
        is_known = self._states[sample] != _UNKNOWN
        size = tuple(self.sizes[sample].tolist())
        if is_known and len(encoded) == self._lengths[sample] and header_size(encoded) == size:
            return True
        passes = decodes_like_pillow(encoded, self._source.paths[sample])
        if is_known:
            self._states[sample] = _REPLACED  # first: its stamp is of the old file
        self.sizes[sample] = header_size(encoded) if passes else 0
        self._lengths[sample] = len(encoded)
        if not is_known:
            self._states[sample] = _NEW
        return passes

    def save_when_due(self) -> None:
        """Store new results, a few minutes after the last time."""
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Store new results beside those of other processes, and learn theirs."""
        self._saved = time.monotonic()
        new = np.flatnonzero(self._states == _NEW)
        if not len(new) or not self._can_save or os.getpid() != self._process:
            return
        own: dict[str, np.ndarray] = {
            "stamps": self._stamps[new], "sizes": self.sizes[new], "lengths": self._lengths[new]
        }  # fmt: skip
        is_same = self._states[new] == _NEW  # not replaced while it was copied
        new, own = new[is_same], {name: values[is_same] for name, values in own.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(self._path.with_suffix(".lock"), f"stores {self._path}"):
                self._stored = _merged(_load(self._path) or _NOTHING, own, self._source.num_samples)
                digest = np.frombuffer(_sha256(*self._stored.values()), np.uint8)
                write_arrays(self._path, self._stored | {"sha256": digest})
        except (OSError, InputError) as error:
            self._can_save = False
            log.warning("%s: the files will be checked again next time", error)
        self._states[new] = _STORED

    def close(self) -> None:
        """Store new results, and say how many files Pillow decodes."""
        self.save()
        used = self._states != _UNKNOWN
        others = int((used & (self.sizes[:, 0] == 0)).sum())
        if others:
            log.info(
                "%d of the %d files in use are not plain JPEGs: Pillow decodes them",
                others, int(used.sum()),
            )  # fmt: skip

    def _recall(self, sample: int) -> None:
        """Take over what an earlier run found. To be called before the file is read."""
        stamp = self._stamps[sample] = _stamp(self._source, sample)
        stored = self._stored
        row = int(np.searchsorted(stored["stamps"], stamp))
        if row < len(stored["stamps"]) and stored["stamps"][row] == stamp:
            self.sizes[sample] = stored["sizes"][row]
            self._lengths[sample] = stored["lengths"][row]
            self._states[sample] = _STORED


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


# ---------------------------------------------------------------------------------------------
# Results on disk
# ---------------------------------------------------------------------------------------------


_NOTHING: dict[str, np.ndarray] = {
    "stamps": np.zeros(0, np.uint64), "sizes": np.zeros((0, 2), np.int32),
    "lengths": np.zeros(0, np.int64),
}  # fmt: skip


def _stamp(source: Source, sample: int) -> np.uint64:
    """A digest of path, size and modification time of a file.

    A member of an archive has no time, so the fingerprint of the data set takes its place.
    """
    path = source.paths[sample]
    try:
        status = os.stat(path)
        text = b"%d %d" % (status.st_size, status.st_mtime_ns)
    except OSError:
        text = repr(sorted(source.fingerprint().items())).encode()
    digest = hashlib.blake2b(os.fsencode(os.path.abspath(path)) + b"\0" + text, digest_size=8)
    return np.uint64(int.from_bytes(digest.digest(), "little"))


def _name(source: Source) -> str:
    ends = [os.path.abspath(source.paths[index]) for index in (0, -1)]
    return hashlib.blake2b(os.fsencode(os.path.commonpath(ends)), digest_size=16).hexdigest()


def _merged(
    stored: dict[str, np.ndarray], own: dict[str, np.ndarray], num_samples: int
) -> dict[str, np.ndarray]:
    """Results by ascending stamp, one a stamp; those of replaced files go when they are many."""
    if len(stored["stamps"]) > 2 * num_samples:
        stored = _NOTHING
    both = {name: np.concatenate([own[name], stored[name]]) for name in _NOTHING}
    _, rows = np.unique(both["stamps"], return_index=True)
    return {name: values[rows] for name, values in both.items()}


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """Stored results by ascending stamp; None if missing, damaged or of other decoders."""
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
            order = np.argsort(content[0])
            return {name: stored[name][order] for name in _NOTHING}
    log.warning("%s is damaged or of other decoders: checking the files again", path)
    return None


def _sha256(*arrays: np.ndarray) -> bytes:
    """Of the arrays and the versions of both decoders."""
    from nvidia import nvimgcodec

    made_by = f"{_FORMAT} pillow {PIL.__version__} nvimgcodec {nvimgcodec.__version__}"
    digest = hashlib.sha256(made_by.encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()
