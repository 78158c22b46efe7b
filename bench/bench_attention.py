"""Self-attention of the packed projection [B, N, 3, H, D], forward alone and with its backward.

Bytes: a forward reads q, k, v and writes the output, 4 B N H D elements; a backward reads these
four and the output's gradient and writes three, 8 more. On a CPU ours is the reference in plain
PyTorch. The peers are what timm does: permute and unbind the projection, call PyTorch's attention,
transpose and reshape to [B, N, H D]. Each of its back-ends is requested by name: the peer to beat
is the best of them, not the one that PyTorch picks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deit_fast.kernels.attention import attention_qkvpacked

from .common import Case

BACKENDS = {
    "cpu": {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
}


def ours(qkv: Tensor) -> Tensor:
    return attention_qkvpacked(qkv).flatten(2)


def timm(qkv: Tensor) -> Tensor:
    """The attention of timm's VisionTransformer between its two projections."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def with_backend(
    backend: SDPBackend, attention: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(qkv)

    return run


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes = [(8, 198, 3), (2, 578, 3)]
    else:
        # DeiT-S first: what no time is left for comes last.
        shapes = [(256, tokens, heads) for tokens in (198, 578) for heads in (6, 3, 12)]
    # A CPU compiles for half a minute: there one graph serves all sizes.
    compiled = torch.compile(timm, dynamic=device == "cpu")
    return [
        case(device, *shape, backward, compiled) for shape in shapes for backward in (False, True)
    ]


def case(
    device: str,
    batch: int,
    tokens: int,
    heads: int,
    backward: bool,
    compiled: Callable[[Tensor], Tensor],
) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    width = 64

    def build() -> dict[str, Callable[[], Any] | str]:
        draw = torch.Generator(device).manual_seed(0)
        shape = (batch, tokens, 3, heads, width)
        qkv = torch.randn(shape, device=device, generator=draw).to(dtype)
        grad_out = torch.randn((batch, tokens, heads * width), device=device, generator=draw).to(
            dtype
        )

        def call(attention: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
            if backward:
                leaf = qkv.requires_grad_()
                return lambda: torch.autograd.grad(attention(leaf), leaf, grad_out)

            def forward() -> Tensor:
                with torch.no_grad():
                    return attention(qkv)

            return forward

        # The strongest peer comes second: what no time is left for comes last.
        implementations = {"ours": call(ours)}
        for name, backend in BACKENDS[device].items():
            implementations[f"sdpa {name}"] = call(with_backend(backend, timm))
        implementations["timm torch.compile"] = call(compiled)
        return dict(implementations)

    cells = batch * tokens * heads * width * dtype.itemsize
    label = f"B={batch} H={heads} N={tokens} D={width} {str(dtype).removeprefix('torch.')}"
    return Case(
        f"{label} {'forward+backward' if backward else 'forward'}",
        build,
        bytes_moved=(12 if backward else 4) * cells,
        items=batch,
    )
