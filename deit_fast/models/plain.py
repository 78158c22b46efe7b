"""Which modules a fused model may run without calling them.

A fused model computes from the weights of its modules what the modules would compute. That is the
same only for a module of a known class to which nothing is attached: no hook, adapter, pruning,
parametrisation, sharding or quantisation. All of these come and go, so ``is_plain`` is asked at
each forward. A module that is not plain is called as timm calls it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, TypeGuard

import timm.layers
from timm.layers import Attention, DropPath, LayerNorm
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

LINEAR = (nn.Linear,)
GELU = (nn.GELU,)
NORMS = (LayerNorm, nn.LayerNorm)
IDENTITY = (nn.Identity,)
SCALES = (LayerScale, nn.Identity)
DROP_PATHS = (DropPath, nn.Identity)
DROPOUTS = (nn.Dropout, nn.Identity)

_OF_TIMM = (
    "GELUTanh", "GluMlp", "LayerNormFp32", "Mlp", "QuickGELU", "RmsNorm", "RmsNormFp32",
    "SimpleNorm", "SwiGLU",
)  # fmt: skip
TOKENWISE: set[type] = {
    DropPath, LayerNorm, LayerScale, nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear,
    nn.ReLU, nn.SiLU,
    *(getattr(timm.layers, name) for name in _OF_TIMM if hasattr(timm.layers, name)),
}  # fmt: skip
"""Parts of a block that work on each token alone. A fused class is added where it is defined."""
ATTENTIONS: set[type] = {Attention, getattr(timm.layers, "DiffAttention", Attention)}

_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
_GLOBAL_HOOKS = tuple(
    getattr(torch_module, f"_global_{name}_hooks")
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: Any, kinds: Collection[type]) -> bool:
    """Whether calling a module does nothing but run the forward of one of these classes.

    It is False for a subclass (parametrised, sharded, quantised layers have one), with a hook, also
    one of torch's hooks of all modules, with a ``forward`` of the instance or a compiled one, and
    for weights of another class of tensors (DTensor).
    """
    own = module.__dict__
    if (
        type(module) not in kinds
        or "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl")
        or any(_GLOBAL_HOOKS)
    ):
        return False
    return not own["_parameters"] or has_plain_weights(module)


def has_plain_weights(module: nn.Module) -> bool:
    """Whether a module's own parameters are tensors and no DTensor, quantised tensor and so on."""
    for weight in module.__dict__["_parameters"].values():
        if weight is not None and type(weight) not in _TENSORS:
            return False
    return True


def has_global_hooks() -> bool:
    """Whether torch calls a hook for every module, as its FLOP counter makes it do."""
    return any(_GLOBAL_HOOKS)


def is_plain_norm(norm: Any) -> TypeGuard[nn.LayerNorm]:
    """Whether a module is a plain LayerNorm of the last dimension, with weight and bias."""
    if not is_plain(norm, NORMS) or len(norm.normalized_shape) != 1:
        return False
    weights = norm._parameters  # norm.weight takes twice as long as all of is_plain
    # a weight that is a buffer has no entry
    return weights.get("weight") is not None and weights.get("bias") is not None


def draws(drop: Any) -> bool:
    """Whether a dropout draws random numbers when it is called."""
    return isinstance(drop, nn.Dropout) and drop.training and drop.p > 0


def drops_attention(attention: Any) -> bool:
    """Whether timm's attention drops weights: with ``fused_attn`` it reads only the dropout's rate,
    and its own mode."""
    drop = attention._modules["attn_drop"]
    if not attention.fused_attn:
        return draws(drop)
    return attention.training and (type(drop) is not nn.Dropout or drop.p > 0)


def is_idle(drop: Any) -> bool:
    """Whether a dropout is plain and returns its input."""
    return is_plain(drop, DROPOUTS) and not draws(drop)


class Part(NamedTuple):
    """A module inside a block."""

    path: str
    module: nn.Module


def called_parts(block: nn.Module) -> list[Part]:
    """The modules below a block that must be called, and the dropouts that draw.

    Where there is none, the block draws nothing but the factors of its DropPath modules, and what
    follows its attention works on each token alone.
    """
    found: list[Part] = []
    _find(block, "", found)
    return found


def _find(parent: nn.Module, path: str, found: list[Part]) -> None:
    for name, module in parent._modules.items():
        if module is None:
            continue
        is_known = is_plain(module, ATTENTIONS if name == "attn" else TOKENWISE)
        of_attention = name == "attn_drop" and type(module) is nn.Dropout
        is_drawing = drops_attention(parent) if of_attention else draws(module)
        if not is_known or is_drawing:
            found.append(Part(path + name, module))
        elif module._modules:
            _find(module, f"{path}{name}.", found)


def why_called(module: nn.Module) -> str | None:
    """Why a module must be called; None for a dropout, which is always called."""
    own = module.__dict__
    if any(own[hooks] for hooks in _HOOKS):
        return "has a hook"
    if "forward" in own:
        return "has a forward of its own"
    if own.get("_compiled_call_impl"):
        return "is compiled"
    if not has_plain_weights(module):
        weight = next(w for w in own["_parameters"].values() if w is not None)
        return f"has weights of class {type(weight).__name__}"
    kind = type(module)
    return None if kind is nn.Dropout else f"is {kind.__module__}.{kind.__name__}"
