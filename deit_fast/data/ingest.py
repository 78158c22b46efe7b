"""The ingest step: the integer table of a batch, and the call that turns bytes into a batch.

`precompute` and `train` run this same step; what consumes the batch is all that differs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deit_fast.config import ViewRecipe
from deit_fast.data.batch import ViewBatch
from deit_fast.kernels.ingest import PLAN_COLUMNS, ingest


def build_rows(
    own: np.ndarray, partner: np.ndarray, own_image: np.ndarray, partner_image: np.ndarray
) -> np.ndarray:
    """The table of `kernels.ingest`, one self-contained row per output view.

    Args:
        own, partner: PLAN_DTYPE [B] of the views and of their partners; a row that is not mixed may
            give anything as its partner.
        own_image, partner_image: places of their pixels among the batch's images, integers [B].

    Returns:
        int32 [B, 22], columns as in `PLAN_COLUMNS`.
    """
    columns = _half(own, own_image, "") | _half(partner, partner_image, "partner_")
    columns["mix_kind"] = own["mix_kind"]
    columns |= zip(("box_top", "box_left", "box_height", "box_width"), own["box"].T, strict=True)
    columns["lam"] = own["lam"]
    table = np.empty((len(own), len(PLAN_COLUMNS)), np.int32)
    for place, name in enumerate(PLAN_COLUMNS):
        table[:, place] = columns[name]
    return table


def ingest_batch(
    batch: ViewBatch, recipe: ViewRecipe, dtype: torch.dtype, patch: int | None = None
) -> Tensor:
    """Flip, normalise, erase and mix, on the device of the batch.

    Args:
        batch: views of side S.
        recipe: with mean and std.
        dtype: of the result.
        patch: side of the patches whose rows are made; None: images.

    Returns:
        Images [B, 3, S, S], or rows of patches [B, (S / patch)^2, 3 patch^2].
    """
    layout = {} if patch is None else {"layout": "patches", "patch": patch}
    return ingest(batch.images, batch.plan, recipe.mean, recipe.std, dtype, **layout)


def _half(rows: np.ndarray, image: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    names = ("erase_top", "erase_left", "erase_height", "erase_width")
    halves = rows["noise_key"].astype("<u8")[:, None].view("<i4")  # bits of the low and high word
    return {
        prefix + "image": image,
        prefix + "flip": rows["flip"],
        **{prefix + name: values for name, values in zip(names, rows["erase"].T, strict=True)},
        prefix + "noise_key_lo": halves[:, 0],
        prefix + "noise_key_hi": halves[:, 1],
    }
