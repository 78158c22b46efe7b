"""Fashion-MNIST as packed shards: 50,000 images to train on, 10,000 to select, 10,000 to test.

The files are those of Debian's package dataset-fashion-mnist (Xiao et al. 2017). The official
training file is divided in its own order: its first 50,000 images train, its last 10,000 select.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_fast.config import DataConfig
from deit_fast.tools.pack import pack

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
TRAIN = 50_000  # images of the training file that train; the others select
SIDE = 28  # pixels


def read_idx(name: str, source: Path = SOURCE) -> np.ndarray:
    """An array of an idx file, uint8 [N, 28, 28] or [N].

    Raises:
        SystemExit: the file is missing or damaged.
    """
    path = source / f"{name}-ubyte.gz"
    try:
        content = gzip.decompress(path.read_bytes())
        dims = content[3]
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except FileNotFoundError:
        raise SystemExit(
            f"{path} is missing: apt-get install dataset-fashion-mnist (Debian, Ubuntu)"
        ) from None
    except (OSError, EOFError, ValueError, IndexError, struct.error) as error:
        raise SystemExit(f"{path} is damaged ({error}): install the package again") from None


def splits(source: Path = SOURCE) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of `train`, `select` and `test`."""
    images, labels = (read_idx(f"train-{kind}", source) for kind in ("images-idx3", "labels-idx1"))
    test = tuple(read_idx(f"t10k-{kind}", source) for kind in ("images-idx3", "labels-idx1"))
    return {
        "train": (images[:TRAIN], labels[:TRAIN]),
        "select": (images[TRAIN:], labels[TRAIN:]),
        "test": (test[0], test[1]),
    }


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the pixels and the labels."""
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def write_data(root: Path, reuse: int, source: Path = SOURCE) -> dict[str, Any]:
    """Write the data sets as packed shards; a second call keeps what is complete.

    `root/select` and `root/test` have the 50,000 training images and their own held-out images.
    `root/reuse` has the first ``reuse`` training images, and the test images.

    Returns:
        Counts and digests by split, as in `root/digests.json`.
    """
    found = splits(source)
    facts = {
        name: {"images": len(pixels), "sha256": digest(pixels, labels)}
        for name, (pixels, labels) in found.items()
    }
    facts["reuse"] = {"images": reuse, "sha256": digest(*(part[:reuse] for part in found["train"]))}
    record = root / "digests.json"
    if record.exists() and json.loads(record.read_text()) == facts:
        return facts
    for name, held_out, count in (
        ("select", "select", TRAIN), ("test", "test", TRAIN), ("reuse", "test", reuse),
    ):  # fmt: skip
        folder = root / f"{name}.png"
        _write_images(folder / "train", *(part[:count] for part in found["train"]))
        _write_images(folder / "val", *found[held_out])
        pack(DataConfig(root=str(folder), workers=0), str(root / name), short_side=SIDE)
        shutil.rmtree(folder)
    record.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for index, label in enumerate(labels.tolist()):
        path = folder / f"{label}-{CLASSES[label]}" / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.fromarray(images[index]).save(path, compress_level=1)
