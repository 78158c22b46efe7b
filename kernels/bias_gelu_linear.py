"""A linear layer behind a biased exact GELU: the second half of a transformer's MLP.

    u = x + bias,   a = u Phi(u),   y = a W^T + out_bias
    dx = (dy W) * slope(u),   dbias = sum of dx over the rows,   dW = dy^T a

The forward is that of bias_gelu and F.linear. In the backward dy W is multiplied by the slope while
it is still in registers, where the kernel wins (see bias_gelu_linear_launch.py).

Bytes of dx and dbias, in tensors of [..., H]: 2 (read x, write dx) instead of 4 (write dy W; read
it and x, write dx). The forward saves what bias_gelu and F.linear save: x and a. The slope could
be saved instead: 957 instructions in place of 2,178 (sm_90), for a tensor more to write in
the forward, which is bound by memory.

Numerics: the product is not rounded before it is multiplied by the slope, nor dx before the sum
over the rows. Each program's rows are summed at once, the partial sums in a fixed order. The two
ways of the backward differ by these roundings, so where a measurement chooses between them
(DEIT_FAST_MLP_BACKWARD=measure) the last bits may differ between two processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bias_gelu_linear_launch as launch
from .bias_gelu import bias_gelu
from .bias_gelu import check as check_bias_gelu

__all__ = ["bias_gelu_linear"]


def _check(x: Any, bias: Any, weight: Any, out_bias: Any, weight_copy: Any) -> None:
    check_bias_gelu(x, bias)
    given = {"weight": weight, "out_bias": out_bias, "weight_copy": weight_copy}
    for name, value in given.items():
        if value is None and name != "weight":
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of floats, not {found}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device} but x is on {x.device}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        _refuse("weight", weight, "x", x, (-1, x.shape[-1]))
    if out_bias is not None and out_bias.shape != weight.shape[:1]:
        _refuse("out_bias", out_bias, "weight", weight, weight.shape[:1])
    if weight_copy is not None and weight_copy.shape != weight.shape:
        _refuse("weight_copy", weight_copy, "weight", weight, weight.shape)


def _refuse(name: str, value: Tensor, other: str, beside: Tensor, needed: Iterable[int]) -> None:
    shape, needed = tuple(value.shape), tuple(needed)
    raise ValueError(
        f"{name} has shape {shape} but {other} of {tuple(beside.shape)} needs {needed}"
    )


def bias_gelu_linear(
    x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor | None = None,
    weight_copy: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``F.linear(bias_gelu(x, bias), weight, out_bias)``, with a backward of fewer bytes.

    Inside ``torch.autocast`` the linear layer computes in autocast's dtype, as F.linear does, and
    the gradients of float32 weights are float32. The kernel runs where x has the dtype of the
    product, bfloat16 or float16; anything else takes the expression above. Only first derivatives.

    Args:
        x: float [..., H].
        bias: float [H], added to x.
        weight: float [C, H].
        out_bias: float [C] or None, added to the result. Detached it costs its gradient no pass.
        weight_copy: the weight in the dtype of the product, [C, H], which then makes no copy of its
            own. It gets no gradient; on a GPU that of a float32 weight is not rounded to its dtype.

    Returns:
        Float [..., C], of the dtype that F.linear gives.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name and value.
    """
    _check(x, bias, weight, out_bias, weight_copy)
    kind = x.device.type
    dtype = weight.dtype if weight_copy is None else weight_copy.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if weight_copy is not None and weight_copy.dtype != dtype:
        raise ValueError(f"weight_copy is {weight_copy.dtype} but the product is in {dtype}")
    if x.dtype != dtype or not launch.takes(x, bias):
        weight = weight if weight_copy is None else weight.to(dtype)
        return F.linear(bias_gelu(x, bias), weight, out_bias)
    if weight_copy is None:
        weight = weight.to(dtype)
    if out_bias is not None:
        out_bias = out_bias.to(dtype)
    return torch.ops.deit_fast.bias_gelu_linear(x, bias, weight, weight_copy, out_bias)
