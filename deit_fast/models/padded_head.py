"""Heads whose rows of logits are aligned to 16 bytes, so that the loss kernel can load 16 at once.

A row of 21841 bf16 logits is 43682 bytes, so the next one is not aligned and the loss kernel has to
read single elements. A padded head writes the same logits into rows of 21848. The product, the
parameters, their names and the checkpoint do not change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.kernels.launching import operator
from deit_fast.models.plain import has_plain_weights
from deit_fast.models.swapped import is_traced

ALIGNMENT = 16  # bytes


def _row_length(weight: Tensor, dtype: torch.dtype) -> int:
    vector = ALIGNMENT // dtype.itemsize
    return -(-weight.shape[0] // vector) * vector


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """Memory for [B, C] whose rows, the last included, are padded to a multiple of 16 bytes.

    It is no view of the whole rows: autograd refuses to change the view of an operator in place.
    """
    length = _row_length(weight, x.dtype)
    storage = x.new_empty((x.shape[0], length)).untyped_storage()
    return x.new_empty(0).set_(storage, 0, (x.shape[0], weight.shape[0]), (length, 1))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    strides = _row_length(weight, x.dtype), 1
    return x.new_empty_strided((x.shape[0], weight.shape[0]), strides)


def _padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _rows(x, weight)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        grad.mm(weight) if for_x else None,
        grad.t().mm(x) if for_weight else None,
        grad.sum(0) if ctx.has_bias and for_bias else None,
    )


padded_linear = operator(
    "padded_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _padded_linear, _fake,
)  # fmt: skip
torch.library.register_autograd("deit_fast::padded_linear", _backward, setup_context=_save)


def _padded(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias, kind = layer.weight, layer.bias, x.device.type
    if is_traced(x) or x.dim() != 2 or not has_plain_weights(layer):
        return F.linear(x, weight, bias)
    autocasts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocasts else weight.dtype
    is_aligned = layer.out_features * dtype.itemsize % ALIGNMENT == 0
    if is_aligned or not (autocasts or x.dtype == dtype):
        return F.linear(x, weight, bias)
    cast = None if bias is None else bias.to(dtype)
    return padded_linear(x.to(dtype), weight.to(dtype), cast)  # type: ignore[no-any-return]


class PaddedLinear(nn.Linear):
    """``nn.Linear`` whose output rows are aligned to 16 bytes."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] to [B, C] in rows of a multiple of 16 bytes. Other shapes stay unpadded."""
        if torch.jit.is_scripting():
            y = F.linear(x, self.weight, self.bias)
        else:  # torch.jit.script does not read this branch
            y = _padded(self, x)
        return y


def pad_heads(model: nn.Module) -> nn.Module:
    """Make the heads of a timm model write padded rows, in place.

    Raises:
        InputError: a head is not a plain linear layer.
    """
    found: dict[str, nn.Module] = {
        name: getattr(model, name) for name in ("head", "head_dist") if hasattr(model, name)
    }
    if "head" not in found:
        raise InputError(f"pad_head needs a model with a layer `head`, not {type(model).__name__}")
    for name, head in found.items():
        if type(head) not in (nn.Linear, PaddedLinear):
            raise InputError(
                f"pad_head needs linear heads, but {name} of {type(model).__name__} is "
                f"{type(head).__name__}"
            )
    for head in found.values():
        head.__class__ = PaddedLinear
    return model
