"""Checks of arguments: a ValueError in one line that names the argument, its value and the rule.

A message is made only when it is raised: formatting takes longer than the check.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16)


def check_tensor(
    name: str,
    value: Any,
    dtype: torch.dtype | str,
    shape: Sequence[int | str] | None = None,
    like: Tensor | None = None,
    like_name: str = "",
) -> None:
    """Check that value is a tensor of this dtype and shape, on the device of ``like``.

    Args:
        dtype: "floats", "integers" or a single dtype.
        shape: sizes, or letters for sizes that may have any value; None: any shape.
        like: the argument that determines shape and device.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
    if dtype == "floats":
        fits = value.is_floating_point()
    else:
        fits = value.dtype in _INTEGERS if dtype == "integers" else value.dtype == dtype
    if not fits:
        raise ValueError(f"{name} must hold {dtype}, not {value.dtype}")
    if shape is not None and value.shape != shape and not _fits(value.shape, shape):
        expected = ", ".join(map(str, shape))
        has_letters = any(isinstance(n, str) for n in shape)
        beside = "" if like is None or has_letters else f" beside {like_name} {tuple(like.shape)}"
        raise ValueError(f"{name} must have shape [{expected}]{beside}, not {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}")


def _fits(sizes: Sequence[int], shape: Sequence[int | str]) -> bool:
    if len(sizes) != len(shape):
        return False
    return all(isinstance(n, str) or n == size for n, size in zip(shape, sizes, strict=True))


def check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, not {value!r}")


def can_check_values(x: Tensor) -> bool:
    """Reading values on a GPU waits for it, so there only with DEIT_FAST_DEBUG=1."""
    if torch.compiler.is_compiling():
        return False
    return not x.is_cuda or os.environ.get("DEIT_FAST_DEBUG") == "1"


def check_values(name: str, values: Tensor, low: int, high: int | Tensor) -> None:
    """Check that low <= values <= high, which may be a limit for each value."""
    if values.dtype == torch.uint16:  # PyTorch cannot compare these
        values = values.int()
    wrong = ((values >= low) & (values <= high)).logical_not_().nonzero()  # NaN is wrong, too
    if len(wrong) == 0:
        return
    at = tuple(wrong[0].tolist())
    limit = high[at].item() if isinstance(high, Tensor) else high
    raise ValueError(
        f"{name} must lie in [{low}, {limit}], found {values[at].item()} in row {at[0]}"
    )
