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

from typing import Any

from torch import Tensor

from .checks import can_check_values, check_option, check_tensor, check_values
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

__all__ = ["KINDS", "REDUCTIONS", "TopK", "distillation_loss"]


def distillation_loss(
    class_logits: Tensor | None,
    distill_logits: Tensor | None,
    target: Target | None,
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
    """(1 - alpha) * base loss + alpha * distillation; one of them alone without the other's logits.

    The base loss is a mean over rows ("ce") or over rows and classes ("bce"). The module's
    docstring has the formulas. Only the logits get a gradient.

    Args:
        class_logits: float [B, C], of the class head; None: no base loss.
        distill_logits: float [B, C], of the distillation head; unused for kind "none".
        target: int labels [B]; a soft target float [B, C]; or a mixed pair (y_a, y_b, lam) of int
            [B], int [B] and float [B], lam the weight of y_a. The pair's [B, C] is never built.
        teacher: logits, float [B, C], or a TopK taken at this tau; for "hard" also int labels [B].
            Of equal logits the first wins. Unused for "none".
        kind: "none", "soft" or "hard".
        alpha: weight of the distillation, in [0, 1].
        tau: temperature of the soft distillation, above 0.
        smoothing: eps of the base loss; the target t becomes t (1 - eps) + eps / C, as in DeiT's
            and timm's code.
        base: "ce", or "bce": every class with a target above 0 is a positive (DeiT-III). The
            threshold comes before the smoothing: pass dense targets unsmoothed, because a smoothed
            one is above 0 in every class.
        reduction: "numel" (tau^2 / (B C)) or "batchmean" (tau^2 / B), for "soft".
        return_parts: also return the base and the distillation loss, unweighted and detached,
            for the log.

    Returns:
        Scalar in float32, or float64 for float64 logits. 0 for B = 0. With ``return_parts`` three
        of them: total, base, distillation; a loss that is not computed is 0.

    Raises:
        ValueError: shapes, dtypes, devices, labels or options that do not fit, by name and value.
    """
    check_option("kind", kind, KINDS)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    if class_logits is None:
        if kind == "none":
            raise ValueError("class_logits must not be None for kind 'none'")
        target, base = None, ""
    else:
        _check_logits("class_logits", class_logits)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {smoothing}")
        check_option("base", base, BASES)
        _check_target(target, class_logits)
    if kind == "none":
        distill_logits = teacher = None
    else:
        if distill_logits is None or teacher is None:
            missing = "teacher" if teacher is None else "distill_logits"
            raise ValueError(f"{missing} must not be None for kind {kind!r}")
        if class_logits is None:
            _check_logits("distill_logits", distill_logits)
        else:
            shape = class_logits.shape
            check_tensor(
                "distill_logits", distill_logits, "floats", shape, class_logits, "class_logits"
            )
        if kind == "soft":
            check_option("reduction", reduction, REDUCTIONS)
            if not tau > 0:
                raise ValueError(f"tau must be positive, not {tau}")
        _check_teacher(teacher, distill_logits, kind)

    options = kind, base, reduction, float(alpha), float(tau), float(smoothing)
    heads = [head for head in (class_logits, distill_logits) if head is not None]
    topk: Any = teacher if isinstance(teacher, TopK) else (None, None, None, "drop")
    fits = not isinstance(teacher, TopK) or teacher.ids.shape[1] <= MAX_TOPK
    if not fits or not can_run(*heads):
        losses = reference(class_logits, distill_logits, target, teacher, *options)
    else:
        parts = target if isinstance(target, (tuple, list)) else (target, None, None)
        tensors = (*parts, None if topk is teacher else teacher, *topk[:3])
        tensors = tuple(x.detach() if x is not None and x.requires_grad else x for x in tensors)
        losses = loss_op(class_logits, distill_logits, *tensors, topk[3], *options)
    return losses if return_parts else losses[0]


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def _check_logits(name: str, logits: Any) -> None:
    check_tensor(name, logits, "floats", ("B", "C"))
    if logits.shape[1] == 0:
        raise ValueError(f"{name} must have shape [B, C] with C > 0, not {tuple(logits.shape)}")


def _check_values(name: str, values: Tensor, high: int) -> None:
    if can_check_values(values):
        check_values(name, values, 0, high)


def _check_labels(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    check_tensor(name, value, "integers", shape, logits, "logits")
    _check_values(name, value, logits.shape[1] - 1)


def _check_target(target: Any, logits: Tensor) -> None:
    rows = logits.shape[:1]
    if isinstance(target, Tensor):
        if target.is_floating_point():
            check_tensor("target", target, "floats", logits.shape, logits, "logits")
        else:
            _check_labels("target", target, rows, logits)
        return
    if not isinstance(target, (tuple, list)) or len(target) != 3:
        raise ValueError(
            "target must be labels [B], a float tensor [B, C] or (y_a, y_b, lam), "
            f"not {type(target).__name__}"
        )
    first, second, lam = target
    _check_labels("target y_a", first, rows, logits)
    _check_labels("target y_b", second, rows, logits)
    check_tensor("target lam", lam, "floats", rows, logits, "logits")
    _check_values("target lam", lam, 1)


def _check_teacher(teacher: Any, logits: Tensor, kind: str) -> None:
    rows, classes = logits.shape
    if not isinstance(teacher, TopK):
        if kind == "hard" and isinstance(teacher, Tensor) and not teacher.is_floating_point():
            _check_labels("teacher", teacher, (rows,), logits)
        else:
            check_tensor("teacher", teacher, "floats", logits.shape, logits, "logits")
        return
    check_option("teacher tail", teacher.tail, TAILS)
    width = teacher.ids.shape[-1] if isinstance(teacher.ids, Tensor) and teacher.ids.dim() else 0
    if not 1 <= width <= classes:
        raise ValueError(f"teacher ids must hold 1 to {classes} classes per row, not {width}")
    _check_labels("teacher ids", teacher.ids, (rows, width), logits)
    check_tensor("teacher log_probs", teacher.log_probs, "floats", (rows, width), logits, "logits")
    check_tensor("teacher log_tail", teacher.log_tail, "floats", (rows,), logits, "logits")
