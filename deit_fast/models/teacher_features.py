"""Features of a teacher: which there are, and how they are made of what its network gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from deit_fast.config import RunConfig, Target
from deit_fast.errors import InputError
from deit_fast.models.teacher_outputs import require_floats

FEATURES = tuple(name for name in get_args(Target) if name != "logits")

Parts = Mapping[str, Tensor]
"""What a network gives: `cls`, `mean`, `pooled` [B, D]; `patches` [B, N, D], row by row."""


@dataclass(frozen=True)
class FeatureTarget:
    """One feature that a teacher gives.

    Args:
        name: `cls`, its class token; `mean`, the mean of its patches; `pooled`, what its head reads
            (``forward_head(..., pre_logits=True)``); `patches`, its patches.
        block: whose output is taken, from 0; a negative one counts from the last. None: the end of
            the network, after its final norm. Not for `pooled`.
        norm: apply the final norm to the output of ``block``.
        grid: side of the grid of `patches` after average pooling by a whole factor. None: its own.

    Raises:
        InputError: an unknown name, or settings that exclude each other.
    """

    name: str
    block: int | None = None
    norm: bool = True
    grid: int | None = None

    def __post_init__(self) -> None:
        if self.name not in FEATURES:
            names = ", ".join(FEATURES)
            raise InputError(f"unknown feature {self.name!r}: it must be one of {names}")
        if self.name == "pooled" and self.block is not None:
            raise InputError(
                f"features.block={self.block} with the target pooled, which the network makes at "
                f"its end: omit features.block, or take cls or mean"
            )
        if self.block is None and not self.norm:
            raise InputError(
                "features.norm=False without features.block: the end of the network is after its "
                "final norm; --features.block -1 --no-features.norm is the last block without it"
            )
        if self.grid is not None and self.name != "patches":
            raise InputError(f"the target {self.name} has no grid; features.grid is of patches")


class TeacherOutputs(NamedTuple):
    """What a teacher gives for B images.

    ``logits``: [B, C], or None where they are not among its targets. ``features``: [B, T, D]
    float32 for each of its other targets, in their order. T is 1 but for `patches`.
    """

    logits: Tensor | None
    features: tuple[Tensor, ...]


def targets_of(config: RunConfig) -> tuple[str | FeatureTarget, ...]:
    """The targets of a run, features with their settings.

    Raises:
        InputError: as ``FeatureTarget``.
    """
    own = config.features
    return tuple(
        name
        if name == "logits"
        else FeatureTarget(name, own.block, own.norm, own.grid if name == "patches" else None)
        for name in config.targets
    )


def given_by(parts: Parts) -> list[str]:
    """Names of the features that can be made of the parts."""
    return [name for name in FEATURES if name in parts or (name == "mean" and "patches" in parts)]


def make_feature(target: FeatureTarget, parts: Parts) -> Tensor:
    """A target's feature, [B, T, D] float32, of parts that have it.

    Raises:
        InputError: ``target.grid`` does not fit; the message is the end of a sentence.
    """
    if target.name == "patches":
        patches = parts["patches"].float()
        return patches if target.grid is None else pool_grid(patches, target.grid)
    if target.name == "mean" and "mean" not in parts:
        return parts["patches"].float().mean(1, keepdim=True)
    return parts[target.name].float()[:, None]


def side_of(patches: Tensor) -> int:
    """Side of the square grid of patches [B, N, D].

    Raises:
        InputError: N is no square; the message is the end of a sentence.
    """
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise InputError(f"its {patches.shape[1]} patches are not those of a square grid")
    return side


def pool_grid(patches: Tensor, grid: int) -> Tensor:
    """Average patches [B, N, D] over squares of equal size; returns [B, grid * grid, D].

    Raises:
        InputError: the side of the patches' grid is no multiple of ``grid``; the message is the end
            of a sentence.
    """
    side = side_of(patches)
    if side % grid:
        fitting = [str(number) for number in range(1, side + 1) if side % number == 0]
        raise InputError(
            f"features.grid={grid} does not divide its grid of {side} x {side} patches: choose "
            f"one of {', '.join(fitting)}"
        )
    factor = side // grid
    if factor == 1:
        return patches
    count, _, width = patches.shape
    squares = patches.reshape(count, grid, factor, grid, factor, width)
    return squares.mean((2, 4)).reshape(count, grid * grid, width)


def check_feature(target: FeatureTarget, feature: Tensor) -> None:
    """Check a feature of noise.

    Raises:
        InputError: it has no channels, or values that are not finite; the message is the end of a
            sentence.
    """
    if not feature.numel():
        raise InputError(f"its {target.name} is empty, {tuple(feature.shape)}")
    if not bool(torch.isfinite(feature).all()):
        raise InputError(f"its {target.name} of noise is not finite")


def check_parts(parts: Parts, rows: int) -> None:
    """Check the parts of ``rows`` images.

    Raises:
        InputError: one is no tensor of floats of its shape; the message is the end of a sentence.
    """
    for name, part in parts.items():
        require_floats(name, part)
        dims, shape = (3, "N, D") if name == "patches" else (2, "D")
        if part.dim() != dims or len(part) != rows:
            raise InputError(
                f"its {name} of {rows} images has the shape {tuple(part.shape)}, not "
                f"({rows}, {shape})"
            )
