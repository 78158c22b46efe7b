"""timm's RandAugment operations under this project's names."""

from __future__ import annotations

import random
from unittest import mock

from PIL import Image
from timm.data import auto_augment

FILL = (124, 116, 104)  # round(255 * ImageNet's mean)
TIMM = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def timms(image: Image.Image, name: str, level: float) -> Image.Image:
    """timm's operation at a fixed level; its coin for the direction is made to fall our way."""
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    operation = auto_augment.AugmentOp(TIMM[name], prob=1.0, magnitude=abs(level), hparams=hparams)
    with mock.patch.object(random, "random", lambda: 1.0 if level < 0 else 0.0):
        return operation(image)
