"""A few of the demo's images, so that a test's run takes seconds."""

from __future__ import annotations

from pathlib import Path

from deit_fast.demo import write_digits


def write_few_digits(root: Path, train: int = 21, val: int = 10) -> None:
    """The demo's image folder, cut down to this many images of each digit."""
    write_digits(root)
    for split, keep in (("train", train), ("val", val)):
        for folder in (root / split).iterdir():
            for path in sorted(folder.iterdir())[keep:]:
                path.unlink()
