"""Ingest in plain PyTorch: what the kernel must equal bit by bit, and the CPU's path.

The formulas and the plan's columns are in ``ingest``.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

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

LAYOUTS = ("nchw", "channels_last", "patches")

_WORD = 0xFFFFFFFF
_CPU_PIECE = 8192  # pixels per Philox call: its int64 temporaries stay in a core's cache


@functools.cache  # for good: a captured graph reads the table by its address
def normalised_values(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """(v / 255 - mean) / std of every byte v, float32 [3, 256]; made on the CPU for all devices."""
    values = torch.arange(256, dtype=torch.float32)
    channels = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (mean, std))
    return values.div(255).sub(next(channels)).div(next(channels)).to(device)


@functools.cache
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


def reference(
    images_u8: Tensor, plan_rows: Tensor, mean: tuple[float, ...], std: tuple[float, ...],
    dtype: torch.dtype, layout: str, patch: int,
) -> Tensor:  # fmt: skip
    """Ingest of checked arguments."""
    size = images_u8.shape[1]
    rows = plan_rows.long()
    # Each member of a pair is a partner too: render every distinct half once.
    halves, where = torch.unique(
        torch.cat((rows[:, :8], rows[:, 8:16])), dim=0, return_inverse=True
    )
    channels = functools.partial(torch.tensor, dtype=torch.float32, device=images_u8.device)
    x = _render(images_u8, halves, channels(mean)[:, None, None], channels(std)[:, None, None])
    own, partner = where.view(2, -1)
    x = _mix(x, own, partner, rows).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "patches":
        side = size // patch
        x = x.view(len(x), 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), side * side, 3 * patch * patch)
    return x
