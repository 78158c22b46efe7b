"""An image folder as a source: class folders with image files."""

from __future__ import annotations

import functools
import logging
import os

import numpy as np

from deit_fast.data.folder_index import open_listing
from deit_fast.data.sources import Paths, Source, packed_path, read_image_file
from deit_fast.errors import InputError
from deit_fast.inputs import IMAGE_SUFFIXES, require_image_folder

log = logging.getLogger("deit_fast")


class ImageFolder(Source):
    """`root/split/<class>/**/<image>`; ids and labels in torchvision `ImageFolder`'s order.

    Classes are the folder names, sorted. Folders and files whose name starts with a dot are left
    out at every depth. EXIF orientation is ignored as in torchvision, since teachers were trained
    on such pixels.

    Args:
        verify: what a start proves of a split that was indexed before (`folder_index`): "names",
            that it has the same files, or "sizes", that each has the same size too.

    Raises:
        InputError: no root, split, class folder or image.
    """

    def __init__(self, root: str, split: str, verify: str = "names") -> None:
        self.classes = require_image_folder(root, split)
        self.folder = os.path.join(root, split)
        listing = open_listing(self.folder, self.classes, verify)
        if not listing.num_images:
            raise InputError(
                f"{self.folder} has no images in its {len(self.classes)} class folders"
                f"{_instead(listing.first_other)}; expected {', '.join(IMAGE_SUFFIXES)}"
            )
        self.left_out, self.labels = listing.left_out, listing.labels
        self._warn_of_empty_classes()
        path_of = functools.partial(packed_path, self.folder, listing.names, listing.ends, 0)
        self.paths = Paths(listing.num_images, path_of)
        self._digest_of_listing = listing.digest

    def _warn_of_empty_classes(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        empty = [self.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
        if empty:
            walk = os.walk(os.path.join(self.folder, empty[0]), followlinks=True)
            file = next((name for _, _, names in walk for name in sorted(names)), None)
            log.warning(
                "%s has no image of %d of its classes, the first is %r: %s",
                self.folder, len(empty), empty[0],
                "its folder is empty" if file is None
                else f"it holds files such as {file!r}, expected {', '.join(IMAGE_SUFFIXES)}",
            )  # fmt: skip

    def read(self, index: int) -> bytes:
        return read_image_file(self.paths[index])

    def _sha256(self) -> str:
        """Over relative path, byte size and class of every file, as they were listed."""
        return self._digest_of_listing


def _instead(first: str) -> str:
    """Part of a message: the file in place of images."""
    return f": there are files such as {first!r}, convert them to JPEG or PNG" if first else ""
