"""Checks of the distillation loss's arguments: each names the argument and both values.

Messages are built only when they are raised: formatting costs more than the test.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .distillation_loss_reference import TAILS, TopK

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16)


def check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, not {value!r}")


def check_range(name: str, values: Tensor, low: float, high: float) -> None:
    """low <= values <= high. On a GPU, where looking waits, only with DEIT_FAST_DEBUG=1."""
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


def check_tensor(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but the logits {tuple(logits.shape)} "
            f"need {shape}"
        )
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device} but the logits are on {logits.device}")


def check_floats(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    check_tensor(name, value, shape, logits)
    if not value.is_floating_point():
        raise ValueError(f"{name} must hold floats, not {value.dtype}")


def check_labels(name: str, value: Any, shape: tuple[int, ...], logits: Tensor) -> None:
    check_tensor(name, value, shape, logits)
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name} must hold integers, not {value.dtype}")
    check_range(name, value, 0, logits.shape[1] - 1)


def check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name} must have shape [B, C] with C > 0, not {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{name} must hold floats, not {logits.dtype}")


def check_target(target: Any, logits: Tensor) -> None:
    rows = logits.shape[:1]
    if isinstance(target, Tensor):
        if target.is_floating_point():
            check_floats("target", target, logits.shape, logits)
        else:
            check_labels("target", target, rows, logits)
        return
    if not isinstance(target, (tuple, list)) or len(target) != 3:
        raise ValueError(
            "target must be labels [B], a float tensor [B, C] or (y_a, y_b, lam), "
            f"not {type(target).__name__}"
        )
    check_labels("target y_a", target[0], rows, logits)
    check_labels("target y_b", target[1], rows, logits)
    check_floats("target lam", target[2], rows, logits)
    check_range("target lam", target[2], 0, 1)


def check_topk(teacher: TopK, logits: Tensor) -> None:
    rows, classes = logits.shape
    check_option("teacher tail", teacher.tail, TAILS)
    width = teacher.ids.shape[-1] if isinstance(teacher.ids, Tensor) and teacher.ids.dim() else 0
    if not 1 <= width <= classes:
        raise ValueError(f"teacher ids must hold 1 to {classes} classes per row, not {width}")
    check_labels("teacher ids", teacher.ids, (rows, width), logits)
    check_floats("teacher log_probs", teacher.log_probs, (rows, width), logits)
    check_floats("teacher log_tail", teacher.log_tail, (rows,), logits)
