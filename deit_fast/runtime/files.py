"""Files that are complete or absent (a temporary name, a sync, a rename), and arrays in them."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file. A crash or a full disk leaves the old file, or none.

    Raises:
        OSError: names the file; no part of the new content remains.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself must survive a power cut
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def cache_folder() -> Path:
    """The user's folder for data that can be recomputed: $XDG_CACHE_HOME/deit-fast."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "deit-fast"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file atomically; the zip format has a checksum for each array."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(path, content.getbuffer())


def read_arrays(path: Path, dtypes: Mapping[str, npt.DTypeLike]) -> dict[str, np.ndarray]:
    """Named arrays of an .npz file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or an array is missing or has another dtype.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in dtypes}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name, dtype in dtypes.items():
        if arrays[name].dtype != dtype:
            raise ValueError(f"{path}: {name} must be {np.dtype(dtype)}, not {arrays[name].dtype}")
    return arrays
