"""Small caches of logits."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deit_fast import _C
from deit_fast.cache import (
    LogitCache,
    LogitCacheWriter,
    build_feature_manifest,
    build_manifest,
    codec_from_config,
)
from deit_fast.cache.format import manifest_sha256
from deit_fast.config import CodecConfig
from deit_fast.kernels import TopK

SAMPLES, CLASSES, BLOCK = 45, 20, 16  # three blocks, the last one short


def make_manifest(name="topk", *, classes=CLASSES, samples=SAMPLES, block=BLOCK, tau=1.0, **codec):
    config = CodecConfig(name=name, **codec)
    fingerprint = {"view.seed": 7, "teacher.name": "näive", "view.mean": (0.5, 1.0, 1e-05)}
    return build_manifest(
        config, num_classes=classes, num_samples=samples, tau=tau, fingerprint=fingerprint,
        block_records=block,
    )  # fmt: skip


def make_logits(view: int, samples=SAMPLES, classes=CLASSES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(view)
    return torch.randn(samples, classes, generator=generator) * 4


def make_feature_manifest(
    codec="fp8", *, tokens=4, width=6, samples=SAMPLES, block=BLOCK, order="pairs", repeats=3
):
    fingerprint = {"view.seed": 7, "view.repeats": repeats, "target.name": "patches"}
    return build_feature_manifest(
        codec, tokens=tokens, width=width, num_samples=samples, fingerprint=fingerprint,
        order=order, block_records=block,
    )  # fmt: skip


def make_features(view: int, samples=SAMPLES, tokens=4, width=6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(view)
    return torch.randn(samples, tokens, width, generator=generator)


def write_features(path, manifest, views=(0,)) -> LogitCache:
    samples, codec = manifest["num_samples"], manifest["codec"]
    with LogitCacheWriter(path, manifest) as writer:
        for view in views:
            features = make_features(view, samples, codec["tokens"], codec["width"])
            writer.write(torch.arange(samples), view, features)
    return LogitCache.open(path)


def write_cache(path, manifest, views=(0,)) -> LogitCache:
    samples, classes = manifest["num_samples"], manifest["codec"]["num_classes"]
    with LogitCacheWriter(path, manifest) as writer:
        for view in views:
            writer.write(torch.arange(samples), view, make_logits(view, samples, classes))
    return LogitCache.open(path)


def edit_manifest(folder: Path, **changes: Any) -> Path:
    """The manifest as somebody leaves it who edits it and removes its checksum."""
    file = folder / "manifest.json"
    values = json.loads(file.read_text()) | changes
    values.pop("crc32c", None)
    file.write_text(json.dumps(values))
    return file


def block_checksum(manifest: Mapping[str, Any], view: int, block: int, records: bytes) -> int:
    """Of a block in its place: docs/cache-format.md."""
    place = manifest_sha256(manifest) + struct.pack("<QQ", view, block)
    return _C.crc32c(place + records if manifest["format"] >= 3 else records)


def view_start(manifest: Mapping[str, Any], view: int, checksums: Sequence[int]) -> bytes:
    """Header and table of a view whose blocks are all complete, after docs/cache-format.md."""
    count, size, per_block = (manifest[k] for k in ("num_samples", "record_bytes", "block_records"))
    table = b"".join(struct.pack("<I4s", checksum, b"DONE") for checksum in checksums)
    table = table.ljust(-(-len(table) // 4096) * 4096, b"\0")
    header = struct.pack(
        "<8sIIQIIQQ32s", b"DFLOGIT1", manifest["format"], 4096, count, size, per_block, view,
        4096 + len(table), manifest_sha256(manifest),
    ).ljust(4092, b"\0")  # fmt: skip
    return header + struct.pack("<I", _C.crc32c(header)) + table


def write_view(folder: Path, manifest: Mapping[str, Any], view: int, records: bytes) -> Path:
    """A complete view file, after docs/cache-format.md, not by the writer."""
    step = manifest["block_records"] * manifest["record_bytes"]
    blocks = [records[start : start + step] for start in range(0, len(records), step)]
    checksums = [block_checksum(manifest, view, *item) for item in enumerate(blocks)]
    path = folder / f"view-{view:05d}.dlc"
    path.write_bytes(view_start(manifest, view, checksums) + records)
    return path


def pending_blocks(writer: LogitCacheWriter, views) -> list[tuple[int, int]]:
    """(view, block) of every block of these views that is not written yet."""
    blocks = range(writer.num_blocks)
    return [(view, block) for view in views for block in blocks if not writer.is_done(view, block)]


def file_bytes(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(path.iterdir())}


def codec_of(name="topk", classes=CLASSES, tau=1.0, **settings):
    return codec_from_config(CodecConfig(name=name, **settings), classes, tau)


def true_log_probs(logits: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    return torch.log_softmax(logits.double() / tau, 1)


def equal(a, b) -> bool:
    if isinstance(a, TopK):
        return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a[:3], b[:3], strict=True))
    return torch.equal(a.cpu(), b.cpu())


def reading_threads() -> int:
    """Of this process, by name: others come and go as other tests' threads end."""
    return sum(thread.name.startswith("dlc-read-ahead") for thread in threading.enumerate())
