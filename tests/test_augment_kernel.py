"""The augment kernels against Pillow itself: not one byte of a view may differ.

This process runs the reference; `test_in_the_interpreter` runs the file again on the kernels, in
Triton's interpreter, with fewer levels. On a GPU machine the tests marked gpu compare the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deit_fast.config import ViewConfig
from deit_fast.data.augment import (
    apply_operation,
    augment_table,
    operation_at,
)
from deit_fast.data.resize import crop_and_resize
from deit_fast.errors import InputError
from deit_fast.kernels.augment import KINDS, TABLE_COLUMNS, AugmentTable, augment
from deit_fast.views.plan import PLAN_DTYPE, RANDAUGMENT_OPERATIONS, ViewPlan, plan_dtype
from deit_fast.views.rng import LEVEL_ONE
from helpers.kernels import (
    INTERPRETED,
    assert_250_repeats_are_equal,
    assert_waits_for_nothing,
    outer_run,
    run_in_the_interpreter,
)

FILL = (124, 116, 104)
OPERATIONS = RANDAUGMENT_OPERATIONS[1:]
READERS = ("contrast", "auto_contrast", "equalize")  # read the whole view first
PICTURES = ("noise", "nearly white", "flat", "edges", "smooth")
# The interpreter takes a tenth of a second for a view.
SIZE, LEVELS, SIZES, RESIZED, PAIRS = (
    (16, (8.9990234375,), (2, 33), ("edges",), 10)
    if INTERPRETED
    else (20, (0.0, 1 / LEVEL_ONE, 3.7119140625, 7.5, 8.9990234375, 9.5, 10.0),
          (1, 2, 3, 16, 33, 48), PICTURES, 200)
)  # fmt: skip
Box = tuple[int, int, int, int]


def picture(kind: str, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """uint8 [height, width, 3]."""
    draw = np.random.default_rng(7)
    shape = (height, width, 3)
    if kind == "noise":
        return draw.integers(0, 256, shape, np.uint8)
    if kind == "nearly white":  # equalize meets its cap here
        return np.minimum(draw.integers(250, 262, shape), 255).astype(np.uint8)
    if kind == "flat":
        return np.full(shape, (77, 0, 255), np.uint8)
    if kind == "edges":  # blocks of few values: the cubic overshoots on both sides
        return np.kron(draw.choice([0, 40, 255], (height // 4 + 1, width // 4 + 1, 3)),
                       np.ones((4, 4, 1)))[:height, :width].astype(np.uint8)  # fmt: skip
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + c) + np.cos(y / (3 + c)) for c in range(3)]
    return (90 + 38 * np.stack(waves, axis=-1) + draw.normal(0, 4, shape)).astype(np.uint8)


def ragged(pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The buffer, three stray bytes before each picture, and where they are."""
    parts, table, end = [], [], 0
    for array in pictures:
        parts += [np.array([9, 200, 3], np.uint8), array.ravel()]
        table.append([end + 3, array.shape[1], array.shape[0]])
        end += 3 + array.size
    return torch.from_numpy(np.concatenate(parts)), torch.tensor(table).view(-1, 3)


def plan_rows(views: Sequence[tuple[Sequence[str], Sequence[float], int]]) -> np.ndarray:
    """Operations' names, levels and flip of each view, as a plan has them."""
    rows = np.zeros(len(views), PLAN_DTYPE)
    for row, (names, levels, flip) in zip(rows, views, strict=True):
        row["operations"] = [RANDAUGMENT_OPERATIONS.index(name) for name in names]
        row["levels"] = [round(level * LEVEL_ONE) for level in levels]
        row["flip"] = flip
    return rows


def by_pillow(array: np.ndarray, box: Sequence[int], row: np.void, size: int) -> np.ndarray:
    """The view: always in the mirror where it will be flipped."""
    left, top, width, height = (int(value) for value in box)
    crop = Image.fromarray(array).crop((left, top, left + width, top + height))
    image = crop.resize((size, size), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if row["flip"] else image
    for operation, level in zip(row["operations"].tolist(), row["levels"].tolist(), strict=True):
        name = RANDAUGMENT_OPERATIONS[operation]
        image = apply_operation(image, name, level / LEVEL_ONE, FILL)
    return np.asarray(ImageOps.mirror(image) if row["flip"] else image)


def assert_pillows(
    pictures: Sequence[np.ndarray], rows: np.ndarray, boxes: Sequence[Box], which: Sequence[int],
    size: int = SIZE,
) -> None:  # fmt: skip
    pixels, images = ragged(pictures)
    table = augment_table(ViewConfig(image_size=size), rows, boxes, which)
    views = augment(pixels, images, table, size, FILL).numpy()
    assert views.shape == (len(rows), size, size, 3)
    for view, row, box, picture in zip(views, rows, boxes, which, strict=True):
        expected = by_pillow(pictures[picture], box, row, size)
        np.testing.assert_array_equal(view, expected, f"{row} of picture {picture}, crop {box}")


@pytest.mark.slow
@outer_run
def test_in_the_interpreter() -> None:
    """All other tests of this file, on the kernels."""
    run_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------
# Against Pillow
# ---------------------------------------------------------------------------------------------

CROPS = (
    (0, 0, 47, 33),  # all of it
    (46, 32, 1, 1),  # one pixel, in the corner
    (0, 7, 47, 1),
    (13, 0, 1, 33),
    (5, 6, SIZE, SIZE),  # copied
    (0, 3, SIZE, 29),  # one axis alone
    (4, 1, 31, SIZE),
    (11, 2, 7, 5),
    (20, 20, 2, 3),
    (1, 0, 21, 19),
)


@pytest.mark.parametrize("kind", RESIZED)
def test_crops_are_resized_as_by_pillow(kind: str) -> None:
    nothing = plan_rows([(("none", "none"), (0, 0), 0)] * len(CROPS))
    assert_pillows([picture(kind, 47, 33)], nothing, CROPS, [0] * len(CROPS))


STRIP = r"a crop of \d+ x \d+ pixels is taller than 100 times its width: Pillow resizes its height"


@outer_run
def test_crops_of_all_shapes_are_pillows_or_refused() -> None:
    """1 : 1000 to 1000 : 1, of both loaders. CROPS_TRIED=3000 tries as many."""
    draw, refused = np.random.default_rng(5), 0
    nothing = plan_rows([(("none", "none"), (0, 0), 0)])
    for number in range(int(os.environ.get("CROPS_TRIED", 60))):
        ratio, area = 1000 ** draw.uniform(-1, 1), 10 ** draw.uniform(1, 5)
        width = min(max(round((area * ratio) ** 0.5), 1), 4000)
        height = min(max(round((area / ratio) ** 0.5), 1), 4000)
        left, top, right, bottom = draw.integers(5, size=4).tolist()
        kind = ("noise", "edges", "smooth")[number % 3]
        array = picture(kind, left + width + right, top + height + bottom)
        box, size = (left, top, width, height), int(draw.choice([1, 7, 32, 224]))
        ours = crop_and_resize(array, box, size, size)
        np.testing.assert_array_equal(ours, by_pillow(array, box, nothing[0], size), str(box))
        if height > 100 * width and height > size:
            refused += 1
            with pytest.raises(InputError, match=STRIP):
                assert_pillows([array], nothing, [box], [0], size)
        else:
            assert_pillows([array], nothing, [box], [0], size)
    assert number / 20 < refused < number / 3


def test_no_plan_has_a_crop_that_is_refused() -> None:
    """Its crops have 3 : 4 to 4 : 3, whatever the image."""
    sizes = [(1, 40000), (20, 70000), (70000, 20), (3, 500), (2, 300), (1, 1), (400, 41000)]
    widths, heights = (np.tile(side, 100) for side in np.array(sizes).T)
    count = len(widths)
    plan = ViewPlan(ViewConfig(seed=11), count)
    boxes = plan.crop_boxes(np.arange(count), np.zeros(count, int), widths, heights)
    assert (boxes[:, 3] <= 2 * boxes[:, 2]).all() and (boxes[:, 2:] > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_view(size: int) -> None:
    """33 and 48: more lines and bytes than one program takes; 1 and 2: all border."""
    pictures = [picture("edges", 15, 22), picture("noise", 12, 7)]
    boxes, which = [(3, 2, 9, 13), (0, 0, 12, 7)], [0, 1]
    views = [(("sharpness", "rotate"), (9, -8), 1), (("equalize", "color"), (1, 7), 0)]
    assert_pillows(pictures, plan_rows(views), boxes, which, size)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_pillows(name: str) -> None:
    """Both layers, both directions, views that ingest will flip and others."""
    views, which = [], []
    for index in range(len(PICTURES)):
        for level in LEVELS:
            for sign in (1, -1):
                layer = len(views) % 3 % 2  # each picture and level meets both
                names = (name, "none") if layer == 0 else ("none", name)
                views.append((names, (sign * level, sign * level), len(views) // 2 % 2))
                which.append(index)
    boxes = [(0, 0, SIZE, SIZE)] * len(views)
    assert_pillows([picture(kind) for kind in PICTURES], plan_rows(views), boxes, which)


def test_both_layers_act_in_turn() -> None:
    draw = np.random.default_rng(3)
    views, boxes, which = [], [], []
    pictures = [picture(kind, 41, 29) for kind in PICTURES]
    for _ in range(PAIRS):
        names = [OPERATIONS[i] for i in draw.integers(0, len(OPERATIONS), 2)]
        views.append((names, draw.uniform(-10, 10, 2), int(draw.integers(2))))
        width, height = int(draw.integers(1, 42)), int(draw.integers(1, 30))
        left, top = int(draw.integers(0, 42 - width)), int(draw.integers(0, 30 - height))
        boxes.append((left, top, width, height))
        which.append(int(draw.integers(len(pictures))))
    assert_pillows(pictures, plan_rows(views), boxes, which)


def test_larger_views_of_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histograms of more than one block, where equalize's steps are larger than 1, and programs
    that come back for more pixels."""
    monkeypatch.setattr(sys.modules["deit_fast.kernels.augment"], "PROGRAMS", 2)
    size = 56
    names = [(name, index) for name in READERS for index in range(3)]
    names += [(name, 2) for name in ("color", "sharpness", "rotate", "invert")]
    views = [((name, "none"), (8, 0), 0) for name, _ in names]
    pictures = [picture(kind, size, size) for kind in ("nearly white", "edges", "smooth")]
    boxes = [(0, 0, size, size)] * len(views)
    assert_pillows(pictures, plan_rows(views), boxes, [index for _, index in names], size)


@outer_run
def test_a_plan_of_deit_on_photographs() -> None:
    from sklearn.datasets import load_sample_image

    photos = [load_sample_image(name)[:400] for name in ("china.jpg", "flower.jpg")]
    count = 24
    samples, views, which = np.arange(count), np.zeros(count, int), np.arange(count) % 2
    plan = ViewPlan(ViewConfig(seed=11), count)
    boxes = plan.crop_boxes(samples, views, np.full(count, 640), np.full(count, 400))
    rows = plan.rows(samples, views)
    assert len(np.unique(rows["operations"])) > 10 and rows["flip"].any()
    assert_pillows(photos, rows, boxes.tolist(), which.tolist(), 224)


def test_operations_of_the_plan_use_every_kind() -> None:
    used = {operation_at(name, 9.0, SIZE)[0] for name in OPERATIONS}
    assert used == set(KINDS) - {"none"}


# ---------------------------------------------------------------------------------------------
# Laws and edges
# ---------------------------------------------------------------------------------------------


def workload(count: int, size: int = SIZE) -> tuple[Tensor, Tensor, AugmentTable]:
    """Views of all kinds of operations from three pictures."""
    draw = np.random.default_rng(2)
    pictures = [picture("smooth", 40, 31), picture("edges", 25, 52), picture("noise", 33, 33)]
    views, boxes = [], []
    for index in range(count):
        names = OPERATIONS[index % 15], ("none", *OPERATIONS)[index * 7 % 16]
        views.append((names, draw.uniform(-10, 10, 2), index % 2))
        boxes.append((int(draw.integers(9)), int(draw.integers(7)), 16, 1 + 5 * index % 24))
    recipe = ViewConfig(image_size=size)
    table = augment_table(recipe, plan_rows(views), boxes, np.arange(count) % 3)
    return *ragged(pictures), table


def test_a_view_does_not_depend_on_its_batch() -> None:
    pixels, images, table = workload(7)
    together = augment(pixels, images, table, SIZE, FILL)
    order = torch.arange(7).flip(0)
    turned = augment(pixels, images, AugmentTable(table.rows[order], table.weights), SIZE, FILL)
    assert torch.equal(turned, together[order])
    alone = augment(pixels, images, AugmentTable(table.rows[4:5], table.weights), SIZE, FILL)
    assert torch.equal(alone[0], together[4])
    elsewhere, moved = images.clone(), torch.cat((pixels.flip(0), pixels))
    elsewhere[:, 0] += len(pixels)
    assert torch.equal(augment(moved, elsewhere, table, SIZE, FILL), together)


def test_tensors_may_be_strided_and_stay_untouched() -> None:
    pixels, images, table = workload(3)
    expected = augment(pixels, images, table, SIZE, FILL)
    spaced = torch.stack((pixels, pixels.flip(0)), 1)
    before = spaced.clone()
    wide = images.repeat(1, 2)[:, :3], AugmentTable(table.rows.repeat(1, 2)[:, :26], table.weights)
    assert torch.equal(augment(spaced[:, 0], *wide, SIZE, FILL), expected)
    assert torch.equal(spaced, before)


def test_no_view_at_all() -> None:
    pixels, images, _ = workload(1)
    table = augment_table(ViewConfig(image_size=9), plan_rows([]), [], [])
    assert augment(pixels, images, table, 9, FILL).shape == (0, 9, 9, 3)
    assert augment(pixels[:0], images[:0], table, 9, FILL).shape == (0, 9, 9, 3)


def test_operator_is_registered() -> None:
    pixels, images, table = workload(1)
    operator = torch.ops.deit_fast.augment.default
    torch.library.opcheck(operator, (pixels, images, *table, SIZE, list(FILL)))
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    expected = augment(pixels, images, table, SIZE, FILL)
    assert torch.equal(compiled(pixels, images, table, SIZE, FILL), expected)


@outer_run
def test_machine_code_rounds_every_product() -> None:
    """A contracted multiply-add would move pixels, which the interpreter cannot show."""
    script = """
from deit_fast.kernels import aot
for case in aot.package_cases():
    if case.name in ("augment/layer 224", "augment/tables 224"):
        ptx = aot.compile_case(case, "sm_90").asm["ptx"]
        print(ptx.count("mul.rn.f") > 2, ptx.count("add.rn.f") > 2, ptx.count("fma."))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True True 0\n" * 2, done.stdout + done.stderr[-2000:]


@pytest.mark.gpu
def test_the_compiled_kernels_give_the_bytes_of_the_cpu() -> None:
    for size in (20, 96, 224):
        pixels, images, table = workload(96, size)
        expected = augment(pixels, images, table, size, FILL)
        there = pixels.cuda(), images.cuda(), table.to("cuda")
        assert torch.equal(augment(*there, size, FILL).cpu(), expected)
        assert_250_repeats_are_equal(lambda there=there, s=size: [augment(*there, s, FILL)])


@pytest.mark.gpu
def test_waits_for_nothing_and_can_be_captured() -> None:
    pixels, images, table = workload(32)
    there = pixels.cuda(), images.cuda(), table.to("cuda")
    assert_waits_for_nothing(lambda: [augment(*there, SIZE, FILL)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = augment(*there, SIZE, FILL)
    for _ in range(3):
        there[0].random_(0, 256)
        graph.replay()
        torch.cuda.synchronize()
        expected = augment(there[0].cpu(), images, table, SIZE, FILL)
        assert torch.equal(captured.cpu(), expected)


# ---------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------

PIXELS, IMAGES, TABLE = workload(3)
WRONG = {
    "pixels": (PIXELS.int(), "pixels must hold torch.uint8, not torch.int32"),
    "pixels shape": (PIXELS.view(1, -1), f"pixels must have shape [P], not (1, {len(PIXELS)})"),
    "images": (IMAGES.numpy(), "images must be a tensor, not ndarray"),
    "images shape": (IMAGES[:, :2], "images must have shape [N, 3], not (3, 2)"),
    "images device": (IMAGES.to("meta"), "images is on meta but pixels is on cpu"),
    "table": (TABLE.rows, "table must be an AugmentTable, not Tensor"),
    "table rows": (
        AugmentTable(TABLE.rows[:, :22], TABLE.weights),
        "table.rows must have shape [B, 26], not (3, 22)",
    ),
    "table weights": (
        AugmentTable(TABLE.rows, TABLE.weights.float()),
        "table.weights must hold torch.int32, not torch.float32",
    ),
    "size": (0, "size must be an integer in [1, 8192], not 0"),
    "fill": ((1, 2, 256), "fill must hold 3 integers in [0, 255], not (1, 2, 256)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(what: str) -> None:
    value, message = WRONG[what]
    options = {"pixels": PIXELS, "images": IMAGES, "table": TABLE, "size": SIZE, "fill": FILL}
    augment(**options)
    with pytest.raises(ValueError) as caught:
        augment(**(options | {what.split()[0]: value}))
    assert message in str(caught.value)


WRONG_VALUES = {
    "image": (3, "table.rows: image must lie in [0, 2], found 3 in row 1"),
    "left": (-1, "table.rows: left must lie in [0, 25], found -1 in row 1"),
    "width": (26, "table.rows: width must lie in [1, 25], found 26 in row 1"),
    "height": (0, "table.rows: height must lie in [1, 52], found 0 in row 1"),
    "top": (51, "table.rows: top + height must lie in [1, 52], found 57 in row 1"),
    "x_weights": (-7, "table.rows: x_weights must lie in [0, "),
    "y_taps": (0, "table.rows: y_taps must lie in [1, "),
    "x_taps": (99, "table.rows: x_weights + (1 + x_taps) size must lie in [0, "),
    "flip": (2, "table.rows: flip must lie in [0, 1], found 2 in row 1"),
    "second_kind": (12, "table.rows: second_kind must lie in [0, 11], found 12 in row 1"),
}


@pytest.mark.parametrize("column", WRONG_VALUES)
def test_wrong_values_are_named(column: str) -> None:
    value, message = WRONG_VALUES[column]
    rows = TABLE.rows.clone()
    rows[1, TABLE_COLUMNS.index(column)] = value
    with pytest.raises(ValueError) as caught:
        augment(PIXELS, IMAGES, AugmentTable(rows, TABLE.weights), SIZE, FILL)
    assert message in str(caught.value)


@pytest.mark.parametrize(("column", "value"), [(0, len(PIXELS)), (0, -1), (1, 0), (2, 1 << 29)])
def test_images_outside_the_pixels_are_named(column: int, value: int) -> None:
    images = IMAGES.clone()
    images[2, column] = value
    with pytest.raises(ValueError, match=r"images: .* in row 2"):
        augment(PIXELS, images, TABLE, SIZE, FILL)


@pytest.mark.parametrize(
    ("name", "value"), [("crop", "simple"), ("augment", "three_augment"), ("color_jitter", 0.3)]
)
def test_recipes_that_the_kernel_does_not_know_are_refused(name: str, value: object) -> None:
    options = {"augment": "none"} if name == "color_jitter" else {}
    recipe = ViewConfig(**(options | {name: value}))
    with pytest.raises(InputError, match=f"view.{name}=.*, not {value}"):
        augment_table(recipe, plan_rows([]), [], [])


def test_more_layers_than_the_kernel_has_are_refused() -> None:
    with pytest.raises(InputError, match="knows 2 operations of a view, not 3"):
        augment_table(ViewConfig(), np.zeros(1, plan_dtype(3)), [[0, 0, 9, 9]], [0])
