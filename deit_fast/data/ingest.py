"""The ingest step: the integer table of a batch, and the call that turns bytes into images.

`precompute` and `train` run this same step, so teacher and student see the same images.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deit_fast.config import ViewConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.kernels.ingest import PLAN_COLUMNS, ingest
from deit_fast.runtime.files import write_atomically


def build_rows(
    own: np.ndarray, partner: np.ndarray, own_image: np.ndarray, partner_image: np.ndarray
) -> np.ndarray:
    """The table of `kernels.ingest`, one self-contained row per view.

    Args:
        own, partner: `plan_dtype` [B] of the views and of their partners; the partner of an unmixed
            view is not read.
        own_image, partner_image: index of their pixels among the batch's images, integers [B].

    Returns:
        int32 [B, 22], columns as in `PLAN_COLUMNS`.
    """
    columns = _operand(own, own_image, "") | _operand(partner, partner_image, "partner_")
    columns |= {"mix_kind": own["mix_kind"], "lam": own["lam"]}
    columns |= zip(("box_top", "box_left", "box_height", "box_width"), own["box"].T, strict=True)
    return np.stack([columns[name] for name in PLAN_COLUMNS], axis=1).astype(np.int32)


def _operand(rows: np.ndarray, image: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    """The columns that own view and partner both have."""
    sides = ("erase_top", "erase_left", "erase_height", "erase_width")
    noise_key = rows["noise_key"].astype("<u8")[:, None].view("<i4")  # low and high word
    return {
        prefix + "image": image,
        prefix + "flip": rows["flip"],
        **{prefix + name: values for name, values in zip(sides, rows["erase"].T, strict=True)},
        prefix + "noise_key_lo": noise_key[:, 0],
        prefix + "noise_key_hi": noise_key[:, 1],
    }


def ingest_batch(
    batch: ViewBatch, view: ViewConfig, dtype: torch.dtype, patch: int | None = None
) -> Tensor:
    """Flip, normalise, erase and mix, on the device of the batch.

    Args:
        batch: views of side S.
        view: with mean and std.
        dtype: of the result.
        patch: side of the patches of the result; None: images.

    Returns:
        Images [B, 3, S, S], or rows of patches [B, (S / patch)^2, 3 patch^2].
    """
    arguments = batch.images, batch.plan, view.mean, view.std, dtype
    if patch is None:
        return ingest(*arguments)
    return ingest(*arguments, layout="patches", patch=patch)


def save_views(batch: ViewBatch, view: ViewConfig, path: Path, count: int = 16) -> None:
    """Write a grid of a batch's first views, as the student sees them, as a PNG.

    There are eight views in a row; small ones are enlarged to about 64 pixels.
    """
    images = ingest_batch(batch.part(0, count), view, torch.float32).cpu()
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (view.std, view.mean))
    pixels = ((images * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    side = images.shape[3] * max(1, 64 // images.shape[3])
    cell = side + 2
    grid = Image.new("RGB", (8 * cell, -(-len(pixels) // 8) * cell), "white")
    for index, pixel in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        tile = Image.fromarray(pixel).resize((side, side), Image.Resampling.NEAREST)
        grid.paste(tile, (index % 8 * cell, index // 8 * cell))
    content = io.BytesIO()
    grid.save(content, "PNG")
    write_atomically(path, content.getbuffer())
