"""The optimiser in timm's decay groups, and the learning rate as a function of the step alone."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from deit_fast.config import OptimConfig
from deit_fast.packages import find_apex

log = logging.getLogger("deit_fast")


def create_optimizer(
    model: nn.Module, config: OptimConfig, compat: str = "none"
) -> torch.optim.Optimizer:
    """AdamW or LAMB over parameter groups; each holds an ``lr_scale`` for ``set_learning_rate``.

    One-dimensional parameters do not decay, nor what ``model.no_weight_decay`` names: timm's list
    holds the position embedding and both tokens. facebookresearch/deit's lacks the distillation
    token, so ``compat="deit"`` decays it.
    """
    names: Any = getattr(model, "no_weight_decay", None)
    skip = set(names() if names is not None else ())
    if compat == "deit":
        skip -= {"dist_token"}
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=skip)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=skip, layer_decay=config.layer_decay
        )
    shared: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if (apex := _apex_optimizers(config, next(model.parameters()).device)) is not None:
        if config.name == "lamb":  # its own clipping would come on top of optim.clip_grad
            return apex.FusedLAMB(groups, **shared, max_grad_norm=math.inf)  # type: ignore[no-any-return]
        return apex.FusedAdam(groups, **shared, adam_w_mode=True)  # type: ignore[no-any-return]
    if config.name == "lamb":
        return Lamb(groups, **shared, max_grad_norm=None)
    return torch.optim.AdamW(groups, **shared, fused=True)


def _apex_optimizers(config: OptimConfig, device: torch.device) -> Any:
    """apex.optimizers where it is to be used, else None; a wish that cannot be met is said."""
    wanted = config.impl == "apex" or (config.impl == "auto" and config.name == "lamb")
    if not wanted:
        return None
    apex = find_apex()
    if device.type == "cuda" and apex.state == "real":
        log.info("optimiser: NVIDIA apex")
        return apex.optimizers
    if config.impl == "apex":
        why = {
            "absent": "it is not installed",
            "broken": f"it is broken ({apex.why})",
            "namesake": "the installed apex is PyPI's namesake, not NVIDIA's",
            "no CUDA code": f"it was built without its CUDA code ({apex.why})",
            "real": f"it needs a GPU and the model is on {device.type}",
        }[apex.state]
        log.warning("optim.impl=apex, but %s: torch's optimiser is used", why)
    return None


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser changes nothing where its ``found_inf`` is 1, without the host."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of ``lr``: 1, or its layer's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(
    step: int, *, config: OptimConfig, batch_size: int, steps_per_epoch: int, steps: int,
    compat: str = "none",
) -> float:  # fmt: skip
    """Learning rate of ``step`` (0-based): linear warm-up, then a cosine down to ``min_lr``.

    The peak is ``lr * batch_size / lr_batch`` (Goyal et al. 2017; DeiT, section 6). As in DeiT's
    recipe the cosine spans the whole run, warm-up included. ``compat="deit"`` moves as DeiT's code
    does: once an epoch and one epoch late, so that the first two epochs run at ``warmup_lr``.
    """
    peak = config.lr * batch_size / config.lr_batch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if compat == "deit":
        step = max(step // steps_per_epoch - 1, 0) * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup
    return config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2
