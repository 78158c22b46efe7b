"""Views of decoded images: crop, resize and augment, on this host or as input of a kernel.

RandAugment is timm's `rand-m9-mstd0.5-inc1`, ThreeAugment DeiT-III's, colour jitter torchvision's,
all bit for bit.

Ingest flips views later, though the recipes flip first. The operations of a view that will be
flipped are therefore applied to its mirror image, unless none of them depends on the direction.
(Mirrored arguments would differ in rounding: bicubic sums taken from the other side differ by 1 in
about one value of 100,000.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deit_fast.config import ViewConfig
from deit_fast.data.resize import crop_and_resize, is_strip, resize_and_crop
from deit_fast.errors import InputError
from deit_fast.kernels.augment import KINDS, TABLE_COLUMNS, AugmentTable, resize_columns
from deit_fast.views.plan import OPERATIONS
from deit_fast.views.rng import LEVEL_ONE

Color = tuple[int, int, int]

_ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}
_AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_DIRECTED = {OPERATIONS.index(name) for name in _AFFINE}

_COLUMN = {name: index for index, name in enumerate(TABLE_COLUMNS)}
_KERNEL_KNOWS = {"crop": ("resized",), "augment": ("randaugment", "none"), "color_jitter": (0.0,)}


class Operation(NamedTuple):
    """An operation with its arguments.

    Attributes:
        kind: its name, or "affine" for rotate, shear and translate.
        argument: factor of an enhancer, threshold of solarize, summand of solarize_add, low bits
            that posterize clears, radius of a blur in pixels; else 0.
        matrix: affine: output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f).
    """

    kind: str
    argument: int | float = 0
    matrix: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def operation_at(name: str, level: float, size: int) -> Operation:
    """An operation of `OPERATIONS` at a level in [-10, 10]; the sign is the direction, if any.

    Arguments grow with the level as in timm's "increasing" set: rotation 3 degrees a level, shear
    0.03, translation 0.045 of the side, the four enhancers 1 +- 0.09 (at least 0.1). The level of
    a Gaussian blur is its radius.

    Args:
        size: side of the view, pixels.
    """
    share = abs(level) / 10.0
    sign = -1.0 if level < 0 else 1.0
    strength = sign * share
    if name in _ENHANCERS:
        return Operation(name, max(0.1, 1.0 + sign * (share * 0.9)))
    if name == "solarize":
        return Operation(name, 256 - min(256, int(share * 256)))
    if name == "solarize_add":
        return Operation(name, min(128, int(share * 110)))
    if name == "posterize":
        return Operation(name, 8 - (4 - int(share * 4)))
    if name == "gaussian_blur":
        return Operation(name, level)
    if name == "rotate":
        return Operation("affine", 0, _rotation(sign * (share * 30.0), size))
    if name == "shear_x":
        return Operation("affine", 0, (1.0, strength * 0.3, 0.0, 0.0, 1.0, 0.0))
    if name == "shear_y":
        return Operation("affine", 0, (1.0, 0.0, 0.0, strength * 0.3, 1.0, 0.0))
    if name == "translate_x":
        return Operation("affine", 0, (1.0, 0.0, strength * 0.45 * size, 0.0, 1.0, 0.0))
    if name == "translate_y":
        return Operation("affine", 0, (1.0, 0.0, 0.0, 0.0, 1.0, strength * 0.45 * size))
    return Operation(name)


def _rotation(degrees: float, size: int) -> tuple[float, float, float, float, float, float]:
    """The matrix of Pillow's Image.rotate: sine and cosine rounded to 15 decimals."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin, half = round(-math.sin(angle), 15), size / 2
    x = cos * -half + sin * -half + 0.0 + half
    y = minus_sin * -half + cos * -half + 0.0 + half
    return cos, sin, x, minus_sin, cos, y


# ---------------------------------------------------------------------------------------------
# On this host
# ---------------------------------------------------------------------------------------------


def render_views(
    pixels: Sequence[np.ndarray],
    image_of: np.ndarray,
    rows: np.ndarray,
    boxes: np.ndarray,
    view: ViewConfig,
    out: np.ndarray,
    run: Callable[..., Iterable[None]] = map,
) -> None:
    """Crop, resize and augment on this host; flip, erasing and mixing are left to ingest.

    Args:
        pixels: whole images, uint8 [H, W, 3].
        image_of: index of each view's image, integers [n].
        rows: plan of the views, `plan_dtype` [n].
        boxes: their crops from `ViewPlan.crop_boxes`, [n, 4].
        out: uint8 [n, S, S, 3], written to.
        run: `map`, or the `map` of a thread pool.
    """
    cut = resize_and_crop if view.crop == "simple" else crop_and_resize
    size, fill = out.shape[1], fill_color(view)

    def render(
        out: np.ndarray, image: int, box: list[int], names: list[int], levels: list[int], flip: int
    ) -> None:
        cut(pixels[image], box, size, size, out)
        if any(names):
            out[:] = augment(Image.fromarray(out), names, levels, bool(flip), fill)

    columns = (rows["operations"].tolist(), rows["levels"].tolist(), rows["flip"].tolist())
    for _ in run(render, out, image_of.tolist(), boxes.tolist(), *columns):
        pass


def fill_color(view: ViewConfig) -> Color:
    """Colour of pixels from outside the image, as timm's `img_mean`."""
    red, green, blue = (round(255 * mean) for mean in view.mean)
    return red, green, blue


def augment(
    image: Image.Image, operations: Sequence[int], levels: Sequence[int], flip: bool, fill: Color
) -> Image.Image:
    """Apply a plan's operations, as if to the mirror image of a view that will be flipped.

    Args:
        image: RGB, square.
        operations: indices into ``OPERATIONS``.
        levels: strength of each, in 1 / 1024; negative: the operation's opposite direction.
        flip: whether the result will be mirrored later.
        fill: colour of pixels from outside the image.
    """
    mirror = flip and not _DIRECTED.isdisjoint(operations)
    image = ImageOps.mirror(image) if mirror else image
    for operation, level in zip(operations, levels, strict=True):
        image = apply_operation(image, OPERATIONS[operation], level / LEVEL_ONE, fill)
    return ImageOps.mirror(image) if mirror else image


def apply_operation(image: Image.Image, name: str, level: float, fill: Color) -> Image.Image:
    """One operation on a square image; arguments as for `operation_at`."""
    kind, argument, matrix = operation_at(name, level, image.size[0])
    if kind == "none":
        return image
    if kind == "affine":
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill
        )
    if kind in _ENHANCERS:
        return _ENHANCERS[kind](image).enhance(argument)
    if kind == "auto_contrast":
        return ImageOps.autocontrast(image)
    if kind == "equalize":
        return ImageOps.equalize(image)
    if kind == "grayscale":
        return image.convert("L").convert("RGB")
    if kind == "gaussian_blur":
        return image.filter(ImageFilter.GaussianBlur(argument))
    return image.point(_new_values(kind, int(argument)) * 3)


def _new_values(kind: str, argument: int) -> list[int]:
    """New value of each of the 256 old values, of an operation on single values."""
    values = range(256)
    if kind == "invert":
        return [255 - value for value in values]
    if kind == "solarize":
        return [value if value < argument else 255 - value for value in values]
    if kind == "solarize_add":
        return [min(255, value + argument) if value < 128 else value for value in values]
    assert kind == "posterize", kind
    # Clearing all 8 bits gives black; Pillow's own function refuses that from 13.0 on.
    return [value >> argument << argument for value in values]


# ---------------------------------------------------------------------------------------------
# As input of kernels.augment
# ---------------------------------------------------------------------------------------------


def augment_table(
    view: ViewConfig,
    rows: np.ndarray,
    boxes: npt.ArrayLike,
    image_of: npt.ArrayLike,
    size: int | None = None,
) -> AugmentTable:
    """A batch as a table on the CPU, from which `kernels.augment` makes the pixels of `augment`.

    Args:
        rows: PLAN_DTYPE [B], `ViewPlan.rows`.
        boxes: integers [B, 4]: left, top, width, height, `ViewPlan.crop_boxes`.
        image_of: integers [B], each view's row in the kernel's `images`.
        size: side of the views, pixels; None: `view.image_size`.

    Raises:
        InputError: another crop, other augmentations than RandAugment, more than two layers, or a
            strip (``is_strip``), of which the kernel makes other pixels than Pillow.
    """
    for name, known in _KERNEL_KNOWS.items():
        if getattr(view, name) not in known:
            raise InputError(
                f"the augment kernel knows view.{name}={' or '.join(map(str, known))}, "
                f"not {getattr(view, name)}"
            )
    if (layers := rows["operations"].shape[1]) != 2:
        raise InputError(f"the augment kernel knows 2 operations of a view, not {layers}")
    size = view.image_size if size is None else size
    boxes = np.asarray(boxes, np.int64).reshape(-1, 4)
    for _, _, width, height in boxes[is_strip(boxes[:, 2], boxes[:, 3], view.image_size)]:
        raise InputError(
            f"a crop of {width} x {height} pixels is taller than 100 times its width: Pillow "
            f"resizes its height first, the augment kernel does not; data.loader=pillow does"
        )
    table = np.zeros((len(rows), len(TABLE_COLUMNS)), np.int64)
    table[:, 0] = image_of
    table[:, 1:5] = boxes
    table[:, 5:9], weights = resize_columns(boxes[:, 2], boxes[:, 3], size)
    table[:, _COLUMN["flip"]] = rows["flip"]
    doubles = table.view(np.float64)
    operations, levels = rows["operations"].tolist(), rows["levels"].tolist()
    for layer, prefix in enumerate(("first", "second")):
        column = _COLUMN[f"{prefix}_kind"]
        for row in np.flatnonzero(rows["operations"][:, layer]).tolist():
            kind, argument, matrix = operation_at(
                OPERATIONS[operations[row][layer]], levels[row][layer] / LEVEL_ONE, size
            )
            table[row, column] = KINDS.index(kind)
            values = doubles if isinstance(argument, float) else table
            values[row, column + 1] = argument
            doubles[row, column + 2 : column + 8] = matrix
    return AugmentTable(torch.from_numpy(table), weights)
