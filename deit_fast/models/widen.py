"""Layers that change the width of the tokens, and the tokens of a model that may have them."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from deit_fast.models.plain import TOKENWISE


class Widen(nn.Module):
    """LayerNorm(W x) of each token, [..., narrow] to [..., width]; W has no bias.

    The result has the dtype of the tokens, under autocast too.
    """

    def __init__(self, narrow: int, width: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Linear(narrow, width, bias=False)
        self.norm = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).to(x.dtype))  # type: ignore[no-any-return]


TOKENWISE.add(Widen)


class WideBlock(Block):
    """timm's block of another width than its input: all tokens are widened before it.

    Args:
        narrow: width of the input.
        dim: width of the block and of its output.
        options: of timm's Block.
    """

    def __init__(self, narrow: int, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        norm: Any = self.norm1
        self.widen = Widen(narrow, dim, norm.eps)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return super().forward(self.widen(x), attn_mask=attn_mask, is_causal=is_causal)


def plain_tokens(model: Any, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor]:
    """Tokens of the final norm and of a block, [B, tokens, width] each, by timm's own forward.

    Args:
        model: a vision transformer of timm.
        block: its number; a negative one counts from the last.
    """
    normed, (found,) = model.forward_intermediates(
        images, [block % len(model.blocks)], return_prefix_tokens=True, output_fmt="NLC"
    )
    if isinstance(found, tuple):  # the patches, and the tokens before them
        found = torch.cat(found[::-1], dim=1)
    return normed, found
