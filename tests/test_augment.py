"""RandAugment: timm's pixels for the same parameters, and its law over many draws."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.stats import norm
from sklearn.datasets import load_sample_image
from timm.data import auto_augment

from deit_fast.config import InputError, ViewRecipe
from deit_fast.data.augment import apply_operation, randaugment
from deit_fast.data.loader import crop_and_resize
from deit_fast.draws import LEVEL_ONE, level_table
from deit_fast.views import RANDAUGMENT_OPERATIONS, ViewPlan, fingerprint

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
LEVELS = (0.0, 1 / LEVEL_ONE, 3.7119140625, 7.5, 8.9990234375, 9.5, 10.0)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Two photographs, noise, a nearly white and a flat image; odd and even sides."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    views = [crop_and_resize(photo, (40, 60, 300, 260), 224) for photo in photos]
    arrays = [
        rng.integers(0, 256, (97, 97, 3)),
        np.minimum(rng.integers(250, 262, (64, 64, 3)), 255),
        np.full((33, 33, 3), 77),
    ]
    return views + [Image.fromarray(array.astype(np.uint8)) for array in arrays]


def timms(image: Image.Image, name: str, level: float) -> Image.Image:
    """timm's operation at a fixed level; its coin for the direction is made to fall our way."""
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    operation = auto_augment.AugmentOp(TIMM[name], prob=1.0, magnitude=abs(level), hparams=hparams)
    with mock.patch.object(random, "random", lambda: 1.0 if level < 0 else 0.0):
        return operation(image)


def test_the_operations_are_timms_and_in_its_order():
    assert list(TIMM.values()) == auto_augment._RAND_INCREASING_TRANSFORMS
    assert ("none", *TIMM) == RANDAUGMENT_OPERATIONS


@pytest.mark.parametrize("name", TIMM)
def test_pixels_equal_timms(images, name):
    for image in images:
        for level in LEVELS:
            for signed in (level, -level):
                ours = apply_operation(image, name, signed, FILL)
                np.testing.assert_array_equal(
                    np.asarray(ours), np.asarray(timms(image, name, signed)), f"{signed}"
                )


@pytest.mark.parametrize("name", TIMM)
def test_flip_after_equals_flip_before(images, name):
    for image in images:
        for level in LEVELS:
            for signed in (level, -level):
                before = timms(ImageOps.mirror(image), name, signed)
                plan = [RANDAUGMENT_OPERATIONS.index(name)], [round(signed * LEVEL_ONE)]
                after = ImageOps.mirror(randaugment(image, *plan, True, FILL))
                np.testing.assert_array_equal(np.asarray(after), np.asarray(before), f"{signed}")


def test_layers_run_in_order(images):
    ids = [RANDAUGMENT_OPERATIONS.index(name) for name in ("rotate", "solarize_add")]
    levels = [9 * LEVEL_ONE, 8 * LEVEL_ONE]
    ours = randaugment(images[0], ids, levels, False, FILL)
    theirs = timms(timms(images[0], "rotate", 9.0), "solarize_add", 8.0)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.any(np.asarray(ours) != np.asarray(randaugment(images[0], ids[::-1], levels[::-1],
                                                             False, FILL)))  # fmt: skip


def test_zero_bits_are_black_on_every_pillow(images):
    assert not np.asarray(apply_operation(images[0], "posterize", 10.0, FILL)).any()


def test_law_of_the_draws():
    """25 % untouched, each operation 1/15, P(level 10) 2.28 %, half of the signs (timm's law)."""
    count = 100_000
    rows = ViewPlan(ViewRecipe(), 5, count).rows(np.arange(count), np.zeros(count, int))
    operations, levels = rows["operations"], rows["levels"].astype(int)

    def near(share: float, expected: float) -> bool:
        return abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)

    assert near((operations == 0).all(axis=1).mean(), 0.25)
    assert near((operations[:, 0] > 0).mean(), 0.5) and near((operations[:, 1] > 0).mean(), 0.5)
    for layer in operations.T:
        for operation in range(1, 16):
            assert near((layer == operation).mean(), 0.5 / 15)
    assert not levels[operations == 0].any()
    drawn = levels[operations > 0]
    assert abs((drawn < 0).mean() - 0.5) < 0.01
    assert abs((abs(drawn) == 10 * LEVEL_ONE).mean() - norm.sf(2)) < 0.002
    assert abs(abs(drawn).mean() / LEVEL_ONE - 8.996) < 0.01
    # The two layers know nothing of each other, nor of the flip.
    both = (operations > 0).all(axis=1)
    assert near(both.mean(), 0.25)
    assert near(((operations[:, 0] > 0) & (rows["flip"] == 1)).mean(), 0.25)


@pytest.mark.parametrize(("mean", "std"), [(9.0, 0.5), (5.0, 2.0), (0.3, 4.0), (10.0, 0.1)])
def test_level_table_is_the_normal_law(mean, std):
    edges = (np.arange(10 * LEVEL_ONE) + 0.5) / LEVEL_ONE
    np.testing.assert_allclose(
        level_table(mean, std) / 2**32, norm.cdf(edges, mean, std), atol=3e-10
    )


def test_a_fixed_level_is_fixed():
    recipe = ViewRecipe(randaugment_std=0.0, randaugment_magnitude=7.0, randaugment_prob=1.0)
    rows = ViewPlan(recipe, 0, 64).rows(np.arange(64), np.zeros(64, int))
    assert (abs(rows["levels"].astype(int)) == 7 * LEVEL_ONE).all()
    assert (rows["operations"] > 0).all()


def test_off_means_off_and_is_another_fingerprint():
    plan = ViewPlan(ViewRecipe(augment="none"), 0, 64)
    rows = plan.rows(np.arange(64), np.zeros(64, int))
    assert not rows["operations"].any() and not rows["levels"].any()
    on, off = (fingerprint(recipe, 0) for recipe in (ViewRecipe(), plan.recipe))
    assert {key for key in on if on[key] != off[key]} == {"view.augment", "view.tables_sha256"}
    with pytest.raises(InputError, match=r"view\.randaugment_magnitude must lie in \[0, 10\]"):
        ViewRecipe(randaugment_magnitude=11)
