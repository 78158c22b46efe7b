"""Tar archives made of given members, and a data set of tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit_fast.config import DataConfig
from deit_fast.data import open_source


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


def write_tars(folder: Path, root: Path, per_shard: int = 4, label: str = "cls") -> None:
    """The images of a folder as tar shards, in the folder's order."""
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        source = open_source(DataConfig(root=str(folder)), split, 24)
        (root / "classes.txt").write_text("\n".join(source.classes) + "\n")
        (root / split).mkdir()
        for start in range(0, source.num_samples, per_shard):
            path = root / split / f"{split}-{start // per_shard:06d}.tar"
            with tarfile.open(path, "w") as archive:
                for index in range(start, min(start + per_shard, source.num_samples)):
                    value = int(source.labels[index])
                    text = str(value) if label == "cls" else json.dumps({"label": value, "x": "y"})
                    add(archive, f"{index:06d}.jpg", source.read(index))
                    add(archive, f"{index:06d}.{label}", text.encode())
