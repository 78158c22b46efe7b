"""Packed shards: images decoded or re-encoded once, for hosts whose cores cannot keep up.

    FOLDER/SPLIT/manifest.json     what was packed, from what, and how
    FOLDER/SPLIT/shard-00000.bin   the images one after another: RGB bytes by rows, or JPEG files
    FOLDER/SPLIT/shard-00000.npz   offsets int64 [n + 1]; sizes int32 [n, 2], width and height, 0
                                   where the image was unreadable; labels int64 [n]; crc32c uint32
                                   [n] of each image's bytes; names, uint8, each ended by a zero

A shard is written under another name and renamed, its .npz last: what has one is whole. Shards are
mapped into memory, so processes of one machine share them and a crop of an uint8 shard reads only
its own rows. Each image's checksum is compared when a process first meets it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_fast import _C
from deit_fast.data.sources import UnreadableImage, decode, source_fingerprint
from deit_fast.errors import InputError

FORMAT = {"format": "deit-fast-packed", "version": 1}
FORMS = ("uint8", "jpeg")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


class PackedImages:
    """Reads a split that `deit-fast pack` wrote.

    Pixels of a pack are not those of the files it was made from, so it has a fingerprint of its
    own: a cache made from the one refuses the other.

    Raises:
        InputError: no pack, an unfinished or a damaged one; names the file.
    """

    finished = False

    def __init__(self, root: str, split: str) -> None:
        self.folder = Path(root) / split
        self.manifest = read_manifest(self.folder)
        per_shard, count = self.manifest["shard_samples"], self.manifest["num_samples"]
        self.classes: list[str] = self.manifest["classes"]
        self._encoded = self.manifest["form"] == "jpeg"
        self._indices = []
        self._starts = np.arange(0, count + per_shard, per_shard)
        for number in range(-(-count // per_shard)):
            samples = min(per_shard, count - number * per_shard)
            self._indices.append(read_index(self.folder, number, samples, self.manifest))
        self.labels = np.concatenate([index["labels"] for index in self._indices])
        self.paths: Sequence[str] = _Names(self.folder, per_shard, self._indices)
        self._data: dict[int, np.ndarray] = {}  # mapped when a process first needs them
        self._checked = np.zeros(count, bool)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image | np.ndarray:
        """uint8 [H, W, 3], a view of the mapped file; or a decoded JPEG.

        Raises:
            UnreadableImage: it was unreadable when packed, or its checksum does not agree.
        """
        content, (width, height) = self._content(index)
        if self._encoded:
            return decode(content.tobytes(), self.paths[index])
        return content.reshape(height, width, 3)

    def read(self, index: int) -> bytes:
        """The JPEG file.

        Raises:
            UnreadableImage: as `load`.
            InputError: the pack holds pixels.
        """
        if not self._encoded:
            raise InputError(
                f"{self.folder} holds decoded pixels, which DALI has no use for: take "
                f"data.loader=pillow, or pack with --form jpeg"
            )
        return self._content(index)[0].tobytes()

    def _content(self, index: int) -> tuple[np.ndarray, list[int]]:
        number, place = divmod(index, self.manifest["shard_samples"])
        table = self._indices[number]
        size = table["sizes"][place].tolist()
        if size[0] == 0:
            raise UnreadableImage(self.paths[index], "it was unreadable when it was packed")
        if number not in self._data:
            path = self.folder / f"{shard_name(number)}.bin"
            self._data[number] = np.memmap(path, np.uint8, mode="r")
        start, stop = table["offsets"][place : place + 2].tolist()
        content = self._data[number][start:stop]
        if not self._checked[index]:
            if _C.crc32c(content.tobytes()) != table["crc32c"][place]:
                raise UnreadableImage(
                    self.paths[index], f"its checksum in {shard_name(number)}.bin does not agree"
                )
            self._checked[index] = True
        return content, size

    def fingerprint(self) -> dict[str, Any]:
        """Digest over every image's size, checksum and class; no pixel is read."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for index in self._indices:
            for name in ("sizes", "crc32c", "labels"):
                values = index[name]
                digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return source_fingerprint(digest.hexdigest(), self)


class _Names(Sequence[str]):
    """Where an image came from, for messages: `FOLDER/NAME`."""

    def __init__(self, folder: Path, per_shard: int, indices: list[dict[str, np.ndarray]]) -> None:
        self._folder, self._per_shard, self._indices = folder, per_shard, indices
        self._ends = [np.flatnonzero(index["names"] == 0) for index in indices]

    def __len__(self) -> int:
        return sum(map(len, self._ends))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number, place = divmod(range(len(self))[index], self._per_shard)
        ends = self._ends[number]
        start = ends[place - 1] + 1 if place else 0
        name = self._indices[number]["names"][start : ends[place]].tobytes()
        return os.path.join(self._folder, os.fsdecode(name))


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: none there, or not one of ours; names what is wrong.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} holds no packed images: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path} must hold a JSON object")
    for name, value in FORMAT.items():
        if manifest.get(name) != value:
            raise InputError(f"{path}: {name} must be {value!r}, not {manifest.get(name)!r}")
    if manifest.get("form") not in FORMS:
        raise InputError(f"{path}: form must be uint8 or jpeg, not {manifest.get('form')!r}")
    for name in ("num_samples", "shard_samples", "short_side"):
        value = manifest.get(name)
        if type(value) is not int or value < 1:
            raise InputError(f"{path}: {name} must be a positive whole number, not {value!r}")
    classes = manifest.get("classes")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        raise InputError(f"{path}: classes must be a list of names")
    return manifest


def read_index(
    folder: Path, number: int, samples: int, manifest: dict[str, Any]
) -> dict[str, np.ndarray]:
    """One shard's table, its values checked against the shard's file.

    Raises:
        InputError: missing, damaged, or not of this shard; names the file and what is wrong.
    """
    path = folder / f"{shard_name(number)}.npz"
    shapes = {
        "offsets": (np.int64, (samples + 1,)),
        "sizes": (np.int32, (samples, 2)),
        "labels": (np.int64, (samples,)),
        "crc32c": (np.uint32, (samples,)),
        "names": (np.uint8, None),
    }
    index = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:  # a zip file: it has checksums
            for name, (dtype, shape) in shapes.items():
                values = arrays[name]
                if values.dtype != dtype or shape not in (None, values.shape):
                    raise InputError(f"{path}: {name} is {values.dtype} {values.shape}")
                index[name] = values
        length = path.with_suffix(".bin").stat().st_size
    except FileNotFoundError as error:
        raise InputError(
            f"the pack in {folder} is not complete: {Path(error.filename).name} is missing; the "
            f"same `deit-fast pack` command goes on"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {error}") from None
    offsets, sizes, labels = index["offsets"], index["sizes"].astype(np.int64), index["labels"]
    lengths = np.diff(offsets)
    pixels = sizes.prod(axis=1) * 3
    wrong = (
        offsets[0] != 0 or offsets[-1] != length or (lengths < 0).any() or (sizes < 0).any()
        or ((sizes[:, 0] == 0) & (lengths != 0)).any()
        or (manifest["form"] == "uint8" and (lengths != pixels).any())
    )  # fmt: skip
    if wrong:
        raise InputError(f"{path} does not fit {shard_name(number)}.bin of {length} bytes")
    if not ((labels >= 0) & (labels < len(manifest["classes"]))).all():
        raise InputError(f"{path}: labels leave [0, {len(manifest['classes'])})")
    if np.count_nonzero(index["names"] == 0) != samples:
        raise InputError(f"{path}: names must hold {samples} names")
    return index
