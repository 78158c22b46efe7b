"""What can be wrong with a cache, as one-line messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deit_fast import _C
from deit_fast.config import InputError


class CacheError(InputError):
    """The cache lacks what was asked of it, or its bytes are not what its format allows."""


class CacheMismatch(CacheError):
    """The cache was made under other settings; the text names each differing field."""


class RowError(CacheError):
    """One row of a batch cannot be stored or read; the caller knows which sample that is."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row, self.reason = row, reason


@contextmanager
def format_errors() -> Iterator[None]:
    """The extension's FormatError, which names file and block, as CacheError."""
    try:
        yield
    except _C.FormatError as error:
        raise CacheError(str(error)) from None
