"""Checkpoints: written to a temporary name, fsynced, renamed; the two newest are kept."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch

from deit_fast.config import InputError
from deit_fast.files import write_atomically

log = logging.getLogger("deit_fast")

KEEP = 2  # never 1: the only copy may be the one being written


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (tensors and plain values) as ``folder/step-N.pt`` and drop the oldest.

    Raises:
        OSError: the disk is full or not writable; the older checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    # In memory first: torch.save would turn a full disk into an error without a reason.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())
    for old in list_checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; broken ones are named and passed over.

    Returns:
        Path and state; None where the folder has no checkpoint.

    Raises:
        InputError: all of them are broken; to start again from nothing is the user's decision.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a broken file
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:80]
            log.warning("checkpoint %s is broken (%s); trying the one before", path, reason)
    if paths:
        raise InputError(
            f"all {len(paths)} checkpoints in {folder} are broken: remove them to start again"
        )
    return None
