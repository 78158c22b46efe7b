"""GELU of x + bias between the two linear layers of an MLP, forward and forward with backward.

Shapes are those of DeiT-Ti, S and B: 256 images, 198 tokens, 4 x 192, 384 and 768 channels,
bfloat16 rows, a float32 bias.

Bytes, in tensors of the shape: the forward reads x and writes y, 2; the backward reads dy and x and
writes dx, 3. The gradient of the bias needs no more traffic if the same kernel sums it.

Peers: PyTorch's operations, eager and compiled, with the bias cast to the dtype of x beforehand, as
autocast does. In an eager model the preceding matrix product can add the bias, so this bench puts
eager PyTorch at a disadvantage; it is fair to torch.compile. On a CPU ours is the reference in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.bias_gelu import bias_gelu

from .common import Case


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype))


def cases(device: str) -> list[Case]:
    batch, tokens = (4, 198) if device == "cpu" else (256, 198)
    # A CPU compiles for half a minute: there one graph serves all sizes.
    compiled = torch.compile(plain, dynamic=device == "cpu")
    return [
        case(device, (batch, tokens, 4 * channels), backward, compiled)
        for channels in ((192, 384, 768) if device == "cpu" else (384, 192, 768))  # DeiT-S first
        for backward in (False, True)
    ]


def case(
    device: str, shape: tuple[int, int, int], backward: bool, compiled: Callable[..., Tensor]
) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def build() -> dict[str, Callable[[], Any] | str]:
        draw = torch.Generator(device).manual_seed(0)
        x, gradient = (
            torch.randn(shape, device=device, generator=draw).to(dtype) for _ in range(2)
        )
        bias = torch.randn(shape[-1], device=device, generator=draw).requires_grad_()
        x.requires_grad_()

        def call(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
            if backward:
                return lambda: torch.autograd.grad(function(x, bias), (x, bias), gradient)
            return torch.no_grad()(lambda: function(x, bias))

        return {"ours": call(bias_gelu), "torch.compile": call(compiled), "eager": call(plain)}

    cells = shape[0] * shape[1] * shape[2]
    label = f"[{shape[0]},{shape[1]},{shape[2]}] {str(dtype).removeprefix('torch.')}"
    label += " fwd+bwd" if backward else " fwd"
    moved = (5 if backward else 2) * cells * dtype.itemsize
    return Case(label, build, bytes_moved=moved, items=shape[0])
