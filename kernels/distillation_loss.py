"""Distillation loss of a two-headed student: base loss on one head, distillation on the other.

With z_c, z_d the logits [B, C] of the class and the distillation head, q the teacher's
probabilities at temperature T and p = softmax(z_d / T):

    total = (1 - alpha) * base(z_c, target) + alpha * distillation(z_d, teacher)
    soft  = f * sum over rows of KL(q || p)
            f = T^2 / (B C)  "numel", DeiT's own code     (facebookresearch/deit, losses.py)
            f = T^2 / B      "batchmean", timm and most others
    hard  = cross-entropy of z_d with argmax(teacher), mean over rows, no smoothing
            (Touvron et al. 2021, eq. 3)

A top-k teacher stores q_i for the K ids in S, and the exact mass r outside S. With
H = sum over S of q_i (log q_i - log p_i) and s the student's mass outside S, a row's loss is

    bucket   H + r (log r - log s)                                 all other classes as one
    uniform  H + r (log(r / (C - K)) - mean outside S of log p_i)  r spread evenly
    renorm   H with q_i / sum over S of q
    drop     H

K = C gives the loss of a dense teacher in every mode; in renorm up to the rounding of the stored
values.

Bytes: read z_c, z_d and the teacher, write two gradients: 5 B C elements with a dense teacher,
4 B C with top-k or hard labels. On a GPU one launch moves only these (above 8192 classes it reads
logits twice). The backward's launch returns at once unless the loss was multiplied by something.
A CPU, float64 logits and a top-k teacher of more than 2048 classes a row use the reference in plain
PyTorch, which makes about ten more passes; with TRITON_INTERPRET=1 a CPU runs the kernel in
Triton's interpreter.

Numerics: float32 inside, float64 for float64 logits. A class with q = 0 contributes 0, even where
both logits are -inf. log s is a log-sum-exp over the classes outside S, because 1 - sum over S of p
loses its digits where the student is confident. The loss of an empty batch is 0, and so are its
gradients.

Gradients are made in the forward, where p and q are at hand, with every factor but the incoming
one. Those of fp16 logits would underflow: they are stored as (p - q) * ``FP16_UNIT`` and get their
factor in the backward. Gradients have padded rows where the logits have: a head that emits padded
logits receives padded gradients.

Not supported: DKD needs integer targets, and mixed targets are not; JSD and reverse KL need a
second sum before their gradient; logit standardisation is a separate transform that needs the
teacher's whole row.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor

from .distillation_loss_launch import MAX_TOPK, loss_op
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
from .launching import can_run

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
            threshold comes before the smoothing: pass dense targets unsmoothed, because a smoothed
            one is above 0 in every class.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit, by name and value.
    """
    _check_base(class_logits, target, smoothing, base)
    return _losses(class_logits, None, target, None, kind="none", base=base, smoothing=smoothing)[0]


def soft_distillation(
    distill_logits: Tensor, teacher: Tensor | TopK, *, tau: float, reduction: str
) -> Tensor:
    """f * sum over rows of KL(teacher at tau || student at tau); f and tail modes: see the module.

    Args:
        distill_logits: float [B, C].
        teacher: logits, float [B, C], or a TopK taken at this tau. No gradient flows into it.
        tau: temperature, above 0.
        reduction: "numel" (tau^2 / (B C)) or "batchmean" (tau^2 / B).

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0.

    Raises:
        ValueError: shapes, dtypes, devices, ids or options that do not fit, by name and value.
    """
    _check_soft(distill_logits, teacher, tau, reduction)
    return _losses(
        None, distill_logits, None, teacher, kind="soft", base="", reduction=reduction, tau=tau
    )[0]


def hard_distillation(distill_logits: Tensor, teacher: Tensor | TopK) -> Tensor:
    """Cross-entropy of the distillation head with the teacher's top class, mean over rows.

    Args:
        distill_logits: float [B, C].
        teacher: int labels [B]; logits, float [B, C]; or a TopK. Of equal logits the first wins.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, by name and value.
    """
    _check_logits("distill_logits", distill_logits)
    _check_hard_teacher(teacher, distill_logits)
    return _losses(None, distill_logits, None, teacher, kind="hard", base="")[0]


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
        reduction: "numel" or "batchmean", for "soft".
        return_parts: also return the base and the distillation loss, unweighted and detached,
            for the log.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0. With ``return_parts`` three
        of them: total, base, distillation (0 for kind "none").

    Raises:
        ValueError: anything that does not fit, by name and value.
    """
    _check_option("kind", kind, KINDS)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    _check_base(class_logits, target, smoothing, base)
    if kind == "none":
        distill_logits = teacher = None
    else:
        if distill_logits is None or teacher is None:
            missing = "teacher" if teacher is None else "distill_logits"
            raise ValueError(f"{missing} must not be None for kind {kind!r}")
        _check_floats("distill_logits", distill_logits, class_logits.shape, class_logits)
        if kind == "soft":
            _check_soft(distill_logits, teacher, tau, reduction)
        else:
            _check_hard_teacher(teacher, distill_logits)
    losses = _losses(
        class_logits, distill_logits, target, teacher, kind=kind, base=base,
        reduction=reduction, alpha=alpha, tau=tau, smoothing=smoothing,
    )  # fmt: skip
    return losses if return_parts else losses[0]


@functools.cache
def _log_reference_once(device: str, dtype: torch.dtype) -> None:
    logging.getLogger(__name__).debug("%s tensors on %s use the reference", dtype, device)


def _losses(
    class_logits: Tensor | None, distill_logits: Tensor | None, target: Target | None,
    teacher: Teacher, *, kind: str, base: str, reduction: str = "numel", alpha: float = 1.0,
    tau: float = 1.0, smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, base and distillation loss of checked arguments; base "" or kind "none" is left out.

    Only the total has a gradient, and only for the logits.
    """
    heads = [head for head in (class_logits, distill_logits) if head is not None]
    options: dict[str, Any] = {
        "kind": kind, "base": base, "reduction": reduction,
        "alpha": float(alpha), "tau": float(tau), "smoothing": float(smoothing),
    }  # fmt: skip
    fits = not isinstance(teacher, TopK) or teacher.ids.shape[1] <= MAX_TOPK
    if not fits or not can_run(*heads):
        if not torch.compiler.is_compiling():
            _log_reference_once(heads[0].device.type, heads[0].dtype)
        return reference(class_logits, distill_logits, target, teacher, **options)
    parts = target if isinstance(target, (tuple, list)) else (target, None, None)
    topk: Any = teacher if isinstance(teacher, TopK) else (None, None, None, "drop")
    tensors = (*parts, None if isinstance(teacher, TopK) else teacher, *topk[:3])
    tensors = tuple(x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in tensors)
    return loss_op(class_logits, distill_logits, *tensors, topk[3], *options.values())


# ---------------------------------------------------------------------------------------------
# Checks. Messages are built only when they are raised: formatting costs more than the test.
# ---------------------------------------------------------------------------------------------

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16)


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, not {value!r}")


def _check_range(name: str, values: Tensor, low: float, high: float) -> None:
    """low <= values <= high. On a GPU, where reading values waits, only with DEIT_FAST_DEBUG=1."""
    if torch.compiler.is_compiling() or values.numel() == 0:
        return
    if values.is_cuda and os.environ.get("DEIT_FAST_DEBUG") != "1":
        return
    if values.dtype == torch.uint16:  # PyTorch lacks its minimum
        values = values.int()
    smallest, largest = (value.item() for value in torch.aminmax(values))
    if not (low <= smallest and largest <= high):
        raise ValueError(
            f"{name} must lie in [{low}, {high}], found values from {smallest} to {largest}"
        )


def _check_tensor(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but the logits {tuple(logits.shape)} "
            f"need {shape}"
        )
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device} but the logits are on {logits.device}")


def _check_floats(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    _check_tensor(name, value, shape, logits)
    if not value.is_floating_point():
        raise ValueError(f"{name} must hold floats, not {value.dtype}")


def _check_labels(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    _check_tensor(name, value, shape, logits)
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name} must hold integers, not {value.dtype}")
    _check_range(name, value, 0, logits.shape[1] - 1)


def _check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name} must have shape [B, C] with C > 0, not {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{name} must hold floats, not {logits.dtype}")


def _check_target(target: Any, logits: Tensor) -> None:
    rows = logits.shape[:1]
    if isinstance(target, Tensor):
        if target.is_floating_point():
            _check_floats("target", target, logits.shape, logits)
        else:
            _check_labels("target", target, rows, logits)
        return
    if not isinstance(target, (tuple, list)) or len(target) != 3:
        raise ValueError(
            "target must be labels [B], a float tensor [B, C] or (y_a, y_b, lam), "
            f"not {type(target).__name__}"
        )
    _check_labels("target y_a", target[0], rows, logits)
    _check_labels("target y_b", target[1], rows, logits)
    _check_floats("target lam", target[2], rows, logits)
    _check_range("target lam", target[2], 0, 1)


def _check_topk(teacher: TopK, logits: Tensor) -> None:
    rows, classes = logits.shape
    _check_option("teacher tail", teacher.tail, TAILS)
    width = teacher.ids.shape[-1] if isinstance(teacher.ids, Tensor) and teacher.ids.dim() else 0
    if not 1 <= width <= classes:
        raise ValueError(f"teacher ids must hold 1 to {classes} classes per row, not {width}")
    _check_labels("teacher ids", teacher.ids, (rows, width), logits)
    _check_floats("teacher log_probs", teacher.log_probs, (rows, width), logits)
    _check_floats("teacher log_tail", teacher.log_tail, (rows,), logits)


def _check_base(logits: Tensor, target: Target, smoothing: float, base: str) -> None:
    _check_logits("class_logits", logits)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), not {smoothing}")
    _check_option("base", base, BASES)
    _check_target(target, logits)


def _check_soft(logits: Tensor, teacher: Teacher, tau: float, reduction: str) -> None:
    _check_logits("distill_logits", logits)
    _check_option("reduction", reduction, REDUCTIONS)
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    if isinstance(teacher, TopK):
        _check_topk(teacher, logits)
    else:
        _check_floats("teacher", teacher, logits.shape, logits)


def _check_hard_teacher(teacher: Teacher, logits: Tensor) -> None:
    if isinstance(teacher, TopK):
        _check_topk(teacher, logits)
    elif isinstance(teacher, Tensor) and teacher.is_floating_point():
        _check_floats("teacher", teacher, logits.shape, logits)
    else:
        _check_labels("teacher", teacher, logits.shape[:1], logits)
