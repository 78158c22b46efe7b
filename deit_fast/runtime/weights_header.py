"""What tells the weights of one run from those of another, read without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import open_regular, parse_object

# In the folder of a run: its last weights, their moving average, those of its best evaluation.
MODEL_FILE, EMA_FILE, BEST_FILE = "model.safetensors", "ema.safetensors", "best.safetensors"
WeightsChoice = Literal["last", "ema", "best"]
WEIGHTS_FILES: dict[WeightsChoice, str] = {"last": MODEL_FILE, "ema": EMA_FILE, "best": BEST_FILE}
DIGEST_KEY = "digest"  # in `__metadata__`: SHA-256 over names and values of all tensors
HEAD_KEY = "trained_head"  # there too: class or distillation, where a run trained one of two heads
BEST_KEY = "best"  # in the best weights: JSON with `metric`, its `value`, `epoch` and `step`
BEST_METRIC = "top1"  # of the mean of the heads' logits on the held-out images
_MAX_HEADER_BYTES = 1 << 27


def split_key(path: str | Path) -> tuple[Path, str | None]:
    """FILE and KEY of FILE#KEY; a file of that name comes first."""
    file, mark, key = str(path).rpartition("#")
    if not mark or not file or os.path.lexists(path):
        return Path(path), None
    return Path(file), key


def require_weights(run: str | os.PathLike[str], choice: WeightsChoice) -> Path:
    """The file of a run's weights.

    Raises:
        InputError: the run lacks it, names what it has; or ``run`` is no run folder.
    """
    path = Path(run) / WEIGHTS_FILES[choice]
    if os.path.lexists(path):
        return path
    missing = f"{printable(path)} does not exist"
    others = [other for other, name in WEIGHTS_FILES.items() if os.path.lexists(Path(run) / name)]
    if others:
        raise InputError(f"{missing}; the run has the weights {', '.join(others)}")
    if os.path.lexists(Path(run) / "config.json"):
        raise InputError(
            f"{missing}: the run has not finished: run its train command again, or name one of its "
            f"checkpoints"
        )
    raise InputError(f"{printable(run)} is no run folder: {missing}")


def read_digest(path: Path) -> str | None:
    """The digest that the header of a weights file names; None in files of earlier versions.

    Raises:
        As ``read_texts``.
    """
    return read_texts(path).get(DIGEST_KEY)


def read_texts(path: Path) -> dict[str, str]:
    """The texts in the header of a weights file.

    The tensors are not read, and the checksum of the file is not checked.

    Raises:
        InputError: as ``open_regular``, or the file is no safetensors file.
        OSError: names the path.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, _MAX_HEADER_BYTES))
    try:
        metadata = parse_object(header, "its header").get("__metadata__")
    except InputError as error:
        raise InputError(f"weights file {path} is not a safetensors file: {error}") from None
    texts = metadata if isinstance(metadata, dict) else {}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
