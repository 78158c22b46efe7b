"""Errors that a user can cause. The command line prints each as one line with exit status 2."""

from __future__ import annotations


class InputError(ValueError):
    """An input is wrong; the message names it, its value and the remedy."""


class CacheError(InputError):
    """The cache lacks what was requested, or its bytes do not follow its format."""


class CacheMismatch(CacheError):
    """The cache was made under other settings; the message names each field that differs."""


class RowError(CacheError):
    """One row of a batch cannot be stored or read; the caller knows which sample it is."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row, self.reason = row, reason
