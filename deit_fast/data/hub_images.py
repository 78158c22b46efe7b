"""Images of a Hugging Face dataset on the local disk, from its Parquet or Arrow files."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial

import numpy as np

from deit_fast.data.classes import class_names
from deit_fast.data.hub_columns import NO_LABELS, join_labels
from deit_fast.data.hub_rows import open_rows
from deit_fast.data.left_out import LeftOut
from deit_fast.data.sources import Paths, Source, UnreadableImage, equal_names
from deit_fast.data.tar_index import MAX_CLASSES
from deit_fast.errors import InputError
from deit_fast.hub_files import split_files
from deit_fast.runtime.arrow import import_pyarrow


class HubImages(Source):
    """The rows of a split in the order of its files' names.

    Classes are those of the `ClassLabel`; without one the lines of ROOT/classes.txt or the numbers,
    and the sorted texts where labels are texts.

    Args:
        root: a folder as the Hub or `save_to_disk` lays it out; see `deit_fast.hub_files`.
        image_column, label_column: their names; None: found.

    Raises:
        InputError: no pyarrow, no files, no image, no such columns, a damaged file, a label that
            has no class; names the file.
        OSError: the machine cannot read a file; names it.
    """

    def __init__(
        self, root: str, split: str,
        image_column: str | None = None, label_column: str | None = None,
    ) -> None:  # fmt: skip
        import_pyarrow("data.source=hf")
        self.folder, names = split_files(root, split)
        files = [os.path.join(self.folder, name) for name in names]
        self._rows, columns, parts = open_rows(files, image_column, label_column)
        self.labels, texts = join_labels(parts)
        if len(self.labels) == 0:
            raise InputError(f"{files[0]} and the files beside it have no rows")
        self._names, starts = names, self._rows.starts
        self.paths = Paths(len(self.labels), partial(_row_path, self.folder, names, starts))
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0:
            raise InputError(
                f"{self.paths[int(self.labels.argmin())]} has {columns.label} {lowest}, and "
                f"classes count from 0: {NO_LABELS}"
            )
        self.classes = list(columns.names or texts or ())
        if not self.classes and highest < MAX_CLASSES:
            self.classes = class_names(root, highest)
        if (twice := equal_names(self.classes)) is not None:
            raise InputError(
                f"{files[0]}: classes {twice[1]} and {twice[2]} of {columns.label!r} are both "
                f"named {twice[0]!r}"
            )
        if highest >= len(self.classes):
            most = f"a data set has at most {MAX_CLASSES} classes: choose"
            if self.classes:
                where = "its ClassLabel" if columns.names else os.path.join(root, "classes.txt")
                most = f"{where} names {len(self.classes)} classes: correct either, or choose"
            raise InputError(
                f"{self.paths[int(self.labels.argmax())]} has {columns.label} {highest}, and {most}"
                f" another column by data.label_column"
            )
        self._own = self.classes, self.labels
        self._note_null_images()

    def _note_null_images(self) -> None:
        nulls = self._rows.null_rows()
        if len(nulls) == len(self.labels):
            raise InputError(
                f"{self.paths[0]} and all other rows name files and hold no image: write the data "
                f"set by `save_to_disk` of the package datasets, which stores the images too"
            )
        left_out = LeftOut()
        for row in nulls.tolist():
            left_out.add("rows without an image, which count as unreadable", self.paths[row])
        self.left_out = str(left_out)

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            UnreadableImage: the row holds none.
            InputError: its file was changed, or is damaged.
            OSError: its file cannot be read.
        """
        content = self._rows.read(index)
        if content is None:
            raise UnreadableImage(self.paths[index], "the row holds no image, it may name a file")
        return content

    def _sha256(self) -> str:
        """Over names of files and classes, the labels of all rows, and sizes; reads no image.

        The sizes are those of images in Arrow files, and of groups of rows in Parquet files.
        """
        classes, labels = self._own
        digest = hashlib.sha256(json.dumps([self._names, classes]).encode())
        for values in (self._rows.starts, labels, *self._rows.sizes):
            digest.update(b"%d\n" % len(values))
            digest.update(np.ascontiguousarray(values, "<i8").data)
        return digest.hexdigest()


def _row_path(folder: str, names: list[str], starts: np.ndarray, row: int) -> str:
    """`FOLDER/FILE:ROW`, the row counted in the file from 0."""
    number = int(np.searchsorted(starts, row, "right")) - 1
    return f"{folder}/{names[number]}:{row - int(starts[number])}"
