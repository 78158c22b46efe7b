"""Tar archives made of given members."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import Any


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    """A member; `fields` are attributes of its TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def tar_of(
    members: Iterable[tuple[str, bytes] | tuple[str, bytes, dict[str, Any]]],
    form: int = tarfile.GNU_FORMAT,
) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, encoding="utf-8") as archive:
        for name, content, *fields in members:
            add(archive, name, content, **(fields[0] if fields else {}))
    return file.getvalue()
