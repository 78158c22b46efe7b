"""Tar shards in WebDataset's naming, with an index, so that any sample can be read by its number.

    ROOT/SPLIT/*.tar      members KEY.jpg (or another image) and KEY.cls, the class as a number in
                          text, or KEY.json with a "label"; members of a key stand side by side
    ROOT/classes.txt      names of the classes, one a line (optional)

Samples are numbered by shard name, then by place. The index of a split is made once, by reading the
shards' headers, and kept as ROOT/SPLIT/.deit-fast-index.npz, or in the user's cache folder where
that cannot be written; a shard whose size or time of change differs is read again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_fast.data.sources import (
    EXTENSIONS,
    UnreadableImage,
    cache_folder,
    decode,
    source_fingerprint,
)
from deit_fast.errors import InputError
from deit_fast.runtime.files import write_atomically

log = logging.getLogger("deit_fast")

_FORMAT = 1
_INDEX = ".deit-fast-index.npz"
_MAX_LABEL_BYTES = 1 << 20  # a label file is short; a header that says otherwise is not believed
_SECONDS_BETWEEN_LINES = 10.0


class TarShards:
    """Reads samples of tar shards by number; fits where `ImageFolder` fits.

    Args:
        classes: names in the order of their labels, where another split decides it.

    Raises:
        InputError: no shards, a broken archive, an image without a label, a label out of range;
            names the shard and the member.
    """

    finished = False

    def __init__(self, root: str, split: str, classes: list[str] | None = None) -> None:
        self.folder = os.path.join(root, split)
        if not os.path.isdir(self.folder):
            raise InputError(f"{root} has no folder {split!r} of tar shards")
        self.shards = sorted(name for name in os.listdir(self.folder) if name.endswith(".tar"))
        if not self.shards:
            raise InputError(f"{self.folder} holds no .tar files")
        index = _open_index(self.folder, self.shards)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        self.labels = index["label"]
        self.paths: Sequence[str] = _Members(self.folder, self.shards, index)
        if len(self.labels) == 0:
            raise InputError(f"the shards in {self.folder} hold no images")
        highest = int(self.labels.max())
        self.classes = classes or _class_names(root, highest)
        if highest >= len(self.classes):
            where = self.paths[int(self.labels.argmax())]
            raise InputError(f"{where} is of class {highest}, but there are {len(self.classes)}")
        self._files: dict[int, int] = {}  # descriptors; forked processes may share them
        self._opening = threading.Lock()

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """Decode one image to RGB at full size.

        Raises:
            UnreadableImage: whatever is wrong with it.
        """
        return decode(self.read(index), self.paths[index])

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UnreadableImage: the shard is gone, or shorter than it was.
        """
        number, size = int(self._shard[index]), int(self._size[index])
        try:
            if number not in self._files:
                with self._opening:
                    if number not in self._files:
                        path = os.path.join(self.folder, self.shards[number])
                        self._files[number] = os.open(path, os.O_RDONLY)
            content = os.pread(self._files[number], size, int(self._offset[index]))
        except OSError as error:
            raise UnreadableImage(self.paths[index], f"{type(error).__name__}: {error}") from None
        if len(content) != size:
            raise UnreadableImage(self.paths[index], "its shard ends before it does")
        return content

    def __getstate__(self) -> dict[str, Any]:
        kept = self.__dict__ | {"_files": {}}  # a spawned process opens its own
        del kept["_opening"]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock())

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def fingerprint(self) -> dict[str, Any]:
        """Digest over (shard, member, byte size, class) of every image; no image is read."""
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            name = os.fsencode(os.path.relpath(self.paths[index], self.folder))
            digest.update(b"%b\0%d\0%b\n" % (name, int(self._size[index]),
                                             os.fsencode(self.classes[label])))  # fmt: skip
        return source_fingerprint(digest.hexdigest(), self)


class _Members(Sequence[str]):
    """`FOLDER/SHARD.tar/MEMBER` of every sample, for messages."""

    def __init__(self, folder: str, shards: list[str], index: dict[str, np.ndarray]) -> None:
        self._folder, self._shards, self._shard = folder, shards, index["shard"]
        self._names, self._ends = index["names"], index["name_end"]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        member = os.fsdecode(self._names[start : self._ends[index]].tobytes())
        return os.path.join(self._folder, self._shards[self._shard[index]], member)


def _class_names(root: str, highest: int) -> list[str]:
    path = Path(root) / "classes.txt"
    if not path.exists():
        return [str(label) for label in range(highest + 1)]
    try:
        names = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return [name.strip() for name in names if name.strip()]


# ---------------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------------


def _open_index(folder: str, shards: list[str]) -> dict[str, np.ndarray]:
    """The split's index: the kept one where it is right, with shards read anew where not."""
    stamps = np.array(
        [[(info := os.stat(os.path.join(folder, name))).st_size, info.st_mtime_ns]
         for name in shards], np.int64,
    )  # fmt: skip
    here = Path(folder) / _INDEX
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    elsewhere = cache_folder() / "tar" / f"{name}.npz"
    for path in (here, elsewhere):
        found = _load_index(path, shards, stamps)
        if found is not None:
            return found
    index = _scan(folder, shards)
    content = io.BytesIO()
    kept = {"format": np.int64(_FORMAT), "shards": _join(shards), "stamps": stamps, **index}
    np.savez(content, **kept)  # type: ignore[arg-type]
    for path in (here, elsewhere):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getbuffer())
        except OSError:
            continue
        return index
    log.warning("the index of %s could not be kept; the next start reads all shards again", folder)
    return index


def _load_index(path: Path, shards: list[str], stamps: np.ndarray) -> dict[str, np.ndarray] | None:
    """A kept index that is of these very shards; none where it is missing, old or damaged."""
    dtypes = {
        "shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int64,
        "name_end": np.int64, "names": np.uint8,
    }  # fmt: skip
    try:
        with np.load(path, allow_pickle=False) as arrays:  # a zip file: it has checksums
            kept = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s) and is made again", path, error)
        return None
    if not {*dtypes, "format", "shards", "stamps"} <= set(kept) or kept["format"] != _FORMAT:
        return None
    if not np.array_equal(kept["shards"], _join(shards)):
        return None
    if not np.array_equal(kept["stamps"], stamps):
        return None
    index = {name: kept[name] for name in dtypes}
    count = len(index["label"])
    fits = (
        all(index[name].dtype == dtype and index[name].ndim == 1 for name, dtype in dtypes.items())
        and all(len(index[name]) == count for name in dtypes if name != "names")
        and ((index["shard"] >= 0) & (index["shard"] < len(shards))).all()
        and (index["offset"] >= 0).all() and (index["size"] >= 0).all()
        and (index["offset"] + index["size"] <= stamps[index["shard"], 0]).all()
        and (index["label"] >= 0).all()
        and (np.diff(index["name_end"], prepend=0) >= 0).all()
        and (count == 0 or index["name_end"][-1] == len(index["names"]))
    )  # fmt: skip
    if not fits:
        log.warning("%s does not fit the shards beside it and is made again", path)
        return None
    return index


def _join(names: list[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(map(os.fsencode, names)), np.uint8)


def _scan(folder: str, shards: list[str]) -> dict[str, np.ndarray]:
    """Read every shard's headers, with a line now and then: a large set takes minutes."""
    shard, offset, size, label, ends = [], [], [], [], []
    names = bytearray()
    clock = time.monotonic()
    for number, name in enumerate(shards):
        for member, start, length, value in _samples(os.path.join(folder, name)):
            shard.append(number)
            offset.append(start)
            size.append(length)
            label.append(value)
            names += os.fsencode(member)
            ends.append(len(names))
        if time.monotonic() - clock > _SECONDS_BETWEEN_LINES:
            clock = time.monotonic()
            log.info("indexing %s: %d of %d shards", folder, number + 1, len(shards))
    return {
        "shard": np.array(shard, np.int32), "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64), "label": np.array(label, np.int64),
        "name_end": np.array(ends, np.int64), "names": np.frombuffer(bytes(names), np.uint8),
    }  # fmt: skip


def _samples(path: str) -> Iterator[tuple[str, int, int, int]]:
    """Of each image in a shard: member, offset and size in bytes, label."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, image, label = None, None, None
            for member in archive:
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                stem, dot, extension = os.path.basename(member.name).partition(".")
                this = os.path.join(os.path.dirname(member.name), stem)
                if this != key:
                    yield from _whole(path, image, label)
                    key, image, label = this, None, None
                if dot + extension.lower() in EXTENSIONS:
                    if image is not None:
                        raise InputError(f"{path}: {this!r} has two images")
                    image = member.name, member.offset_data, member.size
                elif extension in ("cls", "json"):
                    found = _label(archive, member, path)
                    label = found if found is not None else label
            yield from _whole(path, image, label)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} is no whole tar archive: {error}") from None


def _whole(
    path: str, image: tuple[str, int, int] | None, label: int | None
) -> Iterator[tuple[str, int, int, int]]:
    if image is None:
        return
    if label is None:
        raise InputError(f"{path}: {image[0]!r} has no label: neither .cls nor a label in .json")
    end = image[1] + image[2]
    if end > os.path.getsize(path):
        raise InputError(f"{path} is no whole tar archive: {image[0]!r} ends behind it")
    yield *image, label


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int | None:
    if member.size > _MAX_LABEL_BYTES:
        raise InputError(f"{path}: {member.name!r} has {member.size} bytes, too many for a label")
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
        if value is None:
            return None  # the .cls beside it may tell
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputError(f"{path}: {member.name!r} must hold a class number, not {content[:40]!r}")
    return value
