"""`precompute`: what the teacher says of every view, computed once and written to its caches.

Loader and ingest are those of `train`; only the consumer of a batch differs. The work is divided
into units, blocks of logits or, with features, 4096 records. Under torchrun each process takes
every n-th unit. The teacher gets the same rows in the same calls, counted from the start of a unit,
so the bytes do not depend on process count or interruptions.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from deit_fast.cache import LogitCacheWriter
from deit_fast.config import RunConfig
from deit_fast.errors import translate_errors
from deit_fast.precompute_job import (
    Job,
    PendingUnits,
    Written,
    say_unread_grid,
    summary_of,
    write_units,
)
from deit_fast.remote_targets import remote_targets
from deit_fast.runtime.distributed import read_process_group
from deit_fast.runtime.progress import Progress

log = logging.getLogger("deit_fast")

TIMED_SECONDS = 10.0  # of an estimate's measurement at most, beside its start


def precompute(config: RunConfig, views: range | None = None) -> dict[str, Any]:
    """Write the teacher's ``targets`` of ``views`` (None: all that the run uses) into caches.

    Logits go into ``config.cache`` itself, each feature target into the folder of its name there.
    Complete blocks are verified and kept, so the same command resumes after any interruption.

    Returns:
        `views`, `blocks` written and `kept`, `images`, `seconds`, `images_per_s`, `bytes`
        (all of this process), `caches` (folders), `teacher_agreement` (share of the views written
        whose label of larger weight is the teacher's class; None if none was, or no logits were),
        `substituted` (paths).

    Raises:
        InputError: no teacher or cache named; its classes do not fit; it lacks a target; it is less
            accurate than ``teacher_floor``; another job is writing these views.
        CacheMismatch: a folder holds a cache of something else; names each differing field.
        OSError: the disk is full; complete blocks stay.
    """
    group = read_process_group()
    job = Job(config)
    requested = range(config.views_used) if views is None else views
    # Before anything is written. The processes share nothing: where one may refuse, all look.
    if group.is_first or config.teacher_floor is not None:
        with translate_errors(job.device, job.remedy):
            job.check_teacher(requested)
    with translate_errors(job.device, job.remedy):
        caches = job.open_caches()
    started = time.perf_counter()
    written = Written(torch.zeros((), dtype=torch.int64, device=job.device))
    with ExitStack() as opened:
        writers = [
            opened.enter_context(
                LogitCacheWriter(
                    cache.folder, cache.manifest, rank=group.rank, world_size=group.world_size
                )
            )
            for cache in caches
        ]
        for writer in writers:
            assert writer.locks is not None
            writer.locks.refuse_rivals(requested)
        mine = [
            (view, unit)
            for index, view in enumerate(requested)
            for unit in range(caches.units_per_view)
            if (index * caches.units_per_view + unit) % group.world_size == group.rank
        ]
        state = PendingUnits(caches, writers, mine)
        say_unread_grid(config)
        log.info(
            "precomputing %d views of %d samples: %d blocks to write, %d there, %d B per view",
            len(requested), job.source.num_samples, state.missing, state.kept, caches.view_bytes,
        )  # fmt: skip

        def lock(index: int) -> None:
            """The next unit is locked before this one is released, so that a second job of the same
            units finds a lock at any time."""
            view, unit = state.units[index]
            for cache, writer in zip(caches, writers, strict=True):
                left = (b for b in caches.blocks(cache, unit) if not writer.is_done(view, b))
                if (block := next(left, None)) is not None:
                    assert writer.locks is not None
                    writer.locks.acquire(view, block)

        with Progress("precompute", state.images, unit="image") as progress:
            write_units(
                job, caches, writers, state.units, written,
                announce=lock, finished=lambda index: None, progress=progress,
            )  # fmt: skip
    return summary_of(job, caches, written, started) | {
        "views": len(requested),
        "blocks": state.missing,
        "kept": state.kept,
    }


def estimate(config: RunConfig, views: range | None = None) -> dict[str, Any]:
    """What ``precompute`` would write and how long it would take; writes nothing.

    The job runs for half of its time, but no longer than ``TIMED_SECONDS``, with its loader's
    processes, teacher and codec; it stores nothing. Its images are spread over the data set.
    Several sizes of views share the time. Where full batches would take too long, smaller ones are
    timed. The time is that of the process with most blocks, if all of its blocks are of mean size.

    Returns:
        `views`, `blocks` to write and `kept`, `units` (of all views), `images`, `bytes` (of new
        view files), `free` (on the disk), `batch`, `timed_batch` (images of a batch of the
        measurement), `loader_seconds`, `teacher_seconds` (of a batch, in one process and each
        alone; of several sizes the mean over the images), `images_per_s` (of one process),
        `processes`, `seconds`, `samples` (images of the data set), `shapes` (of what the teacher
        gives: for `logits` its classes, for features tokens and channels, as they are stored).

    Raises:
        As ``precompute``.
    """
    processes = read_process_group().world_size
    remote = remote_targets(config)
    if remote is not None:
        config = config.replace(cache=str(remote.folder))
    job = Job(config)
    folder = Path(str(config.cache))
    requested = range(config.views_used) if views is None else views
    with nullcontext() if remote is None else remote.named():
        caches = job.planned_caches()
        found = caches.planned(requested) if remote is None else remote.planned(caches, requested)
    blocks, kept, new_bytes, missing = found
    count, size = job.source.num_samples, caches.unit
    images_of: Counter[int] = Counter()  # by the size of their views
    for view, unit in missing:
        images_of[config.view.size_of(view)] += min(size, count - unit * size)
    images = images_of.total()

    batch_size = min(config.teacher_batch, count)
    view_of = {config.view.size_of(view): view for view in reversed(requested)}
    sides = [*images_of] or [config.view.size_of(requested[0])]
    limit = TIMED_SECONDS / len(sides)
    with translate_errors(job.device, job.remedy):
        times = [
            job.time_batches(
                caches, batch_size, view_of[side], images_of[side] or batch_size, limit
            )
            for side in sides
        ]
    shares = [images_of[side] / images if images else 1.0 for side in sides]
    loading, teacher, whole = (
        batch_size * sum(share * seconds for share, seconds in zip(shares, column, strict=True))
        for column in zip(*[(t.loading, t.teacher, t.whole) for t in times], strict=True)
    )
    share_of_one = math.ceil(len(missing) / processes) / max(1, len(missing))
    existing = next(path for path in [folder, *folder.absolute().parents] if path.is_dir())
    return {
        "views": len(requested),
        "blocks": blocks,
        "kept": kept,
        "units": config.views_used * caches.units_per_view,
        "images": images,
        "bytes": new_bytes,
        "free": shutil.disk_usage(existing).free,
        "batch": batch_size,
        "timed_batch": max(t.batch for t in times),
        "loader_seconds": round(loading, 4),
        "teacher_seconds": round(teacher, 4),
        "images_per_s": round(batch_size / whole, 2),
        "processes": processes,
        "seconds": round(images / batch_size * whole * share_of_one, 1),
        "samples": count,
        "shapes": {cache.name: cache.shape for cache in caches},
    }
