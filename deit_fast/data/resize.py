"""Crop and resize of decoded pixels: Pillow's bicubic to the byte, in a quarter of its time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deit_fast import _C
from deit_fast.views.plan import shorter_side_to


def crop_and_resize(
    pixels: np.ndarray,
    box: Sequence[int],
    width: int,
    height: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Crop, then resize the crop; no pixel outside the crop counts.

    Equal to `image.crop(...).resize((width, height), BICUBIC)` of Pillow 11 to 12.3, with its
    antialias, byte for byte. Holds no GIL while it works.

    Args:
        pixels: uint8 [H, W, 3]; rows may be apart, the values of a row may not. A memory map will
            do: only the crop is read.
        box: left, top, width and height of the crop, in pixels, within the image.
        width, height: of the result, in pixels.
        out: where the result goes, contiguous; none: a new array.

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
    wanted = (height, width, 3)
    if min(wanted) < 1 or out.shape != wanted or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 {wanted}, not {out.dtype} {out.shape}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous, not {out.strides}")
    if box_height > 100 * box_width and height < box_height and width != box_width:
        # Of such a strip Pillow resizes the height first, and rounds in between.
        strip = crop_and_resize(pixels, box, box_width, height)
        return crop_and_resize(strip, (0, 0, box_width, height), width, height, out)
    _C.crop_resize(
        pixels.ctypes.data, pixels.strides[0], (left, top, box_width, box_height),
        width, height, out.ctypes.data,
    )  # fmt: skip
    return out


def resize_shorter_side(pixels: np.ndarray, side: int) -> np.ndarray:
    """The whole image with its shorter side resized, as torchvision's `Resize` on a PIL image.

    Args:
        pixels: uint8 [H, W, 3].
        side: in pixels.
    """
    height, width = pixels.shape[:2]
    across, down = (int(n) for n in shorter_side_to(side, np.array(width), np.array(height)))
    return crop_and_resize(pixels, (0, 0, width, height), across, down)
