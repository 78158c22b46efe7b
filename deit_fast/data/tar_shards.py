"""Tar shards in WebDataset's naming, with an index, so that any sample can be read by its number.

    ROOT/SPLIT/*.tar      members KEY.jpg (or another image) and KEY.cls, the class as a number in
                          text, or KEY.json with a "label"; members of a key are adjacent
    ROOT/classes.txt      names of the classes, one a line (optional)

Samples are numbered by shard name, then by position. The index of a split is made once from the
shards' headers. It is stored as ROOT/SPLIT/.deit-fast-index.npz, or in the user's cache folder if
ROOT/SPLIT is read-only. It is made again when the size or modification time of a shard changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from deit_fast.data.shard_files import ShardFiles, stamps_of
from deit_fast.data.sources import EXTENSIONS, Paths, Source, packed_path
from deit_fast.errors import InputError
from deit_fast.runtime.files import cache_folder, read_arrays, write_arrays
from deit_fast.runtime.metrics import Progress

log = logging.getLogger("deit_fast")

_FORMAT = 1
_INDEX = ".deit-fast-index.npz"
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int64,
            "name_end": np.int64}  # fmt: skip
_MAX_LABEL_BYTES = 1 << 20  # a label file is short; a header that says otherwise is not believed


class TarShards(Source):
    """Reads samples of tar shards by number.

    Raises:
        InputError: no shards, a broken archive, an image without a label, a label out of range;
            names the shard and the member.
    """

    def __init__(self, root: str, split: str) -> None:
        self.folder = os.path.join(root, split)
        if not os.path.isdir(self.folder):
            raise InputError(f"{root} has no folder {split!r} of tar shards")
        self.shards = sorted(name for name in os.listdir(self.folder) if name.endswith(".tar"))
        if not self.shards:
            raise InputError(f"{self.folder} holds no .tar files")
        files = [os.path.join(self.folder, name) for name in self.shards]
        stamps = stamps_of(files)
        index = _open_index(self.folder, self.shards, stamps)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        self.labels = index["label"]
        self.paths = Paths(len(self.labels), partial(_member_path, self.folder, self.shards, index))
        if len(self.labels) == 0:
            raise InputError(f"the shards in {self.folder} hold no images")
        highest = int(self.labels.max())
        self.classes = _class_names(root, highest)
        if highest >= len(self.classes):
            where = self.paths[int(self.labels.argmax())]
            raise InputError(f"{where} is of class {highest}, but there are {len(self.classes)}")
        self._files = ShardFiles(files, stamps)

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            InputError: its shard was changed or replaced.
            OSError: its shard cannot be read.
        """
        number, offset = int(self._shard[index]), int(self._offset[index])
        return self._files.read(number, offset, int(self._size[index]))

    def _sha256(self) -> str:
        """Over shard, member, byte size and class of every image; reads no image."""
        digest = hashlib.sha256()
        sizes, labels = self._size.tolist(), self.labels.tolist()
        for path, size, label in zip(self.paths, sizes, labels, strict=True):
            name = os.fsencode(os.path.relpath(path, self.folder))
            digest.update(b"%b\0%d\0%b\n" % (name, size, os.fsencode(self.classes[label])))
        return digest.hexdigest()


def _member_path(folder: str, shards: list[str], index: dict[str, np.ndarray], number: int) -> str:
    """`FOLDER/SHARD.tar/MEMBER`."""
    shard = os.path.join(folder, shards[index["shard"][number]])
    return packed_path(shard, index["names"], index["name_end"], 0, number)


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


def _open_index(folder: str, shards: list[str], stamps: np.ndarray) -> dict[str, np.ndarray]:
    """The stored index of a split if it is current, else a new one."""
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    candidates = Path(folder) / _INDEX, cache_folder() / "tar" / f"{name}.npz"
    for path in candidates:
        index = _load_index(path, shards, stamps)
        if index is not None:
            return index
    index = _scan(folder, shards)
    header = {"format": np.array(_FORMAT), "shards": _join(shards), "stamps": stamps}
    for path in candidates:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, header | index)
        except OSError:
            continue
        return index
    log.warning(
        "the index of %s could not be written; the next start reads all shards again", folder
    )
    return index


def _load_index(path: Path, shards: list[str], stamps: np.ndarray) -> dict[str, np.ndarray] | None:
    """A stored index of exactly these shards; None if it is missing, outdated or damaged."""
    header = {"format": np.int64, "shards": np.uint8, "stamps": np.int64}
    try:
        stored = read_arrays(path, header | _COLUMNS | {"names": np.uint8})
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s; it is made again", error)
        return None
    current = (
        stored.pop("format") == _FORMAT
        and np.array_equal(stored.pop("shards"), _join(shards))
        and np.array_equal(stored.pop("stamps"), stamps)
    )
    if not current:
        return None
    columns = [stored[name] for name in _COLUMNS]
    shard, offset, size, label, name_end = columns
    fits = (
        {column.shape for column in columns} == {(len(label),)}
        and stored["names"].ndim == 1
        and ((shard >= 0) & (shard < len(shards))).all()
        and (offset >= 0).all() and (size >= 0).all() and (label >= 0).all()
        and (offset + size <= stamps[shard, 0]).all()
        and (np.diff(name_end, prepend=0) >= 0).all()
        and (len(label) == 0 or name_end[-1] == len(stored["names"]))
    )  # fmt: skip
    if not fits:
        log.warning("%s does not fit the shards beside it and is made again", path)
        return None
    return stored


def _join(names: list[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(map(os.fsencode, names)), np.uint8)


def _scan(folder: str, shards: list[str]) -> dict[str, np.ndarray]:
    """Read every shard's headers: minutes for a large set."""
    parts = []
    names = bytearray()
    with Progress(f"indexing {folder}", len(shards), unit="shard") as progress:
        for number, name in enumerate(shards):
            rows = []
            for member, offset, size, label in _samples(os.path.join(folder, name)):
                names += os.fsencode(member)
                rows.append((number, offset, size, label, len(names)))
            parts.append(np.array(rows, np.int64).reshape(-1, len(_COLUMNS)))
            progress.advance()
    columns = zip(_COLUMNS.items(), np.concatenate(parts).T, strict=True)
    index = {name: column.astype(dtype) for (name, dtype), column in columns}
    return index | {"names": np.frombuffer(bytes(names), np.uint8)}


def _samples(path: str) -> Iterator[tuple[str, int, int, int]]:
    """Member, offset and size in bytes, and label of each image in a shard."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, image, label = None, None, None
            for member in archive:
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                stem, dot, extension = os.path.basename(member.name).partition(".")
                this = os.path.join(os.path.dirname(member.name), stem)
                if this != key:
                    yield from _sample(path, image, label)
                    key, image, label = this, None, None
                if dot + extension.lower() in EXTENSIONS:
                    if image is not None:
                        raise InputError(f"{path}: {this!r} has two images")
                    image = member.name, member.offset_data, member.size
                elif extension in ("cls", "json"):
                    found = _label(archive, member, path)
                    label = found if found is not None else label
            yield from _sample(path, image, label)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a complete tar archive: {error}") from None


def _sample(
    path: str, image: tuple[str, int, int] | None, label: int | None
) -> Iterator[tuple[str, int, int, int]]:
    """The sample of one key, if the key has an image."""
    if image is None:
        return
    if label is None:
        raise InputError(f"{path}: {image[0]!r} has no label: neither .cls nor a label in .json")
    end = image[1] + image[2]
    if end > os.path.getsize(path):
        raise InputError(f"{path} is not a complete tar archive: it ends within {image[0]!r}")
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
            return None  # the key may have a .cls as well
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputError(f"{path}: {member.name!r} must hold a class number, not {content[:40]!r}")
    return value
