"""A picture of what the student sees: the first views of a run, augmented and mixed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def save_samples(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], path: Path, columns: int = 8
) -> None:
    """Write a grid of views as a PNG.

    Args:
        images: float [B, 3, S, S], normalised with ``mean`` and ``std`` (units of 255).
        path: where the PNG goes.
        columns: views per row; small views are enlarged to about 64 pixels.
    """
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    pixels = images.float().cpu() * scale + shift
    views = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    side = views.shape[1] * max(1, 64 // views.shape[1])
    rows = -(-len(views) // columns)
    cell = side + 2
    grid = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index, view in enumerate(views.numpy()):
        tile = Image.fromarray(view).resize((side, side), Image.Resampling.NEAREST)
        grid.paste(tile, (index % columns * cell, index // columns * cell))
    grid.save(path)
