"""View plans, pairs and order: distributions, equality with plain Python, independence."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_fast.config import ViewConfig, constants
from deit_fast.data import ImageFolder, ViewLoader
from deit_fast.errors import InputError
from deit_fast.views import order as order_module
from deit_fast.views import plan as plan_module
from deit_fast.views import rng as rng_module
from deit_fast.views.order import EpochOrder, TrainBatches, pairing
from deit_fast.views.plan import ViewPlan, fingerprint, lam_of
from deit_fast.views.rng import (
    CUTMIX,
    LAM_ONE,
    MIXUP,
    NO_MIX,
    Purpose,
    beta_table,
    philox,
    ratio_table,
)
from helpers.images import digests, write_split
from helpers.plans import view_with

DRAWS = 100_000
SEED = 0x1234_5678_9ABC


def within(share: float, expected: float, count: int) -> bool:
    """Five standard deviations of a binomial share."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Views 0 of an even number of samples, DeiT's recipe."""
    return ViewPlan(ViewConfig(seed=SEED), DRAWS).rows(np.arange(DRAWS), np.zeros(DRAWS, int))


# ---------------------------------------------------------------------------------------------
# Generator and tables
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # Random123's kat_vectors, philox4x32 with 10 rounds
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert " ".join(f"{int(word):08x}" for word in philox(*counter, key)) == words


TRITON = """
import sys, numpy as np, torch, triton, triton.language as tl

@triton.jit
def words(out, seed, n: tl.constexpr):
    at = tl.arange(0, n)
    a, b, c, d = tl.randint4x(seed, at)
    tl.store(out + at, a.to(tl.int64))
    tl.store(out + n + at, b.to(tl.int64))
    tl.store(out + 2 * n + at, c.to(tl.int64))
    tl.store(out + 3 * n + at, d.to(tl.int64))

out = torch.zeros(4, 64, dtype=torch.int64)
words[(1,)](out, 0x123456789ABC, n=64)
from deit_fast.views.rng import philox
ours = np.stack(philox(np.arange(64), 0, 0, 0, (0x56789ABC, 0x1234)))
assert (ours == (out.numpy() & 0xFFFFFFFF)).all(), (ours, out)
print("equal")
"""


def test_philox_equals_tritons(tmp_path):
    script = tmp_path / "words.py"  # triton.jit reads the source from a file
    script.write_text(TRITON)
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.stdout.strip() == "equal", run.stderr


def test_philox_broadcasts_and_keeps_its_counters_apart():
    samples, views = np.arange(500), np.arange(7)[:, None]
    words = philox(samples, views, 3, Purpose.CROP, (1, 2))
    assert all(word.shape == (7, 500) and word.dtype == np.uint32 for word in words)
    one = philox(123, 4, 3, Purpose.CROP, (1, 2))
    assert [int(word[4, 123]) for word in words] == [int(word) for word in one]
    assert len(np.unique(np.stack(words))) > 4 * 7 * 500 - 5  # equal only by chance


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 5.0])
def test_beta_table_against_scipy(alpha):
    beta = pytest.importorskip("scipy.stats").beta
    words = np.linspace(2**10, 2**32 - 2**10, 100_001).astype(np.uint64)
    drawn = np.searchsorted(beta_table(alpha), words, side="right") / LAM_ONE
    assert np.abs(drawn - beta.ppf((words + 0.5) / 2**32, alpha, alpha)).max() < 2e-5


def test_beta_table_is_symmetric_and_uniform_at_one():
    uniform = np.arange(65536, dtype=np.uint64) * 65536 + 32768
    np.testing.assert_array_equal(beta_table(1.0), uniform)
    for alpha in (0.05, 0.8, 3.0, 300.0):
        table = beta_table(alpha)
        assert (np.diff(table.astype(np.int64)) >= 0).all()
        np.testing.assert_array_equal(table + table[::-1], np.full(65536, 2**32))


@pytest.mark.parametrize("ends", [(3 / 4, 4 / 3), (0.3, 1 / 0.3), (1e-3, 50.0), (1.0, 1.0)])
def test_ratio_table_is_log_uniform(ends):
    grid = np.log(ends[0]) + (np.arange(65536) + 0.5) / 65536 * np.log(ends[1] / ends[0])
    np.testing.assert_allclose(ratio_table(*ends), np.exp(grid), rtol=1e-14)


# ---------------------------------------------------------------------------------------------
# Crop and erasing, against plain Python with the same uniforms
# ---------------------------------------------------------------------------------------------


def plain_boxes(purpose, sample, view, size_a, size_b, scale, ratio, accept):
    """Section by section what torchvision and timm write, one view, Python's own arithmetic."""
    key = (SEED & 0xFFFFFFFF, SEED >> 32)
    logs = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        words = [int(word) for word in philox(sample, view, attempt, purpose, key)]
        area = (scale[0] + (scale[1] - scale[0]) * (words[0] / 2**32)) * (size_a * size_b)
        aspect = math.exp(logs[0] + (logs[1] - logs[0]) * ((words[1] >> 16) + 0.5) / 65536)
        a, b = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if accept(a, b):
            start_a, start_b = words[2] * (size_a - a + 1) >> 32, words[3] * (size_b - b + 1) >> 32
            return start_a, start_b, a, b
    return None


def plain_crop(recipe, sample, view, width, height):
    def accept(w, h):
        return 0 < w <= width and 0 < h <= height

    low, high = recipe.crop_ratio
    box = plain_boxes(
        Purpose.CROP, sample, view, width, height, recipe.crop_scale, (low, high), accept
    )
    if box is not None:
        return box
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (width - w) // 2, (height - h) // 2, w, h


def test_crop_equals_plain_python():
    plan = ViewPlan(ViewConfig(seed=SEED), 2000)
    rng = np.random.default_rng(0)
    samples, views = np.arange(2000), rng.integers(0, 900, 2000)
    shapes = np.concatenate(
        [
            np.full((500, 2), (500, 375)),
            rng.integers(1, 3000, (500, 2)),
            rng.integers(1, 12, (500, 2)),
            np.stack([rng.integers(1, 4, 500), rng.integers(500, 3000, 500)], axis=1),
        ]
    )
    boxes = plan.crop_boxes(samples, views, shapes[:, 0], shapes[:, 1])
    plain = [
        plain_crop(plan.view, *map(int, row))
        for row in zip(samples, views, shapes[:, 0], shapes[:, 1], strict=True)
    ]
    # One rounding of exp may differ from libm's, so a side may differ by a pixel, hardly ever.
    assert (boxes == np.array(plain)).all(axis=1).mean() > 0.999
    assert boxes.dtype == np.int32


def test_erasing_equals_plain_python(rows):
    side = 224

    def accept(h, w):
        return h < side and w < side

    erased = np.flatnonzero(rows["erase"][:, 2])[:1500].tolist()
    recipe = ViewConfig()
    args = (side, side, recipe.erase_scale, recipe.erase_ratio, accept)
    plain = [plain_boxes(Purpose.ERASE, sample, 0, *args) for sample in erased]
    assert (rows["erase"][erased] == np.array(plain)).all(axis=1).mean() > 0.999


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    view=st.integers(0, 2**31 - 1),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (0.01, 0.02), (50.0, 100.0), (1.0, 1.0)]),
)
def test_crop_stays_inside_the_image(width, height, view, ratio):
    plan = ViewPlan(view_with(crop_ratio=ratio)(seed=SEED), 64)
    boxes = plan.crop_boxes(np.arange(64), np.full(64, view), [width] * 64, [height] * 64)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= width).all()
    assert (boxes[:, 1] + boxes[:, 3] <= height).all()


def test_fallback_takes_the_largest_centred_crop():
    plan = ViewPlan(view_with(crop_ratio=(0.5, 0.75))(crop_scale=(1.0, 1.0), seed=SEED), 3)
    boxes = plan.crop_boxes(np.arange(3), [0, 0, 0], [1000, 10, 60], [100, 1000, 100])
    assert boxes[0].tolist() == [462, 0, 75, 100]  # too wide: width 100 * 0.75
    assert boxes[1].tolist() == [0, 490, 10, 20]  # too tall: height 10 / 0.5
    whole = ViewPlan(view_with(crop_ratio=(1.2, 1.3))(crop_scale=(1.0, 1.0), seed=SEED), 1)
    assert whole.crop_boxes([0], [0], [100], [80]).tolist() == [[0, 0, 100, 80]]


def test_distribution_of_crops():
    plan = ViewPlan(ViewConfig(seed=SEED), DRAWS)
    ids = np.arange(DRAWS)
    boxes = plan.crop_boxes(ids, ids * 0, np.full(DRAWS, 3000), np.full(DRAWS, 3000))
    left, top, width, height = boxes.T.astype(float)
    area, aspect = width * height / 9e6, width / height
    # Crops below half the area always fit, so they have the distribution that is drawn from.
    small = area[area < 0.5]
    histogram = np.histogram(small, bins=10, range=(0.08, 0.5))[0] / len(small)
    assert all(within(share, 0.1, len(small)) for share in histogram)
    logs = np.log(aspect[area < 0.5]) / math.log(4 / 3)
    histogram = np.histogram(logs, bins=10, range=(-1.0001, 1.0001))[0] / len(small)
    assert np.abs(histogram - 0.1).max() < 0.01
    room = (width < 2900) & (height < 2900)
    across, down = left[room] / (3000 - width[room]), top[room] / (3000 - height[room])
    for start in (across, down):
        assert abs(start.mean() - 0.5) < 0.01 and abs(start.std() - math.sqrt(1 / 12)) < 0.01
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.02


def test_distribution_of_flip_and_erasing(rows):
    assert within(rows["flip"].mean(), 0.5, DRAWS)
    erased = rows["erase"][:, 2] > 0
    assert within(erased.mean(), 0.25, DRAWS)  # ten attempts all but never fail
    area = rows["erase"][erased, 2] * rows["erase"][erased, 3] / 224**2
    assert abs(area.mean() - 0.176) < 0.002  # measured of timm's RandomErasing
    assert (rows["erase"][:, :2] + rows["erase"][:, 2:] <= 224).all()
    assert rows["erase"][:, 2:].max() < 224
    assert not rows["erase"][~erased].any()
    assert len(np.unique(rows["noise_key"])) == DRAWS
    assert abs(np.corrcoef(rows["flip"], erased)[0, 1]) < 0.02


def test_probabilities_zero_and_one():
    ids = np.arange(3000)
    never = ViewPlan(view_with(mix_prob=0)(flip_prob=0, erase_prob=0, seed=SEED), 3000).rows(ids, 0)
    assert not never["flip"].any() and not never["erase"].any() and not never["mix_kind"].any()
    assert (never["lam"] == LAM_ONE).all() and not never["box"].any()
    always = ViewPlan(ViewConfig(flip_prob=1, erase_prob=1, seed=SEED), 3000).rows(ids, 0)
    assert always["flip"].all() and (always["erase"][:, 2] > 0).all() and always["mix_kind"].all()


# ---------------------------------------------------------------------------------------------
# Mixing
# ---------------------------------------------------------------------------------------------


def test_distribution_of_mixing(rows):
    pairs = DRAWS // 2  # the members of a pair are one draw
    assert within((rows["mix_kind"] == CUTMIX).mean(), 0.5, pairs)
    assert (rows["mix_kind"] != NO_MIX).all()
    lam = rows["lam"][rows["mix_kind"] == MIXUP] / LAM_ONE
    assert abs(lam.mean() - 0.5) < 0.01
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.003  # Beta(a, a): 1 / (4 (2 a + 1))
    assert (rows["lam"][rows["mix_kind"] == CUTMIX] == LAM_ONE).all()
    assert not rows["box"][rows["mix_kind"] == MIXUP].any()
    corrected = lam_of(rows, 224)[rows["mix_kind"] == CUTMIX]
    assert abs(corrected.mean() - 0.6826) < 0.005  # DeiT's form; timm's later one gives 0.6810
    some = ViewPlan(view_with(switch_prob=0.9, mix_prob=0.3)(seed=SEED), DRAWS).rows(
        np.arange(DRAWS), 0
    )
    mixed = some["mix_kind"] != NO_MIX
    assert within(mixed.mean(), 0.3, pairs)
    assert within((some["mix_kind"][mixed] == CUTMIX).mean(), 0.9, int(mixed.sum() // 2))


def test_cutmix_box_equals_deit(rows):
    low, high = SEED & 0xFFFFFFFF, SEED >> 32
    for row in rows[rows["mix_kind"] == CUTMIX][:500]:
        first = min(int(row["sample"]), int(row["partner"]))
        word = int(philox(first, 0, 0, Purpose.MIX, (low, high))[2])
        lam = int(np.searchsorted(beta_table(1.0), word, side="right")) / LAM_ONE
        cut = int(224 * math.sqrt(1 - lam))
        centres = [int(w) * 224 >> 32 for w in philox(first, 0, 1, Purpose.MIX, (low, high))[:2]]
        starts = [min(max(c - cut // 2, 0), 224) for c in centres]
        sides = [min(max(c + cut // 2, 0), 224) - s for c, s in zip(centres, starts, strict=True)]
        assert row["box"].tolist() == starts + sides


def test_both_members_of_a_pair_share_the_mix(rows):
    partner = rows[rows["partner"]]
    for name in ("mix_kind", "box", "lam"):
        np.testing.assert_array_equal(rows[name], partner[name])
    np.testing.assert_array_equal(partner["partner"], rows["sample"])


@pytest.mark.parametrize(
    ("alphas", "kinds"), [((0, 1.0), {CUTMIX}), ((0.8, 0), {MIXUP}), ((0, 0), {NO_MIX})]
)
def test_a_mix_that_is_off_is_never_drawn(alphas, kinds):
    recipe = ViewConfig(seed=SEED, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    rows = ViewPlan(recipe, 1000).rows(np.arange(1000), 0)
    assert set(rows["mix_kind"].tolist()) == kinds


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1001, 4096])
def test_pairing_is_an_involution(count):
    seen = set()
    for group in range(5):
        plan = ViewPlan(ViewConfig(repeats=3, seed=SEED), count)
        partners = [
            plan.rows(np.arange(count), np.full(count, 3 * group + r))["partner"] for r in range(3)
        ]
        for partner in partners[1:]:
            np.testing.assert_array_equal(partner, partners[0])  # closed under repeats
        np.testing.assert_array_equal(partners[0][partners[0]], np.arange(count))
        alone = np.flatnonzero(partners[0] == np.arange(count))
        assert len(alone) == count % 2
        kinds = plan.rows(alone, np.full(len(alone), 3 * group))["mix_kind"]
        assert (kinds == NO_MIX).all()
        order = pairing(SEED, count, group)
        even = count // 2 * 2
        np.testing.assert_array_equal(partners[0][order[0:even:2]], order[1:even:2])
        seen.add(partners[0].tobytes())
    assert len(seen) == 5 or count < 10


def test_lam_of_weighs_the_own_sample():
    rows = ViewPlan(ViewConfig(seed=SEED), 4).rows(np.arange(3), 0)
    rows["mix_kind"] = [NO_MIX, MIXUP, CUTMIX]
    rows["lam"] = [LAM_ONE, 16384, LAM_ONE]
    rows["box"] = [[0] * 4, [0] * 4, [10, 20, 56, 112]]
    lam = lam_of(rows, 224)
    assert lam.dtype == np.float32 and lam.tolist() == [1.0, 0.25, 1 - 56 * 112 / 224**2]


# ---------------------------------------------------------------------------------------------
# A view depends on its key alone
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [1, 3, 1000, 2**40], ids="{}-keys".format)
def test_the_order_of_keys_is_that_of_a_stable_sort(kinds: int) -> None:
    """Also where many keys are equal, in all bits or only in the upper ones."""
    draw = np.random.default_rng(kinds)
    for count in (0, 1, 2, 3, 1000, 1025):
        for shift in (0, 9, 23, 50):
            keys = draw.integers(0, kinds, count).astype(np.uint64) << np.uint64(shift)
            order = rng_module.stable_order(keys)
            assert order.dtype == np.int64
            assert np.array_equal(order, np.argsort(keys, kind="stable"))


def test_a_permutation_is_the_sort_of_one_word_for_each_sample(monkeypatch) -> None:
    count, purpose = 1000, rng_module.Purpose.ORDER
    low, high, _, _ = rng_module.philox(np.arange(count), 7, 0, purpose, rng_module.key(3))
    keys = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    for part in (1000, 64, 7):
        monkeypatch.setattr(rng_module, "_PART", part)
        permutation = rng_module.permutation(3, count, 7, purpose)
        assert np.array_equal(permutation, np.argsort(keys, kind="stable"))
        assert not permutation.flags.writeable


def test_rows_do_not_depend_on_the_batch(rows):
    plan = ViewPlan(ViewConfig(seed=SEED), DRAWS)
    rng = np.random.default_rng(1)
    samples, views = rng.integers(0, DRAWS, 999), rng.integers(0, 12, 999)
    whole = plan.rows(samples, views)
    crops = plan.crop_boxes(samples, views, np.full(999, 500), np.full(999, 375))
    for size in (1, 7, 250):
        for start in rng.integers(0, 999 - size, 5):
            part = slice(start, start + size)
            assert plan.rows(samples[part], views[part]).tobytes() == whole[part].tobytes()
            few = plan.crop_boxes(samples[part], views[part], [500] * size, [375] * size)
            np.testing.assert_array_equal(few, crops[part])
    order = rng.permutation(999)
    assert plan.rows(samples[order], views[order]).tobytes() == whole[order].tobytes()
    assert pickle.loads(pickle.dumps(plan)).rows(samples, views).tobytes() == whole.tobytes()
    assert len(pickle.dumps(plan)) < 2000  # sent to every worker
    assert plan.rows([], []).shape == (0,)
    assert plan.crop_boxes([], [], [], []).shape == (0, 4)


@pytest.mark.parametrize("augment", ["randaugment", "three_augment", "none"])
def test_partner_lambda_and_box_depend_on_neither_batch_nor_rank(augment):
    """Walked as runs of other batch sizes, ranks and starts: a key always has the same row."""
    recipe = view_with(mix_prob=0.8)(seed=SEED, augment=augment)
    plan = ViewPlan(recipe, 301)
    order = EpochOrder(SEED, 301, 6, 3)
    seen: dict[tuple[int, int], bytes] = {}
    for batch_size, world, start in ((24, 1, 0), (30, 2, 0), (48, 4, 3), (7, 1, 50), (297, 1, 2)):
        for rank in range(world):
            batches = TrainBatches(order, batch_size, 6, rank, world)
            for step in range(start, len(batches)):
                for row in plan.rows(*batches[step]):
                    address = int(row["sample"]), int(row["view"])
                    assert seen.setdefault(address, row.tobytes()) == row.tobytes()
    assert len(seen) > 0.95 * 301 * 6
    rows = {address: np.frombuffer(row, plan.rows([0], [0]).dtype)[0]
              for address, row in seen.items()}  # fmt: skip
    assert {int(row["mix_kind"]) for row in rows.values()} == {NO_MIX, MIXUP, CUTMIX}
    for (sample, view), row in rows.items():
        other = rows.get((int(row["partner"]), view))
        if other is not None:
            assert other["partner"] == sample and other["mix_kind"] == row["mix_kind"]
            assert other["lam"] == row["lam"] and (other["box"] == row["box"]).all()


@pytest.mark.parametrize("seed", range(3))
def test_who_is_mixed_with_whom_is_uniform_over_the_data_set(seed):
    """Over 4000 groups of views, each of the 11 others is sample 0's partner equally often."""
    plan = ViewPlan(ViewConfig(repeats=1, seed=seed), 12)
    partner = plan.rows(np.zeros(4000, int), np.arange(4000))["partner"]
    counts = np.bincount(partner, minlength=12)
    assert counts[0] == 0 and abs(counts[1:] - 4000 / 11).max() < 5 * math.sqrt(4000 / 11)


@pytest.mark.parametrize(
    "recipe",
    [
        ViewConfig(seed=SEED, image_size=32, repeats=2),
        ViewConfig(seed=SEED, image_size=32, repeats=2, augment="three_augment", color_jitter=0.3),
        ViewConfig(
            seed=SEED, image_size=32, repeats=2, augment="none", color_jitter=0.4, crop="simple"
        ),
    ],
    ids=["randaugment", "three_augment", "jitter_simple_crop"],
)
def test_finished_views_are_the_same_however_a_run_is_cut(tmp_path, recipe):
    """Batch sizes, ranks, resumed starts, worker processes and threads: one digest for each key."""
    write_split(tmp_path / "train", 3, 7)
    source = ImageFolder(str(tmp_path), "train")
    plan = ViewPlan(recipe, 21)
    order = EpochOrder(SEED, 21, 4, 2)
    reference: dict[tuple[int, int], str] = {}
    before = torch.get_num_threads()
    try:
        for batch_size, world, start, workers, threads in (
            (18, 1, 0, 0, 1), (6, 1, 0, 2, 1), (4, 2, 0, 0, 2), (12, 3, 2, 1, 1), (3, 1, 9, 0, 2),
        ):  # fmt: skip
            torch.set_num_threads(threads)
            for rank in range(world):
                batches = TrainBatches(order, batch_size, 4, rank, world)
                loader = ViewLoader(
                    source, plan, batches, workers=workers, on_error="fail", start=start
                )
                for address, digest in digests(loader, recipe).items():
                    assert reference.setdefault(address, digest) == digest
    finally:
        torch.set_num_threads(before)
    assert len(reference) == 4 * 18  # a batch of 18 fits into each of the 4 epochs
    assert len(set(reference.values())) == len(reference)


def test_views_seeds_and_samples_differ():
    first, second = (ViewPlan(ViewConfig(seed=seed), 500) for seed in (0, 1 << 32))
    ids = np.arange(500)
    for other in (first.rows(ids, 1), second.rows(ids, 0)):
        assert (first.rows(ids, 0)["noise_key"] != other["noise_key"]).all()
        assert 150 < (first.rows(ids, 0)["flip"] != other["flip"]).sum() < 350
    size = np.full(500, 300)
    boxes = [first.crop_boxes(ids, view, size, size) for view in (0, 1)]
    assert (boxes[0] != boxes[1]).any(axis=1).all()


GOLDEN = """
import hashlib, numpy as np
from deit_fast.config import ViewConfig, constants
from deit_fast.views.order import EpochOrder
from deit_fast.views.plan import ViewPlan
plan = ViewPlan(ViewConfig(seed=2026), 10_001)
ids, views = np.arange(10_001), np.arange(10_001) % 9
digest = hashlib.sha256(plan.rows(ids, views).tobytes())
digest.update(plan.crop_boxes(ids, views, 200 + ids % 700, 300 + ids % 500).tobytes())
for epoch in (0, 1, 7):
    for array in EpochOrder(2026, 10_001, 6, 3).epoch(epoch):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""
GOLDEN_SHA256 = "07ca55cd63f039117156680c8d6a29b8205adc5626e7048f08aa83a97c864824"
GOLDEN_THREE_SHA256 = "d23d3860dc146c82f447512da1ba69ae9476047cda7d858270c9b0e7f70ec420"


def test_golden_plan():
    """A change here makes every cache on disk worthless: raise PLAN_VERSION with it."""
    here: dict = {}
    exec(GOLDEN.replace("print(digest.hexdigest())", "result = digest.hexdigest()"), here)
    assert here["result"] == GOLDEN_SHA256
    other = subprocess.run(
        [sys.executable, "-c", GOLDEN], capture_output=True, text=True, check=True, timeout=500
    )
    assert other.stdout.strip() == GOLDEN_SHA256


def test_golden_plan_of_three_augment():
    """As above, for the operations that DeiT-III has and DeiT has not."""
    recipe = ViewConfig(seed=2026, crop="simple", augment="three_augment", color_jitter=0.3)
    plan = ViewPlan(recipe, 10_001)
    ids, views = np.arange(10_001), np.arange(10_001) % 9
    digest = hashlib.sha256(plan.rows(ids, views).tobytes())
    digest.update(plan.crop_boxes(ids, views, 200 + ids % 700, 300 + ids % 500).tobytes())
    assert digest.hexdigest() == GOLDEN_THREE_SHA256


def test_fingerprint_names_every_field_and_table():
    entries = fingerprint(ViewConfig(seed=7))
    names = [*ViewConfig.__dataclass_fields__, *constants(ViewConfig)]
    assert {f"view.{name}" for name in names if name != "size_schedule"} <= set(entries)
    assert "view.size_schedule" not in entries  # where there is none: older caches stay equal
    sizes = fingerprint(ViewConfig(size_schedule=((0, 96), (3, 224)), seed=7))
    assert sizes == entries | {"view.size_schedule": [(0, 96), (3, 224)]}
    assert entries["view.seed"] == 7 and entries["view.cutmix_form"] == "deit"
    assert entries["view.crop_scale"] == [0.08, 1.0]  # a list, as JSON reads it back
    assert len(entries["view.tables_sha256"]) == 2 * hashlib.sha256().digest_size
    for changed in (
        ViewConfig(mixup_alpha=0.7),
        ViewConfig(cutmix_alpha=2.0),
        view_with(crop_ratio=(0.7, 1.4))(),
    ):
        other = fingerprint(changed)
        assert other["view.tables_sha256"] != entries["view.tables_sha256"]


def test_ids_out_of_range_are_refused():
    plan = ViewPlan(ViewConfig(seed=SEED), 10)
    for samples, views in (([10], [0]), ([-1], [0]), ([0], [-1]), ([0], [2**31])):
        with pytest.raises(IndexError, match="leave"):
            plan.rows(samples, views)
        with pytest.raises(IndexError, match="leave"):
            plan.crop_boxes(samples, views, [5], [5])
    with pytest.raises(InputError, match="not 0"):
        ViewPlan(ViewConfig(seed=SEED), 0)


# ---------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_a_cycle_visits_every_view_of_its_group_once(count, repeats):
    order = EpochOrder(SEED, count, 2 * repeats, repeats)
    for cycle in range(3):
        epochs = [order.epoch(cycle * repeats + part) for part in range(repeats)]
        assert min(len(samples) for samples, _ in epochs) >= order.length
        keys = np.concatenate([np.stack(epoch, axis=1) for epoch in epochs])
        group = cycle % 2
        expected = {
            (sample, group * repeats + r) for sample in range(count) for r in range(repeats)
        }
        assert len(keys) == len(expected) and {tuple(key) for key in keys.tolist()} == expected
    samples, views = order.epoch(0)
    assert samples.dtype == np.int64 and views.dtype == np.int32


def test_length_at_imagenet_size():
    assert EpochOrder(0, 1_281_167, 300, 3).length == 1_281_165
    assert EpochOrder(0, 1_281_167, 300, 1).length == 1_281_167


def test_pairs_and_repeats_stand_together():
    samples, views = EpochOrder(SEED, 600, 6, 3).epoch(4)
    partner = ViewPlan(ViewConfig(repeats=3, seed=SEED), 600).rows(samples, views)["partner"]
    np.testing.assert_array_equal(partner.reshape(-1, 2), samples.reshape(-1, 2)[:, ::-1])
    blocks = samples.reshape(-1, 3, 2)
    assert (blocks == blocks[:, :1]).all()
    assert (views.reshape(-1, 3, 2) == np.array([3, 4, 5])[:, None]).all()


def test_order_is_shuffled_anew_every_cycle_and_reuses_views():
    order = EpochOrder(SEED, 1000, 4, 2)  # 2 groups: cycles 0 and 2 show the same views
    first = np.concatenate([order.epoch(epoch)[0] for epoch in (0, 1)])
    again = np.concatenate([order.epoch(epoch)[0] for epoch in (4, 5)])
    assert {*order.epoch(0)[1].tolist()} == {0, 1} == {*order.epoch(4)[1].tolist()}
    assert {*order.epoch(2)[1].tolist()} == {2, 3}
    assert (first == again).mean() < 0.05
    np.testing.assert_array_equal(np.sort(first), np.sort(again))
    # A sample's position is uniform: its mean over 40 cycles is near the middle.
    one = EpochOrder(SEED, 1000, 40, 1)
    positions = np.stack([np.argsort(one.epoch(epoch)[0]) for epoch in range(40)])
    assert abs(positions.mean(axis=0) - 499.5).max() < 5 * 1000 / math.sqrt(12 * 40)


def test_ranks_share_one_global_batch():
    order = EpochOrder(SEED, 333, 6, 3)
    whole = TrainBatches(order, 32, epochs=4)
    assert len(whole) == 4 * (order.length // 32)
    for world in (2, 4):
        ranks = [TrainBatches(order, 32, 4, rank, world) for rank in range(world)]
        for step in range(len(whole)):
            parts = zip(*(rank[step] for rank in ranks), strict=True)
            for joined, single in zip(map(np.concatenate, parts), whole[step], strict=True):
                np.testing.assert_array_equal(joined, single)


def test_batches_are_a_sequence_that_can_be_entered_anywhere():
    batches = TrainBatches(EpochOrder(SEED, 200, 3, 3), 16, epochs=5)
    full = [np.concatenate(batch).tobytes() for batch in batches]
    assert len(full) == len(batches)
    fresh = pickle.loads(pickle.dumps(batches))
    tail = [np.concatenate(fresh[step]).tobytes() for step in range(37, len(fresh))]
    assert tail == full[37:]
    assert np.concatenate(batches[-1]).tobytes() == full[-1]
    assert [np.concatenate(batch).tobytes() for batch in batches[3:6]] == full[3:6]
    with pytest.raises(IndexError, match=str(len(batches))):
        batches[len(batches)]


def test_two_readers_near_a_border_compute_each_table_once(monkeypatch):
    """The loader, and the reader of the teacher cache 16 steps ahead, over 6 epochs of 2 cycles."""
    permutations = []

    def counted(seed: int, count: int, index: int, purpose: Purpose) -> np.ndarray:
        permutations.append((purpose, index))
        return permutation(seed, count, index, purpose)

    permutation = order_module.permutation
    monkeypatch.setattr(order_module, "permutation", counted)
    for table in (order_module._epoch_tables, order_module._pair_order, order_module.pairing,
                  plan_module.partner_table):  # fmt: skip
        table.cache_clear()

    plan = ViewPlan(ViewConfig(repeats=3, seed=SEED), 2000)
    batches = TrainBatches(EpochOrder(SEED, 2000, 6, 3), 64, epochs=6)
    for step in range(len(batches)):
        plan.rows(*batches[step])
        batches[min(step + 16, len(batches) - 1)]
    epochs = order_module._epoch_tables.cache_info()
    assert (epochs.misses, epochs.currsize) == (6, 2)
    assert plan_module.partner_table.cache_info().misses == 2
    assert sorted(permutations) == [
        (Purpose.PAIRING, 0), (Purpose.PAIRING, 1), (Purpose.ORDER, 0), (Purpose.ORDER, 1),
    ]  # fmt: skip


def test_cached_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        EpochOrder(SEED, 20, 3, 3).epoch(0)[0][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        pairing(SEED, 20, 0)[0] = 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda order: TrainBatches(order, 256, 1), ["100 samples", "batch_size=256"]),
        (lambda order: TrainBatches(order, 30, 1, 0, 4), ["batch_size=30", "4 processes"]),
        (lambda order: TrainBatches(order, 32, 1, 4, 4), ["rank 4", "4 processes"]),
        (lambda order: EpochOrder(0, 100, 4, 3), ["num_views", "repeats=3", "not 4"]),
        (lambda order: EpochOrder(0, 0, 3, 3), ["0 and 3"]),
    ],
)
def test_wrong_orders_are_one_clear_line(call, words):
    with pytest.raises(InputError) as caught:
        call(EpochOrder(0, 100, 3, 3))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)
