"""From decoded uint8 images to the batch that student and teacher see.

One row of the plan makes one view. Its two halves, its own image and its partner's, go through

    flip -> x / 255 -> (x - mean) / std -> erase box := N(0, 1) noise

and meet as lam * own + (1 - lam) * partner (Mixup) or as own with a box of partner (CutMix): the
order of DeiT, which erases before it mixes (Touvron et al. 2021, section 6; main.py and engine.py
of facebookresearch/deit).

Bytes: read M * 3 S^2 of uint8, write B * 3 S^2 elements. A row that is mixed needs two halves, but
pairs share theirs: B halves for B rows.

Numerics: float32 and the four IEEE operations alone, each rounded once; no fused multiply-add, no
lerp. A view is thus the same bits in any batch, and equal to ToTensor and Normalize of torchvision.
The noise of pixel (y, x), channel c is entry w >> 16 of the table of normal quantiles, w being
word c of Philox4x32-10 (Salmon et al. 2011) under the row's key at counter (y S + x, 0, 0, 0).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

_HALF = (
    "image",  # row of images_u8
    "flip",
    "erase_top",
    "erase_left",
    "erase_height",  # 0: nothing is erased
    "erase_width",
    "noise_key_lo",  # uint32 bits in an int32
    "noise_key_hi",
)
_MIX = ("mix_kind", "box_top", "box_left", "box_height", "box_width", "lam")

PLAN_COLUMNS = (*_HALF, *(f"partner_{name}" for name in _HALF), *_MIX)
"""Columns of the int32 plan. mix_kind: 0 none, 1 Mixup, 2 CutMix. lam: own weight * 65536."""

NO_MIX, MIXUP, CUTMIX = 0, 1, 2
LAM_ONE = 65536

_WORD = 0xFFFFFFFF
_CPU_PIECE = 8192  # pixels per Philox call: its int64 temporaries stay in a core's cache


# ---------------------------------------------------------------------------------------------
# Reference in plain PyTorch
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def normal_quantiles(device: torch.device | str = "cpu") -> Tensor:
    """Quantiles (i + 1/2) / 65536 of N(0, 1), float32 [65536]."""
    quantile = NormalDist().inv_cdf
    table = [quantile((i + 0.5) / 65536) for i in range(65536)]
    return torch.tensor(table, dtype=torch.float32, device=device)


def _philox(counter: Tensor, key_lo: Tensor, key_hi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words 0, 1, 2 of Philox4x32-10 at (counter, 0, 0, 0); int64 tensors that hold uint32."""
    c0 = counter
    c1 = c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        # The int64 product wraps; its 64 bits are those of the unsigned product.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (b >> 32 & _WORD) ^ c1 ^ key_lo, b & _WORD
        c2, c3 = (a >> 32 & _WORD) ^ c3 ^ key_hi, a & _WORD
        key_lo, key_hi = key_lo + 0x9E3779B9 & _WORD, key_hi + 0xBB67AE85 & _WORD
    return c0, c1, c2


def _render(images_u8: Tensor, halves: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Flipped, normalised, erased: uint8 [M, S, S, 3] and int64 [n, 8] to float32 [n, 3, S, S]."""
    chosen = images_u8.index_select(0, halves[:, 0])  # copies whole images; [] goes by element
    flip = halves[:, 1].nonzero()[:, 0]
    chosen.index_copy_(0, flip, chosen.index_select(0, flip).flip(2))
    x = chosen.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x.div_(255).sub_(mean).div_(std)
    _erase(x, halves)
    return x


def _erase(x: Tensor, halves: Tensor) -> None:
    """Fill the erase boxes of float32 [n, 3, S, S] with noise, in place."""
    size = x.shape[-1]
    top, left, height, width, key_lo, key_hi = halves[:, 2:].unbind(1)
    area = height * width
    half = torch.repeat_interleave(torch.arange(len(x), device=x.device), area)  # of each pixel
    within = torch.arange(len(half), device=x.device) - (area.cumsum(0) - area)[half]
    pixel = (top[half] + within // width[half]) * size + left[half] + within % width[half]
    flat, table = x.view(len(x), 3, size * size), normal_quantiles(x.device)
    piece = max(len(half), 1) if x.is_cuda else _CPU_PIECE
    for h, at in zip(half.split(piece), pixel.split(piece), strict=True):
        for channel, word in enumerate(_philox(at, key_lo[h] & _WORD, key_hi[h] & _WORD)):
            flat[h, channel, at] = table[word >> 16]


def _mix(x: Tensor, own: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
    """Halves ``own`` mixed with halves ``partner``, both [B], of float32 x; rows int64 [B, 22]."""
    views = x.index_select(0, own)
    mixup = (rows[:, 16] == MIXUP).nonzero()[:, 0]
    lam = rows[mixup, 21].to(torch.float32)[:, None, None, None] / LAM_ONE  # 17 bits: exact
    mixed = views.index_select(0, mixup).mul_(lam)
    mixed.add_(x.index_select(0, partner[mixup]).mul_(1 - lam))
    views.index_copy_(0, mixup, mixed)
    for view, other, row in zip(views, partner.tolist(), rows[:, 16:].tolist(), strict=True):
        kind, top, left, height, width, _ = row
        if kind == CUTMIX:
            box = (..., slice(top, top + height), slice(left, left + width))
            view[box] = x[other][box]
    return views


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(images_u8: Any, plan_rows: Any, mean: Any, std: Any, dtype: Any) -> None:
    for name, value, wanted in (
        ("images_u8", images_u8, torch.uint8),
        ("plan_rows", plan_rows, torch.int32),
    ):
        _require(isinstance(value, Tensor), f"{name} must be a tensor, not {type(value).__name__}")
        _require(value.dtype == wanted, f"{name} must be {wanted}, not {value.dtype}")
    shape = tuple(images_u8.shape)
    _require(
        len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3,
        f"images_u8 must have shape [M, S, S, 3], not {shape}",
    )
    _require(
        plan_rows.dim() == 2 and plan_rows.shape[1] == len(PLAN_COLUMNS),
        f"plan_rows must have shape [B, {len(PLAN_COLUMNS)}], not {tuple(plan_rows.shape)}",
    )
    _require(
        images_u8.device == plan_rows.device,
        f"plan_rows is on {plan_rows.device} but images_u8 is on {images_u8.device}",
    )
    _require(len(mean) == 3, f"mean must hold 3 floats, not {mean}")
    _require(len(std) == 3 and min(std) > 0, f"std must hold 3 positive floats, not {std}")
    _require(
        isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        f"dtype must be a floating-point dtype, not {dtype}",
    )
    # Looking at values on a GPU waits for it.
    if not plan_rows.is_cuda or os.environ.get("DEIT_FAST_DEBUG") == "1":
        _check_values(plan_rows, images=shape[0], size=shape[1])


def _check_values(plan_rows: Tensor, images: int, size: int) -> None:
    columns = dict(zip(PLAN_COLUMNS, plan_rows.long().unbind(1), strict=True))
    bounds = {"mix_kind": CUTMIX, "lam": LAM_ONE}
    for half in ("", "partner_"):
        bounds |= {f"{half}image": images - 1, f"{half}flip": 1}
    for name, last in bounds.items():
        _check_column(name, columns[name], last)
    for box in ("erase", "partner_erase", "box"):
        for start, extent in (("top", "height"), ("left", "width")):
            begin, length = columns[f"{box}_{start}"], columns[f"{box}_{extent}"]
            _check_column(f"{box}_{start}", begin, size)
            _check_column(f"{box}_{extent}", length, size)
            _check_column(f"{box}_{start} + {box}_{extent}", begin + length, size)


def _check_column(name: str, values: Tensor, last: int) -> None:
    wrong = values[(values < 0) | (values > last)]
    _require(
        len(wrong) == 0, f"plan_rows: {name} must lie in [0, {last}], found {wrong[:1].tolist()}"
    )


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def ingest(
    images_u8: Tensor,
    plan_rows: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Flip, normalise, erase, mix and cast: one view per row of the plan.

    Args:
        images_u8: uint8 [M, S, S, 3], decoded, cropped and resized.
        plan_rows: int32 [B, 22], columns as in ``PLAN_COLUMNS``; rows stand for themselves.
        mean, std: per channel, in units of 255.
        dtype: of the result; the arithmetic is float32 whatever it is.

    Returns:
        [B, 3, S, S] in ``dtype``.

    Raises:
        ValueError: shapes, dtypes, devices or (on a CPU, or with DEIT_FAST_DEBUG=1) plan values
            that do not fit, by name and value.
    """
    _check(images_u8, plan_rows, mean, std, dtype)
    size = images_u8.shape[1]
    if len(plan_rows) == 0:
        return images_u8.new_empty((0, 3, size, size), dtype=dtype)
    rows = plan_rows.long()
    # Each member of a pair is a partner too: render every distinct half once.
    halves, where = torch.unique(
        torch.cat((rows[:, :8], rows[:, 8:16])), dim=0, return_inverse=True
    )
    channels = functools.partial(torch.tensor, dtype=torch.float32, device=images_u8.device)
    x = _render(images_u8, halves, channels(mean)[:, None, None], channels(std)[:, None, None])
    own, partner = where.view(2, -1)
    return _mix(x, own, partner, rows).to(dtype)
