"""Tar shards in WebDataset's naming, with an index, so that any sample can be read by its number.

    ROOT/SPLIT/*.tar      members KEY.jpg (or another image) and KEY.cls, the class as a number in
                          text, or KEY.json with a "label"
    ROOT/classes.txt      names of the classes, one a line (optional)

Samples are numbered by shard name, then by position. The index of a split is made once from the
shards' headers. It is stored as ROOT/SPLIT/.deit-fast-index.npz, or in the user's cache folder if
ROOT/SPLIT is read-only. It is made again when a shard's size, modification or change time differs:
a copy with the times of the original has another change time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deit_fast.data.shard_files import ShardFiles, require_distinct, stamps_of
from deit_fast.data.sources import (
    LeftOut,
    Paths,
    Source,
    equal_names,
    packed_path,
)
from deit_fast.data.tar_members import Member, members, read_content
from deit_fast.errors import InputError
from deit_fast.inputs import IMAGE_SUFFIXES
from deit_fast.runtime.files import (
    cache_folder,
    open_regular,
    read_arrays,
    read_file,
    unique_keys,
    write_arrays,
)
from deit_fast.runtime.progress import Progress

log = logging.getLogger("deit_fast")

_FORMAT = 3
_INDEX = ".deit-fast-index.npz"
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int64,
            "name_end": np.int64}  # fmt: skip
_IMAGES = {extension[1:].encode() for extension in IMAGE_SUFFIXES}
_LABELS = {b"cls", b"json"}
MAX_CLASSES = 1 << 20  # each has a name in memory
_MAX_LABEL_BYTES = 1 << 20  # a label file is short; a header that says otherwise is not believed
_USUAL_PADDING = 512 + 10240 + 512  # of the last member, the end marker and tar's usual record


class TarShards(Source):
    """Reads samples of tar shards by number.

    Raises:
        InputError: no shards, two names of one shard, a broken archive, an image without a label,
            a label out of range; names the shard and the member.
    """

    def __init__(self, root: str, split: str) -> None:
        self.folder = os.path.join(root, split)
        if not os.path.isdir(self.folder):
            raise InputError(f"{root} has no folder {split!r} of tar shards")
        self.shards, beside = [], LeftOut()
        for name in sorted(os.listdir(self.folder)):
            if name.endswith(".tar") and not name.startswith("."):
                self.shards.append(name)
            elif name != _INDEX:
                beside.add("files beside the shards", name)
        if not self.shards:
            raise InputError(f"{self.folder} holds no .tar files")
        files = [os.path.join(self.folder, name) for name in self.shards]
        require_distinct(files)
        stamps = stamps_of(files)
        index = _open_index(self.folder, self.shards, stamps)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        self.labels = index["label"]
        within = index["left_out"].tobytes().decode(errors="replace")
        self.left_out = "; ".join(filter(None, [str(beside), within]))
        self.paths = Paths(len(self.labels), partial(_member_path, self.folder, self.shards, index))
        if len(self.labels) == 0:
            raise InputError(f"the shards in {self.folder} hold no images")
        highest = int(self.labels.max())
        self.classes = class_names(root, highest)
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


def class_names(root: str, highest: int) -> list[str]:
    """The names in ROOT/classes.txt; without it the numbers up to ``highest``.

    Raises:
        InputError: the file cannot be read, or has an empty line.
    """
    path = Path(root) / "classes.txt"
    if not os.path.lexists(path):
        return [str(label) for label in range(highest + 1)]
    try:
        lines = read_file(path).decode().rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    names = [line.strip() for line in lines]
    if not all(names):
        raise InputError(f"{path}: line {names.index('') + 1} is empty; remove it or name a class")
    while (twice := equal_names(names)) is not None:  # as in lists of ImageNet's English names
        name, first, second = twice
        names[second] = f"{name} #{second}"
        log.warning(
            "%s: lines %d and %d both name class %r: the second is called %r",
            path, first + 1, second + 1, name, names[second],
        )  # fmt: skip
    return names


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
        stored = read_arrays(path, header | _COLUMNS | {"names": np.uint8, "left_out": np.uint8})
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        log.warning("%s; it is made again", error)
        return None
    current = (
        stored.pop("format").tolist() == _FORMAT
        and np.array_equal(stored.pop("shards"), _join(shards))
        and np.array_equal(stored.pop("stamps"), stamps)
    )
    if not current:
        return None
    columns = [stored[name] for name in _COLUMNS]
    shard, offset, size, label, name_end = columns
    fits = (
        {column.shape for column in columns} == {(label.size,)}
        and stored["names"].ndim == 1
        and ((shard >= 0) & (shard < len(shards))).all()
        and (offset >= 0).all() and (size >= 0).all()
        and ((label >= 0) & (label < MAX_CLASSES)).all()
        and (offset <= stamps[shard, 0] - size).all()
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
    left_out = LeftOut()
    with Progress(f"indexing {folder}", len(shards), unit="shard") as progress:
        for number, shard in enumerate(shards):
            rows = []
            for image, label in _samples(os.path.join(folder, shard), shard, left_out):
                names += image.name
                rows.append((number, image.offset, image.size, label, len(names)))
            parts.append(np.array(rows, np.int64).reshape(-1, len(_COLUMNS)))
            progress.advance()
    columns = zip(_COLUMNS.items(), np.concatenate(parts).T, strict=True)
    index = {name: column.astype(dtype) for (name, dtype), column in columns}
    texts = {"names": bytes(names), "left_out": str(left_out).encode()}
    return index | {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}


def _samples(path: str, shard: str, left_out: LeftOut) -> list[tuple[Member, int]]:
    """Image and label of each sample of a shard, in the order of the images.

    A key is a name without its last extension: `KEY.jpg` goes with `KEY.cls`, dots in KEY or not.
    """
    images: dict[bytes, Member] = {}
    labels: dict[bytes, list[Member]] = {}
    end = 0
    with open_regular(path) as file:
        for member in members(file, path):
            end = member.offset + member.size
            key, _, extension = member.name.rpartition(b".")
            is_image, is_label = extension.lower() in _IMAGES, extension.lower() in _LABELS
            name = f"{shard}/{os.fsdecode(member.name)}"
            if member.kind == "folder":
                continue
            if _is_hidden(member.name):
                left_out.add("hidden files", name)
            elif member.kind == "link" and (is_image or is_label):
                raise InputError(
                    f"{path}: {os.fsdecode(member.name)!r} is a link without content; write the "
                    f"archive with `tar --dereference --hard-dereference`"
                )
            elif member.kind != "file" or not (is_image or is_label):
                left_out.add(f"{member.kind}s that are no image and no label", name)
            elif is_label:
                labels.setdefault(key, []).append(member)
            elif key in images:
                raise InputError(f"{path}: {os.fsdecode(key)!r} has two images")
            else:
                images[key] = member
        if end == 0:
            raise InputError(f"{path} has no members; copy it again, or remove it")
        if os.fstat(file.fileno()).st_size - end > _USUAL_PADDING:
            left_out.add("ends of more zeros than tar writes: are the copies complete?", shard)
        return list(_labelled(file, path, shard, images, labels, left_out))


def _labelled(
    file: BinaryIO, path: str, shard: str,
    images: dict[bytes, Member], labels: dict[bytes, list[Member]], left_out: LeftOut,
) -> Iterator[tuple[Member, int]]:  # fmt: skip
    """The images that have a label.

    An image without one is an error, unless it is a further field of a sample: WebDataset reads
    `KEY.mask.png` as the field `mask.png` of KEY.
    """
    found = {key: _label(file, labels.get(key, []), path) for key in images}

    def is_field(key: bytes) -> bool:
        return any(found.get(owner) is not None for owner in _owners(key))

    for key, image in images.items():
        label = found[key]
        if label is not None:
            yield image, label
        elif is_field(key):
            left_out.add("further fields of samples", f"{shard}/{os.fsdecode(image.name)}")
        else:
            name = os.fsdecode(image.name)
            raise InputError(
                f"{path}: {name!r} has no label: neither .cls nor a label in .json beside it"
            )
    for key, files in labels.items():
        if key not in images:
            kind = "further fields of samples" if is_field(key) else "labels without a known image"
            left_out.add(kind, f"{shard}/{os.fsdecode(files[0].name)}")


def _owners(key: bytes) -> Iterator[bytes]:
    """The keys of which a name with dots may be a further field: a.b and a for a.b.c."""
    folder, slash, base = key.rpartition(b"/")
    while b"." in base:
        base = base.rpartition(b".")[0]
        yield folder + slash + base


def _is_hidden(name: bytes) -> bool:
    """Whether a part of the path is a dot file or dot folder, or what macOS adds to archives."""
    parts = name.split(b"/")
    return any((p.startswith(b".") and p not in (b".", b"..")) or p == b"__MACOSX" for p in parts)


def _label(file: BinaryIO, files: list[Member], path: str) -> int | None:
    """The class of one key from its .cls and .json; None where no file has one."""
    found = [(member.name, _class_number(file, member, path)) for member in files]
    labels = {label for _, label in found if label is not None}
    if len(labels) > 1:
        said = ", ".join(f"{os.fsdecode(name)!r} says {label}" for name, label in found)
        raise InputError(f"{path}: the labels of one image disagree: {said}")
    return labels.pop() if labels else None


def _class_number(file: BinaryIO, member: Member, path: str) -> int | None:
    name = os.fsdecode(member.name)
    if member.size > _MAX_LABEL_BYTES:
        raise InputError(f"{path}: {name!r} has {member.size} bytes, too many for a label")
    content = read_content(file, member)
    try:
        value = json.loads(content, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        value = content
    values = [value]
    if isinstance(value, dict):
        values = [value[key] for key in ("label", "cls") if value.get(key) is not None]
    if any(type(value) is not int or not 0 <= value < MAX_CLASSES for value in values):
        raise InputError(f"{path}: {name!r} must hold a class number, not {content[:40]!r}")
    if len(set(values)) > 1:
        raise InputError(f"{path}: {name!r} has a label and another cls: {values}")
    return values[0] if values else None
