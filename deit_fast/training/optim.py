"""Optimiser, gradient clipping, moving average, and the learning rate as a function of the step.

Bytes that an update moves for each float32 parameter:

    norm of the gradients      reads the gradient                                          4
    clip, in the AdamW kernel  the kernel writes the clipped gradient back                 4
    AdamW                      reads weight, gradient, both moments; writes all but one   28
    moving average             reads average and weight, writes the average               12

In all 44, and 48 with clipping. A separate clip would read and write the gradient: 52.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from typing import Any

import timm
import torch
from timm.optim import Lamb, Muon, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_fast.config import OptimConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.runtime.environment import find_apex
from deit_fast.views.steps import RunSteps

log = logging.getLogger("deit_fast")

_MUON: dict[str, dict[str, Any]] = {  # as timm's factory of optimisers
    "muon": {},
    "nmuon": {"nesterov": True},
    "adamuon": {"algo": "adamuon"},
    "nadamuon": {"algo": "adamuon", "nesterov": True},
}


def create_optimizer(
    model: nn.Module, config: OptimConfig, compat: str = "none"
) -> torch.optim.Optimizer:
    """The optimiser over parameter groups; some hold an ``lr_scale`` for ``set_learning_rate``.

    One-dimensional parameters do not decay, nor those that ``model.no_weight_decay`` names: for
    timm's models the position embedding and both tokens. facebookresearch/deit's list lacks the
    distillation token, so with ``compat="deit"`` it decays.

    Muon (timm's, with its defaults) takes the weight matrices within the blocks. Patch embedding,
    heads, tokens, position embedding, biases and norms are left to its AdamW. An update of a matrix
    is 0.2 sqrt(max(rows, columns)) times an orthogonal one, about as long as AdamW's, so learning
    rates and weight decay of AdamW hold (Liu et al. 2025, arXiv 2502.16982, section 2.2).

    Raises:
        InputError: timm's Muon is one whose AdamW does not follow the learning rate.
    """
    names: Any = getattr(model, "no_weight_decay", None)
    skip = set(names() if names is not None else ())
    if compat == "deit":
        skip -= {"dist_token"}
    grouping: dict[str, Any] = {"no_weight_decay_list": skip}
    if config.name in _MUON:
        grouping["fallback_list"] = _ends_of(model)
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, **grouping)
    else:
        grouping["layer_decay"] = config.layer_decay
        groups = param_groups_layer_decay(model, config.weight_decay, **grouping)
    if config.name in _MUON:
        if "fallback_lr_scale" not in inspect.signature(Muon).parameters:
            raise InputError(
                f"optim.name={config.name} needs timm 1.0.27 or newer, not {timm.__version__}: "
                f"biases and norms of earlier ones do not follow the learning rate"
            )
        return Muon(groups, lr=config.lr, **_MUON[config.name])
    shared: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if (apex := _apex_optimizers(config, next(model.parameters()).device)) is not None:
        if config.name == "lamb":  # its own clipping would be added to that of optim.clip_grad
            return apex.FusedLAMB(groups, **shared, max_grad_norm=math.inf)  # type: ignore[no-any-return]
        return apex.FusedAdam(groups, **shared, adam_w_mode=True)  # type: ignore[no-any-return]
    if config.name == "lamb":
        return Lamb(groups, **shared, max_grad_norm=None)
    return torch.optim.AdamW(groups, **shared, fused=True)


def add_parameters(
    optimizer: torch.optim.Optimizer, module: nn.Module, weight_decay: float
) -> None:
    """Let the optimiser train a module beside the model: matrices decay, vectors do not. Muon
    leaves them to its AdamW."""
    for group in param_groups_weight_decay(module, weight_decay):
        fallback = {"use_fallback": True} if isinstance(optimizer, Muon) else {}
        optimizer.add_param_group({**group, **fallback})


def _ends_of(model: nn.Module) -> list[str]:
    """Patterns of a timm model's first layer and its heads, whose shapes do not tell them apart."""
    entry: Any = getattr(model, "pretrained_cfg", None) or {}
    names = [entry.get("first_conv"), entry.get("classifier")]
    flat = [part for name in names if name for part in ([name] if isinstance(name, str) else name)]
    return [f"{name}.*" for name in flat]


def _apex_optimizers(config: OptimConfig, device: torch.device) -> Any:
    """apex.optimizers if the settings select apex and it can run, else None."""
    if config.impl == "torch" or (config.impl == "auto" and config.name != "lamb"):
        return None
    apex = find_apex()
    if device.type == "cuda" and apex.state == "real":
        log.info("optimiser: NVIDIA apex")
        return apex.optimizers
    if config.impl == "apex":
        reason = {
            "absent": "it is not installed",
            "broken": f"it is broken ({apex.why})",
            "namesake": "the installed apex is PyPI's namesake, not NVIDIA's",
            "no CUDA code": f"it was built without its CUDA code ({apex.why})",
            "real": f"it needs a GPU and the model is on {device.type}",
        }[apex.state]
        log.warning("optim.impl=apex, but %s: torch's optimiser is used", reason)
    return None


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser itself reads ``found_inf`` on the device and then changes nothing."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def clip_gradients(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], total_norm: Tensor,
    max_norm: float,
) -> None:  # fmt: skip
    """Scale gradients by min(1, max_norm / (total_norm + 1e-6)), as torch's clip_grad_norm_ does.

    On a GPU torch's fused AdamW divides them by ``grad_scale`` as it reads them, which saves a
    pass. On a CPU they are scaled here, by torch's own function and bit for bit as it does.
    """
    if skips_on_device(optimizer) and total_norm.is_cuda:
        scale_in_update(optimizer, total_norm, max_norm)
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)


def scale_in_update(optimizer: torch.optim.Optimizer, total_norm: Tensor, max_norm: float) -> None:
    """Make the next step of a fused AdamW divide the gradients by the clipping factor."""
    fused: Any = optimizer
    fused.grad_scale = ((total_norm + 1e-6) / max_norm).clamp(min=1.0)


def create_average(model: nn.Module, config: OptimConfig) -> ModelEmaV3 | None:
    """The moving average of the weights; None where ``ema_decay`` is 0.

    As in timm's trainer, it is a copy of the weights after the first step. Weights and buffers in
    bfloat16 or float16 are averaged and saved in float32: a share of 4e-5 is lost in their
    rounding. They are evaluated in the model's dtype, see ``evaluated_average``.
    """
    if not config.ema_decay:
        return None
    # timm's trainer counts steps from 1. Runs of earlier versions, all with warm-up, count from 0.
    first = 0 if config.ema_warmup else -1
    ema = ModelEmaV3(
        model, decay=config.ema_decay, use_warmup=config.ema_warmup, update_after_step=first
    )
    for tensor in (*ema.module.parameters(), *ema.module.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    return ema


def evaluated_average(average: nn.Module, model: nn.Module) -> nn.Module:
    """The average in the dtypes of ``model``, as `evaluate` loads it; itself if it has these.

    A model in half precision may cast its input to that dtype, which float32 weights do not take.
    """
    pairs = [
        *zip(average.parameters(), model.parameters(), strict=True),
        *zip(average.buffers(), model.buffers(), strict=True),
    ]
    if all(mine.dtype == its.dtype for mine, its in pairs):
        return average
    rounded = copy.deepcopy(average)
    own = (*rounded.parameters(), *rounded.buffers())
    for tensor, (_, its) in zip(own, pairs, strict=True):
        tensor.data = tensor.data.to(its.dtype)
    return rounded


class Average:
    """Updates a ModelEmaV3 in one launch for many tensors.

    The tensors are listed once. ModelEmaV3.update builds both state dicts at every step, which is
    a large part of its time for a small model.
    """

    def __init__(self, ema: ModelEmaV3, model: nn.Module) -> None:
        self.ema = ema
        pairs = [*zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True)]
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._values = [value for average, value in pairs if average.is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._casts = any(average.dtype != value.dtype for average, value in pairs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights by timm's factor for this step."""
        weight = 1.0 - self.ema.get_decay(step)
        values = self._values
        if self._casts:
            pairs = zip(self._averages, values, strict=True)
            values = [value.to(average.dtype) for average, value in pairs]
        if self._averages:
            torch._foreach_lerp_(self._averages, values, weight=weight)
        for average, value in self._others:
            average.copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate: ``lr`` times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def require_schedule(config: RunConfig) -> None:
    """Raise InputError where the settings of the schedule exclude each other."""
    optim = config.optim
    if optim.schedule == "cosine":
        for name, value in {"optim.decay_epochs": optim.decay_epochs,
                            "resume_from": config.resume_from}.items():  # fmt: skip
            if value is not None:
                raise InputError(f"{name}={value} needs optim.schedule=wsd, not cosine")
    elif optim.decay_epochs is None:
        raise InputError("optim.schedule=wsd needs optim.decay_epochs, the length of its decay")
    elif config.compat == "deit":
        raise InputError("compat=deit has DeiT's cosine alone, not optim.schedule=wsd")
    elif optim.warmup_epochs + optim.decay_epochs > config.epochs:
        raise InputError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} and "
            f"optim.decay_epochs={optim.decay_epochs:g} are more than epochs={config.epochs}"
        )


def _decay_steps(optim: OptimConfig, per_epoch: int) -> int:
    """Steps of the decay of `wsd`, at least one."""
    return max(1, round((optim.decay_epochs or 0) * per_epoch))


def decay_start(optim: OptimConfig, steps: RunSteps) -> int:
    """The last step that `wsd` trains at the peak, after which the rate falls."""
    start = 0
    for phase, end in reversed(steps.reached()):
        left = (steps.epochs - phase.epoch) * phase.per_epoch
        start = min(phase.step + left - _decay_steps(optim, phase.per_epoch), end)
        if start >= phase.step:
            break
    return start


def learning_rate(step: int, config: RunConfig, steps: RunSteps) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then a decay down to ``min_lr``.

    Where the batch size changes between epochs, it is the rate of a run with the step's batch size
    alone, at the same epoch and position. So the schedule is one over epochs, and the rate jumps
    with the batch.

    The peak is ``lr * batch_size / lr_batch`` (Goyal et al. 2017; DeiT, section 6). As in DeiT's
    recipe the cosine spans the whole run, warm-up included. With ``compat="deit"`` it changes as in
    DeiT's code: once an epoch and one epoch late, so the first two epochs run at ``warmup_lr``.
    `wsd` falls with 1 - sqrt(share of the decay) (Haegele et al. 2024, arXiv 2405.18392).
    """
    optim = config.optim
    first_epoch, first_step, batch_size, per_epoch = steps.phase_of(step)
    step += first_epoch * per_epoch - first_step
    total = steps.epochs * per_epoch
    peak = optim.lr * batch_size / optim.lr_batch
    warmup = round(optim.warmup_epochs * per_epoch)
    if config.compat == "deit":
        step = max(step // per_epoch - 1, 0) * per_epoch
    if step < warmup:
        return optim.warmup_lr + (peak - optim.warmup_lr) * step / warmup
    share = (1 + math.cos(math.pi * step / total)) / 2
    if optim.schedule == "wsd":
        length = _decay_steps(optim, per_epoch)
        share = 1 - math.sqrt(max(0, step - (total - length)) / length)
    return optim.min_lr + (peak - optim.min_lr) * share
