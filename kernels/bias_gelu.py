"""Exact GELU of x + bias, as after the first linear layer of a transformer's MLP:

    u = x + bias,   y = u * Phi(u) = u / 2 * (1 + erf(u / sqrt 2))     (Hendrycks and Gimpel 2016)
    dx = dy * (Phi(u) + u * exp(-u^2 / 2) / sqrt(2 pi)),   dbias = sum of dx over the rows

Bytes, in tensors of [..., C]: forward 2 (read x, write y), backward 3 (read dy and x, write dx).
The forward adds the bias and the backward sums its gradient in the same pass, where a linear layer
with a bias sums the gradient in a pass of its own. The backward saves x alone and recomputes u.

Numerics: float32 inside; x + bias is never rounded to a smaller dtype. Phi is our own polynomial
fit (`_upper_tail`): its error is at most that of PyTorch's float32, and much smaller for negative
u, where 1 + erf cancels. The bias gradient has the same bits in every run on one kind of GPU.

A CPU and float64 take the reference in plain PyTorch; with TRITON_INTERPRET=1 a CPU runs the
kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor
from .launching import (
    TYPE_NAMES,
    Launch,
    can_run,
    first_derivative_only,
    launch,
    operator,
    planned,
    recording,
    scratch,
)
from .rows import as_rows, common_vector, launch_sum, max_programs, row_tile

__all__ = ["bias_gelu"]


def reference(x: Tensor, bias: Tensor) -> Tensor:
    """The formula in PyTorch's own operations."""
    return F.gelu(x + bias).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# Kernels. A program handles COLS channels: in the forward of ROWS rows; in the backward of every
# n-th tile of ROWS rows, n programs sharing the rows.
# ---------------------------------------------------------------------------------------------

INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
LOG2_INV_SQRT_2PI = tl.constexpr(-1.3257480647361592)
MINUS_HALF_LOG2E = tl.constexpr(-0.7213475204444817)


@triton.jit
def _upper_tail(a):
    """1 - Phi(a) for a >= 0: 2 to the power of a polynomial, without a branch.

    CUDA's erf picks one of two polynomials for each element. With it the forward has 40
    instructions per element, too many for an H100 to stay bound by memory. The coefficients are our
    fit of log2(erfc(a / sqrt 2) / 2) on [0, 6], which minimises the largest weighted error. The
    absolute error is below 3e-8, the relative error below 4e-6 up to a = 5; beyond 6 the
    polynomial keeps falling, so large a give 0.

    Formula 7.1.26 of Abramowitz and Stegun could share exp(-u^2 / 2) with the slope, but its error
    is 4e-7, its slope is less accurate than PyTorch's, and its division costs instructions on sm_90
    (forward 455 instead of 325, backward 671 instead of 605).
    """
    p = -2.4736342751907614e-08 * a + 7.533118946412287e-07
    p = p * a - 9.8268392321188e-06
    p = p * a + 6.974231655476615e-05
    p = p * a - 0.00025627814466133714
    p = p * a - 4.897819962934591e-05
    p = p * a + 0.007006990257650614
    p = p * a - 0.05248156562447548
    p = p * a - 0.45920804142951965
    p = p * a - 1.151105523109436
    return tl.exp2(p * a - 1.0)


@triton.jit
def gelu_slope(u):
    """Phi(u) + u exp(-u^2 / 2) / sqrt(2 pi)."""
    u_density = u * tl.exp2(u * u * MINUS_HALF_LOG2E + LOG2_INV_SQRT_2PI)
    above = _upper_tail(tl.abs(u))
    return u_density + tl.where(u < 0, above, 1.0 - above)


@triton.jit(do_not_specialize=("rows", "x_stride"))
def forward_kernel(
    x, bias, out,  # [rows, C]; [C]; [rows, C], contiguous
    rows, x_stride,
    C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    valid = (at < rows)[:, None] & (cols < C)[None, :]
    u = tl.load(x + row_tile(at, cols, x_stride, VEC), mask=valid, other=0.0).to(tl.float32)
    u += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    a = tl.abs(u)
    y = tl.maximum(u, 0.0) - a * _upper_tail(a)
    tl.store(out + row_tile(at, cols, C, VEC), y.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=("rows", "tiles", "grad_stride", "x_stride"))
def backward_kernel(
    grad, x, bias,  # [rows, C]; [rows, C]; [C]
    grad_x,  # [rows, C], contiguous, or None
    bias_sums,  # float32 [programs of axis 0, C], or None
    rows, tiles, grad_stride, x_stride,
    C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if bias_sums is not None:
        for_bias = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tile * ROWS + tl.arange(0, ROWS)
        valid = (at < rows)[:, None] & (cols < C)[None, :]
        g = tl.load(grad + row_tile(at, cols, grad_stride, VEC), mask=valid, other=0.0)
        u = tl.load(x + row_tile(at, cols, x_stride, VEC), mask=valid, other=0.0)
        u = u.to(tl.float32) + b
        # gelu_slope(u), in an order of operations with which this kernel spills no register.
        above = _upper_tail(tl.abs(u))
        below = tl.where(u < 0, above, 1.0 - above)
        g = g.to(tl.float32) * (below + u * (INV_SQRT_2PI * tl.exp2(u * u * MINUS_HALF_LOG2E)))
        if grad_x is not None:
            out = row_tile(at, cols, C, VEC)
            tl.store(grad_x + out, g.to(grad_x.dtype.element_ty), mask=valid)
        if bias_sums is not None:
            for_bias += tl.where(valid, g, 0.0)
    if bias_sums is not None:
        sums = tl.sum(for_bias, 0)
        tl.store(bias_sums + tl.program_id(0) * C + cols, sums, mask=cols < C)


# ---------------------------------------------------------------------------------------------
# Launchers and operators
# ---------------------------------------------------------------------------------------------


def _tile(channels: int) -> dict[str, int]:
    """Tile and options of a launch: 2048 elements a program, 16 of each tensor a thread.

    No lane is idle where a power of two from 128 on divides C.
    """
    divisor = min(channels & -channels, 1024)
    cols = divisor if divisor >= 128 else min(1024, triton.next_power_of_2(channels))
    cols = max(16, cols)
    return {"COLS": cols, "ROWS": min(2048 // cols, 64), "num_warps": 4, "num_stages": 1}


@planned
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    x = as_rows(x)
    (rows, C), tile = x.shape, _tile(x.shape[1])
    launch(
        forward_kernel, (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(C, tile["COLS"])),
        x=x, bias=bias.contiguous(), out=out, rows=rows, x_stride=x.stride(0),
        C=C, VEC=common_vector(C, x), **tile,
    )  # fmt: skip
    return out


def empty_gradients(
    _: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx and dbias without values; one that is not needed has no elements."""
    return x.new_empty(x.shape if for_x else (0,)), bias.new_empty(bias.shape if for_bias else (0,))


@planned
def _backward(
    grad: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = empty_gradients(grad, x, bias, for_x, for_bias)
    if x.numel() == 0:
        return grad_x, grad_bias.zero_()
    grad, x = as_rows(grad), as_rows(x)
    (rows, C), tile = x.shape, _tile(x.shape[1])
    tiles, columns = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(C, tile["COLS"])
    programs = min(tiles, max(1, max_programs(x.device) // columns))
    sums = scratch(x, programs, C) if for_bias else None
    launch(
        backward_kernel, (programs, columns),
        grad=grad, x=x, bias=bias.contiguous(), grad_x=grad_x if for_x else None, bias_sums=sums,
        rows=rows, tiles=tiles, grad_stride=grad.stride(0), x_stride=x.stride(0),
        C=C, VEC=common_vector(C, grad, x), **tile,
    )  # fmt: skip
    if sums is not None:
        launch_sum(sums, grad_bias)
    return grad_x, grad_bias


forward_op = operator(
    "bias_gelu_forward(Tensor x, Tensor bias) -> Tensor",
    _forward, lambda x, bias: x.new_empty(x.shape),
)  # fmt: skip
backward_op = operator(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, bool for_x, bool for_bias) "
    "-> (Tensor, Tensor)", _backward, empty_gradients,
)  # fmt: skip


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return forward_op(x, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        for_x, for_bias = ctx.needs_input_grad
        grad_x, grad_bias = backward_op(grad, *ctx.saved_tensors, for_x, for_bias)
        return grad_x if for_x else None, grad_bias if for_bias else None


bias_gelu_op = operator("bias_gelu(Tensor x, Tensor bias) -> Tensor", forward_op, None, _BiasGelu)


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, 768), (bf16, 1536), (bf16, 3072), (bf16, 1000), (fp16, 1536), (fp32, 1536)]
    for dtype, C in cases:
        x = torch.empty(256, 198, C, dtype=dtype, device="meta")
        bias = x.new_empty((C,), dtype=fp32)
        with recording() as recorded:
            _forward(x, bias)
            _backward(x, x, bias, True, True)
        forward, backward, sums = recorded.launches
        name = f"{TYPE_NAMES[dtype]}-C={C}"
        expect = {"wide_loads": True, "i64_rows": True, "max_regs": 128}
        expect["no_scalar_half"] = dtype.itemsize == 2
        yield f"forward-{name}", forward, expect
        yield f"backward-{name}", backward, expect
        if dtype == bf16:
            yield f"sums-C={C}", sums, {"max_regs": 128}


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU, erf form, of x + bias.

    The result and its gradient have the dtype of x, inside ``torch.autocast`` too. The bias and its
    gradient may have another dtype, e.g. float32 beside a bfloat16 x.

    Args:
        x: float [..., C].
        bias: float [C].

    Returns:
        Float, of the shape and dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name and value.
    """
    check(x, bias)
    return bias_gelu_op(x, bias) if can_run(x, bias) else reference(x, bias)


def check(x: Any, bias: Any) -> None:
    """Raise the ValueError of `bias_gelu` for arguments that do not fit."""
    check_tensor("x", x, "floats")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., C] with C > 0, not {tuple(x.shape)}")
    check_tensor("bias", bias, "floats", x.shape[-1:], x, "x")
