"""The loader whose decoder is DALI: the views and the interface of `ViewLoader`, in C++ threads.

DALI decodes whole files, on the CPU or a GPU. `kernels.augment` crops, resizes and augments them
with Pillow's arithmetic; without a GPU the Pillow loader's own functions do. DALI's own operators
have other pixels, and its random numbers depend on the batch.

DALI's input never ends, because an exhausted one ends the pipeline; the loader counts batches.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_fast.config import DataConfig
from deit_fast.data.augment import augment_table, fill_color, render_views
from deit_fast.data.batch import ViewBatch
from deit_fast.data.jpeg_index import (
    FileIndex,
    decodes_like_pillow,
    header_size,
    require_dali,
)
from deit_fast.data.loader import MixOperands, load_readable, steps_of
from deit_fast.data.sources import Source, UnreadableImage
from deit_fast.data.watch import POLL_SECONDS, Watch, note_sample
from deit_fast.errors import InputError
from deit_fast.kernels.augment import AugmentTable, augment
from deit_fast.runtime.pipeline_time import loading_processes
from deit_fast.views.plan import ViewPlan

CHUNK = 256  # views that are made at once: bounds DALI's memory for any batch size


class DaliLoader:
    """Iterates over batches of views, in the order of `batches`, from step `start` on.

    The views depend on neither batch, order nor threads. Each file of up to `CHUNK` views of a
    batch is decoded once. Pillow decodes the files that are not plain JPEGs (`jpeg_index`).

    Args:
        source, plan, batches, start, stop: as `ViewLoader`.
        data: `loader`, `dali_hw_decoder_load`, `on_error`, and `workers`, the number of reading
            threads and of DALI's threads, at least 1.
        device: where `kernels.augment` and a GPU decoder run.
        depth: chunks that DALI works on; 1: nothing is made ahead, for timing.
        index: what is known of the files; none: what earlier loaders have stored.

    Raises:
        InputError: DALI is not installed; view settings it does not support.
        InputError, OSError, ChildProcessError: while iterating, as `ViewLoader`.
    """

    def __init__(
        self,
        source: Source,
        plan: ViewPlan,
        batches: Sequence[tuple[Any, ...]],
        data: DataConfig,
        device: torch.device | str = "cpu",
        *,
        start: int = 0,
        stop: int | None = None,
        depth: int = 2,
        index: FileIndex | None = None,
    ) -> None:
        require_dali()
        self.steps = steps_of(source, plan, batches, start, stop)
        self.plan, self.device = plan, torch.device(device)
        self._batches, self._data, self._depth = batches, data, depth
        self._on_gpu = data.loader == "dali-gpu"
        if self._on_gpu and self.device.type != "cuda":
            raise InputError(f"data.loader=dali-gpu needs a CUDA device, not {self.device}")
        augment_table(plan.view, plan.rows([], []), [], [])  # refuses unsupported settings
        self._threads = max(1, loading_processes(data.workers))
        self._files = _Files(source, FileIndex(source) if index is None else index)
        # Without a GPU this host's own functions make the kernel's bytes, and are faster.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self._on_host = self.device.type == "cpu" and not interpreted

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[ViewBatch]:
        # The threads of a ThreadPool are daemons: one that is stuck does not keep the process.
        watch = Watch("thread", self._threads, self._files.paths.__getitem__)
        readers = ThreadPool(self._threads, _begin_reader, (watch, itertools.count()))
        feed = _Feed(partial(self._prepare, readers), self.steps, watch)
        try:
            yield from self._run(feed, readers)
        finally:
            if not watch.stuck():
                for pool in (feed.thread, readers):
                    pool.close()
                    pool.join()
            self._files.index.close()

    def _run(self, feed: _Feed, readers: ThreadPool) -> Iterator[ViewBatch]:
        pipeline = self._build(feed)
        for _ in self.steps:
            job = feed.next_job()
            size = job.operands.size
            shape = (len(job.operands.needed), size, size, 3)
            images = torch.empty(shape, dtype=torch.uint8, device=self.device)
            for chunk in job.chunks:
                (output,) = self._next_output(pipeline, feed, job)
                part = images[chunk.rows]
                if self._on_host:
                    pixels = [np.asarray(image) for image in output]
                    rows, view = job.operands.needed[chunk.rows], self.plan.view
                    render_views(
                        pixels, chunk.file_of, rows, chunk.boxes, view, part.numpy(),
                        lambda f, *columns: readers.starmap(f, zip(*columns, strict=True), 1),
                    )  # fmt: skip
                else:
                    assert chunk.table is not None
                    part[:] = self._augment(output, chunk.table, size)
            batch = job.operands.assemble(images, job.labels, job.substituted)
            yield batch.pin_memory() if self.device.type == "cuda" else batch

    def _build(self, feed: _Feed) -> Any:
        ordinal = None
        if self._on_gpu:
            ordinal = self.device.index
            ordinal = torch.cuda.current_device() if ordinal is None else ordinal
        return decoder(
            feed, self._data.dali_hw_decoder_load, batch_size=CHUNK, num_threads=self._threads,
            device_id=ordinal, prefetch_queue_depth=self._depth,
        )  # fmt: skip

    def _next_output(self, pipeline: Any, feed: _Feed, job: _Job) -> Any:
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        try:
            return pipeline.run(stream)
        except RuntimeError as error:
            begun = [job, *(other for other in feed.begun if isinstance(other, _Job))]
            changed = self._files.first_changed(sample for one in begun for sample in one.taken)
            if changed is None:
                raise
            raise InputError(
                f"cannot read image {changed}: it was replaced while the loader ran: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from None

    def _augment(self, output: Any, table: AugmentTable, size: int) -> Tensor:
        """Views, uint8 [n, S, S, 3], of whole images, by the kernel."""
        images = [torch.from_dlpack(image) for image in output]
        shapes = torch.tensor([image.shape[:2] for image in images])
        sizes = shapes.prod(1) * 3
        where = torch.stack([sizes.cumsum(0) - sizes, shapes[:, 1], shapes[:, 0]], dim=1)
        to_gpu = self.device.type == "cuda"
        # A hundred megabytes: concatenated in pinned memory, not copied there once more.
        pixels = torch.empty(
            int(sizes.sum()), dtype=torch.uint8, device=images[0].device,
            pin_memory=to_gpu and images[0].device.type == "cpu",
        )  # fmt: skip
        torch.cat([image.reshape(-1) for image in images], out=pixels)
        if to_gpu:
            where, table = where.pin_memory(), table.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True)
        where = where.to(self.device, non_blocking=True)
        table = table.to(self.device, non_blocking=True)
        return augment(pixels, where, table, size, fill_color(self.plan.view))

    # -- in the feeding thread -----------------------------------------------------------------

    def _prepare(self, readers: ThreadPool, step: int) -> _Job:
        self._files.index.save_when_due()
        operands = MixOperands.of(self.plan, *self._batches[step])
        rows = operands.needed
        distinct, file_of = np.unique(rows["sample"], return_inverse=True)

        self._files.source.fetch(distinct.tolist())

        def read(sample: int) -> tuple[np.ndarray, int, list[str]]:
            substituted: list[str] = []
            try:
                file, taken = load_readable(
                    self._files.load, self._files.paths, sample, self._data.on_error, substituted
                )
            finally:
                note_sample(-1)
            return file, taken, substituted

        loaded = readers.map(read, distinct.tolist(), 1)
        files = [file for file, _, _ in loaded]
        taken = [sample for _, sample, _ in loaded]
        widths, heights = self._files.sizes(files, taken)[file_of].T
        boxes = self.plan.crop_boxes(rows["sample"], rows["view"], widths, heights)
        chunks = []
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            first, last = file_of[part][0], file_of[part][-1]  # rows are sorted by sample
            crops = rows[part], boxes[part], file_of[part] - first
            inputs = decoder_inputs(files[first : last + 1])
            table = None
            if not self._on_host:
                table = augment_table(self.plan.view, *crops, operands.size)
            chunks.append(_Chunk(part, *crops[1:], inputs, table))
        return _Job(
            operands=operands,
            labels=self._files.labels[taken][file_of],
            substituted=[path for _, _, paths in loaded for path in paths],
            taken=taken,
            chunks=chunks,
        )


@dataclass(frozen=True)
class _Chunk:
    """One run of the pipeline.

    Attributes:
        rows: its views in the batch's needed views.
        boxes, file_of: their crops, and the index of their files in the run.
        inputs: what DALI is given.
        table: what the kernel is given, if it makes the views.
    """

    rows: slice
    boxes: np.ndarray
    file_of: np.ndarray
    inputs: tuple
    table: AugmentTable | None


@dataclass(frozen=True)
class _Job:
    """A step on its way through the pipeline; `taken` are the samples whose files were read."""

    operands: MixOperands
    labels: np.ndarray
    substituted: list[str]
    taken: list[int]
    chunks: list[_Chunk]


class _Feed:
    """What DALI calls for its next inputs, while a thread prepares the next step.

    DALI asks for inputs up to two chunks before it returns the views of the first. The error of a
    step is therefore raised when the consumer reaches that step. After an error and after the last
    step, DALI is given one pixel.

    Attributes:
        begun: steps whose inputs DALI was given and whose views it has not returned.
    """

    def __init__(self, prepare: Callable[[int], _Job], steps: Iterable[int], watch: Watch) -> None:
        self.begun: deque[_Job | Exception] = deque()
        self.thread = ThreadPool(1, _begin_feed)
        self._prepare, self._steps, self._watch = prepare, iter(steps), watch
        self._inputs: deque[tuple] = deque()
        self._pending = self._submit()

    def __call__(self) -> tuple:
        while not self._inputs and self._pending is not None:
            self._advance()
        return self._inputs.popleft() if self._inputs else decoder_inputs([_PIXEL])

    def next_job(self) -> _Job:
        """The next step.

        Raises:
            InputError, OSError, ChildProcessError: as `DaliLoader`.
        """
        if not self.begun:
            self._advance()
        job = self.begun.popleft()
        if isinstance(job, Exception):
            raise job
        return job

    def _advance(self) -> None:
        """Wait for the next step. DALI calls this too, and would hide what it raises."""
        assert self._pending is not None
        try:
            job = self._wait(self._pending)
        except Exception as error:
            self.begun.append(error)
            self._pending = None
            return
        self._pending = self._submit()
        self.begun.append(job)
        self._inputs.extend(chunk.inputs for chunk in job.chunks)

    def _wait(self, pending: AsyncResult) -> _Job:
        while True:
            try:
                return pending.get(POLL_SECONDS)
            except multiprocessing.TimeoutError:
                self._watch.waited()

    def _submit(self) -> AsyncResult | None:
        step = next(self._steps, None)
        return None if step is None else self.thread.apply_async(self._prepare, (step,))


def _begin_reader(watch: Watch, numbers: Iterator[int]) -> None:
    threading.current_thread().name = "dali-read"
    watch.join(next(numbers))


def _begin_feed() -> None:
    threading.current_thread().name = "dali-feed"


class _Files:
    """The files of a source as DALI takes them: a JPEG's bytes, uint8 [n], or pixels [H, W, 3]."""

    def __init__(self, source: Source, index: FileIndex) -> None:
        self.source, self.index = source, index
        self.paths, self.labels = source.paths, source.labels

    def load(self, sample: int) -> np.ndarray:
        if not self.index.is_left_to_pillow(sample):
            encoded = self.source.read(sample)
            if self.index.passes(sample, encoded):
                return np.frombuffer(encoded, np.uint8)
        return np.asarray(self.source.load(sample))

    def sizes(self, files: list[np.ndarray], samples: list[int]) -> np.ndarray:
        """Width and height of loaded files, int64 [n, 2]."""
        sizes = [
            self.index.sizes[sample] if file.ndim == 1 else file.shape[1::-1]
            for file, sample in zip(files, samples, strict=True)
        ]
        return np.array(sizes, np.int64).reshape(-1, 2)

    def first_changed(self, samples: Iterable[int]) -> str | None:
        """Path of the first file that DALI was given but may no longer decode."""
        for sample in samples:
            size = tuple(self.index.sizes[sample].tolist())
            if size == (0, 0):
                continue
            path = self.paths[sample]
            try:
                encoded = self.source.read(sample)
            except UnreadableImage:
                return path
            if header_size(encoded) != size or not decodes_like_pillow(encoded, path):
                return path
        return None


# ---------------------------------------------------------------------------------------------
# DALI's pipeline
# ---------------------------------------------------------------------------------------------

_PIXEL = np.zeros((1, 1, 3), np.uint8)

# A forked process, such as a worker of evaluation, has a pipeline's memory but not its threads.
# Freeing the pipeline there would wait for them for ever, so the child keeps a reference. It is
# taken before the fork: the child may collect garbage before a hook of its own runs.
_pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: list[Any] = []
os.register_at_fork(before=lambda: _kept.extend(_pipelines), after_in_parent=_kept.clear)


def decoder(feed: Callable[[], tuple], hw_decoder_load: float, **arguments: Any) -> Any:
    """A pipeline whose input is `decoder_inputs`, and whose output the images, uint8 [H, W, 3].

    Args:
        arguments: DALI's `batch_size`, `num_threads`, `device_id` (None: the CPU) and
            `prefetch_queue_depth`.
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = arguments["device_id"] is not None

    @pipeline_def(enable_conditionals=True)
    def graph():
        encoded, raw, is_encoded = fn.external_source(
            feed, num_outputs=3, dtype=[types.UINT8, types.UINT8, types.INT32], ndim=[1, 3, 0],
            layout=["", "HWC", ""],
        )  # fmt: skip
        if is_encoded == 1:
            image = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                hw_decoder_load=hw_decoder_load,
            )
        else:
            image = raw.gpu() if on_gpu else raw
        return image

    pipeline = graph(**arguments)
    pipeline.build()
    _pipelines.add(pipeline)
    return pipeline


def decoder_inputs(files: list[np.ndarray]) -> tuple:
    """Files, each the bytes of a JPEG, uint8 [n], or decoded pixels, uint8 [H, W, 3]."""
    nothing = np.zeros(1, np.uint8)
    encoded = [file if file.ndim == 1 else nothing for file in files]
    decoded = [file if file.ndim == 3 else _PIXEL for file in files]
    return encoded, decoded, np.array([file.ndim == 1 for file in files], np.int32)
