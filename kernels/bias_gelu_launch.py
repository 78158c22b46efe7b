"""Launcher and operators of the bias_gelu kernels.

``deit_fast::bias_gelu`` is the differentiable operator; it calls ``deit_fast::bias_gelu_forward``
and in its backward ``deit_fast::bias_gelu_backward``, where an output that is not wanted is an
empty tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import bias_gelu_kernel as kernel
from .add_layer_norm_launch import SUM_COLS, SUM_ROWS, as_rows, common_vector, programs_of
from .launching import DTYPES, TYPE_NAMES, Launch, Plans, implement, on_gpu, signature

ELEMENTS, WARPS = 2048, 4  # of a program: 16 elements of a tensor to a thread
INTERPRETED = not isinstance(kernel.forward_kernel, triton.JITFunction)


def takes(x: Tensor, bias: Tensor) -> bool:
    """Whether the kernels do this call: on a GPU, or on the CPU with TRITON_INTERPRET=1."""
    return (INTERPRETED or on_gpu(x)) and x.dtype in DTYPES and bias.dtype in DTYPES


# ---------------------------------------------------------------------------------------------
# Launch shapes and arguments
# ---------------------------------------------------------------------------------------------


def shape_of(channels: int) -> dict[str, int]:
    """COLS and ROWS of a program: no idle lanes where a power of two from 128 up divides C."""
    dividing = min(channels & -channels, 1024)
    cols = dividing if dividing >= 128 else min(1024, triton.next_power_of_2(channels))
    cols = max(16, cols)
    return {"COLS": cols, "ROWS": min(ELEMENTS // cols, 64)}


_OPTIONS = {"num_warps": WARPS, "num_stages": 1}


def _forward_arguments(
    x: Tensor, bias: Tensor, out: Tensor
) -> tuple[dict[str, Any], tuple[int, int]]:
    """All arguments of the forward kernel and its grid."""
    x = as_rows(x)
    (rows, channels), shape = x.shape, shape_of(x.shape[1])
    values: dict[str, Any] = {"x": x, "bias": bias.contiguous(), "out": out, "rows": rows}
    values |= {"x_stride": x.stride(0), "C": channels, "VEC": common_vector(channels, x), **shape}
    return values, (triton.cdiv(rows, shape["ROWS"]), triton.cdiv(channels, shape["COLS"]))


def _backward_arguments(
    grad: Tensor, x: Tensor, bias: Tensor, grad_x: Tensor, grad_bias: Tensor, most_programs: int
) -> tuple[dict[str, Any], tuple[int, int]]:
    """All arguments of the backward kernel and its grid."""
    grad, x = as_rows(grad), as_rows(x)
    (rows, channels), shape = x.shape, shape_of(x.shape[1])
    tiles, columns = triton.cdiv(rows, shape["ROWS"]), triton.cdiv(channels, shape["COLS"])
    shares = min(tiles, max(1, most_programs // columns))
    sums = x.new_empty((shares, channels), dtype=torch.float32) if grad_bias.numel() else None
    values: dict[str, Any] = {"grad": grad, "x": x, "bias": bias.contiguous(), "bias_sums": sums}
    values |= {"grad_x": grad_x if grad_x.numel() else None, "rows": rows, "tiles": tiles}
    values |= {"grad_stride": grad.stride(0), "x_stride": x.stride(0), "C": channels}
    values |= {"VEC": common_vector(channels, grad, x), **shape}
    return values, (shares, columns)


def _sum_arguments(values: dict[str, Any], grad_bias: Tensor) -> dict[str, Any]:
    sums = values["bias_sums"]
    result = {"bias_sums": sums, "grad_bias": grad_bias, "count": sums.shape[0], "C": values["C"]}
    return result | {"COLS": SUM_COLS, "ROWS": SUM_ROWS}


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------

_library = torch.library.Library("deit_fast", "FRAGMENT")
_library.define("bias_gelu(Tensor x, Tensor bias) -> Tensor")
_library.define("bias_gelu_forward(Tensor x, Tensor bias) -> Tensor")
_library.define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, bool for_x, bool for_bias) "
    "-> (Tensor, Tensor)"
)


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(x.shape)
    return _forward_plans((x, bias))[0]


def _forward_results(inputs: Any) -> tuple[Tensor]:
    return (_forward_fake(*inputs),)


def _forward_launches(inputs: Any, outputs: Any) -> Iterator[Launch]:
    values, grid = _forward_arguments(*inputs, *outputs)
    yield Launch(kernel.forward_kernel, grid, values | _OPTIONS)


_forward_plans = Plans(_forward_results, _forward_launches)


def _forward_fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gradients(x: Tensor, bias: Tensor, for_x: bool, for_bias: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else (0,)), bias.new_empty(bias.shape if for_bias else (0,))


def _backward(
    grad: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        grad_x, grad_bias = _gradients(x, bias, for_x, for_bias)
        return grad_x, grad_bias.zero_()
    return _backward_plans((x, grad, bias), for_x, for_bias)  # type: ignore[return-value]


def _backward_results(inputs: Any, for_x: bool, for_bias: bool) -> tuple[Tensor, Tensor]:
    x, _, bias = inputs
    return _gradients(x, bias, for_x, for_bias)


def _backward_launches(inputs: Any, outputs: Any, _: bool, for_bias: bool) -> Iterator[Launch]:
    (x, grad, bias), (grad_x, grad_bias) = inputs, outputs
    values, grid = _backward_arguments(grad, x, bias, grad_x, grad_bias, programs_of(x.device))
    yield Launch(kernel.backward_kernel, grid, values | _OPTIONS)
    if for_bias:
        programs = triton.cdiv(x.shape[-1], SUM_COLS)
        yield Launch(kernel.sum_kernel, (programs,), _sum_arguments(values, grad_bias) | _OPTIONS)


_backward_plans = Plans(_backward_results, _backward_launches)


def _backward_fake(
    grad: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    return _gradients(x, bias, for_x, for_bias)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return torch.ops.deit_fast.bias_gelu_forward(x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        wanted = ctx.needs_input_grad
        grad_x, grad_bias = torch.ops.deit_fast.bias_gelu_backward(
            grad, *ctx.saved_tensors, *wanted
        )
        return grad_x if wanted[0] else None, grad_bias if wanted[1] else None


def _differentiable(x: Tensor, bias: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        return _BiasGelu.apply(x, bias)
    return torch.ops.deit_fast.bias_gelu_forward(x, bias)


for _name, _function, _fake in (
    ("bias_gelu", _forward, _forward_fake),
    ("bias_gelu_forward", _forward, _forward_fake),
    ("bias_gelu_backward", _backward, _backward_fake),
):
    implement(_library, _name, _function, _fake)
_library.impl("bias_gelu", _differentiable, "Autograd")


# ---------------------------------------------------------------------------------------------
# Ahead of time
# ---------------------------------------------------------------------------------------------


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """(name, function, signature, constants, alignments, options, expectations) to compile."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, 768), (bf16, 1536), (bf16, 3072), (bf16, 1000), (fp16, 1536), (fp32, 1536)]
    for dtype, channels in cases:
        x = torch.empty(256, 198, channels, dtype=dtype, device="meta")
        bias = x.new_empty((channels,), dtype=fp32)
        name = f"{TYPE_NAMES[dtype]}-C={channels}"
        expect: dict[str, Any] = {"wide_loads": True, "i64_rows": True}
        expect |= {"max_regs": 128, "no_scalar_half": dtype.itemsize == 2}
        values, _ = _forward_arguments(x, bias, x)
        compiled = signature(kernel.forward_kernel, values)
        yield f"forward-{name}", kernel.forward_kernel, *compiled, _OPTIONS, expect
        values, _ = _backward_arguments(x, x, bias, x, bias, 4 * 132)
        compiled = signature(kernel.backward_kernel, values)
        yield f"backward-{name}", kernel.backward_kernel, *compiled, _OPTIONS, expect
        if dtype == bf16:
            compiled = signature(kernel.sum_kernel, _sum_arguments(values, bias))
            yield f"sums-C={channels}", kernel.sum_kernel, *compiled, _OPTIONS, {"max_regs": 128}
