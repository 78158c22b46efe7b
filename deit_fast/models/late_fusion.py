"""Late fusion: a linear classifier on the embeddings of both tokens of a frozen student."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deit_fast.errors import InputError

log = logging.getLogger("deit_fast")

FUSIONS = ("sum", "concatenation")
ITERATIONS = 200  # of L-BFGS at most


def fuse_embeddings(tokens: Tensor, fusion: str) -> Tensor:
    """The sum [B, D] or concatenation [B, 2 D] of the first two tokens [B, N, D], float32."""
    pair = tokens[:, :2].float()
    return pair.sum(1) if fusion == "sum" else pair.flatten(1)


def fit_classifier(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression by L-BFGS, started from zero.

    Minimises the mean cross-entropy + |W|^2 / (2 N), the objective of scikit-learn's
    LogisticRegression with C = 1. It has one minimum, so that no seed has an influence.

    Args:
        features: float32 [N, D].
        labels: int64 [N].

    Raises:
        InputError: features that are not finite.
    """
    if bad := int((~features.isfinite()).any(1).sum()):
        raise InputError(
            f"late fusion: the embeddings of {bad} of {len(features)} images are not finite: "
            f"the student has diverged, or its weights file is damaged"
        )
    head = nn.Linear(features.shape[1], classes, device=features.device)
    with torch.no_grad():
        head.weight.zero_(), head.bias.zero_()
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=ITERATIONS, max_eval=2 * ITERATIONS, tolerance_grad=1e-6,
        tolerance_change=1e-10, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(features), labels)
        value = value + head.weight.square().sum() / (2 * len(labels))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    if next(iter(optimizer.state.values()))["n_iter"] >= ITERATIONS:
        log.warning(
            "late fusion: L-BFGS stopped after %d iterations without convergence: the classifier "
            "on %d features is not at its optimum", ITERATIONS, features.shape[1],
        )  # fmt: skip
    return head.requires_grad_(False)


def fit_late_fusion(tokens: Tensor, labels: Tensor, classes: int) -> dict[str, nn.Linear]:
    """A classifier for each of ``FUSIONS``, from tokens [N, 2, D] of training images."""
    return {
        fusion: fit_classifier(fuse_embeddings(tokens, fusion), labels, classes)
        for fusion in FUSIONS
    }


def apply_late_fusion(heads: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """Logits [B, C] of each fusion, float32."""
    with torch.autocast(tokens.device.type, enabled=False):
        return {fusion: head(fuse_embeddings(tokens, fusion)) for fusion, head in heads.items()}
