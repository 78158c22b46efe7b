"""Where images come from: an image folder, or patterns computed from the sample id."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from deit_fast.config import DataConfig
from deit_fast.errors import InputError
from deit_fast.views.rng import philox

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class UnreadableImage(Exception):
    """A file that does not decode to an image."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)  # both, so that it survives pickling between processes
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"cannot read image {self.path}: {self.why}"


class Readable(Protocol):
    """Images by sample id.

    `load` gives RGB, 8 bits a channel. Of a `finished` source it gives whole views: the crop of the
    plan is not applied to them, flip, erasing and mixing are.
    """

    finished: bool
    paths: Sequence[str]

    @property
    def num_samples(self) -> int: ...

    def load(self, index: int) -> Image.Image | np.ndarray: ...


class Source(Readable, Protocol):
    """What loaders need of a data set."""

    classes: list[str]
    labels: np.ndarray

    def read(self, index: int) -> bytes: ...

    def fingerprint(self) -> dict[str, Any]: ...


def decode(encoded: bytes, path: str) -> Image.Image:
    """A file's image in RGB at full size; of an animation the first frame. EXIF turns nothing.

    Raises:
        UnreadableImage: whatever is wrong with it; names `path`.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()  # the whole file: no draft mode, which changes pixels
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise UnreadableImage(path, f"{type(error).__name__}: {error}") from None


class ImageFolder:
    """`root/split/<class>/**/<image>`; ids and labels in torchvision `ImageFolder`'s order.

    Classes are the folders' names, sorted. Folders and files whose name starts with a dot are left
    out. EXIF orientation is ignored, as torchvision does: the teacher was trained on such pixels.

    Args:
        classes: names in the order of their labels, where another split decides it; none: the
            folders of this split.

    Raises:
        InputError: no root, split, class folder or image, or a class that is not in `classes`.
    """

    finished = False

    def __init__(self, root: str, split: str, classes: list[str] | None = None) -> None:
        self.root, self.split = root, split
        expected = f"expected {os.path.join(root, split, '<class>', '<image>')}"
        if not os.path.isdir(root):
            raise InputError(f"image folder {root} does not exist; {expected}")
        self.folder = os.path.join(root, split)
        if not os.path.isdir(self.folder):
            raise InputError(f"image folder {root} has no split {split!r}; {expected}")
        found = _class_folders(self.folder)
        if not found:
            raise InputError(f"{self.folder} has no class folders; {expected}")
        self.classes = classes or found
        label_of = {name: label for label, name in enumerate(self.classes)}
        labels: list[int] = []
        names: list[bytes] = []
        for name in found:
            if name not in label_of:
                raise InputError(
                    f"{self.folder} has class {name!r}, which the training split lacks"
                )
            files = _image_files(self.folder, name)
            names += files
            labels += [label_of[name]] * len(files)
        if not names:
            raise InputError(
                f"{self.folder} has no images in its {len(found)} class folders; "
                f"expected {', '.join(EXTENSIONS)}"
            )
        self.labels = np.array(labels, np.int64)
        self.paths: Sequence[str] = PackedPaths(self.folder, names)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """Decode one file to RGB at full size; of an animation the first frame.

        Raises:
            UnreadableImage: whatever is wrong with the file.
        """
        return decode(self.read(index), self.paths[index])

    def read(self, index: int) -> bytes:
        """The file's bytes.

        Raises:
            UnreadableImage: it is missing or the disk does not give it.
        """
        path = self.paths[index]
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(path, f"{type(error).__name__}: {error}") from None

    def fingerprint(self) -> dict[str, Any]:
        """Digest over (relative path, byte size, class) of every file; no file is opened."""
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            path = self.paths[index]
            try:
                size = os.stat(path).st_size
            except OSError:
                size = -1
            relative = os.fsencode(os.path.relpath(path, self.folder))
            digest.update(b"%b\0%d\0%b\n" % (relative, size, os.fsencode(self.classes[label])))
        return source_fingerprint(digest.hexdigest(), self)


class PackedPaths(Sequence[str]):
    """Paths below one folder in a single buffer: 1.28 M of them take 50 MB instead of 200.

    A list of str would also be copied into every worker process, page by page, as reference counts
    change.
    """

    def __init__(self, folder: str, names: list[bytes]) -> None:
        self.folder = folder
        self.ends = np.cumsum([len(name) for name in names])
        self.buffer = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative and out-of-range indices as a list has them
        start = self.ends[index - 1] if index else 0
        name = self.buffer[start : self.ends[index]].tobytes()
        return os.path.join(self.folder, os.fsdecode(name))


class Synthetic:
    """Images computed from the sample id: no disk, no decoding, an upper bound for loader speed.

    A class is a direction and a colour of stripes; a sample is their phase and contrast, so a model
    can learn the classes. `load` returns the finished square, uint8 [S, S, 3]: the crop of the view
    is not applied, flip, erasing and mixing are.
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
        self.paths: Sequence[str] = _SyntheticPaths(num_samples)
        patterns = philox(np.arange(num_classes), 0, 0, 0, (0, 0))  # the same for every seed
        self._patterns = np.stack(patterns, axis=1)
        variations = philox(np.arange(num_samples), 0, 0, 1, (seed, 0))[:2]
        self._variations = np.stack(variations, axis=1)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

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

    def fingerprint(self) -> dict[str, Any]:
        values = (self.num_samples, len(self.classes), self.image_size, self.seed)
        text = "synthetic-1 " + " ".join(map(str, values))
        return source_fingerprint(hashlib.sha256(text.encode()).hexdigest(), self)


class _SyntheticPaths(Sequence[str]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        return f"synthetic/{range(self._count)[index]}"


def open_source(data: DataConfig, split: str, image_size: int) -> Source:
    """The training or held-out images of a configuration.

    Args:
        split: "train" or "val". Held-out labels follow the training split's classes where that
            split is on disk, so a class missing from the held-out images shifts no label.
        image_size: side of the synthetic images, pixels.
    """
    if split not in ("train", "val"):
        raise InputError(f"split must be 'train' or 'val', not {split!r}")
    if data.source == "synthetic":
        count = data.synthetic_samples if split == "train" else data.synthetic_samples // 4
        return Synthetic(count, data.synthetic_classes, image_size, seed=int(split == "val"))
    if data.root is None:
        raise InputError(
            f"data.root is not set; expected a folder with {data.train}/<class>/<image> and "
            f"{data.val}/<class>/<image>, or with shards (data.source)"
        )
    name = data.train if split == "train" else data.val
    if data.source == "packed":
        from deit_fast.data.packed import PackedImages

        return PackedImages(data.root, name)
    train = os.path.join(data.root, data.train)
    if data.source == "tar":
        from deit_fast.data.shards import TarShards

        if split == "train" or not os.path.isdir(train):
            return TarShards(data.root, name)
        return TarShards(data.root, name, TarShards(data.root, data.train).classes)
    if split == "train":
        return ImageFolder(data.root, name)
    classes = _class_folders(train) if os.path.isdir(train) else []
    return ImageFolder(data.root, name, classes or None)


def _class_folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}") from None


def _image_files(folder: str, name: str) -> list[bytes]:
    """Paths relative to `folder`, sorted as torchvision sorts them: by directory, then by name."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename}: {error.strerror}") from None

    files = []
    walk = os.walk(os.path.join(folder, name), onerror=refuse, followlinks=True)
    for directory, _, names in sorted(walk):
        relative = os.path.relpath(directory, folder)
        files += [
            os.fsencode(os.path.join(relative, item))
            for item in sorted(names)
            if item.lower().endswith(EXTENSIONS) and not item.startswith(".")
        ]
    return files


def cache_folder() -> Path:
    """Where this user's machine keeps what can be made again: $XDG_CACHE_HOME/deit-fast."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "deit-fast"


def source_fingerprint(digest: str, source: Source) -> dict[str, Any]:
    """What a cache must agree on about the data set."""
    return {
        "dataset.sha256": digest,
        "dataset.num_samples": source.num_samples,
        "dataset.num_classes": len(source.classes),
    }
