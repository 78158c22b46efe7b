"""The residual stream of a fused transformer: branches wait to be added until the next norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from deit_fast.kernels import add_layer_norm
from deit_fast.kernels.add_layer_norm import with_bias_gradient
from deit_fast.kernels.add_layer_norm_launch import takes


class Branch(NamedTuple):
    """What waits to be added to the residual, with LayerScale's factor and DropPath's draws."""

    value: Tensor
    gamma: Tensor | None = None
    keep_scale: Tensor | None = None  # float [B], 0 or 1 / (1 - p)
    bias: Tensor | None = None  # contained in value; its gradient is still to be made


def gamma_of(scale: nn.Module) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def drop_rate(drop: nn.Module) -> float:
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
    rates = [drop_rate(drop) for drop in drops]
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


def draw_ahead(blocks: list[Any], x: Tensor, part: BatchPart | None) -> list[KeepScales]:
    """The factors of all blocks, before the first of them runs."""
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


def _rows_for(norm: nn.Module, residual: Tensor) -> Tensor:
    """The residual in the dtype of the norm's weights: a bfloat16 residual is normed in float32."""
    weight = getattr(norm, "weight", None)
    return residual if weight is None else residual.to(weight.dtype)


def _add_norm(
    residual: Tensor, branch: Branch | None, norm: nn.Module, kernels: frozenset[str]
) -> tuple[Tensor, Tensor]:
    """The sum, and the sum normed."""
    if "add_layer_norm" not in kernels or not isinstance(norm, nn.LayerNorm):
        residual = _add(residual, branch)
        return residual, norm(_rows_for(norm, residual))
    if branch is None and not torch.is_autocast_enabled(residual.device.type):
        # The kernel would return its rows' dtype, which the next product may not take.
        rows = _rows_for(norm, residual)
        return residual, add_layer_norm(rows, None, norm.weight, norm.bias, eps=norm.eps)[1]
    value, gamma, keep_scale, bias = branch or (None, None, None, None)
    return add_layer_norm(
        residual, value, norm.weight, norm.bias, gamma=gamma, keep_scale=keep_scale, eps=norm.eps,
        branch_bias=bias,
    )  # fmt: skip


class Stream:
    """The residual stream through blocks, a branch always waiting to be added.

    Attributes:
        subset: efficient stochastic depth (Oquab et al. 2023, DINOv2, appendix): see ``fuse``.
        keep_scales: of the next block, where they were drawn ahead; otherwise the block draws them.
        folds: whether every branch ends in add_layer_norm's kernel, which can make the gradient of
            the branch's last bias.
        shadows: whether products read the shadow weights (``deit_fast.models.shadow``).
    """

    def __init__(
        self, residual: Tensor, kernels: frozenset[str], subset: bool,
        part: BatchPart | None = None, *, folds: bool = False, shadows: bool = False,
    ) -> None:  # fmt: skip
        self.residual, self.kernels, self.subset, self.part = residual, kernels, subset, part
        self.folds = folds and not subset and "add_layer_norm" in kernels and takes(residual)
        self.shadows = shadows and self.folds
        self.branch: Branch | None = None
        self.keep_scales: KeepScales | None = None

    def keep_scale(self, half: int, drop: nn.Module) -> Tensor | None:
        """DropPath's factors for the first (0) or second (1) half of a block."""
        if self.keep_scales is not None:
            return self.keep_scales[half]
        return _keep_scales([drop], self.residual, self.part)[0]

    def half(
        self, half: int, norm: nn.Module, function: Any, scale: nn.Module, drop: nn.Module
    ) -> None:
        """residual += drop(scale(function(norm(residual))))."""
        if self.subset and (rate := drop_rate(drop)) > 0:
            self._half_of_a_subset(norm, function, scale, rate)
            return
        _, normed = self.norm(norm)
        fold = getattr(function, "without_bias_gradient", None) if self.folds else None
        value, bias = (function(normed), None) if fold is None else fold(normed, self.shadows)
        self.branch = Branch(value, gamma_of(scale), self.keep_scale(half, drop), bias)

    def _half_of_a_subset(
        self, norm: nn.Module, function: Callable[[Tensor], Tensor], scale: nn.Module, rate: float
    ) -> None:
        residual = self.add()
        samples = len(residual)
        kept = max(1, round(samples * (1 - rate)))
        chosen = torch.randperm(samples, device=residual.device)[:kept]
        _, normed = _add_norm(residual.index_select(0, chosen), None, norm, self.kernels)
        value, gamma = function(normed), gamma_of(scale)
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
