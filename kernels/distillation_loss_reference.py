"""The distillation loss in plain PyTorch: the CPU's path, and what the kernels are compared with.

Float32 inside, float64 for float64 logits. The formulas are in ``distillation_loss``.

Gradients are computed by hand in the forward, with every factor but the incoming one, as the
kernels do: p - q is one subtraction where both are at hand. That saves passes over [B, C] and is
exactly 0 at p = q.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launching import first_derivative_only

KINDS = ("none", "soft", "hard")
REDUCTIONS = ("numel", "batchmean")
TAILS = ("bucket", "uniform", "renorm", "drop")
BASES = ("ce", "bce")


class TopK(NamedTuple):
    """A teacher's k most probable classes at one temperature, and the mass of all others.

    ids: int [B, K], int32, int64 or uint16, distinct within a row.
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
Part = tuple[Tensor, Tensor | None]
"""A sum over rows of losses, and factor times its gradient: float [B, C], None if not requested."""


def soft_factor(reduction: str, tau: float, rows: int, classes: int) -> float:
    """What the sum over rows of KL is multiplied by."""
    per_row = {"numel": 1 / classes, "batchmean": 1.0}[reduction]
    return per_row * tau**2 / max(rows, 1)


def factors(
    rows: int, classes: int, kind: str, base: str, reduction: str, alpha: float, tau: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of the base and the distillation loss: what their sums are multiplied by, their weights."""
    rows = max(rows, 1)
    base_mean = 1 / (rows * classes) if base == "bce" else 1 / rows
    distill_mean = soft_factor(reduction, tau, rows, classes) if kind == "soft" else 1 / rows
    weights = (1 - alpha, alpha) if base and kind != "none" else (1.0, 1.0)
    return (base_mean, distill_mean), weights


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_softmax(logits: Tensor, tau: float = 1.0) -> Tensor:
    """log softmax(logits / tau) over classes, in float32 (float64 for float64 logits)."""
    x = _wide(logits)
    return F.log_softmax(x if tau == 1 else x / tau, dim=1)


def _can_read(x: Tensor) -> bool:
    """Reading a value is free on a CPU; on a GPU it would wait for the device."""
    return not (x.is_cuda or torch.compiler.is_compiling())


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of weights * values, where a weight of 0 hides even an infinite value."""
    total = torch.linalg.vecdot(weights, values).sum()
    # The mask costs a fifth of the loss on a CPU, where checking whether it is needed is free.
    if _can_read(total) and math.isfinite(total.item()):
        return total
    return (weights * values.masked_fill(weights == 0, 0)).sum()


# ---------------------------------------------------------------------------------------------
# Base loss
# ---------------------------------------------------------------------------------------------


def _ids_and_weights(target: Target) -> tuple[Tensor, Tensor | None]:
    """Labels [B] or a mixed pair as ids int64 [B, k] and weights float [B, k]; None: all 1."""
    if isinstance(target, Tensor):
        return target.long()[:, None], None
    first, second, lam = target
    return torch.stack((first, second), 1).long(), torch.stack((lam, 1 - lam), 1)


def _through_log_softmax(pull: Tensor, log_p: Tensor) -> Tensor:
    """Gradient of the logits from that of log_p: pull - p * sum of pull, in one pass."""
    return torch.ops.aten._log_softmax_backward_data(pull, log_p, 1, log_p.dtype)


def _sparse_cross_entropy(
    logits: Tensor, ids: Tensor, weights: Tensor | None, smoothing: float, factor: float,
    requested: bool,
) -> Part:  # fmt: skip
    """-sum of t log p, t the weights of ids smoothed to t (1 - eps) + eps / C; gradient p - t."""
    log_p = _log_softmax(logits)
    keep, spread = 1 - smoothing, smoothing / logits.shape[1]
    picked = log_p.gather(1, ids)
    t = None if weights is None else weights.to(log_p.dtype) * keep
    loss = picked.sum() * -keep if t is None else -_dot(t, picked)
    if smoothing > 0:
        loss -= spread * log_p.sum()
    if not requested:
        return loss, None
    pull = torch.full_like(log_p, -spread * factor)
    if t is None:
        pull.scatter_(1, ids, -(keep + spread) * factor)
    else:
        pull.scatter_add_(1, ids, t * -factor)
    return loss, _through_log_softmax(pull, log_p)


def _dense_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, factor: float, requested: bool
) -> Part:
    log_p = _log_softmax(logits)
    t = target.detach().to(log_p.dtype)
    if smoothing > 0:
        t = t * (1 - smoothing) + smoothing / logits.shape[1]
    loss = -_dot(t, log_p)
    return loss, (_through_log_softmax(t * -factor, log_p) if requested else None)


def _sparse_binary_cross_entropy(
    logits: Tensor, ids: Tensor, weights: Tensor | None, smoothing: float, factor: float,
    requested: bool,
) -> Part:  # fmt: skip
    """Sum over rows and classes of the BCE with t = [weight > 0], smoothed as above."""
    z = _wide(logits)
    spread = smoothing / z.shape[1]
    again = ids == ids[:, :1]  # the pair names one class twice: a positive, and counted once
    again[:, 0] = False
    positive = torch.ones_like(again) if weights is None else weights > 0
    positive |= again.any(1, keepdim=True)
    chosen = z.gather(1, ids)
    # -log sigmoid(z) = softplus(-z) for the positives; softplus(z) - z would cancel instead.
    loss = F.softplus(z.scatter(1, ids, torch.where(positive, -chosen, chosen))).sum()
    once = (positive & ~again).to(z.dtype)
    if smoothing > 0:
        loss += smoothing * (once * chosen).sum() - spread * z.sum()
    if not requested:
        return loss, None
    gradient = z.sigmoid().sub_(spread).mul_(factor)
    return loss, gradient.scatter_add_(1, ids, once * (smoothing - 1) * factor)


def _dense_binary_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, factor: float, requested: bool
) -> Part:
    z = _wide(logits)
    t = (target > 0).to(z.dtype).mul_(1 - smoothing).add_(smoothing / z.shape[1])
    loss = F.binary_cross_entropy_with_logits(z, t, reduction="sum")
    return loss, (z.sigmoid().sub_(t).mul_(factor) if requested else None)


def _base(
    logits: Tensor, target: Target, base: str, smoothing: float, factor: float, requested: bool
) -> Part:
    if isinstance(target, Tensor) and target.dim() == 2:
        dense = _dense_cross_entropy if base == "ce" else _dense_binary_cross_entropy
        return dense(logits, target, smoothing, factor, requested)
    sparse = _sparse_cross_entropy if base == "ce" else _sparse_binary_cross_entropy
    return sparse(logits, *_ids_and_weights(target), smoothing, factor, requested)


# ---------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------


def _dense_divergence(
    logits: Tensor, teacher: Tensor, tau: float, factor: float, requested: bool
) -> Part:
    """KL(softmax(teacher / tau) || softmax(logits / tau)); gradient (p - q) / tau."""
    log_p = _log_softmax(logits, tau)
    log_q = _log_softmax(teacher.detach().to(log_p.dtype), tau)
    q = log_q.exp()
    loss = _dot(q, log_q.sub_(log_p))
    return loss, (log_p.exp_().sub_(q).mul_(factor / tau) if requested else None)


def _topk_divergence(
    logits: Tensor, teacher: TopK, tau: float, factor: float, requested: bool
) -> Part:
    """KL with a top-k teacher in the tail mode it names.

    The gradient is made as if no class were among the ids; theirs is put in afterwards.
    """
    log_p = _log_softmax(logits, tau)
    ids, outside = teacher.ids.long(), logits.shape[1] - teacher.ids.shape[1]
    tail = teacher.tail if outside > 0 or teacher.tail == "renorm" else "drop"
    log_q = teacher.log_probs.detach().to(log_p.dtype)
    if tail == "renorm":
        log_q = F.log_softmax(log_q, dim=1)
    q, picked = log_q.exp(), log_p.gather(1, ids)
    loss = _dot(q, log_q - picked)
    mass = q.sum(1, keepdim=True)
    if tail in ("bucket", "uniform"):
        log_r = teacher.log_tail.detach().to(log_p.dtype)[:, None]
        r = log_r.exp()
        mass = mass + r
    scale = factor / tau
    if tail == "bucket":
        # s from the classes outside only: 1 - sum over S of p loses its digits.
        log_p.scatter_(1, ids, -math.inf)
        highest = log_p.amax(1, keepdim=True).clamp_(min=torch.finfo(log_p.dtype).min)
        gradient = log_p.sub_(highest).exp_()
        total = gradient.sum(1, keepdim=True)
        loss += _dot(r, log_r - highest - total.log())
        share = torch.where(total > 0, r / total, 0)
        gradient.mul_((mass * highest.exp() - share) * scale)
    elif tail == "uniform":
        mean_log_p = log_p.scatter_(1, ids, 0.0).sum(1, keepdim=True) / outside
        loss += _dot(r, log_r - math.log(outside) - mean_log_p)
        gradient = log_p.exp_().mul_(mass).sub_(r / outside).mul_(scale)
    else:
        gradient = log_p.exp_().mul_(mass * scale)
    if not requested:
        return loss, None
    return loss, gradient.scatter_(1, ids, (mass * picked.exp() - q) * scale)


def _hard_labels(teacher: Tensor | TopK) -> Tensor:
    """The teacher's decision, int64 [B]; of equal maxima the first."""
    if isinstance(teacher, TopK):
        return teacher.ids.long().gather(1, teacher.log_probs.argmax(1, keepdim=True))[:, 0]
    if not teacher.is_floating_point():
        return teacher.long()
    if teacher.dtype == torch.float32 and teacher.device.type == "cpu" and _can_read(teacher):
        return torch.from_numpy(teacher.detach().numpy().argmax(1))  # vectorised; PyTorch's is not
    return teacher.argmax(1)


def _distillation(
    logits: Tensor, teacher: Tensor | TopK, kind: str, tau: float, factor: float, requested: bool
) -> Part:
    if kind == "hard":
        ids = _hard_labels(teacher)[:, None]
        return _sparse_cross_entropy(logits, ids, None, 0.0, factor, requested)
    if isinstance(teacher, TopK):
        return _topk_divergence(logits, teacher, tau, factor, requested)
    return _dense_divergence(logits, teacher, tau, factor, requested)


# ---------------------------------------------------------------------------------------------
# Both heads
# ---------------------------------------------------------------------------------------------


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, class_logits: Tensor | None, distill_logits: Tensor | None, target: Any,
        teacher: Any, kind: str, base: str, reduction: str, alpha: float, tau: float,
        smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        head = class_logits if class_logits is not None else distill_logits
        assert head is not None
        (base_mean, distill_mean), (base_weight, distill_weight) = factors(
            len(head), head.shape[1], kind, base, reduction, alpha, tau
        )
        total, base_loss, distill_loss = torch.zeros(
            3, dtype=_wide(head).dtype, device=head.device
        ).unbind()
        gradients: list[Tensor | None] = [None, None]
        if class_logits is not None and base:
            loss, gradients[0] = _base(
                class_logits, target, base, smoothing, base_mean * base_weight,
                ctx.needs_input_grad[0],
            )  # fmt: skip
            base_loss = loss * base_mean
            total = total.add(base_loss, alpha=base_weight)
        if distill_logits is not None and kind != "none":
            loss, gradients[1] = _distillation(
                distill_logits, teacher, kind, tau, distill_mean * distill_weight,
                ctx.needs_input_grad[1],
            )  # fmt: skip
            distill_loss = loss * distill_mean
            total = total.add(distill_loss, alpha=distill_weight)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (class_logits, distill_logits)]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(base_loss, distill_loss)
        return total, base_loss, distill_loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 10
        unscaled = _can_read(grad_total) and grad_total.item() == 1
        scaled = (
            None if g is None else (g if unscaled else g * grad_total).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, *(None,) * 8)


def reference(
    class_logits: Tensor | None, distill_logits: Tensor | None, target: Any, teacher: Any,
    kind: str, base: str, reduction: str = "numel", alpha: float = 1.0, tau: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, base and distillation loss of checked arguments; base "" or kind "none" is left out.

    Only the total has a gradient, and only for the logits.
    """
    head = class_logits if class_logits is not None else distill_logits
    assert head is not None
    with torch.autocast(head.device.type, enabled=False):  # it would make dot products bfloat16
        return _Losses.apply(
            class_logits, distill_logits, target, teacher, kind, base, reduction, alpha, tau,
            smoothing,
        )  # fmt: skip
