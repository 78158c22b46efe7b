"""A batch of views on its way from the loader to the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels.distillation_loss import TopK

_TENSORS = ("images", "plan", "labels", "partner_labels", "lam")  # the ids stay on the host
_ROWS = ("plan", "sample_ids", "view_ids", "labels", "partner_labels", "lam")


@dataclass
class ViewBatch:
    """Pixels and plan of B views; `ingest_batch` makes the model's input of them.

    Attributes:
        images: uint8 [M, S, S, 3], cropped, resized and augmented, neither flipped nor mixed.
        plan: int32 [B, 22], `kernels.ingest.PLAN_COLUMNS`; its image columns point into `images`.
        sample_ids, view_ids: int64 and int32 [B], the view's address, for instance in a cache.
        labels, partner_labels: int64 [B]; equal where nothing is mixed.
        lam: float32 [B], weight of `labels` in the target.
        substituted: paths of unreadable files of this batch; a neighbour was read instead of each.
        teacher: stored teacher logits of the views, in a form that `kernels.distillation_loss`
            takes; None where the run reads none.
        more_teachers: those of further teachers.
        features: stored features of the views, float [B, T, D] each.
    """

    images: Tensor
    plan: Tensor
    sample_ids: Tensor
    view_ids: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    substituted: list[str] = field(default_factory=list)
    teacher: Tensor | TopK | None = None
    more_teachers: tuple[Tensor | TopK, ...] = ()
    features: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def size(self) -> int:
        """Side S of the views, pixels."""
        return self.images.shape[1]

    @property
    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """labels, partner_labels, lam: the mixed pair that `kernels.distillation_loss` takes."""
        return self.labels, self.partner_labels, self.lam

    @property
    def logits(self) -> tuple[Tensor | TopK, ...]:
        """The stored logits of all teachers."""
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    def stored_tensors(self) -> list[Tensor]:
        """The tensors of stored logits and features."""
        return [*(t for logits in self.logits for t in teacher_tensors(logits)), *self.features]

    def device_tensors(self) -> list[Tensor]:
        """The tensors that `to` moves."""
        return [*(getattr(self, name) for name in _TENSORS), *self.stored_tensors()]

    def part(self, start: int, stop: int) -> ViewBatch:
        """Views ``start`` to ``stop`` - 1. The pixels are shared: the plan points into them."""
        return self._map(_ROWS, lambda rows: rows[start:stop])

    def to(self, device: torch.device | str) -> ViewBatch:
        """A copy on the device; from pinned memory without waiting. The ids stay on the host."""
        return self._map(_TENSORS, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ViewBatch:
        """A copy whose host tensors are in pinned memory; called by torch's DataLoader."""
        return self._map(_TENSORS, lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _map(self, names: Iterable[str], function: Callable[[Tensor], Tensor]) -> ViewBatch:
        mapped: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return dataclasses.replace(self, **mapped, **self.map_stored(function))

    def map_stored(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The fields of stored logits and features with ``function`` applied to each tensor."""
        if not self.logits and not self.features:
            return {}
        first, *others = [map_teacher(logits, function) for logits in self.logits] or [None]
        features = tuple(map(function, self.features))
        return {"teacher": first, "more_teachers": tuple(others), "features": features}


def main_labels(labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    """The label of larger weight in each view's target, int64 [B]."""
    return torch.where(lam >= 0.5, labels, partner_labels)


def teacher_tensors(teacher: Tensor | TopK | None) -> list[Tensor]:
    """The tensors of teacher logits in any form."""
    if teacher is None:
        return []
    return [*teacher[:3]] if isinstance(teacher, TopK) else [teacher]


def map_teacher(teacher: Tensor | TopK, function: Callable[[Tensor], Tensor]) -> Tensor | TopK:
    """Teacher logits of the same form with ``function`` applied to each tensor."""
    if not isinstance(teacher, TopK):
        return function(teacher)
    ids, log_probs, log_tail = map(function, teacher[:3])
    return TopK(ids, log_probs, log_tail, teacher.tail)
