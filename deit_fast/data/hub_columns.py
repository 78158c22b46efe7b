"""Which columns of a Hugging Face dataset hold images and labels, and the names of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from deit_fast.config import shown
from deit_fast.errors import InputError, did_you_mean
from deit_fast.runtime.arrow import import_pyarrow
from deit_fast.runtime.files import parse_object

NO_LABELS = (  # end of a message
    "a split without labels cannot be used; remove its files, or choose another column by "
    "data.label_column"
)


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image, label: their names.
        is_struct: whether an image is a struct of `bytes` and `path`, else it is the bytes.
        names: of the classes by label, where the data set says them.
    """

    image: str
    label: str
    is_struct: bool
    names: tuple[str, ...] | None

    def difference(self, other: Columns) -> str:
        """The first field that differs, with both values."""
        name = next(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))
        return f"{name} {shown(getattr(self, name))}, not {shown(getattr(other, name))}"

    @property
    def leaf(self) -> str:
        """The Parquet column of the encoded images."""
        return f"{self.image}.bytes" if self.is_struct else self.image


@dataclass(frozen=True)
class Labels:
    """Labels of some rows.

    Attributes:
        codes: int64 [rows], numbers of classes, or positions in ``names``.
        names: the distinct texts, where labels are texts.
    """

    codes: np.ndarray
    names: tuple[str, ...] | None


def find_columns(schema: Any, path: str, image: str | None, label: str | None) -> Columns:
    """The columns of a file.

    The image column is the one with the feature `Image`, else the only struct with `bytes`, else
    the only binary column. The label column is the one with the feature `ClassLabel`, else the one
    named `label`, else the only one of whole numbers or texts.

    Args:
        schema: of pyarrow.
        path: of the file, for messages.
        image, label: names that the user gave.

    Raises:
        InputError: no column, more than one, or one of another type.
    """
    features = _features(schema, path)
    types = {name: _stored(schema.field(index).type) for index, name in enumerate(schema.names)}
    structs = [name for name, kind in types.items() if _is_image_struct(kind)]
    binaries = [name for name, kind in types.items() if _is_bytes(kind)]
    featured = [name for name in structs + binaries if features.get(name) == "Image"]
    chosen_image = _one(
        path, "image", image, [*structs, *binaries], featured or structs or binaries
    )
    plain = [name for name, kind in types.items() if _is_label(kind)]
    classes = [name for name in plain if isinstance(features.get(name), tuple)]
    chosen = classes or [name for name in plain if name == "label"] or plain
    chosen_label = _one(path, "label", label, plain, chosen)
    names = features.get(chosen_label)
    return Columns(
        chosen_image, chosen_label, chosen_image in structs,
        names if isinstance(names, tuple) else None,
    )  # fmt: skip


def _one(path: str, kind: str, given: str | None, possible: list[str], found: list[str]) -> str:
    """The column given by the user, or the only one found."""
    setting = f"data.{kind}_column"
    what = "whole numbers or texts" if kind == "label" else "encoded images"
    if given is not None:
        if given not in possible:
            raise InputError(
                f"{path} has no column {given!r} of {what}{did_you_mean(given, possible)}: "
                f"{setting} may be {' or '.join(possible) or 'none of its columns'}"
            )
        return given
    if len(found) != 1:
        named = f"{len(found)} columns of {what}, {', '.join(found)}: choose one by {setting}"
        raise InputError(f"{path} has {named if found else f'no column of {what}'}")
    return found[0]


def image_bytes(images: Any) -> Any:
    """The encoded images of a pyarrow column, a binary one; null where the whole row is null."""
    pa, _ = import_pyarrow()
    import pyarrow.compute as pc

    images.validate()
    return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


def label_values(column: Any, path: str, name: str) -> Labels:
    """Labels as a copy that refers to no file.

    Raises:
        InputError: a label is null.
        ValueError: the column is damaged, or a number does not fit int64.
    """
    pa, _ = import_pyarrow()
    column.validate(full=True)  # positions of texts, which are read from the disk
    column = column.cast(_stored(column.type))
    if column.null_count:
        raise InputError(
            f"{path}: {column.null_count} rows have no label in column {name!r}: {NO_LABELS}"
        )
    if not _is_text(column.type):
        return Labels(np.array(column.cast(pa.int64())), None)
    encoded = column.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = np.array(encoded.indices, np.int64)
    return Labels(codes, tuple(encoded.dictionary.to_pylist()))


def join_labels(parts: Sequence[Labels]) -> tuple[np.ndarray, list[str] | None]:
    """Labels of all parts, int64, and the sorted texts that they number, if they are texts."""
    texts = {name for part in parts for name in part.names or ()}
    names = sorted(texts)
    position = {name: label for label, name in enumerate(names)}
    codes = [
        part.codes if part.names is None
        else np.array([position[name] for name in part.names], np.int64)[part.codes]
        for part in parts
    ]  # fmt: skip
    labels = np.concatenate([np.zeros(0, np.int64), *codes])
    return labels, names if parts and parts[0].names is not None else None


def _features(schema: Any, path: str) -> dict[str, Any]:
    """What `datasets` wrote about the columns: "Image", or the names of a ClassLabel as a tuple."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    info = parse_object(text, f"{path}: the description of its columns").get("info")
    features = info.get("features") if isinstance(info, dict) else None
    found: dict[str, Any] = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        kind = feature.get("_type") if isinstance(feature, dict) else None
        found[name] = kind
        if kind == "ClassLabel":
            found[name] = _class_names(feature.get("names"), path, name)
    return found


def _class_names(names: Any, path: str, column: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{path}: the names of the classes of {column!r} are not a list of names")
    return tuple(names)


def _stored(kind: Any) -> Any:
    """A type; that of the values where they are numbered by a dictionary."""
    pa, _ = import_pyarrow()
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: Any) -> bool:
    pa, _ = import_pyarrow()
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image_struct(kind: Any) -> bool:
    pa, _ = import_pyarrow()
    fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return any(field.name == "bytes" and _is_bytes(field.type) for field in fields)


def _is_text(kind: Any) -> bool:
    pa, _ = import_pyarrow()
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_label(kind: Any) -> bool:
    pa, _ = import_pyarrow()
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)
