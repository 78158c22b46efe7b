"""Files that are whole or absent: a temporary name, a sync, a rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a crash or a full disk leaves the old one, or none.

    Raises:
        OSError: with the file's name; nothing of the new content stays.
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
