"""From decoded uint8 images to the batch that student and teacher see.

One row of the plan makes one view. Its two halves, its own image and its partner's, go through

    flip -> x / 255 -> (x - mean) / std -> erase box := N(0, 1) noise

and meet as lam * own + (1 - lam) * partner (Mixup) or as own with a box of partner (CutMix): the
order of DeiT, which erases before it mixes (Touvron et al. 2021, section 6; main.py and engine.py
of facebookresearch/deit).

Bytes: read M * 3 S^2 of uint8, write B * 3 S^2 elements. A row under Mixup reads two images, but
pairs share theirs, and the second reading finds it in the L2; CutMix reads of each image only what
is seen of it. On a GPU one launch does it all; a CPU and other floats than float32, bfloat16 and
float16 take the reference in plain PyTorch, and with TRITON_INTERPRET=1 a CPU runs the kernel in
Triton's interpreter.

Numerics: float32 and the four IEEE operations alone, each rounded once; no fused multiply-add, no
lerp. A view is thus the same bits in any batch, on a CPU and on a GPU, and equal to ToTensor and
Normalize of torchvision.
The noise of pixel (y, x), channel c is entry w >> 16 of the table of normal quantiles, w being
word c of Philox4x32-10 (Salmon et al. 2011) under the row's key at counter (y S + x, 0, 0, 0).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ingest_launch as launch
from .ingest_reference import (
    CUTMIX,
    LAM_ONE,
    LAYOUTS,
    MIXUP,
    NO_MIX,
    PLAN_COLUMNS,
    normal_quantiles,
    reference,
)

__all__ = [
    "CUTMIX",
    "LAM_ONE",
    "LAYOUTS",
    "MIXUP",
    "NO_MIX",
    "PLAN_COLUMNS",
    "ingest",
    "normal_quantiles",
]

_LARGEST = 16384  # pixels a side; far below where a byte's place in its image leaves int32


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(
    images_u8: Any, plan_rows: Any, mean: Any, std: Any, dtype: Any, layout: str, patch: int
) -> None:
    for name, value, wanted in (
        ("images_u8", images_u8, torch.uint8),
        ("plan_rows", plan_rows, torch.int32),
    ):
        _require(isinstance(value, Tensor), f"{name} must be a tensor, not {type(value).__name__}")
        _require(value.dtype == wanted, f"{name} must be {wanted}, not {value.dtype}")
    shape = tuple(images_u8.shape)
    _require(
        len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3,
        f"images_u8 must have shape [M, S, S, 3], not {shape}",
    )
    _require(
        shape[1] <= _LARGEST,
        f"images_u8 must have at most {_LARGEST} pixels a side, not {shape[1]}",
    )
    _require(
        plan_rows.dim() == 2 and plan_rows.shape[1] == len(PLAN_COLUMNS),
        f"plan_rows must have shape [B, {len(PLAN_COLUMNS)}], not {tuple(plan_rows.shape)}",
    )
    _require(
        images_u8.device == plan_rows.device,
        f"plan_rows is on {plan_rows.device} but images_u8 is on {images_u8.device}",
    )
    _require(len(mean) == 3, f"mean must hold 3 floats, not {mean}")
    _require(len(std) == 3 and min(std) > 0, f"std must hold 3 positive floats, not {std}")
    _require(
        isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        f"dtype must be a floating-point dtype, not {dtype}",
    )
    _require(layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    _require(
        layout != "patches" or (patch > 0 and shape[1] % patch == 0),
        f"patch must divide the image size {shape[1]}, but is {patch}",
    )
    # Looking at values on a GPU waits for it.
    if not plan_rows.is_cuda or os.environ.get("DEIT_FAST_DEBUG") == "1":
        _check_values(plan_rows, images=shape[0], size=shape[1])


def _check_values(plan_rows: Tensor, images: int, size: int) -> None:
    columns = dict(zip(PLAN_COLUMNS, plan_rows.long().unbind(1), strict=True))
    bounds = {"mix_kind": CUTMIX, "lam": LAM_ONE}
    for half in ("", "partner_"):
        bounds |= {f"{half}image": images - 1, f"{half}flip": 1}
    for name, last in bounds.items():
        _check_column(name, columns[name], last)
    for box in ("erase", "partner_erase", "box"):
        for start, extent in (("top", "height"), ("left", "width")):
            begin, length = columns[f"{box}_{start}"], columns[f"{box}_{extent}"]
            _check_column(f"{box}_{start}", begin, size)
            _check_column(f"{box}_{extent}", length, size)
            _check_column(f"{box}_{start} + {box}_{extent}", begin + length, size)


def _check_column(name: str, values: Tensor, last: int) -> None:
    wrong = values[(values < 0) | (values > last)]
    _require(
        len(wrong) == 0, f"plan_rows: {name} must lie in [0, {last}], found {wrong[:1].tolist()}"
    )


def ingest(
    images_u8: Tensor,
    plan_rows: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    layout: str = "nchw",
    patch: int = 16,
) -> Tensor:
    """Flip, normalise, erase, mix and cast: one view per row of the plan.

    Args:
        images_u8: uint8 [M, S, S, 3], decoded, cropped and resized.
        plan_rows: int32 [B, 22], columns as in ``PLAN_COLUMNS``; rows stand for themselves.
        mean, std: per channel, in units of 255.
        dtype: of the result; the arithmetic is float32 whatever it is.
        layout: "nchw"; "channels_last", the same shape with the channels innermost in memory; or
            "patches", the rows that a patch embedding multiplies.
        patch: side of a patch in pixels, for "patches".

    Returns:
        [B, 3, S, S] in ``dtype``; for "patches" [B, (S / patch)^2, 3 patch^2], a row in the order
        of the convolution's weight: channel, y, x.

    Raises:
        ValueError: shapes, dtypes, devices or (on a CPU, or with DEIT_FAST_DEBUG=1) plan values
            that do not fit, by name and value.
    """
    _check(images_u8, plan_rows, mean, std, dtype, layout, patch)
    if len(plan_rows) == 0:
        return launch.empty(images_u8, 0, dtype, layout, patch)
    take = launch.fused if launch.takes(images_u8, dtype) else reference
    return take(images_u8, plan_rows, tuple(mean), tuple(std), dtype, layout, patch)
