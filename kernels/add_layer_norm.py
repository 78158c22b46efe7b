"""What stands between two halves of a transformer block, in one pass:

    residual_out = residual + keep_scale[b] * gamma[c] * branch
    normed       = (residual_out - mean) / sqrt(var + eps) * weight + bias

mean and var over the C channels of a token, var without Bessel's correction (Ba et al. 2016);
gamma is LayerScale (Touvron et al. 2021, "Going deeper with image transformers"), keep_scale is
stochastic depth: 0 or 1 / (1 - p) for each sample (Huang et al. 2016; timm's DropPath).

Bytes, in tensors of [B, N, C]: the forward reads residual and branch and writes both results, 4.
The backward reads both gradients and residual_out and writes two gradients, 5; 4 where branch and
residual have one gradient (no gamma, no keep_scale, one dtype); 6 with gamma, whose gradient needs
branch. Eager PyTorch moves 9 forward with gamma and keep_scale. Beside these the forward writes two
floats a row, and the backward one partial row of weight gradients a program.

Numerics: float32 inside, two-pass variance. The statistics are those of residual_out as stored, so
that forward and backward see the same rows. The weight gradients are sums in a fixed order: equal
in every run on one kind of GPU.

A CPU, float64, and more than 4096 channels take the reference in plain PyTorch; with
TRITON_INTERPRET=1 a CPU runs the kernels in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import add_layer_norm_launch as launch

__all__ = ["add_layer_norm"]


def reference(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in PyTorch's own operations, of checked arguments."""
    x = residual
    if branch is not None:
        scale = gamma
        if keep_scale is not None:
            keep = keep_scale.view(-1, *(1,) * (residual.dim() - 1))
            scale = keep if gamma is None else keep * gamma
        added = residual + branch if scale is None else torch.addcmul(residual, branch, scale)
        x = added.to(residual.dtype)
    # For half-precision rows PyTorch on a CPU sums the weights' gradients in half precision, which
    # is 22 % off for 1,088 rows. The kernels sum in float32, and so does this.
    rows = x.float() if x.device.type == "cpu" and x.dtype.itemsize == 2 else x
    weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
    return x, F.layer_norm(rows, rows.shape[-1:], weight, bias, eps).to(normed_dtype)


def with_bias_gradient(value: Tensor, bias: Tensor) -> Tensor:
    """value, of which bias gets the gradient as if it had just been added; adds zeros."""
    return value + (bias - bias.detach()).to(value.dtype)


def _check_tensor(name: str, value: Any, shape: tuple[int, ...], residual: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but a residual of {tuple(residual.shape)} "
            f"needs {tuple(shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must hold floats, not {value.dtype}")
    if value.device != residual.device:
        raise ValueError(f"{name} is on {value.device} but residual is on {residual.device}")


def _check(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, branch_bias: Tensor | None = None,
) -> None:  # fmt: skip
    if not isinstance(residual, Tensor) or not residual.is_floating_point():
        found = residual.dtype if isinstance(residual, Tensor) else type(residual).__name__
        raise ValueError(f"residual must be a tensor of floats, not {found}")
    if residual.dim() < 2 or residual.shape[-1] == 0:
        raise ValueError(f"residual must be [B, ..., C] with C > 0, not {tuple(residual.shape)}")
    channels = residual.shape[-1:]
    if branch is not None:
        _check_tensor("branch", branch, residual.shape, residual)
    _check_tensor("weight", weight, channels, residual)
    _check_tensor("bias", bias, channels, residual)
    for name, value, shape in (
        ("gamma", gamma, channels),
        ("keep_scale", keep_scale, residual.shape[:1]),
        ("branch_bias", branch_bias, channels),
    ):
        if value is None:
            continue
        if branch is None:
            raise ValueError(f"{name} of shape {tuple(value.shape)} scales branch, which is None")
        _check_tensor(name, value, shape, residual)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, but is {eps}")


def _normed_dtype(residual: Tensor, branch: Tensor | None) -> torch.dtype:
    device = residual.device.type
    if torch.is_autocast_enabled(device) and residual.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return residual.dtype if branch is None else branch.dtype


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    gamma: Tensor | None = None,
    keep_scale: Tensor | None = None,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and norms the sum; a plain LayerNorm without a branch.

    Dtypes: each argument has its own, e.g. a float32 residual stream, a bfloat16 branch and float32
    weights. residual_out has the residual's, a gradient that of its argument. normed has the
    branch's (without a branch the residual's), or inside ``torch.autocast`` autocast's own, where
    F.layer_norm would give float32 on a GPU for the next linear layer to cast. Autocast changes
    nothing else.

    Args:
        residual: float [B, ..., C].
        branch: float, of the residual's shape, or None.
        weight, bias: float [C].
        gamma: LayerScale, float [C]; 1 if None.
        keep_scale: DropPath, float [B], a factor of each sample's branch; 1 if None. No gradient
            flows into it.
        eps: added to the variance.
        branch_bias: float [C], the bias that the branch already contains without a gradient, as
            in ``F.linear(x, weight, bias.detach())``. The value is not read. Its gradient is made
            here: the column sums of the branch's gradient, summed in float32 in the same pass.

    Returns:
        (residual_out, normed), both of the residual's shape. Without a branch residual_out is the
        residual itself.

    Raises:
        ValueError: shapes, dtypes, devices or an eps that do not fit, by name and value.
    """
    _check(residual, branch, weight, bias, gamma, keep_scale, eps, branch_bias)
    normed_dtype = _normed_dtype(residual, branch)
    if keep_scale is not None:
        keep_scale = keep_scale.detach()
    inputs = (residual, branch, weight, bias, gamma, keep_scale)
    if not launch.takes(*inputs, branch_bias):
        if branch is not None and branch_bias is not None:
            branch = with_bias_gradient(branch, branch_bias)
        return reference(residual, branch, *inputs[2:], float(eps), normed_dtype)
    residual_out, normed = torch.ops.deit_fast.add_layer_norm(
        *inputs, float(eps), normed_dtype, branch_bias
    )
    return residual if branch is None else residual_out, normed
