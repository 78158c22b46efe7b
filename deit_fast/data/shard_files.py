"""Reading parts of many large files through a bounded number of open ones."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from deit_fast.errors import InputError
from deit_fast.runtime.files import open_regular

_MOST_OPEN = 256


def stamps_of(paths: Sequence[str]) -> np.ndarray:
    """Size in bytes, modification and change time in ns of each file, int64 [n, 3].

    Raises:
        OSError: names the file.
    """
    status = (os.stat(path) for path in paths)
    rows = [(file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in status]
    return np.array(rows, np.int64).reshape(-1, 3)


def require_distinct(files: Sequence[str]) -> None:
    """
    Raises:
        InputError: two shards are one file, through a link: its images would count twice.
    """
    paths: dict[tuple[int, int], str] = {}
    for path in files:
        status = os.stat(path)
        other = paths.setdefault((status.st_dev, status.st_ino), path)
        if other != path:
            raise InputError(
                f"{path} and {other} are one file, through a link, and its images would count "
                f"twice; remove the link"
            )


class ShardFiles:
    """The files of a split, of which the most recently read ones are open.

    Threads and forked processes may share it: `pread` has no file position, and a file that another
    thread still reads is closed only afterwards. Nothing is mapped, because reading a mapped file
    that has been shortened kills the process.

    Args:
        paths: of regular files.
        stamps: `stamps_of` the files when their index was made; other files are refused.
    """

    def __init__(self, paths: Sequence[str], stamps: np.ndarray) -> None:
        self._paths, self._stamps = paths, stamps
        self._share()

    def read(self, number: int, offset: int, length: int) -> bytes:
        """``length`` bytes of a file.

        Raises:
            InputError: the file is no longer the one that was indexed.
            OSError: it cannot be read; names the file.
        """
        path, content = self._paths[number], b""
        try:
            file = self._opened(path)
            while len(content) < length:
                part = os.pread(file.descriptor, length - len(content), offset + len(content))
                if not part:
                    break
                content = content + part if content else part
            status = os.fstat(file.descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        size, time, _ = self._stamps[number].tolist()  # a chmod or a new link harms no reader
        if len(content) < length or (status.st_size, status.st_mtime_ns) != (size, time):
            raise InputError(f"{path} was changed while it was in use: start the command again")
        return content

    def _share(self) -> None:
        # lru_cache is safe between threads, and has no lock that a fork could leave locked.
        self._opened = functools.lru_cache(_most_open())(_OpenFile)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()  # a spawned process opens its own


class _OpenFile:
    """A descriptor that is closed when nobody refers to it."""

    descriptor = -1

    def __init__(self, path: str) -> None:
        with open_regular(path) as file:
            self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _most_open() -> int:
    """A quarter of the files that this process may open: training and held-out images have as many
    each, and batches from loader processes need descriptors too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if soft < 0 else max(1, min(_MOST_OPEN, soft // 4))
