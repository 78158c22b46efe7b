"""Where a training step gets the teacher's answer: from the network, from the cache, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from deit_fast.cache import LogitCache, ResidentLogits, StreamedLogits
from deit_fast.cache.compare import compare_answers
from deit_fast.cache.pixels import PIXEL_CONTRACT, pick_pixels
from deit_fast.cache.reader import host_ids
from deit_fast.cache.tinyvit import is_tinyvit
from deit_fast.config import RunConfig, ViewRecipe
from deit_fast.data.fingerprint import pixel_contract, require_same_pixels
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewBatch
from deit_fast.errors import CacheError, InputError
from deit_fast.kernels import TopK
from deit_fast.models import Teacher, load_teacher
from deit_fast.train.compiling import resolve_compile
from deit_fast.views.plan import ViewPlan
from deit_fast.views.plan import fingerprint as view_fingerprint

PIXEL_CHECKS = 32  # views made again before training on a cache: under a second

TeacherAnswer: TypeAlias = torch.Tensor | TopK | None


class Teaching(Protocol):
    """Answers for a batch of views, in a form that ``kernels.distillation_loss`` takes."""

    reads_images: bool = False
    """Whether the answer is computed from the images. If not it is looked up, before the step's
    work on the device begins, and the images may be None or rows of patches."""

    def __call__(self, batch: ViewBatch, images: torch.Tensor | None) -> TeacherAnswer: ...

    def join(self) -> None:
        """Called before the last answer is read, on the stream that reads it."""
        return

    def follow(self, batches: Sequence) -> None:
        """Told once that batches come in this order from now on; ``at`` says from which on."""
        return

    def at(self, step: int) -> None:
        """Told before each step which one it is; its batch then comes whole or in parts."""
        return

    def noticed(self) -> dict[str, float]:
        """For the log's row, since the last call; each the largest over the ranks counts."""
        return {}

    def close(self) -> None:
        """No more batches come."""
        return


class NoTeacher(Teaching):
    """Training against the labels alone."""

    def __call__(self, batch: ViewBatch, images: torch.Tensor | None) -> None:
        return None


class OnlineTeacher(Teaching):
    """The teacher's forward on the very images that the student sees, beside the student's.

    On CUDA it has a stream of its own, which starts where the images are ready. No memory passes
    from one stream to the other too early: each waits for the other once a batch.
    """

    reads_images = True

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self.teacher, self.device = teacher, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: ViewBatch, images: torch.Tensor | None) -> torch.Tensor:
        assert images is not None
        if self._side is None:
            return self.teacher(images)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            return self.teacher(images)

    def join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)


class CachedTeacher(Teaching):
    """Stored answers, looked up by sample and view.

    In a known order (``follow``, then ``at`` each step) they are read, gathered and copied to the
    device ahead of the step by ``LogitCache.stream``, or come from ``resident`` where the run's
    views lie in the device's memory. Batches in no known order are looked up when they come.
    """

    def __init__(
        self,
        cache: LogitCache,
        device: torch.device,
        *,
        tau: float,
        tail: str,
        resident: ResidentLogits | None = None,
    ) -> None:
        self.cache, self.device, self.resident = cache, device, resident
        self.tau, self.tail = tau, tail
        self._batches: Sequence | None = None
        self._stream: StreamedLogits | None = None
        self._next = self._given = 0  # the stream's next step; rows given of the one before
        self._answer: torch.Tensor | TopK | None = None

    def follow(self, batches: Sequence) -> None:
        self.close()
        if self.resident is None:
            self._batches = batches

    def at(self, step: int) -> None:
        if self._batches is None:
            return
        if self._stream is None:  # not in `follow`: the loader's processes are forked after it
            self._next = step
            self._stream = self.cache.stream(
                self._batches, self.device, tau=self.tau, tail=self.tail, start=step
            )
        while self._next <= step:  # more than one where a step was left out
            self._answer = next(self._stream)
            self._next += 1
        self._given = 0

    def close(self) -> None:
        stream, self._stream, self._batches, self._answer = self._stream, None, None, None
        if stream is not None:
            stream.close()

    def __call__(self, batch: ViewBatch, images: torch.Tensor | None) -> torch.Tensor | TopK:
        if self.resident is not None:
            return self.resident.gather(
                batch.sample_ids, batch.view_ids, tau=self.tau, tail=self.tail
            )
        if self._stream is not None:
            return self._streamed(batch)
        answer = self.stored(batch)
        if isinstance(answer, TopK):
            moved = [field.to(self.device, non_blocking=True) for field in answer[:3]]
            return TopK(*moved, answer.tail)
        return answer.to(self.device, non_blocking=True)

    def _streamed(self, batch: ViewBatch) -> torch.Tensor | TopK:
        assert self._stream is not None and self._answer is not None
        rows = slice(self._given, self._given + len(batch))
        self._given = rows.stop
        for name, ids, given in zip(
            ("samples", "views"), self._stream.ids, (batch.sample_ids, batch.view_ids), strict=True
        ):
            expected = host_ids(ids, name)[rows] if np.ndim(ids) else ids
            if not np.array_equal(np.broadcast_to(expected, len(batch)), host_ids(given, name)):
                raise RuntimeError(
                    f"the batch of step {self._next} does not hold the {name} of its place in the "
                    f"order: first {given[:4].tolist()} rather than {expected[:4].tolist()}"
                )
        if isinstance(self._answer, TopK):
            return TopK(*(field[rows] for field in self._answer[:3]), self._answer.tail)
        return self._answer[rows]

    def stored(self, batch: ViewBatch) -> torch.Tensor | TopK:
        """The cache's answer, on the host."""
        return self.cache.gather(batch.sample_ids, batch.view_ids, tau=self.tau, tail=self.tail)


class CheckedTeacher(CachedTeacher):
    """A cached teacher whose answers are compared with the network's own at every n-th step.

    Such a step waits for the device, before its own work begins. A batch in which an unreadable
    image was replaced is passed over: the teacher may have seen the image itself.
    """

    def __init__(
        self,
        cache: LogitCache,
        device: torch.device,
        teacher: Teacher,
        *,
        every: int,
        view: ViewRecipe,
        **settings: Any,
    ) -> None:
        super().__init__(cache, device, **settings)
        self.teacher, self.every, self.view = teacher, every, view
        self._step = 0
        self._worst: float | None = None

    def at(self, step: int) -> None:
        super().at(step)
        self._step = step

    def __call__(self, batch: ViewBatch, images: torch.Tensor | None) -> torch.Tensor | TopK:
        if self._step % self.every == 0 and not batch.substituted:
            self._compare(batch)
        return super().__call__(batch, images)

    def _compare(self, batch: ViewBatch) -> None:
        """Compare as `cache verify --teacher` does.

        Raises:
            CacheError: an answer differs by more than rounding and arithmetic explain.
        """
        errors, allowed = compare_answers(
            self.stored(batch),
            self.teacher(ingest_batch(batch, self.view, torch.float32)).cpu(),
            batch.labels.cpu(),
            codec=self.cache.codec,
            tau=self.tau,
        )
        self._worst = max(self._worst or 0.0, float(errors.max()))
        excess = errors - allowed
        place = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        if not excess[place] <= 0:
            raise CacheError(
                f"cache {self.cache.path}: at step {self._step + 1} the teacher answers view "
                f"{int(batch.view_ids[place])} of sample {int(batch.sample_ids[place])} otherwise "
                f"than the cache: log-probabilities differ by {float(errors[place]):.3g}, "
                f"{float(allowed[place]):.3g} is allowed (check_teacher_every={self.every})"
            )

    def noticed(self) -> dict[str, float]:
        worst, self._worst = self._worst, None
        return {} if worst is None else {"teacher_difference": worst}


def views_fingerprint(config: RunConfig, source_fingerprint: dict) -> dict[str, object]:
    """What decides which pixels stand behind a (sample, view): recipe, data set, decoder."""
    return (
        view_fingerprint(config.view, config.seed)
        | source_fingerprint
        | pixel_contract(config.data)
    )


def create_teaching(config: RunConfig, source, device: torch.device) -> Teaching:
    """Choose by the configuration: no distillation, ``cache``, ``teacher``, or both.

    Raises:
        InputError: distillation without teacher or cache; a teacher of another class count.
        CacheMismatch: the cache is of another teacher, recipe, seed, data set or decoder; names
            each differing field.
        CacheError: a view is missing or damaged; the loader makes other pixels than the teacher
            saw.
    """
    every = config.check_teacher_every
    if every is not None and None in (config.cache, config.teacher):
        raise InputError(
            f"check_teacher_every={every} compares a cache with its teacher: give --cache and "
            f"--teacher, not {config.cache} and {config.teacher}"
        )
    if config.loss.kind == "none":
        return NoTeacher()
    if config.teacher is None and config.cache is None:
        raise InputError(
            f"loss.kind={config.loss.kind} needs --teacher SPEC or --cache DIR, or --loss.kind none"
        )
    num_classes = len(source.classes)
    teacher = load_class_matched_teacher(config, num_classes) if config.teacher else None
    if config.cache is None:
        assert teacher is not None
        compiled = resolve_compile(config, device) != "none"
        return OnlineTeacher(teacher.place(device, compiled, config.model.fused), device)
    cache = LogitCache.open(config.cache)
    if is_tinyvit(cache.manifest):
        raise InputError(
            f"cache {config.cache} was imported from TinyViT: its views are made by TinyViT's own "
            f"augmentation code, which this loader cannot replay; it serves info and export"
        )
    expected = views_fingerprint(config, source.fingerprint()) | PIXEL_CONTRACT
    cache.require(expected | (teacher.fingerprint() if teacher else {}))
    missing = sorted(set(range(config.views_used)) - set(cache.views))
    if missing:
        raise InputError(
            f"cache {config.cache} lacks {len(missing)} of the run's {config.views_used} views, "
            f"the first is {missing[0]}: precompute them, or train with a smaller --num-views"
        )
    require_same_pixels(
        pick_pixels(cache.path, cache.manifest, range(config.views_used), PIXEL_CHECKS),
        source,
        ViewPlan(config.view, config.seed, source.num_samples),
        data=config.data,
        device=device,
        where=f"cache {config.cache}",
    )
    settings: dict[str, Any] = {"tau": config.loss.tau, "tail": config.loss.tail}
    if config.cache_on_device:
        settings["resident"] = cache.to_device(range(config.views_used), device)
    if every is not None and teacher is not None:
        # As in `precompute`: under `auto` neither compiled nor fused.
        compiled = config.compile not in ("auto", "none")
        return CheckedTeacher(
            cache, device, teacher.place(device, compiled), every=every, view=config.view,
            **settings,
        )  # fmt: skip
    return CachedTeacher(cache, device, **settings)


def load_class_matched_teacher(config: RunConfig, num_classes: int) -> Teacher:
    """The configured teacher; its class count must be the data's."""
    assert config.teacher is not None
    teacher = load_teacher(
        config.teacher,
        num_classes=num_classes,
        input_mean=config.view.mean,
        input_std=config.view.std,
    )
    if teacher.num_classes != num_classes:
        raise InputError(
            f"teacher {config.teacher} has {teacher.num_classes} classes, "
            f"the data set has {num_classes}"
        )
    return teacher
