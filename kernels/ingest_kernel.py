"""The ingest kernel: one program makes BLOCK pixels of one view, all channels.

A byte becomes its normalised float through a table of 768 values that PyTorch's own arithmetic
made, so that no division has to round alike. Philox runs only in programs that touch an erase box.

A thread writes 16 bytes at a time where GROUP pixels allow it: neighbours of one channel, or with
the channels innermost three times 16 bytes in words of 8, packed by hand, as three is no power of
two. The compiler does not see by itself that patch rows hold neighbours side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ingest_reference import CUTMIX as _CUTMIX
from .ingest_reference import LAM_ONE as _LAM_ONE
from .ingest_reference import LAYOUTS, PLAN_COLUMNS
from .ingest_reference import MIXUP as _MIXUP

MIXUP, CUTMIX = tl.constexpr(_MIXUP), tl.constexpr(_CUTMIX)
LAM_SCALE = tl.constexpr(1 / _LAM_ONE)  # a power of two: the product is exact
COLUMNS = tl.constexpr(len(PLAN_COLUMNS))
HALF_COLUMNS = tl.constexpr(8)
MIX_COLUMNS = tl.constexpr(16)
CHANNELS_LAST, PATCHES = (tl.constexpr(LAYOUTS.index(n)) for n in ("channels_last", "patches"))


@triton.jit
def _within(y, x, top, left, height, width):
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


@triton.jit
def _half(
    images, image_stride, half, values, quantiles, y, x, pixel, size, wanted, first_y, last_y,
):  # fmt: skip
    """Three channels of the pixels that are wanted of one half of a row."""
    image, flip = tl.load(half), tl.load(half + 1)
    top, left = tl.load(half + 2), tl.load(half + 3)
    height, width = tl.load(half + 4), tl.load(half + 5)
    source_x = tl.where(flip != 0, size - 1 - x, x)
    at = images + image.to(tl.int64) * image_stride + (y * size + source_x) * 3
    red = tl.load(values + tl.load(at, mask=wanted, other=0).to(tl.int32))
    green = tl.load(values + 256 + tl.load(at + 1, mask=wanted, other=0).to(tl.int32))
    blue = tl.load(values + 512 + tl.load(at + 2, mask=wanted, other=0).to(tl.int32))
    if (height > 0) & (top <= last_y) & (top + height > first_y):
        erased = wanted & _within(y, x, top, left, height, width)
        low = tl.load(half + 6).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(half + 7).to(tl.uint32, bitcast=True).to(tl.uint64)
        zero = pixel * 0
        w0, w1, w2, _ = tl.philox(low | (high << 32), pixel, zero, zero, zero)
        red = tl.where(erased, tl.load(quantiles + (w0 >> 16), mask=erased, other=0.0), red)
        green = tl.where(erased, tl.load(quantiles + (w1 >> 16), mask=erased, other=0.0), green)
        blue = tl.where(erased, tl.load(quantiles + (w2 >> 16), mask=erased, other=0.0), blue)
    return red, green, blue


@triton.jit
def _bits(x, out):
    """What out stores of float32 x, in the low bits of 64."""
    x = x.to(out.dtype.element_ty)
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.uint32, bitcast=True)
    else:
        bits = x.to(tl.uint16, bitcast=True)
    return bits.to(tl.uint64)


@triton.jit
def _apart(x):
    """Elements 0, 2, 4 ... and 1, 3, 5 ... of x."""
    return tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))


@triton.jit
def _store_groups(out, place, first, second, inside):
    """Two words of 8 bytes of each group, side by side."""
    words = tl.join(first, second)
    at = tl.multiple_of(place, 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(out.to(tl.pointer_type(tl.uint64)) + at, words, mask=inside[:, None])


@triton.jit
def _store_channels_last(target, red, green, blue, group, groups):
    """Groups of 48 bytes: 8 pixels of 2-byte elements or 4 of float32."""
    r, g, b = _bits(red, target), _bits(green, target), _bits(blue, target)
    r0, r1 = _apart(r)
    g0, g1 = _apart(g)
    b0, b1 = _apart(b)
    if target.dtype.element_ty.primitive_bitwidth == 32:
        w0, w1, w2 = r0 | (g0 << 32), b0 | (r1 << 32), g1 | (b1 << 32)
    else:
        r0, r2 = _apart(r0)
        r1, r3 = _apart(r1)
        g0, g2 = _apart(g0)
        g1, g3 = _apart(g1)
        b0, b2 = _apart(b0)
        b1, b3 = _apart(b1)
        w0 = r0 | (g0 << 16) | (b0 << 32) | (r1 << 48)
        w1 = g1 | (b1 << 16) | (r2 << 32) | (g2 << 48)
        w2 = b2 | (r3 << 16) | (g3 << 32) | (b3 << 48)
    w0, w3 = _apart(w0)
    w1, w4 = _apart(w1)
    w2, w5 = _apart(w2)
    inside = group < groups
    _store_groups(target, group * 6, w0, w1, inside)
    _store_groups(target, group * 6 + 2, w2, w3, inside)
    _store_groups(target, group * 6 + 4, w4, w5, inside)


@triton.jit
def ingest_kernel(
    images,  # uint8 [M, S, S, 3]
    rows,  # int32 [B, COLUMNS]
    values,  # float32 [3, 256]
    quantiles,  # float32 [65536]
    out,  # [B, 3 S S], in the order that LAYOUT says
    image_stride, size,
    PATCH: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (views * tiles,)."""
    area = size * size
    tiles = (area + BLOCK - 1) // BLOCK
    view, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area
    y, x = pixel // size, pixel % size
    first_y, last_y = tile * BLOCK // size, (tile * BLOCK + BLOCK - 1) // size
    row = rows + view.to(tl.int64) * COLUMNS
    mix = row + MIX_COLUMNS
    kind = tl.load(mix)

    boxed = pixel < 0
    if kind == CUTMIX:
        boxed = _within(
            y, x, tl.load(mix + 1), tl.load(mix + 2), tl.load(mix + 3), tl.load(mix + 4)
        )
    red, green, blue = _half(
        images, image_stride, row, values, quantiles, y, x, pixel, size, inside & (boxed == 0),
        first_y, last_y,
    )  # fmt: skip
    if kind != 0:
        mixup = kind == MIXUP
        r, g, b = _half(
            images, image_stride, row + HALF_COLUMNS, values, quantiles, y, x, pixel, size,
            inside & (boxed | mixup), first_y, last_y,
        )  # fmt: skip
        if mixup:
            lam = tl.load(mix + 5).to(tl.float32) * LAM_SCALE
            # Launched without contraction: each product and sum is rounded by itself.
            red = red * lam + r * (1.0 - lam)
            green = green * lam + g * (1.0 - lam)
            blue = blue * lam + b * (1.0 - lam)
        else:
            red = tl.where(boxed, r, red)
            green = tl.where(boxed, g, green)
            blue = tl.where(boxed, b, blue)

    start = view.to(tl.int64) * area * 3
    if GROUP > 1:  # which divides the area then: a group is inside or it is not
        start = tl.multiple_of(start, GROUP)
    target = out + start
    if (LAYOUT == CHANNELS_LAST) & (GROUP > 1):
        group = tile * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        _store_channels_last(target, red, green, blue, group, area // GROUP)
    else:
        place, step = pixel, area
        if LAYOUT == CHANNELS_LAST:
            place, step = pixel * 3, 1
        elif LAYOUT == PATCHES:
            number = y // PATCH * (size // PATCH) + x // PATCH
            place = number * 3 * PATCH * PATCH + y % PATCH * PATCH + x % PATCH
            place = tl.max_contiguous(tl.multiple_of(place, GROUP), GROUP)
            inside = tl.max_constancy(inside, GROUP)
            step = PATCH * PATCH
        tl.store(target + place, red, mask=inside)
        tl.store(target + place + step, green, mask=inside)
        tl.store(target + place + 2 * step, blue, mask=inside)
