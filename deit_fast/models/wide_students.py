"""Lift and WideLast: students whose features have the width of the teacher (arXiv 2511.15572).

A narrow transformer's last tokens use more directions than its width has. Two ways to give them the
teacher's width, so that features are compared without a projector that training throws away:

    lift       the final norm becomes z = LayerNorm(W x), and the classifier reads the mean of z
               over the patches
    wide_last  the last block and what follows it are wide; W and a LayerNorm come before the block,
               and the classifier reads the class token

The class of a timm model is changed and parts of it are replaced: everything else is timm's, and
``fuse`` takes it as any other. In a fused model the stream of the residual runs from end to end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import Attention, LayerNorm, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    LayerScale,
    VisionTransformer,
    init_weights_vit_timm,
)
from torch import Tensor, nn

from deit_fast.config import ModelConfig
from deit_fast.errors import InputError
from deit_fast.models.widen import WideBlock, Widen, plain_tokens


class WideStudent:
    """What Lift and WideLast add to a vision transformer of timm.

    Attributes:
        widen_path: name of the module that changes the width.
        new_parts: names of the modules that the narrow model has in another shape, or not at all.
        feature_is_normed: whether the feature is the output of the final norm, or its input.
    """

    widen_path: str
    new_parts: tuple[str, ...]
    feature_is_normed: bool

    def forward_with_features(self, images: Tensor) -> tuple[Any, Tensor]:
        """One forward that also gives what a teacher's patch tokens are compared with.

        Args:
            images: float [B, 3, S, S], normalised; or what else ``model(images)`` takes.

        Returns:
            What ``model(images)`` gives in the same mode, and the features [B, N, width] of the
            patches, row by row. Neither a class token nor a distillation token is among them.
        """
        model: Any = self
        normed, raw = model.forward_tokens(images)
        features = normed if self.feature_is_normed else raw
        return model.forward_head(normed), features[:, model.num_prefix_tokens :]

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of the final norm and of the last block; a fused model has its own."""
        return plain_tokens(self, images)


class Lift(WideStudent, VisionTransformer):
    """A transformer with a wide final norm; its feature z is the output of that norm."""

    widen_path, new_parts = "norm", ("norm", "head")
    feature_is_normed = True


class WideLast(WideStudent, VisionTransformer):
    """A transformer with a wide last block, whose output is the feature."""

    feature_is_normed = False

    @property
    def widen_path(self) -> str:  # type: ignore[override]
        return f"blocks.{len(self.blocks) - 1}.widen"

    @property
    def new_parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return f"blocks.{len(self.blocks) - 1}", "norm", "head", "head_dist"


class WideLastDistilled(WideLast, VisionTransformerDistilled):
    """WideLast with a distillation token and its head, which the paper does not have."""


def make_wide(name: str, model: nn.Module, head: str, width: int) -> None:
    """Make a model of timm, which is not fused, a Lift or WideLast student, in place.

    The new weights are drawn as in the code of the paper: those of Lift by torch's defaults, those
    of WideLast as timm's.

    Args:
        name: of the model, for messages.
        head: "lift" or "wide_last".
        width: of the features, the teacher's.

    Raises:
        InputError: the model cannot be one.
    """
    if (reason := _why_not(model, head)) is not None:
        raise InputError(f"model.head={head} needs a plain DeiT or ViT: {name!r} {reason}")
    wide: Any = model
    narrow, norm = wide.embed_dim, wide.norm
    if head == "lift":
        wide.norm = Widen(narrow, width, norm.eps)
        wide.global_pool = "avg"
        kind: type[nn.Module] = Lift
    else:
        wide.blocks[-1] = _wide_block(wide.blocks[-1], narrow, width)
        wide.norm = LayerNorm(width, eps=norm.eps)
        wide.feature_info[-1]["num_chs"] = width
        is_distilled = isinstance(model, VisionTransformerDistilled)
        kind = WideLastDistilled if is_distilled else WideLast
    for part in ("head", "head_dist"):
        if hasattr(wide, part):
            setattr(wide, part, nn.Linear(width, wide.num_classes))
            if head == "wide_last":
                init_weights_vit_timm(getattr(wide, part))
    wide.num_features = wide.head_hidden_size = width
    wide.__class__ = kind


def _why_not(model: nn.Module, head: str) -> str | None:
    """Why a model cannot be made wide, as the end of a message."""
    if not isinstance(model, VisionTransformer):
        return "is no vision transformer of timm"
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return f"is a {type(model).__name__}"
    if head == "lift" and isinstance(model, VisionTransformerDistilled):
        return "has a distillation token, and the head of lift reads the patches alone"
    if model.global_pool != "token" or not isinstance(model.norm, LayerNorm):
        return "has no classifier that reads a token after the final norm"
    last: Any = model.blocks[-1]
    parts = (
        ("attn", Attention),
        ("attn.q_norm", nn.Identity),
        ("mlp", Mlp),
        ("mlp.norm", nn.Identity),
    )
    for path, kind in (("", Block), *parts) if head == "wide_last" else ():
        part = last.get_submodule(path)
        if type(part) is not kind:
            return f"has {path or 'a block'} {type(part).__name__}, not {kind.__name__}"
    return None


def _wide_block(block: Any, narrow: int, width: int) -> WideBlock:
    """A block with the options of another one, with heads of 64 channels and an MLP of 4 widths."""
    scale, drop = block.ls1, block.drop_path1
    norm: Any = type(block.norm1)
    made = WideBlock(
        narrow, width,
        num_heads=width // ModelConfig.head_width,
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        init_values=scale.init_values if isinstance(scale, LayerScale) else None,
        drop_path=getattr(drop, "drop_prob", 0.0),
        act_layer=type(block.mlp.act),
        norm_layer=partial(norm, eps=block.norm1.eps),
    )  # fmt: skip
    made.apply(init_weights_vit_timm)
    return made
