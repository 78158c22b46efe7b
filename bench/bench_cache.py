"""Teacher-logit cache: random gather from a whole ImageNet view, and encoding.

Gather: warm top-16 records (68 bytes) of one view of 1,281,167 samples in an epoch's order, so that
each comes once and the 87 MB of a view pass through the CPU's caches. "records" is the bytes alone,
"answers" with decoding to a TopK at T=2, beside numpy's raw copy of the same records from a memory
map, decoded or not. Ours also finds the views, checks ids and file size, and has compared every
block's checksum. Bytes: each record read once and written once.

Encode: logits to top-16 records with the tail mass at T=2, against numpy in float64.

Another store to compare with is one more entry of ``stores``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deit_fast import _C
from deit_fast.cache import LogitCache, LogitCacheWriter, build_manifest, codec_from_config
from deit_fast.cache.manifest import temporary_path, view_path, view_spec
from deit_fast.config import CodecConfig

from .common import Case

SAMPLES, CLASSES, K, TAU = 1_281_167, 1000, 16, 2.0
RECORD = np.dtype([("ids", "<u2", K), ("log_probs", "<f2", K), ("log_tail", "<f4")])


@cache
def imagenet_view() -> tuple[tempfile.TemporaryDirectory[str], LogitCache, np.memmap]:
    """A view of random records; the folder lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="deit-fast-bench-")
    path = Path(folder.name)
    codec = CodecConfig(k=K, temperatures=(TAU,))
    manifest = build_manifest(
        codec, num_classes=CLASSES, num_samples=SAMPLES, tau=TAU, fingerprint={"bench.seed": 0}
    )
    rng = np.random.default_rng(0)
    with LogitCacheWriter(path, manifest) as writer:  # publishes the manifest
        name = view_path(path, 0)
        file = _C.ViewWriter(str(name), str(temporary_path(name)), view_spec(manifest, 0))
        for block in range(writer.num_blocks):
            start, stop = writer.block_range(block)
            records = np.zeros(stop - start, RECORD)
            records["ids"] = rng.integers(0, CLASSES, (stop - start, K))
            records["log_probs"] = -np.sort(rng.exponential(4, (stop - start, K)))
            records["log_tail"] = -rng.exponential(1, stop - start)
            file.commit(block, records.ctypes.data, records.nbytes)
    opened = LogitCache.open(path)
    offset = view_spec(manifest, 0).data_offset
    mapped = np.memmap(name, np.uint8, "r", offset, (SAMPLES, RECORD.itemsize))
    for start in range(0, SAMPLES, 4096):  # warm: checksums compared, pages in memory
        opened.gather(np.arange(start, min(start + 4096, SAMPLES)), 0, tau=TAU)
    return folder, opened, mapped


def cases(device: str) -> list[Case]:
    batches = (256, 4096)
    found = [gather_case(batch, kind) for batch in batches for kind in ("records", "answers")]
    if device == "cuda":
        found += [resident_case(batch) for batch in batches]
    return found + [encode_case(device, batch) for batch in (256,)]


def stores() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name: sample ids [n] to raw records uint8 [n, bytes] of the same view."""
    _, _, mapped = imagenet_view()
    return {
        "numpy take": lambda ids: np.take(mapped, ids, axis=0),
        "numpy memmap[ids]": lambda ids: np.asarray(mapped[ids]),
    }


def gather_case(batch: int, kind: str) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        _, opened, _ = imagenet_view()
        order = np.random.default_rng(1).permutation(SAMPLES)
        views = np.zeros(batch, np.int64)
        # Each store at a place of its own in the order: no other has just read the same records.
        starts = {name: place * 200_000 for place, name in enumerate(("ours", *stores()))}

        def next_ids(name: str) -> np.ndarray:
            start = starts[name]
            starts[name] = start + batch if start + 2 * batch <= SAMPLES else 0
            return order[start : start + batch]

        def decode(raw: np.ndarray) -> Any:
            return opened.codec.decode(torch.from_numpy(raw), TAU, "bucket")

        def call(name: str, read: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Any]:
            return lambda: read(next_ids(name))

        def call_decoded(name: str, read: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Any]:
            return lambda: decode(read(next_ids(name)))

        if kind == "records":
            return {
                "ours": lambda: opened.gather_records(next_ids("ours"), views),
                "ours, decoded": lambda: opened.gather(next_ids("ours"), views, tau=TAU),
                **{name: call(name, read) for name, read in stores().items()},
            }
        return {
            "ours": lambda: opened.gather(next_ids("ours"), views, tau=TAU),
            **{name: call_decoded(name, read) for name, read in stores().items()},
        }

    moved = 2 * batch * RECORD.itemsize
    return Case(f"gather top-16 {kind} B={batch}", build, bytes_moved=moved, items=batch)


def resident_case(batch: int) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        _, opened, mapped = imagenet_view()
        resident = opened.to_device([0], "cuda")
        records = torch.from_numpy(np.array(mapped)).cuda()
        ids = torch.randint(SAMPLES, (batch,))
        views = torch.zeros(batch, dtype=torch.int64)

        def peer() -> Any:
            raw = records.index_select(0, ids.to("cuda", non_blocking=True))
            return opened.codec.decode(raw, TAU, "bucket")

        return {
            "ours": lambda: resident.gather(ids, views, tau=TAU),
            "torch index_select": peer,
        }

    moved = 2 * batch * RECORD.itemsize
    return Case(f"gather top-16 resident B={batch}", build, bytes_moved=moved, items=batch)


def encode_case(device: str, batch: int) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        codec = codec_from_config(CodecConfig(k=K, temperatures=(TAU,)), CLASSES, TAU)
        logits = torch.randn(batch, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
        values = logits.numpy()
        on_device = logits.to(device)
        return {
            "ours": lambda: codec.encode(on_device),
            "numpy": lambda: numpy_encode(values),
        }

    return Case(f"encode top-16 C={CLASSES} B={batch} fp32", build, items=batch)


def numpy_encode(logits: np.ndarray) -> np.ndarray:
    """The same records, by a stable sort and float64 sums."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    z = logits.astype(np.float64)
    inside = np.take_along_axis(z, ids, 1)
    outside = z.copy()
    np.put_along_axis(outside, ids, -np.inf, 1)
    records = np.zeros(len(logits), RECORD)
    records["ids"] = ids
    records["log_probs"] = inside - log_sum_exp(z)[:, None]
    records["log_tail"] = log_sum_exp(outside / TAU) - log_sum_exp(z / TAU)
    return records


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    largest = x.max(1)
    return np.log(np.exp(x - largest[:, None]).sum(1)) + largest
