"""Digests of some views' pixels as the teacher saw them, one small JSON file a view.

A view's digests are of samples of one block, and are on the disk before that block is committed:
whoever writes the block writes them, so they depend on process count and interruptions as little
as the block does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deit_fast.cache.format import canonical, temporary_path
from deit_fast.errors import CacheError

SAMPLES_PER_VIEW = 64
DIGEST_HEX = 32
PIXEL_CONTRACT = {"contract.pixel_digests": 1}  # in the fingerprint of every cache that has them
_MAX_FILE_BYTES = 1 << 20


def pixels_path(folder: Path, view_id: int) -> Path:
    return folder / f"view-{view_id:05d}.pixels.json"


def sampled_ids(manifest: Mapping[str, Any], view_id: int) -> np.ndarray:
    """Samples whose pixels are recorded, int64 [at most 64], rising: evenly spaced in the block
    ``view_id`` mod the number of blocks."""
    records, count = manifest["block_records"], manifest["num_samples"]
    start = view_id % -(-count // records) * records
    size = min(records, count - start)
    chosen = min(SAMPLES_PER_VIEW, size)
    return start + np.arange(chosen) * size // chosen


def write_pixels(
    folder: Path, manifest: Mapping[str, Any], view_id: int, digests: Mapping[int, str]
) -> None:
    """Put a view's digests, by sample id, into the cache; whole or not at all."""
    path = pixels_path(folder, view_id)
    content = {
        "view": view_id,
        "manifest_sha256": _manifest_digest(manifest),
        "samples": sorted(digests),
        "digests": [digests[sample] for sample in sorted(digests)],
    }
    temporary = temporary_path(path)
    try:
        with open(temporary, "x") as file:
            json.dump(content, file, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a block must not outlive its digests in a power cut
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_pixels(folder: Path, manifest: Mapping[str, Any], view_id: int) -> dict[int, str]:
    """A view's digests by sample id.

    Raises:
        CacheError: they are missing, damaged or of another cache.
    """
    path = pixels_path(folder, view_id)
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        raise CacheError(
            f"{path} is missing, so nothing tells whether view {view_id} can be reproduced: "
            f"delete its .dlc file and precompute it again"
        ) from None
    try:
        content = json.loads(raw)
        samples, digests = content["samples"], content["digests"]
        right = (
            content["view"] == view_id
            and samples == sampled_ids(manifest, view_id).tolist()
            and len(digests) == len(samples)
            and all(isinstance(digest, str) and len(digest) == DIGEST_HEX for digest in digests)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        right = False
    if not right:
        raise CacheError(f"{path}: damaged: these are not the pixel digests of view {view_id}")
    if content.get("manifest_sha256") != _manifest_digest(manifest):
        raise CacheError(f"{path}: was written under another manifest (SHA-256 differs)")
    return dict(zip(samples, digests, strict=True))


def pick_pixels(
    folder: Path, manifest: Mapping[str, Any], view_ids: Iterable[int], count: int
) -> list[tuple[int, int, str]]:
    """About ``count`` of the recorded (view, sample, digest), spread over views and samples.

    Raises:
        CacheError: as ``read_pixels``.
    """
    views = list(view_ids)
    views = views[:: -(-len(views) // count)] if len(views) > count else views
    share = -(-count // max(1, len(views)))
    picked = []
    for place, view_id in enumerate(views):
        rows = list(read_pixels(folder, manifest, view_id).items())
        step = max(1, len(rows) // share)
        picked += [(view_id, *row) for row in rows[place % step :: step][:share]]
    return picked


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(manifest)).hexdigest()
