"""From decoded uint8 images of any size to augmented square views: crop, resize, RandAugment.

One row of the table makes one view, byte for byte what Pillow 11.0 to 12.3 makes of it:

    crop -> bicubic resize with antialias -> first operation -> second operation

The resize uses integers only: weights in units of 2^-22, computed on the host once for each crop
length (1.7 MB for a batch of 256 views). Lines are resized first, rounded and clipped to a byte,
then columns. An operation is a table of 256 values per channel (Contrast, AutoContrast and Equalize
first read the whole view to make it), Color, Sharpness, or an affine map with Pillow's cubic
(rotate, shear, translate). If ingest will flip a view, its operations act on the mirror image.

Bytes of a view of 3 S^2: the crop is read from memory once (1.5 times in all: eight lines of the
view share the lines of the crop that they need) and 3 S^2 written. Each operation moves 6 S^2
more; DeiT's recipe has one on average. A histogram or mean reads 3 S^2 for a tenth of the views in
each layer. At S = 224 and crops of 300 x 300 that is 0.75 MB, 64 us for 256 views at 3 TB/s; the
resize itself is bound by its integer work. There are five launches: the resize, then for each layer
the tables and the operation, whose programs return at once for a view without one. Nothing is
copied: a view's pixels alternate between the result and a buffer of the same shape. The resize
writes to the one from which the last operation ends in the result.

Numerics: blends in float32, product and sum each rounded, no fused multiply-add, as Pillow's C.
The affine map is float64 as in Pillow: in float32 one value in 7,000 differs by 1. That costs 200
double-precision instructions a pixel, 10 M a view, for one view in three: 0.7 us each on an H100
(64 a clock and multiprocessor), about 16 us on a GPU with 2. AutoContrast's table is float64 too,
256 values of a channel.

A CPU uses the plain PyTorch of `augment_reference`, which makes the same bytes and is slower than
Pillow; with TRITON_INTERPRET=1 a CPU runs the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_reference import HALF as _HALF
from .augment_reference import KINDS, TABLE_COLUMNS, AugmentTable, reference, resize_columns
from .augment_reference import WEIGHT_BITS as _WEIGHT_BITS
from .checks import can_check_values, check_tensor, check_values
from .launching import INTERPRETED, Launch, launch, on_gpu, operator, recording

__all__ = ["KINDS", "TABLE_COLUMNS", "AugmentTable", "augment", "resize_columns"]

_LARGEST = 8192  # pixels a side; a byte's offset in its view must fit in int32


COLUMNS = tl.constexpr(len(TABLE_COLUMNS))
FIRST, SECOND = (tl.constexpr(TABLE_COLUMNS.index(f"{n}_kind")) for n in ("first", "second"))
FLIP = tl.constexpr(TABLE_COLUMNS.index("flip"))
HALF, WEIGHT_BITS = tl.constexpr(_HALF), tl.constexpr(_WEIGHT_BITS)

INVERT, SOLARIZE, SOLARIZE_ADD, POSTERIZE, BRIGHTNESS, CONTRAST, AUTO_CONTRAST, EQUALIZE = (
    tl.constexpr(KINDS.index(name)) for name in KINDS[1:9]
)
LAST_TABLE = EQUALIZE
COLOR, SHARPNESS = (tl.constexpr(KINDS.index(name)) for name in ("color", "sharpness"))


@triton.jit
def _active_layers(row):
    """How many layers of a view have an operation."""
    return (tl.load(row + FIRST) != 0).to(tl.int32) + (tl.load(row + SECOND) != 0).to(tl.int32)


@triton.jit
def _blend(degenerate, value, factor):
    # Launched without contraction: product and sum are each rounded.
    mixed = degenerate.to(tl.float32) + factor * (value - degenerate).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _luma(red, green, blue):
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


# ---------------------------------------------------------------------------------------------
# Crop and resize
# ---------------------------------------------------------------------------------------------


@triton.jit
def resize_kernel(
    pixels,  # uint8 [P]
    images,  # int64 [N, 3]: start, width, height
    rows,  # int64 [B, COLUMNS]
    weights,  # int32 [W]
    out, other,  # uint8 [B, S, S, 3]
    size,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LINES lines of a view, BLOCK of their bytes: each line of the crop is resized, then added to
    every line of the view that it contributes to."""
    view, line, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = rows + view * COLUMNS
    image = images + tl.load(row) * 3
    pitch = tl.load(image + 1) * 3
    start = tl.load(image) + tl.load(row + 2) * pitch + tl.load(row + 1) * 3
    width, height = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    x_record, x_taps = weights + tl.load(row + 5), tl.load(row + 6).to(tl.int32)
    y_record, y_taps = weights + tl.load(row + 7), tl.load(row + 8).to(tl.int32)

    byte = block * BLOCK + tl.arange(0, BLOCK)
    in_line = byte < 3 * size
    x = byte // 3
    channel = byte - 3 * x
    x_first = tl.load(x_record + x, mask=in_line, other=0)
    x_weights = x_record + size + x

    y = line * LINES + tl.arange(0, LINES)
    in_view = y < size
    y_first = tl.load(y_record + y, mask=in_view, other=0)
    y_weights = y_record + size + y
    top = tl.load(y_record + line * LINES)
    last = tl.load(y_record + tl.minimum(line * LINES + LINES, size) - 1)

    total = tl.full((LINES, BLOCK), HALF, tl.int32)
    at = pixels + start + top * pitch
    for source in range(top, tl.minimum(last + y_taps, height)):
        across = tl.full((BLOCK,), HALF, tl.int32)
        for tap in range(x_taps):
            weight = tl.load(x_weights + tap * size, mask=in_line, other=0)
            place = tl.minimum(x_first + tap, width - 1) * 3 + channel
            across += weight * tl.load(at + place, mask=in_line, other=0).to(tl.int32)
        across = tl.minimum(tl.maximum(across >> WEIGHT_BITS, 0), 255)
        tap = source - y_first
        share = in_view & (tap >= 0) & (tap < y_taps)
        weight = tl.load(y_weights + tap * size, mask=share, other=0)
        total += weight[:, None] * across[None, :]
        at += pitch
    value = tl.minimum(tl.maximum(total >> WEIGHT_BITS, 0), 255).to(tl.uint8)

    target = out
    if _active_layers(row) == 1:
        target = other
    place = target + view * 3 * size * size + y[:, None] * (3 * size) + byte[None, :]
    tl.store(place, value, mask=in_view[:, None] & in_line[None, :])


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


@triton.jit
def _counts(source, channel, area, BLOCK: tl.constexpr):
    counts = tl.zeros((256,), tl.int32)
    for start in range(0, area, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        value = tl.load(source + pixel * 3 + channel, mask=pixel < area, other=0).to(tl.int32)
        counts += tl.histogram(value, 256, mask=pixel < area)
    return counts


@triton.jit
def _mean_luma(source, area, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, area, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        at, inside = source + pixel * 3, pixel < area
        red = tl.load(at, mask=inside, other=0).to(tl.int32)
        green = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
        blue = tl.load(at + 2, mask=inside, other=0).to(tl.int32)
        total += tl.where(inside, _luma(red, green, blue), 0)
    return ((2 * tl.sum(total, 0) + area) // (2 * area)).to(tl.int32)


@triton.jit
def tables_kernel(
    out, other,  # uint8 [B, S, S, 3]
    rows,  # int64 [B, COLUMNS]
    tables,  # uint8 [B, 3, 256]
    size,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new value of each old value; one program for each view and channel."""
    view, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = rows + view * COLUMNS
    kind = tl.load(row + LAYER)
    if (kind > 0) & (kind <= LAST_TABLE):
        source = other
        if (LAYER == FIRST) & (_active_layers(row) == 2):
            source = out
        area = size * size
        source += view * 3 * area
        argument = tl.load(row + LAYER + 1)
        factor = argument.to(tl.float64, bitcast=True).to(tl.float32)
        number = argument.to(tl.int32)  # of the others: 0 to 256
        v = tl.arange(0, 256)
        new = 255 - v
        if kind == SOLARIZE:
            new = tl.where(v < number, v, new)
        elif kind == SOLARIZE_ADD:
            new = tl.where(v < 128, tl.minimum(v + number, 255), v)
        elif kind == POSTERIZE:
            new = (v >> number) << number
        elif kind == BRIGHTNESS:
            new = _blend(v * 0, v, factor)
        elif kind == CONTRAST:
            new = _blend(v * 0 + _mean_luma(source, area, BLOCK), v, factor)
        elif kind == AUTO_CONTRAST:
            counts = _counts(source, channel, area, BLOCK)
            low = tl.min(tl.where(counts > 0, v, 255), 0)
            high = tl.max(tl.where(counts > 0, v, 0), 0)
            scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
            # float32 would get 0.75 % of all entries wrong.
            stretched = (v.to(tl.float64) * scale + (-low).to(tl.float64) * scale).to(tl.int32)
            new = tl.where(high > low, tl.minimum(tl.maximum(stretched, 0), 255), v)
        elif kind == EQUALIZE:
            counts = _counts(source, channel, area, BLOCK)
            last = tl.max(tl.where(counts > 0, v, 0), 0)
            step = (area - tl.sum(tl.where(v == last, counts, 0), 0)) // 255
            before = tl.cumsum(counts, 0) - counts
            new = tl.minimum((step // 2 + before) // tl.maximum(step, 1), 255)
            new = tl.where(step > 0, new, v)
        tl.store(tables + view * 768 + channel * 256 + v, new.to(tl.uint8))


# ---------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------


@triton.jit
def _through_table(source, target, table, part, parts, bytes_of_view, BYTES: tl.constexpr):
    for start in range(part * BYTES, bytes_of_view, parts * BYTES):
        byte = start + tl.arange(0, BYTES)
        inside = byte < bytes_of_view
        value = tl.load(source + byte, mask=inside, other=0).to(tl.int32)
        tl.store(target + byte, tl.load(table + byte % 3 * 256 + value, mask=inside), mask=inside)


@triton.jit
def _sharpen(source, target, factor, part, parts, size, BYTES: tl.constexpr):
    line = 3 * size
    for start in range(part * BYTES, line * size, parts * BYTES):
        byte = start + tl.arange(0, BYTES)
        inside = byte < line * size
        y = byte // line
        x = (byte - y * line) // 3
        inner = inside & (x > 0) & (x < size - 1) & (y > 0) & (y < size - 1)
        value = tl.load(source + byte, mask=inside, other=0).to(tl.int32)
        total = 4 * value
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                at = source + byte + down * line + right * 3
                total += tl.load(at, mask=inner, other=0).to(tl.int32)
        smooth = tl.where(inner, (2 * total + 13) // 26, value)
        tl.store(target + byte, _blend(smooth, value, factor).to(tl.uint8), mask=inside)


@triton.jit
def _recolor(source, target, factor, part, parts, area, BLOCK: tl.constexpr):
    for start in range(part * BLOCK, area, parts * BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < area
        at = source + pixel * 3
        red = tl.load(at, mask=inside, other=0).to(tl.int32)
        green = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
        blue = tl.load(at + 2, mask=inside, other=0).to(tl.int32)
        gray = _luma(red, green, blue)
        at = target + pixel * 3
        tl.store(at, _blend(gray, red, factor).to(tl.uint8), mask=inside)
        tl.store(at + 1, _blend(gray, green, factor).to(tl.uint8), mask=inside)
        tl.store(at + 2, _blend(gray, blue, factor).to(tl.uint8), mask=inside)


@triton.jit
def _cubic(v1, v2, v3, v4, d):
    """Interpolates between v2 and v3; differences of integers are exact in any type."""
    p2 = (v3 - v1).to(tl.float64)
    p3 = (2 * (v1 - v2) + v3 - v4).to(tl.float64)
    p4 = (v2 - v1 - v3 + v4).to(tl.float64)
    return v2.to(tl.float64) + d * (p2 + d * (p3 + d * p4))


@triton.jit
def _line_of_four(line, x0, x1, x2, x3, d, inside):
    v0 = tl.load(line + x0, mask=inside, other=0).to(tl.int32)
    v1 = tl.load(line + x1, mask=inside, other=0).to(tl.int32)
    v2 = tl.load(line + x2, mask=inside, other=0).to(tl.int32)
    v3 = tl.load(line + x3, mask=inside, other=0).to(tl.int32)
    return _cubic(v0, v1, v2, v3, d)


@triton.jit
def _column(x, size, flip):
    """Byte offset in its line of the mirror's pixel x, clamped."""
    x = tl.minimum(tl.maximum(x, 0), size - 1)
    return tl.where(flip != 0, size - 1 - x, x) * 3


@triton.jit
def _warp(source, target, matrix, flip, fill, part, parts, size, BLOCK: tl.constexpr):
    a = tl.load(matrix).to(tl.float64, bitcast=True)
    b = tl.load(matrix + 1).to(tl.float64, bitcast=True)
    c = tl.load(matrix + 2).to(tl.float64, bitcast=True)
    d = tl.load(matrix + 3).to(tl.float64, bitcast=True)
    e = tl.load(matrix + 4).to(tl.float64, bitcast=True)
    f = tl.load(matrix + 5).to(tl.float64, bitcast=True)
    for start in range(part * BLOCK, size * size, parts * BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        y = pixel // size
        x = pixel - y * size
        x = tl.where(flip != 0, size - 1 - x, x).to(tl.float64) + 0.5
        y = y.to(tl.float64) + 0.5
        x_in = a * x + b * y + c
        y_in = d * x + e * y + f
        written = pixel < size * size
        inside = written & (x_in >= 0.0) & (x_in < size) & (y_in >= 0.0) & (y_in < size)
        x_in -= 0.5
        y_in -= 0.5
        left, top = tl.floor(x_in), tl.floor(y_in)
        dx, dy = x_in - left, y_in - top
        left, top = left.to(tl.int32), top.to(tl.int32)
        x0, x1 = _column(left - 1, size, flip), _column(left, size, flip)
        x2, x3 = _column(left + 1, size, flip), _column(left + 2, size, flip)
        last, pitch = size - 1, 3 * size
        y0 = tl.minimum(tl.maximum(top - 1, 0), last) * pitch
        y1 = tl.minimum(tl.maximum(top, 0), last) * pitch
        y2 = tl.minimum(tl.maximum(top + 1, 0), last) * pitch
        y3 = tl.minimum(tl.maximum(top + 2, 0), last) * pitch
        for channel in tl.static_range(3):
            v0 = _line_of_four(source + channel + y0, x0, x1, x2, x3, dx, inside)
            v1 = _line_of_four(source + channel + y1, x0, x1, x2, x3, dx, inside)
            v2 = _line_of_four(source + channel + y2, x0, x1, x2, x3, dx, inside)
            v3 = _line_of_four(source + channel + y3, x0, x1, x2, x3, dx, inside)
            value = tl.minimum(tl.maximum(_cubic(v0, v1, v2, v3, dy), 0.0), 255.0).to(tl.int32)
            value = tl.where(inside, value, (fill >> (8 * channel)) & 255)
            tl.store(target + pixel * 3 + channel, value.to(tl.uint8), mask=written)


@triton.jit(do_not_specialize=["fill"])
def layer_kernel(
    out, other,  # uint8 [B, S, S, 3]
    rows,  # int64 [B, COLUMNS]
    tables,  # uint8 [B, 3, 256]
    size,
    fill,  # red + 256 green + 65536 blue
    LAYER: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One operation on a view. The programs of the grid's second axis share its pixels, BLOCK of
    them or BYTES bytes at a time."""
    view, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = rows + view * COLUMNS
    kind = tl.load(row + LAYER)
    if kind != 0:
        source, target = other, out
        if (LAYER == FIRST) & (_active_layers(row) == 2):
            source, target = out, other
        area = size * size
        source += view * 3 * area
        target += view * 3 * area
        factor = tl.load(row + LAYER + 1).to(tl.float64, bitcast=True).to(tl.float32)
        if kind <= LAST_TABLE:
            _through_table(source, target, tables + view * 768, part, parts, 3 * area, BYTES)
        elif kind == COLOR:
            _recolor(source, target, factor, part, parts, area, BLOCK)
        elif kind == SHARPNESS:
            _sharpen(source, target, factor, part, parts, size, BYTES)
        else:
            flip = tl.load(row + FLIP)
            _warp(source, target, row + LAYER + 2, flip, fill, part, parts, size, BLOCK)


# ---------------------------------------------------------------------------------------------
# Launcher and operator
# ---------------------------------------------------------------------------------------------

PROGRAMS = 28  # of a view and layer: at 224 pixels each handles seven times 256 of them


def _launch(
    pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, size: int, fill: Sequence[int]
) -> Tensor:
    """Not `planned`: the number of pixels differs from batch to batch."""
    out = pixels.new_empty((len(rows), size, size, 3))
    if out.numel() == 0:
        return out
    views, cdiv = len(rows), triton.cdiv
    table = out.new_empty((views, 3, 256))
    common: dict[str, Any] = {"out": out, "other": torch.empty_like(out), "rows": rows}
    # Contraction would round the blends and the cubics otherwise than Pillow does.
    common |= {"size": size, "num_warps": 4, "enable_fp_fusion": False}
    # Eight lines share the cost of their crop's lines; more would mostly multiply by zero.
    launch(
        resize_kernel, (views, cdiv(size, 8), cdiv(3 * size, 256)),
        pixels=pixels, images=images, weights=weights, LINES=8, BLOCK=256, **common,
    )  # fmt: skip
    color = fill[0] + 256 * fill[1] + 65536 * fill[2]
    for layer in (FIRST.value, SECOND.value):
        launch(tables_kernel, (views, 3), tables=table, LAYER=layer, BLOCK=2048, **common)
        launch(
            layer_kernel, (views, min(PROGRAMS, cdiv(size * size, 256))),
            tables=table, fill=color, LAYER=layer, BLOCK=256, BYTES=2048, **common,
        )  # fmt: skip
    return out


def _augment(
    pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, size: int, fill: Sequence[int]
) -> Tensor:
    if can_check_values(pixels):
        _check_values(pixels, images, rows, weights, size)
    pixels, images, rows, weights = (x.contiguous() for x in (pixels, images, rows, weights))
    if not (INTERPRETED or on_gpu(pixels)):
        return reference(pixels, images, rows, weights, size, fill)
    with torch.cuda.device_of(pixels):
        return _launch(pixels, images, rows, weights, size, fill)


augment_op = operator(
    "augment(Tensor pixels, Tensor images, Tensor rows, Tensor weights, int size, int[] fill) "
    "-> Tensor",
    _augment,
    lambda pixels, images, rows, weights, size, fill: pixels.new_empty(
        (rows.shape[0], size, size, 3)
    ),
)


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time: 256 views of 224."""
    pixels = torch.empty((256 * 500 * 375 * 3,), dtype=torch.uint8, device="meta")
    images = pixels.new_empty((256, 3), dtype=torch.int64)
    rows = images.new_empty((256, len(TABLE_COLUMNS)))
    with recording() as recorded:
        weights = pixels.new_empty((400_000,), dtype=torch.int32)
        _launch(pixels, images, rows, weights, 224, (124, 116, 104))
    resize, table, layer = recorded.launches[:3]
    yield "resize 224", resize, {"i64_rows": True, "max_fp64": 0}
    # AutoContrast's 256 values, and the conversion of factors from float64 to float32.
    yield "tables 224", table, {"i64_rows": True, "max_fp64": 48}
    # Affine maps, two pixels a thread.
    expect = {"i64_rows": True, "wide_loads": True, "max_fp64": 400, "max_regs": 168}
    yield "layer 224", layer, expect


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def augment(
    pixels: Tensor, images: Tensor, table: AugmentTable, size: int, fill: Sequence[int]
) -> Tensor:
    """Crop, resize and augment: one view per row of the table. No gradient; waits for nothing.

    Args:
        pixels: uint8 [P], decoded RGB images, each [height, width, 3] without gaps, in any order.
        images: int64 [N, 3]: offset of an image in ``pixels``, its width, its height.
        table: of B views, on the device of ``pixels``, from `augment_table` of
            `deit_fast.data.augment`. Its weights are valid for one ``size`` only.
        size: side S of the views, in pixels.
        fill: red, green and blue of the pixels that an affine map takes from outside the view.

    Returns:
        uint8 [B, S, S, 3], not flipped: ingest does that.

    Raises:
        ValueError: shapes, dtypes, devices or (on a CPU, or with DEIT_FAST_DEBUG=1) values of
            images and table that do not fit, by name and value.
    """
    _check(pixels, images, table, size, fill)
    rows, weights = table
    return augment_op(pixels, images, rows, weights, size, list(fill))


def _check(pixels: Any, images: Any, table: Any, size: Any, fill: Any) -> None:
    if not isinstance(table, tuple) or len(table) != 2:
        raise ValueError(f"table must be an AugmentTable, not {type(table).__name__}")
    rows, weights = table
    check_tensor("pixels", pixels, torch.uint8, ("P",))
    check_tensor("images", images, torch.int64, ("N", 3), pixels, "pixels")
    check_tensor("table.rows", rows, torch.int64, ("B", len(TABLE_COLUMNS)), pixels, "pixels")
    check_tensor("table.weights", weights, torch.int32, ("W",), pixels, "pixels")
    if not isinstance(size, int) or not 1 <= size <= _LARGEST:
        raise ValueError(f"size must be an integer in [1, {_LARGEST}], not {size}")
    if len(fill) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in fill):
        raise ValueError(f"fill must hold 3 integers in [0, 255], not {fill}")


def _check_values(pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, size: int) -> None:
    """Everything that would access memory outside a tensor.

    Raises:
        ValueError: names argument, column and value.
    """
    start, width, height = images.unbind(1)
    check_values("images: width", width, 1, 1 << 30)
    check_values("images: height", height, 1, 1 << 30)
    check_values("images: start", start, 0, len(pixels))
    end = start + 3 * width * height
    check_values("images: start + 3 width height", end, 0, len(pixels))
    columns = dict(zip(TABLE_COLUMNS, rows.unbind(1), strict=True))

    def check(name: str, values: Tensor, low: int, high: int | Tensor) -> None:
        check_values(f"table.rows: {name}", values, low, high)

    image = columns["image"]
    check("image", image, 0, len(images) - 1)
    for begin, extent, whole in (("left", "width", width[image]), ("top", "height", height[image])):
        check(begin, columns[begin], 0, whole)
        check(extent, columns[extent], 1, whole)
        check(f"{begin} + {extent}", columns[begin] + columns[extent], 1, whole)
    for axis in "xy":
        first, taps = columns[f"{axis}_weights"], columns[f"{axis}_taps"]
        check(f"{axis}_weights", first, 0, len(weights))
        check(f"{axis}_taps", taps, 1, len(weights))
        end = first + (1 + taps) * size
        check(f"{axis}_weights + (1 + {axis}_taps) size", end, 0, len(weights))
    check("flip", columns["flip"], 0, 1)
    for layer in ("first", "second"):
        check(f"{layer}_kind", columns[f"{layer}_kind"], 0, len(KINDS) - 1)
