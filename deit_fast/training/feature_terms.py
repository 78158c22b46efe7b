"""The feature terms of a run's loss: what each one is, and their weighted sum.

A term compares tokens of the student with one feature target of one teacher. Loss and sum are in
float32 whatever the dtype of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deit_fast.cache.feature_cache import Given
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.errors import InputError
from deit_fast.features.dropping import draw_kept, keep_highest
from deit_fast.features.losses import feature_loss
from deit_fast.features.normalise import Normaliser
from deit_fast.runtime.device import to_device


@dataclass(frozen=True)
class FeatureTerm:
    """One term of the loss.

    Attributes:
        name: of its loss in the metrics: `cls_loss`, of a second one of this target `cls_loss_2`.
        given: the target.
        teacher: number of its teacher; several terms may have one teacher.
        weight: in the total loss.
        loss: kind of the loss.
        normalise: of the teacher's features.
        projector: of the student's tokens.
    """

    name: str
    given: Given
    teacher: int
    weight: float
    loss: str
    normalise: str
    projector: str


def build_terms(config: RunConfig, targets: Sequence[Given]) -> tuple[FeatureTerm, ...]:
    """The terms of a run with these targets, which are in the order of its settings.

    Raises:
        InputError: a setting of another number of values; a normalisation without statistics.
    """
    features, count = config.features, len(targets)
    settings = [features.of_terms(name, count) for name in
                ("weights", "losses", "normalise", "projectors")]  # fmt: skip
    teachers = list(dict.fromkeys(target.teacher for target in targets))
    seen: Counter[str] = Counter()
    terms = []
    for given, weight, loss, normaliser, projector in zip(targets, *settings, strict=True):
        if normaliser in ("standard", "phi_s") and given.statistics is None:
            raise InputError(
                f"features.normalise={normaliser} of {given.target} needs the statistics of a "
                f"feature cache, which an online teacher has not: precompute its features, or "
                f"choose none or layer_norm"
            )
        if loss == "spectral" and given.target != "patches":
            raise InputError(f"features.losses=spectral is for patches, not {given.target}")
        seen[given.target] += 1
        number = seen[given.target]
        name = f"{given.target}_loss" + (f"_{number}" if number > 1 else "")
        teacher = teachers.index(given.teacher)
        terms.append(FeatureTerm(name, given, teacher, weight, loss, normaliser, projector))
    return tuple(terms)


class FeatureTerms:
    """The weighted sum of the terms of a run.

    With teachers left out, the terms of the teachers that an image keeps are scaled up, so that
    every image has the same total weight.
    """

    def __init__(
        self, config: RunConfig, terms: Sequence[FeatureTerm], device: torch.device
    ) -> None:
        self.terms, self.seed = tuple(terms), config.seed
        self.normalisers = [
            Normaliser(term.normalise, term.given.statistics).to(device) for term in terms
        ]
        self.num_teachers = len({term.teacher for term in terms})
        self.weights = torch.zeros(self.num_teachers, device=device)  # of each teacher's terms
        for term in terms:
            self.weights[term.teacher] += term.weight
        self.drop = config.features.drop if self.num_teachers > 1 else "none"
        if self.drop != "none" and config.cuda_graphs:
            raise InputError(
                f"features.drop={self.drop} does not go with cuda_graphs: the host draws the "
                f"teachers of each step; choose --no-cuda-graphs"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    def __call__(
        self,
        predictions: Sequence[Tensor],
        features: Sequence[Tensor],
        batch: ViewBatch,
        step: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """The weighted sum, float32 [], and the mean of each term over the batch, without weight.

        Args:
            predictions: the student's, [B, T, D] for each term.
            features: the teachers', [B, T, D] for each term.
            batch: the views, whose ids decide which teachers are left out.
            step: position in the order.
        """
        losses = []  # float32 [B] each
        with torch.autocast(predictions[0].device.type, enabled=False):
            parts = zip(self.terms, self.normalisers, predictions, features, strict=True)
            for term, normalise, ours, theirs in parts:
                losses.append(feature_loss(ours, normalise(theirs), term.loss))
            means = [loss.mean() for loss in losses]
            total = torch.zeros((), device=losses[0].device)
            if self.drop == "none":
                for term, mean in zip(self.terms, means, strict=True):
                    total = total + term.weight * mean
                return total, means
            scale = self._scale(losses, batch, step)
            for term, loss in zip(self.terms, losses, strict=True):
                total = total + term.weight * (scale[:, term.teacher] * loss).mean()
        return total, means

    @torch.no_grad()
    def _scale(self, losses: list[Tensor], batch: ViewBatch, step: int) -> Tensor:
        """Factor of each image's terms of each teacher, float32 [B, teachers]."""
        device = losses[0].device
        drawn = draw_kept(
            self.seed, batch.sample_ids, batch.view_ids, step, self.num_teachers,
            at_least_one=self.drop == "random",
        )  # fmt: skip
        kept = to_device(drawn, device)
        if self.drop == "dune":
            sums = torch.zeros(len(batch), self.num_teachers, device=device)
            for term, loss in zip(self.terms, losses, strict=True):
                sums[:, term.teacher] += term.weight * loss.detach()
            kept = keep_highest(kept, sums)
        left = kept @ self.weights  # of an image; 0 where all that it keeps weighs nothing
        return kept * torch.where(left > 0, self.weights.sum() / left, 0.0)[:, None]
