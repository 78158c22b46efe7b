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
    @torch.autograd.function.once_differentiable
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
        model: a fused model, on its device.
        dtype: of the copies: autocast's.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model: Any = model
        self.dtype = dtype
        self._modules: list[Any] = [
            module for module in model.modules() if getattr(module, "shadowed_layers", ())
        ]
        self._build()

    def _layers(self) -> Iterator[tuple[Any, str, nn.Linear]]:
        for module in self._modules:
            for name in module.shadowed_layers:
                layer = getattr(module, name)
                if type(layer) is nn.Linear:
                    yield module, name, layer

    def _parameters(self) -> list[Tensor]:
        pairs = ((layer.weight, layer.bias) for _, _, layer in self._layers())
        return [x for pair in pairs for x in pair if x is not None]

    def _build(self) -> None:
        self._sources = self._parameters()
        self._copies = [
            torch.empty_like(x, dtype=self.dtype, requires_grad=False) for x in self._sources
        ]
        copies = iter(self._copies)
        for module in self._modules:
            module.shadows = {}
        for module, name, layer in self._layers():
            weight, bias = next(copies), None if layer.bias is None else next(copies)
            module.shadows[name] = Shadow(weight, bias)

    def __len__(self) -> int:
        return len(self._copies)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters; a few launches for all of them.

        Layers and parameters that were replaced since the last call get new shadows.
        """
        now = [*map(id, self._parameters())]
        if now != [*map(id, self._sources)]:
            self._build()
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
