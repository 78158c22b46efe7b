"""The graph that DALI runs: decode each file once, cut its views, resize, augment.

A sample of the graph's batch is a view. The files of a batch, fewer than its views, are the first
samples of the input, and 1 x 1 images fill the rest. `permute_batch` then gives each view its file,
so repeats and partners share a decode. Files other than plain JPEGs arrive decoded, in a second
input. All random choices are inputs too.

The pixels are DALI's own: its resize, a linear instead of a cubic warp, its equalize. They are
close to Pillow's, and a cache made with them serves only this loader.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from deit_fast.data.augment import operation_at
from deit_fast.views.plan import OPERATIONS
from deit_fast.views.rng import LEVEL_ONE

GRAPH_VERSION = 1  # raise it with any change of the pixels

_AFFINE, _COLOR = OPERATIONS.index("rotate"), OPERATIONS.index("color")  # branches of `_augment`
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's filter SMOOTH
_CENTRE = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def decoding_graph(feed: Callable[[], tuple], hw_decoder_load: float, **arguments: Any):
    """A pipeline whose output is a batch of whole images, uint8 HWC; the input is `file_inputs`.

    Args:
        arguments: DALI's `batch_size`, `num_threads`, `device_id` (None: the CPU) and
            `prefetch_queue_depth`.
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = arguments["device_id"] is not None

    @pipeline_def(enable_conditionals=True)
    def graph():
        encoded, raw, is_encoded = fn.external_source(
            feed, num_outputs=3, dtype=[types.UINT8, types.UINT8, types.INT32], ndim=[1, 3, 0],
            layout=["", "HWC", ""],
        )  # fmt: skip
        return _decode(encoded, raw, is_encoded, on_gpu, hw_decoder_load)

    return _build(graph, arguments)


def view_graph(
    feed: Callable[[], tuple],
    hw_decoder_load: float,
    size: int,
    layers: int,
    fill: tuple[int, int, int],
    **arguments: Any,
):
    """A pipeline whose output is a batch of views, uint8 [size, size, 3], not flipped or mixed.

    Its input is `file_inputs` followed by `view_inputs`. ``arguments``: as `decoding_graph`.
    """
    from nvidia.dali import fn, pipeline_def, types

    # encoded, raw, is_encoded; file, start, shape; operation, matrix and value of each layer
    integer, real = types.INT32, types.FLOAT
    dtype = [types.UINT8, types.UINT8, *[integer] * 4, *[integer, real, real] * layers]
    ndim = [1, 3, 0, 0, 1, 1, *[0, 2, 0] * layers]
    layout = ["", "HWC", *[""] * (len(ndim) - 2)]
    on_gpu = arguments["device_id"] is not None

    @pipeline_def(enable_conditionals=True)
    def graph():
        inputs = fn.external_source(
            feed, num_outputs=len(ndim), dtype=dtype, ndim=ndim, layout=layout
        )
        image = _decode(*inputs[:3], on_gpu, hw_decoder_load)
        file, start, shape = inputs[3:6]
        image = fn.permute_batch(image, indices=file)
        # Slice first: a resize with a region of interest reads pixels outside of it.
        image = fn.slice(image, start, shape, axes=[0, 1])
        image = fn.resize(image, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
        for layer in range(layers):
            operation, matrix, value = inputs[6 + 3 * layer : 9 + 3 * layer]
            image = _augment(image, operation, matrix, value, fill, on_gpu)
        return image

    return _build(graph, arguments)


def _build(graph: Any, arguments: dict[str, Any]):
    pipeline = graph(**arguments)
    pipeline.build()
    _pipelines.add(pipeline)
    return pipeline


# A forked process, such as a worker of evaluation, has a pipeline's memory but not its threads.
# Freeing the pipeline there would wait for them for ever, so the child keeps a reference. It is
# taken before the fork: the child may collect garbage before a hook of its own runs.
_pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: list[Any] = []
os.register_at_fork(before=lambda: _kept.extend(_pipelines), after_in_parent=_kept.clear)


def _decode(encoded, raw, is_encoded, on_gpu, hw_decoder_load):
    from nvidia.dali import fn, types

    if is_encoded == 1:
        image = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=hw_decoder_load,
        )
    else:
        image = raw.gpu() if on_gpu else raw
    return image


def _augment(image, operation, matrix, value, fill, on_gpu):
    """One operation by its index in `OPERATIONS`; `value` and `matrix`: see `operation_inputs`."""
    from nvidia.dali import fn, math, types

    device = "gpu" if on_gpu else "cpu"
    number = value.gpu() if on_gpu else value
    byte = fn.cast(number, dtype=types.UINT8)
    if operation == 1:  # auto_contrast
        low = fn.cast(fn.reductions.min(image, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
        high = fn.cast(fn.reductions.max(image, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
        is_flat = fn.cast(high <= low, dtype=types.FLOAT)
        stretched = (image - low) * (255.0 / math.max(high - low, 1.0))
        image = fn.cast(image * is_flat + stretched * (1.0 - is_flat), dtype=types.UINT8)
    elif operation == 2:
        image = fn.equalize(image)
    elif operation == 3:  # invert
        image = image ^ types.Constant(255, dtype=types.UINT8, device=device)
    elif operation == 4:  # rotate, shear and translate
        shift = types.Constant(np.array([[fill]], np.int16), device=device)
        moved = fn.cast(image, dtype=types.INT16) - shift  # warp fills with one value only
        moved = fn.warp_affine(
            moved, matrix=matrix, inverse_map=True, fill_value=0, interp_type=types.INTERP_LINEAR
        )
        image = fn.cast(moved + shift, dtype=types.UINT8)
    elif operation == 5:  # posterize
        image = image & byte
    elif operation == 6:  # solarize
        is_bright = fn.cast(image >= fn.cast(number, dtype=types.INT32), dtype=types.UINT8)
        image = image ^ (is_bright * types.Constant(255, dtype=types.UINT8, device=device))
    elif operation == 7:  # solarize_add
        is_dark = fn.cast(image < 128, dtype=types.INT32)
        image = fn.cast(image + is_dark * fn.cast(byte, dtype=types.INT32), dtype=types.UINT8)
    elif operation == 8:  # color
        image = fn.saturation(image, saturation=value)
    elif operation == 9:  # contrast
        grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        mean = fn.reductions.mean(grey, axes=[0, 1], keep_dims=True)
        image = fn.cast(mean + (image - mean) * number, dtype=types.UINT8)
    elif operation == 10:  # brightness
        image = fn.brightness(image, brightness=value)
    elif operation == 11:  # sharpness
        smooth = types.Constant(_SMOOTH, device=device)
        centre = types.Constant(_CENTRE, device=device)
        image = fn.filter(image, smooth * (1.0 - number) + centre * number)
    elif operation == 17:  # gaussian_blur
        image = fn.gaussian_blur(image, sigma=value)
    return image


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def file_inputs(files: list[np.ndarray], count: int) -> tuple:
    """Files as the first of `count` samples: uint8 [n] of a JPEG, or pixels uint8 [H, W, 3]."""
    nothing, pixel = np.zeros(1, np.uint8), np.zeros((1, 1, 3), np.uint8)
    rest = count - len(files)
    encoded = [file if file.ndim == 1 else nothing for file in files] + [nothing] * rest
    raw = [file if file.ndim == 3 else pixel for file in files] + [pixel] * rest
    is_encoded = np.array([file.ndim == 1 for file in files] + [False] * rest, np.int32)
    return encoded, raw, is_encoded


def view_inputs(rows: np.ndarray, boxes: np.ndarray, file_of: np.ndarray, size: int) -> tuple:
    """
    Args:
        rows: `plan_dtype` [n].
        boxes: int32 [n, 4], left, top, width, height of the crop in its file.
        file_of: integers [n], index of each view's file.
        size: side of the view, pixels.
    """
    inputs = [file_of.astype(np.int32), boxes[:, [1, 0]], boxes[:, [3, 2]]]
    for layer in range(rows["operations"].shape[1]):
        inputs += operation_inputs(
            rows["operations"][:, layer], rows["levels"][:, layer], rows["flip"], size
        )
    return tuple(map(np.ascontiguousarray, inputs))


def operation_inputs(
    operations: np.ndarray, levels: np.ndarray, flips: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Branch int32 [n], matrix float32 [n, 2, 3] and value float32 [n] of the planned operations.

    A view that will be flipped is warped as its mirror image; the other operations commute with a
    mirror.
    """
    branches = operations.astype(np.int32)
    matrices = np.tile(np.eye(2, 3, dtype=np.float32), (len(levels), 1, 1))
    values = np.zeros(len(levels), np.float32)
    for row in np.flatnonzero(operations).tolist():
        kind, argument, matrix = operation_at(
            OPERATIONS[operations[row]], int(levels[row]) / LEVEL_ONE, size
        )
        values[row] = argument
        if kind == "affine":
            branches[row] = _AFFINE
            a, b, c, d, e, f = matrix
            if flips[row]:
                b, c, d, f = -b, size - a * size - c, -d, f + d * size
            matrices[row] = (a, b, c), (d, e, f)
        elif kind == "posterize":
            values[row] = 0xFF << int(argument) & 0xFF
        elif kind == "grayscale":
            branches[row] = _COLOR  # by the factor 0
    return branches, matrices, values
