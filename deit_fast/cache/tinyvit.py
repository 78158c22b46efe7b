"""Logits that TinyViT stored, as a cache: for `cache info`, `cache export` and statistics.

TinyViT (microsoft/Cream, TinyViT/data/augmentation) keeps an epoch in a folder
`logits_top{K}_epoch{e}`: `rank{r}-keys.txt`, one key a line, and `rank{r}-values.bin`, per key an
int32 seed, K int16 class ids and K float16 probabilities. The seed replays TinyViT's own
augmentation code and no other, so a run of this project cannot use such a cache: `train` refuses
it. Seeds are not kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deit_fast.cache.format import build_manifest
from deit_fast.cache.writer import LogitCacheWriter
from deit_fast.config import CodecConfig
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.files import open_regular, read_file, write_atomically
from deit_fast.runtime.locks import owned_folder

if TYPE_CHECKING:
    import torch

KEYS_FILE = "keys.txt"  # line i is the key of sample i
_LEAST = 2.0**-25  # for a probability that float16 rounded to zero: half its least step
_CHUNK = 4096


def is_tinyvit(manifest: Mapping[str, Any]) -> bool:
    """Whether a cache was made by ``import_tinyvit``."""
    return manifest["fingerprint"].get("source") == "tinyvit"


def import_tinyvit(folder: str | Path, out: str | Path, num_classes: int) -> dict[str, Any]:
    """Write every epoch below ``folder`` as a view of a new `topk` cache.

    View e is epoch e; sample i is the i-th of the sorted keys that all epochs have, written to
    keys.txt in the cache. A probability p becomes log p and the tail the rest 1 - sum, at least
    2^-25, spread evenly over the classes that were not stored. Ids that wrapped below zero are
    read as unsigned.

    Args:
        folder: holds folders `logits_top{K}_epoch{e}`, or is one.
        num_classes: of the teacher; TinyViT does not store it.

    Returns:
        `views`, `samples`, `dropped` (keys that not every epoch has), `k`.

    Raises:
        InputError: no such folders, different K, a file of the wrong size, an id or a probability
            that cannot be, ``out`` holds another cache or another process writes it.
    """
    epochs, k = _epoch_folders(Path(folder))
    if not 1 <= k <= num_classes or num_classes > 65536:
        raise InputError(
            f"{folder}: top-{k} of {num_classes} classes: --num-classes must lie in [{k}, 65536]"
        )
    tables = {epoch: _Epoch(path, k) for epoch, path in epochs.items()}
    shared = set.intersection(*(set(table.index_of) for table in tables.values()))
    every = set.union(*(set(table.index_of) for table in tables.values()))
    if not shared:
        raise InputError(f"{folder}: no key is in all of its {len(tables)} epochs")
    keys = sorted(shared)
    text = "".join(f"{key}\n" for key in keys).encode()
    fingerprint = {
        "source": "tinyvit",
        "tinyvit.keys_sha256": hashlib.sha256(text).hexdigest(),
        "tinyvit.values_sha256": {str(e): t.digest() for e, t in sorted(tables.items())},
    }
    manifest = build_manifest(
        CodecConfig(name="topk", k=k, temperatures=(1.0,)),
        num_classes=num_classes,
        num_samples=len(keys),
        tau=1.0,
        fingerprint=fingerprint,
    )
    with (
        owned_folder(Path(out), ".lock-import", "the import"),
        LogitCacheWriter(out, manifest) as writer,
    ):
        write_atomically(Path(out) / KEYS_FILE, text)
        for epoch, table in sorted(tables.items()):
            for start in range(0, len(keys), _CHUNK):
                part = keys[start : start + _CHUNK]
                logits = table.logits([table.index_of[key] for key in part], num_classes)
                writer.write(np.arange(start, start + len(part)), epoch, logits)
    return {
        "views": len(tables),
        "samples": len(keys),
        "dropped": len(every) - len(keys),
        "k": k,
    }


class _Epoch:
    """One epoch's files: the index of every key among the records of all ranks."""

    def __init__(self, folder: Path, k: int) -> None:
        self.folder = folder
        self.dtype = np.dtype([("seed", "<i4"), ("ids", "<u2", (k,)), ("probs", "<f2", (k,))])
        self.index_of: dict[str, int] = {}
        files = sorted(folder.glob("rank*-values.bin"), key=_rank)
        if not files:
            raise InputError(f"{folder} has no rank{{r}}-values.bin")
        parts: list[np.ndarray] = []
        count = 0
        for path in files:
            name = path.with_name(path.name.replace("-values.bin", "-keys.txt"))
            try:
                keys = read_file(name).decode().splitlines()
            except UnicodeDecodeError:
                raise InputError(f"{name}: not text") from None
            size = path.stat().st_size
            if size != len(keys) * self.dtype.itemsize:
                raise InputError(
                    f"{path} has {size} bytes; {len(keys)} keys of top-{k} need "
                    f"{len(keys) * self.dtype.itemsize}"
                )
            if keys:
                with open_regular(path) as file:
                    parts.append(np.memmap(file, self.dtype, mode="r"))
            for index, key in enumerate(keys, count):
                self.index_of.setdefault(key.strip(), index)  # a padded key repeats; first counts
            count += len(keys)
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def digest(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.tobytes())
        return digest.hexdigest()

    def logits(self, requested: list[int], num_classes: int) -> torch.Tensor:
        """Log-probabilities, dense, float64 [n, num_classes]; the tail spread evenly."""
        indices = np.array(requested)
        rows = np.empty(len(indices), self.dtype)
        for start, part in zip(self.starts, self.parts, strict=False):
            here = np.flatnonzero((indices >= start) & (indices < start + len(part)))
            rows[here] = part[indices[here] - start]
        ids, probs = rows["ids"].astype(np.int64), rows["probs"].astype(np.float64)
        distinct = (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(axis=1)
        likely = (np.isfinite(probs) & (probs >= 0) & (probs <= 1.001)).all(axis=1)
        bad = ~(distinct & likely & (ids < num_classes).all(axis=1) & (probs.sum(1) < 1.01))
        if bad.any():
            raise CacheError(
                f"{self.folder}: record {indices[bad][0]} has no {ids.shape[1]} different ids "
                f"below {num_classes} with probabilities: another K, or another --num-classes?"
            )
        probs = np.maximum(probs, _LEAST)
        outside = num_classes - ids.shape[1]
        tail = np.maximum(1.0 - probs.sum(1, keepdims=True), _LEAST)
        # below every stored one, so that the stored ids stay the largest
        rest = np.minimum(tail / max(outside, 1), probs.min(1, keepdims=True) * 0.999)
        logits = np.repeat(np.log(rest), num_classes, axis=1)
        np.put_along_axis(logits, ids, np.log(probs), axis=1)
        import torch

        return torch.from_numpy(logits)


def _epoch_folders(folder: Path) -> tuple[dict[int, Path], int]:
    pattern = re.compile(r"logits_top(\d+)_epoch(\d+)")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = {}
    for path in [folder, *sorted(folder.iterdir())]:
        match = pattern.fullmatch(path.resolve().name)
        if match and path.is_dir():
            found[int(match[2])] = (path, int(match[1]))
    if not found:
        raise InputError(f"{folder} has no folder logits_top{{K}}_epoch{{e}} of TinyViT")
    sizes = sorted({k for _, k in found.values()})
    if len(sizes) > 1:
        raise InputError(f"{folder} holds epochs of different K: {', '.join(map(str, sizes))}")
    return {epoch: path for epoch, (path, _) in found.items()}, sizes[0]


def _rank(path: Path) -> int:
    digits = path.name.removeprefix("rank").removesuffix("-values.bin")
    if not digits.isdecimal():
        raise InputError(f"{path}: expected rank{{r}}-values.bin")
    return int(digits)
