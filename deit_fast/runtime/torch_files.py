"""Files of torch.save that carry a checksum of all their bytes.

torch.save writes a zip archive. Its comment, which ends the file, is the seal; torch.load ignores
it.
"""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deit_fast.errors import is_out_of_memory, printable
from deit_fast.runtime.files import SEAL, crc32c, is_end_intact, open_atomically, open_regular, seal

log = logging.getLogger("deit_fast")

_END_BYTES = 22  # end of central directory, whose last two bytes are the length of the comment


def save_torch(path: Path, value: Any) -> None:
    """Write ``value`` (tensors and plain values) with a checksum, atomically.

    Raises:
        OSError: the disk is full or not writable; names ``path``, where the old file stays.
    """
    with open_atomically(path) as file:
        write_torch(file, value)


def write_torch(file: BinaryIO, value: Any) -> None:
    """As ``save_torch``, into a new file that is open."""
    archive = _SealedArchive(file)
    try:
        torch.save(value, archive)  # type: ignore[arg-type]
    except RuntimeError:
        if archive.error is not None:  # torch hides the reason of a full disk
            raise archive.error from None
        raise
    archive.seal()


def load_torch(file: BinaryIO) -> tuple[Any, bool]:
    """What torch.save wrote, on the CPU, and whether all bytes were checked by a seal.

    Files without one are checked by the checksums of the archive's members, or, where they are no
    archives, not at all.

    Args:
        file: of ``open_regular``.

    Raises:
        ValueError: a checksum differs, or the file holds more than tensors and plain values.
        Exception: whatever torch raises for a file that it cannot read.
    """
    intact = is_end_intact(file)
    if intact is False:
        raise ValueError("its checksum differs")
    if intact is None and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its part {damaged} differs")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript, and of other pickle protocols
        try:
            return torch.load(file, map_location="cpu", weights_only=True), bool(intact)
        except Exception as error:  # RuntimeError, and pickle's own type
            if "weights_only" not in str(error):
                raise
            raise ValueError(_why_unsafe(str(error))) from None


def map_torch(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped and not read, without a check of their bytes.

    None where the file is no archive, or holds more than tensors and plain values.

    Raises:
        InputError: as ``open_regular``.
        OSError: names the path.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen types
        if is_out_of_memory(error):
            raise
        return None


def _why_unsafe(text: str) -> str:
    """The reason in torch's message, whose advice is to run the code in the file."""
    named = re.search(r"GLOBAL (\S+) ", text)
    if named is not None:
        return f"it is no plain state dict: it has an object of {printable(named[1])[:100]}"
    return "it is a TorchScript archive" if "TorchScript" in text else "torch.save did not write it"


class _SealedArchive:
    """A file for torch.save that computes the checksum and holds the end of the archive back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._crc, self._held = file, 0, b""
        self.error: OSError | None = None

    def write(self, content: memoryview) -> int:
        size = len(content)
        if size < _END_BYTES:
            joined = self._held + content
            self._put(joined[:-_END_BYTES])
            self._held = joined[-_END_BYTES:]
        else:
            self._put(self._held)
            self._put(content[:-_END_BYTES])
            self._held = bytes(content[-_END_BYTES:])
        return size

    def flush(self) -> None:
        """torch.save calls it."""

    def seal(self) -> None:
        """Write the end of the archive, with the seal as its comment."""
        self._put(self._held[:-2] + len(SEAL).to_bytes(2, "little"))
        self._file.writelines(seal(SEAL, crc=self._crc))

    def _put(self, content: bytes | memoryview) -> None:
        self._crc = crc32c(content, self._crc)
        try:
            self._file.write(content)
        except OSError as error:
            self.error = error
            raise
