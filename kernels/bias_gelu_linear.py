"""A linear layer after a biased exact GELU: the second part of a transformer's MLP.

    u = x + bias,   a = u Phi(u),   y = a W^T + out_bias
    dx = (dy W) * slope(u),   dbias = sum of dx over the rows,   dW = dy^T a

The forward is bias_gelu followed by F.linear. The backward has two variants: `fused` multiplies
dy W by the slope while it is in registers; `separate` is torch.mm and the backward of bias_gelu,
which write dy W and read it again. The environment variable DEIT_FAST_MLP_BACKWARD chooses:
"fused", "separate" or "measure", the default. That times both at the first call of a size and uses
the faster one for the life of the process. torch.compile sees all products but that of `fused`.

Bytes of dx and dbias, in tensors of [..., H]: fused 2 (read x, write dx), separate 4 (write dy W;
read it and x, write dx). The forward saves what bias_gelu and F.linear save: x and a. Saving the
slope instead would take 957 instructions instead of 2,178 (sm_90), but the forward, which is bound
by memory, would write one more tensor.

Numerics: `fused` rounds neither the product before it multiplies by the slope nor dx before it
sums over the rows. Each program sums its rows at once, and the partial sums are added in a fixed
order. The two variants round differently, so with "measure" the last bits may differ between two
processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
import triton.testing
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .bias_gelu import backward_op, bias_gelu, empty_gradients, forward_op, gelu_slope
from .bias_gelu import check as check_bias_gelu
from .checks import check_option, check_tensor
from .launching import (
    INTERPRETED,
    TYPE_NAMES,
    Launch,
    can_run,
    first_derivative_only,
    launch,
    on_gpu,
    operator,
    planned,
    recording,
    scratch,
)
from .rows import as_rows, launch_sum

__all__ = ["bias_gelu_linear"]

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------
# Kernel. A program makes one tile of dx: the product over all channels, then the slope as the
# product's epilogue. Tiles are read and written through tensor descriptors (TMA): elements beyond
# the end read as 0 and are not written, without a mask in the kernel.
# ---------------------------------------------------------------------------------------------


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

    UPCAST: to float32 before the product; the interpreter multiplies bfloat16 as 16-bit integers.
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
    # The epilogue runs on the left and then on the right columns: the registers of a whole tile of
    # x and bias would cost a resident block. No value moves to another thread in the split.
    halves = tl.permute(tl.reshape(product, [ROWS, 2, HALF]), [0, 2, 1])
    left, right = tl.split(halves)
    _epilogue(left, x, bias, grad_x, bias_sums, row, col, row_tile, H, HALF)
    _epilogue(right, x, bias, grad_x, bias_sums, row, col + HALF, row_tile, H, HALF)


# ---------------------------------------------------------------------------------------------
# The two variants of the backward
# ---------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """rows x cols of dx per program, depth of one step of the product."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# Two, and three, resident blocks on a multiprocessor of sm_90, so that the epilogue of one overlaps
# with the product of another. The first reads less from the L2 cache.
TILES = (Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 4, 3))


def can_fuse(grad: Tensor, x: Tensor) -> bool:
    """Whether the fused kernel can run: tensor descriptors need rows of whole 16 bytes.

    Descriptors are hardware from compute capability 9.0 on. Before it Triton replaces them by loads
    of single elements, so an A100 uses the separate variant.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    return grad.shape[-1] % 8 == 0 and x.shape[-1] % 8 == 0


def _descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A descriptor of a matrix, or of its copy where rows do not start on 16 bytes.

    It is made on the host for each launch and is an argument like any other, so that a CUDA graph
    keeps it. One made on the device would need global memory in each launch.
    """
    step = x.stride(0) * x.itemsize
    if x.stride(1) != 1 or step <= 0 or step % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x, [rows, cols])


@planned
def fused(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_bias: bool, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = empty_gradients(grad, x, bias, True, for_bias)
    grad, x, out = as_rows(grad), as_rows(x), grad_x.view(-1, x.shape[-1])
    (M, C), H, half = grad.shape, x.shape[1], tiles.cols // 2
    row_tiles = triton.cdiv(M, tiles.rows)
    sums = scratch(x, row_tiles, H) if for_bias else None
    launch(
        backward_kernel, (row_tiles * triton.cdiv(H, tiles.cols),),
        grad=_descriptor(grad, tiles.rows, tiles.depth),
        weight=_descriptor(weight, tiles.depth, tiles.cols),
        x=_descriptor(x, tiles.rows, half), grad_x=_descriptor(out, tiles.rows, half),
        bias=bias.contiguous(), bias_sums=sums, C=C, H=H,
        ROWS=tiles.rows, HALF=half, DEPTH=tiles.depth,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if sums is not None:
        launch_sum(sums, grad_bias)
    return grad_x, grad_bias


def separate(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    product = torch.mm(grad.reshape(-1, grad.shape[-1]), weight).view(x.shape)
    return backward_op(product, x, bias, for_x, for_bias)


# ---------------------------------------------------------------------------------------------
# The choice between them
# ---------------------------------------------------------------------------------------------

CHOICES = ("measure", "fused", "separate")


CHOICE = os.environ.get("DEIT_FAST_MLP_BACKWARD", "measure")
check_option("DEIT_FAST_MLP_BACKWARD", CHOICE, CHOICES)

Variant = Tiles | None  # tiles of the fused kernel; None: separate
Key = tuple[torch.device, torch.dtype, int, int, int]

_measured: dict[Key, Variant] = {}


def _key(grad: Tensor, x: Tensor) -> Key:
    """Calls with one key share a measurement: row counts are rounded up to a power of two."""
    rows = x.numel() // x.shape[-1]
    return x.device, x.dtype, rows.bit_length(), grad.shape[-1], x.shape[-1]


def _measure(run: Callable[[Variant], object], key: Key) -> Variant:
    """The fastest variant by the GPU's clock, each run with an empty L2 cache."""
    variants: tuple[Variant, ...] = (None, *TILES)
    times = [float(triton.testing.do_bench(lambda tiles=tiles: run(tiles), return_mode="median"))
             for tiles in variants]  # fmt: skip
    best = variants[times.index(min(times))]
    listed = ", ".join(f"{1e3 * ms:.0f}" for ms in times)
    which = "separate" if best is None else f"fused, {best.rows} x {best.cols}"
    log.info("backward of bias_gelu_linear, %s: %s (us: %s)", key[1:], which, listed)
    return best


def _choose(grad: Tensor, x: Tensor, run: Callable[[Variant], object]) -> Variant:
    if CHOICE == "separate" or not can_fuse(grad, x):
        return None
    if CHOICE == "fused" or not x.is_cuda:
        return TILES[0]
    key = _key(grad, x)
    if key not in _measured:
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device_of(x):
            _measured[key] = _measure(run, key)
    return _measured[key]


def _backward(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    def run(tiles: Variant) -> tuple[Tensor, Tensor]:
        if tiles is None:
            return separate(grad, weight, x, bias, for_x, for_bias)
        return fused(grad, weight, x, bias, for_bias, tiles)

    if x.numel() == 0 or not for_x:  # a gradient of the bias alone is too rare for a kernel
        return run(None)
    return run(_choose(grad, x, run))


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of two matrices in a dtype; on a GPU a float32 result is not rounded in between."""
    if on_gpu(a) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _forward(
    x: Tensor, bias: Tensor, weight: Tensor, weight_copy: Tensor | None, out_bias: Tensor | None
) -> Tensor:
    return F.linear(forward_op(x, bias), weight if weight_copy is None else weight_copy, out_bias)


linear_backward_op = operator(
    "bias_gelu_linear_backward(Tensor grad, Tensor weight, Tensor x, Tensor bias, bool for_x, "
    "bool for_bias) -> (Tensor, Tensor)", _backward,
    lambda grad, weight, *rest: empty_gradients(grad, *rest),
)  # fmt: skip


class _BiasGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, weight_copy: Tensor | None,
        out_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        activation = forward_op(x, bias)
        multiplied = weight if weight_copy is None else weight_copy
        kept = activation if weight.requires_grad else None
        ctx.save_for_backward(x, bias, multiplied, kept)
        ctx.dtype = weight.dtype
        return F.linear(activation, multiplied, out_bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight, activation = ctx.saved_tensors
        for_x, for_bias, for_weight, _, for_out_bias = ctx.needs_input_grad
        grad_x = grad_bias = grad_weight = grad_out_bias = None
        if for_x or for_bias:
            grad_x, grad_bias = linear_backward_op(grad, weight, x, bias, for_x, for_bias)
        rows = grad.reshape(-1, grad.shape[-1])
        if for_weight:
            grad_weight = matmul(rows.t(), activation.flatten(0, -2), ctx.dtype)
        if for_out_bias:
            grad_out_bias = rows.sum(0)
        grad_x, grad_bias = grad_x if for_x else None, grad_bias if for_bias else None
        return grad_x, grad_bias, grad_weight, None, grad_out_bias


bias_gelu_linear_op = operator(
    "bias_gelu_linear(Tensor x, Tensor bias, Tensor weight, Tensor? weight_copy, Tensor? out_bias) "
    "-> Tensor", _forward, None, _BiasGeluLinear,
)  # fmt: skip


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time."""
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = [(bf16, 192, TILES[0]), (bf16, 384, TILES[0]), (bf16, 384, TILES[1])]
    cases += [(bf16, 768, TILES[0]), (bf16, 1024, TILES[0]), (fp16, 384, TILES[0])]
    expect: dict[str, Any] = {"wide_loads": True, "i64_rows": True, "no_scalar_half": True}
    expect |= {"tensor_cores": True}
    expect |= {"max_regs": 128, "min_blocks": 2, "only_on": ("sm_90", "sm_100")}
    for dtype, C, tiles in cases:
        grad = torch.empty(256 * 198, C, dtype=dtype, device="meta")
        x, weight = grad.new_empty(len(grad), 4 * C), grad.new_empty(C, 4 * C)
        bias = grad.new_empty((4 * C,), dtype=torch.float32)
        with recording() as recorded:
            fused(grad, weight, x, bias, True, tiles)
        name = f"backward-{TYPE_NAMES[dtype]}-C={C}-{tiles.rows}x{tiles.cols}"
        yield name, recorded.launches[0], expect


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def bias_gelu_linear(
    x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor | None = None,
    weight_copy: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``F.linear(bias_gelu(x, bias), weight, out_bias)``, with a backward that moves fewer bytes.

    Inside ``torch.autocast`` the linear layer computes in autocast's dtype, as F.linear does, and
    the gradients of float32 weights are float32. The kernel runs where x has the dtype of the
    product, bfloat16 or float16; everything else runs the expression above. It has first
    derivatives only.

    Args:
        x: float [..., H].
        bias: float [H], added to x.
        weight: float [C, H].
        out_bias: float [C] or None, added to the result. If it is detached, no time is spent on its
            gradient.
        weight_copy: the weight in the dtype of the product, [C, H], so that the function does not
            cast it. It gets no gradient. On a GPU the gradient of a float32 weight is not rounded
            to the copy's dtype.

    Returns:
        Float [..., C], of the dtype that F.linear gives.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, by name and value.
    """
    _check(x, bias, weight, out_bias, weight_copy)
    device = x.device.type
    dtype = weight.dtype if weight_copy is None else weight_copy.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if weight_copy is not None and weight_copy.dtype != dtype:
        raise ValueError(f"weight_copy is {weight_copy.dtype} but the product is in {dtype}")
    if x.dtype != dtype or x.dtype == torch.float32 or not can_run(x, bias):
        weight = weight if weight_copy is None else weight.to(dtype)
        return F.linear(bias_gelu(x, bias), weight, out_bias)
    if weight_copy is None:
        weight = weight.to(dtype)
    if out_bias is not None:
        out_bias = out_bias.to(dtype)
    return bias_gelu_linear_op(x, bias, weight, weight_copy, out_bias)


def _check(x: Any, bias: Any, weight: Any, out_bias: Any, weight_copy: Any) -> None:
    check_bias_gelu(x, bias)
    check_tensor("weight", weight, "floats", ("C", x.shape[-1]), x, "x")
    if out_bias is not None:
        check_tensor("out_bias", out_bias, "floats", weight.shape[:1], weight, "weight")
    if weight_copy is not None:
        check_tensor("weight_copy", weight_copy, "floats", weight.shape, weight, "weight")
