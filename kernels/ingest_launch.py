"""Launcher and operator of the ingest kernel: ``deit_fast::ingest``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .ingest_kernel import ingest_kernel
from .ingest_reference import LAYOUTS, normal_quantiles, normalised_values

BLOCK = 1024  # pixels of a program: 4.6 rows at 224, so most programs meet no erase box
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = not isinstance(ingest_kernel, triton.JITFunction)
# A fused multiply-add would round the mixed pixels otherwise than the reference.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def takes(images_u8: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel does this call: on a GPU, or on the CPU with TRITON_INTERPRET=1."""
    return (images_u8.is_cuda or INTERPRETED) and dtype in DTYPES


def empty(images_u8: Tensor, views: int, dtype: torch.dtype, layout: str, patch: int) -> Tensor:
    """Memory for the result, [views, 3, S, S] or patch rows."""
    size = images_u8.shape[1]
    if layout == "patches":
        side = size // patch
        return images_u8.new_empty((views, side * side, 3 * patch * patch), dtype=dtype)
    channels_last = layout == "channels_last"
    return torch.empty(
        (views, 3, size, size), dtype=dtype, device=images_u8.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip


_library = torch.library.Library("deit_fast", "FRAGMENT")
_library.define(
    "ingest(Tensor images_u8, Tensor plan_rows, Tensor values, Tensor quantiles, ScalarType dtype, "
    "str layout, int patch) -> Tensor"
)


def _ingest(
    images_u8: Tensor, plan_rows: Tensor, values: Tensor, quantiles: Tensor, dtype: torch.dtype,
    layout: str, patch: int,
) -> Tensor:  # fmt: skip
    out = empty(images_u8, len(plan_rows), dtype, layout, patch)
    if out.numel() == 0:
        return out
    # The loader's batches are dense; of others only images that are dense themselves need no copy.
    if images_u8[0].stride() != images_u8[0].contiguous().stride():
        images_u8 = images_u8.contiguous()
    size = images_u8.shape[1]
    grid = (len(plan_rows), triton.cdiv(size * size, BLOCK))
    with torch.cuda.device_of(images_u8):
        ingest_kernel[grid](
            images_u8, plan_rows.contiguous(), values, quantiles, out,
            images_u8.stride(0), size,
            PATCH=patch, LAYOUT=LAYOUTS.index(layout), BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
    return out


def _ingest_fake(images_u8, plan_rows, values, quantiles, dtype, layout, patch):  # type: ignore[no-untyped-def]
    return empty(images_u8, plan_rows.shape[0], dtype, layout, patch)


for _key in ("CPU", "CUDA"):
    _library.impl("ingest", _ingest, _key)
torch.library.register_fake("deit_fast::ingest", _ingest_fake, lib=_library)


def fused(
    images_u8: Tensor, plan_rows: Tensor, mean: tuple[float, ...], std: tuple[float, ...],
    dtype: torch.dtype, layout: str, patch: int,
) -> Tensor:  # fmt: skip
    """Ingest of checked arguments, in one launch."""
    device = images_u8.device
    values, quantiles = normalised_values(mean, std, device), normal_quantiles(device)
    return torch.ops.deit_fast.ingest(images_u8, plan_rows, values, quantiles, dtype, layout, patch)


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """DeiT's shapes: 224 pixels, all layouts."""
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    for dtype, layout in (
        (torch.bfloat16, "nchw"), (torch.bfloat16, "channels_last"), (torch.bfloat16, "patches"),
        (torch.float32, "nchw"),
    ):  # fmt: skip
        signature = {
            "images": "*u8", "rows": "*i32", "values": "*fp32", "quantiles": "*fp32",
            "out": f"*{names[dtype]}", "image_stride": "i32", "size": "i32",
        }  # fmt: skip
        divisible = (
            "images",
            "rows",
            "values",
            "quantiles",
            "out",
            "image_stride",
            "size",
        )
        wide = layout == "nchw"
        yield (
            f"{layout} {names[dtype]} 224",
            ingest_kernel,
            signature,
            {"PATCH": 16, "LAYOUT": LAYOUTS.index(layout), "BLOCK": BLOCK},
            dict.fromkeys(divisible, 16),
            dict(_OPTIONS),
            {"wide_stores": wide, "i64_rows": True},
        )
