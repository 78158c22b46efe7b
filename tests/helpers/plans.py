"""Random rows of the ingest kernel's plan."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from deit_fast.config import ViewConfig

COLUMNS = sys.modules["deit_fast.kernels.ingest"].PLAN_COLUMNS
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 12
BOX_FIELDS = ("_top", "_left", "_height", "_width")


def view_with(**constants: object) -> type[ViewConfig]:
    """View settings with other constants than timm's."""
    return type("Changed", (ViewConfig,), constants)


def row(**values: int) -> list[int]:
    """One row of the plan; columns that are not named are 0."""
    unknown = values.keys() - set(COLUMNS)
    assert not unknown, unknown
    return [values.get(name, 0) for name in COLUMNS]


def plan(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def half(prefix: str, image: int, draw: np.random.Generator) -> dict[str, int]:
    height, width = (int(v) for v in draw.integers(0, SIZE + 1, 2))
    values = {
        "image": image,
        "flip": int(draw.integers(2)),
        "erase_top": int(draw.integers(SIZE - height + 1)),
        "erase_left": int(draw.integers(SIZE - width + 1)),
        "erase_height": height,
        "erase_width": width,
        "noise_key_lo": int(draw.integers(-(2**31), 2**31)),
        "noise_key_hi": int(draw.integers(-(2**31), 2**31)),
    }
    return {prefix + name: value for name, value in values.items()}


def random_rows(count: int, images: int, scale: int = 1) -> Tensor:
    """Rows for images of SIZE * scale pixels a side."""
    draw = np.random.default_rng(5)
    rows = []
    for index in range(count):
        height, width = (int(v) for v in draw.integers(0, SIZE + 1, 2))
        mix = {
            "mix_kind": index % 3,
            "box_top": int(draw.integers(SIZE - height + 1)),
            "box_left": int(draw.integers(SIZE - width + 1)),
            "box_height": height,
            "box_width": width,
            "lam": int(draw.integers(65537)),
        }
        own, partner = (int(v) for v in draw.integers(0, images, 2))
        rows.append(row(**half("", own, draw), **half("partner_", partner, draw), **mix))
    table = plan(*rows)
    boxes = [i for i, name in enumerate(COLUMNS) if name.endswith(BOX_FIELDS)]
    table[:, boxes] *= scale
    return table


def photos(count: int, size: int = SIZE) -> Tensor:
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8)
