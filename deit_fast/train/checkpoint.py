"""Checkpoints: written to a temporary name, fsynced, renamed; the two newest are kept."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path
from typing import Any

import torch

from deit_fast.errors import InputError, first_line
from deit_fast.runtime.files import write_atomically

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


class CheckpointWriter:
    """Saves on a thread of its own; training goes on after a copy into host memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy ``state`` and begin to write it, after the one before is on the disk.

        Raises:
            OSError: of the save before.
        """
        self.wait()
        copied = _copy_to_host(state)
        self._thread = threading.Thread(
            target=self._save, args=(step, copied), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _save(self, step: int, state: dict[str, Any]) -> None:
        try:
            save_checkpoint(self.folder, step, state)
        except OSError as error:
            self._error = error

    def wait(self) -> None:
        """Until the last state is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _copy_to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copy_to_host(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy_to_host, value))
    return value


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
            reason = first_line(error, 80)
            log.warning("checkpoint %s is broken (%s); trying the one before", path, reason)
    if paths:
        raise InputError(
            f"all {len(paths)} checkpoints in {folder} are broken: remove them to start again"
        )
    return None
