"""The checkpoint files of a run: step-NNNNNNNNN.pt, each complete and with a checksum."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_map_only

from deit_fast.errors import InputError, first_line, is_out_of_memory, printable
from deit_fast.runtime.files import crc32c, open_regular
from deit_fast.runtime.torch_files import load_torch, save_torch

log = logging.getLogger("deit_fast")

KEEP = 2  # checkpoints; with one, the only copy could be the one being written
FORMAT = 2  # since 2 a checkpoint carries a checksum of all its bytes
_FORMATS = (1, FORMAT)
_END_BYTES = 1 << 16
_NAME = re.compile(r"step-(\d{9,})\.pt")


Stays: TypeAlias = Callable[[int], bool]
"""Whether the checkpoint of a step stays when newer ones are written."""


def never(step: int) -> bool:
    return False


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], stays: Stays = never) -> Path:
    """Write ``state`` (tensors and plain values) atomically as ``folder/step-N.pt``.

    Keeps the newest ``KEEP`` checkpoints up to this step, and those of steps that ``stays`` names.
    Files of later steps, which this run did not write, stay.

    Raises:
        OSError: the disk is full or not writable; the older checkpoints stay.
    """
    folder.mkdir(exist_ok=True)  # without parents: the run's folder may have been moved
    path = folder / f"step-{step:09d}.pt"
    save_torch(path, {"format": FORMAT, **state})
    up_to_here = [other for other in list_checkpoints(folder) if step_of(other) <= step]
    for old in up_to_here[:-KEEP]:
        if not stays(step_of(old)):
            old.unlink()
    return path


class CheckpointWriter:
    """Writes checkpoints on a thread; training continues after a copy into host memory.

    Args:
        require_owned: raises where the folder is no longer the run's; called before each write.
        stays: of ``save_checkpoint``.
        written: called, on the thread, with step and file of each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        require_owned: Callable[[], None],
        stays: Stays = never,
        written: Callable[[int, Path], None] | None = None,
    ) -> None:
        self.folder, self._require_owned, self._stays = folder, require_owned, stays
        self._written = written
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[Path] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Wait for the checkpoint before, copy ``state`` and start to write it.

        Raises:
            OSError: the checkpoint before could not be written.
            InputError: the folder is no longer the run's.
        """
        self.wait()
        self._require_owned()
        copy = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._executor.submit(self._write, step, copy)
        self._executor.shutdown(wait=False)  # the thread ends with the task

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        self._require_owned()
        try:
            path = save_checkpoint(self.folder, step, state, self._stays)
            if self._written is not None:
                self._written(step, path)
            return path
        except OSError:
            self._require_owned()  # says where the folder was moved meanwhile
            raise

    def wait(self) -> None:
        """Return when the last state is on the disk.

        A signal's handler may raise at any line here and in ``save``; the next call still waits.

        Raises:
            OSError, InputError: it could not be written.
        """
        if self._executor is not None:
            self._executor.shutdown()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Files with other names are none.

    Raises:
        InputError: ``folder`` is a link to nothing, or no folder: its checkpoints would be missed.
        OSError: it cannot be listed.
    """
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder, or a link to one that is not there: mount it")
    paths = [folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and state of the newest readable checkpoint; None where the folder has none.

    A broken checkpoint is skipped with a warning that names it.

    Raises:
        InputError: all checkpoints are broken: whether to start again is the user's decision. Or
            the newest is of another version.
        MemoryError, RuntimeError: the memory ran out.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            state = _read(path)
        except Exception as error:  # torch raises half a dozen types for a broken file
            if is_out_of_memory(error) or isinstance(error, PermissionError):
                raise
            reason = printable(first_line(error, 80))
            log.warning("checkpoint %s is broken (%s); trying the one before", path, reason)
            continue
        _require_format(path, state)
        if state.get("step") != step_of(path):
            step = printable(state.get("step"))
            log.warning("checkpoint %s is not used: it is of step %s", path, step)
            continue
        return path, state
    if paths:
        raise InputError(
            f"all {len(paths)} checkpoints in {folder} are broken: remove them to start again"
        )
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """State of one checkpoint.

    Raises:
        InputError: it is missing, broken or of another version.
        MemoryError, RuntimeError: the memory ran out.
    """
    if path.is_dir():
        raise InputError(f"checkpoint {path} is a folder: choose one of its files step-N.pt")
    try:
        state = _read(path)
    except Exception as error:  # torch raises half a dozen types for a broken file
        if is_out_of_memory(error):
            raise
        reason = printable(getattr(error, "strerror", None) or first_line(error, 80))
        raise InputError(f"checkpoint {path} cannot be read ({reason}): choose another") from None
    _require_format(path, state)
    return state


def end_checksum(path: Path) -> str:
    """CRC32C, in hex, of the end of a checkpoint, where the checksums of its content stand.

    Raises:
        OSError: it cannot be read; names it.
    """
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
        return f"{crc32c(file.read()):08x}"


def _require_format(path: Path, state: dict[str, Any]) -> None:
    if state["format"] not in _FORMATS:
        raise InputError(
            f"checkpoint {path} has format {state['format']!r}, this version reads "
            f"{' and '.join(map(str, _FORMATS))}: use the version that wrote it"
        )


def _read(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        state, is_sealed = load_torch(file)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a run")
    if state["format"] == FORMAT and not is_sealed:
        raise ValueError("its checksum is missing")
    return state
