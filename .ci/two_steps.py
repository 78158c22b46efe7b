"""Trains two steps on a few JPEGs with the installed package and prints where it was imported from.

    python .ci/two_steps.py FOLDER

FOLDER is created; it gets the images and the run. The path of each module of deit_fast that the
training loaded is a line on stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from deit_fast import cli


def write_images(root: Path) -> None:
    """Two classes of eight pictures for training, and of two held out."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")


def main(folder: Path) -> int:
    write_images(folder / "images")
    status = cli.main([
        "train", "--recipe", "digits_student", "--data.root", str(folder / "images"),
        "--output", str(folder / "run"), "--loss.kind", "none", "--batch-size", "8",
        "--max-steps", "2", "--data.workers", "0", "--device", "cpu",
    ])  # fmt: skip
    for name in sorted(sys.modules):
        if name.partition(".")[0] == "deit_fast":
            print(sys.modules[name].__file__)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
