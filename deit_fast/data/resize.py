"""Crop and resize of decoded pixels: the bytes of Pillow's bicubic in a quarter of its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deit_fast import _C
from deit_fast.views.plan import shorter_side_to


def is_strip(width: Any, height: Any, new_height: int) -> Any:
    """Whether Pillow resizes the height of a crop first, and rounds in between.

    Its Image.resize does so where a crop taller than 100 times its width becomes lower.

    Args:
        width, height: of the crop, integers or arrays of them.
    """
    return (height > 100 * width) & (height > new_height)


def crop_and_resize(
    pixels: np.ndarray,
    box: Sequence[int],
    width: int,
    height: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Crop, then resize the crop; pixels outside the crop have no influence.

    Equal to `image.crop(...).resize((width, height), BICUBIC)` of Pillow 11 to 12.3, with its
    antialias, byte for byte. Releases the GIL.

    Args:
        pixels: uint8 [H, W, 3], contiguous within each row. Only the crop is read, which suits a
            memory map.
        box: left, top, width and height of the crop, in pixels, within the image.
        width, height: of the result, in pixels.
        out: contiguous, written to; none: a new array.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: shapes, dtypes or a box that do not fit, by name and value.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    if pixels.strides[1:] != (3, 1):
        raise ValueError(f"the values of a row of pixels must be adjacent, not {pixels.strides}")
    left, top, box_width, box_height = box
    rows, columns = pixels.shape[:2]
    if not (
        left >= 0 and top >= 0 and box_width > 0 and box_height > 0
        and left + box_width <= columns and top + box_height <= rows
    ):  # fmt: skip
        raise ValueError(f"box {tuple(box)} leaves the image of {columns} x {rows} pixels")
    if out is None:
        out = np.empty((height, width, 3), np.uint8)
    shape = (height, width, 3)
    if min(shape) < 1 or out.shape != shape or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 {shape}, not {out.dtype} {out.shape}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous, not {out.strides}")
    if is_strip(box_width, box_height, height) and width != box_width:
        strip = crop_and_resize(pixels, box, box_width, height)
        return crop_and_resize(strip, (0, 0, box_width, height), width, height, out)
    _C.crop_resize(
        pixels.ctypes.data, pixels.strides[0], (left, top, box_width, box_height),
        width, height, out.ctypes.data,
    )  # fmt: skip
    return out


def resize_shorter_side(pixels: np.ndarray, side: int) -> np.ndarray:
    """The whole image with its shorter side resized, as torchvision's `Resize` of a PIL image.

    Args:
        pixels: uint8 [H, W, 3].
        side: in pixels.
    """
    height, width = pixels.shape[:2]
    across, down = (int(n) for n in shorter_side_to(side, np.array(width), np.array(height)))
    return crop_and_resize(pixels, (0, 0, width, height), across, down)


def resize_and_crop(
    pixels: np.ndarray, box: Sequence[int], width: int, height: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize the whole image, its shorter side to `width`, then crop, reflecting at the edges.

    Equal to torchvision's `Resize`, then `crop` of `pad(..., padding_mode="reflect")`.

    Args:
        pixels: uint8 [H, W, 3].
        box: left, top, width, height in the resized image; may leave it by less than its sides.
        width, height: sides of the box.
        out: written to; none: a new array.

    Returns:
        uint8 [height, width, 3].
    """
    left, top, across, down = box
    resized = resize_shorter_side(pixels, width)
    x = _reflected(np.arange(left, left + across), resized.shape[1])
    y = _reflected(np.arange(top, top + down), resized.shape[0])
    view = resized[y[:, None], x]
    if out is None:
        return view
    out[:] = view
    return out


def _reflected(positions: np.ndarray, side: int) -> np.ndarray:
    positions = np.abs(positions)
    return np.where(positions < side, positions, 2 * (side - 1) - positions)
