"""Our crop and resize against Pillow's own, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deit_fast.data.resize import crop_and_resize


def by_pillow(pixels: np.ndarray, box: tuple[int, ...], width: int, height: int) -> np.ndarray:
    left, top, box_width, box_height = box
    crop = Image.fromarray(pixels).crop((left, top, left + box_width, top + box_height))
    return np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))


def noise(rng: np.random.Generator, height: int, width: int, kind: int) -> np.ndarray:
    """Noise, black and white (whose overshoot must be clipped), or smooth."""
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        return (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    ramp = np.add.outer(np.arange(height), 2 * np.arange(width))[..., None] + np.arange(3) * 40
    return (ramp % 256).astype(np.uint8)


@pytest.mark.parametrize("part", range(4))
def test_random_crops_and_sizes_equal_pillow(part: int) -> None:
    """Up and down, one pixel to hundreds, either axis unchanged, every remainder of the tiles."""
    rng = np.random.default_rng(part)
    for number in range(200):
        height, width = rng.integers(1, 12 if number % 3 == 0 else 400, 2).tolist()
        pixels = noise(rng, height, width, number % 3)
        w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        box = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
        out_w, out_h = rng.integers(1, 260, 2).tolist()
        out_w = w if number % 5 == 0 else out_w
        out_h = h if number % 7 == 0 else out_h
        ours = crop_and_resize(pixels, box, out_w, out_h)
        theirs = by_pillow(pixels, box, out_w, out_h)
        differing = int((ours != theirs).sum())
        assert differing == 0, (differing, box, out_w, out_h)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 2, 290), (147, 100)),  # Pillow resizes the height of such a strip first
        ((1, 0, 2, 201), (50, 200)),
        ((0, 0, 2, 200), (50, 100)),  # not yet a strip
        ((0, 0, 2, 290), (147, 290)),
        ((0, 0, 2, 290), (2, 100)),
        ((0, 0, 1, 300), (224, 224)),
    ],
)
def test_thin_strips_equal_pillow(box: tuple[int, ...], size: tuple[int, int]) -> None:
    pixels = noise(np.random.default_rng(0), 300, 3, 0)
    assert np.array_equal(crop_and_resize(pixels, box, *size), by_pillow(pixels, box, *size))


def test_a_large_reduction_equals_pillow() -> None:
    pixels = noise(np.random.default_rng(1), 1600, 2100, 1)
    box = 3, 5, 2090, 1590
    assert np.array_equal(crop_and_resize(pixels, box, 224, 224), by_pillow(pixels, box, 224, 224))


def test_strided_rows_and_an_output_array() -> None:
    rng = np.random.default_rng(2)
    wide = noise(rng, 60, 90, 0)
    pixels = wide[5:55, 10:80]
    images = np.zeros((3, 32, 32, 3), np.uint8)
    result = crop_and_resize(pixels, (4, 6, 40, 30), 32, 32, images[1])
    assert result.base is images or result is images[1] or np.shares_memory(result, images)
    theirs = by_pillow(np.ascontiguousarray(pixels), (4, 6, 40, 30), 32, 32)
    assert np.array_equal(images[1], theirs)
    assert not images[0].any() and not images[2].any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"box": (0, 0, 11, 8)}, r"box \(0, 0, 11, 8\) leaves the image of 10 x 8"),
        ({"box": (-1, 0, 5, 5)}, "leaves the image"),
        ({"box": (0, 0, 0, 5)}, "leaves the image"),
        ({"pixels": np.zeros((8, 10), np.uint8)}, r"uint8 \[H, W, 3\]"),
        ({"pixels": np.zeros((8, 10, 3), np.float32)}, "float32"),
        ({"pixels": np.zeros((8, 20, 3), np.uint8)[:, ::2]}, "adjacent"),
        ({"width": 0}, "out must be"),
        ({"out": np.zeros((4, 4, 3), np.uint8)}, r"\(6, 6, 3\)"),
        ({"out": np.zeros((6, 6, 6), np.uint8)[..., ::2]}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, named: str) -> None:
    arguments = {
        "pixels": np.zeros((8, 10, 3), np.uint8), "box": (0, 0, 5, 5), "width": 6, "height": 6,
    }  # fmt: skip
    with pytest.raises(ValueError, match=named):
        crop_and_resize(**(arguments | change))
