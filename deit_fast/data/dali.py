"""The loader whose decoder is DALI: same views, same interface as `ViewLoader`, in C++ threads.

DALI's own random numbers depend on the batch, so it draws none: each choice of the plan goes in as
an input. The input never ends (an exhausted one ends the pipeline); we count the batches.

`augmenter="dali"`: DALI crops, resizes and augments, to pixels of its own. `"kernel"`: it decodes
whole files only, and `kernels.augment` makes Pillow's pixels of them; without a GPU the Pillow
loader's own functions do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deit_fast.data.augment_table import augment_table
from deit_fast.data.dali_graph import (
    GRAPH_VERSION,
    decoding_graph,
    file_inputs,
    view_graph,
    view_inputs,
)
from deit_fast.data.draw import draw_views
from deit_fast.data.jpeg_index import (
    FileIndex,
    examine,
    header_size,
    index_files,
    require_dali,
)
from deit_fast.data.loader import (
    Halves,
    ViewBatch,
    assemble,
    load_readable,
    needed_halves,
    steps_of,
)
from deit_fast.data.sources import Source
from deit_fast.errors import InputError
from deit_fast.kernels.augment import AugmentTable, augment
from deit_fast.views.plan import ViewPlan

CHUNK = 256  # views DALI makes at once: bounds its memory, whatever the batch


def dali_contract(augmenter: str, decoder: str, hw_decoder_load: float) -> dict[str, Any]:
    """What decides DALI's pixels, for a cache's fingerprint.

    Raises:
        InputError: DALI is not installed.
    """
    require_dali()
    import nvidia.dali
    from nvidia import nvimgcodec

    facts = {
        "contract.pixels": f"dali/{decoder}" if augmenter == "dali" else f"dali-decoded/{decoder}",
        "contract.dali": nvidia.dali.__version__,
        "contract.nvimgcodec": nvimgcodec.__version__,
        "contract.hw_decoder_load": hw_decoder_load,
    }
    return facts | {"contract.dali_graph": GRAPH_VERSION} if augmenter == "dali" else facts


class DaliLoader:
    """Iterates over batches of views, in the order of `batches`, from step `start` on.

    The views depend on neither batch, order nor `workers`. Each file of up to `CHUNK` views of a
    batch is decoded once. Files that are no plain JPEGs are decoded by Pillow (`validate`).

    Args:
        source, plan, batches, on_error, start, stop, pin_memory: as `ViewLoader`.
        workers: threads that read, and as many of DALI; 0 counts as 1.
        augmenter: who makes views of images.
        decoder: "gpu" decodes on `device` (and crops, resizes and augments there, if DALI does).
        hw_decoder_load: share of a chunk that the GPU's JPEG engine decodes. Above 0 an image's
            last bits depend on which of two decoders its batch left free.
        device: where `kernels.augment` and a GPU decoder run.
        depth: chunks that DALI works on; 1: nothing is done ahead, for timing.
        index: which files DALI may decode; none: checks those that no earlier loader has checked.

    Raises:
        InputError: DALI is not installed; a recipe it does not know; while iterating, as
            `ViewLoader`.
    """

    def __init__(
        self,
        source: Source,
        plan: ViewPlan,
        batches: Sequence[tuple[Any, ...]],
        *,
        workers: int,
        on_error: str,
        start: int = 0,
        stop: int | None = None,
        pin_memory: bool = False,
        augmenter: Literal["dali", "kernel"] = "dali",
        decoder: Literal["cpu", "gpu"] = "cpu",
        hw_decoder_load: float = 0.0,
        device: torch.device | str = "cpu",
        depth: int = 2,
        index: FileIndex | None = None,
    ) -> None:
        require_dali()
        self.steps = steps_of(source, plan, batches, start, stop)
        self.device = torch.device(device)
        if decoder == "gpu" and self.device.type != "cuda":
            raise InputError(f"data.dali_decoder=gpu needs a CUDA device, not {self.device}")
        if plan.view.crop != "resized":
            raise InputError(f"the DALI loaders know view.crop=resized, not {plan.view.crop}")
        if augmenter == "kernel":
            augment_table(plan.view, plan.rows([], []), [], [])  # refuses what it does not know
        self.plan, self.augmenter, self.pin_memory = plan, augmenter, pin_memory
        self._threads, self._depth = max(1, workers), depth
        index = index_files(source, self._threads) if index is None else index
        self._files = _Files(source, index)
        self._batches, self._on_error = batches, on_error
        self._on_gpu, self._hw_decoder_load = decoder == "gpu", hw_decoder_load
        # Without a GPU the kernel's arithmetic is this host's, in the form that is fast there.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self._on_host = augmenter == "kernel" and self.device.type == "cpu" and not interpreted

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[ViewBatch]:
        with ThreadPoolExecutor(self._threads, "dali-read") as readers:
            feed = _Feed(lambda step: self._prepare(step, readers), self.steps, self._nothing())
            try:
                yield from self._run(feed, readers)
            finally:
                feed.close()

    def _run(self, feed: _Feed, readers: ThreadPoolExecutor) -> Iterator[ViewBatch]:
        pipeline = self._build(feed)
        size = self.plan.view.image_size
        lies_on = self.device if self._on_gpu or self.augmenter == "kernel" else "cpu"
        for _ in self.steps:
            job = feed.next_job()
            images = torch.empty(
                (len(job.halves.wanted), size, size, 3), dtype=torch.uint8, device=lies_on
            )
            for chunk in job.chunks:
                (output,) = self._next_output(pipeline, feed, job)
                if self.augmenter == "dali":  # DALI writes over its own memory in a later run
                    images[chunk.rows] = torch.from_dlpack(output.as_tensor())
                elif self._on_host:
                    self._draw(output, chunk, job, images[chunk.rows].numpy(), readers)
                else:
                    assert chunk.table is not None
                    images[chunk.rows] = self._augment(output, chunk.table)
            batch = assemble(job.halves, images, job.labels, job.substituted, size)
            yield batch.pin_memory() if self.pin_memory else batch

    def _build(self, feed: _Feed) -> Any:
        ordinal = None
        if self._on_gpu:
            index = self.device.index
            ordinal = torch.cuda.current_device() if index is None else index
        shared = (CHUNK, self._threads, ordinal, self._depth, self._hw_decoder_load)
        if self.augmenter == "kernel":
            return decoding_graph(feed, *shared)
        recipe = self.plan.view
        layers = self.plan.rows([0], [0])["operations"].shape[1]
        fill = _fill(recipe.mean)
        return view_graph(feed, *shared, recipe.image_size, layers, fill)

    def _nothing(self) -> tuple:
        inputs = file_inputs([np.zeros((1, 1, 3), np.uint8)], 1)
        if self.augmenter == "kernel":
            return inputs
        rows = self.plan.rows([0], [0])
        box = np.array([[0, 0, 1, 1]], np.int32)
        return inputs + view_inputs(rows, box, np.zeros(1, np.int64), self.plan.view.image_size)

    def _next_output(self, pipeline: Any, feed: _Feed, job: _Job) -> Any:
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        try:
            return pipeline.run(stream)
        except RuntimeError as error:
            under_way = [job, *(other for other in feed.begun if isinstance(other, _Job))]
            samples = [sample for one in under_way for sample in one.taken]
            changed = self._files.first_changed(samples)
            if changed is None:
                raise
            raise InputError(
                f"cannot read image {changed}: it was replaced while the loader ran: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from None

    def _draw(
        self, output: Any, chunk: _Chunk, job: _Job, out: np.ndarray, readers: ThreadPoolExecutor
    ) -> None:
        """Views on this host's cores: the same bytes as the kernel's."""
        pixels = [np.asarray(image) for image in output]
        rows = job.halves.wanted[chunk.rows]
        assert chunk.file is not None and chunk.boxes is not None
        draw_views(pixels, chunk.file, rows, chunk.boxes, self.plan.view, out, readers.map)

    def _augment(self, output: Any, table: AugmentTable) -> Tensor:
        """Views, uint8 [n, S, S, 3], of whole images on the device."""
        images = [torch.from_dlpack(image) for image in output]
        shapes = torch.tensor([image.shape[:2] for image in images])
        sizes = shapes.prod(1) * 3
        places = torch.stack([sizes.cumsum(0) - sizes, shapes[:, 1], shapes[:, 0]], dim=1)
        lies_on, goes_to = images[0].device.type, self.device.type
        # A hundred megabytes: put together where they are copied from, not once more behind that.
        pinned = goes_to == "cuda" and lies_on == "cpu"
        pixels = torch.empty(
            int(sizes.sum()), dtype=torch.uint8, device=images[0].device, pin_memory=pinned
        )
        torch.cat([image.reshape(-1) for image in images], out=pixels)
        if goes_to == "cuda":
            places, table = places.pin_memory(), table.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True)
        places = places.to(self.device, non_blocking=True)
        table = table.to(self.device, non_blocking=True)
        recipe = self.plan.view
        return augment(pixels, places, table, recipe.image_size, _fill(recipe.mean))

    # -- in the feeding thread -----------------------------------------------------------------

    def _prepare(self, step: int, readers: ThreadPoolExecutor) -> _Job:
        halves = needed_halves(self.plan, *self._batches[step])
        wanted = halves.wanted
        distinct, which = np.unique(wanted["sample"], return_inverse=True)

        def read(sample: int) -> tuple[Any, int, list[str]]:
            substituted: list[str] = []
            file, taken = load_readable(
                self._files.load, self._files.paths, sample, self._on_error, substituted
            )
            return file, taken, substituted

        loaded = list(readers.map(read, distinct.tolist()))
        files = [file for file, _, _ in loaded]
        taken = [sample for _, sample, _ in loaded]
        widths, heights = self._files.sizes(files, taken)[which].T
        boxes = self.plan.crop_boxes(wanted["sample"], wanted["view"], widths, heights)
        job = _Job(
            halves=halves,
            labels=self._files.labels[taken][which],
            substituted=[path for _, _, paths in loaded for path in paths],
            taken=taken,
        )
        for first in range(0, len(wanted), CHUNK):
            rows = slice(first, first + CHUNK)
            begin, end = which[rows][0], which[rows][-1] + 1  # `wanted` is sorted by sample
            chunk_files, file = files[begin:end], which[rows] - begin
            if self.augmenter == "kernel":
                inputs = file_inputs(chunk_files, len(chunk_files))
                table = None if self._on_host else augment_table(
                    self.plan.view, wanted[rows], boxes[rows], file
                )  # fmt: skip
                job.chunks.append(_Chunk(inputs, rows, table, file, boxes[rows]))
                continue
            inputs = file_inputs(chunk_files, len(file))
            size = self.plan.view.image_size
            inputs += view_inputs(wanted[rows], boxes[rows], file, size)
            job.chunks.append(_Chunk(inputs, rows))
        return job


@dataclass(frozen=True)
class _Chunk:
    """One run of the pipeline: its inputs, and the places of its views in the batch."""

    inputs: tuple
    rows: slice
    table: AugmentTable | None = None
    file: np.ndarray | None = None
    boxes: np.ndarray | None = None


@dataclass
class _Job:
    """A step on its way through the pipeline."""

    halves: Halves
    labels: np.ndarray
    substituted: list[str]
    taken: list[int]
    chunks: list[_Chunk] = field(default_factory=list)


class _Feed:
    """What DALI calls for its next inputs; a thread prepares the next step meanwhile.

    DALI asks for inputs up to two chunks before it gives the views of the first. A step that fails
    is told only when it is the consumer's turn; from there on, and behind the last step, the inputs
    are `nothing`.

    Attributes:
        begun: steps whose inputs DALI has been given and whose views are still to come.
    """

    def __init__(
        self, prepare: Callable[[int], _Job], steps: Iterable[int], nothing: tuple
    ) -> None:
        self.begun: deque[_Job | InputError] = deque()
        self._prepare, self._steps, self._nothing = prepare, iter(steps), nothing
        self._chunks: deque[_Chunk] = deque()
        self._thread = ThreadPoolExecutor(1, "dali-feed")
        self._ahead = self._submit()

    def __call__(self) -> tuple:
        while not self._chunks and self._ahead is not None:
            self._advance()
        return self._chunks.popleft().inputs if self._chunks else self._nothing

    def next_job(self) -> _Job:
        """The next step.

        Raises:
            InputError: as `DaliLoader`.
        """
        if not self.begun:
            self._advance()
        job = self.begun.popleft()
        if isinstance(job, InputError):
            raise job
        return job

    def close(self) -> None:
        """No more inputs are wanted."""
        self._thread.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        assert self._ahead is not None
        try:
            job = self._ahead.result()
        except InputError as error:
            self.begun.append(error)
            self._ahead = None
            return
        self._ahead = self._submit()
        self.begun.append(job)
        self._chunks.extend(job.chunks)

    def _submit(self) -> Future[_Job] | None:
        step = next(self._steps, None)
        return None if step is None else self._thread.submit(self._prepare, step)


class _Files:
    """A source whose `load` gives what DALI takes: a JPEG's bytes, or the pixels of another file.

    Both are uint8 arrays, [n] and [H, W, 3].
    """

    finished = False

    def __init__(self, source: Source, index: FileIndex) -> None:
        self.source, self.index = source, index
        self.paths, self.labels = source.paths, source.labels

    @property
    def num_samples(self) -> int:
        return self.source.num_samples

    def load(self, sample: int) -> np.ndarray:
        sizes, lengths = self.index.sizes, self.index.lengths
        if sizes[sample, 0]:
            encoded = self.source.read(sample)
            size = tuple(sizes[sample].tolist())
            # Replaced since it was checked? A crop of the old size would lead out of the new image,
            # and a few bytes can promise more pixels than there is memory.
            if len(encoded) != lengths[sample] or header_size(encoded) != size:
                sizes[sample] = examine(encoded, self.paths[sample])
                lengths[sample] = len(encoded)
            if sizes[sample, 0]:
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
        """Path of the first whose verdict no longer holds."""
        for sample in samples:
            size = tuple(self.index.sizes[sample].tolist())
            if size != (0, 0) and examine(self.source.read(sample), self.paths[sample]) != size:
                return self.paths[sample]
        return None


def _fill(mean: Sequence[float]) -> tuple[int, int, int]:
    """Colour of pixels from outside the image, as in `loader.make_batch`."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue
