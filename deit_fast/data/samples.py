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
    pixels = images.float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    side = pixels.shape[1]
    scale = max(1, 64 // side)
    rows = -(-len(pixels) // columns)
    cell = side * scale + 2
    grid = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index, view in enumerate(pixels.numpy()):
        tile = Image.fromarray(view).resize((side * scale, side * scale), Image.Resampling.NEAREST)
        grid.paste(tile, (index % columns * cell, index // columns * cell))
    grid.save(path)
