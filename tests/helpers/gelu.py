"""Inputs of the GELU kernels, and how far a result may be from PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import bias_gelu_linear
from helpers.kernels import DEVICE, INTERPRETED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normal(*shape: int, dtype: torch.dtype = FP32, scale: float = 2.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


NAMES = ("y", "dx", "dbias", "dweight", "dout_bias")


def expression(x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor | None = None) -> Tensor:
    """What bias_gelu_linear stands for, in PyTorch's own operations."""
    return F.linear(F.gelu(x + bias.to(x.dtype)), weight, out_bias)


def leaves_of(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype = BF16, weights: torch.dtype = FP32
) -> list[Tensor]:
    hidden = shape[-1]
    x, bias = normal(*shape, dtype=dtype), normal(hidden, scale=1.0)
    weight = normal(channels, hidden, dtype=weights, scale=hidden**-0.5)
    return [x, bias, weight, normal(channels, dtype=weights, scale=1.0)]


def results(
    function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor, autocast: bool = True
) -> list[Tensor]:
    """y and the gradients of all leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    dtype = gradient.dtype if autocast else BF16
    with torch.autocast(DEVICE, dtype, enabled=autocast):
        y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def assert_no_worse(leaves: list[Tensor], gradient: Tensor, note: object = "") -> None:
    mine, other = (results(f, leaves, gradient) for f in (bias_gelu_linear, expression))
    doubles = [x.double() for x in leaves]
    truth = results(expression, doubles, gradient.double(), autocast=False)
    for name, got, theirs, true in zip(NAMES, mine, other, truth, strict=True):
        assert got.dtype == theirs.dtype and got.shape == true.shape, name
        mistake, bound = ((y.double() - true).norm() for y in (got, theirs))
        if name != "dbias":
            bound *= 2.0 if INTERPRETED else 1.5
        assert mistake <= bound + 1e-12, f"{name} {note}: {mistake:.3e}, bound {bound:.3e}"
