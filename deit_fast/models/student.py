"""Students: timm's vision transformers under timm's parameter names, which are DeiT's own."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deit_fast.errors import InputError, did_you_mean
from deit_fast.models.factory import build_from_factory
from deit_fast.models.fuse import fuse, head_tokens
from deit_fast.models.padded_head import pad_heads


def create_student(
    name: str,
    num_classes: int,
    drop_path: float = 0.0,
    img_size: int = 224,
    *,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    fused: bool = True,
    stochastic_depth: str = "sample",
    residual: str = "float32",
    kernels: tuple[str, ...] | None = None,
    pad_head: bool = False,
) -> nn.Module:
    """Build a model to train, with random weights.

    Distilled transformers return ``(class_logits, distill_logits)`` in training mode and the mean
    of both in evaluation mode (DeiT, section 4). State dicts of facebookresearch/deit load
    unchanged.

    Args:
        name: a timm model name, or ``package.module:factory`` (then the factory alone decides
            the shape and the remaining arguments must stay at their defaults).
        num_classes: classes of each head.
        drop_path: stochastic depth rate of the last block; linear from 0 at the first.
        img_size: side of the input, pixels.
        patch_size, embed_dim, depth, num_heads: overrides of the named transformer.
        fused: run a timm VisionTransformer on this package's kernels, see ``fuse``.
        stochastic_depth: "sample" or "subset", see ``fuse``; "subset" needs ``fused``.
        residual: "float32" or "bfloat16", see ``fuse``; "bfloat16" needs ``fused``.
        kernels: see ``fuse``; None: those chosen for this machine's GPU. Others need ``fused``.
        pad_head: logits in rows that start on 16 bytes, see ``pad_heads``.

    Raises:
        InputError: unknown name, or an override that the model does not take.
    """
    shape = {
        key: value
        for key, value in {
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
        }.items()
        if value is not None
    }
    if ":" in name:
        if shape:
            raise InputError(f"model {name!r} does not take overrides, got {sorted(shape)}")
        if residual != "float32":
            raise InputError(f"residual {residual!r} needs a timm model, not {name!r}")
        if pad_head:
            raise InputError(f"pad_head needs a timm model, not {name!r}")
        if kernels is not None:
            raise InputError(f"kernels {', '.join(kernels)!r} needs a timm model, not {name!r}")
        if stochastic_depth != "sample":
            raise InputError(
                f"stochastic_depth {stochastic_depth!r} needs a timm model, not {name!r}"
            )
        return build_from_factory(name, num_classes)
    if not timm.is_model(name):
        raise InputError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}")
    arguments: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path}
    if timm.models.is_model_in_modules(name, ("deit", "vision_transformer")):
        arguments |= {"img_size": img_size} | shape
        _check_shape(name, img_size, shape)
    elif shape:
        raise InputError(f"model {name!r} does not take overrides, got {sorted(shape)}")
    model = timm.create_model(name, pretrained=False, **arguments)
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(True)
    if pad_head:
        pad_heads(model)
    if fused and isinstance(model, VisionTransformer):
        return fuse(model, kernels=kernels, stochastic_depth=stochastic_depth, residual=residual)
    if stochastic_depth != "sample":
        raise InputError(f"stochastic_depth {stochastic_depth!r} needs a fused transformer")
    if residual != "float32":
        raise InputError(f"residual {residual!r} needs a fused transformer")
    if kernels is not None:
        raise InputError(f"kernels {', '.join(kernels)} need a fused transformer")
    return model


def forward_heads(
    model: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of the class head and, where there is one, of the distillation head.

    Works in either mode, where the model itself returns the mean of the heads in evaluation mode.

    Args:
        images: float [B, 3, S, S], normalised.

    Returns:
        Two tensors [B, C]; the second is None for a model with one head.
    """
    if not isinstance(model, VisionTransformerDistilled):
        return model(images), None
    if model.training:
        return model(images)
    tokens = head_tokens(model, images)
    return model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])


def _check_shape(name: str, img_size: int, shape: dict[str, int]) -> None:
    patch = shape.get("patch_size")
    if patch is not None and img_size % patch:
        raise InputError(
            f"model {name!r}: image size {img_size} is no multiple of patch_size {patch}"
        )
    width, heads = shape.get("embed_dim"), shape.get("num_heads")
    if width is not None and heads is not None and width % heads:
        raise InputError(f"model {name!r}: embed_dim {width} is no multiple of num_heads {heads}")
