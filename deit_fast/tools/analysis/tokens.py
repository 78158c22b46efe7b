"""Tokens and attention of a vision transformer, observed by hooks during its ordinary forward."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_fast.models.fuse import FusedAttention
from deit_fast.models.fused import expect_hooks
from deit_fast.runtime.files import write_atomically

TILE, GAP = 160, 8  # of a strip: least side of a tile, and distance of two tiles, pixels


def layer_names(model: Any) -> list[str]:
    """Names of the layers of ``recorded_cosines``.

    `input` (tokens with position embedding, the input of the first block), `block 1` and so on
    (after each block), `final norm` (the input of the heads).
    """
    return ["input", *(f"block {i + 1}" for i in range(len(model.blocks))), "final norm"]


@contextmanager
def recorded_cosines(model: Any) -> Iterator[list[Tensor]]:
    """Inside the block, each forward appends a tensor for each of ``layer_names``.

    The tensor holds the cosine of class and distillation token, float [B]. A model without a
    distillation token appends none.
    """
    found: list[Tensor] = []

    def record(tokens: Tensor) -> None:
        found.append(F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float(), dim=1))

    with ExitStack() as hooks:
        if isinstance(model, VisionTransformerDistilled):
            expect_hooks(model, "")
            first = model.blocks[0]
            hooks.enter_context(first.register_forward_pre_hook(lambda *call: record(call[1][0])))
            for layer in (*model.blocks, model.norm):
                hooks.enter_context(layer.register_forward_hook(lambda *call: record(call[2])))
        yield found


def learned_cosine(model: Any) -> float:
    """Cosine of the learned vectors without position embedding; 0.06 in DeiT's section 5.2."""
    one, two = model.cls_token.detach().flatten(), model.dist_token.detach().flatten()
    return F.cosine_similarity(one.double(), two.double(), dim=0).item()


def head_cosines(model: Any) -> Tensor:
    """Cosine of the weight vectors of the two heads, class by class, float64 [C]."""
    one, two = model.head.weight.detach().double(), model.head_dist.weight.detach().double()
    return F.cosine_similarity(one, two, dim=1).cpu()


def why_no_attention(model: nn.Module) -> str | None:
    """Why the attention of a model's first tokens cannot be computed; None where it can."""
    if not isinstance(model, VisionTransformer):
        return "the student is not a timm VisionTransformer"
    if not model.has_class_token:
        return "the student has no class token"
    if model.global_pool == "avg":
        return "the student's head reads the mean of the patches, not a token"
    for number, block in enumerate(model.blocks):
        kind = type(getattr(block, "attn", None))
        if kind not in (Attention, FusedAttention):
            return f"block {number} has {kind.__name__}, not timm's Attention"
    return None


def token_names(model: nn.Module) -> list[str]:
    """Names of the tokens before the patches, in order."""
    distilled = isinstance(model, VisionTransformerDistilled)
    return ["class", "distillation"] if distilled else ["class"]


@torch.no_grad()
def attention_weights(model: Any, images: Tensor) -> list[Tensor]:
    """softmax(q k^T * scale) of each block, [B, H, N, N]; a row is the attention of one token.

    Fused attention does not materialise these, so they are recomputed from the output of the packed
    projection to queries, keys and values in an ordinary forward.

    Args:
        images: [B, 3, S, S], normalised.
    """
    packed: list[Tensor] = []
    expect_hooks(model, "attn.qkv")
    with ExitStack() as hooks:
        for block in model.blocks:
            qkv = block.attn.qkv
            hooks.enter_context(qkv.register_forward_hook(lambda *call: packed.append(call[2])))
        # not model(images): a fused stream computes the last block's queries for few tokens only
        model.forward_features(images)
    weights = []
    for block, qkv in zip(model.blocks, packed, strict=True):
        heads = block.attn.num_heads
        q, k, _ = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        scores = q.float() @ k.float().transpose(-2, -1) * block.attn.scale
        weights.append(scores.softmax(-1))
    return weights


def rollout(weights: list[Tensor]) -> Tensor:
    """Attention through all blocks, [B, N, N] (Abnar and Zuidema 2020, arXiv 2005.00928).

    The product of (mean over heads + identity) / 2; the identity represents the residual path. Rows
    sum to 1.
    """
    first = weights[0]
    identity = torch.eye(first.shape[-1], device=first.device, dtype=first.dtype)
    total = identity.expand(len(first), -1, -1)
    for weight in weights:
        total = (weight.mean(1) + identity) / 2 @ total
    return total


def token_maps(model: Any, rows: Tensor) -> Tensor:
    """Attention of the first tokens to the patches, [B, tokens, h, w], from rows [B, N, N]."""
    height, width = model.patch_embed.grid_size
    patches = rows[:, : len(token_names(model)), model.num_prefix_tokens :]
    return patches.unflatten(2, (height, width))


# ---------------------------------------------------------------------------------------------
# Attention maps as strips of PNG tiles
# ---------------------------------------------------------------------------------------------


def draw_strip(
    folder: Path,
    index: int,
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    maps: Tensor,
) -> str:
    """Write an image and its maps side by side; without text, which the page adds.

    Args:
        index: id of the image, part of the file's name.
        image: [3, S, S], normalised by ``mean`` and ``std``.
        maps: [n, h, w]; each is scaled to its own maximum.

    Returns:
        The file's name.
    """
    import matplotlib

    scale, shift = (np.array(values, np.float32)[:, None, None] for values in (std, mean))
    channels = (image.float().cpu().numpy() * scale + shift).clip(0, 1)
    tiles = [(channels * 255).round().astype(np.uint8).transpose(1, 2, 0)]
    colours = matplotlib.colormaps["viridis"]
    for values in maps.float().cpu().numpy():
        tiles.append(colours(values / max(values.max(), 1e-30), bytes=True)[..., :3])
    side = -(-TILE // len(tiles[0])) * len(tiles[0])  # a multiple, so that pixels stay square
    strip = Image.new("RGBA", (len(tiles) * (side + GAP) - GAP, side))
    for number, pixels in enumerate(tiles):
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        strip.paste(tile.resize((side, side), Image.Resampling.NEAREST), (number * (side + GAP), 0))
    content = io.BytesIO()
    strip.save(content, format="png", optimize=True)
    name = f"attention-{index}.png"
    write_atomically(folder / name, content.getvalue())
    return name
