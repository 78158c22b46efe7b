"""What an index of tar shards holds, and how it is made from their headers.

A column has an entry for each image: its shard, where its bytes are, its class and where its name
ends. The index of objects has a checksum of the bytes too, `crc32c`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from deit_fast.data.left_out import LeftOut
from deit_fast.data.tar_members import Member, members, read_content
from deit_fast.errors import InputError
from deit_fast.inputs import IMAGE_SUFFIXES
from deit_fast.runtime.files import unique_keys

COLUMNS: dict[str, type] = {
    "shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int64,
    "name_end": np.int64,
}  # fmt: skip
TEXTS: dict[str, type] = {"names": np.uint8, "left_out": np.uint8}
_IMAGES = {extension[1:].encode() for extension in IMAGE_SUFFIXES}
_LABELS = {b"cls", b"json"}
MAX_CLASSES = 1 << 20  # each has a name in memory
_MAX_LABEL_BYTES = 1 << 20  # a label file is short; a header that says otherwise is not believed
_USUAL_PADDING = 512 + 10240 + 512  # of the last member, the end marker and tar's usual record

Samples = list[tuple[Member, int]]


def combine(shards: Sequence[Samples], left_out: LeftOut) -> dict[str, np.ndarray]:
    """The index of the samples of each shard, in order."""
    names, parts = bytearray(), []
    for number, samples in enumerate(shards):
        rows = []
        for image, label in samples:
            names += image.name
            rows.append((number, image.offset, image.size, label, len(names)))
        parts.append(np.array(rows, np.int64).reshape(-1, len(COLUMNS)))
    columns = zip(COLUMNS.items(), np.concatenate(parts).T, strict=True)
    index = {name: column.astype(dtype) for (name, dtype), column in columns}
    texts = {"names": bytes(names), "left_out": str(left_out).encode()}
    return index | {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}


def fits(index: dict[str, np.ndarray], lengths: np.ndarray) -> bool:
    """Whether the columns and names of a stored index fit one another and the shards.

    Args:
        lengths: bytes of each shard.
    """
    columns = [index[name] for name in COLUMNS]
    shard, offset, size, label, name_end = columns
    return bool(
        {column.shape for column in columns} == {(label.size,)}
        and index["names"].ndim == 1
        and ((shard >= 0) & (shard < len(lengths))).all()
        and (offset >= 0).all() and (size >= 0).all()
        and ((label >= 0) & (label < MAX_CLASSES)).all()
        and (offset <= lengths[shard] - size).all()
        and (np.diff(name_end, prepend=0) >= 0).all()
        and (len(label) == 0 or name_end[-1] == len(index["names"]))
    )  # fmt: skip


def join_names(names: Sequence[str]) -> np.ndarray:
    """As an array of an index, uint8."""
    return np.frombuffer(b"\0".join(map(os.fsencode, names)), np.uint8)


# ---------------------------------------------------------------------------------------------
# Samples of a shard
# ---------------------------------------------------------------------------------------------


def samples_of(file: BinaryIO, path: str, shard: str, left_out: LeftOut) -> Samples:
    """Image and label of each sample of a shard, in the order of the images.

    A key is a name without its last extension: `KEY.jpg` goes with `KEY.cls`, dots in KEY or not.

    Args:
        file: the shard, opened; its position does not matter.
        path: of the shard, for messages.
        shard: its name.
        left_out: counts what is no sample.

    Raises:
        InputError: as `tar_members.members`; an image without a label, or two of one key; labels
            that are none or disagree. Names the shard and the member.
    """
    images: dict[bytes, Member] = {}
    labels: dict[bytes, list[Member]] = {}
    end = 0
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
