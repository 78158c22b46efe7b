"""Augmentations: the pixels of timm, torchvision and DeiT-III; distributions of the plan."""

from __future__ import annotations

import dataclasses
import math
import random
from statistics import NormalDist
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment
from torchvision.transforms import functional as F

from deit_fast.config import ViewConfig
from deit_fast.data import ImageFolder, ingest_batch
from deit_fast.data.augment import apply_operation, augment
from deit_fast.data.loader import make_batch
from deit_fast.data.resize import crop_and_resize, resize_and_crop
from deit_fast.errors import InputError
from deit_fast.views.plan import (
    OPERATIONS,
    PLAN_DTYPE,
    RANDAUGMENT_OPERATIONS,
    ViewPlan,
    fingerprint,
)
from deit_fast.views.rng import LEVEL_ONE, level_table
from helpers.plans import view_with
from helpers.timm_augment import FILL, TIMM, timms

LEVELS = (0.0, 1 / LEVEL_ONE, 3.7119140625, 7.5, 8.9990234375, 9.5, 10.0)


def photograph(name: str) -> np.ndarray:
    """One of scikit-learn's two, uint8 [427, 640, 3]."""
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_sample_image(name)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Two photographs, noise, a nearly white and a flat image; odd and even sides."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photograph(name)) for name in ("china.jpg", "flower.jpg")]
    views = [
        Image.fromarray(crop_and_resize(np.asarray(photo), (40, 60, 300, 260), 224, 224))
        for photo in photos
    ]
    arrays = [
        rng.integers(0, 256, (97, 97, 3)),
        np.minimum(rng.integers(250, 262, (64, 64, 3)), 255),
        np.full((33, 33, 3), 77),
    ]
    return views + [Image.fromarray(array.astype(np.uint8)) for array in arrays]


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
                after = ImageOps.mirror(augment(image, *plan, True, FILL))
                np.testing.assert_array_equal(np.asarray(after), np.asarray(before), f"{signed}")


def test_layers_run_in_order(images):
    ids = [RANDAUGMENT_OPERATIONS.index(name) for name in ("rotate", "solarize_add")]
    levels = [9 * LEVEL_ONE, 8 * LEVEL_ONE]
    ours = augment(images[0], ids, levels, False, FILL)
    theirs = timms(timms(images[0], "rotate", 9.0), "solarize_add", 8.0)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    other = augment(images[0], ids[::-1], levels[::-1], False, FILL)
    assert np.any(np.asarray(ours) != np.asarray(other))


def test_zero_bits_are_black_on_every_pillow(images):
    assert not np.asarray(apply_operation(images[0], "posterize", 10.0, FILL)).any()


def test_distribution_of_randaugment():
    """As timm's: 25 % unchanged, each operation 1/15, P(level 10) 2.28 %, half of the signs."""
    count = 100_000
    rows = ViewPlan(ViewConfig(seed=5), count).rows(np.arange(count), np.zeros(count, int))
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
    assert abs((abs(drawn) == 10 * LEVEL_ONE).mean() - NormalDist().cdf(-2)) < 0.002
    assert abs(abs(drawn).mean() / LEVEL_ONE - 8.996) < 0.01
    # The two layers are independent of each other and of the flip.
    both = (operations > 0).all(axis=1)
    assert near(both.mean(), 0.25)
    assert near(((operations[:, 0] > 0) & (rows["flip"] == 1)).mean(), 0.25)


@pytest.mark.parametrize(("mean", "std"), [(9.0, 0.5), (5.0, 2.0), (0.3, 4.0), (10.0, 0.1)])
def test_level_table_is_the_normal_distribution(mean, std):
    edges = (np.arange(10 * LEVEL_ONE) + 0.5) / LEVEL_ONE
    expected = [*map(NormalDist(mean, std).cdf, edges.tolist())]
    np.testing.assert_allclose(level_table(mean, std) / 2**32, expected, atol=3e-10)


def test_a_fixed_level_is_fixed():
    fixed = view_with(randaugment_magnitude=7.0, randaugment_std=0.0, randaugment_prob=1.0)()
    rows = ViewPlan(fixed, 64).rows(np.arange(64), np.zeros(64, int))
    assert (abs(rows["levels"].astype(int)) == 7 * LEVEL_ONE).all()
    assert (rows["operations"] > 0).all()


def test_off_means_off_and_is_another_fingerprint():
    plan = ViewPlan(ViewConfig(augment="none"), 64)
    rows = plan.rows(np.arange(64), np.zeros(64, int))
    assert not rows["operations"].any() and not rows["levels"].any()
    on, off = (fingerprint(recipe) for recipe in (ViewConfig(), plan.view))
    assert {key for key in on if on[key] != off[key]} == {"view.augment", "view.tables_sha256"}


# ---------------------------------------------------------------------------------------------
# ThreeAugment and colour jitter (DeiT-III)
# ---------------------------------------------------------------------------------------------

THREE = view_with(mix_prob=0)(seed=5, augment="three_augment", color_jitter=0.3, erase_prob=0)
BICUBIC = torchvision.transforms.InterpolationMode.BICUBIC


def three_of_deit(image: Image.Image, name: str, radius: float) -> Image.Image:
    """What DeiT-III's gray_scale, Solarization and GaussianBlur call, for a fixed choice."""
    if name == "grayscale":
        return torchvision.transforms.Grayscale(3)(image)
    if name == "solarize":
        return ImageOps.solarize(image)
    return image.filter(ImageFilter.GaussianBlur(radius=radius))


def three_of_timm(image: Image.Image, name: str, radius: float) -> Image.Image:
    """timm's policy `3a`, its choice and its radius made to be ours."""
    policy = {ops[0].name: ops[0] for ops in auto_augment.auto_augment_policy_3a({})}
    timms_name = {"grayscale": "Desaturate", "solarize": "Solarize"}.get(name, "GaussianBlurRand")
    with mock.patch.object(random, "uniform", lambda low, high: radius):
        return policy[timms_name](image)


def jittered(image: Image.Image, order: list[int], factors: list[float]) -> Image.Image:
    """torchvision's ColorJitter with its draws given."""
    transform = torchvision.transforms.ColorJitter(0.3, 0.3, 0.3)
    draws = (torch.tensor([*order, 3]), *factors, None)  # 3: the hue, off
    with mock.patch.object(transform, "get_params", lambda *ranges: draws):
        return transform(image)


def drawn_jitter(row: np.void) -> tuple[list[int], list[float]]:
    """Order and factors, brightness, contrast, saturation, of a plan's last three layers."""
    names = [OPERATIONS[operation] for operation in row["operations"][-3:]]
    order = [("brightness", "contrast", "color").index(name) for name in names]
    factors = [0.0] * 3
    for index, level in zip(order, row["levels"][-3:].tolist(), strict=True):
        factors[index] = 1 + 0.09 * level / LEVEL_ONE
    return order, factors


def test_the_three_equal_deits_and_timms(images):
    levels = {"grayscale": [0.0], "solarize": [5.0], "gaussian_blur": [102 / 1024, 0.7, 1.333, 2.0]}
    for image in images:
        for name, choices in levels.items():
            for level in choices:
                ours = np.asarray(apply_operation(image, name, level, FILL))
                for theirs in (three_of_deit, three_of_timm):
                    np.testing.assert_array_equal(ours, np.asarray(theirs(image, name, level)))


def test_a_planned_view_equals_deits_classes(images):
    """One of the three, then ColorJitter(.3, .3, .3), of a mirrored image where the plan flips."""
    rows = ViewPlan(THREE, 60).rows(np.arange(60), 0)
    assert rows.dtype["operations"].shape == (4,)
    assert len({tuple(row["operations"].tolist()) for row in rows}) > 12 and rows["flip"].any()
    for index, row in enumerate(rows):
        image = images[index % 3]
        start = ImageOps.mirror(image) if row["flip"] else image
        name, radius = OPERATIONS[row["operations"][0]], float(row["levels"][0]) / LEVEL_ONE
        theirs = jittered(three_of_deit(start, name, radius), *drawn_jitter(row))
        ours = augment(
            image, row["operations"].tolist(), row["levels"].tolist(), bool(row["flip"]), FILL
        )
        ours = ImageOps.mirror(ours) if row["flip"] else ours  # as ingest does
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), str(row))


@pytest.mark.parametrize("name", ["grayscale", "solarize", "gaussian_blur", "brightness"])
def test_these_commute_with_a_mirror(images, name):
    for image in images:
        for level in (0.1, 0.7, 1.3, 2.0, 5.0):
            before = apply_operation(ImageOps.mirror(image), name, level, FILL)
            after = ImageOps.mirror(apply_operation(image, name, level, FILL))
            np.testing.assert_array_equal(np.asarray(before), np.asarray(after), f"{level}")


def test_distribution_of_three_augment_and_jitter():
    """A third each, radius U(.1, 2), six orders alike, factors U(.7, 1.3), all independent."""
    count = 100_000
    rows = ViewPlan(THREE, count).rows(np.arange(count), 0)
    operations, levels = rows["operations"], rows["levels"].astype(int)

    def near(share: float, expected: float) -> bool:
        return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)

    ids = {name: OPERATIONS.index(name) for name in OPERATIONS}
    three = ("grayscale", "solarize", "gaussian_blur")
    assert all(near((operations[:, 0] == ids[name]).mean(), 1 / 3) for name in three)
    assert near(((operations[:, 0] == ids["solarize"]) & (rows["flip"] == 1)).mean(), 1 / 6)
    assert set(levels[operations[:, 0] == ids["grayscale"], 0].tolist()) == {0}
    assert set(levels[operations[:, 0] == ids["solarize"], 0].tolist()) == {5 * LEVEL_ONE}
    radius = levels[operations[:, 0] == ids["gaussian_blur"], 0] / LEVEL_ONE
    assert abs(radius.min() - 0.1) < 1e-3 and radius.max() == 2.0
    shares = np.histogram(radius, bins=10, range=(0.0996, 2.0001))[0] / len(radius)
    assert np.abs(shares - 0.1).max() < 5 * math.sqrt(0.09 / len(radius))

    assert sorted({tuple(sorted(row)) for row in operations[:, 1:].tolist()}) == [
        tuple(sorted(ids[name] for name in ("brightness", "contrast", "color")))
    ]
    orders, counts = np.unique(operations[:, 1:], axis=0, return_counts=True)
    assert len(orders) == 6 and all(near(share, 1 / 6) for share in counts / count)
    factors = {}
    for name in ("brightness", "contrast", "color"):
        factors[name] = 1 + 0.09 * levels[:, 1:][operations[:, 1:] == ids[name]] / LEVEL_ONE
        assert abs(factors[name].min() - 0.7) < 2e-4 and abs(factors[name].max() - 1.3) < 2e-4
        shares = np.histogram(factors[name], bins=10, range=(0.69997, 1.30003))[0] / count
        assert all(near(share, 0.1) for share in shares)
    for one, other in (("brightness", "contrast"), ("contrast", "color"), ("color", "brightness")):
        assert abs(np.corrcoef(factors[one], factors[other])[0, 1]) < 0.02
    gray = (operations[:, 0] == ids["grayscale"]).astype(float)
    assert abs(np.corrcoef(gray, factors["color"])[0, 1]) < 0.02
    first = (operations[:, 1] == ids["brightness"]).astype(float)
    assert abs(np.corrcoef(first, factors["brightness"])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"augment": "randaugment"}, 2),
        ({"augment": "none"}, 2),
        ({"augment": "three_augment"}, 2),
        ({"augment": "none", "color_jitter": 0.4}, 3),
        ({"augment": "three_augment", "color_jitter": 0.9}, 4),
    ],
)
def test_a_plan_has_room_for_its_operations_and_changes_nothing_else(changes, layers):
    rows = ViewPlan(ViewConfig(seed=9, **changes), 500).rows(np.arange(500), 4)
    plain = ViewPlan(ViewConfig(seed=9), 500).rows(np.arange(500), 4)
    assert rows.dtype["operations"].shape == rows.dtype["levels"].shape == (layers,)
    assert (rows.dtype == PLAN_DTYPE) == (layers == 2)
    for name in ("flip", "erase", "noise_key", "partner", "mix_kind", "box", "lam"):
        np.testing.assert_array_equal(rows[name], plain[name])
    used = (rows["operations"] > 0).all(axis=0).tolist()
    jitter = "color_jitter" in changes
    if changes["augment"] == "three_augment":
        assert used == [True] + [jitter] * (layers - 1)
    if jitter:
        reach = changes["color_jitter"] / 0.09 * LEVEL_ONE
        assert 0.9 * reach < abs(rows["levels"][:, -3:].astype(int)).max() <= reach + 0.5


def test_jitter_and_randaugment_are_refused_together():
    with pytest.raises(InputError, match=r"color_jitter=0\.3.*randaugment.*timm and DeiT") as error:
        ViewConfig(color_jitter=0.3)
    assert "\n" not in str(error.value)
    for jitter in (-0.1, 0.91):
        with pytest.raises(InputError, match=rf"must be a number in \[0, 0\.9\], not {jitter}"):
            ViewConfig(augment="none", color_jitter=jitter)


# ---------------------------------------------------------------------------------------------
# The simple crop (DeiT-III)
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 48), (40, 55), (31, 31), (40, 97), (5, 31), (31, 200)])
def test_simple_crop_equals_torchvisions(shape):
    """Resize(31, bicubic), RandomCrop(31, padding=4, reflect), at the position in the plan."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (shape[1], shape[0], 3), np.uint8))
    plan = ViewPlan(ViewConfig(image_size=31, crop="simple", seed=2), 40)
    boxes = plan.crop_boxes(np.arange(40), np.zeros(40, int), [shape[0]] * 40, [shape[1]] * 40)
    padded = F.pad(F.resize(image, [31], BICUBIC), [4] * 4, padding_mode="reflect")
    assert boxes.dtype == np.int32 and (boxes[:, 2:] == 31).all()
    for box in [*boxes.tolist(), [-4, -4, 31, 31], [padded.width - 35, padded.height - 35, 31, 31]]:
        theirs = F.crop(padded, box[1] + 4, box[0] + 4, 31, 31)
        assert theirs.size == (31, 31) and box[0] + 35 <= padded.width
        ours = resize_and_crop(np.asarray(image), box, 31, 31)
        np.testing.assert_array_equal(ours, theirs)


def test_simple_crops_are_uniform():
    count = 100_000
    plan = ViewPlan(ViewConfig(crop="simple", seed=2), count)
    ids = np.arange(count)
    left, top, _, _ = plan.crop_boxes(ids, 0 * ids, np.full(count, 500), np.full(count, 375)).T
    assert set(top.tolist()) == set(range(-4, 5)) and (left.min(), left.max()) == (-4, 78)
    for values, count_of in (
        (top, 9),
        (left, 83),
    ):  # 224 * 500 // 375 = 298 wide: 298 + 8 - 224 + 1
        shares = np.unique(values, return_counts=True)[1] / count
        assert len(shares) == count_of
        assert np.abs(shares - 1 / count_of).max() < 5 * math.sqrt(1 / count_of / count)
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.02
    with pytest.raises(InputError, match=r"view\.crop=simple reflects 4 pixels.*not 4"):
        ViewConfig(crop="simple", image_size=4)


@pytest.mark.parametrize("crop", ["resized", "simple"])
def test_finished_views_are_in_deits_third_order(tmp_path, images, crop):
    """Crop, flip, one of the three, ColorJitter, ToTensor, Normalize: each by its own library."""
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for number, name in enumerate(("china.jpg", "flower.jpg")):
        Image.fromarray(photograph(name)[:150, : 180 + number]).save(folder / f"{name}.png")
    images[2].save(folder / "noise.png")
    source = ImageFolder(str(tmp_path), "train")
    recipe = dataclasses.replace(THREE, image_size=48, crop=crop)
    plan = ViewPlan(recipe, 3)
    samples, views = np.arange(12) % 3, np.arange(12) // 3
    batch = make_batch(source, plan, samples, views, on_error="fail")
    ours = ingest_batch(batch, recipe, torch.float32)
    rows = plan.rows(samples, views)
    assert set(rows["flip"].tolist()) == {0, 1}
    for row, view in zip(rows, ours, strict=True):
        image = source.load(int(row["sample"]))
        box = plan.crop_boxes([row["sample"]], [row["view"]], *([side] for side in image.size))
        left, top, width, height = box[0].tolist()
        if crop == "simple":
            padded = F.pad(F.resize(image, [48], BICUBIC), [4] * 4, padding_mode="reflect")
            small = F.crop(padded, top + 4, left + 4, height, width)
        else:
            small = F.resized_crop(image, top, left, height, width, [48, 48], BICUBIC)
        small = F.hflip(small) if row["flip"] else small
        name, radius = OPERATIONS[row["operations"][0]], float(row["levels"][0]) / LEVEL_ONE
        theirs = jittered(three_of_deit(small, name, radius), *drawn_jitter(row))
        assert torch.equal(view, F.normalize(F.to_tensor(theirs), recipe.mean, recipe.std))
