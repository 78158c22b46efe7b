"""Batches of views from files: read, decode, crop, resize, in processes that make whole batches.

A worker reads each distinct file of a batch once, cuts all its views (repeats, and those that other
views are mixed with) and sends uint8 pixels with the integer plan. Flip, normalisation, erasing and
mixing follow in ingest, on the accelerator if there is one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit_fast.data.augment import render_views
from deit_fast.data.batch import ViewBatch
from deit_fast.data.ingest import build_rows
from deit_fast.data.sources import Source, UnreadableImage
from deit_fast.data.watch import POLL_SECONDS, Watch, note_sample
from deit_fast.errors import InputError, first_line, report_of_dead_worker
from deit_fast.views.plan import BatchMix, ViewPlan, lam_of

T = TypeVar("T")

_MOST_BAD = 1000  # unreadable images in a row that are substituted
_DECODED = 16  # decoded files held at once: amortises the plan's calls, bounds memory


class ViewLoader:
    """Iterates over batches of views, in the order of `batches`, from step `start` on.

    Args:
        source: images and labels.
        plan: what the views look like; `plan.num_samples` must be the source's.
        batches: entry k gives sample ids and view ids of step k, and a `BatchMix` where the batch
            is mixed as a whole (`data.compat`); sent to the workers, so it should compute its
            entries (`order.TrainBatches`) or be small.
        workers: processes, each making whole batches, two ahead; 0: in this process.
        on_error: "substitute" takes the next readable sample's pixels and label for an unreadable
            one, always the same; "fail" raises.
        start: first step; resume is a seek.
        stop: step to end before; none: the end of `batches`.
        pin_memory: for copies to a CUDA device that do not wait.

    Raises:
        InputError: while iterating, with on_error="fail" or when no image is readable.
        OSError, MemoryError: while iterating, the machine cannot read a file; names it.
        ChildProcessError: while iterating, the workers are stuck.
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
    ) -> None:
        self.steps = steps_of(source, plan, batches, start, stop)
        make = partial(_make_step, source, plan, batches, on_error)
        self._batches = Batches(make, source.paths, self.steps, workers, pin_memory)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[ViewBatch]:
        return iter(self._batches)


def steps_of(
    source: Source, plan: ViewPlan, batches: Sequence, start: int, stop: int | None
) -> range:
    """The steps of one pass of a loader.

    Raises:
        InputError: a plan of another data set, a start outside of the run.
    """
    if plan.num_samples != source.num_samples:
        raise InputError(
            f"the view plan is for {plan.num_samples} samples, not {source.num_samples}"
        )
    if not 0 <= start <= len(batches):
        raise InputError(f"start={start} is not a step of a run of {len(batches)} steps")
    return range(start, len(batches) if stop is None else min(stop, len(batches)))


def _make_step(
    source: Source, plan: ViewPlan, batches: Sequence[tuple[Any, ...]], on_error: str, step: int
) -> ViewBatch:
    return make_batch(source, plan, *batches[step], on_error=on_error)


def make_batch(
    source: Source,
    plan: ViewPlan,
    sample_ids: Any,
    view_ids: Any,
    mix: BatchMix | None = None,
    *,
    on_error: str,
) -> ViewBatch:
    """One batch of views, in this process; arguments as `ViewLoader`, the rest as in `batches`."""
    operands = MixOperands.of(plan, sample_ids, view_ids, mix)
    needed, size = operands.needed, operands.size
    images = np.empty((len(needed), size, size, 3), np.uint8)
    labels = np.empty(len(needed), np.int64)
    substituted: list[str] = []

    distinct, starts, counts = np.unique(needed["sample"], return_index=True, return_counts=True)
    source.fetch(distinct.tolist())
    for first in range(0, len(distinct), _DECODED):
        group = slice(first, first + _DECODED)
        loaded = [
            load_readable(source.load, source.paths, sample, on_error, substituted)
            for sample in distinct[group].tolist()
        ]
        pixels = [np.asarray(image) for image, _ in loaded]
        rows = slice(starts[group][0], starts[group][-1] + counts[group][-1])
        image_of = np.repeat(np.arange(len(loaded)), counts[group])
        sizes = np.array([image.shape[1::-1] for image in pixels])[image_of]
        part = needed[rows]
        boxes = plan.crop_boxes(part["sample"], part["view"], sizes[:, 0], sizes[:, 1])
        labels[rows] = source.labels[[taken for _, taken in loaded]][image_of]
        if source.finished:
            images[rows] = [pixels[image] for image in image_of.tolist()]
        else:
            render_views(pixels, image_of, part, boxes, plan.view, images[rows])

    return operands.assemble(torch.from_numpy(images), labels, substituted)


@dataclass(frozen=True)
class MixOperands:
    """The views that a batch is made from. Partners in one batch share them: each is made once.

    Attributes:
        own, partner: `plan_dtype` [B]; an unmixed view is its own partner.
        needed: `plan_dtype` [M], the distinct (sample, view) among both, sorted.
        own_image, partner_image: indices into `needed`, int64 [B].
        lam: float32 [B], `views.plan.lam_of`.
        size: side of the views, pixels.
    """

    own: np.ndarray
    partner: np.ndarray
    needed: np.ndarray
    own_image: np.ndarray
    partner_image: np.ndarray
    lam: np.ndarray
    size: int

    @classmethod
    def of(
        cls, plan: ViewPlan, sample_ids: Any, view_ids: Any, mix: BatchMix | None = None
    ) -> MixOperands:
        own, partner = plan.mix_operands(sample_ids, view_ids, mix)
        rows = np.concatenate([own, partner])
        keys = np.stack([rows["sample"], rows["view"]], axis=1)
        _, firsts, images = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        own_image, partner_image = images.reshape(2, len(own))
        size = plan.size_of_all(own["view"])
        return cls(own, partner, rows[firsts], own_image, partner_image, lam_of(own, size), size)

    def assemble(self, images: Tensor, labels: np.ndarray, substituted: list[str]) -> ViewBatch:
        """The batch, from the pixels uint8 [M, S, S, 3] and labels int64 [M] of `needed`."""
        rows = build_rows(self.own, self.partner, self.own_image, self.partner_image)
        return ViewBatch(
            images=images,
            plan=torch.from_numpy(rows),
            sample_ids=torch.from_numpy(self.own["sample"].copy()),
            view_ids=torch.from_numpy(self.own["view"].copy()),
            labels=torch.from_numpy(labels[self.own_image]),
            partner_labels=torch.from_numpy(labels[self.partner_image]),
            lam=torch.from_numpy(self.lam),
            substituted=substituted,
        )


def load_readable(
    load: Callable[[int], T],
    paths: Sequence[str],
    index: int,
    on_error: str,
    substituted: list[str],
) -> tuple[T, int]:
    """The image and its sample id: sample `index`, or the next readable one, cyclically.

    `load` and `paths` are a source's. The path of `index` is appended to `substituted` if another
    sample was taken.

    Raises:
        InputError: the file is unreadable and on_error is "fail", or none is readable, or
            `_MOST_BAD` in a row are not: rights that expired, for instance.
    """
    count = min(len(paths), _MOST_BAD)
    for offset in range(count):
        taken = (index + offset) % len(paths)
        note_sample(taken)
        try:
            image = load(taken)
        except UnreadableImage as error:
            if on_error == "fail":
                raise InputError(f"{error} (data.on_error=fail)") from None
            reason = error.why
            continue
        if offset:
            substituted.append(paths[index])
        return image, taken
    if count < len(paths):
        raise InputError(f"{count} images are not readable, from {paths[index]} on: {reason}")
    raise InputError(f"no image of the data set is readable, from {paths[index]} on: {reason}")


# ---------------------------------------------------------------------------------------------
# Worker processes, shared with evaluation
# ---------------------------------------------------------------------------------------------


class Batches:
    """Batches in order, each made by a worker process if there are any.

    Workers live as long as one pass: a run is one pass of its `ViewLoader`, and evaluation's
    workers hold no memory during training. Nothing but the pass refers to them, so an error
    or a break ends them at once; persistent ones, left to the garbage collector, take 5 s each.

    Args:
        make: a `ViewBatch`, or a tuple with tensors, of a step.
        paths: of the source, for messages.
        order: the steps.

    Raises:
        InputError, OSError, MemoryError: while iterating, as ``make`` raised it.
        ChildProcessError: while iterating, no batch will come (`Watch.waited`).
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        paths: Sequence[str],
        order: Sequence[int],
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._make, self._paths, self._order = make, paths, order
        self._workers, self._pin_memory = workers, pin_memory

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Any]:
        watch = Watch("process", self._workers, self._paths.__getitem__)
        try:
            passed: Any = iter(self._loader(watch))
        except OSError as error:
            raise _cannot_start(error) from None
        try:
            while True:
                try:
                    item = next(passed, _END)
                except RuntimeError as error:
                    if str(error).startswith("Too many open files"):  # torch's own text goes on
                        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
                    if not str(error).startswith("DataLoader timed out"):
                        raise _with_file(error, watch) from None
                    item = _TIMED_OUT
                except (OSError, EOFError) as error:
                    item = _Failure(report_of_dead_worker(error))
                if item is _TIMED_OUT:
                    watch.waited()
                elif item is _END:
                    return
                elif isinstance(item, _Failure):
                    raise _with_file(item.error, watch)
                else:
                    yield item
        except ChildProcessError:
            with _killed(watch.stuck()):
                passed = None
            raise
        finally:
            passed = None

    def _loader(self, watch: Watch) -> DataLoader:
        return DataLoader(
            _Items(self._make),
            batch_size=None,
            sampler=self._order,
            num_workers=self._workers,
            prefetch_factor=2 if self._workers else None,
            pin_memory=self._pin_memory,
            collate_fn=_unchanged,
            timeout=POLL_SECONDS if self._workers else 0,
            worker_init_fn=partial(_begin_worker, watch),
            generator=torch.Generator(),  # else every pass would draw from torch's global generator
        )


_END, _TIMED_OUT = object(), object()


def _with_file(error: Exception, watch: Watch) -> Exception:
    """torch's error of a worker that died, with the file that the worker had begun."""
    found = re.match(r"DataLoader worker \(pid\D* (\d+)\).*?(?=\. |\.?$)", str(error), re.S)
    if not isinstance(error, RuntimeError) or found is None:
        return error
    file = watch.file_of(int(found[1]))
    return RuntimeError(f"{found[0]}, while it read {file}") if file else error


@contextlib.contextmanager
def _killed(processes: Sequence[int]) -> Iterator[None]:
    """Kill workers that do not end by themselves; in the block torch's handler, which would raise
    another error, does not hear of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


@dataclass(frozen=True)
class _Failure:
    """A user's or the machine's error on its way out; raised in a worker, a traceback would wrap
    it."""

    error: Exception


@dataclass(frozen=True)
class _Items(Dataset):
    make: Callable[[int], Any]

    def __getitem__(self, index: int) -> Any:
        try:
            item = self.make(index)
            if torch.utils.data.get_worker_info() is not None:
                _share(item)
        except InputError as error:
            return _Failure(InputError(str(error)))
        except MemoryError as error:
            return _Failure(MemoryError(str(error)))
        except OSError as error:
            if error.filename is None:
                raise
            return _Failure(error)
        finally:
            note_sample(-1)
        return item


def _share(item: Any) -> None:
    """Move a batch to shared memory.

    The thread that sends it would do it too, but would drop the batch where that fails.

    Raises:
        OSError: no space in /dev/shm, or too many open files; names /dev/shm.
    """
    try:
        for value in vars(item).values() if isinstance(item, ViewBatch) else item:
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError as error:  # its text ends with "(28)", the number of the system's error
        number = re.search(r"\((\d+)\)$", first_line(error))
        if number is None:
            raise
        raise _of_shared_memory(int(number[1])) from None


def _of_shared_memory(number: int) -> OSError:
    text = os.strerror(number)
    if number == errno.ENOSPC:
        text = "no space left for batches: enlarge it, or set fewer data.workers"
    return OSError(number, text, "/dev/shm")


def _cannot_start(error: OSError) -> OSError:
    """The error of a pass whose processes do not start: semaphores are in /dev/shm."""
    if error.errno == errno.ENOSPC:
        return _of_shared_memory(error.errno)
    reason = error.strerror or str(error)
    text = f"{reason}: the processes that load images cannot start; try fewer data.workers"
    return OSError(error.errno, text)


def _begin_worker(watch: Watch, worker: int) -> None:
    watch.join(worker)
    # A scheduler's SIGTERM, or Ctrl-C, reaches every process; the run still needs this one.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item
