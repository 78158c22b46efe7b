"""Crop, resize and RandAugment of one batch of decoded images, compared with other libraries.

On a CPU the peer is Pillow, image by image on one core, with the same pixels. On a GPU it is
torchvision v2, which does similar work but produces different pixels: no noise of the levels,
another set of operations, every operation applied to the whole batch.

Bytes per view: the crop and 3 S^2 written, then 6 S^2 per operation and 3 S^2 per histogram.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from deit_fast.config import ViewConfig
from deit_fast.data.augment import apply_operation, augment_table
from deit_fast.kernels.augment import TABLE_COLUMNS, AugmentTable, augment
from deit_fast.views.plan import RANDAUGMENT_OPERATIONS, ViewPlan
from deit_fast.views.rng import LEVEL_ONE

from .common import Case

SIZE = 224
WIDTH, HEIGHT = 500, 375  # ImageNet's most frequent size
FILL = (124, 116, 104)
READERS = ("contrast", "auto_contrast", "equalize")  # read the view once more


def batch(count: int) -> tuple[Tensor, Tensor, AugmentTable, np.ndarray, np.ndarray]:
    """Pixels, images and table of DeiT's recipe, and the plan and boxes behind it."""
    generator = torch.Generator().manual_seed(0)
    shape = (count * HEIGHT * WIDTH * 3,)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    images = torch.tensor([[i * HEIGHT * WIDTH * 3, WIDTH, HEIGHT] for i in range(count)])
    plan = ViewPlan(ViewConfig(image_size=SIZE), count)
    ids, views = np.arange(count), np.zeros(count, int)
    rows = plan.rows(ids, views)
    boxes = plan.crop_boxes(ids, views, np.full(count, WIDTH), np.full(count, HEIGHT))
    return pixels, images, augment_table(plan.view, rows, boxes, ids), rows, boxes


def bytes_of(table: AugmentTable, rows: np.ndarray) -> int:
    columns = dict(zip(TABLE_COLUMNS, table.rows.unbind(1), strict=True))
    crops = int((3 * columns["width"] * columns["height"]).sum())
    readers = [RANDAUGMENT_OPERATIONS.index(name) for name in READERS]
    operations, again = (rows["operations"] != 0).sum(), np.isin(rows["operations"], readers).sum()
    return crops + 3 * SIZE * SIZE * int(len(rows) + 2 * operations + again)


def pillow(pixels: Tensor, rows: np.ndarray, boxes: np.ndarray) -> Callable[[], list[np.ndarray]]:
    """As the loader does it, without the mirror: one core."""
    sources = [Image.fromarray(a) for a in pixels.view(-1, HEIGHT, WIDTH, 3).numpy()]

    def view(source: Image.Image, row: np.void, box: list[int]) -> np.ndarray:
        left, top, width, height = box
        image = source.crop((left, top, left + width, top + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for operation, level in zip(row["operations"], row["levels"], strict=True):
            name = RANDAUGMENT_OPERATIONS[operation]
            image = apply_operation(image, name, int(level) / LEVEL_ONE, FILL)
        return np.asarray(image)

    return lambda: [view(*each) for each in zip(sources, rows, boxes.tolist(), strict=True)]


def torchvisions(pixels: Tensor, boxes: np.ndarray) -> Callable[[], Tensor]:
    """A crop and resize per image, then RandAugment on the whole batch."""
    images = pixels.view(-1, HEIGHT, WIDTH, 3).permute(0, 3, 1, 2)
    resize, mode = v2.functional.resized_crop, v2.InterpolationMode.BICUBIC
    change = v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR, fill=list(FILL))

    def run() -> Tensor:
        views = [
            resize(image, top, left, height, width, [SIZE, SIZE], interpolation=mode)
            for image, (left, top, width, height) in zip(images, boxes.tolist(), strict=True)
        ]
        return change(torch.stack(views))

    return run


def cases(device: str) -> list[Case]:
    def case(count: int) -> Case:
        pixels, images, table, rows, boxes = batch(count)

        def build() -> dict[str, Callable[[], Any] | str]:
            there = pixels.to(device), images.to(device), table.to(device)
            ours: dict[str, Callable[[], Any] | str] = {"ours": lambda: augment(*there, SIZE, FILL)}
            if device == "cpu":
                return ours | {"Pillow, 1 core": pillow(pixels, rows, boxes)}
            return ours | {"torchvision v2": torchvisions(there[0], boxes)}

        name = f"B={count} {WIDTH}x{HEIGHT} S={SIZE} uint8"
        return Case(name, build, bytes_moved=bytes_of(table, rows), items=count)

    return [case(32)] if device == "cpu" else [case(256)]
