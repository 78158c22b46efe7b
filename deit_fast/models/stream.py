"""The residual stream of a fused transformer: the next norm's kernel adds each branch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, PatchDropout
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from deit_fast.kernels.add_layer_norm import add_layer_norm, uses_kernels, with_bias_gradient
from deit_fast.models.plain import DROP_PATHS, SCALES, is_plain, is_plain_norm


class Branch(NamedTuple):
    """Output of a branch that has not been added to the residual yet."""

    value: Tensor
    gamma: Tensor | None = None  # LayerScale's factor
    keep_scale: Tensor | None = None  # DropPath's factor, float [B], 0 or 1 / (1 - p)
    bias: Tensor | None = None  # included in value; the norm's kernel computes its gradient


def layer_scale(scale: Any) -> Tensor | None:
    """The factor of a plain LayerScale."""
    return scale.gamma if type(scale) is LayerScale else None


def drop_rate(drop: Any) -> float:
    """The rate of a plain DropPath in training."""
    return drop.drop_prob or 0.0 if type(drop) is DropPath and drop.training else 0.0


class BatchPart(NamedTuple):
    """The part of a batch that a forward processes.

    The offset is a tensor because a compiled function takes a tensor as an input but a number as a
    constant: it would be compiled again for each part of each rank.
    """

    offset: Tensor  # int64 [1] on the model's device: position of the part's first sample
    batch_size: int  # samples of the whole batch


KeepScales = tuple[Tensor | None, Tensor | None]
"""DropPath's factors, float [B], for the two branches of a block; None: the branch is kept."""


def _keep_scales(drops: list[Any], x: Tensor, part: BatchPart | None) -> list[Tensor | None]:
    """DropPath's factor of each sample, for several DropPath modules.

    These are the draws of timm's drop_path for the whole batch, one module after the other, of
    which those of this part are returned.
    """
    rates = [drop_rate(drop) for drop in drops]
    drawn = [index for index, rate in enumerate(rates) if rate > 0]
    scales: list[Tensor | None] = [None] * len(drops)
    if not drawn:
        return scales
    batch_size = len(x) if part is None else part.batch_size
    keep = x.new_empty((len(drawn), batch_size))
    for row, index in zip(keep.unbind(), drawn, strict=True):
        row.bernoulli_(1 - rates[index])
    if part is not None and batch_size != len(x):
        keep = keep.index_select(1, part.offset + torch.arange(len(x), device=x.device))
    rows, kept_shares = [], []
    for row, index in zip(keep.float().unbind(), drawn, strict=True):
        scales[index] = row
        if drops[index].scale_by_keep and rates[index] < 1:
            rows.append(row)
            kept_shares.append(1 - rates[index])
    if torch.compiler.is_compiling():  # Inductor fuses these divisions, but not _foreach_div_
        for row, kept_share in zip(rows, kept_shares, strict=True):
            row.div_(kept_share)
    elif rows:
        torch._foreach_div_(rows, kept_shares)
    return scales


def drops_patches(drop: Any) -> bool:
    """Whether a module is a plain PatchDropout that drops patches now."""
    return is_plain(drop, (PatchDropout,)) and drop.training and drop.prob > 0


def drop_patches(x: Tensor, drop: Any, part: BatchPart | None) -> Tensor:
    """What timm's PatchDropout keeps of the tokens [B, N, C]: all prefix tokens, some patches.

    These are its draws for the whole batch, of which those of this part are used.
    """
    samples, prefix, patches = len(x), drop.num_prefix_tokens, x.shape[1] - drop.num_prefix_tokens
    batch_size = samples if part is None else part.batch_size
    order = torch.randn(batch_size, patches, device=x.device).argsort(dim=-1)
    if part is not None and batch_size != samples:
        order = order.index_select(0, part.offset + torch.arange(samples, device=x.device))
    kept = order[:, : max(1, int(patches * (1.0 - drop.prob)))]
    kept = kept.sort(dim=-1)[0] if drop.ordered else kept
    first = torch.arange(prefix, device=x.device).expand(samples, -1)
    index = torch.cat([first, kept + prefix], dim=1)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def draw_keep_scales(blocks: list[Any], x: Tensor, part: BatchPart | None) -> list[KeepScales]:
    """The factors of blocks without called parts, drawn before the first of them runs."""
    drops = [drop for block in blocks for drop in (block.drop_path1, block.drop_path2)]
    scales = _keep_scales(drops, x, part)
    return list(zip(scales[::2], scales[1::2], strict=True))


def _add(residual: Tensor, branch: Branch | None) -> Tensor:
    """The sum, rounded once to the residual's dtype."""
    if branch is None:
        return residual
    value = branch.value
    if branch.bias is not None:
        value = with_bias_gradient(value, branch.bias)
    if branch.gamma is not None:
        value = value * branch.gamma
    if branch.keep_scale is not None:
        keep = branch.keep_scale.to(value.dtype)
        value = value * keep.view(-1, *(1,) * (value.dim() - 1))
    return (residual + value).to(residual.dtype)


def _cast_for(norm: nn.Module, residual: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The residual in the dtype of the norm's weights: a bfloat16 residual is normed in float32.

    Args:
        dtype: for a norm without weights; None: the residual's.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):  # of a wrapper
        weight = next(norm.parameters(), None)
    if weight is not None:
        dtype = weight.dtype
    return residual if dtype is None else residual.to(dtype)


def _add_norm(
    residual: Tensor, branch: Branch | None, norm: nn.Module, kernels: frozenset[str],
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum, and the sum normed."""
    if "add_layer_norm" not in kernels or not is_plain_norm(norm):
        residual = _add(residual, branch)
        return residual, norm(_cast_for(norm, residual, dtype))
    if branch is None and not torch.is_autocast_enabled(residual.device.type):
        # The kernel returns the dtype of its input, which the next product may not accept.
        rows = _cast_for(norm, residual, dtype)
        return residual, add_layer_norm(rows, None, norm.weight, norm.bias, eps=norm.eps)[1]
    value, gamma, keep_scale, bias = branch or (None, None, None, None)
    return add_layer_norm(
        residual, value, norm.weight, norm.bias, gamma=gamma, keep_scale=keep_scale, eps=norm.eps,
        branch_bias=bias,
    )  # fmt: skip


class Stream:
    """The residual of a batch on its way through the blocks, with the newest branch still pending.

    Attributes:
        pending: the branch that the next norm adds.
        subset: efficient stochastic depth (Oquab et al. 2023, DINOv2, appendix): see ``fuse``.
        keep_scales: of the next block, if they were drawn ahead; otherwise the block draws them.
        dtype: what a norm without weights takes; None: the residual's.
        folds_bias: whether every branch ends in add_layer_norm's kernel, which can compute the
            gradient of the branch's last bias.
        shadows: whether products read the shadow weights (``deit_fast.models.shadow``).
        taps: whether the next sum is kept. It is what the last block left, and is kept where the
            next norm adds it anyway, so that it changes no bit of what follows.
        tapped: the sum that was kept.
    """

    def __init__(
        self, residual: Tensor, kernels: frozenset[str], subset: bool,
        part: BatchPart | None = None, *, dtype: torch.dtype | None = None,
        folds_bias: bool = False, shadows: bool = False,
    ) -> None:  # fmt: skip
        self.residual, self.kernels, self.subset, self.part = residual, kernels, subset, part
        self.dtype = dtype
        self.folds_bias = (
            folds_bias and not subset and "add_layer_norm" in kernels and uses_kernels(residual)
        )
        self.shadows = shadows and self.folds_bias
        self.pending: Branch | None = None
        self.keep_scales: KeepScales | None = None
        self.taps = False
        self.tapped: Tensor | None = None

    def keep_scale(self, index: int, drop: nn.Module) -> Tensor | None:
        """DropPath's factors for branch 0 or 1 of a block."""
        if self.keep_scales is not None:
            return self.keep_scales[index]
        return _keep_scales([drop], self.residual, self.part)[0]

    def run_branch(
        self, index: int, norm: nn.Module, function: Any, kinds: tuple[type, ...],
        scale: nn.Module, drop: nn.Module, **options: Any,
    ) -> None:  # fmt: skip
        """residual += drop(scale(function(norm(residual)))), for branch 0 or 1 of a block.

        Args:
            kinds: classes of ``function`` that have ``without_bias_gradient``.
            options: with which timm calls ``function``.
        """
        is_later = is_plain(drop, DROP_PATHS)  # the next norm's kernel drops
        if self.subset and is_later and (rate := drop_rate(drop)) > 0:
            self._run_on_subset(norm, function, scale, rate, **options)
            return
        normed, bias = self.add_norm(norm), None
        scales_later = is_later and is_plain(scale, SCALES)
        if self.folds_bias and scales_later and is_plain(function, kinds):
            value, bias = function.without_bias_gradient(normed, self.shadows)
        else:
            value = function(normed, **options)
        gamma = layer_scale(scale) if scales_later else None
        value = value if scales_later else scale(value)
        if is_later:
            self.pending = Branch(value, gamma, self.keep_scale(index, drop), bias)
        else:
            self.pending = Branch(drop(value))

    def _run_on_subset(
        self, norm: nn.Module, function: Any, scale: nn.Module, rate: float, **options: Any
    ) -> None:
        residual = self.add()
        samples = len(residual)
        kept = max(1, round(samples * (1 - rate)))
        chosen = torch.randperm(samples, device=residual.device)[:kept]
        _, normed = _add_norm(
            residual.index_select(0, chosen), None, norm, self.kernels, self.dtype
        )
        value = scale(function(normed, **options)).to(residual.dtype)
        self.residual = residual.index_add(0, chosen, value, alpha=samples / kept)

    def add_norm(self, norm: nn.Module) -> Tensor:
        """Add the pending branch; returns the residual normed."""
        self.residual, normed = _add_norm(
            self.residual, self.pending, norm, self.kernels, self.dtype
        )
        self.pending = None
        if self.taps:
            self.tapped, self.taps = self.residual, False
        return normed

    def add(self) -> Tensor:
        """Add the pending branch; returns the residual."""
        self.residual, self.pending = _add(self.residual, self.pending), None
        if self.taps:
            self.tapped, self.taps = self.residual, False
        return self.residual

    def keep_tokens(self, count: int) -> None:
        """Continue with the first tokens of each sample."""
        self.residual = self.residual[:, :count]
        if self.pending is not None:
            self.pending = self.pending._replace(value=self.pending.value[:, :count])
