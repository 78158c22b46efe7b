"""The distillation loss in plain PyTorch: what the kernels are judged against, and the CPU's path.

Float32 inside, float64 for float64 logits. The formulas are in ``distillation_loss``; the checks
of the arguments in ``distillation_loss_checks``.
"""

from __future__ import annotations

import math
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
        if torch.compiler.is_compiling() or rows.is_cuda or rows.isnan().any():
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
# The three losses, of checked arguments
# ---------------------------------------------------------------------------------------------


def reference_base(logits: Tensor, target: Target, smoothing: float, base: str) -> Tensor:
    """Base loss of the class head, scalar."""
    rows, classes = logits.shape
    if base == "bce":
        return _binary_cross_entropy(logits, target, smoothing) / (max(rows, 1) * classes)
    return _cross_entropy(logits, target, smoothing) / max(rows, 1)


def reference_soft(logits: Tensor, teacher: Tensor | TopK, tau: float, reduction: str) -> Tensor:
    """Soft distillation, scalar."""
    if isinstance(teacher, TopK):
        row_losses = _topk_kl(logits, teacher, tau)
    else:
        row_losses = _DenseKL.apply(logits, teacher.detach(), tau)
    return row_losses.sum() * soft_factor(reduction, tau, *logits.shape)


def soft_factor(reduction: str, tau: float, rows: int, classes: int) -> float:
    """What the sum over rows of KL is multiplied by."""
    per_row = {"numel": 1 / classes, "batchmean": 1.0, "hinton": 2.0}[reduction]
    return per_row * tau**2 / max(rows, 1)


def reference_hard(logits: Tensor, teacher: Tensor | TopK) -> Tensor:
    """Hard distillation, scalar."""
    if isinstance(teacher, TopK):
        labels = teacher.ids.long().gather(1, teacher.log_probs.argmax(1, keepdim=True))[:, 0]
    elif teacher.is_floating_point():
        labels = teacher.argmax(1)
    else:
        labels = teacher.long()
    x = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(x, labels, reduction="sum") / max(len(labels), 1)
