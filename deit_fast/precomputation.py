"""`precompute`: what the teacher says of every view, computed once and written to its caches.

Loader and ingest are those of `train`; only the consumer of a batch differs. The work is divided
into units, blocks of logits or, with features, 4096 records. Under torchrun each process takes
every n-th unit. The teacher gets the same rows in the same calls, counted from the start of a unit,
so the bytes do not depend on process count or interruptions.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deit_fast.cache import LogitCacheWriter
from deit_fast.cache.codecs import keys_of
from deit_fast.cache.format import codec_of
from deit_fast.cache.record_order import RecordOrder
from deit_fast.cache.verify import planned, sampled_ids, write_pixels
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch, main_labels
from deit_fast.data.fingerprint import digest_views, views_fingerprint
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import DeviceLoader, open_loader, open_source
from deit_fast.data.sources import say_warnings
from deit_fast.errors import CacheError, RowError, translate_errors
from deit_fast.features.statistics import FeatureStatistics
from deit_fast.inputs import require_precompute_inputs
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.models.teacher_features import TeacherOutputs
from deit_fast.runtime.distributed import choose_device, has_bf16, read_process_group
from deit_fast.runtime.pipeline_time import (
    Repeated,
    images_to_time,
    loading_processes,
    seconds_per_batch,
)
from deit_fast.runtime.progress import Progress
from deit_fast.target_caches import (
    TargetCaches,
    build_caches,
    fit_statistics,
    placeholder_statistics,
    publish_statistics,
    require_targets,
    stored_statistics,
)
from deit_fast.teacher_accuracy import check_accuracy, say_agreement
from deit_fast.views.plan import ViewPlan

log = logging.getLogger("deit_fast")

TIMED_SECONDS = 10.0  # of an estimate's measurement at most, beside its start


class TeacherCalls(Sequence):
    """The (sample ids, view ids) of each teacher call, for a list of (view, unit).

    Args:
        size: records of a unit.
    """

    def __init__(
        self, units: list[tuple[int, int]], size: int, order: RecordOrder, batch: int
    ) -> None:
        self.order, count = order, order.num_samples
        self.calls = [
            (view, start, min(start + batch, stop))
            for view, unit in units
            for stop in [min((unit + 1) * size, count)]
            for start in range(unit * size, stop, batch)
        ]

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        view, start, stop = self.calls[index]
        return self.order.samples(view, start, stop), np.full(stop - start, view, np.int32)


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
    job = _Job(config)
    requested = range(config.views_used) if views is None else views
    sizes = _remedy(config)
    # Before anything is written. The processes share nothing: where one may refuse, all look.
    if group.is_first or config.teacher_floor is not None:
        with translate_errors(job.device, sizes):
            job.check_teacher(requested)
    with translate_errors(job.device, sizes):
        caches = job.open_caches()
    started = time.perf_counter()
    agreed = torch.zeros((), dtype=torch.int64, device=job.device)
    substituted: set[str] = set()
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
            writer.locks.refuse_rivals(requested)
        mine = [
            (view, unit)
            for index, view in enumerate(requested)
            for unit in range(caches.units_per_view)
            if (index * caches.units_per_view + unit) % group.world_size == group.rank
        ]
        done = {
            (view, unit): [
                writer.is_done(view, block)
                for cache, writer in zip(caches, writers, strict=True)
                for block in caches.blocks(cache, unit)
            ]
            for view, unit in mine
        }
        blocks, kept = (sum(map(count, done.values())) for count in (len, sum))
        pending = [item for item in mine if not all(done[item])]
        calls = TeacherCalls(pending, caches.unit, caches.order, config.teacher_batch)
        total = sum(stop - start for _, start, stop in calls.calls)
        if config.features.grid is not None and "patches" not in config.targets:
            log.warning(
                "features.grid=%d: not read, the targets are %s without patches",
                config.features.grid, " ".join(config.targets),
            )  # fmt: skip
        log.info(
            "precomputing %d views of %d samples: %d blocks to write, %d there, %d B per view",
            len(requested), job.source.num_samples, blocks - kept, kept, caches.view_bytes,
        )  # fmt: skip
        loader = open_loader(config.data, job.source, job.plan, calls, device=job.device)
        pixels = [_PixelRecord(writer) for writer in writers]
        # The next unit is locked before this one is released, so that a second job of the same
        # units finds a lock at any time.
        ahead = iter(pending)

        def lock_next() -> None:
            view, unit = next(ahead, (0, -1))
            if unit < 0:
                return
            for cache, writer in zip(caches, writers, strict=True):
                left = (b for b in caches.blocks(cache, unit) if not writer.is_done(view, b))
                if (block := next(left, None)) is not None:
                    writer.locks.acquire(view, block)

        lock_next()
        with (
            translate_errors(job.device, sizes),
            Progress("precompute", total, unit="image") as progress,
        ):
            for (_, start, _), (batch, outputs) in zip(calls.calls, job.run(loader), strict=True):
                if start % caches.unit == 0:
                    lock_next()
                for cache, writer, record in zip(caches, writers, pixels, strict=True):
                    record.add(batch)
                    writer.write(batch.sample_ids, int(batch.view_ids[0]), cache.to_encode(outputs))
                if outputs.logits is not None:
                    agreed += (outputs.logits.argmax(1) == main_labels(*batch.target)).sum()
                substituted.update(batch.substituted)
                progress.advance(len(batch.sample_ids))
    seconds = time.perf_counter() - started
    say_warnings()
    if substituted:
        log.warning(
            "%d unreadable images were substituted, the first is %s",
            len(substituted), min(substituted),
        )  # fmt: skip
    agreement = None
    if total and job.teacher.gives_logits:
        agreement = agreed.item() / total
        say_agreement(job.teacher, config, agreement, total)
    return {
        "cache": config.cache,
        "caches": [str(cache.folder) for cache in caches],
        "views": len(requested),
        "blocks": blocks - kept,
        "kept": kept,
        "images": total,
        "seconds": round(seconds, 3),
        "images_per_s": round(total / seconds, 2),
        "bytes": total * caches.view_bytes,
        "teacher_agreement": agreement,
        "substituted": sorted(substituted),
    }


def _remedy(config: RunConfig) -> str:
    return f"teacher_batch={config.teacher_batch}: a smaller one needs less, in a new cache"


def estimate(config: RunConfig, views: range | None = None) -> dict[str, Any]:
    """What ``precompute`` would write and how long it would take; writes nothing.

    The job runs for half of its time, but no longer than ``TIMED_SECONDS``, with its loader's
    processes, teacher and codec; it stores nothing. Its images are spread over the data set.
    Several sizes of views share the time. Where full batches would take too long, smaller ones are
    timed. The time is that of the process with most blocks, if all of its blocks are of mean size.

    Returns:
        `views`, `blocks` to write and `kept`, `images`, `bytes` (of new view files), `free` (on
        the disk), `batch`, `timed_batch` (images of a batch of the measurement),
        `loader_seconds`, `teacher_seconds` (of a batch, in one process and each alone; of several
        sizes the mean over the images), `images_per_s` (of one process), `processes`, `seconds`,
        `samples` (images of the data set), `shapes` (of what the teacher gives: for `logits` its
        classes, for features tokens and channels, as they are stored).

    Raises:
        As ``precompute``.
    """
    processes = read_process_group().world_size
    job = _Job(config)
    folder = Path(str(config.cache))
    requested = range(config.views_used) if views is None else views
    caches = job.planned_caches()
    blocks, kept, new_bytes, missing = caches.planned(requested)
    count, size = job.source.num_samples, caches.unit
    images_of: Counter[int] = Counter()  # by the size of their views
    for view, unit in missing:
        images_of[config.view.size_of(view)] += min(size, count - unit * size)
    images = images_of.total()

    batch_size = min(config.teacher_batch, count)
    view_of = {config.view.size_of(view): view for view in reversed(requested)}
    sides = [*images_of] or [config.view.size_of(requested[0])]
    limit = TIMED_SECONDS / len(sides)
    with translate_errors(job.device, _remedy(config)):
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


class _Times(NamedTuple):
    """Seconds of an image: to load it alone, to run the teacher alone, and of the running job."""

    batch: int  # images of a timed batch
    loading: float
    teacher: float
    whole: float


class _Job:
    """Source, plan and teacher, checked; nothing is written yet."""

    def __init__(self, config: RunConfig) -> None:
        require_precompute_inputs(config)
        self.config, self.view = config, config.view
        self.device = choose_device(config.device)
        self.source = open_source(config.data, "train", config.view.image_size)
        self.teacher = load_class_matched_teacher(config, self.source.classes, self.device)
        # Not under `auto`: Inductor chooses between kernels by their measured times, so another
        # process may get other last bits. Without it the bytes of a cache do not depend on which
        # process wrote which block.
        compiled = config.compile not in ("auto", "none")
        self.teacher.to_device(self.device, compiled, fused=compiled and config.model.fused)
        self.plan = ViewPlan(config.view, self.source.num_samples)
        self.fingerprint = (
            views_fingerprint(config, self.source)
            | {
                "teacher.dtype": "bfloat16" if has_bf16(self.device) else "float32",
                "teacher.batch": config.teacher_batch,
            }
            # Compiled logits differ in their last bits: a resumed job must not mix the two.
            | ({"teacher.compiled": True} if compiled else {})
            | ({"teacher.fused": True} if self.teacher.is_fused else {})
        )

    def open_caches(self) -> TargetCaches:
        """The caches to write. Statistics of features are fitted where there are none yet."""
        require_targets(self.config, self.teacher)
        statistics = stored_statistics(self.config, self.teacher)
        if statistics is None:
            for target in self.teacher.features:  # now, not after the fit
                Path(str(self.config.cache), target.name).mkdir(parents=True, exist_ok=True)
            started = time.time()
            statistics = publish_statistics(self.config, self.teacher, self._fit(), started)
        return self._caches(statistics)

    def planned_caches(self) -> TargetCaches:
        """The same, writing nothing: statistics that are missing are placeholders."""
        require_targets(self.config, self.teacher)
        statistics = stored_statistics(self.config, self.teacher)
        return self._caches(statistics or placeholder_statistics(self.config, self.teacher))

    def _caches(self, statistics: list[FeatureStatistics] | None) -> TargetCaches:
        count = self.source.num_samples
        return build_caches(self.config, self.teacher, count, self.fingerprint, statistics)

    def _fit(self) -> list[FeatureStatistics]:
        """Statistics of the features of some views, spread over samples and views.

        The calls are the same in every process, whatever it will write.
        """
        config, samples = self.config, self.source.num_samples
        size = min(config.teacher_batch, samples)
        number = -(-min(config.features.fit_views, samples * config.views_used) // size)
        calls = []
        for index in range(number):
            start, view = spread(index) * (samples - size), index * config.views_used // number
            calls.append((np.arange(size) + round(start), np.full(size, view, np.int32)))
        loader = open_loader(config.data, self.source, self.plan, calls, device=self.device)
        with Progress("fit", number * size, unit="image") as progress:

            def outputs() -> Iterator[tuple[ViewBatch, TeacherOutputs]]:
                for batch, found in self.run(loader):
                    yield batch, found
                    progress.advance(len(batch.sample_ids))

            return fit_statistics(config, self.teacher, outputs())

    def time_batches(
        self, caches: TargetCaches, most: int, view: int, images: int, limit: float
    ) -> _Times:
        """Run the job on samples at a view for half of the time that ``images`` take, or ``limit``.

        Loading and teacher are timed alone first, on a few samples. A batch has ``most`` samples at
        most.
        """
        codecs = [codec_of(cache.manifest) for cache in caches]

        def encode(item: tuple[ViewBatch, TeacherOutputs]) -> object:
            batch, outputs = item
            try:
                ids = batch.sample_ids.numpy(), batch.view_ids.numpy()
                return [  # `cpu` waits for a GPU
                    codec.encode(
                        cache.to_encode(outputs), keys_of(codec, self.fingerprint, *ids)
                    ).cpu()
                    for cache, codec in zip(caches, codecs, strict=True)
                ]
            except RowError as error:
                where = f"view {view} sample {batch.sample_ids[error.row]}"
                raise CacheError(f"{where}: {error.reason}") from None

        def alone(size: int) -> tuple[float, float]:
            """Seconds of an image to load and to run the teacher on. The first batch makes tables
            and buffers, the second is timed."""
            moments, batches = [], iter(self._sampled(size, view, workers=0))
            for _ in range(2):
                moments.append(time.perf_counter())
                batch = next(batches)
                moments.append(time.perf_counter())
                encode((batch, self.outputs(batch)))
            return (moments[3] - moments[2]) / size, (time.perf_counter() - moments[3]) / size

        workers = loading_processes(self.config.data.workers)
        size = most
        if self.device.type == "cpu":  # a GPU would be slower on small batches
            rough = sum(alone(min(most, 2)))
            size = images_to_time(rough, workers=0, seconds=limit / 2, most=most)
        loading, teacher = alone(size)
        seconds = min(limit, images * (loading + teacher) / 2)
        if self.device.type == "cpu":
            size = images_to_time(loading + teacher, workers=workers, seconds=seconds, most=most)
        batches = self._sampled(size, view, self.config.data.workers)
        finished = map(encode, self.run(batches))
        whole = seconds_per_batch(finished, workers=workers, seconds=seconds) / size
        return _Times(size, loading, teacher, whole)

    def _sampled(self, size: int, view: int, workers: int | None) -> DeviceLoader:
        """Endless batches of samples at a view, from places all over the data set."""
        last = self.source.num_samples - size
        calls = [
            (np.arange(start, start + size), np.full(size, view, np.int32))
            for start in [int(spread(n) * (last + 1)) for n in range(100)]
        ]
        data = dataclasses.replace(self.config.data, workers=workers)
        return open_loader(data, self.source, self.plan, Repeated(calls), device=self.device)

    def check_teacher(self, views: range) -> None:
        """As ``check_accuracy``, if there are logits to write."""
        if not self.teacher.gives_logits:
            check_accuracy(self.teacher, self.config, self.device, self.source)
            return
        try:
            cache = self._caches(None)[0]
            missing, _, _ = planned(cache.folder, cache.manifest, views)
        except CacheError:  # the writer says why
            return
        if missing:
            check_accuracy(self.teacher, self.config, self.device, self.source)

    def run(self, batches: Iterable[ViewBatch]) -> Iterator[tuple[ViewBatch, TeacherOutputs]]:
        """Batches with what the teacher gives of them.

        The teacher starts on the next batch before the previous one is yielded: on CUDA it runs on
        a stream of its own while the host encodes and writes.
        """
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        previous: tuple[ViewBatch, TeacherOutputs, torch.cuda.Event | None] | None = None
        for batch in batches:
            if side is None:
                started = batch, self.outputs(batch), None
            else:
                side.wait_stream(torch.cuda.current_stream(self.device))  # for the pixels
                with torch.cuda.stream(side):
                    started = batch, self.outputs(batch), side.record_event()
            if previous is not None:
                yield self._finished(*previous)
            previous = started
        if previous is not None:
            yield self._finished(*previous)

    def _finished(
        self, batch: ViewBatch, outputs: TeacherOutputs, done: torch.cuda.Event | None
    ) -> tuple[ViewBatch, TeacherOutputs]:
        """Make the current stream wait for the teacher. The writer waits for what it reads, so the
        memory of the batch is not freed before the teacher has read it."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return batch, outputs

    def outputs(self, batch: ViewBatch) -> TeacherOutputs:
        """What the teacher gives of a batch of views."""
        return self.teacher.outputs(ingest_batch(batch, self.view, torch.float32))


def spread(index: int) -> float:
    """Number ``index`` of a series in [0, 1) that is spread evenly at any length."""
    return index * 0.6180339887498949 % 1


class _PixelRecord:
    """Collects the digests of a view's sampled pixels. It writes them when all have come, which is
    before the block of these samples is committed."""

    def __init__(self, writer: LogitCacheWriter) -> None:
        self._writer = writer
        self._found: dict[int, dict[int, str]] = {}

    def add(self, batch: ViewBatch) -> None:
        view = int(batch.view_ids[0])
        sampled = sampled_ids(self._writer.manifest, view)
        rows = np.flatnonzero(np.isin(batch.sample_ids.numpy(), sampled))
        if not len(rows):
            return
        found = self._found.setdefault(view, {})
        found.update(zip(batch.sample_ids[rows].tolist(), digest_views(batch, rows), strict=True))
        if len(found) == len(sampled):
            self._writer.create(view)  # digests without a view mean that it was lost
            write_pixels(self._writer.path, self._writer.manifest, view, self._found.pop(view))
