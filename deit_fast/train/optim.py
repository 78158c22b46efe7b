"""AdamW in timm's decay groups, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from deit_fast.config import OptimConfig


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; no decay on one-dimensional parameters nor on what ``model.no_weight_decay`` names.

    timm's list holds the position embedding and both tokens. (facebookresearch/deit decayed the
    distillation token by oversight.) Uses torch's fused step.
    """
    names: Any = getattr(model, "no_weight_decay", None)
    skip = names() if names is not None else ()
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=skip)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(
    step: int, *, config: OptimConfig, batch_size: int, steps_per_epoch: int, steps: int
) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then a cosine down to ``min_lr``.

    The peak is ``lr * batch_size / lr_batch`` (Goyal et al. 2017; DeiT, section 6). As in DeiT's
    recipe the cosine spans the whole run, warm-up included; unlike DeiT's code it moves every
    step, not one epoch late.
    """
    peak = config.lr * batch_size / config.lr_batch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup
    return config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2
