"""A few of the demo's images, so that a test's run takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from deit_fast.tools.demo import write_digits


def write_few_digits(root: Path, train: int = 21, val: int = 10) -> None:
    """The demo's image folder, cut down to this many images of each digit.

    Where scikit-learn, which holds the digits, is missing: noise around a pattern for each, in
    files of the same names. A GPU machine without a network runs its tests on those.
    """
    if importlib.util.find_spec("sklearn") is None:
        write_patterns(root, train, val)
        return
    write_digits(root)
    for split, keep in (("train", train), ("val", val)):
        for folder in (root / split).iterdir():
            for path in sorted(folder.iterdir())[keep:]:
                path.unlink()


def write_patterns(root: Path, train: int, val: int) -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (10, 8, 8))
    number = 0
    for split, count in (("train", train), ("val", val)):
        for digit, pattern in enumerate(patterns):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for _ in range(count):
                pixels = (pattern + rng.integers(0, 56, (8, 8))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04d}.png")
                number += 1
