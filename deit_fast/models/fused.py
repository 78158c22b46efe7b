"""The modules of a fused transformer: each is timm's class with another forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from deit_fast.kernels.attention import attention_qkvpacked, uses_kernels
from deit_fast.kernels.bias_gelu import bias_gelu
from deit_fast.kernels.bias_gelu_linear import bias_gelu_linear
from deit_fast.models.shadow import Shadow, linear
from deit_fast.models.stream import (
    BatchPart,
    Branch,
    KeepScales,
    Stream,
    draw_keep_scales,
    drop_rate,
    layer_scale,
)  # fmt: skip
from deit_fast.models.swapped import Swapped, SwappedModel, is_traced

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
COMPILED_METHODS = ("run", "run_last")
"""Methods of a fused block that ``compile_blocks`` compiles."""


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer only multiplies: it has no wrapper and no hook."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    return not any(getattr(layer, name) for name in _HOOKS)


def _drops(drop: nn.Module) -> bool:
    """Whether a Dropout, or the module in its position, changes its input."""
    return drop.training and getattr(drop, "p", 0.0) > 0


class _Shadowed(Swapped):
    """A module whose linear layers may have shadow weights; copies and pickles leave them out."""

    set_by_fuse: tuple[str, ...] = ("shadows",)
    left_out = ("shadows",)
    shadowed_layers: tuple[str, ...]
    shadows: dict[str, Shadow] | None = None

    def shadow(self, name: str, is_read: bool) -> Shadow | None:
        return self.shadows[name] if is_read and self.shadows and name in self.shadows else None


class FusedAttention(_Shadowed, Attention):
    """timm's Attention on attention_qkvpacked; with a mask or dropout timm's own."""

    swapped_from = Attention
    shadowed_layers = ("qkv", "proj")

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        is_timms = attn_mask is not None or is_causal or is_traced(x)
        if is_timms or _drops(self.attn_drop):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self._attend(self.qkv(x), None)))

    def _attend(self, qkv: Tensor, query_bias: Tensor | None) -> Tensor:
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim)
        return attention_qkvpacked(qkv, self.scale, query_bias=query_bias).flatten(2)

    def without_bias_gradient(self, x: Tensor, shadows: bool) -> tuple[Tensor, Tensor | None]:
        """The output, and a tensor whose gradient is the column sums of the output's gradient.

        These sums are the gradient of the projection's bias. The gradient of the values' bias
        follows from them: attention weights sum to 1, so a bias of the values reaches the output
        through the projection's weight alone. The gradient of the keys' bias is 0.
        """
        qkv, proj, bias = self.qkv, self.proj, self.qkv.bias
        if _drops(self.attn_drop) or _drops(self.proj_drop) or not is_plain(proj):
            return self(x), None
        shadow = self.shadow("proj", shadows)
        folds = bias is not None and proj.bias is not None and is_plain(qkv)
        if not folds or not uses_kernels(x, self.head_dim):
            return linear(self._attend(qkv(x), None), proj, shadow), proj.bias
        of_queries, _, of_values = bias.chunk(3)
        x = self._attend(linear(x, qkv, self.shadow("qkv", shadows)), of_queries)
        with torch.autocast(x.device.type, enabled=False):
            zero = F.linear(of_values - of_values.detach(), proj.weight.detach())
        return linear(x, proj, shadow), proj.bias + zero


class FusedMlp(_Shadowed, Mlp):
    """timm's Mlp with the bias of the first layer added by the activation's kernel.

    Attributes:
        joins_backward: whether the backward multiplies fc2's input gradient by GELU's slope in one
            kernel. With dropout or a norm between the layers, or with a hook or a wrapper, it is
            not.
    """

    swapped_from = Mlp
    set_by_fuse = ("shadows", "joins_backward")
    shadowed_layers = ("fc1", "fc2")
    fc1: nn.Linear
    fc2: nn.Linear
    joins_backward: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) or not is_plain(self.fc1):
            return super().forward(x)
        if self._is_joined():
            return self.drop2(self._joined(x, False, self.fc2.bias))
        return self.drop2(self.fc2(self._hidden(x, False)))

    def without_bias_gradient(self, x: Tensor, shadows: bool) -> tuple[Tensor, Tensor | None]:
        """The output, and the bias whose gradient is the column sums of the output's gradient."""
        if _drops(self.drop2) or not is_plain(self.fc1) or not is_plain(self.fc2):
            return self(x), None
        bias = self.fc2.bias
        if self._is_joined():
            return self._joined(x, shadows, None if bias is None else bias.detach()), bias
        return linear(self._hidden(x, shadows), self.fc2, self.shadow("fc2", shadows)), bias

    def _hidden(self, x: Tensor, shadows: bool) -> Tensor:
        x = linear(x, self.fc1, self.shadow("fc1", shadows), has_bias=False)
        return self.norm(self.drop1(bias_gelu(x, self.fc1.bias)))

    def _is_joined(self) -> bool:
        if not self.joins_backward or _drops(self.drop1):
            return False
        is_direct = isinstance(self.norm, nn.Identity)
        return is_direct and is_plain(self.fc1) and is_plain(self.fc2)

    def _joined(self, x: Tensor, shadows: bool, out_bias: Tensor | None) -> Tensor:
        x = linear(x, self.fc1, self.shadow("fc1", shadows), has_bias=False)
        shadow = self.shadow("fc2", shadows)
        if shadow is None:
            return bias_gelu_linear(x, self.fc1.bias, self.fc2.weight, out_bias)
        bias = out_bias if shadow.bias is None else shadow.bias
        return bias_gelu_linear(x, self.fc1.bias, self.fc2.weight, bias, shadow.weight)


def why_not_attention(module: nn.Module) -> str | None:
    """Why a module cannot be a FusedAttention; None: it can.

    Queries, keys and values must be parts of one projection, without norms or a gate.
    """
    if type(module) not in (Attention, FusedAttention):
        return f"is {type(module).__name__}, not timm's Attention"
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(module, name), nn.Identity):
            return f"has {name} {type(getattr(module, name)).__name__}"
    return "has a gate" if getattr(module, "gate", None) is not None else None


class FusedBlock(Swapped, Block):
    """timm's Block on a residual stream.

    Attributes:
        kernels: names of the kernels that it runs on.
        subset: whether stochastic depth drops whole samples from the computation.
        draws_ahead: whether DropPath draws before the block runs. A compiled block then takes the
            factors as tensors, and blocks that differ only in their drop rates share one
            compilation. A rate that the block itself reads would become a compiled constant.
    """

    swapped_from = Block
    set_by_fuse = (*COMPILED_METHODS, "kernels", "subset", "draws_ahead")
    left_out = COMPILED_METHODS  # a compiled method would run this block's weights in the copy
    kernels: frozenset[str]
    subset: bool
    draws_ahead: bool

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal or is_traced(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        stream = Stream(x, self.kernels, self.subset)
        if self.draws_ahead:
            stream.keep_scales = draw_keep_scales([self], x, None)[0]
        self.run(stream)
        return stream.add()

    def run(self, stream: Stream) -> None:
        stream.run_branch(0, self.norm1, self.attn, self.ls1, self.drop_path1)
        stream.run_branch(1, self.norm2, self.mlp, self.ls2, self.drop_path2)

    def run_last(self, stream: Stream, tokens: int) -> None:
        """As ``run``, but the output has only the first ``tokens`` of each sample."""
        attention: Any = self.attn
        all_queries = why_not_attention(attention) is not None or _drops(attention.attn_drop)
        all_queries = all_queries or not is_plain(attention.qkv)
        if all_queries or (stream.subset and drop_rate(self.drop_path1) > 0):
            stream.run_branch(0, self.norm1, self.attn, self.ls1, self.drop_path1)
            stream.keep_tokens(tokens)
        else:
            normed = stream.add_norm(self.norm1)
            value, bias = _attend(attention, normed, tokens, stream.folds_bias)
            stream.keep_tokens(tokens)
            keep_scale = stream.keep_scale(0, self.drop_path1)
            stream.pending = Branch(value, layer_scale(self.ls1), keep_scale, bias)
        stream.run_branch(1, self.norm2, self.mlp, self.ls2, self.drop_path2)


def _attend(
    attention: Any, x: Tensor, tokens: int, folds_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of the first tokens to all tokens; and the projection's bias, if the next norm's
    kernel computes its gradient."""
    width, heads, bias = attention.attn_dim, attention.num_heads, attention.qkv.bias
    weight_q, weight_kv = attention.qkv.weight.split((width, 2 * width))
    bias_q, bias_kv = (None, None) if bias is None else bias.split((width, 2 * width))
    q = F.linear(x[:, :tokens], weight_q, bias_q).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = F.linear(x, weight_kv, bias_kv).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    x, proj = x.transpose(1, 2).flatten(2), attention.proj
    if folds_bias and is_plain(proj) and not _drops(attention.proj_drop):
        return linear(x, proj, None), proj.bias
    return attention.proj_drop(proj(x)), None


class FusedPatchEmbed(Swapped, PatchEmbed):
    """timm's PatchEmbed that also accepts the rows of ``ingest(layout="patches")``."""

    swapped_from = PatchEmbed

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) or x.dim() != 3:
            return super().forward(x)
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))


class FusedForward(SwappedModel, VisionTransformer):
    """``model(x)`` on one stream from the first block to the final norm.

    Attributes:
        batch_part: of the next training forwards, see ``set_batch_part``.
        residual_dtype: of the stream; None: the embedding's.
        reads_shadows: whether products read shadow weights; ``Shadows.current`` sets it.
    """

    set_by_fuse = ("embed", "batch_part", "residual_dtype", "reads_shadows")
    left_out = ("embed", "batch_part", "reads_shadows")  # embed may be compiled
    batch_part: BatchPart | None = None
    residual_dtype: torch.dtype | None = None
    reads_shadows: bool = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        is_timms = attn_mask is not None or is_causal or is_traced(x)
        if is_timms or self.grad_checkpointing or len(self.blocks) == 0:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.forward_head(self.forward_stream(x))

    def forward_stream(self, x: Tensor) -> Tensor:
        """The final norm's tokens, at least those that the head reads."""
        x = self.embed(x)
        blocks: list[Any] = list(self.blocks)
        last = blocks[-1]
        part = self.batch_part if self.training else None
        shadows = self.reads_shadows
        stream = Stream(x, last.kernels, last.subset, part, folds_bias=True, shadows=shadows)
        scales: list[KeepScales | None] = [None] * len(blocks)
        if all(block.draws_ahead for block in blocks):
            scales[:] = draw_keep_scales(blocks, x, part)
        for block, keep_scales in zip(blocks, scales, strict=True):
            stream.keep_scales = keep_scales
            if block is last and self.global_pool == "token":
                block.run_last(stream, self.num_prefix_tokens)
            else:
                block.run(stream)
        normed = stream.add_norm(self.norm)
        if isinstance(self.norm, nn.Identity) and normed.dtype == self.residual_dtype:
            normed = normed.to(last.norm2.weight.dtype)  # mean pooling and its norm run in float32
        return normed

    def embed(self, x: Tensor) -> Tensor:
        """The input of the first block [B, N, C], from images or from rows of patches."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        # Computed in its own dtype and rounded once.
        return x.to(self.residual_dtype) if self.residual_dtype and x.dtype == torch.float32 else x
