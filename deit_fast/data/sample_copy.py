"""Samples of remote shards that this machine has fetched once, for all of its processes.

    CACHE/objects/ROOT/SPLIT-STAMPS/content    the shards one after another, sparse
    CACHE/objects/ROOT/SPLIT-STAMPS/present    a byte for each sample, 1 where its bytes are there

CACHE is the user's cache folder; ROOT and STAMPS are digests of the URL and of the names, sizes and
ETags of the shards, so other shards have another folder. Nothing in it is trusted: the reader
compares a checksum. Bytes are added until all copies reach a bound. Samples come in random order,
each once an epoch, so to replace one by another would gain nothing; folders of other data sets, and
of shards that were replaced, are deleted, the one that was unused longest first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from deit_fast.errors import InputError
from deit_fast.runtime.copies import allocated_bytes, delete_unused, hold, last_use
from deit_fast.runtime.files import cache_folder, open_shared

log = logging.getLogger("deit_fast")

_SHARE_COUNTED = 64  # of the bound: how much a process adds before it counts again
_PRESENT, _CONTENT = "present", "content"


class SampleCopy:
    """The bytes of one split's samples on the local disk, as far as they are there.

    Without a folder that can be written it stays empty. Threads and processes may share it.

    Args:
        root: URL of the data set.
        split: of the data set.
        stamps: digest of the shards.
        limit: bytes of all copies of this user on this machine.
    """

    def __init__(self, root: str, split: str, stamps: str, limit: int) -> None:
        self._base = cache_folder() / "objects"
        owner = hashlib.sha256(root.encode()).hexdigest()[:16]
        self.folder = self._base / owner / f"{split}-{stamps}"
        self._limit = limit
        self._left = 0  # bytes to add before the next count
        self._is_full = limit == 0
        self._files: tuple[int, int] | None = None
        self._is_unusable = limit == 0

    def read(self, sample: int, position: int, length: int) -> bytes | None:
        """A sample's bytes, None where they are not there.

        Args:
            position: of the sample in the shards one after another.
        """
        files = self._opened()
        if files is None:
            return None
        with contextlib.suppress(OSError):
            if os.pread(files[0], 1, sample) == b"\1":
                content = os.pread(files[1], length, position)
                return content if len(content) == length else None
        return None

    def add(self, sample: int, position: int, content: bytes) -> None:
        """Keep a sample's bytes, if there is room."""
        files = self._opened()
        if files is None or self._is_full:
            return
        try:
            if len(content) > self._left:
                room = self._room(len(content))
                self._is_full = room < len(content)
                if self._is_full:
                    return
                self._left = min(room, max(len(content), self._limit // _SHARE_COUNTED))
            self._left -= len(content)
            if os.pwrite(files[1], content, position) == len(content):
                os.pwrite(files[0], b"\1", sample)
        except OSError as error:
            self._is_full = True
            log.warning("%s: %s: nothing more is kept there", self.folder, error.strerror)

    def _room(self, length: int) -> int:
        """Bytes that may still be added, after other data sets had to make room."""
        folders = {
            path.parent: allocated_bytes(path) for path in self._base.glob(f"*/*/{_CONTENT}")
        }
        others = [
            path for path in folders
            if path.parent != self.folder.parent
            or (path != self.folder and path.name[:-16] == self.folder.name[:-16])
        ]  # fmt: skip
        free = self._limit - sum(folders.values())
        for path in sorted(others, key=lambda path: last_use(path / _PRESENT)):
            if free >= length:
                break
            if _remove(path):
                log.info("deleted %s to make room for %s", path, self.folder)
                free += folders[path]
        return free

    def _opened(self) -> tuple[int, int] | None:
        if self._files is None and not self._is_unusable:
            try:
                self._files = self._open()
            except (OSError, InputError) as error:
                self._is_unusable = True
                log.warning("samples are not kept on this machine: %s", error)
        return self._files

    def _open(self) -> tuple[int, int]:
        """Descriptors of both files; the first one holds the copy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        present = hold(self.folder / _PRESENT)
        try:
            return present, open_shared(self.folder / _CONTENT)
        except BaseException:
            os.close(present)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": None}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files") or ():
            os.close(descriptor)


def _remove(folder: Path) -> bool:
    """Delete a copy that no process uses."""
    is_deleted = delete_unused(folder / _PRESENT, lambda: shutil.rmtree(folder))
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # if it is empty
    return is_deleted
