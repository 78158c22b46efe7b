"""Names of the classes of shards, which hold numbers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from deit_fast.data.sources import equal_names
from deit_fast.errors import InputError
from deit_fast.runtime.files import read_file
from deit_fast.storage.failures import ObjectMissing
from deit_fast.storage.objects import Objects
from deit_fast.storage.urls import is_url, shown

log = logging.getLogger("deit_fast")

_CLASSES = "classes.txt"


def _read_classes(root: str) -> bytes | None:
    """The names' file, None where there is none."""
    if is_url(root):
        try:
            return Objects(root).read_whole(_CLASSES)
        except ObjectMissing:
            return None
    path = Path(root) / _CLASSES
    return read_file(path) if os.path.lexists(path) else None


def class_names(root: str, highest: int) -> list[str]:
    """The names in ROOT/classes.txt; without it the numbers up to ``highest``.

    Args:
        root: a folder, or a URL.

    Raises:
        InputError: the file cannot be read, or has an empty line.
    """
    path = f"{shown(root)}/{_CLASSES}" if is_url(root) else os.path.join(root, _CLASSES)
    try:
        content = _read_classes(root)
        if content is None:
            return [str(label) for label in range(highest + 1)]
        lines = content.decode().rstrip().split("\n")
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
