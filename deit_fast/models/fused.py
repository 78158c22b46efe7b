"""The modules of a fused transformer: each is timm's class with another forward."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from deit_fast.kernels.attention import attention_qkvpacked, uses_kernels
from deit_fast.kernels.bias_gelu import bias_gelu
from deit_fast.kernels.bias_gelu_linear import bias_gelu_linear
from deit_fast.models.plain import (
    ATTENTIONS,
    DROP_PATHS,
    DROPOUTS,
    GELU,
    IDENTITY,
    LINEAR,
    SCALES,
    TOKENWISE,
    Part,
    called_parts,
    drops_attention,
    has_global_hooks,
    is_idle,
    is_plain,
    is_plain_norm,
    why_called,
)  # fmt: skip
from deit_fast.models.shadow import Shadow, linear
from deit_fast.models.stream import (
    BatchPart,
    Branch,
    KeepScales,
    Stream,
    draw_keep_scales,
    drop_patches,
    drop_rate,
    drops_patches,
    layer_scale,
)  # fmt: skip
from deit_fast.models.swapped import Swapped, SwappedModel, annotated_as, is_traced, traced
from deit_fast.models.widen import WideBlock, plain_tokens

log = logging.getLogger("deit_fast")

COMPILED_METHODS = ("run", "run_last")
"""Methods of a fused block that ``compile_blocks`` compiles."""

_ATTENTION_OPTIONS = {
    # as timm's Block passes them, for hooks and wrappers
    option.name: option.default
    for option in list(inspect.signature(Attention.forward).parameters.values())[2:]
}


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

    @annotated_as(Attention.forward)
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        is_timms = attn_mask is not None or is_causal or is_traced(x)
        if is_timms or not self._is_packed():
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self._attend(self.qkv(x), None)))

    def _is_packed(self) -> bool:
        """Whether between the projections there is only the softmax attention."""
        if not is_plain(self._modules["attn_drop"], DROPOUTS) or drops_attention(self):
            return False
        has_scale = self.fused_attn or self.scale == self.head_dim**-0.5  # fused_attn reads none
        return has_scale and why_not_attention(self) is None

    def _attend(self, qkv: Tensor, query_bias: Tensor | None) -> Tensor:
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim)
        return attention_qkvpacked(qkv, self.head_dim**-0.5, query_bias=query_bias).flatten(2)

    def without_bias_gradient(self, x: Tensor, shadows: bool) -> tuple[Tensor, Tensor | None]:
        """The output, and a tensor whose gradient is the column sums of the output's gradient.

        These sums are the gradient of the projection's bias. The gradient of the values' bias
        follows from them: attention weights sum to 1, so a bias of the values reaches the output
        through the projection's weight alone. The gradient of the keys' bias is 0.
        """
        qkv: Any = self.qkv
        proj = self.proj
        is_direct = is_plain(proj, LINEAR) and is_idle(self.proj_drop)
        if not is_direct or not self._is_packed():
            return self(x), None
        shadow = self.shadow("proj", shadows)
        folds = is_plain(qkv, LINEAR) and qkv.bias is not None and proj.bias is not None
        if not folds or not uses_kernels(x, self.head_dim):
            return linear(self._attend(qkv(x), None), proj, shadow), proj.bias
        of_queries, _, of_values = qkv.bias.chunk(3)
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

    @annotated_as(Mlp.forward)
    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) or why_not_mlp(self) is not None:
            return super().forward(x)
        if self._is_joined():
            return self.drop2(self._joined(x, False, self.fc2.bias))
        return self.drop2(self.fc2(self._hidden(x, False)))

    def without_bias_gradient(self, x: Tensor, shadows: bool) -> tuple[Tensor, Tensor | None]:
        """The output, and the bias whose gradient is the column sums of the output's gradient."""
        is_direct = is_plain(self.fc2, LINEAR) and is_idle(self.drop2)
        if not is_direct or why_not_mlp(self) is not None:
            return self(x), None
        bias = self.fc2.bias
        if self._is_joined():
            return self._joined(x, shadows, None if bias is None else bias.detach()), bias
        return linear(self._hidden(x, shadows), self.fc2, self.shadow("fc2", shadows)), bias

    def _hidden(self, x: Tensor, shadows: bool) -> Tensor:
        x = linear(x, self.fc1, self.shadow("fc1", shadows), has_bias=False)
        return self.norm(self.drop1(bias_gelu(x, self.fc1.bias)))

    def _is_joined(self) -> bool:
        if not self.joins_backward:
            return False
        norm, drop, layer = (self._modules[name] for name in ("norm", "drop1", "fc2"))
        return is_plain(norm, IDENTITY) and is_idle(drop) and is_plain(layer, LINEAR)

    def _joined(self, x: Tensor, shadows: bool, out_bias: Tensor | None) -> Tensor:
        x = linear(x, self.fc1, self.shadow("fc1", shadows), has_bias=False)
        shadow = self.shadow("fc2", shadows)
        if shadow is None:
            return bias_gelu_linear(x, self.fc1.bias, self.fc2.weight, out_bias)
        bias = out_bias if shadow.bias is None else shadow.bias
        return bias_gelu_linear(x, self.fc1.bias, self.fc2.weight, bias, shadow.weight)


def why_not_attention(module: Any) -> str | None:
    """Why a module cannot be a FusedAttention; None: it can.

    Queries, keys and values must be parts of one projection, without norms or a gate.
    """
    if type(module) is not Attention and not isinstance(module, FusedAttention):
        return f"is {type(module).__name__}, not timm's Attention"
    parts = module._modules  # module.q_norm takes as long as is_plain
    for name in ("q_norm", "k_norm", "norm"):
        if not is_plain(parts[name], IDENTITY):
            return f"has {name} {type(parts[name]).__name__}"
    return "has a gate" if getattr(module, "gate", None) is not None else None


def why_not_mlp(module: Any) -> str | None:
    """Why a module cannot be a FusedMlp; None: it can."""
    if type(module) is not Mlp and not isinstance(module, FusedMlp):
        return f"is {type(module).__name__}, not timm's Mlp"
    parts: Any = module._modules
    act, layer = parts["act"], parts["fc1"]
    if not is_plain(act, GELU) or act.approximate != "none":
        return f"has activation {act}, not the exact GELU"
    if not is_plain(layer, LINEAR) or layer._parameters.get("bias") is None:
        return "has a first layer that is no linear layer with a bias"
    return None


class FusedBlock(Swapped, Block):
    """timm's Block on a residual stream.

    Attributes:
        kernels: names of the kernels that it runs on.
        subset: whether stochastic depth drops whole samples from the computation.
    """

    swapped_from = Block
    set_by_fuse = (*COMPILED_METHODS, "kernels", "subset")
    left_out = COMPILED_METHODS  # a compiled method would run this block's weights in the copy
    kernels: frozenset[str]
    subset: bool

    @annotated_as(Block.forward)
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal or is_traced(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        stream = Stream(x, self.kernels, self.subset)
        if self.draws_ahead(called_parts(self)):
            stream.keep_scales = draw_keep_scales([self], x, None)[0]
        self.run(stream)
        return stream.add()

    def draws_ahead(self, called: list[Part]) -> bool:
        """Whether DropPath draws before the block runs.

        A compiled block then takes the factors as tensors, and blocks that differ only in their
        drop rates share one compilation. A rate that the block itself reads would become a compiled
        constant. Called parts may draw too, in the order of timm's block.
        """
        return not self.subset and not called

    def run(self, stream: Stream) -> None:
        self._run_attention(stream)
        self._run_mlp(stream)

    def run_last(self, stream: Stream, tokens: int) -> None:
        """As ``run``, but the output has only the first ``tokens`` of each sample.

        No part of the block may be one that is called.
        """
        attention: Any = self.attn
        takes_queries = why_not_attention(attention) is None and is_plain(attention.qkv, LINEAR)
        takes_queries = takes_queries and attention.fused_attn
        takes_queries = takes_queries and is_plain(self.ls1, SCALES)
        takes_queries = takes_queries and is_plain(self.drop_path1, DROP_PATHS)
        if not takes_queries or (stream.subset and drop_rate(self.drop_path1) > 0):
            self._run_attention(stream)
            stream.keep_tokens(tokens)
        else:
            normed = stream.add_norm(self.norm1)
            value, bias = _attend(attention, normed, tokens, stream.folds_bias)
            stream.keep_tokens(tokens)
            keep_scale = stream.keep_scale(0, self.drop_path1)
            stream.pending = Branch(value, layer_scale(self.ls1), keep_scale, bias)
        self._run_mlp(stream)

    def _run_attention(self, stream: Stream) -> None:
        parts: Any = self.norm1, self.attn, _FUSED_ATTENTION, self.ls1, self.drop_path1
        stream.run_branch(0, *parts, **_ATTENTION_OPTIONS)

    def _run_mlp(self, stream: Stream) -> None:
        stream.run_branch(1, self.norm2, self.mlp, _FUSED_MLP, self.ls2, self.drop_path2)


class FusedWideBlock(FusedBlock, WideBlock):
    """WideBlock on a residual stream, which gets another width."""

    swapped_from = WideBlock  # type: ignore[assignment]

    def run(self, stream: Stream) -> None:
        self._widen(stream)
        super().run(stream)

    def run_last(self, stream: Stream, tokens: int) -> None:
        self._widen(stream)
        super().run_last(stream, tokens)

    def _widen(self, stream: Stream) -> None:
        x = stream.add()
        weight = next(self.widen.parameters(), x)  # a bfloat16 residual is widened in float32
        stream.residual = self.widen(x.to(weight.dtype)).to(x.dtype)


_FUSED_ATTENTION, _FUSED_MLP = (FusedAttention,), (FusedMlp,)
FUSED_BLOCKS = (FusedBlock, FusedWideBlock)
ATTENTIONS.add(FusedAttention)
TOKENWISE.add(FusedMlp)


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
    x = F.scaled_dot_product_attention(q, k, v, scale=attention.head_dim**-0.5)
    x, proj = x.transpose(1, 2).flatten(2), attention.proj
    if folds_bias and is_plain(proj, LINEAR):
        return linear(x, proj, None), proj.bias
    return attention.proj_drop(proj(x)), None


class FusedPatchEmbed(Swapped, PatchEmbed):
    """timm's PatchEmbed that also accepts the rows of ``ingest(layout="patches")``."""

    swapped_from = PatchEmbed

    @annotated_as(PatchEmbed.forward)
    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) or x.dim() != 3:
            return super().forward(x)
        if not is_plain(self.proj, (nn.Conv2d,)):
            return super().forward(self._images(x))
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))

    def _images(self, rows: Tensor) -> Tensor:
        """[B, N, 3 P^2] to [B, 3, S, S]."""
        rows = rows.unflatten(2, (-1, *self.patch_size)).unflatten(1, self.grid_size)
        return rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


PREFIX_HEADS: set[Any] = {VisionTransformer.forward_head, VisionTransformerDistilled.forward_head}
"""Methods that read only prefix tokens where the pooling is that of a token. A subclass of ours is
added where it is defined."""


def _call(block: nn.Module, stream: Stream, residual_dtype: torch.dtype | None) -> None:
    """Run a block as timm does, in the dtype of its weights if the residual has another one."""
    x = stream.add()
    if residual_dtype is None or x.dtype != residual_dtype:
        stream.residual = block(x)
    else:
        stream.residual = block(x.to(next(block.parameters(), x).dtype)).to(residual_dtype)


class FusedForward(SwappedModel, VisionTransformer):
    """``model(x)`` on one stream from the first block to the final norm.

    Attributes:
        batch_part: of the next training forwards, see ``set_batch_part``.
        residual_dtype: of the stream; None: the embedding's.
        reads_shadows: whether products read shadow weights; ``Shadows.current`` sets it.
    """

    set_by_fuse = ("embed", "batch_part", "residual_dtype", "reads_shadows", "said")
    left_out = ("embed", "batch_part", "reads_shadows")  # embed may be compiled
    batch_part: BatchPart | None = None
    residual_dtype: torch.dtype | None = None
    reads_shadows: bool = False

    @annotated_as(VisionTransformer.forward)
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        if isinstance(x, torch.fx.Proxy):
            with traced(x, VisionTransformer.forward):
                return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if attn_mask is not None or is_causal or is_traced(x) or not self.runs_stream():
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.forward_head(self.forward_stream(x))

    def runs_stream(self) -> bool:
        """Whether timm's forward would call the blocks one after the other and nothing else."""
        if self.grad_checkpointing or "forward_features" in self.__dict__:
            return False
        return is_plain(self.blocks, (nn.Sequential,)) and len(self.blocks) > 0

    def forward_stream(self, x: Tensor) -> Tensor:
        """The final norm's tokens, at least those that the heads read."""
        return self._run_blocks(x, is_whole=not self._heads_read_prefix()).add_norm(self.norm)

    def forward_tokens(
        self, x: Tensor, tap: int | None = None, is_whole: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the final norm and of one block, [B, tokens, width] each.

        Args:
            tap: number of the block whose output is given; None: the last.
            is_whole: whether all tokens of the last block and the final norm are needed, or those
                that the heads read; inner blocks have all of them.
        """
        if not self.runs_stream() and tap is None:
            return plain_tokens(self, x)
        tap = len(self.blocks) - 1 if tap is None else tap
        is_whole = is_whole or not self._heads_read_prefix()
        stream = self._run_blocks(x, is_whole, tap)
        normed = stream.add_norm(self.norm)
        assert stream.tapped is not None
        return normed, stream.tapped

    def _run_blocks(self, x: Tensor, is_whole: bool, tap: int | None = None) -> Stream:
        """The stream behind the last block, with all tokens or with the prefix tokens alone."""
        x = self.embed(x)
        if drops_patches(self.patch_drop):
            x = drop_patches(x, self.patch_drop, self.batch_part)
            x = x if self._norms_early() else self._to_residual(self.norm_pre(x))
        blocks: list[Any] = list(self.blocks)
        fused = [is_plain(block, FUSED_BLOCKS) for block in blocks]
        called = [
            called_parts(block) if runs else [Part("", block)]
            for block, runs in zip(blocks, fused, strict=True)
        ]
        if any(called) and not torch.compiler.is_compiling():
            self._say(called)
        stream = self._stream(x, blocks, fused)
        scales: list[KeepScales | None] = [None] * len(blocks)
        ahead = not stream.subset and not any(called)
        if ahead:
            scales[:] = draw_keep_scales(blocks, x, stream.part)
        for number, block in enumerate(blocks):  # one object may stand at several positions
            runs, parts, drawn = fused[number], called[number], scales[number]
            if not runs:
                _call(block, stream, self.residual_dtype)
            else:
                if not ahead and block.draws_ahead(parts):
                    drawn = draw_keep_scales([block], x, stream.part)[0]
                stream.keep_scales = drawn
                if number == len(blocks) - 1 and not parts and not is_whole:
                    block.run_last(stream, self.num_prefix_tokens)
                else:
                    block.run(stream)
            stream.taps = number == tap
        return stream

    def _stream(self, x: Tensor, blocks: list[Any], fused: list[bool]) -> Stream:
        """The stream at the first block; all fused blocks have the same options."""
        first = blocks[fused.index(True)] if any(fused) else None
        kernels, subset = (first.kernels, first.subset) if first else (frozenset[str](), False)
        part = self.batch_part if self.training else None
        dtype = next(self.blocks.parameters(), x).dtype if self.residual_dtype else None
        shadows = self.reads_shadows
        return Stream(x, kernels, subset, part, dtype=dtype, folds_bias=True, shadows=shadows)

    def _heads_read_prefix(self) -> bool:
        """Whether nothing behind the last block reads other tokens than the first ones."""
        if self.global_pool != "token" or bool(self.attn_pool):
            return False
        if "forward_head" in self.__dict__ or "pool" in self.__dict__:
            return False
        kind = type(self)
        if kind.pool is not VisionTransformer.pool or kind.forward_head not in PREFIX_HEADS:
            return False
        return is_plain(self.norm, IDENTITY) or is_plain_norm(self.norm)

    def _say(self, called: list[list[Part]]) -> None:
        """Log each reason why parts of blocks are called as modules, once for this model."""
        numbers: dict[str, list[int]] = {}
        for number, parts in enumerate(called):
            for part in parts:
                if reason := why_called(part.module):
                    numbers.setdefault(f"{part.path} {reason}".strip(), []).append(number)
        if has_global_hooks():
            numbers = {"torch has hooks for all modules": list(range(len(called)))}
        said = self.__dict__.setdefault("said", set())
        for reason in [reason for reason in numbers if reason not in said]:
            which = ", ".join(map(str, numbers[reason]))
            log.warning("not fused: block %s: %s: called as in timm's model", which, reason)
            said.add(reason)

    def embed(self, x: Tensor) -> Tensor:
        """The input of the first block [B, N, C], from images or from rows of patches.

        ``forward_stream`` drops patches afterwards, outside of what is compiled.
        """
        x = self._pos_embed(self.patch_embed(x))
        if not drops_patches(self.patch_drop):
            return self._to_residual(self.norm_pre(self.patch_drop(x)))
        return self._to_residual(self.norm_pre(x)) if self._norms_early() else x

    def _norms_early(self) -> bool:
        """Whether the dropped patches do not change what norm_pre makes of the others."""
        return is_plain(self.norm_pre, IDENTITY) or is_plain_norm(self.norm_pre)

    def _to_residual(self, x: Tensor) -> Tensor:
        # Computed in its own dtype and rounded once.
        return x.to(self.residual_dtype) if self.residual_dtype and x.dtype == torch.float32 else x


def expect_hooks(model: nn.Module, path: str) -> None:
    """Leave hooks that this package sets on a model out of its warnings.

    Args:
        path: of the module inside each block; "" is the block itself.
    """
    if isinstance(model, FusedForward):
        model.__dict__.setdefault("said", set()).add(f"{path} has a hook".strip())
