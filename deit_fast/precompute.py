"""`precompute`: what the teacher says about every view, once, into the cache.

The same loader and ingest step as `train`; only what consumes the batch differs. Under torchrun
each process takes every n-th block. The teacher always gets the same rows in the same calls,
counted from a block's start, so the bytes do not depend on process count or interruptions.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deit_fast.cache import LogitCacheWriter, build_manifest
from deit_fast.config import InputError, RunConfig
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewLoader
from deit_fast.data.sources import open_source
from deit_fast.evaluate import choose_device
from deit_fast.models.teachers import has_bf16
from deit_fast.train.metrics import Progress
from deit_fast.train.teaching import load_class_matched_teacher, views_fingerprint
from deit_fast.views import ViewPlan

log = logging.getLogger("deit_fast")


class TeacherCalls(Sequence):
    """The (sample ids, view ids) of each teacher call, for a list of (view, block)."""

    def __init__(
        self, blocks: list[tuple[int, int]], block_records: int, num_samples: int, batch: int
    ) -> None:
        self.calls = [
            (view, start, min(start + batch, stop))
            for view, block in blocks
            for stop in [min((block + 1) * block_records, num_samples)]
            for start in range(block * block_records, stop, batch)
        ]

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        view, start, stop = self.calls[index]
        return np.arange(start, stop), np.full(stop - start, view, np.int32)


def precompute(config: RunConfig, views: range | None = None) -> dict[str, Any]:
    """Write the teacher's answers for ``views`` (none: all that the run uses) into ``cache``.

    Blocks that are already there are verified and left; the same command goes on after any
    interruption.

    Returns:
        `views`, `blocks` written and `kept`, `images`, `seconds`, `images_per_s`, `bytes`
        (all of this process), `substituted` (paths).

    Raises:
        InputError: no teacher or cache named; class counts differ.
        CacheMismatch: the folder holds a cache of something else; names each differing field.
        OSError: the disk is full; whole blocks stay.
    """
    if config.teacher is None or config.cache is None:
        missing = "--teacher SPEC" if config.teacher is None else "--cache DIR"
        raise InputError(f"precompute needs {missing}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    source = open_source(config.data, "train", config.view.image_size)
    teacher = load_class_matched_teacher(config, len(source.classes)).to(device)
    plan = ViewPlan(config.view, config.seed, source.num_samples)
    manifest = build_manifest(
        config.codec,
        num_classes=len(source.classes),
        num_samples=source.num_samples,
        tau=config.loss.tau,
        fingerprint=views_fingerprint(config, source.fingerprint())
        | teacher.fingerprint()
        | {
            "teacher.dtype": "bfloat16" if has_bf16(device) else "float32",
            "teacher.batch": config.teacher_batch,
        },
    )
    wanted = range(config.views_used) if views is None else views
    started = time.perf_counter()
    substituted: set[str] = set()
    images_done = 0
    with LogitCacheWriter(config.cache, manifest) as writer:
        blocks_per_view = writer.num_blocks
        mine = {
            (view, block)
            for place, view in enumerate(wanted)
            for block in range(blocks_per_view)
            if (place * blocks_per_view + block) % world == rank
        }
        pending = [item for item in writer.pending(wanted) if item in mine]
        calls = TeacherCalls(
            pending, manifest["block_records"], source.num_samples, config.teacher_batch
        )
        total = sum(stop - start for _, start, stop in calls.calls)
        log.info(
            "precomputing %d views of %d samples: %d blocks to write, %d there, %d B per view",
            len(wanted), source.num_samples, len(pending), len(mine) - len(pending),
            manifest["record_bytes"],
        )  # fmt: skip
        loader = ViewLoader(
            source,
            plan,
            calls,
            workers=config.data.workers,
            on_error=config.data.on_error,
            pin_memory=device.type == "cuda",
        )
        with Progress("precompute", total, unit="view") as progress:
            for batch in loader:
                images = ingest_batch(batch.to(device), config.view, torch.float32)
                writer.write(batch.sample_ids, int(batch.view_ids[0]), teacher(images))
                substituted.update(batch.substituted)
                images_done += len(batch.sample_ids)
                rate = images_done / (time.perf_counter() - started)
                progress.advance(len(batch.sample_ids), f"{rate:.0f} img/s")
    seconds = time.perf_counter() - started
    if substituted:
        log.warning(
            "%d unreadable images were substituted, the first is %s",
            len(substituted), min(substituted),
        )  # fmt: skip
    return {
        "cache": config.cache,
        "views": len(wanted),
        "blocks": len(pending),
        "kept": len(mine) - len(pending),
        "images": images_done,
        "seconds": round(seconds, 3),
        "images_per_s": round(images_done / seconds, 2),
        "bytes": images_done * manifest["record_bytes"],
        "substituted": sorted(substituted),
    }
