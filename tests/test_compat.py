"""compat=deit: timm's order, timm's batch-wise mixing, and a run of it that can be interrupted."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from timm.data import mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.loss import SoftTargetCrossEntropy

from deit_fast.config import RunConfig, ViewConfig
from deit_fast.config_file import from_dict, to_dict
from deit_fast.data import ImageFolder, ViewLoader, ingest_batch
from deit_fast.data.loader import make_batch
from deit_fast.errors import InputError
from deit_fast.precomputation import precompute
from deit_fast.training.loop import train
from deit_fast.views.deit_order import DeitBatches
from deit_fast.views.plan import BatchMix, ViewPlan
from deit_fast.views.rng import CUTMIX, LAM_ONE, MIXUP, NO_MIX, Purpose, draw_mix
from helpers.distillation import base_loss
from helpers.images import write_split
from helpers.plans import view_with
from helpers.runs import comparable_rows, run_config, torchrun, weights_equal

SIZE = 32
SEED = 77
RECIPE = ViewConfig(seed=SEED, image_size=SIZE, repeats=3, erase_prob=0.5)


# ---------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------


def timms_lists(num_samples: int, repeats: int, epoch: int, world: int) -> list[list[int]]:
    lists = []
    for rank in range(world):
        sampler = RepeatAugSampler(range(num_samples), world, rank, num_repeats=repeats)
        sampler.set_epoch(epoch)
        lists.append(list(sampler))
    return lists


@pytest.mark.parametrize("num_samples", [10, 256, 300, 1000, 1537, 20_000])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_order_is_timms(num_samples, processes, repeats):
    recipe = ViewConfig(seed=SEED, repeats=repeats)
    share = 2 if num_samples < 1000 else 32
    for rank in range(processes):
        batches = DeitBatches(recipe, num_samples, share * processes, 8, rank, processes)
        for epoch in (0, 1, 7):
            theirs = timms_lists(num_samples, repeats, epoch, processes)[rank]
            steps = batches.steps.first(1)
            assert steps == len(theirs) // share  # drop_last, as DeiT's loader
            entries = [batches[epoch * steps + step] for step in range(steps)]
            ours = np.concatenate([samples for samples, _, _ in entries])
            assert ours.tolist() == theirs[: steps * share]
            assert {samples.dtype.str for samples, _, _ in entries} == {"<i8"}
            assert {views.dtype.str for _, views, _ in entries} == {"<i4"}


def test_imagenets_epoch_is_the_one_that_was_measured():
    """427,008 samples three times each, for any number of processes."""
    for processes in (1, 8):
        batches = DeitBatches(ViewConfig(), 1_281_167, 1024, 300, 0, processes)
        assert batches.steps.first(1) == 1251
    entries = [DeitBatches(ViewConfig(), 1_281_167, 1024, 300)[step] for step in range(1251)]
    samples = np.concatenate([entry[0] for entry in entries])
    assert np.unique(np.unique(samples, return_counts=True)[1]).tolist() == [3]
    assert len(np.unique(samples)) == 427_008


def test_every_repeat_is_a_view_of_its_own():
    batches = [DeitBatches(RECIPE, 600, 24, 4, rank, 4) for rank in range(4)]
    keys = [
        key
        for rank in batches
        for samples, views, _ in rank
        for key in zip(samples.tolist(), views.tolist(), strict=True)
    ]
    assert len(set(keys)) == len(keys) == 4 * 4 * batches[0].steps.first(1) * 6
    epochs = {view // 3 for _, view in keys}
    assert epochs == set(range(4))
    _, views, _ = batches[0][batches[0].steps.first(1)]  # the first of epoch 1
    assert (views // 3 == 1).all() and {view % 3 for view in views.tolist()} == {0, 1, 2}


def test_batches_can_be_entered_anywhere():
    batches = DeitBatches(RECIPE, 300, 16, epochs=5, rank=1, world_size=2)
    full = [pickle.dumps([entry[0].tolist(), entry[1].tolist(), entry[2]]) for entry in batches]
    assert len(full) == len(batches) == 5 * 16 and len(set(full)) == len(full)
    fresh = pickle.loads(pickle.dumps(batches))
    for step in (79, 3, 40):
        samples, views, mix = fresh[step]
        assert pickle.dumps([samples.tolist(), views.tolist(), mix]) == full[step]
    assert [entry[2] for entry in batches[5:8]] == [batches[step][2] for step in (5, 6, 7)]
    assert (batches[-1][0] == batches[79][0]).all()
    assert len(pickle.dumps(batches)) < 2000  # sent to every worker
    with pytest.raises(IndexError, match="step 80 of a run of 80 steps"):
        batches[80]


# ---------------------------------------------------------------------------------------------
# Mixing
# ---------------------------------------------------------------------------------------------


def test_distribution_of_batch_mixing():
    """CutMix half of the time, one draw for each step and rank, DeiT's distribution of lambda."""
    count = 100_000
    steps = np.arange(count)
    kinds, boxes, lams = draw_mix(ViewConfig(seed=SEED), steps, 0 * steps, Purpose.BATCH_MIX)
    others, _, _ = draw_mix(ViewConfig(seed=SEED), steps, 0 * steps + 1, Purpose.BATCH_MIX)
    deviation = 5 * np.sqrt(0.25 / count)
    assert abs((kinds == CUTMIX).mean() - 0.5) < deviation and (kinds != NO_MIX).all()
    assert abs((kinds == others).mean() - 0.5) < deviation  # ranks are independent
    lam = lams[kinds == MIXUP] / LAM_ONE
    assert abs(lam.mean() - 0.5) < 0.01 and abs(lam.var() - 1 / 10.4) < 0.003
    areas = boxes[kinds == CUTMIX, 2] * boxes[kinds == CUTMIX, 3]
    assert abs((1 - areas / 224**2).mean() - 0.6826) < 0.005  # DeiT's form of the box
    assert not boxes[kinds == MIXUP].any() and (lams[kinds == CUTMIX] == LAM_ONE).all()
    batches = DeitBatches(ViewConfig(seed=SEED), 256, 8, 3, 1, 2)
    second = draw_mix(ViewConfig(seed=SEED), steps[:96], 0 * steps[:96] + 1, Purpose.BATCH_MIX)
    for (_, _, mix), kind, box, lam in zip(batches, *second, strict=True):
        assert (mix.kind, mix.box, mix.lam) == (kind, tuple(box.tolist()), lam)
    rare = draw_mix(view_with(mix_prob=0.25)(seed=SEED), steps, 0 * steps, Purpose.BATCH_MIX)[0]
    assert abs((rare == NO_MIX).mean() - 0.75) < deviation


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ImageFolder:
    root = tmp_path_factory.mktemp("compat")
    write_split(root / "train", 3, 7)
    return ImageFolder(str(root), "train")


def timms_batch(
    images: torch.Tensor, labels: torch.Tensor, mix: BatchMix, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's `Mixup` in mode `batch`, its own draws replaced: lambda, choice and CutMix's edges."""
    ours = mixup.Mixup(0.8, 1.0, mode="batch", label_smoothing=smoothing, num_classes=3)
    top, left, height, width = mix.box
    edges = top, top + height, left, left + width
    choice = mix.lam / LAM_ONE if mix.kind == MIXUP else 0.5, mix.kind == CUTMIX
    with (
        mock.patch.object(ours, "_params_per_batch", lambda: choice),
        mock.patch.object(mixup, "rand_bbox", lambda *args, **options: edges),
    ):
        return ours(images.clone(), labels)


@pytest.mark.parametrize(
    "mix",
    [
        BatchMix(MIXUP, (0, 0, 0, 0), 20_011),
        BatchMix(MIXUP, (0, 0, 0, 0), 65_535),
        BatchMix(CUTMIX, (3, 10, 17, 22), LAM_ONE),
        BatchMix(CUTMIX, (31, 0, 1, 32), LAM_ONE),
        BatchMix(CUTMIX, (5, 5, 0, 0), LAM_ONE),
    ],
)
def test_pixels_and_targets_are_timms(source, mix):
    plan = ViewPlan(RECIPE, 21)
    samples, views = np.array([4, 4, 4, 9, 9, 20, 0, 13]), np.array([3, 4, 5, 3, 4, 5, 3, 0])
    plain = make_batch(source, plan, samples, views, BatchMix(NO_MIX, (0,) * 4, LAM_ONE),
                       on_error="fail")  # fmt: skip
    assert plain.labels.equal(plain.partner_labels) and (plain.lam == 1).all()
    mixed = make_batch(source, plan, samples, views, mix, on_error="fail")
    unmixed = ingest_batch(plain, RECIPE, torch.float32)
    images = ingest_batch(mixed, RECIPE, torch.float32)
    theirs, target = timms_batch(unmixed, plain.labels, mix, smoothing=0.1)
    assert torch.equal(images, theirs)
    assert (mixed.lam == mixed.lam[0]).all() and mixed.lam.dtype == torch.float32
    assert mixed.labels.tolist() == source.labels[samples].tolist()
    assert mixed.partner_labels.tolist() == source.labels[samples[::-1]].tolist()
    one, other = (torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
                  for labels in mixed.target[:2])  # fmt: skip
    lam = mixed.lam[:, None]
    torch.testing.assert_close(one * lam + other * (1 - lam), target, rtol=0, atol=1e-7)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    loss = base_loss(logits, mixed.target, smoothing=0.1)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, target))
    # Accumulation takes parts of the batch that was mixed as a whole.
    parts = [ingest_batch(mixed.part(k, k + 2), RECIPE, torch.float32) for k in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), images)


def test_views_before_mixing_are_those_of_the_plan(source):
    """Crop, flip, augmentation and erasing of a view do not depend on compat, rank or batch."""
    alone = view_with(mix_prob=0)(seed=SEED, image_size=SIZE, repeats=3, erase_prob=0.5)
    plan = ViewPlan(alone, 21)
    whole = {}
    for processes in (1, 2):
        for rank in range(processes):
            batches = DeitBatches(alone, 21, 4 * processes, 2, rank, processes)
            for batch in ViewLoader(source, plan, batches, workers=0, on_error="fail"):
                images = ingest_batch(batch, alone, torch.float32)
                keys = zip(batch.sample_ids.tolist(), batch.view_ids.tolist(), strict=True)
                for key, image in zip(keys, images, strict=True):
                    assert torch.equal(whole.setdefault(key, image), image)
    assert len(whole) >= 2 * 20
    keys = np.array(list(whole))
    batch = make_batch(source, plan, keys[:, 0], keys[:, 1], on_error="fail")
    assert torch.equal(ingest_batch(batch, alone, torch.float32), torch.stack([*whole.values()]))


def test_ranks_differ_in_their_samples_and_their_mix_alone(source):
    first, second = (DeitBatches(RECIPE, 21, 8, 6, rank, 2) for rank in (0, 1))
    joined = np.stack([np.concatenate([entry[0] for entry in rank]) for rank in (first, second)])
    for epoch in range(6):
        steps = slice(epoch * 8, epoch * 8 + 8)  # 2 steps of 4
        lists = timms_lists(21, 3, epoch, 2)
        assert joined[:, steps].tolist() == [theirs[:8] for theirs in lists]
    assert sum(a[2] == b[2] for a, b in zip(first, second, strict=True)) == 0
    again = DeitBatches(replace(RECIPE, seed=SEED + 1), 21, 8, 6, 0, 2)
    assert all((a[0] == b[0]).all() for a, b in zip(first, again, strict=True))  # as in DeiT
    assert sum(a[2] == b[2] for a, b in zip(first, again, strict=True)) == 0


# ---------------------------------------------------------------------------------------------
# What it refuses
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1000, 30, 1, 0, 4), ["batch_size=30", "4 processes"]),
        ((1000, 33, 1, 0, 1), ["must be even", "batch_size=33", "33 each"]),
        ((1000, 12, 1, 0, 4), ["must be even", "batch_size=12", "3 each"]),
        ((1000, 8, 1, 4, 4), ["rank 4", "4 processes"]),
        ((300, 512, 1, 0, 1), ["300 samples", "256 views", "batch_size=512"]),
    ],
)
def test_wrong_batches_are_one_clear_line(arguments, words):
    with pytest.raises(InputError) as error:
        DeitBatches(RECIPE, *arguments)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_caches_and_counted_views_are_refused():
    for changes, words in (
        ({"cache": "somewhere"}, ["compat=deit", "no cache", "somewhere", "--teacher"]),
        ({"num_views": 3}, ["compat=deit", "num_views=3"]),
    ):
        with pytest.raises(InputError) as error:
            RunConfig(compat="deit", **changes)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words)
    saved = to_dict(RunConfig(compat="deit")) | {"cache": "somewhere"}
    with pytest.raises(InputError, match="no cache can hold it"):
        from_dict(RunConfig(), saved)
    with pytest.raises(InputError, match="cache"):
        precompute(RunConfig(compat="deit", teacher="timm:resnet18"))


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def compat_config(world: Path, output: Path, **changes) -> RunConfig:
    """A DeiT run of two epochs; 210 images, of whose 630 entries each epoch shows 210."""
    changes = {"num_views": None, "compat": "deit", "loss": {"kind": "soft"}} | changes
    return run_config(world, output, **changes)


def train_rows(run: Path) -> list[dict]:
    return [row for row in comparable_rows(run) if row["kind"] == "train"]


def test_a_run_is_resumed_bit_for_bit(world, tmp_path):
    whole = compat_config(world, tmp_path / "whole")
    result = train(whole)
    assert result["steps"] == 12 and np.isfinite(result["loss"])
    parts = compat_config(world, tmp_path / "parts")
    train(parts.replace(max_steps=4))
    train(parts.replace(max_steps=6, data={"workers": 1}))
    train(parts)
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")
    assert train_rows(tmp_path / "whole") == train_rows(tmp_path / "parts")
    other = compat_config(world, tmp_path / "other", compat="none", num_views=3)
    train(other)
    assert not weights_equal(tmp_path / "whole", tmp_path / "other")
    with pytest.raises(InputError, match="compat 'deit' there, 'none' here"):
        train(parts.replace(compat="none"))


def test_it_learns(world, tmp_path):
    """Labels only, Mixup and CutMix by the batch: far above the 10 % of chance."""
    config = compat_config(
        world,
        tmp_path / "run",
        epochs=24,
        teacher=None,
        eval_every=100,
        save_every=100,
        log_every=100,
        view={"erase_prob": 0.0},
        loss={"kind": "none"},
        model={"name": "deit_fast.models.convnet:small_convnet", "args": ()},
        optim={"lr": 48e-3, "warmup_epochs": 1.0, "ema_decay": 0.0},
    )
    assert train(config)["top1"] > 0.6


@pytest.mark.dist
def test_two_processes_agree_and_are_resumed_bit_for_bit(world, tmp_path):
    whole = compat_config(world, tmp_path / "whole", epochs=1)
    parts = compat_config(world, tmp_path / "parts", epochs=1)
    for config in (whole, parts.replace(max_steps=3), parts):
        status, stderr = torchrun(config)
        assert status == 0, stderr[-3000:]
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")
    assert train_rows(tmp_path / "whole") == train_rows(tmp_path / "parts")
    assert json.loads((tmp_path / "whole/result.json").read_text())["processes"] == 2
    # Another order and other mixes than one process has, so another run: DeiT's is so too.
    train(compat_config(world, tmp_path / "one", epochs=1))
    first, alone = (train_rows(tmp_path / run)[0] for run in ("whole", "one"))
    assert first["base_loss"] != alone["base_loss"]
