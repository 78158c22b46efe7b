"""The tokens of a vision transformer, watched by hooks while it runs as it always does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_fast.models.fuse import FusedAttention


def why_no_cosines(model: nn.Module) -> str | None:
    """Why a model has no two tokens to compare; None where it has."""
    if not isinstance(model, VisionTransformerDistilled):
        return "the student has no distillation token"
    return None


class TokenCosines:
    """Cosine of class and distillation token, layer by layer, of each forward in its context.

    Attributes:
        names: `input` (tokens with their position embedding, as the first block gets them),
            `block 1` and so on (after each block), `final norm` (what the heads read).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = ["input", *(f"block {i + 1}" for i in range(len(model.blocks))), "final norm"]
        self._found: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> TokenCosines:
        blocks = self.model.blocks
        self._hooks = [
            blocks[0].register_forward_pre_hook(lambda _, inputs: self._note(inputs[0])),
            *(
                layer.register_forward_hook(lambda *call: self._note(call[2]))
                for layer in (*blocks, self.model.norm)
            ),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """Cosines of the forward that has just run, float [B, layers]."""
        cosines, self._found = torch.stack(self._found, dim=1), []
        assert cosines.shape[1] == len(self.names), "a layer was passed by, or ran twice"
        return cosines

    def _note(self, tokens: Tensor) -> None:
        self._found.append(F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float(), dim=1))


def learned_cosine(model: Any) -> float:
    """Cosine of the two learned vectors, without positions: 0.06 in DeiT's paper, section 5.2."""
    one, two = model.cls_token.detach().flatten(), model.dist_token.detach().flatten()
    return F.cosine_similarity(one.double(), two.double(), dim=0).item()


def head_cosines(model: Any) -> Tensor:
    """Cosine of both heads' weight vectors of each class, float64 [C]."""
    one, two = model.head.weight.detach().double(), model.head_dist.weight.detach().double()
    return F.cosine_similarity(one, two, dim=1).cpu()


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def why_no_attention(model: nn.Module) -> str | None:
    """Why a model's attention of its first tokens cannot be made; None where it can."""
    if not isinstance(model, VisionTransformer):
        return "the student is no timm VisionTransformer"
    if not model.has_class_token:
        return "the student has no class token"
    for number, block in enumerate(model.blocks):
        kind = type(getattr(block, "attn", None))
        if kind not in (Attention, FusedAttention):
            return f"block {number} has {kind.__name__}, not timm's Attention"
    return None


def token_names(model: nn.Module) -> list[str]:
    """Names of the first tokens, in their order."""
    distilled = isinstance(model, VisionTransformerDistilled)
    return ["class", "distillation"] if distilled else ["class"]


@torch.no_grad()
def attention_weights(model: Any, images: Tensor) -> list[Tensor]:
    """softmax(q k^T * scale) of each block, [B, H, N, N]; a row says where its token looks.

    Fused attention never builds these, so they are made again from what the packed projection of
    queries, keys and values gave in an ordinary forward.

    Args:
        images: [B, 3, S, S], normalised.
    """
    packed: list[Tensor] = []
    hooks = [
        block.attn.qkv.register_forward_hook(lambda *call: packed.append(call[2]))
        for block in model.blocks
    ]
    try:
        # not model(images): a fused stream makes the last block's queries for few tokens only
        model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
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

    The product of (mean over heads + identity) / 2, the identity standing for the residual path;
    rows sum to 1.
    """
    first = weights[0]
    identity = torch.eye(first.shape[-1], device=first.device, dtype=first.dtype)
    total = identity.expand(len(first), -1, -1)
    for weight in weights:
        total = (weight.mean(1) + identity) / 2 @ total
    return total


def token_maps(model: Any, rows: Tensor) -> Tensor:
    """Of attention rows [B, N, N], what the first tokens give to the patches: [B, tokens, h, w]."""
    height, width = model.patch_embed.grid_size
    patches = rows[:, : len(token_names(model)), model.num_prefix_tokens :]
    return patches.unflatten(2, (height, width))
