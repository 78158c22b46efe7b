"""Attention maps as strips of PNG tiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from deit_fast.runtime.files import write_atomically

TILE, GAP = 160, 8  # least side of a tile, and distance of two tiles, pixels


def remove_strips(folder: Path) -> None:
    """Remove the strips of an earlier analysis, which may have shown other images."""
    for path in folder.glob("attention-*.png"):
        path.unlink()


def draw_strip(
    folder: Path,
    index: int,
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    maps: Tensor,
) -> str:
    """Write an image and its maps side by side; without text, which the page adds.

    Args:
        index: id of the image, part of the file's name.
        image: [3, S, S], normalised by ``mean`` and ``std``.
        maps: [n, h, w]; each is scaled to its own maximum.

    Returns:
        The file's name.
    """
    import matplotlib

    scale, shift = (np.array(values, np.float32)[:, None, None] for values in (std, mean))
    channels = (image.float().cpu().numpy() * scale + shift).clip(0, 1)
    tiles = [(channels * 255).round().astype(np.uint8).transpose(1, 2, 0)]
    colours = matplotlib.colormaps["viridis"]
    for values in maps.float().cpu().numpy():
        tiles.append(colours(values / max(values.max(), 1e-30), bytes=True)[..., :3])
    side = -(-TILE // len(tiles[0])) * len(tiles[0])  # a multiple, so that pixels stay square
    strip = Image.new("RGBA", (len(tiles) * (side + GAP) - GAP, side))
    for number, pixels in enumerate(tiles):
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        strip.paste(tile.resize((side, side), Image.Resampling.NEAREST), (number * (side + GAP), 0))
    content = io.BytesIO()
    strip.save(content, format="png", optimize=True)
    name = f"attention-{index}.png"
    write_atomically(folder / name, content.getvalue())
    return name
