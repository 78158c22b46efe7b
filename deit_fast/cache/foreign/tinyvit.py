"""Soft labels of TinyViT (microsoft/Cream, TinyViT/data/augmentation).

An epoch is a folder `logits_top{K}_epoch{e}`: `rank{r}-keys.txt`, one key a line, and
`rank{r}-values.bin`, per key an int32 seed, K int16 class ids, which wrap above 32,767, and K
float16 probabilities.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deit_fast.cache.foreign.fkd import are_top_k
from deit_fast.cache.foreign.records import Damage, Foreign, Records
from deit_fast.errors import InputError
from deit_fast.runtime.files import open_regular, read_file

_FOLDER = re.compile(r"logits_top([1-9]\d{0,4})_epoch(\d{1,9})")
_CHUNK = 4096


class TinyVit(Foreign):
    """Labels of TinyViT; a sample is a key in an epoch."""

    name = "TinyViT"
    replay = (
        "its views are made by TinyViT's own augmentation code from the stored seeds, which this "
        "loader cannot replay"
    )

    def __init__(self, path: Path, epochs: list[Path]) -> None:
        files = [file for epoch in epochs for file in epoch.glob("rank*-values.bin")]
        super().__init__(path, sorted(files, key=_order))
        self._epochs, self._repeated, self._seen = len(epochs), 0, (Path(), set[str]())

    def rows(self) -> list[tuple[str, str]]:
        rows = [("epochs", str(self._epochs))]
        if self._repeated:
            rows.append(("repeated", f"{self._repeated} keys of an epoch; the first one counts"))
        return rows

    def read(self, file: Path) -> Iterator[Records | Damage]:
        k, epoch = _k_and_epoch(file.parent)
        dtype = np.dtype([("seed", "<i4"), ("ids", "<u2", (k,)), ("probs", "<f2", (k,))])
        try:
            name = file.with_name(file.name.replace("-values.bin", "-keys.txt"))
            keys = [key.strip() for key in read_file(name).decode().splitlines()]
        except UnicodeDecodeError:
            raise InputError(f"{name} is not text") from None
        if self._seen[0] != file.parent:
            self._seen = file.parent, set()
        with open_regular(file) as values:
            size = os.fstat(values.fileno()).st_size
            if size != len(keys) * dtype.itemsize:
                raise InputError(
                    f"it has {size} bytes; {len(keys)} keys of top-{k} need "
                    f"{len(keys) * dtype.itemsize}"
                )
            for start in range(0, len(keys), _CHUNK):
                part = keys[start : start + _CHUNK]
                rows = np.frombuffer(values.read(len(part) * dtype.itemsize), dtype)
                right = are_top_k(rows["ids"], rows["probs"])
                for index in np.flatnonzero(~right):
                    yield Damage(
                        f"{file}: {part[index]} has no {k} different ids with probabilities"
                    )
                kept = [i for i in np.flatnonzero(right) if self._is_new(part[i])]
                if kept:
                    yield _records([part[i] for i in kept], rows[kept], epoch)

    def _is_new(self, key: str) -> bool:
        """False for what a sampler that pads adds to an epoch."""
        if key in self._seen[1]:
            self._repeated += 1
            return False
        self._seen[1].add(key)
        return True


def _records(keys: list[str], rows: np.ndarray, epoch: int) -> Records:
    from torch import from_numpy

    arrays = {"epoch": np.full(len(rows), epoch, np.int32), "seed": rows["seed"],
              "ids": rows["ids"].astype(np.int32), "probs": rows["probs"]}  # fmt: skip
    tensors = {n: from_numpy(np.ascontiguousarray(a[:, None])) for n, a in arrays.items()}
    return Records(keys, tensors, {}, 1)


def epoch_folders(path: Path) -> list[Path]:
    """The folders of epochs in a folder, or the folder itself."""
    path = path.resolve()
    if _FOLDER.fullmatch(path.name):
        return [path]
    try:
        return [each for each in path.iterdir() if _FOLDER.fullmatch(each.name) and each.is_dir()]
    except OSError:
        return []


def _k_and_epoch(folder: Path) -> tuple[int, int]:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _order(file: Path) -> tuple[int, int, str]:
    """By epoch and rank."""
    rank = file.name.removeprefix("rank").removesuffix("-values.bin")
    return _k_and_epoch(file.parent)[1], int(rank) if rank.isdecimal() else -1, file.name
