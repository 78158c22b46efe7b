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
4 B C with top-k or hard labels. The reference below makes some ten passes more.

Numerics: float32 inside, float64 for float64 logits. A class with q = 0 contributes 0, also where
both sides are -inf. log s is a log-sum-exp over the classes outside S: 1 - sum over S of p loses
its digits where the student is sure. An empty batch costs 0 and has zero gradients.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("none", "soft", "hard")
REDUCTIONS = ("numel", "batchmean", "hinton")
TAILS = ("bucket", "uniform", "renorm", "drop")
BASES = ("ce", "bce")


class TopK(NamedTuple):
    """A teacher's k most probable classes at one temperature, and the mass of all others.

    ids: int32 or int64 [B, K], distinct within a row.
    log_probs: float [B, K], log-probabilities at the temperature of the loss.
    log_tail: float [B], log of the exact mass outside ids; -inf where K == C.
    tail: how the classes outside ids count: "bucket", "uniform", "renorm" or "drop".
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    tail: str = "bucket"


Target = Tensor | tuple[Tensor, Tensor, Tensor]
Teacher = Tensor | TopK | None


# ---------------------------------------------------------------------------------------------
# Reference in plain PyTorch
# ---------------------------------------------------------------------------------------------


def _log_softmax(logits: Tensor, tau: float = 1.0) -> Tensor:
    """log softmax(logits / tau) over classes, in float32 (float64 for float64 logits)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(x if tau == 1 else x / tau, dim=1)


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale in float32 and cast last: an unscaled gradient would underflow in half precision."""
    return (gradient * factor).to(dtype)


class _DenseKL(torch.autograd.Function):
    """Row sums of KL(softmax(teacher / tau) || softmax(logits / tau)); float [B].

    By hand rather than through autograd: the gradient (p - q) / tau is one subtraction while both
    are at hand. That saves passes over [B, C] and is exactly 0 at p = q.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, tau: float) -> Tensor:
        log_p = _log_softmax(logits, tau)
        log_q = _log_softmax(teacher.to(log_p.dtype), tau)
        q = log_q.exp()
        gap = log_q.sub_(log_p)
        rows = torch.linalg.vecdot(q, gap)
        # inf - inf and 0 * inf are NaN. The mask costs a fifth of the loss on a CPU, where looking
        # for the need of it is free; on a GPU looking would wait for the device.
        if rows.is_cuda or rows.isnan().any():
            rows = torch.linalg.vecdot(q, gap.masked_fill_(q == 0, 0))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_p.exp_().sub_(q))
            ctx.tau, ctx.dtype = tau, logits.dtype
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return _scale(gradient, (grad_rows / ctx.tau)[:, None], ctx.dtype), None, None


def _weighted_gap(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """q * (log q - log p), 0 where q is 0."""
    return q * torch.where(q > 0, log_q - log_p, 0)


def _topk_kl(logits: Tensor, teacher: TopK, tau: float) -> Tensor:
    """Row sums of KL with a top-k teacher in the tail mode it names; float [B]."""
    log_p = _log_softmax(logits, tau)
    ids = teacher.ids.long()
    log_q = teacher.log_probs.detach().to(log_p.dtype)
    if teacher.tail == "renorm":
        log_q = F.log_softmax(log_q, dim=1)
    head = _weighted_gap(log_q.exp(), log_q, log_p.gather(1, ids)).sum(1)
    outside = logits.shape[1] - ids.shape[1]
    if outside == 0 or teacher.tail in ("renorm", "drop"):
        return head
    log_r = teacher.log_tail.detach().to(log_p.dtype)
    r = log_r.exp()
    if teacher.tail == "uniform":
        mean_log_p = log_p.scatter(1, ids, 0.0).sum(1) / outside
        return head + _weighted_gap(r, log_r - math.log(outside), mean_log_p)
    # Not -inf: the gradient of a log-sum-exp over nothing but -inf is NaN.
    log_s = log_p.scatter(1, ids, torch.finfo(log_p.dtype).min).logsumexp(1)
    return head + _weighted_gap(r, log_r, log_s)


class _LabelCrossEntropy(torch.autograd.Function):
    """Sum over rows of -sum_k weights_k log p[ids_k], smoothed; the gradient is p - t."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, weights: Tensor, smoothing: float) -> Tensor:
        log_p = _log_softmax(logits)
        weights = weights.to(log_p.dtype) * (1 - smoothing)
        loss = -(weights * log_p.gather(1, ids).masked_fill_(weights == 0, 0)).sum()
        spread = smoothing / logits.shape[1]
        if smoothing > 0:
            loss -= spread * log_p.sum()
        if ctx.needs_input_grad[0]:
            gradient = log_p.exp_()
            if smoothing > 0:
                gradient.sub_(spread)
            ctx.save_for_backward(gradient.scatter_add_(1, ids, -weights))
            ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return _scale(gradient, grad_loss, ctx.dtype), None, None, None


def _ids_and_weights(target: Target) -> tuple[Tensor, Tensor]:
    """Labels [B] or a mixed pair as ids int64 [B, k] and weights float [B, k]."""
    if isinstance(target, Tensor):
        return target.long()[:, None], torch.ones_like(target, dtype=torch.float32)[:, None]
    first, second, lam = target
    return torch.stack((first, second), 1).long(), torch.stack((lam, 1 - lam), 1)


def _cross_entropy(logits: Tensor, target: Target, smoothing: float) -> Tensor:
    """Sum over rows of -sum of t log p, t the target smoothed to t (1 - eps) + eps / C."""
    if not (isinstance(target, Tensor) and target.dim() == 2):
        return _LabelCrossEntropy.apply(logits, *_ids_and_weights(target), smoothing)
    log_p = _log_softmax(logits)
    t = target.to(log_p.dtype)
    if smoothing > 0:
        t = t * (1 - smoothing) + smoothing / logits.shape[1]
    return -(t * log_p.masked_fill(t == 0, 0)).sum()


def _binary_cross_entropy(logits: Tensor, target: Target, smoothing: float) -> Tensor:
    """Sum over rows and classes of the BCE with t = [target > 0], smoothed as above."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    classes = z.shape[1]
    if isinstance(target, Tensor) and target.dim() == 2:
        t = (target > 0).to(z.dtype).mul_(1 - smoothing).add_(smoothing / classes)
        return F.binary_cross_entropy_with_logits(z, t, reduction="sum")
    ids, weights = _ids_and_weights(target)
    again = ids == ids[:, :1]  # the pair names one class twice: a positive, and counted once
    again[:, 0] = False
    positive = (weights > 0) | again.any(1, keepdim=True)
    chosen = z.gather(1, ids)
    chosen = torch.where(again, chosen.detach(), chosen)
    # -log sigmoid(z) = softplus(-z) for the positives; softplus(z) - z would cancel instead.
    loss = F.softplus(z.scatter(1, ids, torch.where(positive, -chosen, chosen))).sum()
    if smoothing == 0:
        return loss
    once = positive & ~again
    return loss + smoothing * (once * chosen).sum() - smoothing / classes * z.sum()


# ---------------------------------------------------------------------------------------------
# Checks: messages are built only when they are raised, formatting costs more than the test
# ---------------------------------------------------------------------------------------------

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, not {value!r}")


def _check_range(name: str, values: Tensor, low: float, high: float) -> None:
    """low <= values <= high. On a GPU, where looking waits, only with DEIT_FAST_DEBUG=1."""
    if values.numel() == 0 or (values.is_cuda and os.environ.get("DEIT_FAST_DEBUG") != "1"):
        return
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


# ---------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------


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
    _check_logits("class_logits", class_logits)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), not {smoothing}")
    _check_option("base", base, BASES)
    _check_target(target, class_logits)
    rows, classes = class_logits.shape
    if base == "bce":
        return _binary_cross_entropy(class_logits, target, smoothing) / (max(rows, 1) * classes)
    return _cross_entropy(class_logits, target, smoothing) / max(rows, 1)


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
    _check_logits("distill_logits", distill_logits)
    _check_option("reduction", reduction, REDUCTIONS)
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    rows, classes = distill_logits.shape
    if isinstance(teacher, TopK):
        _check_topk(teacher, distill_logits)
        row_losses = _topk_kl(distill_logits, teacher, tau)
    else:
        _check_floats("teacher", teacher, distill_logits.shape, distill_logits)
        row_losses = _DenseKL.apply(distill_logits, teacher.detach(), tau)
    per_row = {"numel": 1 / classes, "batchmean": 1.0, "hinton": 2.0}[reduction]
    return row_losses.sum() * (per_row * tau**2 / max(rows, 1))


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
    _check_logits("distill_logits", distill_logits)
    if isinstance(teacher, TopK):
        _check_topk(teacher, distill_logits)
        labels = teacher.ids.long().gather(1, teacher.log_probs.argmax(1, keepdim=True))[:, 0]
    elif isinstance(teacher, Tensor) and teacher.is_floating_point():
        _check_floats("teacher", teacher, distill_logits.shape, distill_logits)
        labels = teacher.argmax(1)
    else:
        _check_labels("teacher", teacher, distill_logits.shape[:1], distill_logits)
        labels = teacher.long()
    logits = distill_logits if distill_logits.dtype == torch.float64 else distill_logits.float()
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


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
    _check_option("kind", kind, KINDS)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
    base_term = base_loss(class_logits, target, smoothing=smoothing, base=base)
    if kind == "none":
        total, distill_term = base_term, torch.zeros_like(base_term)
    else:
        if distill_logits is None or teacher is None:
            missing = "teacher" if teacher is None else "distill_logits"
            raise ValueError(f"{missing} must not be None for kind {kind!r}")
        _check_floats("distill_logits", distill_logits, class_logits.shape, class_logits)
        if kind == "hard":
            distill_term = hard_distillation(distill_logits, teacher)
        else:
            distill_term = soft_distillation(distill_logits, teacher, tau=tau, reduction=reduction)
        total = (1 - alpha) * base_term + alpha * distill_term
    return (total, base_term.detach(), distill_term.detach()) if return_parts else total
