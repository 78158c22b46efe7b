"""Errors of the C++ extension as errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deit_fast import _C
from deit_fast.errors import CacheError


@contextmanager
def format_errors() -> Iterator[None]:
    """The extension's FormatError, which names file and block, as CacheError."""
    try:
        yield
    except _C.FormatError as error:
        raise CacheError(str(error)) from None
