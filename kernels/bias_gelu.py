"""Exact GELU of x + bias, as behind the first linear layer of a transformer's MLP:

    u = x + bias,   y = u * Phi(u) = u / 2 * (1 + erf(u / sqrt 2))     (Hendrycks and Gimpel 2016)
    dx = dy * (Phi(u) + u * exp(-u^2 / 2) / sqrt(2 pi)),   dbias = sum of dx over the rows

Bytes, in tensors of [..., C]: forward 2 (read x, write y), backward 3 (read dy and x, write dx).
The bias is added and its gradient summed on the way, where a linear layer with a bias sums the
gradient in a pass of its own. The backward keeps x alone and computes u again. Its bias sums are
one partial row a program, added up in a fixed order: equal in every run on one kind of GPU.

Numerics: float32 inside, and x + bias is never rounded to a smaller dtype. Phi is an
approximation of our own, see bias_gelu_kernel.py: no farther from the truth than PyTorch's float32,
and much nearer where u is negative, since 1 + erf loses its digits there.

A CPU and float64 take the reference in plain PyTorch; with TRITON_INTERPRET=1 a CPU runs the
kernels in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bias_gelu_launch as launch

__all__ = ["bias_gelu"]


def reference(x: Tensor, bias: Tensor) -> Tensor:
    """The formula in PyTorch's own operations, of checked arguments."""
    return F.gelu(x + bias).to(x.dtype)


def _check(x: Any, bias: Any) -> None:
    for name, value in (("x", x), ("bias", bias)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of floats, not {found}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., C] with C > 0, not {tuple(x.shape)}")
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} but x of {tuple(x.shape)} needs ({x.shape[-1]},)"
        )
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device} but x is on {x.device}")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU, erf form, of x + bias.

    The result and its gradient have the dtype of x, inside ``torch.autocast`` too, which never
    changes this function; bias has a dtype of its own, e.g. float32 beside a bfloat16 x, and so has
    its gradient.

    Args:
        x: float [..., C].
        bias: float [C].

    Returns:
        Float, of the shape and dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name and value.
    """
    _check(x, bias)
    if not launch.takes(x, bias):
        return reference(x, bias)
    return torch.ops.deit_fast.bias_gelu(x, bias)
