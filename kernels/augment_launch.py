"""Launcher and operator of the augment kernels: ``deit_fast::augment``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .augment_kernel import layer_kernel, resize_kernel, tables_kernel
from .augment_reference import KINDS, TABLE_COLUMNS, reference
from .launching import implement, on_gpu, signature

# Eight lines share what their crops' lines cost; more of them mostly multiply by zero.
RESIZE = {"LINES": 8, "BLOCK": 256}
TABLES = {"BLOCK": 2048}
LAYER = {"BLOCK": 256, "BYTES": 2048}
# Programs of a view and layer: at 224 pixels each takes seven times 256 of them.
PARTS = 28
INTERPRETED = not isinstance(layer_kernel, triton.JITFunction)
# Contraction would round the blends and the cubics otherwise than Pillow.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_FIRST, _SECOND = (TABLE_COLUMNS.index(f"{name}_kind") for name in ("first", "second"))

_library = torch.library.Library("deit_fast", "FRAGMENT")
_library.define(
    "augment(Tensor pixels, Tensor images, Tensor rows, Tensor weights, int size, int[] fill) "
    "-> Tensor"
)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_values(pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, size: int) -> None:
    """Everything that would lead out of a tensor.

    Raises:
        ValueError: names argument, column and value.
    """
    start, width, height = images.unbind(1)
    _check_column("images", "width", width, 1, 1 << 30)
    _check_column("images", "height", height, 1, 1 << 30)
    _check_column("images", "start", start, 0, len(pixels))
    _check_column("images", "start + 3 width height", start + 3 * width * height, 0, len(pixels))
    columns = dict(zip(TABLE_COLUMNS, rows.unbind(1), strict=True))

    def check(name: str, values: Tensor, low: int, high: int | Tensor) -> None:
        _check_column("table.rows", name, values, low, high)

    image = columns["image"]
    check("image", image, 0, len(images) - 1)
    for begin, extent, whole in (("left", "width", width[image]), ("top", "height", height[image])):
        check(begin, columns[begin], 0, whole)
        check(extent, columns[extent], 1, whole)
        check(f"{begin} + {extent}", columns[begin] + columns[extent], 1, whole)
    for axis in "xy":
        first, taps = columns[f"{axis}_weights"], columns[f"{axis}_taps"]
        check(f"{axis}_weights", first, 0, len(weights))
        check(f"{axis}_taps", taps, 1, len(weights))
        end = first + (1 + taps) * size
        check(f"{axis}_weights + (1 + {axis}_taps) size", end, 0, len(weights))
    check("flip", columns["flip"], 0, 1)
    for layer in ("first", "second"):
        check(f"{layer}_kind", columns[f"{layer}_kind"], 0, len(KINDS) - 1)


def _check_column(argument: str, name: str, values: Tensor, low: int, high: int | Tensor) -> None:
    wrong = ((values < low) | (values > high)).nonzero().flatten()
    if len(wrong) == 0:
        return
    at = int(wrong[0])
    limit = int(high[at]) if isinstance(high, Tensor) else high
    raise ValueError(
        f"{argument}: {name} must lie in [{low}, {limit}], found {int(values[at])} in row {at}"
    )


def _augment(
    pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, size: int, fill: Sequence[int]
) -> Tensor:
    # Looking at values on a GPU waits for it.
    if not pixels.is_cuda or os.environ.get("DEIT_FAST_DEBUG") == "1":
        _check_values(pixels, images, rows, weights, size)
    pixels, images, rows, weights = (x.contiguous() for x in (pixels, images, rows, weights))
    if not (INTERPRETED or on_gpu(pixels)):
        return reference(pixels, images, rows, weights, size, fill)
    out = pixels.new_empty((len(rows), size, size, 3))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(pixels):
        for kernel, grid, arguments in _launches(pixels, images, rows, weights, out, fill):
            kernel[(len(rows), *grid)](**arguments, **_OPTIONS)
    return out


def _launches(
    pixels: Tensor, images: Tensor, rows: Tensor, weights: Tensor, out: Tensor, fill: Sequence[int]
) -> Iterator[tuple[Any, tuple[int, ...], dict[str, Any]]]:
    """Kernels, their grids behind the views, and all their arguments, in order."""
    size = out.shape[1]
    both = {"out": out, "other": torch.empty_like(out), "rows": rows, "size": size}
    tables = out.new_empty((len(rows), 3, 256))
    color = fill[0] + 256 * fill[1] + 65536 * fill[2]

    crops = {"pixels": pixels, "images": images, "weights": weights}
    lines, blocks = triton.cdiv(size, RESIZE["LINES"]), triton.cdiv(3 * size, RESIZE["BLOCK"])
    yield resize_kernel, (lines, blocks), both | crops | RESIZE
    parts = min(PARTS, triton.cdiv(size * size, LAYER["BLOCK"]))
    for layer in (_FIRST, _SECOND):
        common = both | {"tables": tables, "LAYER": layer}
        yield tables_kernel, (3,), common | TABLES
        yield layer_kernel, (parts,), common | {"fill": color} | LAYER


def _augment_fake(pixels, images, rows, weights, size, fill):  # type: ignore[no-untyped-def]
    return pixels.new_empty((rows.shape[0], size, size, 3))


implement(_library, "augment", _augment, _augment_fake)


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """DeiT's shape: 256 views of 224 pixels."""
    pixels = torch.empty((256 * 500 * 375 * 3,), dtype=torch.uint8, device="meta")
    images = pixels.new_empty((256, 3), dtype=torch.int64)
    rows = images.new_empty((256, len(TABLE_COLUMNS)))
    weights = pixels.new_empty((400_000,), dtype=torch.int32)
    out = pixels.new_empty((256, 224, 224, 3))
    cases = list(_launches(pixels, images, rows, weights, out, (124, 116, 104)))
    expected = (
        ("resize", {"i64_rows": True, "max_fp64": 0}),
        # AutoContrast's 256 values, and the factors' way from double to float32.
        ("tables", {"i64_rows": True, "max_fp64": 48}),
        # Affine maps, two pixels a thread.
        ("layer", {"i64_rows": True, "wide_loads": True, "max_fp64": 400, "max_regs": 168}),
    )
    for (name, expect), (kernel, _, arguments) in zip(expected, cases[:3], strict=True):
        types = signature(kernel, arguments)
        yield f"{name} 224", kernel, *types, dict(_OPTIONS), expect
