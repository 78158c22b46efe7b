"""``fuse``: a timm vision transformer on this package's kernels, parameters and names untouched.

Each fused module changes its class and nothing else, so state dicts go both ways and ``unfuse`` is
the way back. Three kernels take over what moves bytes between the matrix products:

    attention        attention_qkvpacked between the two projections
    add_layer_norm   residual + LayerScale + DropPath + the next LayerNorm, over block borders too
    bias_gelu        bias of the first MLP layer + GELU

and one rewriting saves products: where the heads read prefix tokens alone (``global_pool="token"``)
the last block makes queries, projection and MLP for those only. Their keys and values still come
from every token, so outputs and gradients are the same sums; at 198 tokens and 12 blocks that is
10/12 of a block's parameter products, 6.9 % of all.

Hooks on modules that a kernel replaces (norms, LayerScale, DropPath, activation) do not fire in a
fused model; those on blocks do not where the whole stream is fused (``model(x)``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, Mlp
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from deit_fast.config import InputError
from deit_fast.kernels import add_layer_norm, attention_qkvpacked, bias_gelu

log = logging.getLogger("deit_fast")

KERNELS = ("attention", "add_layer_norm", "bias_gelu")
STOCHASTIC_DEPTH = ("sample", "subset")

DEFAULT_KERNELS = {
    # The kernels' references are PyTorch's own operations and would win nothing.
    "cpu": (),
    # By their bytes (docs/performance.md) all three win; not measured yet.
    "sm_80": KERNELS,
    "sm_90": KERNELS,
    "sm_100": KERNELS,
}


def default_kernels() -> tuple[str, ...]:
    """Kernels that are on for this machine's first GPU, or for a CPU."""
    if not torch.cuda.is_available():
        return DEFAULT_KERNELS["cpu"]
    major, _ = torch.cuda.get_device_capability()
    return DEFAULT_KERNELS.get(f"sm_{major}0", ())


# ---------------------------------------------------------------------------------------------
# The residual stream
# ---------------------------------------------------------------------------------------------


class _Branch(NamedTuple):
    """What waits to be added to the residual: with LayerScale's factor and DropPath's draws."""

    value: Tensor
    gamma: Tensor | None
    keep_scale: Tensor | None  # float [B], 0 or 1 / (1 - p)


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _drop_rate(drop: nn.Module) -> float:
    return drop.drop_prob or 0.0 if isinstance(drop, DropPath) and drop.training else 0.0


class BatchPart(NamedTuple):
    """Which part of a batch a forward sees.

    The position is a tensor because compiled code takes a tensor as an input, but compiles a number
    in as a constant: it would be compiled anew for each part of each rank.
    """

    first: Tensor  # int64 [1] on the model's device: position of the part's first sample
    whole: int  # samples of the whole batch


KeepScales = tuple[Tensor | None, Tensor | None]
"""DropPath's factors for the two halves of a block: float [B], 0 or 1 / (1 - p); None: no drop."""


def _keep_scales(drops: list[Any], x: Tensor, part: BatchPart | None) -> list[Tensor | None]:
    """DropPath's factor of each sample, for several DropPath modules.

    These are the draws that timm's drop_path would make for the whole batch, one module after the
    other; those of this part are returned.
    """
    rates = [_drop_rate(drop) for drop in drops]
    drawn = [place for place, rate in enumerate(rates) if rate > 0]
    scales: list[Tensor | None] = [None] * len(drops)
    if not drawn:
        return scales
    whole = len(x) if part is None else part.whole
    keep = x.new_empty((len(drawn), whole))
    for row, place in zip(keep.unbind(), drawn, strict=True):
        row.bernoulli_(1 - rates[place])
    if part is not None and whole != len(x):
        keep = keep.index_select(1, part.first + torch.arange(len(x), device=x.device))
    rows, kept_shares = [], []
    for row, place in zip(keep.float().unbind(), drawn, strict=True):
        scales[place] = row
        if drops[place].scale_by_keep and rates[place] < 1:
            rows.append(row)
            kept_shares.append(1 - rates[place])
    if torch.compiler.is_compiling():  # Inductor fuses these, but not the call for many tensors
        for row, kept_share in zip(rows, kept_shares, strict=True):
            row.div_(kept_share)
    elif rows:
        torch._foreach_div_(rows, kept_shares)
    return scales


def _draw_ahead(blocks: list[Any], x: Tensor, part: BatchPart | None) -> list[KeepScales]:
    """The factors of all blocks, before the first of them runs."""
    drops = [drop for block in blocks for drop in (block.drop_path1, block.drop_path2)]
    scales = _keep_scales(drops, x, part)
    return list(zip(scales[::2], scales[1::2], strict=True))


def _add(residual: Tensor, branch: _Branch | None) -> Tensor:
    if branch is None:
        return residual
    value = branch.value if branch.gamma is None else branch.value * branch.gamma
    if branch.keep_scale is not None:
        keep = branch.keep_scale.to(value.dtype)
        value = value * keep.view(-1, *(1,) * (value.dim() - 1))
    return residual + value


def _add_norm(
    residual: Tensor, branch: _Branch | None, norm: nn.Module, kernels: frozenset[str]
) -> tuple[Tensor, Tensor]:
    """The sum, and the sum normed."""
    if "add_layer_norm" not in kernels or not isinstance(norm, nn.LayerNorm):
        residual = _add(residual, branch)
        return residual, norm(residual)
    value, gamma, keep_scale = branch or (None, None, None)
    return add_layer_norm(
        residual, value, norm.weight, norm.bias, gamma=gamma, keep_scale=keep_scale, eps=norm.eps
    )


class _Stream:
    """The residual stream through blocks, a branch always waiting to be added.

    subset: efficient stochastic depth (Oquab et al. 2023, DINOv2, appendix): see ``fuse``.
    keep_scales: of the next block, where they were drawn ahead; otherwise the block draws them.
    """

    def __init__(
        self, residual: Tensor, kernels: frozenset[str], subset: bool,
        part: BatchPart | None = None,
    ) -> None:  # fmt: skip
        self.residual, self.kernels, self.subset, self.part = residual, kernels, subset, part
        self.branch: _Branch | None = None
        self.keep_scales: KeepScales | None = None

    def keep_scale(self, half: int, drop: nn.Module) -> Tensor | None:
        """DropPath's factors for the first (0) or second (1) half of a block."""
        if self.keep_scales is not None:
            return self.keep_scales[half]
        return _keep_scales([drop], self.residual, self.part)[0]

    def half(
        self, half: int, norm: nn.Module, function: Callable[[Tensor], Tensor], scale: nn.Module,
        drop: nn.Module,
    ) -> None:  # fmt: skip
        """residual += drop(scale(function(norm(residual))))."""
        if self.subset and (rate := _drop_rate(drop)) > 0:
            self._half_of_a_subset(norm, function, scale, rate)
            return
        _, normed = self.norm(norm)
        value = function(normed)
        self.branch = _Branch(value, _gamma(scale), self.keep_scale(half, drop))

    def _half_of_a_subset(
        self, norm: nn.Module, function: Callable[[Tensor], Tensor], scale: nn.Module, rate: float
    ) -> None:
        residual = self.add()
        samples = len(residual)
        kept = max(1, round(samples * (1 - rate)))
        chosen = torch.randperm(samples, device=residual.device)[:kept]
        _, normed = _add_norm(residual.index_select(0, chosen), None, norm, self.kernels)
        value, gamma = function(normed), _gamma(scale)
        value = value if gamma is None else value * gamma
        value = value.to(residual.dtype)
        self.residual = residual.index_add(0, chosen, value, alpha=samples / kept)

    def norm(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Add what waits; returns the residual and the residual normed."""
        residual, normed = _add_norm(self.residual, self.branch, norm, self.kernels)
        self.residual, self.branch = residual, None
        return residual, normed

    def add(self) -> Tensor:
        """Add what waits; returns the residual."""
        self.residual, self.branch = _add(self.residual, self.branch), None
        return self.residual

    def keep_tokens(self, count: int) -> None:
        """Go on with each sample's first tokens alone."""
        self.residual = self.residual[:, :count]
        if self.branch is not None:
            self.branch = self.branch._replace(value=self.branch.value[:, :count])


# ---------------------------------------------------------------------------------------------
# Fused modules: forward is all they change
# ---------------------------------------------------------------------------------------------


class FusedAttention(Attention):
    """timm's Attention on attention_qkvpacked; with a mask or dropout timm's own."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal or (self.training and self.attn_drop.p > 0):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        x = attention_qkvpacked(qkv, self.scale).flatten(2)
        return self.proj_drop(self.proj(x))


class FusedMlp(Mlp):
    """timm's Mlp, its first bias added by the activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class FusedBlock(Block):
    """timm's Block on a residual stream.

    Attributes:
        kernels: names of the kernels that it runs on.
        subset: whether stochastic depth drops whole samples from the computation.
        draws_ahead: whether DropPath's draws are made before the block runs. A compiled block then
            takes them as tensors, and blocks that differ in nothing but their drop rates share one
            compilation: a rate that the block itself read would be compiled in as a constant.
    """

    kernels: frozenset[str]
    subset: bool
    draws_ahead: bool

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        stream = _Stream(x, self.kernels, self.subset)
        if self.draws_ahead:
            stream.keep_scales = _draw_ahead([self], x, None)[0]
        self.run(stream)
        return stream.add()

    def __getstate__(self) -> dict[str, Any]:
        # A compiled method is bound to this block: in a copy it would compute with its weights.
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in COMPILED_METHODS}

    def run(self, stream: _Stream) -> None:
        stream.half(0, self.norm1, self.attn, self.ls1, self.drop_path1)
        stream.half(1, self.norm2, self.mlp, self.ls2, self.drop_path2)

    def run_last(self, stream: _Stream, tokens: int) -> None:
        """As ``run``, but only the first tokens come out."""
        attention: Any = self.attn
        drops = attention.training and attention.attn_drop.p > 0
        whole = drops or _why_not_attention(attention) is not None
        if whole or (stream.subset and _drop_rate(self.drop_path1) > 0):
            stream.half(0, self.norm1, self.attn, self.ls1, self.drop_path1)
            stream.keep_tokens(tokens)
        else:
            _, normed = stream.norm(self.norm1)
            value = _attend(attention, normed, tokens)
            stream.keep_tokens(tokens)
            keep_scale = stream.keep_scale(0, self.drop_path1)
            stream.branch = _Branch(value, _gamma(self.ls1), keep_scale)
        stream.half(1, self.norm2, self.mlp, self.ls2, self.drop_path2)


def _attend(attention: Any, x: Tensor, tokens: int) -> Tensor:
    """Attention of the first tokens to all."""
    width, heads, bias = attention.attn_dim, attention.num_heads, attention.qkv.bias
    weight_q, weight_kv = attention.qkv.weight.split((width, 2 * width))
    bias_q, bias_kv = (None, None) if bias is None else bias.split((width, 2 * width))
    q = F.linear(x[:, :tokens], weight_q, bias_q).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = F.linear(x, weight_kv, bias_kv).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return attention.proj_drop(attention.proj(x.transpose(1, 2).flatten(2)))


class _FusedForward(VisionTransformer):
    """``model(x)`` on one stream from the first block to the final norm."""

    batch_part: BatchPart | None = None

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        if arguments or options or self.grad_checkpointing or len(self.blocks) == 0:
            return super().forward(x, *arguments, **options)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        blocks: list[Any] = list(self.blocks)
        last = blocks[-1]
        stream = _Stream(x, last.kernels, last.subset, self.batch_part)
        scales: list[KeepScales | None] = [None] * len(blocks)
        if all(block.draws_ahead for block in blocks):
            scales[:] = _draw_ahead(blocks, x, self.batch_part)
        for block, keep_scales in zip(blocks[:-1], scales[:-1], strict=True):
            stream.keep_scales = keep_scales
            block.run(stream)
        stream.keep_scales = scales[-1]
        if self.global_pool == "token":
            last.run_last(stream, self.num_prefix_tokens)
        else:
            last.run(stream)
        _, normed = stream.norm(self.norm)
        return self.forward_head(normed)


_FUSED: dict[type, type] = {Attention: FusedAttention, Mlp: FusedMlp, Block: FusedBlock}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}
COMPILED_METHODS = ("run", "run_last")
"""Methods of a fused block that do its work: what is to be compiled of it."""


# ---------------------------------------------------------------------------------------------
# What can be fused
# ---------------------------------------------------------------------------------------------


def _why_not_attention(module: nn.Module) -> str | None:
    """None: queries, keys and values are three parts of one projection, used as they are."""
    if type(module) not in (Attention, FusedAttention):
        return f"is {type(module).__name__}, not timm's Attention"
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(module, name), nn.Identity):
            return f"has {name} {type(getattr(module, name)).__name__}"
    return "has a gate" if getattr(module, "gate", None) is not None else None


def _why_not_mlp(module: nn.Module) -> str | None:
    if type(module) not in (Mlp, FusedMlp):
        return f"is {type(module).__name__}, not timm's Mlp"
    if not isinstance(module.act, nn.GELU) or module.act.approximate != "none":
        return f"has activation {module.act}, not the exact GELU"
    if type(module.fc1) is not nn.Linear or module.fc1.bias is None:
        return "has a first layer that is no linear layer with a bias"
    return None


def _why_not_block(module: nn.Module) -> str | None:
    if type(module) not in (Block, FusedBlock):
        return f"is {type(module).__name__}, not timm's Block"
    for name in ("norm1", "norm2"):
        norm = getattr(module, name)
        if type(norm) not in (LayerNorm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return f"has {name} {type(norm).__name__}, not a LayerNorm with weight and bias"
    for name, known in (("ls", LayerScale), ("drop_path", DropPath)):
        for half in ("1", "2"):
            part = getattr(module, name + half)
            if type(part) not in (known, nn.Identity):
                return f"has {name + half} {type(part).__name__}"
    return None


def _has_plain_forward(model: nn.Module) -> bool:
    """Whether ``model(x)`` is timm's: embed, blocks in order, norm, head."""
    kind = type(model)
    names = ("forward", "forward_features")
    return all(getattr(kind, name) is getattr(VisionTransformer, name) for name in names)


# ---------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------


def fuse(
    model: nn.Module,
    *,
    kernels: Iterable[str] | None = None,
    stochastic_depth: str = "sample",
) -> nn.Module:
    """Swap the kernels into a timm vision transformer, in place.

    Parameters, buffers, their names and the shape of the output stay. A part that cannot be fused
    is named once, with the reason, in the log and is left as it is.

    Args:
        model: any timm ``VisionTransformer``, distilled or not, with or without LayerScale and
            DropPath.
        kernels: names from ``KERNELS``; by default those that win on this machine's GPU
            (``DEFAULT_KERNELS``), none on a CPU.
        stochastic_depth: "sample" drops each sample's branch with probability p, as timm does.
            "subset" computes each branch for a random round(B (1 - p)) samples only, scaled by
            B over that number: it saves the dropped samples' work. Each sample is kept as often as
            before, but the number kept is fixed rather than binomial, so samples of a batch are no
            longer independent, and p is rounded to a multiple of 1 / B.

    Returns:
        The model.

    Raises:
        InputError: not a timm VisionTransformer, or an unknown kernel or option, by name.
    """
    names = default_kernels() if kernels is None else tuple(kernels)
    unknown = sorted(set(names) - set(KERNELS))
    if unknown:
        raise InputError(f"unknown kernel {unknown[0]!r}: choose from {', '.join(KERNELS)}")
    if stochastic_depth not in STOCHASTIC_DEPTH:
        raise InputError(
            f"stochastic_depth must be one of {', '.join(STOCHASTIC_DEPTH)}, "
            f"not {stochastic_depth!r}"
        )
    if not isinstance(model, VisionTransformer):
        raise InputError(f"fuse takes a timm VisionTransformer, not {type(model).__name__}")
    unfuse(model)
    reasons: dict[str, list[int]] = {}
    for number, block in enumerate(model.blocks):
        for reason in _fuse_block(block, frozenset(names), stochastic_depth == "subset"):
            reasons.setdefault(reason, []).append(number)
    for reason, numbers in reasons.items():
        which = ", ".join(map(str, numbers))
        log.warning("not fused: block %s: %s", which, reason)
    if all(isinstance(block, FusedBlock) for block in model.blocks) and _has_plain_forward(model):
        kind = type(model)
        model.__class__ = type(f"Fused{kind.__name__}", (_FusedForward, kind), {})
    return model


def _fuse_block(block: Any, kernels: frozenset[str], subset: bool) -> list[str]:
    """Fuse what can be of one block; returns why the rest cannot."""
    reason = _why_not_block(block)
    if reason is not None:
        return [reason]
    reasons = []
    for name, part, why_not in (
        ("attention", block.attn, _why_not_attention),
        ("bias_gelu", block.mlp, _why_not_mlp),
    ):
        if name not in kernels:
            continue
        reason = why_not(part)
        if reason is None:
            part.__class__ = _FUSED[type(part)]
        else:
            reasons.append(f"{name}: {reason}")
    block.__class__ = FusedBlock
    block.kernels, block.subset = kernels, subset
    # Where dropout draws between the two halves, DropPath keeps timm's order and draws in its turn.
    dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in block.modules())
    block.draws_ahead = not subset and not dropout
    return reasons


def set_batch_part(model: nn.Module, first: int, whole: int) -> bool:
    """Let DropPath draw for a whole batch of which the model sees a part.

    The next training forwards make ``whole`` draws each and take those from sample ``first`` on, so
    that ranks and micro-batches with one seed drop what one process with the whole batch would.

    Returns:
        False, and nothing is changed, for a model without a fused stream.
    """
    if not isinstance(model, _FusedForward):
        return False
    device = next(model.parameters()).device
    part = model.batch_part
    if part is None or part.whole != whole or part.first.device != device:
        part = model.batch_part = BatchPart(torch.empty(1, dtype=torch.int64, device=device), whole)
    part.first.fill_(first)  # on the device's stream: the host does not wait
    return True


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse``, in place; a model that is not fused stays as it is."""
    for module in model.modules():
        plain = _PLAIN.get(type(module))
        if plain is None:
            continue
        module.__class__ = plain
        if plain is Block:
            for name in ("kernels", "subset", "draws_ahead", *COMPILED_METHODS):
                module.__dict__.pop(name, None)
    if isinstance(model, _FusedForward):
        model.__dict__.pop("batch_part", None)
        model.__class__ = type(model).__mro__[2]
    return model
