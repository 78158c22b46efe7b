"""Tar shards in WebDataset's naming, with an index, so that any sample can be read by its number.

    ROOT/SPLIT/*.tar      members KEY.jpg (or another image) and KEY.cls, the class as a number in
                          text, or KEY.json with a "label"
    ROOT/classes.txt      names of the classes, one a line (optional)

Samples are numbered by shard name, then by position. The index of a split is made once from the
shards' headers. It is stored as ROOT/SPLIT/.deit-fast-index.npz, or in the user's cache folder if
ROOT/SPLIT is read-only. It is made again when a shard's size, modification or change time differs:
a copy with the times of the original has another change time.

ROOT may be a URL: see `remote_tar`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from deit_fast.data.classes import class_names
from deit_fast.data.left_out import LeftOut
from deit_fast.data.remote_shards import Extents, RemoteShards, open_copy, without_etags
from deit_fast.data.remote_tar import list_shards, open_index
from deit_fast.data.shard_files import ShardFiles, require_distinct, stamps_of
from deit_fast.data.sources import (
    Paths,
    Source,
    packed_path,
)
from deit_fast.data.tar_index import COLUMNS, TEXTS, combine, fits, join_names, samples_of
from deit_fast.errors import InputError
from deit_fast.runtime.files import (
    cache_folder,
    open_regular,
    read_arrays,
    write_arrays,
)
from deit_fast.runtime.progress import Progress
from deit_fast.storage.objects import Objects
from deit_fast.storage.urls import is_url, join

log = logging.getLogger("deit_fast")

_FORMAT = 3
_INDEX = ".deit-fast-index.npz"
_LINES = 4096  # of the fingerprint, hashed at once


class TarShards(Source):
    """Reads samples of tar shards by number.

    Args:
        root: a folder, or a URL.
        split: of the data set.
        copy_bytes: of samples that are kept on this machine, if ``root`` is a URL.

    Raises:
        InputError: no shards, two names of one shard, a broken archive, an image without a label,
            a label out of range; names the shard and the member.
    """

    def __init__(self, root: str, split: str, copy_bytes: int = 0) -> None:
        self._remote: RemoteShards | None = None
        if is_url(root):
            beside, index = self._open_remote(root, split, copy_bytes)
        else:
            beside, index = self._open_local(root, split)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        self._names, self._name_end = index["names"], index["name_end"]
        self.labels = index["label"]
        within = index["left_out"].tobytes().decode(errors="replace")
        self.left_out = "; ".join(filter(None, [str(beside), within]))
        path_of = partial(_member_path, str(self.folder), self.shards, index)
        self.paths = Paths(len(self.labels), path_of)
        if len(self.labels) == 0:
            raise InputError(f"the shards in {self.folder} hold no images")
        highest = int(self.labels.max())
        self.classes = class_names(root, highest)
        if highest >= len(self.classes):
            where = self.paths[int(self.labels.argmax())]
            raise InputError(f"{where} is of class {highest}, but there are {len(self.classes)}")

    def _open_local(self, root: str, split: str) -> tuple[LeftOut, dict[str, np.ndarray]]:
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
        self._files = ShardFiles(files, stamps)
        return beside, _open_index(self.folder, self.shards, stamps)

    def _open_remote(
        self, root: str, split: str, copy_bytes: int
    ) -> tuple[LeftOut, dict[str, np.ndarray]]:
        objects, beside = Objects(join(root, split)), LeftOut()
        self.folder = str(objects)
        stamps = list_shards(objects, beside)
        if not stamps:
            raise InputError(f"{objects} holds no .tar objects")
        if not all(stamp.etag for stamp in stamps.values()):
            log.warning("%s", without_etags(objects))
        self.shards = [*stamps]
        index = open_index(objects, stamps)
        extents = Extents(index["shard"], index["offset"], index["size"], index["crc32c"])
        copy = open_copy(root, split, stamps, copy_bytes)
        self._remote = RemoteShards(objects, stamps, extents, copy)
        return beside, index

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            InputError: its shard was changed or replaced.
            UnreadableImage: an object's bytes are not those of its index.
            OSError: its shard cannot be read, or was replaced in object storage.
        """
        if self._remote is not None:
            return self._remote.read(index, self.paths[index])
        number, offset = int(self._shard[index]), int(self._offset[index])
        return self._files.read(number, offset, int(self._size[index]))

    def fetch(self, samples: Sequence[int]) -> None:
        if self._remote is not None:
            self._remote.fetch(samples)

    def _sha256(self) -> str:
        """Over shard, member, byte size and class of every image; reads no image."""
        digest = hashlib.sha256()
        names = self._names.tobytes()
        classes = [os.fsencode(name) for name in self.classes]
        shards = [os.fsencode(name) for name in self.shards]
        for first in range(0, len(self.labels), _LINES):
            part = slice(first, first + _LINES)
            columns = (self._shard, self._name_end, self._size, self.labels)
            rows = zip(*(column[part].tolist() for column in columns), strict=True)
            start, lines = int(self._name_end[first - 1]) if first else 0, []
            for shard, end, size, label in rows:
                name = self._name_below(shards[shard], names[start:end])
                lines.append(b"%b\0%d\0%b\n" % (name, size, classes[label]))
                start = end
            digest.update(b"".join(lines))
        return digest.hexdigest()

    def _name_below(self, shard: bytes, member: bytes) -> bytes:
        """`SHARD.tar/MEMBER` as a path below the folder, without `.`, `..` and empty parts."""
        name = b"%b/%b" % (shard, member)
        if b"//" in name or b"/." in name or name.endswith(b"/"):
            folder = os.fsencode(self.folder)
            return os.path.relpath(b"%b/%b" % (folder, name), folder)
        return name


def _member_path(folder: str, shards: list[str], index: dict[str, np.ndarray], number: int) -> str:
    """`FOLDER/SHARD.tar/MEMBER`."""
    shard = os.path.join(folder, shards[index["shard"][number]])
    return packed_path(shard, index["names"], index["name_end"], 0, number)


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
    header = {"format": np.array(_FORMAT), "shards": join_names(shards), "stamps": stamps}
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
        stored = read_arrays(path, header | COLUMNS | TEXTS)
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        log.warning("%s; it is made again", error)
        return None
    current = (
        stored.pop("format").tolist() == _FORMAT
        and np.array_equal(stored.pop("shards"), join_names(shards))
        and np.array_equal(stored.pop("stamps"), stamps)
    )
    if not current:
        return None
    if not fits(stored, stamps[:, 0]):
        log.warning("%s does not fit the shards beside it and is made again", path)
        return None
    return stored


def _scan(folder: str, shards: list[str]) -> dict[str, np.ndarray]:
    """Read every shard's headers: minutes for a large set."""
    found, left_out = [], LeftOut()
    with Progress(f"indexing {folder}", len(shards), unit="shard") as progress:
        for shard in shards:
            path = os.path.join(folder, shard)
            with open_regular(path) as file:
                found.append(samples_of(file, path, shard, left_out))
            progress.advance()
    return combine(found, left_out)
