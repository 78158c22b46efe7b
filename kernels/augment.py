"""From decoded uint8 images of any size to augmented square views: crop, resize, RandAugment.

One row of the table makes one view, byte for byte what Pillow 11.0 to 12.3 makes of it:

    crop -> bicubic resize with antialias -> first operation -> second operation

Resize is integers alone: weights in units of 2^-22 made on the host, once for each crop length (1.7
MB go with a batch of 256 views); lines first, rounded and clipped to a byte, then columns. An
operation is a table of 256 values per channel, for which Contrast, AutoContrast and Equalize first
look at the whole view, or Color, Sharpness, or an affine map with Pillow's cubic (rotate, shear,
translate). The operations of a view that ingest will flip act on its mirror image.

Bytes of a view of 3 S^2: the crop read once from memory (1.5 times in all: eight lines of the view
share what they need of it), 3 S^2 written; then 6 S^2 per operation, of which DeiT's recipe has one
on average, and 3 S^2 more for a histogram or mean, a tenth of the views in each layer. At S = 224
and crops of 300 x 300 that is 0.75 MB, 64 us for 256 views at 3 TB/s; the resize itself is bound by
its integer work. Five launches: resize, then per layer the tables and the operation, whose programs
return at once for a view without it. Nothing is copied: views go to and fro between the result and
one buffer like it, and begin where their last operation ends in the result.

Numerics: blends in float32, product and sum rounded each, no fused multiply-add, as Pillow's C.
The affine map is double as in Pillow: in float32 one value of 7,000 differs by 1. That is 200
double-precision instructions a pixel and 10 M a view, of which one in three is warped: 0.7 us each
on an H100 (64 a clock and SM), some 16 us on a GPU with 2. AutoContrast's table is double too, 256
values of a channel.

On a CPU the plain PyTorch of `augment_reference` makes the same bytes, slower than Pillow; with
TRITON_INTERPRET=1 the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .augment_launch import require as _require
from .augment_reference import KINDS, TABLE_COLUMNS, AugmentTable, resize_columns

__all__ = ["KINDS", "TABLE_COLUMNS", "AugmentTable", "augment", "resize_columns"]

_LARGEST = 8192  # a side; far below where a byte's place in its view leaves int32


def _check(pixels: Any, images: Any, table: Any, size: Any, fill: Any) -> None:
    _require(
        isinstance(table, tuple) and len(table) == 2,
        f"table must be an AugmentTable, not {type(table).__name__}",
    )
    columns = len(TABLE_COLUMNS)
    for name, value, dtype, shape in (
        ("pixels", pixels, torch.uint8, ("P",)),
        ("images", images, torch.int64, ("N", 3)),
        ("table.rows", table[0], torch.int64, ("B", columns)),
        ("table.weights", table[1], torch.int32, ("W",)),
    ):
        _require(isinstance(value, Tensor), f"{name} must be a tensor, not {type(value).__name__}")
        _require(value.dtype == dtype, f"{name} must be {dtype}, not {value.dtype}")
        fits = value.dim() == len(shape) and shape[1:] in ((), tuple(value.shape[1:]))
        wanted = ", ".join(map(str, shape))
        _require(fits, f"{name} must have shape [{wanted}], not {tuple(value.shape)}")
        _require(
            value.device == pixels.device,
            f"{name} is on {value.device} but pixels is on {pixels.device}",
        )
    _require(
        isinstance(size, int) and 1 <= size <= _LARGEST,
        f"size must be an integer in [1, {_LARGEST}], not {size}",
    )
    _require(
        len(fill) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in fill),
        f"fill must hold 3 integers in [0, 255], not {fill}",
    )


def augment(
    pixels: Tensor, images: Tensor, table: AugmentTable, size: int, fill: Sequence[int]
) -> Tensor:
    """Crop, resize and augment: one view per row of the table. No gradient; waits for nothing.

    Args:
        pixels: uint8 [P], decoded RGB images, each [height, width, 3] without gaps, in any order.
        images: int64 [N, 3]: where in ``pixels`` an image starts, its width, its height.
        table: of B views, from `deit_fast.data.augment_table`, on the device of ``pixels``. It is
            for one ``size``: the weights are.
        size: side S of the views, pixels.
        fill: red, green and blue of what an affine map brings in from outside.

    Returns:
        uint8 [B, S, S, 3], not flipped: ingest does that.

    Raises:
        ValueError: shapes, dtypes, devices or (on a CPU, or with DEIT_FAST_DEBUG=1) values of
            images and table that do not fit, by name and value.
    """
    _check(pixels, images, table, size, fill)
    rows, weights = table
    return torch.ops.deit_fast.augment(pixels, images, rows, weights, size, list(fill))
