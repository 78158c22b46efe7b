"""All that changes while a run goes on, its checkpoint, and the check before going on from one."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from deit_fast.config import RunConfig
from deit_fast.config_file import RETIRED, dotted_keys, to_dict
from deit_fast.errors import InputError
from deit_fast.models.student import build_model
from deit_fast.models.weights import load_weights, start_from
from deit_fast.train.checkpoint import list_checkpoints, load_newest
from deit_fast.train.optim import create_optimizer

log = logging.getLogger("deit_fast")

# What may differ between a checkpoint and the command that goes on from it: nothing that changes
# a pixel, a weight or a learning rate by more than rounding.
_FREE_TO_CHANGE = {
    "recipe", "output", "resume", "max_steps", "device", "compile", "cuda_graphs",
    "log_every", "eval_every", "save_every", "save_steps", "save_minutes", "on_nonfinite",
    "max_rollbacks", "accumulate", "teacher", "teacher_batch", "cache", "data.root", "data.workers",
    "track", "check_teacher_every", "profile_steps", "memory_snapshot",
}  # fmt: skip


@dataclass
class TrainState:
    """Model, moving average, optimiser, position in the order, and the counts so far."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    step: int = 0
    evaluated_step: int = 0
    skipped: list[int] = field(default_factory=list)  # steps left out, not finite
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # of steps not yet in a log row
    summed: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    train_seconds: float = 0.0
    substituted: set[str] = field(default_factory=set)

    def to_checkpoint(self, config: RunConfig) -> dict[str, Any]:
        """Tensors and plain values only, so that ``weights_only=True`` reads it back."""
        return {
            "format": 1,
            "config": json.dumps(to_dict(config)),
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "skipped": list(self.skipped),
            "sums": dict(self.sums),
            "summed": self.summed,
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "train_seconds": self.train_seconds,
            "substituted": sorted(self.substituted),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            # No generator's state: views, order and stochastic depth follow from seed and step.
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.evaluated_step = saved["step"], saved["evaluated_step"]
        self.skipped = list(saved["skipped"])
        device = next(self.model.parameters()).device
        self.sums = {name: value.to(device) for name, value in saved["sums"].items()}
        self.summed = saved["summed"]
        self.best_top1, self.best_epoch = saved["best_top1"], saved["best_epoch"]
        self.train_seconds = saved["train_seconds"]
        self.substituted = set(saved["substituted"])


def create_state(config: RunConfig, num_classes: int, device: torch.device) -> TrainState:
    """A run's state at step 0; initial weights depend on ``seed`` alone."""
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes)
    if config.model.weights is not None:
        start_from(model, load_weights(config.model.weights), config.model.weights)
    model.to(device).train()
    decay = config.optim.ema_decay
    ema = ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
    return TrainState(model, ema, create_optimizer(model, config.optim, config.compat))


def resume(config: RunConfig, state: TrainState) -> None:
    """Bring ``state`` to the newest checkpoint in the run's folder, if there is one.

    Raises:
        InputError: ``--no-resume`` and the folder has one, or it belongs to another
            configuration (names each differing key with both values).
    """
    folder = Path(config.output) / "checkpoints"
    if not config.resume:
        if list_checkpoints(folder):
            raise InputError(f"--no-resume, but {folder} has checkpoints: choose another --output")
        return
    found = load_newest(folder)
    if found is None:
        return
    path, saved = found
    differing = _differences(json.loads(saved["config"]), json.loads(json.dumps(to_dict(config))))
    if differing:
        raise InputError(
            f"{path} is of another configuration ({'; '.join(differing)}): choose another --output"
        )
    state.restore(saved)
    log.info("going on from %s, step %d", path, state.step)


def go_back(folder: Path, state: TrainState) -> bool:
    """Bring ``state`` back to the newest checkpoint of its own run; False where there is none."""
    found = load_newest(folder)
    if found is None:
        return False
    state.restore(found[1])
    return True


def _differences(saved: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    """Settings that differ; one that did not exist when the run began has its default there."""
    defaults, differing = json.loads(json.dumps(to_dict(RunConfig()))), []
    for key in [*dotted_keys(), *RETIRED]:
        if key in _FREE_TO_CHANGE:
            continue
        default = RETIRED.get(key, _look_up(defaults, key))
        old, new = (_look_up(values, key, default) for values in (saved, chosen))
        if old != new:
            differing.append(f"{key} {old!r} there, {new!r} here")
    return differing


def _look_up(values: Any, dotted: str, default: Any = None) -> Any:
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values
