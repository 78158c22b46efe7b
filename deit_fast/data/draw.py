"""Views of decoded images on this host: crop, resize and augment, as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from deit_fast.config import ViewRecipe
from deit_fast.data.augment import augment
from deit_fast.data.resize import crop_and_resize, resize_shorter_side


def draw_views(
    pixels: Sequence[np.ndarray],
    which: np.ndarray,
    rows: np.ndarray,
    boxes: np.ndarray,
    recipe: ViewRecipe,
    out: np.ndarray,
    run: Callable[..., Iterable[None]] = map,
) -> None:
    """Crop, resize and augment on this host; flip, erasing and mixing are left to ingest.

    Args:
        pixels: whole images, uint8 [H, W, 3].
        which: image of each view, integers [n].
        rows: plan of the views, `plan_dtype` [n].
        boxes: their crops, as `ViewPlan.crop_boxes` gives them, [n, 4].
        out: where the views go, uint8 [n, S, S, 3].
        run: `map`, or that of a pool of threads.
    """
    cut = resize_and_crop if recipe.crop == "simple" else crop_and_resize
    red, green, blue = (round(255 * mean) for mean in recipe.mean)  # as timm's `img_mean`
    size = recipe.image_size

    def draw(
        place: np.ndarray, item: int, box: list[int], names: list[int], levels: list[int], flip: int
    ) -> None:
        cut(pixels[item], box, size, size, place)
        if any(names):
            fill = (red, green, blue)
            place[:] = augment(Image.fromarray(place), names, levels, bool(flip), fill)

    columns = (rows["operations"].tolist(), rows["levels"].tolist(), rows["flip"].tolist())
    for _ in run(draw, out, which.tolist(), boxes.tolist(), *columns):
        pass


def resize_and_crop(
    pixels: np.ndarray, box: Sequence[int], width: int, height: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize the whole image, its shorter side to `width`; then crop, reflecting at the edges.

    torchvision's `Resize`, then `crop` of `pad(..., padding_mode="reflect")`, bit for bit.

    Args:
        pixels: uint8 [H, W, 3].
        box: left, top, width, height in the resized image; may stick out by less than its sides.
        width, height: sides of the box.
        out: where the result goes; none: a new array.

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


def _reflected(places: np.ndarray, side: int) -> np.ndarray:
    places = np.abs(places)
    return np.where(places < side, places, 2 * (side - 1) - places)
