"""Cache of a teacher's features: opening, gather, streaming in training order, decoding.

Open: a view of 1,281,167 pooled features, fp8, 384 channels; header and block table are real, the
records are a hole in the file. Ours reads manifest, header and table and finds the complete views;
its peer maps the file and checks nothing.

Gather: 256 random records of 65,536 pooled features, warm. Ours maps samples to positions, checks
ids and the file, and decodes to float32; numpy takes such records from a memory map at positions
known before, "decoded" through torch's float8.

Stream: patch tokens, 14 x 14 x 384, fp8, one view, in the order of training, 128 records a batch.
"warm": 1,024 records, verified and in memory. "cold": 4,096, opened anew after the file left the
memory, blocks read ahead and verified; the peer copies the same ranges from a memory map into
torch's memory. The bytes are not decoded.

Decode: one batch of 32 records of patch tokens to float32.

Share: what a step takes from the cache beside the step itself, 32 views of 224 pixels: gather and
decode of pooled features and of patch tokens, warm, against forward and backward of DeiT-Ti in
float32. The optimiser is left out, which makes the share larger.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deit_fast import _C
from deit_fast.cache import LogitCache, LogitCacheWriter, build_feature_manifest, feature_codec
from deit_fast.cache.format import publish_manifest, view_path, view_specs
from deit_fast.models import create_student
from deit_fast.runtime.files import temporary_path

from .cache_stores import drop_from_memory
from .common import Case

WIDTH, TOKENS = 384, 196
FINGERPRINT = {"view.seed": 0, "view.repeats": 1}


def manifest_of(samples: int, tokens: int) -> dict[str, Any]:
    return build_feature_manifest(
        "fp8", tokens=tokens, width=WIDTH, num_samples=samples, fingerprint=FINGERPRINT
    )


@cache
def stored(samples: int, tokens: int) -> tuple[tempfile.TemporaryDirectory[str], LogitCache]:
    """A view of random features, verified; the folder lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="deit-fast-bench-")
    generator = torch.Generator().manual_seed(0)
    with LogitCacheWriter(folder.name, manifest_of(samples, tokens)) as writer:
        for block in range(writer.num_blocks):
            ids = writer.block_samples(0, block)
            writer.write(ids, 0, torch.randn(len(ids), tokens, WIDTH, generator=generator))
    opened = LogitCache.open(folder.name)
    for ids in np.array_split(opened.order.samples(0, 0, samples), max(1, samples // 256)):
        opened.gather_records(ids, 0)
    return folder, opened


def mapped(opened: LogitCache) -> np.ndarray:
    """The records of view 0 through numpy.memmap, without any check."""
    offset = view_specs(opened.manifest)(view_id=0).data_offset
    shape = opened.manifest["num_samples"], opened.codec.record_bytes
    return np.memmap(view_path(opened.path, 0), np.uint8, "r", offset, shape)


def cases(device: str) -> list[Case]:
    return [open_case(), gather_case(256), stream_case(128), cold_stream_case(128), decode_case(32),
            share_case(32)]  # fmt: skip


def open_case(samples: int = 1_281_167) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        folder = Path(hole(samples).name)
        spec = view_specs(json.loads((folder / "manifest.json").read_text()))
        offset = spec(view_id=0).data_offset
        shape = samples, 4 + WIDTH

        def ours() -> None:
            if LogitCache.open(folder).views != [0]:
                raise RuntimeError("the view is not complete")

        return {
            "ours": ours,
            "numpy memmap": lambda: np.memmap(view_path(folder, 0), np.uint8, "r", offset, shape),
        }

    return Case(f"open N={samples} pooled fp8 D={WIDTH}", build, on_host=True)


@cache
def hole(samples: int) -> tempfile.TemporaryDirectory[str]:
    """A cache whose only view is marked complete and was never written."""
    folder = tempfile.TemporaryDirectory(prefix="deit-fast-bench-")
    path = Path(folder.name)
    manifest = publish_manifest(path, manifest_of(samples, 1))
    name = view_path(path, 0)
    spec = view_specs(manifest)(view_id=0)
    _C.ViewWriter(str(name), str(temporary_path(name)), spec)
    with open(name, "r+b") as file:
        file.seek(4096)
        file.write(struct.pack("<I4s", 0, b"DONE") * spec.blocks)
    return folder


def decode_with_torch(records: np.ndarray, tokens: int) -> torch.Tensor:
    raw = torch.from_numpy(records).view(len(records), tokens, 4 + WIDTH)
    scale = raw[..., :4].contiguous().view(torch.float32)
    return raw[..., 4:].view(torch.float8_e4m3fn).float() * scale


def gather_case(batch: int, samples: int = 65536) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        _, opened = stored(samples, 1)
        draw = np.random.default_rng(1)
        batches = [draw.permutation(samples)[:batch] for _ in range(64)]
        positions = [opened.order.positions(ids, np.asarray(0)) for ids in batches]
        memory, views = mapped(opened), np.zeros(batch, np.int64)
        turns = dict.fromkeys(("ours", "raw", "decoded"), 0)

        def turn(name: str) -> int:
            turns[name] += 1
            return turns[name] % len(batches)

        return {
            "ours": lambda: opened.gather(batches[turn("ours")], views),
            "numpy take, decoded": lambda: decode_with_torch(
                np.take(memory, positions[turn("decoded")], axis=0), 1
            ),
            "numpy take, raw": lambda: np.take(memory, positions[turn("raw")], axis=0),
        }

    return Case(f"gather pooled fp8 D={WIDTH} B={batch}", build, items=batch, on_host=True,
                bytes_moved=batch * (4 + 5 * WIDTH))  # fmt: skip


def training_batches(opened: LogitCache, batch: int) -> list[np.ndarray]:
    samples = opened.manifest["num_samples"]
    return np.split(opened.order.samples(0, 0, samples), samples // batch)


def stream_case(batch: int, samples: int = 1024) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        _, opened = stored(samples, TOKENS)
        batches, memory = training_batches(opened, batch), mapped(opened)

        def ours() -> None:
            for ids in batches:
                opened.gather_records(ids, 0)

        def peer() -> None:
            for start in range(0, samples, batch):
                copied(memory[start : start + batch])

        return {"ours": ours, "numpy memmap": peer}

    return Case(f"stream, warm: patches {TOKENS}x{WIDTH} fp8 B={batch}", build, items=samples,
                bytes_moved=2 * samples * TOKENS * (4 + WIDTH), on_host=True)  # fmt: skip


def copied(records: np.ndarray) -> torch.Tensor:
    found = torch.empty(records.shape, dtype=torch.uint8)
    np.copyto(found.numpy(), records)
    return found


def cold_stream_case(batch: int, samples: int = 4096) -> Case:
    def forget(name: str) -> None:
        folder, opened = stored(samples, TOKENS)
        opened._open_views = LogitCache.open(folder.name)._open_views  # a mapped file stays
        drop_from_memory([view_path(Path(folder.name), 0)])

    def build() -> dict[str, Callable[[], Any] | str]:
        folder, warm = stored(samples, TOKENS)
        batches = [(ids, 0) for ids in training_batches(warm, batch)]

        def ours() -> None:
            opened = LogitCache.open(folder.name)
            with opened.prefetch(batches) as ahead:
                for ids, view in ahead:
                    opened.gather_records(ids, view)

        def peer() -> None:
            memory = mapped(warm)
            for start in range(0, samples, batch):
                copied(memory[start : start + batch])

        return {"ours": ours, "numpy memmap": peer}

    moved = samples * TOKENS * (4 + WIDTH)
    return Case(f"stream, cold: patches {TOKENS}x{WIDTH} fp8 B={batch}", build, items=samples,
                before=forget, bytes_moved=moved, on_host=True)  # fmt: skip


def _decode(codec: Any, records: torch.Tensor) -> torch.Tensor:
    return codec.decode(records, 1.0).float()


def decode_case(batch: int) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        found: dict[str, Callable[[], Any] | str] = {}
        x = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
        for name in ("fp8", "int8", "fp16"):
            codec = feature_codec(name, TOKENS, WIDTH)
            records = codec.encode(x)
            found[f"ours, {name}"] = partial(_decode, codec, records)
        raw = feature_codec("fp8", TOKENS, WIDTH).encode(x).numpy()
        return {**found, "torch float8": lambda: decode_with_torch(raw, TOKENS)}

    return Case(f"decode patches {TOKENS}x{WIDTH} B={batch}", build, items=batch, on_host=True,
                bytes_moved=batch * TOKENS * (4 + 5 * WIDTH))  # fmt: skip


def share_case(batch: int) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        student = create_student("deit_tiny_distilled_patch16_224", 1000).train()
        images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        found: dict[str, Callable[[], Any] | str] = {}
        for name, tokens, samples in (("pooled", 1, 65536), ("patches", TOKENS, 1024)):
            _, opened = stored(samples, tokens)
            ids, views = training_batches(opened, batch)[1], np.zeros(batch, np.int64)
            found[f"gather {name}"] = partial(opened.gather, ids, views)
        return {
            **found,
            "DeiT-Ti step": lambda: sum(head.float().sum() for head in student(images)).backward(),
        }

    return Case(f"share of a step B={batch}", build, items=batch, on_host=True)
