"""Shadow weights: half-precision copies of a fused model's weights, made once a step.

Under autocast every product casts its float32 weight, and the backward casts the weight's gradient
back: two launches a layer, for four layers a block. Shadow weights are cast in one launch for all
layers, and the product of the weight's gradient writes float32, without rounding in between.

A shadow is the rounded parameter, so the forward computes the same numbers as autocast. It is valid
until the parameter changes: call ``Shadows.refresh`` before each step, and run the forward inside
``with shadows.current():``. State dicts, copies and pickles of a model contain no shadows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.kernels.bias_gelu_linear import matmul
from deit_fast.kernels.launching import first_derivative_only
from deit_fast.models.plain import LINEAR, is_plain


class Shadow(NamedTuple):
    """Copies of a linear layer's parameters."""

    weight: Tensor
    bias: Tensor | None


class _Product(torch.autograd.Function):
    """``F.linear(x, shadow, bias)`` with the weight gradient in the dtype of ``weight``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shadow: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shadow)
        ctx.dtype = weight.dtype
        return F.linear(x, shadow, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, shadow = ctx.saved_tensors
        grad_x = grad @ shadow if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = matmul(grad.flatten(0, -2).t(), x.flatten(0, -2), ctx.dtype)
        return grad_x, grad_weight, None, None


def linear(x: Tensor, layer: nn.Linear, shadow: Shadow | None, has_bias: bool = True) -> Tensor:
    """``layer(x)`` without the gradient of the bias, or without the bias.

    Args:
        x: [..., in_features]; with a shadow it is cast to the shadow's dtype.
        layer: a plain linear layer.
        shadow: of the layer; None: use the layer's own weights.
        has_bias: whether the bias is added.
    """
    if shadow is not None:
        bias = shadow.bias if has_bias else None
        x = x.to(shadow.weight.dtype)
        return _Product.apply(x, layer.weight, shadow.weight, bias)  # type: ignore[no-any-return]
    bias = layer.bias.detach() if has_bias and layer.bias is not None else None
    return F.linear(x, layer.weight, bias)


class Shadows:
    """The shadow weights of a model.

    Args:
        model: a fused model, on its device, whose layers and parameters stay the same objects.
        dtype: of the copies: autocast's.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model: Any = model
        self.dtype = dtype
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []
        module: Any
        for module in model.modules():
            if names := getattr(module, "shadowed_layers", ()):
                layers = {name: getattr(module, name) for name in names}
                module.shadows = {
                    name: Shadow(self._copy(layer.weight), self._copy(layer.bias))
                    for name, layer in layers.items()
                    if is_plain(layer, LINEAR)
                }

    def _copy(self, source: Any) -> Any:
        """The shadow of a parameter, to be filled; None for None."""
        if source is None:
            return None
        self._sources.append(source)
        self._copies.append(torch.empty_like(source, dtype=self.dtype, requires_grad=False))
        return self._copies[-1]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters; a few launches for all of them."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Let the model's forward read the shadows, which must have been refreshed."""
        self.model.reads_shadows = True
        try:
            yield
        finally:
            self.model.reads_shadows = False
