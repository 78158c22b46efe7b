"""Where a training step gets the teacher's answer: from the network, from the cache, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch

from deit_fast.cache import LogitCache
from deit_fast.cache.ahead import ReadAhead
from deit_fast.cache.compare import compare_answers
from deit_fast.cache.errors import CacheError
from deit_fast.cache.pixels import PIXEL_CONTRACT, pick_pixels
from deit_fast.cache.tinyvit import is_tinyvit
from deit_fast.config import InputError, RunConfig
from deit_fast.data.digests import require_same_pixels
from deit_fast.data.loader import ViewBatch
from deit_fast.data.open import pixel_contract
from deit_fast.kernels import TopK
from deit_fast.models import Teacher, load_teacher
from deit_fast.views import ViewPlan
from deit_fast.views import fingerprint as view_fingerprint

PIXEL_CHECKS = 32  # views made again before training on a cache: under a second

TeacherAnswer: TypeAlias = torch.Tensor | TopK | None


class Teaching(Protocol):
    """Answers for a batch of views, in a form that ``kernels.distillation_loss`` takes."""

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> TeacherAnswer: ...

    def follow(self, batches: Sequence, start: int) -> None:
        """Told once that the batches from ``start`` on come next, in this order."""
        return

    def at(self, step: int) -> None:
        """Told before each step which one it is."""
        return

    def noticed(self) -> dict[str, float]:
        """For the log's row, since the last call; each the largest over the ranks counts."""
        return {}

    def close(self) -> None:
        """No more batches come."""
        return


class NoTeacher(Teaching):
    """Training against the labels alone."""

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> None:
        return None


class OnlineTeacher(Teaching):
    """The teacher's forward on the very images that the student sees."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor:
        return self.teacher(images)


class CachedTeacher(Teaching):
    """Stored answers, looked up by sample and view; read ahead where the order is known."""

    def __init__(self, cache: LogitCache, *, tau: float, tail: str) -> None:
        self.cache, self.tau, self.tail = cache, tau, tail
        self._ahead: ReadAhead | None = None

    def follow(self, batches: Sequence, start: int) -> None:
        self.close()
        self._ahead = self.cache.prefetch(batches, start=start)

    def at(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead.advance(step)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor | TopK:
        answer = self.stored(batch)
        if isinstance(answer, TopK):
            moved = [field.to(images.device, non_blocking=True) for field in answer[:3]]
            return TopK(*moved, answer.tail)
        return answer.to(images.device, non_blocking=True)

    def stored(self, batch: ViewBatch) -> torch.Tensor | TopK:
        """The cache's answer, on the host."""
        return self.cache.gather(batch.sample_ids, batch.view_ids, tau=self.tau, tail=self.tail)


class CheckedTeacher(CachedTeacher):
    """A cached teacher whose answers are compared with the network's own at every n-th step.

    Such a step waits for the device. A batch in which an unreadable image was replaced is passed
    over: the teacher may have seen the image itself.
    """

    def __init__(
        self, cache: LogitCache, teacher: Teacher, *, every: int, tau: float, tail: str
    ) -> None:
        super().__init__(cache, tau=tau, tail=tail)
        self.teacher, self.every = teacher, every
        self._step = 0
        self._worst: float | None = None

    def at(self, step: int) -> None:
        super().at(step)
        self._step = step

    def __call__(self, batch: ViewBatch, images: torch.Tensor) -> torch.Tensor | TopK:
        if self._step % self.every == 0 and not batch.substituted:
            self._compare(batch, images)
        return super().__call__(batch, images)

    def _compare(self, batch: ViewBatch, images: torch.Tensor) -> None:
        """Compare as `cache verify --teacher` does.

        Raises:
            CacheError: an answer differs by more than rounding and arithmetic explain.
        """
        errors, allowed = compare_answers(
            self.stored(batch),
            self.teacher(images).cpu(),
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
        return OnlineTeacher(teacher.to(device))
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
    if every is not None and teacher is not None:
        return CheckedTeacher(
            cache, teacher.to(device), every=every, tau=config.loss.tau, tail=config.loss.tail
        )
    return CachedTeacher(cache, tau=config.loss.tau, tail=config.loss.tail)


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
