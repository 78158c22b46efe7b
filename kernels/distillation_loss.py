"""Distillation loss of a two-headed student: base loss on one head, distillation on the other.

With z_c, z_d the logits [B, C] of the class and the distillation head, q the teacher's
probabilities at temperature T and p = softmax(z_d / T):

    total = (1 - alpha) * base(z_c, target) + alpha * distillation(z_d, teacher)
    soft  = f * sum over rows of KL(q || p)
            f = T^2 / (B C)  "numel", DeiT's own code     (facebookresearch/deit, losses.py)
            f = T^2 / B      "batchmean", timm and most others
            f = 2 T^2 / B    "hinton"                     (Hinton et al. 2015 with a factor of 2)
    hard  = cross-entropy of z_d with argmax(teacher), mean over rows, no smoothing
            (Touvron et al. 2021, eq. 3)

A top-k teacher stores q_i for the ids in S, K of them, and the exact mass r outside S. With
H = sum over S of q_i (log q_i - log p_i) and s the student's mass outside S a row costs

    bucket   H + r (log r - log s)                                 all other classes as one
    uniform  H + r (log(r / (C - K)) - mean outside S of log p_i)  r spread evenly
    renorm   H with q_i / sum over S of q
    drop     H

and K = C is the dense teacher in every mode but renorm, which differs from it by the rounding of
the stored values alone.

Bytes: read z_c, z_d and the teacher, write two gradients: 5 B C elements with a dense teacher,
4 B C with top-k or hard labels. On a GPU one launch moves just that (above 8192 classes it reads
logits twice) and leaves the backward one that returns at once unless the loss was multiplied by
something. On a CPU, for float64 and for a top-k teacher of more than 2048 classes a row the
reference in plain PyTorch makes some ten passes more; with TRITON_INTERPRET=1 a CPU runs the
kernel in Triton's interpreter.

Numerics: float32 inside, float64 for float64 logits. A class with q = 0 contributes 0, also where
both sides are -inf. log s is a log-sum-exp over the classes outside S: 1 - sum over S of p loses
its digits where the student is sure. An empty batch costs 0 and has zero gradients.

Left out: DKD needs integer targets, which mixed ones are not; JSD and reverse KL need a second
sum before their gradient; logit standardisation is a transform of its own that needs the teacher's
whole row.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from . import distillation_loss_checks as check
from . import distillation_loss_launch as launch
from .distillation_loss_reference import (
    BASES,
    KINDS,
    REDUCTIONS,
    TAILS,
    Target,
    Teacher,
    TopK,
    reference,
)

__all__ = [
    "BASES",
    "KINDS",
    "REDUCTIONS",
    "TAILS",
    "TopK",
    "base_loss",
    "distillation_loss",
    "hard_distillation",
    "soft_distillation",
]


@functools.cache
def _say_once(device: str, dtype: torch.dtype) -> None:
    logging.getLogger(__name__).debug("%s tensors on %s take the reference", dtype, device)


def _losses(
    class_logits: Tensor | None, distill_logits: Tensor | None, target: Target | None,
    teacher: Teacher, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, base and distillation loss of checked arguments."""
    heads = [head for head in (class_logits, distill_logits) if head is not None]
    if all(launch.takes(head, teacher) for head in heads):
        return launch.fused(class_logits, distill_logits, target, teacher, **options)
    if not torch.compiler.is_compiling():
        _say_once(heads[0].device.type, heads[0].dtype)
    return reference(class_logits, distill_logits, target, teacher, **options)


def base_loss(
    class_logits: Tensor, target: Target, *, smoothing: float = 0.0, base: str = "ce"
) -> Tensor:
    """Loss of the class head, mean over rows ("ce") or over rows and classes ("bce").

    Args:
        class_logits: float [B, C].
        target: int labels [B]; a soft target float [B, C]; or a mixed pair (y_a, y_b, lam) of int
            [B], int [B] and float [B], lam the weight of y_a. The pair's [B, C] is never built.
        smoothing: eps; the target t becomes t (1 - eps) + eps / C, as DeiT's and timm's code.
        base: "ce", or "bce": every class with a target above 0 is a positive (DeiT-III). The
            threshold comes before the smoothing; give dense targets unsmoothed, for a smoothed
            one is above 0 in every class.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit, by name and value.
    """
    _check_base(class_logits, target, smoothing, base)
    return _losses(class_logits, None, target, None, kind="none", base=base, smoothing=smoothing)[0]


def _check_base(logits: Tensor, target: Target, smoothing: float, base: str) -> None:
    check.check_logits("class_logits", logits)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), not {smoothing}")
    check.check_option("base", base, BASES)
    check.check_target(target, logits)


def soft_distillation(
    distill_logits: Tensor, teacher: Tensor | TopK, *, tau: float, reduction: str
) -> Tensor:
    """f * sum over rows of KL(teacher at tau || student at tau); f and tail modes: see above.

    Args:
        distill_logits: float [B, C].
        teacher: logits, float [B, C], or a TopK taken at this tau. No gradient flows into it.
        tau: temperature, above 0.
        reduction: "numel" (tau^2 / (B C)), "batchmean" (tau^2 / B) or "hinton" (2 tau^2 / B).

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0.

    Raises:
        ValueError: shapes, dtypes, devices, ids or options that do not fit, by name and value.
    """
    _check_soft(distill_logits, teacher, tau, reduction)
    return _losses(
        None, distill_logits, None, teacher, kind="soft", base="", reduction=reduction, tau=tau
    )[0]


def _check_soft(logits: Tensor, teacher: Teacher, tau: float, reduction: str) -> None:
    check.check_logits("distill_logits", logits)
    check.check_option("reduction", reduction, REDUCTIONS)
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    if isinstance(teacher, TopK):
        check.check_topk(teacher, logits)
    else:
        check.check_floats("teacher", teacher, logits.shape, logits)


def hard_distillation(distill_logits: Tensor, teacher: Tensor | TopK) -> Tensor:
    """Cross-entropy of the distillation head with the teacher's decision, mean over rows.

    Args:
        distill_logits: float [B, C].
        teacher: int labels [B]; logits, float [B, C]; or a TopK. Of equal logits the first counts.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, by name and value.
    """
    check.check_logits("distill_logits", distill_logits)
    _check_hard_teacher(teacher, distill_logits)
    return _losses(None, distill_logits, None, teacher, kind="hard", base="")[0]


def _check_hard_teacher(teacher: Teacher, logits: Tensor) -> None:
    if isinstance(teacher, TopK):
        check.check_topk(teacher, logits)
    elif isinstance(teacher, Tensor) and teacher.is_floating_point():
        check.check_floats("teacher", teacher, logits.shape, logits)
    else:
        check.check_labels("teacher", teacher, logits.shape[:1], logits)


def distillation_loss(
    class_logits: Tensor,
    distill_logits: Tensor | None,
    target: Target,
    teacher: Teacher,
    *,
    kind: str,
    alpha: float,
    tau: float,
    smoothing: float = 0.0,
    base: str = "ce",
    reduction: str,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """(1 - alpha) * base_loss + alpha * distillation; the base loss alone for kind "none".

    Args:
        class_logits: float [B, C], of the class head.
        distill_logits: float [B, C], of the distillation head; unused for kind "none".
        target: labels, soft target or mixed pair, see ``base_loss``.
        teacher: logits or TopK for "soft"; these or int labels [B] for "hard"; unused for "none".
        kind: "none", "soft" or "hard".
        alpha: weight of the distillation, in [0, 1].
        tau: temperature of the soft distillation.
        smoothing: label smoothing of the base loss.
        base: "ce" or "bce".
        reduction: "numel", "batchmean" or "hinton", for "soft".
        return_parts: also return the base and the distillation loss, unweighted and detached,
            for the log.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0. With ``return_parts`` three
        of them: total, base, distillation (0 for kind "none").

    Raises:
        ValueError: anything that does not fit, by name and value.
    """
    check.check_option("kind", kind, KINDS)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    _check_base(class_logits, target, smoothing, base)
    if kind == "none":
        distill_logits = teacher = None
    else:
        if distill_logits is None or teacher is None:
            missing = "teacher" if teacher is None else "distill_logits"
            raise ValueError(f"{missing} must not be None for kind {kind!r}")
        check.check_floats("distill_logits", distill_logits, class_logits.shape, class_logits)
        if kind == "soft":
            _check_soft(distill_logits, teacher, tau, reduction)
        else:
            _check_hard_teacher(teacher, distill_logits)
    losses = _losses(
        class_logits, distill_logits, target, teacher, kind=kind, base=base,
        reduction=reduction, alpha=alpha, tau=tau, smoothing=smoothing,
    )  # fmt: skip
    return losses if return_parts else losses[0]
