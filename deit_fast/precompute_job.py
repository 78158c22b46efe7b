"""One pass of a teacher over views: source, plan, teacher and caches; units of work are written.

A unit is a block of logits or, with features, 4096 records of a view. The teacher gets the same
rows in the same calls, counted from the start of a unit, so the bytes do not depend on process
count or interruptions.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
from deit_fast.errors import CacheError, RowError, SampleError, printable, translate_errors
from deit_fast.features.statistics import FeatureStatistics
from deit_fast.inputs import require_precompute_inputs
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.models.teacher_features import TeacherOutputs
from deit_fast.runtime.distributed import choose_device, has_bf16
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


class TeacherCalls(Sequence):
    """The (sample ids, view ids) of each teacher call, for a sequence of (view, unit).

    Args:
        size: records of a unit.
    """

    def __init__(
        self, units: Sequence[tuple[int, int]], size: int, order: RecordOrder, batch: int
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


class Times(NamedTuple):
    """Seconds of an image: to load it alone, to run the teacher alone, and of the running job."""

    batch: int  # images of a timed batch
    loading: float
    teacher: float
    whole: float


class Job:
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

    @property
    def remedy(self) -> str:
        """What the memory of the job depends on, for messages."""
        batch = self.config.teacher_batch
        return f"teacher_batch={batch}: a smaller one needs less, in a new cache"

    def open_caches(self, share: Callable[[Path], None] | None = None) -> TargetCaches:
        """The caches to write. Statistics of features are fitted where there are none yet.

        Args:
            share: as of ``publish_statistics``.
        """
        require_targets(self.config, self.teacher)
        statistics = stored_statistics(self.config, self.teacher)
        if statistics is None:
            for target in self.teacher.features:  # now, not after the fit
                Path(str(self.config.cache), target.name).mkdir(parents=True, exist_ok=True)
            statistics = publish_statistics(
                self.config, self.teacher, self._fit(), self.fingerprint, share
            )
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
    ) -> Times:
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
        return Times(size, loading, teacher, whole)

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


class PendingUnits:
    """Which of some units have a block to write; reads and verifies what is there.

    Attributes:
        units: (view, unit) with a block to write.
        missing, kept: numbers of blocks.
        images: views of ``units``.
    """

    def __init__(
        self,
        caches: TargetCaches,
        writers: Sequence[LogitCacheWriter],
        units: Sequence[tuple[int, int]],
    ) -> None:
        self.units, self.missing, self.kept, self.images = [], 0, 0, 0
        for view, unit in units:
            done = [
                writer.is_done(view, block)
                for cache, writer in zip(caches, writers, strict=True)
                for block in caches.blocks(cache, unit)
            ]
            self.kept += sum(done)
            self.missing += len(done) - sum(done)
            if not all(done):
                self.units.append((view, unit))
                stop = min((unit + 1) * caches.unit, caches.num_samples)
                self.images += stop - unit * caches.unit


def say_unread_grid(config: RunConfig) -> None:
    """Warn of a grid that no target reads."""
    if config.features.grid is not None and "patches" not in config.targets:
        log.warning(
            "features.grid=%d: not read, the targets are %s without patches",
            config.features.grid, " ".join(config.targets),
        )  # fmt: skip


def say_substituted(paths: Collection[str]) -> None:
    """Warn of the unreadable images of a pass."""
    if paths:
        log.warning(
            "%d unreadable images were substituted, the first is %s: the cache holds the targets "
            "of their substitutes; once the images are mended, delete the cache and make it anew",
            len(paths), min(paths),
        )  # fmt: skip


def summary_of(job: Job, caches: TargetCaches, written: Written, started: float) -> dict[str, Any]:
    """What the results of all ways to precompute have in common; logs what is to be said.

    Args:
        started: `time.perf_counter` before the first unit.
    """
    seconds = time.perf_counter() - started
    say_warnings()
    say_substituted(written.substituted)
    agreement = None
    if written.images and job.teacher.gives_logits:
        agreement = written.agreed.item() / written.images
        say_agreement(job.teacher, job.config, agreement, written.images)
    return {
        "cache": job.config.cache,
        "caches": [str(cache.folder) for cache in caches],
        "images": written.images,
        "seconds": round(seconds, 3),
        "images_per_s": round(written.images / seconds, 2),
        "bytes": written.images * caches.view_bytes,
        "teacher_agreement": agreement,
        "substituted": sorted(written.substituted),
    }


@dataclasses.dataclass
class Written:
    """What a pass has done.

    Attributes:
        images: views that the teacher saw.
        agreed: those whose label of larger weight is its class, int64 on the device; 0 without
            logits.
        substituted: paths of unreadable images.
    """

    agreed: torch.Tensor
    images: int = 0
    substituted: set[str] = dataclasses.field(default_factory=set)


def write_units(
    job: Job,
    caches: TargetCaches,
    writers: Sequence[LogitCacheWriter],
    units: Sequence[tuple[int, int]],
    written: Written,
    *,
    announce: Callable[[int], None],
    finished: Callable[[int], None],
    progress: Progress,
) -> None:
    """Run the teacher on units of work and write what it gives.

    Args:
        writers: one for each cache.
        units: (view, unit).
        written: counts; this pass is added.
        announce: called with the index of a unit before its first block is filled: for the first
            unit at once, for every other when the one before it begins.
        finished: called with the index of a unit when all its blocks are written.
    """
    calls = TeacherCalls(units, caches.unit, caches.order, job.config.teacher_batch)
    loader = open_loader(job.config.data, job.source, job.plan, calls, device=job.device)
    pixels = [_PixelRecord(writer) for writer in writers]
    index = -1
    if units:
        announce(0)
    with translate_errors(job.device, job.remedy):
        for (_, start, _), (batch, outputs) in zip(calls.calls, job.run(loader), strict=True):
            if start % caches.unit == 0:
                if index >= 0:
                    finished(index)
                index += 1
                if index + 1 < len(units):
                    announce(index + 1)
            for cache, writer, record in zip(caches, writers, pixels, strict=True):
                record.add(batch)
                try:
                    writer.write(batch.sample_ids, int(batch.view_ids[0]), cache.to_encode(outputs))
                except SampleError as error:
                    path = job.source.paths[error.sample]
                    raise CacheError(f"{error} (image {printable(path)})") from None
            if outputs.logits is not None:
                written.agreed += (outputs.logits.argmax(1) == main_labels(*batch.target)).sum()
            written.substituted.update(batch.substituted)
            written.images += len(batch.sample_ids)
            progress.advance(len(batch.sample_ids))
    if units:
        finished(index)


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
