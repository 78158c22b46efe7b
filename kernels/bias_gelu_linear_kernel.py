"""Triton kernel of the backward of a linear layer behind a biased GELU.

A program makes one tile of the gradient: the product over all channels, then the slope of the GELU
as the product's epilogue, while the sums are still in registers. The tile's column sums, for the
gradient of the bias, become one partial row; partial rows are added up in a fixed order.

Tiles are read and written through tensor descriptors (TMA): what lies beyond the end is read as 0
and not written, without a mask in the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bias_gelu import gelu_slope


@triton.jit
def _epilogue(
    product, x, bias, grad_x, bias_sums, row, col, row_tile, H: tl.constexpr, COLS: tl.constexpr
):
    cols = col + tl.arange(0, COLS)
    u = x.load([row, col]).to(tl.float32)
    u += tl.load(bias + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]
    product *= gelu_slope(u)
    if bias_sums is not None:
        # Rows beyond the end add 0, as their product is 0.
        sums = tl.sum(product, 0)
        tl.store(bias_sums + row_tile.to(tl.int64) * H + cols, sums, mask=cols < H)
    grad_x.store([row, col], product.to(grad_x.dtype))


@triton.jit
def backward_kernel(
    grad, weight,  # descriptors: [M, C] in tiles [ROWS, DEPTH]; [C, H] in tiles [DEPTH, 2 HALF]
    x, grad_x,  # descriptors: [M, H] in tiles [ROWS, HALF]
    bias, bias_sums,  # [H]; float32 [row tiles, H] or None
    C: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_x = (grad weight) * slope(x + bias), and its column sums.

    UPCAST: the interpreter multiplies bfloat16 as raw 16-bit patterns.
    """
    # Neighbouring programs share rows of grad; the weight is small and stays in the L2 cache.
    across: tl.constexpr = (H + 2 * HALF - 1) // (2 * HALF)
    row_tile = tl.program_id(0) // across
    row, col = row_tile * ROWS, tl.program_id(0) % across * (2 * HALF)
    product = tl.zeros([ROWS, 2 * HALF], tl.float32)
    for channel in range(0, C, DEPTH):
        a, b = grad.load([row, channel]), weight.load([channel, col])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product)
    # One half after the other: the registers of a whole tile of x and bias would cost a resident
    # block. No value changes its thread in the split.
    halves = tl.permute(tl.reshape(product, [ROWS, 2, HALF]), [0, 2, 1])
    left, right = tl.split(halves)
    _epilogue(left, x, bias, grad_x, bias_sums, row, col, row_tile, H, HALF)
    _epilogue(right, x, bias, grad_x, bias_sums, row, col + HALF, row_tile, H, HALF)
