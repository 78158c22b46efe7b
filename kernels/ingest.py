"""From decoded uint8 images to the batch that student and teacher see.

One row of the plan makes one view. The row's own image and its partner's go through

    flip -> x / 255 -> (x - mean) / std -> erase box := N(0, 1) noise

and are then mixed: lam * own + (1 - lam) * partner (Mixup), or own with a box of partner (CutMix).
DeiT has the same order and erases before it mixes (Touvron et al. 2021, section 6; main.py and
engine.py of facebookresearch/deit).

Bytes: read M * 3 S^2 of uint8, write B * 3 S^2 elements. A Mixup row reads two images, but both
rows of a pair read the same two, so the second read hits the L2 cache. CutMix reads only the
visible pixels of each image. A GPU needs one launch. A CPU and dtypes other than float32, bfloat16
and float16 use the reference in plain PyTorch; with TRITON_INTERPRET=1 a CPU runs the kernel in
Triton's interpreter.

Numerics: float32 and the four IEEE operations, each rounded once; no fused multiply-add, no lerp.
A view therefore has the same bits in any batch, on a CPU and on a GPU, and equals torchvision's
ToTensor and Normalize. The noise of pixel (y, x), channel c is entry w >> 16 of the table of
normal quantiles, where w is word c of Philox4x32-10 (Salmon et al. 2011) with the row's key at
counter (y S + x, 0, 0, 0).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import can_check_values, check_option, check_tensor, check_values
from .launching import (
    DTYPES,
    INTERPRETED,
    TYPE_NAMES,
    Launch,
    launch,
    on_gpu,
    operator,
    planned,
    recording,
)

__all__ = [
    "CUTMIX",
    "LAM_ONE",
    "LAYOUTS",
    "MIXUP",
    "NO_MIX",
    "PLAN_COLUMNS",
    "ingest",
    "normal_quantiles",
]

_IMAGE = (
    "image",  # index into images_u8
    "flip",
    "erase_top",
    "erase_left",
    "erase_height",  # 0: nothing is erased
    "erase_width",
    "noise_key_lo",  # uint32 bits in an int32
    "noise_key_hi",
)
_MIX = ("mix_kind", "box_top", "box_left", "box_height", "box_width", "lam")

PLAN_COLUMNS = (*_IMAGE, *(f"partner_{name}" for name in _IMAGE), *_MIX)
"""Columns of the int32 plan. mix_kind: 0 none, 1 Mixup, 2 CutMix. lam: own weight * 65536."""

NO_MIX, MIXUP, CUTMIX = 0, 1, 2
LAM_ONE = 65536

LAYOUTS = ("nchw", "patches")

_LARGEST = 16384  # pixels a side; a byte's offset in its image must fit in int32


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


@functools.cache  # never evicted: a captured CUDA graph reads the table by its address
def normalised_values(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """(v / 255 - mean) / std of every byte v, float32 [3, 256]; computed on the CPU."""
    values = torch.arange(256, dtype=torch.float32)
    channels = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (mean, std))
    return values.div(255).sub(next(channels)).div(next(channels)).to(device)


@functools.cache
def normal_quantiles(device: torch.device | str = "cpu") -> Tensor:
    """Quantiles (i + 1/2) / 65536 of N(0, 1), float32 [65536]."""
    quantile = NormalDist().inv_cdf
    table = [quantile((i + 0.5) / 65536) for i in range(65536)]
    return torch.tensor(table, dtype=torch.float32, device=device)


# ---------------------------------------------------------------------------------------------
# Reference: the kernel gives the same bits
# ---------------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF
_CPU_CHUNK = 8192  # pixels per Philox call: its int64 temporaries fit in a core's cache


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


def _render(images_u8: Tensor, rows: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Flipped, normalised, erased: uint8 [M, S, S, 3] and int64 [n, 8] to float32 [n, 3, S, S]."""
    chosen = images_u8.index_select(0, rows[:, 0])  # copies whole images; [] goes by element
    flip = rows[:, 1].nonzero()[:, 0]
    chosen.index_copy_(0, flip, chosen.index_select(0, flip).flip(2))
    x = chosen.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # By a tensor: on CUDA torch divides by a Python number with one more rounding.
    x.div_(x.new_full((), 255)).sub_(mean).div_(std)
    _erase(x, rows)
    return x


def _erase(x: Tensor, rows: Tensor) -> None:
    """Fill the erase boxes of float32 [n, 3, S, S] with noise, in place."""
    size = x.shape[-1]
    top, left, height, width, key_lo, key_hi = rows[:, 2:].unbind(1)
    area = height * width
    image = torch.repeat_interleave(torch.arange(len(x), device=x.device), area)  # of each pixel
    within = torch.arange(len(image), device=x.device) - (area.cumsum(0) - area)[image]
    row, column = within // width[image], within % width[image]
    pixel = (top[image] + row) * size + left[image] + column
    flat, table = x.view(len(x), 3, size * size), normal_quantiles(x.device)
    chunk = max(len(image), 1) if x.is_cuda else _CPU_CHUNK
    for i, at in zip(image.split(chunk), pixel.split(chunk), strict=True):
        for channel, word in enumerate(_philox(at, key_lo[i] & _WORD, key_hi[i] & _WORD)):
            flat[i, channel, at] = table[word >> 16]


def _mix(x: Tensor, own: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
    """Images ``own`` mixed with images ``partner``, indices [B] into x; rows int64 [B, 22]."""
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
    """Ingest of checked arguments, in plain PyTorch."""
    size = images_u8.shape[1]
    rows = plan_rows.long()
    # Both members of a pair use the same two images: render each distinct one once.
    distinct, where = torch.unique(
        torch.cat((rows[:, :8], rows[:, 8:16])), dim=0, return_inverse=True
    )
    channels = functools.partial(torch.tensor, dtype=torch.float32, device=images_u8.device)
    x = _render(images_u8, distinct, channels(mean)[:, None, None], channels(std)[:, None, None])
    own, partner = where.view(2, len(rows))
    x = _mix(x, own, partner, rows).to(dtype)
    if layout == "patches":
        side = size // patch
        x = x.view(len(x), 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), side * side, 3 * patch * patch)
    return x


# ---------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------

_COLUMNS = tl.constexpr(len(PLAN_COLUMNS))
_PARTNER, _MIX_KIND = tl.constexpr(len(_IMAGE)), tl.constexpr(2 * len(_IMAGE))
_IS_MIXUP, _IS_CUTMIX = tl.constexpr(MIXUP), tl.constexpr(CUTMIX)
_LAM_SCALE = tl.constexpr(1 / LAM_ONE)  # a power of two: the product is exact


@triton.jit
def _within(y, x, top, left, height, width):
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


@triton.jit
def _rendered(
    images, image_stride, row, values, quantiles, y, x, pixel, size, mask, first_y, last_y,
):  # fmt: skip
    """Red, green and blue of the masked pixels; ``row``: the image's 8 columns of the plan."""
    image, flip = tl.load(row), tl.load(row + 1)
    top, left = tl.load(row + 2), tl.load(row + 3)
    height, width = tl.load(row + 4), tl.load(row + 5)
    source_x = tl.where(flip != 0, size - 1 - x, x)
    at = images + image.to(tl.int64) * image_stride + (y * size + source_x) * 3
    red = tl.load(values + tl.load(at, mask=mask, other=0).to(tl.int32))
    green = tl.load(values + 256 + tl.load(at + 1, mask=mask, other=0).to(tl.int32))
    blue = tl.load(values + 512 + tl.load(at + 2, mask=mask, other=0).to(tl.int32))
    if (height > 0) & (top <= last_y) & (top + height > first_y):
        erased = mask & _within(y, x, top, left, height, width)
        low = tl.load(row + 6).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(row + 7).to(tl.uint32, bitcast=True).to(tl.uint64)
        zero = pixel * 0
        w0, w1, w2, _ = tl.philox(low | (high << 32), pixel, zero, zero, zero)
        red = tl.where(erased, tl.load(quantiles + (w0 >> 16), mask=erased, other=0.0), red)
        green = tl.where(erased, tl.load(quantiles + (w1 >> 16), mask=erased, other=0.0), green)
        blue = tl.where(erased, tl.load(quantiles + (w2 >> 16), mask=erased, other=0.0), blue)
    return red, green, blue


@triton.jit
def ingest_kernel(
    images,  # uint8 [M, S, S, 3]
    rows,  # int32 [B, 22]
    values,  # float32 [3, 256]: a table, so that no division has to round as PyTorch's does
    quantiles,  # float32 [65536]
    out,  # [B, 3, S, S] or [B, (S / PATCH)^2, 3 PATCH^2]
    image_stride, size,
    PATCH: tl.constexpr,  # side of a patch; 0: the result has planes
    GROUP: tl.constexpr,  # neighbouring pixels that one thread writes; divides PATCH
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of one view, all channels. Grid: (views * blocks of a view,)."""
    area = size * size
    tiles = (area + BLOCK - 1) // BLOCK
    view, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area
    y, x = pixel // size, pixel % size
    # Philox runs only in programs whose lines meet an erase box.
    first_y, last_y = tile * BLOCK // size, (tile * BLOCK + BLOCK - 1) // size
    row = rows + view.to(tl.int64) * _COLUMNS
    mix = row + _MIX_KIND
    kind = tl.load(mix)

    boxed = pixel < 0
    if kind == _IS_CUTMIX:
        boxed = _within(
            y, x, tl.load(mix + 1), tl.load(mix + 2), tl.load(mix + 3), tl.load(mix + 4)
        )
    red, green, blue = _rendered(
        images, image_stride, row, values, quantiles, y, x, pixel, size, inside & (boxed == 0),
        first_y, last_y,
    )  # fmt: skip
    if kind != 0:
        mixup = kind == _IS_MIXUP
        r, g, b = _rendered(
            images, image_stride, row + _PARTNER, values, quantiles, y, x, pixel, size,
            inside & (boxed | mixup), first_y, last_y,
        )  # fmt: skip
        if mixup:
            lam = tl.load(mix + 5).to(tl.float32) * _LAM_SCALE
            red = red * lam + r * (1.0 - lam)
            green = green * lam + g * (1.0 - lam)
            blue = blue * lam + b * (1.0 - lam)
        else:
            red = tl.where(boxed, r, red)
            green = tl.where(boxed, g, green)
            blue = tl.where(boxed, b, blue)

    start = view.to(tl.int64) * area * 3
    if GROUP > 1:  # it divides the area: no group crosses the view's end
        start = tl.multiple_of(start, GROUP)
    target = out + start
    at, step = pixel, area
    if PATCH > 0:
        number = y // PATCH * (size // PATCH) + x // PATCH
        at = number * 3 * PATCH * PATCH + y % PATCH * PATCH + x % PATCH
        # The compiler cannot prove that neighbours of a patch's row are adjacent in memory.
        at = tl.max_contiguous(tl.multiple_of(at, GROUP), GROUP)
        inside = tl.max_constancy(inside, GROUP)
        step = PATCH * PATCH
    tl.store(target + at, red, mask=inside)
    tl.store(target + at + step, green, mask=inside)
    tl.store(target + at + 2 * step, blue, mask=inside)


# ---------------------------------------------------------------------------------------------
# Launcher and operator
# ---------------------------------------------------------------------------------------------

BLOCK = 1024  # pixels of a program: 4.6 lines at 224, so most programs meet no erase box


def _empty(
    images_u8: Tensor, plan_rows: Tensor, _values: Tensor, _quantiles: Tensor, dtype: torch.dtype,
    layout: str, patch: int,
) -> Tensor:  # fmt: skip
    """The result without values."""
    views, size = plan_rows.shape[0], images_u8.shape[1]
    shape: tuple[int, ...] = (views, 3, size, size)
    if layout == "patches":
        shape = (views, (size // patch) ** 2, 3 * patch**2)
    return images_u8.new_empty(shape, dtype=dtype)


@planned
def _launch(
    images_u8: Tensor, plan_rows: Tensor, values: Tensor, quantiles: Tensor, dtype: torch.dtype,
    layout: str, patch: int,
) -> Tensor:  # fmt: skip
    out = _empty(images_u8, plan_rows, values, quantiles, dtype, layout, patch)
    size = images_u8.shape[1]
    patch = patch if layout == "patches" else 0
    launch(
        ingest_kernel, (len(plan_rows) * triton.cdiv(size * size, BLOCK),),
        images=images_u8, rows=plan_rows.contiguous(), values=values, quantiles=quantiles, out=out,
        image_stride=images_u8.stride(0), size=size,
        # 16 bytes, fewer in a narrow patch
        PATCH=patch, GROUP=min(16 // dtype.itemsize, patch & -patch) if patch else 1, BLOCK=BLOCK,
        # A fused multiply-add would round the mixed pixels otherwise than the reference does.
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _ingest(images_u8: Tensor, plan_rows: Tensor, *options: Any) -> Tensor:
    if images_u8.stride()[1:] != (3 * images_u8.shape[1], 3, 1):
        images_u8 = images_u8.contiguous()
    # The number of images varies from batch to batch, and no launch depends on it.
    return _launch(images_u8[:1], plan_rows, *options)


ingest_op = operator(
    "ingest(Tensor images_u8, Tensor plan_rows, Tensor values, Tensor quantiles, ScalarType dtype, "
    "str layout, int patch) -> Tensor", _ingest, _empty,
)  # fmt: skip


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time: DeiT's shapes."""
    images = torch.empty((256, 224, 224, 3), dtype=torch.uint8, device="meta")
    rows = images.new_empty((256, len(PLAN_COLUMNS)), dtype=torch.int32)
    values, quantiles = (rows.new_empty(n, dtype=torch.float32) for n in ((3, 256), 65536))
    for dtype in (torch.bfloat16, torch.float32):
        for layout in LAYOUTS:
            with recording() as recorded:
                _launch(images, rows, values, quantiles, dtype, layout, 16)
            expect = {"wide_stores": True, "i64_rows": True, "max_scalar_stores": 0}
            yield f"{layout} {TYPE_NAMES[dtype]} 224", recorded.launches[0], expect


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def ingest(
    images_u8: Tensor,
    plan_rows: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    layout: str = "nchw",
    patch: int = 16,
) -> Tensor:
    """Flip, normalise, erase, mix and cast: one view per row of the plan.

    Args:
        images_u8: uint8 [M, S, S, 3], decoded, cropped and resized.
        plan_rows: int32 [B, 22], columns as in ``PLAN_COLUMNS``; each row is complete by itself.
        mean, std: per channel, in units of 255.
        dtype: of the result; the arithmetic is float32 in any case.
        layout: "nchw" for images; "patches" for the rows that a patch embedding multiplies.
        patch: side of a patch in pixels, for "patches".

    Returns:
        [B, 3, S, S] in ``dtype``; for "patches" [B, (S / patch)^2, 3 patch^2], a row in the order
        of the convolution's weight: channel, y, x.

    Raises:
        ValueError: shapes, dtypes, devices or (on a CPU, or with DEIT_FAST_DEBUG=1) plan values
            that do not fit, by name and value.
    """
    _check(images_u8, plan_rows, mean, std, dtype, layout, patch)
    mean, std, device = tuple(mean), tuple(std), images_u8.device
    if not (INTERPRETED or on_gpu(images_u8)) or dtype not in DTYPES:
        return reference(images_u8, plan_rows, mean, std, dtype, layout, patch)
    tables = normalised_values(mean, std, device), normal_quantiles(device)
    return ingest_op(images_u8, plan_rows, *tables, dtype, layout, patch)


def _check(
    images_u8: Any, plan_rows: Any, mean: Any, std: Any, dtype: Any, layout: str, patch: int
) -> None:
    check_tensor("images_u8", images_u8, torch.uint8, ("M", "S", "S", 3))
    images, size, width, _ = images_u8.shape
    if size != width or size > _LARGEST:
        raise ValueError(
            f"images_u8 must be square, of at most {_LARGEST} pixels a side, not {size} x {width}"
        )
    shape = ("B", len(PLAN_COLUMNS))
    check_tensor("plan_rows", plan_rows, torch.int32, shape, images_u8, "images_u8")
    if len(mean) != 3:
        raise ValueError(f"mean must hold 3 floats, not {mean}")
    if len(std) != 3 or not min(std) > 0:
        raise ValueError(f"std must hold 3 positive floats, not {std}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, not {dtype}")
    check_option("layout", layout, LAYOUTS)
    if layout == "patches" and (patch <= 0 or size % patch):
        raise ValueError(f"patch must divide the image size {size}, but is {patch}")
    if can_check_values(plan_rows):
        _check_plan(plan_rows, images, size)


def _check_plan(plan_rows: Tensor, images: int, size: int) -> None:
    columns = dict(zip(PLAN_COLUMNS, plan_rows.long().unbind(1), strict=True))
    bounds = {"mix_kind": CUTMIX, "lam": LAM_ONE}
    for prefix in ("", "partner_"):
        bounds |= {f"{prefix}image": images - 1, f"{prefix}flip": 1}
    for box in ("erase", "partner_erase", "box"):
        for start, extent in (("top", "height"), ("left", "width")):
            begin, length = f"{box}_{start}", f"{box}_{extent}"
            end = f"{begin} + {length}"
            columns[end] = columns[begin] + columns[length]
            bounds |= dict.fromkeys((begin, length, end), size)
    for name, last in bounds.items():
        check_values(f"plan_rows: {name}", columns[name], 0, last)
