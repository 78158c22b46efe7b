"""pyarrow, which is optional."""

from __future__ import annotations

from typing import Any

from deit_fast.errors import InputError


def import_pyarrow(what: str = "Parquet") -> tuple[Any, Any]:
    """pyarrow and its module for Parquet.

    Args:
        what: needs it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{what} needs pyarrow: pip install 'deit-fast[parquet]'") from None
    return pa, pq
