"""Where images come from: the interface of a source, and synthetic images."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import io
import logging
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_fast.errors import InputError, did_you_mean
from deit_fast.runtime.files import open_regular
from deit_fast.views.rng import philox

log = logging.getLogger("deit_fast")

_IMAGES_DIGESTED = 32  # of a split, at each start of a run: a fraction of a second


# What one file can be to blame for: it is missing, or may not be read. All else is the machine's.
_ERRORS_OF_A_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV
}  # fmt: skip
_DECODER_BYTES = 16  # a pixel: decoders' own copies included


class UnreadableImage(Exception):
    """A file that is missing, forbidden or no image: what a loader may substitute.

    Errors of the machine (memory, descriptors, disk, mount) are never this one.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)  # both, so that it survives pickling between processes
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"cannot read image {self.path}: {self.why}"


def decode(encoded: bytes, path: str) -> Image.Image:
    """A file's image in RGB at full size, the first frame of an animation. EXIF rotates nothing.

    Raises:
        UnreadableImage: the decoder refuses it, or it has more pixels than Pillow accepts
            (2 * `PIL.Image.MAX_IMAGE_PIXELS`); names `path`.
        OSError: ENOMEM, memory ran out; names `path`.
    """
    width = height = 0
    try:
        with _counted_warnings(), Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            image.load()  # the whole file, not draft mode, which changes pixels
            return in_rgb(image)
    except Image.UnidentifiedImageError:  # its text is the address of the buffer
        raise UnreadableImage(path, "UnidentifiedImageError: no format of an image") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        if "DataLoader worker" in str(error):  # from torch's signal handler, which runs anywhere
            raise
        # Some decoders call a lack of memory a broken file.
        if encoded[8:12] == b"WEBP" and not width:
            width, height = _webp_size(encoded)
        if isinstance(error, MemoryError) or not _is_free(width * height * _DECODER_BYTES):
            raise out_of_memory(path, f"this image of {width} x {height} pixels") from None
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from None


# Images of which Pillow has warned. Processes that are forked later count here too; an image that
# two of them count at once may count as one.
_warned = RawValue(ctypes.c_int64)


@contextmanager
def _counted_warnings() -> Iterator[None]:
    """Count warnings instead of printing them, for each image and in each process again.

    Python's filters are one for all threads: other threads than the main one leave them alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    _warned.value += bool(caught)


def say_warnings() -> None:
    """One line about the images of which Pillow has warned since the last one."""
    count, _warned.value = _warned.value, 0
    if count:
        log.warning(
            "Pillow warned at about %d readings of images, of their metadata, palette or size; "
            "they were read", count,
        )  # fmt: skip


def in_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Width and height in a WebP file's header; 0 where Pillow would refuse so many pixels.

    Pillow allocates the pixels before it says how many there are.
    """
    if encoded[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(encoded[at : at + 3], "little") for at in (24, 27))
    elif encoded[12:16] == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(encoded[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    most = Image.MAX_IMAGE_PIXELS
    return (0, 0) if most is not None and width * height > 2 * most else (width, height)


def _is_free(length: int) -> bool:
    """Whether so many bytes can be allocated."""
    try:
        np.empty(length, np.uint8)
    except MemoryError:
        return False
    return True


def out_of_memory(path: str, what: str) -> OSError:
    """The error of a file that does not fit the memory."""
    text = f"out of memory while reading {what}: try fewer data.workers"
    return OSError(errno.ENOMEM, text, path)


class Source(ABC):
    """The images of one split by sample id.

    Attributes:
        classes: names in the order of the labels.
        labels: int64 [num_samples].
        paths: where each image comes from, for messages.
        folder: of the split, for messages.
        left_out: what the split holds beside its samples, with counts; empty if nothing.
        finished: whether `load` returns whole views. The plan's crop and augmentation are then not
            applied; flip, erasing and mixing are.
    """

    classes: list[str]
    labels: np.ndarray
    paths: Sequence[str]
    folder: str | Path = "the data set"
    left_out = ""
    finished = False

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UnreadableImage: it is missing or forbidden.
            OSError: the machine cannot read it; names the file.
            InputError: the file that holds it was changed.
        """

    def fetch(self, samples: Sequence[int]) -> None:  # noqa: B027
        """Request these samples at once, before each is read: for sources on a network."""

    def load(self, index: int) -> Image.Image | np.ndarray:
        """The image in RGB, 8 bits a channel, at full size.

        Raises:
            UnreadableImage: it is missing, forbidden or no image.
            OSError, InputError: as `read`; ENOMEM also while it is decoded.
        """
        return decode(self.read(index), self.paths[index])

    def follow(self, classes: Sequence[str], owner: str) -> None:
        """Number the labels by the positions of their classes' names in ``classes``.

        Args:
            owner: what decides the classes, for the message.

        Raises:
            InputError: a class with images has a name that is not in ``classes``, or is there
                twice.
        """
        if list(classes) == self.classes:
            return
        position = {name: label for label, name in enumerate(classes)}
        used = [self.classes[label] for label in np.unique(self.labels).tolist()]
        unknown = [name for name in used if name not in position]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise InputError(
                f"{self.folder} has class {unknown[0]!r}{more}, which {owner} lacks"
                f"{did_you_mean(unknown[0], classes)}: rename the folder, or remove it"
            )
        for names in (classes, self.classes):
            twice = [name for name in used if list(names).count(name) > 1]
            if twice:
                raise InputError(
                    f"{self.folder}: the class name {twice[0]!r} stands for two labels, and the "
                    f"classes are not those of {owner}"
                )
        self.labels = np.array([position.get(name, -1) for name in self.classes])[self.labels]
        self.classes = list(classes)

    def fingerprint(self) -> dict[str, Any]:
        """What two users of a cache must agree on about the data set; decodes no image."""
        return {
            "dataset.sha256": self._digest,
            "dataset.num_samples": self.num_samples,
            "dataset.num_classes": len(self.classes),
        }

    @functools.cached_property
    def _digest(self) -> str:
        return self._sha256()

    @abstractmethod
    def _sha256(self) -> str: ...


def digest_images(source: Source) -> dict[str, str]:
    """BLAKE2b-128, in hex, of the pixels of a few whole images, by path below the split.

    The images are evenly spaced over the split, and so over its classes. One that cannot be read is
    left out.
    """
    digests = {}
    count = min(_IMAGES_DIGESTED, source.num_samples)
    for index in (np.arange(count) * source.num_samples // count).tolist():
        try:
            pixels = np.asarray(source.load(index))
        except UnreadableImage:
            continue
        digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
        digest.update(pixels.tobytes())
        digests[os.path.relpath(source.paths[index], source.folder)] = digest.hexdigest()
    return digests


class Paths(Sequence[str]):
    """Paths that are computed on request.

    A list of 1.28 M strings takes 200 MB, and every worker process would copy it page by page as
    reference counts change.

    Args:
        path_of: the path of an index in [0, count); can be pickled.
    """

    def __init__(self, count: int, path_of: Callable[[int], str]) -> None:
        self._count, self._path_of = count, path_of

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._path_of(item) for item in range(*index.indices(self._count))]
        return self._path_of(range(self._count)[index])  # IndexError and negatives as in a list


def packed_path(folder: str, names: np.ndarray, ends: np.ndarray, gap: int, index: int) -> str:
    """A path below a folder whose names are in one buffer.

    Args:
        names: uint8, one name after another.
        ends: integers [n], where each name ends.
        gap: bytes between two names.
    """
    start = ends[index - 1] + gap if index else 0
    return f"{folder}/{os.fsdecode(names[start : ends[index]].tobytes())}"


def read_image_file(path: str) -> bytes:
    """The encoded image in a file.

    Raises:
        UnreadableImage, OSError: as ``Source.read``.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except InputError:  # a folder, FIFO or device, or a link to nothing
        raise UnreadableImage(path, "InputError: there is no regular file") from None
    except MemoryError:
        raise out_of_memory(path, "this file") from None
    except OSError as error:
        # Without its folder it is a lost mount or a changed data set, not one bad file.
        folder = os.path.dirname(path) or os.curdir
        if error.errno in _ERRORS_OF_A_FILE and os.path.isdir(folder):
            raise UnreadableImage(path, f"{type(error).__name__}: {error.strerror}") from None
        raise OSError(error.errno, error.strerror, path) from None


def equal_names(names: Sequence[str]) -> tuple[str, int, int] | None:
    """The first name that occurs twice, with its first two positions; None if all differ."""
    positions: dict[str, int] = {}
    for position, name in enumerate(names):
        first = positions.setdefault(name, position)
        if first != position:
            return name, first, position
    return None


class Synthetic(Source):
    """Images computed from the sample id: no disk and no decoder, an upper bound of loader speed.

    A class is a direction and a colour of stripes, a sample their phase and contrast, so a model
    can learn the classes. `load` returns a finished square, uint8 [S, S, 3].
    """

    finished = True

    def __init__(self, num_samples: int, num_classes: int, image_size: int, seed: int = 0) -> None:
        if min(num_samples, num_classes, image_size) < 1:
            raise InputError(
                f"synthetic data needs samples, classes and pixels, not {num_samples}, "
                f"{num_classes} and {image_size}"
            )
        self.image_size, self.seed = image_size, seed
        self.classes = [f"class-{label}" for label in range(num_classes)]
        self.labels = np.arange(num_samples, dtype=np.int64) % num_classes
        self.paths = Paths(num_samples, "synthetic/{}".format)
        patterns = philox(np.arange(num_classes), 0, 0, 0, (0, 0))  # the same for every seed
        self._patterns = np.stack(patterns, axis=1)
        variations = philox(np.arange(num_samples), 0, 0, 1, (seed, 0))[:2]
        self._variations = np.stack(variations, axis=1)

    def load(self, index: int) -> np.ndarray:
        """uint8 [S, S, 3]."""
        pattern = self._patterns[self.labels[index]].tolist()
        phase, contrast = self._variations[index].tolist()
        axis = np.arange(self.image_size)
        across, down = (256 * (1 + word % 8) / self.image_size for word in pattern[:2])
        ramp = (axis * across).astype(np.uint8)[None, :] + (axis * down).astype(np.uint8)[:, None]
        ramp += np.uint8(phase & 255)
        wave = 2 * np.abs(np.arange(256) - 128)  # 0..256
        wave = wave * (128 + contrast % 128) // 256
        colour = [(pattern[2] >> shift) & 255 for shift in (0, 8, 16)]
        palette = np.minimum(wave[:, None] * 3 // 4 + np.array(colour) // 4, 255).astype(np.uint8)
        return np.take(palette, ramp, axis=0)

    def read(self, index: int) -> bytes:
        raise UnreadableImage(self.paths[index], "synthetic images have no file")

    def _sha256(self) -> str:
        values = (self.num_samples, len(self.classes), self.image_size, self.seed)
        text = "synthetic-1 " + " ".join(map(str, values))
        return hashlib.sha256(text.encode()).hexdigest()
