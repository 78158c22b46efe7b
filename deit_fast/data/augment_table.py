"""A plan's crops and RandAugment operations as the integers and doubles of `kernels.augment`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from deit_fast.config import ViewRecipe
from deit_fast.errors import InputError
from deit_fast.kernels.augment import KINDS, TABLE_COLUMNS, AugmentTable, resize_columns
from deit_fast.views.plan import RANDAUGMENT_OPERATIONS
from deit_fast.views.rng import LEVEL_ONE

_PLACES = {name: place for place, name in enumerate(TABLE_COLUMNS)}
_KNOWN = {"crop": ("resized",), "augment": ("randaugment", "none"), "color_jitter": (0.0,)}
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def augment_table(
    recipe: ViewRecipe, rows: np.ndarray, boxes: npt.ArrayLike, image_index: npt.ArrayLike
) -> AugmentTable:
    """The table of a batch, on the CPU; `kernels.augment` then makes `data.augment`'s pixels.

    Args:
        recipe: its image_size is the side of the views.
        rows: PLAN_DTYPE [B], `ViewPlan.rows`.
        boxes: integers [B, 4]: left, top, width, height, `ViewPlan.crop_boxes`.
        image_index: integers [B], each view's row in the call's `images`.

    Raises:
        InputError: a recipe with another crop or other augmentations than RandAugment.
    """
    for name, known in _KNOWN.items():
        if getattr(recipe, name) not in known:
            raise InputError(
                f"the augment kernel knows view.{name}={' or '.join(map(str, known))}, "
                f"not {getattr(recipe, name)}"
            )
    size = recipe.image_size
    boxes = np.asarray(boxes, np.int64).reshape(-1, 4)
    table = np.zeros((len(rows), len(TABLE_COLUMNS)), np.int64)
    table[:, 0] = image_index
    table[:, 1:5] = boxes
    table[:, 5:9], weights = resize_columns(boxes[:, 2], boxes[:, 3], size)
    table[:, _PLACES["flip"]] = rows["flip"]
    doubles = table.view(np.float64)
    operations, levels = rows["operations"].tolist(), rows["levels"].tolist()
    for layer, prefix in enumerate(("first", "second")):
        begin = _PLACES[f"{prefix}_kind"]
        for view, (names, strengths) in enumerate(zip(operations, levels, strict=True)):
            name = RANDAUGMENT_OPERATIONS[names[layer]]
            if name == "none":
                continue
            kind, argument, matrix = kernel_operation(name, strengths[layer] / LEVEL_ONE, size)
            table[view, begin] = KINDS.index(kind)
            if isinstance(argument, float):
                doubles[view, begin + 1] = argument
            else:
                table[view, begin + 1] = argument
            doubles[view, begin + 2 : begin + 8] = matrix
    return AugmentTable(torch.from_numpy(table), weights)


def kernel_operation(
    name: str, level: float, size: int
) -> tuple[str, int | float, tuple[float, ...]]:
    """Kind, argument and matrix of an operation of `data.augment.apply_operation` at a level."""
    share = abs(level) / 10.0
    sign = -1.0 if level < 0 else 1.0
    strength = sign * share
    if name in ("color", "contrast", "brightness", "sharpness"):
        return name, max(0.1, 1.0 + sign * (share * 0.9)), _IDENTITY
    if name == "solarize":
        return name, 256 - min(256, int(share * 256)), _IDENTITY
    if name == "solarize_add":
        return name, min(128, int(share * 110)), _IDENTITY
    if name == "posterize":
        return name, 8 - (4 - int(share * 4)), _IDENTITY
    if name in ("auto_contrast", "equalize", "invert"):
        return name, 0, _IDENTITY
    matrices = {
        "rotate": lambda: _rotation(sign * (share * 30.0), size),
        "shear_x": lambda: (1.0, strength * 0.3, 0.0, 0.0, 1.0, 0.0),
        "shear_y": lambda: (1.0, 0.0, 0.0, strength * 0.3, 1.0, 0.0),
        "translate_x": lambda: (1.0, 0.0, strength * 0.45 * size, 0.0, 1.0, 0.0),
        "translate_y": lambda: (1.0, 0.0, 0.0, 0.0, 1.0, strength * 0.45 * size),
    }
    return "affine", 0, matrices[name]()


def _rotation(degrees: float, size: int) -> tuple[float, ...]:
    """The matrix of Pillow's Image.rotate: sine and cosine rounded to 15 decimals."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    back, half = round(-math.sin(angle), 15), size / 2
    return cos, sin, cos * -half + sin * -half + 0.0 + half, back, cos, (
        back * -half + cos * -half + 0.0 + half
    )  # fmt: skip
