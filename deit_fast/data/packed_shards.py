"""Packed shards: images decoded or re-encoded once, for hosts whose cores cannot keep up.

    FOLDER/SPLIT/manifest.json     what was packed, from what, and how
    FOLDER/SPLIT/shard-00000.bin   the images one after another: RGB bytes by rows, or JPEG files
    FOLDER/SPLIT/shard-00000.npz   offsets int64 [n + 1]; sizes int32 [n, 2], width and height, 0
                                   where the image was unreadable; labels int64 [n]; crc32c uint32
                                   [n] of each image's bytes; names, uint8, each ended by a zero

A shard is written under a temporary name and renamed, its .npz last, so a shard with an .npz is
complete. A shard whose size or time changes while it is in use is refused, and each image's
checksum is verified when a process first reads it. FOLDER may be a URL: then each is verified at
every read.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_fast import _C
from deit_fast.data.remote_shards import (
    Extents,
    RemoteShards,
    open_copy,
    without_etags,
)
from deit_fast.data.shard_files import ShardFiles, stamps_of
from deit_fast.data.sources import (
    Paths,
    Source,
    UnreadableImage,
    decode,
    equal_names,
    packed_path,
)
from deit_fast.errors import InputError
from deit_fast.runtime.files import parse_arrays, parse_json, read_file
from deit_fast.storage.failures import ObjectMissing, StorageError
from deit_fast.storage.objects import Objects, Part, Stamp
from deit_fast.storage.urls import is_url, join

FORMAT = {"format": "deit-fast-packed", "version": 1}
FORMS = ("uint8", "jpeg")
_MOST_BYTES = 1 << 34  # of a table or a manifest

log = logging.getLogger("deit_fast")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


class PackedImages(Source):
    """Reads a split that `deit-fast pack` wrote.

    Its pixels differ from those of the files it was made from, and so does its fingerprint: a cache
    made from the one refuses the other.

    Args:
        root: a folder, or a URL.
        split: of the data set.
        copy_bytes: of samples that are kept on this machine, if ``root`` is a URL.

    Raises:
        InputError: no pack, an unfinished or a damaged one; names the file.
        StorageError: a service does not give an object.
    """

    def __init__(self, root: str, split: str, copy_bytes: int = 0) -> None:
        files = _RemoteFiles(root, split) if is_url(root) else _LocalFiles(root, split)
        self.folder = str(files)
        manifest = read_manifest(files)
        count, self._per_shard = manifest["num_samples"], manifest["shard_samples"]
        self.classes = self._own_classes = manifest["classes"]
        self._is_jpeg = manifest["form"] == "jpeg"
        starts = range(0, count, self._per_shard)
        self._indices = []
        for number, first in enumerate(starts):
            if number % _AT_ONCE == 0:
                files.prepare(range(number, min(number + _AT_ONCE, len(starts))))
            samples = min(self._per_shard, count - first)
            self._indices.append(read_index(files, number, samples, manifest))
        self.labels = np.concatenate([index["labels"] for index in self._indices])
        names = np.concatenate([index["names"] for index in self._indices])
        ends = np.flatnonzero(names == 0)
        self.paths = Paths(count, partial(packed_path, self.folder, names, ends, 1))
        shards = [f"{shard_name(n)}.bin" for n in range(len(self._indices))]
        self._remote: RemoteShards | None = None
        if isinstance(files, _RemoteFiles):
            stamps = {name: files.stamps[name] for name in shards}
            if not all(stamp.etag for stamp in stamps.values()):
                log.warning("%s", without_etags(files.objects))
            copy = open_copy(root, split, stamps, copy_bytes)
            self._remote = RemoteShards(files.objects, stamps, _extents(self._indices), copy)
        else:
            paths = [os.path.join(self.folder, name) for name in shards]
            self._files = ShardFiles(paths, stamps_of(paths))
        self._is_verified = np.zeros(count, bool)

    def load(self, index: int) -> Image.Image | np.ndarray:
        """uint8 [H, W, 3], not to be written to; or a decoded JPEG.

        Raises:
            UnreadableImage: it was unreadable when packed, or its checksum is wrong.
            InputError, OSError: as `ShardFiles.read`.
        """
        content, (width, height) = self._content(index)
        if self._is_jpeg:
            return decode(content, self.paths[index])
        return np.frombuffer(content, np.uint8).reshape(height, width, 3)

    def read(self, index: int) -> bytes:
        """The JPEG file.

        Raises:
            UnreadableImage, OSError: as `load`.
            InputError: as `load`, or the pack holds pixels.
        """
        if not self._is_jpeg:
            raise InputError(
                f"{self.folder} holds decoded pixels, but DALI reads encoded images: set "
                f"data.loader=pillow, or pack with --form jpeg"
            )
        return self._content(index)[0]

    def _content(self, index: int) -> tuple[bytes, list[int]]:
        number, row = divmod(index, self._per_shard)
        table = self._indices[number]
        size = table["sizes"][row].tolist()
        if size[0] == 0:
            raise UnreadableImage(self.paths[index], "it was unreadable when it was packed")
        if self._remote is not None:
            return self._remote.read(index, self.paths[index]), size
        start, stop = table["offsets"][row : row + 2].tolist()
        content = self._files.read(number, start, stop - start)
        if not self._is_verified[index]:
            if _C.crc32c(content) != table["crc32c"][row]:
                raise UnreadableImage(
                    self.paths[index], f"its checksum in {shard_name(number)}.bin is wrong"
                )
            self._is_verified[index] = True
        return content, size

    def fetch(self, samples: Sequence[int]) -> None:
        if self._remote is not None:
            self._remote.fetch(samples)

    def _sha256(self) -> str:
        """Over every image's size, checksum and class; reads no pixel."""
        digest = hashlib.sha256(json.dumps(self._own_classes).encode())
        for index in self._indices:
            for name in ("sizes", "crc32c", "labels"):
                values = index[name]
                digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


def _extents(indices: list[dict[str, np.ndarray]]) -> Extents:
    return Extents(
        np.repeat(np.arange(len(indices), dtype=np.int32), [len(i["labels"]) for i in indices]),
        np.concatenate([index["offsets"][:-1] for index in indices]),
        np.concatenate([np.diff(index["offsets"]) for index in indices]),
        np.concatenate([index["crc32c"] for index in indices]),
    )


# ---------------------------------------------------------------------------------------------
# Manifest and tables
# ---------------------------------------------------------------------------------------------

_AT_ONCE = 64  # shards whose tables are requested at once: a manifest may name any number


class _LocalFiles:
    """The files of a pack's split in a folder."""

    def __init__(self, root: str | Path, split: str = "") -> None:
        self.folder = Path(root) / split

    def __str__(self) -> str:
        return str(self.folder)

    def prepare(self, numbers: range) -> None:
        """The tables of these shards will be asked for."""

    def read(self, name: str) -> bytes:
        return read_file(self.folder / name, _MOST_BYTES)

    def length(self, name: str) -> int:
        return (self.folder / name).stat().st_size


class _RemoteFiles:
    """The objects of a pack's split. The manifest names them, so that they need no list."""

    def __init__(self, root: str, split: str) -> None:
        self.objects = Objects(join(root, split))
        self.stamps: dict[str, Stamp] = {}
        self._tables: dict[str, bytes] = {}

    def __str__(self) -> str:
        return str(self.objects)

    def prepare(self, numbers: range) -> None:
        tables, shards = ([f"{shard_name(n)}.{end}" for n in numbers] for end in ("npz", "bin"))
        with suppress(ObjectMissing):  # `read` and `length` will say what is missing
            self.stamps |= self.objects.stat_many([*tables, *shards])
            stamps = [(name, self.stamps[name]) for name in tables]
            parts = [Part(name, 0, stamp.size, stamp, _is_zip) for name, stamp in stamps]
            self._tables = dict(zip(tables, self.objects.read_parts(parts), strict=True))

    def read(self, name: str) -> bytes:
        return self._tables.pop(name) if name in self._tables else self.objects.read_whole(name)

    def length(self, name: str) -> int:
        if name not in self.stamps:
            self.stamps[name] = self.objects.stat(name)
        return self.stamps[name].size


def _is_zip(content: bytes) -> bool:
    """Whether the checksums in a zip file are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises nearly anything on a broken file
        return False


def read_manifest(files: _LocalFiles | _RemoteFiles | Path) -> dict[str, Any]:
    """
    Args:
        files: of a split, or its folder.

    Raises:
        InputError: it is missing or invalid; names the field and its value.
    """
    files = _LocalFiles(files) if isinstance(files, Path) else files
    path = f"{files}/manifest.json"
    try:
        manifest = parse_json(files.read("manifest.json"), path)
    except FileNotFoundError:
        raise InputError(f"{files} holds no packed images: it has no manifest.json") from None
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    for name, value in FORMAT.items():
        if manifest.get(name) != value:
            raise InputError(f"{path}: {name} must be {value!r}, not {manifest.get(name)!r}")
    if manifest.get("form") not in FORMS:
        raise InputError(f"{path}: form must be uint8 or jpeg, not {manifest.get('form')!r}")
    for name in ("num_samples", "shard_samples", "short_side"):
        value = manifest.get(name)
        if type(value) is not int or not 1 <= value < 2**31:
            raise InputError(f"{path}: {name} must be a whole number in [1, 2^31), not {value!r}")
    classes = manifest.get("classes")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        raise InputError(f"{path}: classes must be a list of names")
    twice = equal_names(classes)
    if twice is not None:
        raise InputError(
            f"{path}: classes {twice[1]} and {twice[2]} are both named {twice[0]!r}; give each "
            f"class a name of its own, and pack again"
        )
    return manifest


def read_manifest_of(root: str, split: str) -> dict[str, Any]:
    """As `read_manifest`, of a folder or a URL."""
    return read_manifest(_RemoteFiles(root, split) if is_url(root) else _LocalFiles(root, split))


def read_index(
    files: _LocalFiles | _RemoteFiles | Path, number: int, samples: int, manifest: dict[str, Any]
) -> dict[str, np.ndarray]:
    """One shard's table, checked against the size of the shard's file.

    Raises:
        InputError: missing, damaged, or of another shard; names the file and what is wrong.
        OSError: the machine cannot read it; names the file.
    """
    files = _LocalFiles(files) if isinstance(files, Path) else files
    name = f"{shard_name(number)}.npz"
    path = f"{files}/{name}"
    columns: dict[str, tuple[type, tuple[int, ...] | None]] = {
        "offsets": (np.int64, (samples + 1,)),
        "sizes": (np.int32, (samples, 2)),
        "labels": (np.int64, (samples,)),
        "crc32c": (np.uint32, (samples,)),
        "names": (np.uint8, None),
    }
    try:
        dtypes = {name: dtype for name, (dtype, _) in columns.items()}
        index = parse_arrays(files.read(name), path, dtypes)
        length = files.length(f"{shard_name(number)}.bin")
    except FileNotFoundError as error:
        raise InputError(
            f"the pack in {files} is not complete: {Path(error.filename).name} is missing; run "
            f"the same `deit-fast pack` command again to continue"
        ) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    for name, (_, shape) in columns.items():
        if shape not in (None, index[name].shape):
            raise InputError(f"{path}: {name} must have shape {shape}, not {index[name].shape}")
    offsets, sizes, labels = index["offsets"], index["sizes"], index["labels"]
    lengths = np.diff(offsets)
    pixels = sizes.astype(np.float64).prod(axis=1)  # exact up to 2^53, and does not wrap around
    misfit = (
        offsets[0] != 0 or offsets[-1] != length or (offsets < 0).any()
        or (lengths < 0).any() or (sizes < 0).any()
        or ((lengths == 0) != (pixels == 0)).any() or ((sizes[:, 0] == 0) != (pixels == 0)).any()
        or (manifest["form"] == "uint8" and (lengths != pixels * 3).any())
    )  # fmt: skip
    if misfit:
        raise InputError(f"{path} does not fit {shard_name(number)}.bin of {length} bytes")
    if not ((labels >= 0) & (labels < len(manifest["classes"]))).all():
        raise InputError(f"{path}: labels leave [0, {len(manifest['classes'])})")
    names = index["names"]
    if names.ndim != 1 or np.count_nonzero(names == 0) != samples or names[-1] != 0:
        raise InputError(f"{path}: names must hold {samples} names")
    return index
