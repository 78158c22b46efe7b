"""Packed shards: images decoded or re-encoded once, for hosts whose cores cannot keep up.

    FOLDER/SPLIT/manifest.json     what was packed, from what, and how
    FOLDER/SPLIT/shard-00000.bin   the images one after another: RGB bytes by rows, or JPEG files
    FOLDER/SPLIT/shard-00000.npz   offsets int64 [n + 1]; sizes int32 [n, 2], width and height, 0
                                   where the image was unreadable; labels int64 [n]; crc32c uint32
                                   [n] of each image's bytes; names, uint8, each ended by a zero

A shard is written under a temporary name and renamed, its .npz last, so a shard with an .npz is
complete. A shard whose size or time changes while it is in use is refused, and each image's
checksum is verified when a process first reads it.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_fast import _C
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
from deit_fast.runtime.files import read_arrays, read_json

FORMAT = {"format": "deit-fast-packed", "version": 1}
FORMS = ("uint8", "jpeg")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


class PackedImages(Source):
    """Reads a split that `deit-fast pack` wrote.

    Its pixels differ from those of the files it was made from, and so does its fingerprint: a cache
    made from the one refuses the other.

    Raises:
        InputError: no pack, an unfinished or a damaged one; names the file.
    """

    def __init__(self, root: str, split: str) -> None:
        self.folder: Path = Path(root) / split
        manifest = read_manifest(self.folder)
        count, self._per_shard = manifest["num_samples"], manifest["shard_samples"]
        self.classes = self._own_classes = manifest["classes"]
        self._is_jpeg = manifest["form"] == "jpeg"
        self._indices = [
            read_index(self.folder, number, min(self._per_shard, count - first), manifest)
            for number, first in enumerate(range(0, count, self._per_shard))
        ]
        self.labels = np.concatenate([index["labels"] for index in self._indices])
        names = np.concatenate([index["names"] for index in self._indices])
        ends = np.flatnonzero(names == 0)
        self.paths = Paths(count, partial(packed_path, str(self.folder), names, ends, 1))
        shards = [str(self.folder / f"{shard_name(n)}.bin") for n in range(len(self._indices))]
        self._files = ShardFiles(shards, stamps_of(shards))
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
        start, stop = table["offsets"][row : row + 2].tolist()
        content = self._files.read(number, start, stop - start)
        if not self._is_verified[index]:
            if _C.crc32c(content) != table["crc32c"][row]:
                raise UnreadableImage(
                    self.paths[index], f"its checksum in {shard_name(number)}.bin is wrong"
                )
            self._is_verified[index] = True
        return content, size

    def _sha256(self) -> str:
        """Over every image's size, checksum and class; reads no pixel."""
        digest = hashlib.sha256(json.dumps(self._own_classes).encode())
        for index in self._indices:
            for name in ("sizes", "crc32c", "labels"):
                values = index[name]
                digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: it is missing or invalid; names the field and its value.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no packed images: it has no manifest.json") from None
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


def read_index(
    folder: Path, number: int, samples: int, manifest: dict[str, Any]
) -> dict[str, np.ndarray]:
    """One shard's table, checked against the size of the shard's file.

    Raises:
        InputError: missing, damaged, or of another shard; names the file and what is wrong.
        OSError: the machine cannot read it; names the file.
    """
    path = folder / f"{shard_name(number)}.npz"
    columns: dict[str, tuple[type, tuple[int, ...] | None]] = {
        "offsets": (np.int64, (samples + 1,)),
        "sizes": (np.int32, (samples, 2)),
        "labels": (np.int64, (samples,)),
        "crc32c": (np.uint32, (samples,)),
        "names": (np.uint8, None),
    }
    try:
        index = read_arrays(path, {name: dtype for name, (dtype, _) in columns.items()})
        length = path.with_suffix(".bin").stat().st_size
    except FileNotFoundError as error:
        raise InputError(
            f"the pack in {folder} is not complete: {Path(error.filename).name} is missing; run "
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
