"""Ingest against a per-pixel model in plain Python, against torchvision, and batch by batch.

This process runs the reference; `test_in_the_interpreter` runs the file again on the kernel, in
Triton's interpreter. On a GPU machine the test marked gpu compares the two.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from deit_fast.kernels import ingest
from deit_fast.kernels.ingest import LAYOUTS, normal_quantiles, normalised_values, reference
from deit_fast.kernels.launching import recording
from helpers.kernels import INTERPRETED, interpreted, outer_run, run_in_the_interpreter
from helpers.like_cuda import CudaDivision
from helpers.plans import COLUMNS, MEAN, SIZE, STD, photos, plan, random_rows, row

# Triton's interpreter cuts the last bits of a bfloat16 off where a GPU rounds.
HALVES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)


@outer_run
def test_in_the_interpreter() -> None:
    """All other tests of this file, on the kernel."""
    run_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------
# A model of one pixel
# ---------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (high >> 32) ^ c[1] ^ k[0],
            high % 2**32,
            (low >> 32) ^ c[3] ^ k[1],
            low % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def half_pixel(images: np.ndarray, r: dict[str, int], p: str, y: int, x: int) -> list[np.float32]:
    top, left = r[p + "erase_top"], r[p + "erase_left"]
    inside_rows = top <= y < top + r[p + "erase_height"]
    if inside_rows and left <= x < left + r[p + "erase_width"]:
        key = [r[p + "noise_key_lo"] % 2**32, r[p + "noise_key_hi"] % 2**32]
        words = philox([y * SIZE + x, 0, 0, 0], key)[:3]
        return [np.float32(NormalDist().inv_cdf(((w >> 16) + 0.5) / 65536)) for w in words]
    source = SIZE - 1 - x if r[p + "flip"] else x
    values = images[r[p + "image"], y, source].astype(np.float32) / np.float32(255)
    triples = zip(values, MEAN, STD, strict=True)
    return [(v - np.float32(m)) / np.float32(s) for v, m, s in triples]


def view_by_pixel(images: np.ndarray, r: dict[str, int]) -> np.ndarray:
    view = np.empty((3, SIZE, SIZE), np.float32)
    weight = np.float32(r["lam"] / 65536)
    for y in range(SIZE):
        for x in range(SIZE):
            own, partner = (half_pixel(images, r, p, y, x) for p in ("", "partner_"))
            in_rows = r["box_top"] <= y < r["box_top"] + r["box_height"]
            in_box = in_rows and r["box_left"] <= x < r["box_left"] + r["box_width"]
            if r["mix_kind"] == 1:
                pairs = zip(own, partner, strict=True)
                own = [a * weight + b * (np.float32(1) - weight) for a, b in pairs]
            view[:, y, x] = partner if r["mix_kind"] == 2 and in_box else own
    return view


def test_known_values_of_philox() -> None:
    """The model's own check: the vectors of the Random123 distribution (kat_vectors)."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_every_bit_is_that_of_the_pixel_model() -> None:
    images, rows = photos(4), random_rows(30, 4)
    views = ingest(images, rows, MEAN, STD, torch.float32)
    for view, values in zip(views, rows.tolist(), strict=True):
        named = dict(zip(COLUMNS, values, strict=True))
        np.testing.assert_array_equal(view.numpy(), view_by_pixel(images.numpy(), named))


# ---------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------


def test_plain_views_are_those_of_torchvision() -> None:
    from torchvision import transforms

    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    chain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = chain(images[0].numpy())
    views = ingest(images, plan(row(), row(flip=1)), MEAN, STD, torch.float32)
    assert torch.equal(views[0], expected)
    assert torch.equal(views[1], expected.flip(-1))


@pytest.mark.parametrize("kind", (1, 2))
def test_pairs_are_mixed_as_by_timm(kind: int) -> None:
    """timm mixes x with x.flip(0); its box is put into the plan."""
    from timm.data.mixup import Mixup

    images, lam = photos(2), 0.375
    plain = ingest(images, plan(row(image=0), row(image=1)), MEAN, STD, torch.float32)
    if kind == 1:
        expected = plain * lam + plain.flip(0) * (1 - lam)
    else:
        np.random.seed(3)  # noqa: NPY002, timm draws from the global one
        mixup = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=10)
        expected = mixup(plain.clone(), torch.tensor([0, 1]))[0]
    changed = (expected != plain).any(1)[0].nonzero()
    top, left = changed.min(0).values.tolist()
    height, width = (changed.max(0).values - changed.min(0).values + 1).tolist()
    mix = {"mix_kind": kind, "lam": int(lam * 65536)}
    mix |= {"box_top": top, "box_left": left, "box_height": height, "box_width": width}
    rows = [row(image=i, partner_image=1 - i, **mix) for i in range(2)]
    assert torch.equal(ingest(images, plan(*rows), MEAN, STD, torch.float32), expected)


# ---------------------------------------------------------------------------------------------
# Laws and edges
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_a_view_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    images, rows = photos(5), random_rows(24, 5)
    together = ingest(images, rows, MEAN, STD, dtype)
    assert together.dtype == dtype
    alone = [ingest(images, r[None], MEAN, STD, dtype) for r in rows]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(24)
    assert torch.equal(ingest(images, rows[order], MEAN, STD, dtype), together[order])
    renamed = rows.clone()  # the same images at other indices of a larger batch
    renamed[:, [0, 8]] = 6 - renamed[:, [0, 8]]
    larger = torch.cat((photos(2), images.flip(0)))
    assert torch.equal(ingest(larger, renamed, MEAN, STD, dtype), together)
    exact = ingest(images, rows, MEAN, STD, torch.float32)
    assert torch.equal(exact.to(dtype), together)


def test_weight_one_is_the_image_and_weight_zero_its_partner() -> None:
    images = photos(2)
    own, partner = ingest(images, plan(row(image=0), row(image=1)), MEAN, STD, torch.float32)
    rows = [row(partner_image=1, mix_kind=1, lam=lam) for lam in (65536, 0)]
    mixed = ingest(images, plan(*rows), MEAN, STD, torch.float32)
    assert torch.equal(mixed[0], own) and torch.equal(mixed[1], partner)


def test_noise_is_standard_normal_and_differs_by_key_pixel_and_channel() -> None:
    erase = {"erase_height": 96, "erase_width": 96}
    rows = [row(noise_key_lo=k, noise_key_hi=-7, **erase) for k in range(4)]
    noise = ingest(photos(1, 96), plan(*rows), MEAN, STD, torch.float32)
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.std() - 1) < 4 / (2 * count) ** 0.5
    assert abs((noise.abs() > 1.959964).double().mean() - 0.05) < 4 * (0.05 * 0.95 / count) ** 0.5
    correlations = torch.corrcoef(noise.view(12, -1)) - torch.eye(12)
    assert correlations.abs().max() < 5 / 96
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean()
    assert abs(neighbours) < 4 / count**0.5


def test_images_may_be_a_strided_view_and_stay_untouched() -> None:
    whole = photos(3, 20)
    images, before = whole[:, 4:16, 4:16], whole.clone()
    rows = random_rows(9, 3)
    expected = ingest(images.contiguous(), rows, MEAN, STD, torch.float32)
    assert torch.equal(ingest(images, rows, MEAN, STD, torch.float32), expected)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, *HALVES), ids=str)
def test_tiles_and_layouts_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    """60 pixels a side: several programs a view, some of them outside the erase boxes."""
    images, rows = photos(4, 60), random_rows(12, 4, scale=5)
    got = ingest(images, rows, MEAN, STD, dtype, layout=layout, patch=6)
    expected = reference(images, rows, MEAN, STD, dtype, layout, 6)
    assert torch.equal(got, expected) and got.stride() == expected.stride()
    plain = ingest(images, rows, MEAN, STD, dtype)
    if layout == "patches":
        patches = plain[3].unfold(1, 6, 6).unfold(2, 6, 6)  # [3, 10, 10, 6, 6]
        assert torch.equal(got[3, 27], patches[:, 2, 7].flatten())
    else:
        assert torch.equal(got, plain)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize(("size", "patch"), ((39, 3), (42, 14), (40, 4), (48, 8), (48, 16)))
def test_wide_and_narrow_stores_give_the_same_bits(
    size: int, patch: int, dtype: torch.dtype
) -> None:
    """From one element to 16 bytes; erase and mix boxes within the first 36 pixels a side."""
    images, rows = photos(3, size), random_rows(6, 3, scale=3)
    got = ingest(images, rows, MEAN, STD, dtype, layout="patches", patch=patch)
    assert torch.equal(got, reference(images, rows, MEAN, STD, dtype, "patches", patch))


@interpreted
@pytest.mark.parametrize(
    ("layout", "patch", "dtype", "group"),
    (
        *(
            ("patches", patch, torch.bfloat16, n)
            for patch, n in ((32, 8), (16, 8), (14, 2), (7, 1))
        ),
        ("patches", 16, torch.float32, 4),
        ("nchw", 16, torch.bfloat16, 1),
    ),
    ids=str,
)
def test_patch_rows_are_written_16_bytes_at_a_time(
    layout: str, patch: int, dtype: torch.dtype, group: int
) -> None:
    with recording() as recorded:
        ingest(photos(1, 224), plan(row()), MEAN, STD, dtype, layout=layout, patch=patch)
    assert recorded.launches[0].arguments["GROUP"] == group


@interpreted
def test_operator_is_registered() -> None:
    images, rows = photos(2), plan(row(), row(image=1, flip=1))
    tables = normalised_values(MEAN, STD), normal_quantiles()
    operator = torch.ops.deit_fast.ingest.default
    arguments = (images, rows, *tables, torch.bfloat16, "patches", 4)
    torch.library.opcheck(operator, arguments)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    expected = ingest(images, rows, MEAN, STD, torch.bfloat16, layout="patches", patch=4)
    assert torch.equal(compiled(*arguments), expected)


def test_a_gpu_without_the_kernel_gives_the_bits_of_the_cpu() -> None:
    """PyTorch's operations run there, whose division by a number is another one."""
    images, rows = photos(4, 60), random_rows(48, 4, scale=5)
    expected = reference(images, rows, MEAN, STD, torch.float32, "nchw", 6)
    with CudaDivision():
        x = torch.arange(256.0)
        assert not torch.equal(x.clone().div_(255), x.div_(torch.tensor(255.0)))
        found = reference(images, rows, MEAN, STD, torch.float32, "nchw", 6)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(("layout", "patch"), (("nchw", 6), ("patches", 6), ("patches", 20)))
def test_the_compiled_kernel_gives_the_bits_of_the_cpu(
    layout: str, patch: int, dtype: torch.dtype
) -> None:
    images, rows = photos(4, 60), random_rows(48, 4, scale=5)
    expected = ingest(images, rows, MEAN, STD, dtype, layout=layout, patch=patch)
    for _ in range(250):
        got = ingest(images.cuda(), rows.cuda(), MEAN, STD, dtype, layout=layout, patch=patch)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    rows = torch.zeros(0, 22, dtype=torch.int32)
    assert ingest(photos(2), rows, MEAN, STD, dtype).shape == (0, 3, SIZE, SIZE)
    views = ingest(photos(2), rows, MEAN, STD, dtype, layout="patches", patch=4)
    assert views.shape == (0, 9, 48)


WRONG_ROWS = {
    "image": ({"image": 2}, "image must lie in [0, 1], found 2 in row 1"),
    "partner_image": ({"partner_image": -1}, "partner_image must lie in [0, 1], found -1 in row 1"),
    "flip": ({"flip": 2}, "flip must lie in [0, 1], found 2 in row 1"),
    "mix_kind": ({"mix_kind": 3}, "mix_kind must lie in [0, 2], found 3 in row 1"),
    "lam": ({"lam": 65537}, "lam must lie in [0, 65536], found 65537 in row 1"),
    "box": (
        {"box_left": 6, "box_width": 7},
        "box_left + box_width must lie in [0, 12], found 13 in row 1",
    ),
    "erase": ({"erase_height": -1}, "erase_height must lie in [0, 12], found -1 in row 1"),
}


@pytest.mark.parametrize("what", WRONG_ROWS)
def test_wrong_plan_is_named(what: str) -> None:
    values, message = WRONG_ROWS[what]
    with pytest.raises(ValueError) as caught:
        ingest(photos(2), plan(row(), row(**values)), MEAN, STD, torch.float32)
    assert message in str(caught.value)


WRONG = {
    "images_u8": (torch.zeros(1, 4, 4, 3), "images_u8 must hold torch.uint8, not torch.float32"),
    "images_u8 shape": (
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        "images_u8 must have shape [M, S, S, 3], not (1, 3, 4, 4)",
    ),
    "images_u8 size": (
        torch.zeros(1, 1, 1, 3, dtype=torch.uint8).expand(1, 16385, 16385, 3),
        "images_u8 must be square, of at most 16384 pixels a side, not 16385 x 16385",
    ),
    "plan_rows": (torch.zeros(1, 22), "plan_rows must hold torch.int32, not torch.float32"),
    "plan_rows shape": (
        torch.zeros(1, 21, dtype=torch.int32),
        "plan_rows must have shape [B, 22], not (1, 21)",
    ),
    "mean": ((0.5,), "mean must hold 3 floats, not (0.5,)"),
    "std": ((1.0, 0.0, 1.0), "std must hold 3 positive floats, not (1.0, 0.0, 1.0)"),
    "layout": ("nhwc", "layout must be one of nchw, patches, not 'nhwc'"),
    "patch": (5, "patch must divide the image size 12, but is 5"),
    "dtype": (torch.int8, "dtype must be a floating-point dtype, not torch.int8"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(what: str) -> None:
    value, message = WRONG[what]
    options = {
        "images_u8": photos(1),
        "plan_rows": plan(row()),
        "mean": MEAN,
        "std": STD,
        "dtype": torch.float32,
        "layout": "patches" if what == "patch" else "nchw",
        "patch": 6,
    }
    ingest(**options)
    with pytest.raises(ValueError) as caught:
        ingest(**(options | {what.split()[0]: value}))
    assert message in str(caught.value)
