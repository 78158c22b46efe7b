"""Tokens and attention of a vision transformer, observed by hooks during its ordinary forward."""

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
    """Why a model has no pair of tokens to compare; None where it has one."""
    if not isinstance(model, VisionTransformerDistilled):
        return "the student has no distillation token"
    return None


class TokenCosines:
    """Within its context: cosine of class and distillation token in each layer of each forward.

    Attributes:
        names: `input` (tokens with position embedding, the input of the first block), `block 1`
            and so on (after each block), `final norm` (the input of the heads).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = ["input", *(f"block {i + 1}" for i in range(len(model.blocks))), "final norm"]
        self._found: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> TokenCosines:
        blocks = self.model.blocks
        self._hooks = [
            blocks[0].register_forward_pre_hook(lambda _, inputs: self._record(inputs[0])),
            *(
                layer.register_forward_hook(lambda *call: self._record(call[2]))
                for layer in (*blocks, self.model.norm)
            ),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """Cosines of the last forward, float [B, layers]."""
        cosines, self._found = torch.stack(self._found, dim=1), []
        assert cosines.shape[1] == len(self.names), "a layer did not run, or ran twice"
        return cosines

    def _record(self, tokens: Tensor) -> None:
        self._found.append(F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float(), dim=1))


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
    hooks = [
        block.attn.qkv.register_forward_hook(lambda *call: packed.append(call[2]))
        for block in model.blocks
    ]
    try:
        # not model(images): a fused stream computes the last block's queries for few tokens only
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
