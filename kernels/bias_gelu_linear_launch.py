"""Launcher and operators of a linear layer behind a biased GELU, and the choice of its backward.

``deit_fast::bias_gelu_linear`` is the differentiable operator. It consists of operators that
torch.compile sees: bias_gelu_forward and the linear layer; in the backward the matrix products of
the weight's gradient and ``deit_fast::bias_gelu_linear_backward``.

That operator has two ways: the kernel whose epilogue multiplies by the slope, or torch.mm and the
backward of bias_gelu, which write and read the product in between. The environment variable
DEIT_FAST_MLP_BACKWARD chooses: "fused", "separate" or "measure", the default, which times both at
the first call of a size and keeps the faster for the life of the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.testing
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import bias_gelu_linear_kernel as kernel
from .launching import TYPE_NAMES, Launch, Plans, can_run, implement, product, signature
from .rows import SUM_COLS, SUM_ROWS, as_rows, sum_kernel

INTERPRETED = not isinstance(kernel.backward_kernel, triton.JITFunction)
HALF_DTYPES = (torch.bfloat16, torch.float16)
CHOICES = ("measure", "fused", "separate")

log = logging.getLogger(__name__)


def choice_of(text: str) -> str:
    if text not in CHOICES:
        expected = ", ".join(CHOICES)
        raise ValueError(f"DEIT_FAST_MLP_BACKWARD must be one of {expected}, not {text!r}")
    return text


CHOICE = choice_of(os.environ.get("DEIT_FAST_MLP_BACKWARD", "measure"))


def takes(x: Tensor, bias: Tensor) -> bool:
    """Whether the operator does this call: half precision on a GPU, or in the interpreter."""
    return x.dtype in HALF_DTYPES and can_run(x, bias)


# ---------------------------------------------------------------------------------------------
# Launch shapes and arguments
# ---------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """rows x cols of the gradient, depth of one step of the product."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# Two, and three, resident blocks on a multiprocessor of sm_90: one's epilogue runs beside another's
# product. The first reads less from the L2 cache.
TILES = (Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 4, 3))


def fuses(grad: Tensor, x: Tensor) -> bool:
    """Whether the fused kernel can do this call: descriptors need rows of whole 16 bytes.

    They are hardware from compute capability 9.0 on. Before it Triton makes loads of single
    elements of them, so an A100 keeps the separate way.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    return grad.shape[-1] % 8 == 0 and x.shape[-1] % 8 == 0


def _described(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A descriptor of a matrix; of a copy where rows do not begin on 16 bytes.

    It is made on the host, for each launch: it is an argument of the kernel like any other, so that
    a CUDA graph keeps it. One made on the device needs global memory in each launch instead.
    """
    step = x.stride(0) * x.itemsize
    if x.stride(1) != 1 or step <= 0 or step % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x, [rows, cols])


def _arguments(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, grad_x: Tensor, for_bias: bool,
    tiles: Tiles,
) -> tuple[dict[str, Any], dict[str, int], int]:  # fmt: skip
    """All arguments of the backward kernel for matrices, its options and its programs."""
    half, row_tiles = tiles.cols // 2, triton.cdiv(x.shape[0], tiles.rows)
    sums = x.new_empty((row_tiles, x.shape[1]), dtype=torch.float32) if for_bias else None
    values: dict[str, Any] = {"grad": _described(grad, tiles.rows, tiles.depth)}
    values |= {"weight": _described(weight, tiles.depth, tiles.cols)}
    values |= {"x": _described(x, tiles.rows, half), "grad_x": _described(grad_x, tiles.rows, half)}
    values |= {"bias": bias.contiguous(), "bias_sums": sums, "C": grad.shape[1], "H": x.shape[1]}
    values |= {"ROWS": tiles.rows, "HALF": half, "DEPTH": tiles.depth}
    values |= {"UPCAST": INTERPRETED and x.dtype == torch.bfloat16}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return values, options, row_tiles * triton.cdiv(x.shape[1], tiles.cols)


def _sum_arguments(values: dict[str, Any], grad_bias: Tensor) -> dict[str, Any]:
    sums = values["bias_sums"]
    result = {"bias_sums": sums, "grad_bias": grad_bias, "count": sums.shape[0], "C": values["H"]}
    return result | {"COLS": SUM_COLS, "ROWS": SUM_ROWS}


# ---------------------------------------------------------------------------------------------
# The two ways of the backward, and the choice between them
# ---------------------------------------------------------------------------------------------

Way = Tiles | None  # tiles of the fused kernel; None: separate
Key = tuple[torch.device, torch.dtype, int, int, int]

_measured: dict[Key, Way] = {}


def fused(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_bias: bool, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    return _fused_plans((x, grad, weight, bias), for_bias, tiles)  # type: ignore[return-value]


def _fused_results(inputs: Any, for_bias: bool, _: Tiles) -> tuple[Tensor, Tensor]:
    x, grad, weight, bias = inputs
    return _gradients(grad, weight, x, bias, True, for_bias)


def _fused_launches(inputs: Any, outputs: Any, for_bias: bool, tiles: Tiles) -> Iterator[Launch]:
    (x, grad, weight, bias), (grad_x, grad_bias) = inputs, outputs
    x, grad, rows = as_rows(x), as_rows(grad), grad_x.view(-1, grad_x.shape[-1])
    values, options, programs = _arguments(grad, weight, x, bias, rows, for_bias, tiles)
    yield Launch(kernel.backward_kernel, (programs,), values | options)
    if for_bias:
        options = {"num_warps": 4, "num_stages": 1}
        programs = triton.cdiv(x.shape[-1], SUM_COLS)
        arguments = _sum_arguments(values, grad_bias) | options
        yield Launch(sum_kernel, (programs,), arguments)


_fused_plans = Plans(_fused_results, _fused_launches)


def separate(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    product = torch.mm(grad.reshape(-1, grad.shape[-1]), weight).view(x.shape)
    return torch.ops.deit_fast.bias_gelu_backward(product, x, bias, for_x, for_bias)


def _key(grad: Tensor, x: Tensor) -> Key:
    """Numbers of rows with the same power of two above them share a measurement."""
    rows = x.numel() // x.shape[-1]
    return x.device, x.dtype, rows.bit_length(), grad.shape[-1], x.shape[-1]


def _measure(run: Callable[[Way], object], key: Key) -> Way:
    """The fastest way, by the GPU's clock, with none of its data in the L2 cache."""
    ways: tuple[Way, ...] = (None, *TILES)
    times = [float(triton.testing.do_bench(lambda way=way: run(way), return_mode="median"))
             for way in ways]  # fmt: skip
    best = ways[times.index(min(times))]
    listed = ", ".join(f"{1e3 * ms:.0f}" for ms in times)
    which = "separate" if best is None else f"fused, {best.rows} x {best.cols}"
    log.info("backward of bias_gelu_linear, %s: %s (us: %s)", key[1:], which, listed)
    return best


def _way(grad: Tensor, x: Tensor, run: Callable[[Way], object]) -> Way:
    if CHOICE == "separate" or not fuses(grad, x):
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


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------

_library = torch.library.Library("deit_fast", "FRAGMENT")
_library.define(
    "bias_gelu_linear(Tensor x, Tensor bias, Tensor weight, Tensor? weight_copy, Tensor? out_bias) "
    "-> Tensor"
)
_library.define(
    "bias_gelu_linear_backward(Tensor grad, Tensor weight, Tensor x, Tensor bias, bool for_x, "
    "bool for_bias) -> (Tensor, Tensor)"
)


def _gradients(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else (0,)), bias.new_empty(bias.shape if for_bias else (0,))


def _backward(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    def run(way: Way) -> tuple[Tensor, Tensor]:
        if way is None:
            return separate(grad, weight, x, bias, for_x, for_bias)
        return fused(grad, weight, x, bias, for_bias, way)

    if x.numel() == 0 or not for_x:  # a gradient of the bias alone: too rare for a kernel
        return run(None)
    return run(_way(grad, x, run))


def _linear(
    x: Tensor, bias: Tensor, weight: Tensor, weight_copy: Tensor | None, out_bias: Tensor | None
) -> Tensor:
    activation = torch.ops.deit_fast.bias_gelu_forward(x, bias)
    return F.linear(activation, weight if weight_copy is None else weight_copy, out_bias)


def _linear_fake(
    x: Tensor, bias: Tensor, weight: Tensor, weight_copy: Tensor | None, out_bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _BiasGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, weight_copy: Tensor | None,
        out_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        activation = torch.ops.deit_fast.bias_gelu_forward(x, bias)
        multiplied = weight if weight_copy is None else weight_copy
        kept = activation if weight.requires_grad else None
        ctx.save_for_backward(x, bias, multiplied, kept)
        ctx.dtype = weight.dtype
        return F.linear(activation, multiplied, out_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight, activation = ctx.saved_tensors
        for_x, for_bias, for_weight, _, for_out_bias = ctx.needs_input_grad
        grad_x = grad_bias = grad_weight = grad_out_bias = None
        if for_x or for_bias:
            grad_x, grad_bias = torch.ops.deit_fast.bias_gelu_linear_backward(
                grad, weight, x, bias, for_x, for_bias
            )
        rows = grad.reshape(-1, grad.shape[-1])
        if for_weight:
            grad_weight = product(rows.t(), activation.flatten(0, -2), ctx.dtype)
        if for_out_bias:
            grad_out_bias = rows.sum(0)
        grad_x, grad_bias = grad_x if for_x else None, grad_bias if for_bias else None
        return grad_x, grad_bias, grad_weight, None, grad_out_bias


def _differentiable(
    x: Tensor, bias: Tensor, weight: Tensor, weight_copy: Tensor | None, out_bias: Tensor | None
) -> Tensor:
    inputs = (x, bias, weight, weight_copy, out_bias)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in inputs):
        return _BiasGeluLinear.apply(*inputs)
    return _linear(*inputs)


for _name, _function, _fake in (
    ("bias_gelu_linear", _linear, _linear_fake),
    ("bias_gelu_linear_backward", _backward, _gradients),
):
    implement(_library, _name, _function, _fake)
_library.impl("bias_gelu_linear", _differentiable, "Autograd")


# ---------------------------------------------------------------------------------------------
# Ahead of time
# ---------------------------------------------------------------------------------------------


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """(name, function, signature, constants, alignments, options, expectations) to compile."""
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = [(bf16, 192, TILES[0]), (bf16, 384, TILES[0]), (bf16, 384, TILES[1])]
    cases += [(bf16, 768, TILES[0]), (bf16, 1024, TILES[0]), (fp16, 384, TILES[0])]
    for dtype, channels, tiles in cases:
        grad = torch.empty(256 * 198, channels, dtype=dtype, device="meta")
        x = grad.new_empty(grad.shape[0], 4 * channels)
        weight = grad.new_empty(channels, 4 * channels)
        bias = x.new_empty((x.shape[1],), dtype=torch.float32)
        values, options, _ = _arguments(grad, weight, x, bias, x, True, tiles)
        compiled = signature(kernel.backward_kernel, values)
        expect: dict[str, Any] = {"wide_loads": True, "i64_rows": True, "no_scalar_half": True}
        expect |= {"tensor_cores": True, "max_regs": 128, "min_blocks": 2}
        expect |= {"only_on": ("sm_90", "sm_100")}
        name = f"backward-{TYPE_NAMES[dtype]}-C={channels}-{tiles.rows}x{tiles.cols}"
        yield name, kernel.backward_kernel, *compiled, options, expect
