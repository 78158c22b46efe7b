"""A folder listed in one pass and fingerprinted in another, as before `data.folder_listing`.

It is what the bench of start-up compares with, and the slow reference of the tests.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from deit_fast.data.left_out import LeftOut
from deit_fast.data.sources import Paths, packed_path
from deit_fast.inputs import IMAGE_SUFFIXES, cannot_list

THREADS, LINES = 16, 1024


class TwoPasses:
    """Paths, labels and what is left out of a split.

    Args:
        folder: of the split.
        classes: names of its class folders, sorted.
    """

    def __init__(self, folder: str, classes: list[str]) -> None:
        self.folder, self.classes = folder, classes
        left_out = LeftOut()
        for name in sorted({*os.listdir(folder)} - {*classes}):
            left_out.add("files and hidden folders beside the classes", name)
        labels: list[int] = []
        names: list[bytes] = []
        for label, name in enumerate(classes):
            files = image_files(folder, name, left_out)
            names += files
            labels += [label] * len(files)
        self.left_out = str(left_out)
        self.labels = np.array(labels, np.int64)
        buffer, ends = np.frombuffer(b"".join(names), np.uint8), np.cumsum(list(map(len, names)))
        self.paths = Paths(len(names), partial(packed_path, folder, buffer, ends, 0))

    def sha256(self) -> str:
        """Over relative path, byte size and class of every file."""
        digest, start = hashlib.sha256(), len(self.folder) + 1
        classes, labels = [os.fsencode(name) for name in self.classes], self.labels.tolist()

        def lines(first: int) -> bytes:
            part = slice(first, first + LINES)
            return b"".join(
                b"%b\0%d\0%b\n" % (os.fsencode(path[start:]), size_of(path), classes[label])
                for path, label in zip(self.paths[part], labels[part], strict=True)
            )

        with ThreadPoolExecutor(THREADS) as pool:
            for text in pool.map(lines, range(0, len(labels), LINES)):
                digest.update(text)
        return digest.hexdigest()


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def image_files(folder: str, name: str, left_out: LeftOut) -> list[bytes]:
    """Paths below the split, sorted by directory, then by name."""

    def refuse(error: OSError) -> None:
        raise cannot_list(error) from None

    images = []
    top = os.path.join(folder, name)
    for directory, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        os.stat(directory)  # for the check that no link leads here again
        relative = os.path.relpath(directory, folder)
        for item in folders[:]:
            if item.startswith("."):
                folders.remove(item)
                left_out.add("hidden folders", os.path.join(relative, item))
        for item in names:
            path = os.path.join(relative, item)
            if item.startswith("."):
                left_out.add("hidden files", path)
            elif item.lower().endswith(IMAGE_SUFFIXES):
                images.append((directory, item, os.fsencode(path)))
            else:
                left_out.add("files that are no image", path)
    return [path for _, _, path in sorted(images)]
