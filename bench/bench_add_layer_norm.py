"""residual + keep_scale * gamma * branch and its LayerNorm, forward and forward with backward.

Shapes are those of DeiT-Ti, S and B: 256 images, 198 tokens; bfloat16 rows, float32 weights. With
stochastic depth ("keep"), with LayerScale too ("gamma keep"), over a bfloat16 and a float32 stream.

Bytes, in tensors of the shape: the forward reads residual and branch and writes their sum and its
norm, 4; the backward reads both gradients and the sum, with gamma also branch, and writes two
gradients, 5 or 6. Each counts in its own dtype; a few floats a row and the weights count nothing.

Peers: PyTorch's operations, eager and compiled; behind the same eager sum the norms of apex and
Liger, where they can be imported. On a CPU ours is the reference in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.add_layer_norm import add_layer_norm

from .common import Case

EPS, DROP = 1e-6, 0.1

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)


def apex_norm() -> Norm:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_layer_norm_affine(
            x, weight.to(x.dtype), bias.to(x.dtype), x.shape[-1:], eps=EPS
        )

    return norm


def liger_norm() -> Norm:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, weight.to(x.dtype), bias.to(x.dtype), EPS)

    return norm


def plain(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep: Tensor, norm: Norm = torch_norm,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in a block of timm, all in the dtype of the branch but the stream."""
    if gamma is not None:
        branch = branch * gamma.to(branch.dtype)
    x = residual + branch * keep.to(branch.dtype)[:, None, None]
    return x, norm(x, weight, bias).to(branch.dtype)


def ours(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return add_layer_norm(residual, branch, weight, bias, gamma=gamma, keep_scale=keep, eps=EPS)


def cases(device: str) -> list[Case]:
    batch, tokens = (4, 198) if device == "cpu" else (256, 198)
    half = torch.float32 if device == "cpu" else torch.bfloat16
    forms = [(half, "keep"), (half, "gamma keep")]
    if device != "cpu":
        # As DeiT trains under autocast: a float32 stream, no LayerScale.
        forms = [(torch.float32, "keep"), *forms, (torch.float32, "gamma keep")]
    # A CPU compiles for half a minute: there one graph serves all sizes.
    compiled = torch.compile(plain, dynamic=device == "cpu")
    return [
        case(device, (batch, tokens, channels), half, stream, form, backward, compiled)
        for channels in ((192, 384, 768) if device == "cpu" else (384, 192, 768))  # DeiT-S first
        for stream, form in forms
        for backward in (False, True)
    ]


def case(
    device: str, shape: tuple[int, int, int], half: torch.dtype, stream: torch.dtype, form: str,
    backward: bool, compiled: Callable[..., Any],
) -> Case:  # fmt: skip
    batch, tokens, channels = shape

    def build() -> dict[str, Callable[[], Any] | str]:
        draw = torch.Generator(device).manual_seed(0)

        def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, device=device, generator=draw).to(dtype)

        gamma = normal(channels) if "gamma" in form else None
        keep = (torch.rand(batch, device=device, generator=draw) >= DROP) / (1 - DROP)
        inputs = [normal(*shape, dtype=stream), normal(*shape, dtype=half)]
        inputs += [normal(channels), normal(channels)]
        gradients = [normal(*shape, dtype=stream), normal(*shape, dtype=half)]
        leaves = [x.requires_grad_() for x in (*inputs, *([] if gamma is None else [gamma]))]

        def call(function: Callable[..., Any], **options: Any) -> Callable[[], Any]:
            def forward() -> tuple[Tensor, Tensor]:
                return function(*inputs, gamma, keep, **options)

            if backward:
                return lambda: torch.autograd.grad(forward(), leaves, gradients)
            return torch.no_grad()(forward)

        implementations: dict[str, Callable[[], Any] | str] = {
            "ours": call(ours),
            "torch.compile": call(compiled),
            "eager": call(plain),
        }
        for name, make in (("apex", apex_norm), ("liger", liger_norm)):
            try:
                implementations[name] = call(plain, norm=make())
            except ImportError as error:
                implementations[name] = str(error)
        return implementations

    cells = batch * tokens * channels
    moved = 2 * cells * (stream.itemsize + half.itemsize)
    if backward:  # read both gradients, the sum and, for gamma, branch; write two gradients
        moved += cells * (3 * stream.itemsize + 2 * half.itemsize)
        moved += cells * half.itemsize if "gamma" in form else 0
    label = f"[{batch},{tokens},{channels}] {form} {str(half).removeprefix('torch.')}"
    label += "" if stream == half else " float32 stream"
    label += " fwd+bwd" if backward else " fwd"
    return Case(label, build, bytes_moved=moved, items=batch)
