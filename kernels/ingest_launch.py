"""Launcher and operator of the ingest kernel: ``deit_fast::ingest``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .ingest_kernel import ingest_kernel
from .ingest_reference import LAYOUTS, normal_quantiles, normalised_values
from .launching import DTYPES, TYPE_NAMES, Inputs, Launch, Plans, implement, on_gpu, signature

BLOCK = 1024  # pixels of a program: 4.6 rows at 224, so most programs meet no erase box
INTERPRETED = not isinstance(ingest_kernel, triton.JITFunction)
# A fused multiply-add would round the mixed pixels otherwise than the reference.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def takes(images_u8: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel does this call: on a GPU, or on the CPU with TRITON_INTERPRET=1."""
    return (INTERPRETED or on_gpu(images_u8)) and dtype in DTYPES


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


def _group(size: int, dtype: torch.dtype, layout: str, patch: int) -> int:
    """Pixels that a thread writes together: 16 bytes of a channel, fewer in a narrower patch."""
    most = 16 // dtype.itemsize
    if layout == "channels_last":
        return most if size * size % most == 0 else 1
    return min(most, patch & -patch) if layout == "patches" else 1


def _arguments(
    images_u8: Tensor, plan_rows: Tensor, values: Tensor, quantiles: Tensor, out: Tensor,
    layout: str, patch: int,
) -> dict[str, Any]:  # fmt: skip
    """All arguments of the kernel."""
    size = images_u8.shape[1]
    found: dict[str, Any] = {"images": images_u8, "rows": plan_rows.contiguous(), "values": values}
    found |= {"quantiles": quantiles, "out": out, "image_stride": images_u8.stride(0)}
    found |= {"size": size, "PATCH": patch, "LAYOUT": LAYOUTS.index(layout), "BLOCK": BLOCK}
    found |= {"GROUP": _group(size, out.dtype, layout, patch)}
    return found


def _ingest(
    images_u8: Tensor, plan_rows: Tensor, values: Tensor, quantiles: Tensor, dtype: torch.dtype,
    layout: str, patch: int,
) -> Tensor:  # fmt: skip
    if len(plan_rows) == 0 or images_u8.shape[1] == 0:
        return empty(images_u8, len(plan_rows), dtype, layout, patch)
    # The loader's batches are dense; of others only images that are dense themselves need no copy.
    if images_u8.stride()[1:] != (3 * images_u8.shape[1], 3, 1):
        images_u8 = images_u8.contiguous()
    # The number of images varies from batch to batch and is nothing that a launch depends on.
    inputs = (images_u8[:1], plan_rows, values, quantiles)
    return _plans(inputs, dtype, layout, patch)[0]


def _results(inputs: Inputs, dtype: torch.dtype, layout: str, patch: int) -> tuple[Tensor, ...]:
    images_u8, plan_rows = inputs[:2]
    assert images_u8 is not None and plan_rows is not None
    return (empty(images_u8, len(plan_rows), dtype, layout, patch),)


def _launches(
    inputs: Any, results: Sequence[Tensor], _: torch.dtype, layout: str, patch: int
) -> Iterator[Launch]:
    images_u8, plan_rows = inputs[:2]
    grid = (len(plan_rows) * triton.cdiv(images_u8.shape[1] ** 2, BLOCK),)
    arguments: list[Any] = [*inputs, *results, layout, patch]
    values = _arguments(*arguments)
    yield Launch(ingest_kernel, grid, values | _OPTIONS)


_plans = Plans(_results, _launches)


def _ingest_fake(images_u8, plan_rows, values, quantiles, dtype, layout, patch):  # type: ignore[no-untyped-def]
    return empty(images_u8, plan_rows.shape[0], dtype, layout, patch)


implement(_library, "ingest", _ingest, _ingest_fake)


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
    bf16, fp32 = torch.bfloat16, torch.float32
    images = torch.empty((256, 224, 224, 3), dtype=torch.uint8, device="meta")
    rows = images.new_empty((256, 22), dtype=torch.int32)
    tables = images.new_empty((3, 256), dtype=fp32), images.new_empty((65536,), dtype=fp32)
    for dtype, layout in (
        (bf16, "nchw"),
        (bf16, "channels_last"),
        (bf16, "patches"),
        (fp32, "nchw"),
        (fp32, "channels_last"),
        (fp32, "patches"),
    ):
        out = empty(images, 256, dtype, layout, 16)
        values = _arguments(images, rows, *tables, out, layout, 16)
        yield (
            f"{layout} {TYPE_NAMES[dtype]} 224",
            ingest_kernel,
            *signature(ingest_kernel, values),
            dict(_OPTIONS),
            {"wide_stores": True, "i64_rows": True, "max_scalar_stores": 0},
        )
