"""Targets, top-k teachers and memory layouts for tests of the distillation loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import TopK, distillation_loss
from helpers import kernels

TEMPERATURES = (0.05, 0.5, 1.0, 4.0, 100.0)
TAILS = ("bucket", "uniform", "renorm", "drop")


def base_loss(logits: Tensor, target: Any, **options: Any) -> Tensor:
    return distillation_loss(
        logits, None, target, None, kind="none", alpha=0.0, tau=1.0, reduction="numel", **options
    )


def soft_distillation(logits: Tensor, teacher: Any, *, tau: float, reduction: str) -> Tensor:
    return distillation_loss(
        None, logits, None, teacher, kind="soft", alpha=1.0, tau=tau, reduction=reduction
    )


def hard_distillation(logits: Tensor, teacher: Any) -> Tensor:
    return distillation_loss(
        None, logits, None, teacher, kind="hard", alpha=1.0, tau=1.0, reduction="numel"
    )


def exact_top_k(logits: Tensor, k: int, tau: float, tail: str = "bucket") -> TopK:
    """The k most probable classes, in int64 and float64."""
    log_q = torch.log_softmax(logits.double() / tau, 1)
    values, ids = log_q.topk(k, 1)
    return TopK(ids, values, log_q.scatter(1, ids, -math.inf).logsumexp(1), tail)


def dense_pair(target: tuple[Tensor, Tensor, Tensor], classes: int) -> Tensor:
    """A mixed pair as float64 [B, C]."""
    first, second, lam = target
    lam = lam.double()[:, None]
    return F.one_hot(first, classes) * lam + F.one_hot(second, classes) * (1 - lam)


def laid_out(form: str, x: Tensor) -> Tensor:
    """The values of x [B, C] in another memory layout, among NaN."""
    classes = x.shape[1]
    if form == "padded rows":
        return F.pad(x, (0, 3), value=math.nan)[:, :classes]
    if form == "aligned rows":
        return F.pad(x, (0, -classes % 8), value=math.nan)[:, :classes]
    return kernels.laid_out(form, x)
