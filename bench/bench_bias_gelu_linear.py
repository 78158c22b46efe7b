"""The linear layer after a biased GELU in an MLP: its backward alone, and forward with backward.

Shapes are those of DeiT-S, Ti and B: 256 images, 198 tokens, 4 C hidden channels, C after the
layer, bfloat16 x and gradients, float32 parameters under autocast.

"dx": the gradients of x and of the bias, from the gradient of the layer's result. "ours,
fused" is the kernel with the slope as its epilogue, in tiles of 128 x 128 and 128 x 64; "ours,
separate" is cuBLAS and then the backward of bias_gelu, one of which the operator takes by its own
measurement. Bytes: read x and the gradient, write the gradient of x; the weight is small.

"fwd+bwd": the layer with the gradients of everything, as in a model. Bytes: the forward reads x and
writes the activation and the result; the backward reads x, the activation and the gradient and
writes the gradient of x. On a CPU ours is the expression in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import bias_gelu_linear
from deit_fast.kernels.bias_gelu_linear import TILES, can_fuse, fused, separate

from .common import Case


def plain(x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(x + bias.to(x.dtype)), weight, out_bias)


def plain_backward(grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    u = x + bias.to(x.dtype)
    grad_x = torch.ops.aten.gelu_backward(torch.mm(grad, weight), u)
    return grad_x, grad_x.sum(0)


def cases(device: str) -> list[Case]:
    batch, tokens = (4, 198) if device == "cpu" else (256, 198)
    compiled: Callable[..., Any] = torch.compile(plain, dynamic=device == "cpu")
    channels = (192, 384) if device == "cpu" else (384, 192, 768)  # DeiT-S first
    cases = [whole(device, (batch, tokens, 4 * width), width, compiled) for width in channels]
    if device == "cpu":
        return cases
    compiled = torch.compile(plain_backward, dynamic=False)
    return [backward(device, batch * tokens, width, compiled) for width in channels] + cases


def draw(device: str, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(len(shape))
    return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)


def backward(device: str, rows: int, channels: int, compiled: Callable[..., Any]) -> Case:
    dtype, hidden = torch.bfloat16, 4 * channels

    def build() -> dict[str, Callable[[], Any] | str]:
        x = draw(device, rows, hidden, dtype=dtype)
        bias = draw(device, hidden, dtype=torch.float32)
        grad = draw(device, rows, channels, dtype=dtype)
        weight = draw(device, channels, hidden, dtype=dtype, scale=hidden**-0.5)
        made: dict[str, Callable[[], Any] | str] = {}
        for tiles in TILES:
            name = f"ours, fused {tiles.rows} x {tiles.cols}"
            made[name] = "needs compute capability 9.0"
            if can_fuse(grad, x):
                made[name] = partial(fused, grad, weight, x, bias, True, tiles)
        made["ours, separate"] = lambda: separate(grad, weight, x, bias, True, True)
        made["torch.compile"] = lambda: compiled(grad, weight, x, bias)
        made["eager"] = lambda: plain_backward(grad, weight, x, bias)
        return made

    moved = rows * (2 * hidden + channels) * dtype.itemsize
    return Case(f"[{rows},{hidden}] C={channels} bfloat16 dx", build, bytes_moved=moved)


def whole(
    device: str, shape: tuple[int, int, int], channels: int, compiled: Callable[..., Tensor]
) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def build() -> dict[str, Callable[[], Any] | str]:
        leaves = [
            draw(device, *shape, dtype=dtype),
            draw(device, shape[-1], dtype=torch.float32),
            draw(device, channels, shape[-1], dtype=torch.float32, scale=shape[-1] ** -0.5),
            draw(device, channels, dtype=torch.float32),
        ]
        leaves = [x.requires_grad_() for x in leaves]
        gradient = draw(device, *shape[:2], channels, dtype=dtype)

        def call(function: Callable[..., Tensor]) -> Callable[[], Any]:
            def run() -> Any:
                with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                    y = function(*leaves)
                return torch.autograd.grad(y, leaves, gradient)

            return run

        return {"ours": call(bias_gelu_linear), "torch.compile": call(compiled),
                "eager": call(plain)}  # fmt: skip

    rows = shape[0] * shape[1]
    label = f"[{shape[0]},{shape[1]},{shape[2]}] C={channels} "
    label += f"{str(dtype).removeprefix('torch.')} fwd+bwd"
    moved = rows * (5 * shape[2] + 2 * channels) * dtype.itemsize
    return Case(label, build, bytes_moved=moved, items=shape[0])
