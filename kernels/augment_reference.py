"""Crop, resize and RandAugment in plain PyTorch: the CPU's path; the kernels give the same bytes.

The contract is in ``augment``; the formulas come from Pillow's sources (Resample.c, Geometry.c,
Blend.c, ImageOps.py, ImageEnhance.py; 11.0 to 12.3 give the same pixels).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KINDS = (
    "none",
    # a table of 256 values per channel
    "invert",
    "solarize",
    "solarize_add",
    "posterize",
    "brightness",
    "contrast",
    "auto_contrast",
    "equalize",
    # more than a pixel's own channel
    "color",
    "sharpness",
    "affine",
)
"""Operations of a layer, by index."""

_LAYER = ("kind", "argument", *(f"matrix_{letter}" for letter in "abcdef"))
TABLE_COLUMNS = (
    "image",  # row of images
    "left", "top", "width", "height",  # the crop, pixels of the image
    "x_weights", "x_taps",  # where in weights the horizontal record begins, its taps
    "y_weights", "y_taps",
    "flip",  # 1: the layers act on the mirror image, which is then turned back
    *(f"first_{name}" for name in _LAYER),
    *(f"second_{name}" for name in _LAYER),
)  # fmt: skip
"""Columns of the table's int64 rows.

argument: solarize's threshold, what solarize_add adds, how many low bits posterize clears; for
brightness, contrast, color and sharpness the bits of the factor, float64. matrix: float64 bits of
the affine map from output to input pixels, (a x + b y + c, d x + e y + f).
"""

WEIGHT_BITS = 22  # Pillow's fixed point
HALF = 1 << (WEIGHT_BITS - 1)


class AugmentTable(NamedTuple):
    """The crop and the operations of each view.

    rows: int64 [B, 26], columns as in ``TABLE_COLUMNS``.
    weights: int32 [W], the distinct records of ``resize_record``, concatenated.
    """

    rows: Tensor
    weights: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AugmentTable:
        return AugmentTable(*(part.to(device, non_blocking=non_blocking) for part in self))

    def pin_memory(self) -> AugmentTable:
        return AugmentTable(*(part.pin_memory() for part in self))


# ---------------------------------------------------------------------------------------------
# Weights, made on the host
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def resize_record(length: int, size: int) -> npt.NDArray[np.int32]:
    """Pillow's bicubic with antialias from ``length`` to ``size`` pixels, int32 [1 + taps, size].

    Row 0: first input pixel of each output pixel; row 1 + k: weight of the k-th behind it, times
    2^22, 0 where that leaves the input. One tap of weight 1 where the length stays.
    """
    if length == size:
        unchanged = [np.arange(size), np.full(size, 1 << WEIGHT_BITS)]
        return np.stack(unchanged).astype(np.int32)
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), length)
    taps = int((end - first).max())
    source = first + np.arange(taps)[:, None]
    weights = np.where(source < end, _bicubic((source - centre + 0.5) * (1.0 / stretch)), 0.0)
    total = np.zeros(size)
    for row in weights:  # one after the other, as Pillow sums
        total += row
    weights /= total
    fixed = np.trunc(weights * (1 << WEIGHT_BITS) + np.where(weights < 0, -0.5, 0.5))
    return np.concatenate([first[None], fixed]).astype(np.int32)


def _bicubic(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic with a = -1/2."""
    a, u = -0.5, np.abs(t)
    near = ((a + 2.0) * u - (a + 3.0)) * u * u + 1
    far = (((u - 5) * u + 8) * u - 4) * a
    return np.where(u < 1.0, near, np.where(u < 2.0, far, 0.0))


def resize_columns(
    widths: npt.ArrayLike, heights: npt.ArrayLike, size: int
) -> tuple[npt.NDArray[np.int64], Tensor]:
    """The four weight columns of a table, int64 [B, 4], and its weights, int32 [W].

    Args:
        widths, heights: of the crops, integers [B].
        size: side of the views.
    """
    lengths = np.stack([np.asarray(widths, np.int64), np.asarray(heights, np.int64)], axis=1)
    distinct, which = np.unique(lengths, return_inverse=True)
    records = [resize_record(length, size) for length in distinct.tolist()]
    sizes = np.array([record.size for record in records], np.int64)
    columns = np.stack([np.cumsum(sizes) - sizes, sizes // size - 1], axis=1)
    weights = np.concatenate([np.empty(0, np.int32), *(record.ravel() for record in records)])
    return columns[which.ravel()].reshape(-1, 4), torch.from_numpy(weights)


# ---------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------


def reference(
    pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, size: int, fill: Sequence[int]
) -> Tensor:
    """Augment of checked, contiguous arguments, view by view."""
    views = pixels.new_empty((len(rows), size, size, 3))
    sources = images.tolist()
    doubles = rows.view(torch.float64).tolist()
    for view, row, bits in zip(views, rows.tolist(), doubles, strict=True):
        start, width, height = sources[row[0]]
        left, top, crop_width, crop_height, x_at, x_taps, y_at, y_taps, flip = row[1:10]
        image = pixels[start : start + width * height * 3].view(height, width, 3)
        x = image[top : top + crop_height, left : left + crop_width]
        x = _resize(x, 1, weights[x_at : x_at + (1 + x_taps) * size].view(-1, size))
        x = _resize(x, 0, weights[y_at : y_at + (1 + y_taps) * size].view(-1, size))
        for at in (10, 18):
            kind = KINDS[row[at]]
            x = _layer(x, kind, row[at + 1], bits[at + 1 : at + 8], flip, fill)
        view.copy_(x)
    return views


def _resize(x: Tensor, axis: int, record: Tensor) -> Tensor:
    """Resize one axis of uint8 [height, width, 3]."""
    first, last = record[0], x.shape[axis] - 1
    along = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    wide = x.to(torch.int32)
    total = torch.full((), HALF, dtype=torch.int32, device=x.device)
    for tap, weight in enumerate(record[1:]):
        chosen = wide.index_select(axis, (first + tap).clamp_(max=last))
        total = chosen.mul_(weight.view(along)).add_(total)
    return (total >> WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


def _layer(
    x: Tensor, kind: str, argument: int, doubles: list[float], flip: int, fill: Sequence[int]
) -> Tensor:
    """One operation on uint8 [S, S, 3]; ``doubles``: the factor, then the matrix."""
    if kind == "none":
        return x
    if kind == "affine":
        warped = _affine(x.flip(1) if flip else x, doubles[1:], fill)
        return warped.flip(1) if flip else warped
    if kind == "color":
        return _blend(_luma(x)[..., None], x, doubles[0])
    if kind == "sharpness":
        return _blend(_smooth(x), x, doubles[0])
    tables = _tables(x, kind, argument, doubles[0])
    return torch.stack([tables[c][x[..., c].long()] for c in range(3)], dim=-1)


def _tables(x: Tensor, kind: str, argument: int, factor: float) -> list[Tensor]:
    """uint8 [256] per channel: the new value of each old one."""
    v = torch.arange(256, dtype=torch.int32, device=x.device)
    if kind in ("auto_contrast", "equalize"):
        counts = [torch.bincount(x[..., c].flatten(), minlength=256) for c in range(3)]
        make = _stretched if kind == "auto_contrast" else _equalized
        return [make(v, count).to(torch.uint8) for count in counts]
    if kind == "contrast":
        count = x.shape[0] * x.shape[1]
        mean = (2 * _luma(x).sum() + count) // (2 * count)
        table = _blend(mean.to(torch.int32), v, factor)
    elif kind == "brightness":
        table = _blend(torch.zeros_like(v), v, factor)
    elif kind == "invert":
        table = 255 - v
    elif kind == "solarize":
        table = torch.where(v < argument, v, 255 - v)
    elif kind == "solarize_add":
        table = torch.where(v < 128, (v + argument).clamp(max=255), v)
    else:
        table = v >> argument << argument
    return [table.to(torch.uint8)] * 3


def _equalized(v: Tensor, counts: Tensor) -> Tensor:
    last = counts.nonzero().max()
    step = int(counts.sum() - counts[last]) // 255
    if step == 0:
        return v
    return ((step // 2 + counts.cumsum(0) - counts) // step).clamp(max=255)


def _stretched(v: Tensor, counts: Tensor) -> Tensor:
    used = counts.nonzero()
    low, high = int(used.min()), int(used.max())
    if low == high:
        return v
    scale = 255.0 / (high - low)
    return (v.double() * scale + -low * scale).to(torch.int32).clamp(0, 255)


def _luma(x: Tensor) -> Tensor:
    """Pillow's conversion to L, int32 [S, S]."""
    red, green, blue = x.to(torch.int32).unbind(-1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _smooth(x: Tensor) -> Tensor:
    """ImageFilter.SMOOTH, int32; the one-pixel border is the input's."""
    x = x.to(torch.int32)
    result = x.clone()
    if min(x.shape[:2]) < 3:
        return result
    high, wide = x.shape[0] - 2, x.shape[1] - 2
    total = 4 * x[1:-1, 1:-1]
    for top in range(3):
        for left in range(3):
            total += x[top : top + high, left : left + wide]
    result[1:-1, 1:-1] = (2 * total + 13) // 26
    return result


def _blend(degenerate: Tensor, x: Tensor, factor: float) -> Tensor:
    """degenerate + factor (x - degenerate), product and sum each rounded to float32, truncated."""
    d = degenerate.to(torch.int32)
    alpha = torch.tensor(factor, dtype=torch.float32, device=x.device)
    change = (x.to(torch.int32) - d).to(torch.float32).mul_(alpha)
    return (d.to(torch.float32) + change).clamp_(0, 255).to(torch.uint8)


def _affine(x: Tensor, matrix: list[float], fill: Sequence[int]) -> Tensor:
    """Image.transform(AFFINE, BICUBIC): Keys' cubic with a = -1, in float64, truncated."""
    a, b, c, d, e, f = matrix
    size = x.shape[0]
    centre = torch.arange(size, dtype=torch.float64, device=x.device) + 0.5
    xs, ys = centre[None, :], centre[:, None]
    x_in, y_in = a * xs + b * ys + c, d * xs + e * ys + f
    outside = (x_in < 0) | (x_in >= size) | (y_in < 0) | (y_in >= size)
    columns, dx = _neighbours(x_in, size)
    lines, dy = _neighbours(y_in, size)
    flat, dx, dy = x.reshape(-1, 3).to(torch.int32), dx[..., None], dy[..., None]
    across = [_cubic([flat[line * size + column] for column in columns], dx) for line in lines]
    value = _cubic(across, dy).clamp_(0, 255).to(torch.uint8)
    value[outside] = torch.tensor(list(fill), dtype=torch.uint8, device=x.device)
    return value


def _neighbours(x: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """Four indices around a coordinate, clamped into the image, and the fraction."""
    x = x - 0.5
    floor = x.floor()
    index = floor.long()
    return [(index + step).clamp(0, size - 1) for step in (-1, 0, 1, 2)], x - floor


def _cubic(values: Sequence[Tensor], d: Tensor) -> Tensor:
    v1, v2, v3, v4 = values
    p3 = 2 * (v1 - v2) + v3 - v4
    p4 = v2 - v1 - v3 + v4
    return v2 + d * ((v3 - v1) + d * (p3 + d * p4))
