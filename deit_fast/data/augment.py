"""Augmentation of Pillow images, from a plan, bit for bit as the recipes' own code does it.

RandAugment is timm's `rand-m9-mstd0.5-inc1`, ThreeAugment DeiT-III's, colour jitter torchvision's.

The flip comes later, in ingest, though the recipes flip first. So a view that will be flipped is
augmented in the mirror, unless none of its operations tells left from right. (Mirrored arguments
would do as well but for rounding: bicubic sums taken from the other side differ by 1 in about one
value of 100,000.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deit_fast.views.plan import OPERATIONS
from deit_fast.views.rng import LEVEL_ONE

Color = tuple[int, int, int]

_ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}

# Strength in [-1, 1] and side to (a, b, c, d, e, f): output (x, y) comes from
# (a x + b y + c, d x + e y + f).
_AFFINE: dict[str, Callable[[float, int], tuple[float, ...]]] = {
    "shear_x": lambda strength, side: (1, strength * 0.3, 0, 0, 1, 0),
    "shear_y": lambda strength, side: (1, 0, 0, strength * 0.3, 1, 0),
    "translate_x": lambda strength, side: (1, 0, strength * 0.45 * side, 0, 1, 0),
    "translate_y": lambda strength, side: (1, 0, 0, 0, 1, strength * 0.45 * side),
}


_TELL_LEFT_FROM_RIGHT = {OPERATIONS.index(name) for name in ("rotate", *_AFFINE)}


def augment(
    image: Image.Image, operations: Sequence[int], levels: Sequence[int], flip: bool, fill: Color
) -> Image.Image:
    """Apply a plan's operations as if to the mirror image of a view that will be flipped.

    Args:
        image: RGB, square.
        operations: ids, places in ``OPERATIONS``; 0: none.
        levels: strength of each, in 1 / 1024; negative: the operation's opposite direction.
        flip: whether the result will be mirrored later.
        fill: colour of pixels from outside the image.
    """
    mirror = flip and not _TELL_LEFT_FROM_RIGHT.isdisjoint(operations)
    image = ImageOps.mirror(image) if mirror else image
    for operation, level in zip(operations, levels, strict=True):
        image = apply_operation(image, OPERATIONS[operation], level / LEVEL_ONE, fill)
    return ImageOps.mirror(image) if mirror else image


def apply_operation(image: Image.Image, name: str, level: float, fill: Color) -> Image.Image:
    """One operation at a level in [-10, 10]; the sign is the direction, where there are two.

    Arguments grow with the level as in timm's "increasing" set: rotation 3 degrees a level, shear
    0.03, translation 0.045 of the side, the four enhancers 1 +- 0.09 (at least 0.1). The level of
    a Gaussian blur is its radius in pixels.
    """
    share = abs(level) / 10.0
    sign = -1.0 if level < 0 else 1.0
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(max(0.1, 1.0 + sign * (share * 0.9)))
    if name == "rotate":
        return image.rotate(sign * (share * 30.0), Image.Resampling.BICUBIC, fillcolor=fill)
    if name in _AFFINE:
        matrix = _AFFINE[name](sign * share, image.size[0])
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill
        )
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "grayscale":
        return image.convert("L").convert("RGB")
    if name == "gaussian_blur":
        return image.filter(ImageFilter.GaussianBlur(level))
    if name == "none":
        return image
    return image.point(_pointwise_table(name, share) * 3)


def _pointwise_table(name: str, share: float) -> list[int]:
    """New value of each of the 256 old ones."""
    if name == "invert":
        return [255 - value for value in range(256)]
    if name == "solarize":
        threshold = 256 - min(256, int(share * 256))
        return [value if value < threshold else 255 - value for value in range(256)]
    if name == "solarize_add":
        add = min(128, int(share * 110))
        return [min(255, value + add) if value < 128 else value for value in range(256)]
    if name == "posterize":
        # 0 bits are black; Pillow's own function refuses that from 13.0 on.
        drop = 8 - (4 - int(share * 4))
        return [value >> drop << drop for value in range(256)]
    raise ValueError(f"unknown operation {name!r}")
