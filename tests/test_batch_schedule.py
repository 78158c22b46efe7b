"""Batch sizes that change between epochs: one order, one rate, one run, whatever interrupts it."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deit_fast.config import DataConfig, RunConfig, ViewConfig
from deit_fast.data.open import open_loader, open_source
from deit_fast.errors import InputError
from deit_fast.precomputation import precompute
from deit_fast.runtime.files import read_json
from deit_fast.training.checkpoints import list_checkpoints, save_checkpoint
from deit_fast.training.loop import train
from deit_fast.training.optim import decay_start, learning_rate
from deit_fast.views.order import EpochOrder, TrainBatches
from deit_fast.views.plan import ViewPlan
from deit_fast.views.steps import RunSteps
from helpers.runs import (
    assert_close_runs,
    assert_stops_change_nothing,
    assert_two_processes_continue,
    comparable_rows,
    run_config,
    train_rows,
    unruly,
    weights_equal,
)

SCHEDULE = ((1, 64),)  # after 32
BORDER, TOTAL = 6, 9  # the first step of the second epoch; the steps of both
SIZES = [32] * 6 + [64] * 3


def scheduled(world: Path, output: Path, **changes: Any) -> RunConfig:
    base = {"batch_schedule": SCHEDULE, "loss": {"kind": "soft"}}
    return run_config(world, output, **(base | changes))


@pytest.fixture(scope="module")
def online(world, tmp_path_factory) -> Path:
    """An uninterrupted run with an online teacher."""
    run = tmp_path_factory.mktemp("batches") / "online"
    train(scheduled(world, run))
    return run


# ---------------------------------------------------------------------------------------------
# Steps and order
# ---------------------------------------------------------------------------------------------


def test_steps_are_counted_epoch_by_epoch() -> None:
    sizes = {0: 32, 1: 32, 2: 100, 3: 16, 4: 16, 5: 16}
    steps = RunSteps(105, ((0, 32), (2, 100), (3, 16), (8, 1)), 6)
    every = [(epoch, n) for epoch, size in sizes.items() for n in range(105 // size)]
    assert steps.total == len(every)
    assert [steps.locate(step) for step in range(len(every))] == every
    assert [steps.phase_of(step).batch_size for step in range(len(every))] == [
        sizes[epoch] for epoch, _ in every
    ]
    assert [steps.first(epoch) for epoch in sizes] == [every.index((e, 0)) for e in sizes]
    for step in range(len(every) + 1):
        assert steps.samples(step) == sum(sizes[epoch] for epoch, _ in every[:step])
        assert steps.begun(step) == len({epoch for epoch, _ in every[:step]})
    assert steps.locate(steps.total) == (6, 0)
    assert [end for _, end in steps.reached()] == [6, 7, 25]
    assert RunSteps(105, ((0, 32), (6, 100)), 6).reached()[0][1] == 18  # 6 epochs: 0 to 5


def test_the_order_is_that_of_constant_runs_epoch_by_epoch() -> None:
    order, schedule = EpochOrder(5, 333, 6, 3), ((1, 16), (3, 40))
    sizes = [32, 16, 16, 40, 40]
    for world in (1, 2, 4):
        for rank in range(world):
            batches = TrainBatches(order, 32, 5, rank, world, schedule)
            expected: list[Any] = []
            for epoch, size in enumerate(sizes):
                alone = TrainBatches(order, size, 5, rank, world)
                per_epoch = len(alone) // 5
                expected += alone[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert len(batches) == len(expected)
            for mine, theirs in zip(batches, expected, strict=True):
                assert all(map(np.array_equal, mine, theirs))
            fresh = pickle.loads(pickle.dumps(batches))
            for step in (len(fresh) - 1, 9, 10, 40):  # it can be entered anywhere
                assert all(map(np.array_equal, fresh[step], expected[step]))
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("loader", ["pillow", pytest.param("dali-cpu", marks=pytest.mark.dali)])
def test_loaders_make_batches_of_each_size(world, loader) -> None:
    data = DataConfig(root=str(world / "data"), loader=loader, workers=1)
    source = open_source(data, "train", 16)
    order = EpochOrder(0, source.num_samples, 3, 3)
    plan = ViewPlan(ViewConfig(image_size=16), source.num_samples)
    batches = TrainBatches(order, 32, 2, schedule=SCHEDULE)
    loaded = open_loader(data, source, plan, batches, device="cpu", start=BORDER - 1)
    for batch, (samples, views) in zip(loaded, batches[BORDER - 1 :], strict=True):
        assert batch.sample_ids.tolist() == samples.tolist() and len(batch) == len(samples)
        assert batch.view_ids.tolist() == views.tolist()


# ---------------------------------------------------------------------------------------------
# The learning rate
# ---------------------------------------------------------------------------------------------

SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"optim": {"warmup_epochs": 2.5}},
    "wsd": {"optim": {"schedule": "wsd", "warmup_epochs": 1.5, "decay_epochs": 3.3}},
    "deit": {"optim": {"warmup_epochs": 2.0}, "compat": "deit"},
}


def formula(step: int, config: RunConfig, per_epoch: int, steps: int) -> float:
    """The rate of a run with one batch size."""
    optim, size = config.optim, config.batch_size
    peak = optim.lr * size / optim.lr_batch
    warmup = round(optim.warmup_epochs * per_epoch)
    if config.compat == "deit":
        step = max(step // per_epoch - 1, 0) * per_epoch
    if step < warmup:
        return optim.warmup_lr + (peak - optim.warmup_lr) * step / warmup
    share = (1 + math.cos(math.pi * step / steps)) / 2
    if optim.schedule == "wsd":
        length = max(1, round((optim.decay_epochs or 0) * per_epoch))
        share = 1 - math.sqrt(max(0, step - (steps - length)) / length)
    return optim.min_lr + (peak - optim.min_lr) * share


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_batch_size_has_the_rate_that_it_always_had(name: str) -> None:
    for per_epoch, size in ((1, 96), (7, 256), (5, 1000)):
        config = RunConfig(batch_size=size).replace(**SCHEDULES[name])
        steps = RunSteps(per_epoch * size + 3, ((0, size),), 9)
        for step in range(9 * per_epoch):
            expected = formula(step, config, per_epoch, 9 * per_epoch)
            assert learning_rate(step, config, steps) == expected  # bit for bit


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_rate_is_that_of_the_batch_at_the_same_epoch(name: str) -> None:
    """Borders in the warm-up, after it, and in the decay."""
    sizes = ((0, 64), (1, 128), (4, 512), (8, 256))
    config = RunConfig(batch_size=64).replace(**SCHEDULES[name])
    steps = RunSteps(1030, sizes, 9)
    assert steps.total == 16 + 3 * 8 + 4 * 2 + 4
    for step in range(steps.total):
        (epoch, position), size = steps.locate(step), steps.phase_of(step).batch_size
        alone = RunSteps(1030, ((0, size),), 9)
        expected = learning_rate(alone.first(epoch) + position, config, alone)
        assert learning_rate(step, config, steps) == expected
    before, after = (learning_rate(steps.first(4) + n, config, steps) for n in (-1, 0))
    assert after / before == pytest.approx(4, rel=0.2)  # linear in the batch


def test_a_decay_begins_where_the_rate_leaves_the_peak() -> None:
    for sizes in (((0, 64),), ((0, 64), (1, 128), (4, 512)), ((0, 512), (6, 64), (8, 256))):
        for decay in (0.01, 1.0, 2.4, 3.3, 5.5):
            config = RunConfig().replace(
                optim={"schedule": "wsd", "warmup_epochs": 0.0, "decay_epochs": decay}
            )
            steps = RunSteps(1030, sizes, 9)
            start = decay_start(config.optim, steps)
            if len(sizes) == 1:
                assert start == 9 * 16 - max(1, round(decay * 16))
            for step in range(steps.total):
                peak = config.optim.lr * steps.phase_of(step).batch_size / 512
                at_peak = learning_rate(step, config, steps) == pytest.approx(peak, rel=1e-9)
                assert at_peak == (step <= start), (sizes, decay, step)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def test_rows_evaluations_and_speed_follow_the_epochs(world, online, tmp_path) -> None:
    rows = train_rows(json.loads(line) for line in (online / "metrics.jsonl").open())
    assert [row["epoch"] for row in rows] == [1] * BORDER + [2] * (TOTAL - BORDER)
    for row, size in zip(rows, SIZES, strict=True):
        assert row["images_per_s"] == pytest.approx(1e3 * size / row["step_ms"])
        left = sum(SIZES[row["step"] :])
        assert row["seconds_left"] == pytest.approx(left / row["images_per_s"])
    result = read_json(online / "result.json")
    assert result["steps"] == TOTAL
    speed = sum(SIZES) / result["train_seconds"]
    assert result["images_per_s"] == pytest.approx(speed, rel=0.02)
    sparse = scheduled(world, tmp_path, log_every=100, epochs=4, keep_every=1, eval_every=3)
    train(sparse.replace(num_views=None))
    rows = comparable_rows(tmp_path)
    assert [row["step"] for row in train_rows(rows)] == [15]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [12, 15]
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [int(path.stem.removeprefix("step-")) for path in kept] == [6, 9, 12, 15]


def test_a_batch_size_after_the_last_epoch_is_named(world, tmp_path, caplog) -> None:
    said = "batch_schedule: the batch size %d from epoch %d on is not used, the run has 2 epochs"
    for schedule, unused in ((SCHEDULE, []), ((*SCHEDULE, (2, 16), (5, 8)), [(16, 2), (8, 5)])):
        caplog.clear()
        train(scheduled(world, tmp_path / str(len(unused)), batch_schedule=schedule, max_steps=1))
        found = [text for text in caplog.messages if text.startswith("batch_schedule")]
        assert found == [said % values for values in unused]


def test_a_run_stopped_inside_a_phase_and_at_its_border_is_bit_equal(world, online, tmp_path):
    config = scheduled(world, tmp_path / "parts")
    assert_stops_change_nothing(config, (3, BORDER, BORDER + 2), online)


@pytest.mark.dist
def test_two_processes_continue_a_run_of_one_over_the_border(world, online, tmp_path):
    assert_two_processes_continue(scheduled(world, tmp_path / "run"), BORDER - 2, online)


def test_parts_of_each_batch_drop_what_the_whole_drops(world, online, tmp_path):
    train(scheduled(world, tmp_path / "run", accumulate=4))
    assert_close_runs(tmp_path / "run", online)


def test_a_cache_of_the_views_serves_every_schedule(world, online, tmp_path):
    plain = run_config(world, tmp_path / "run", cache=str(tmp_path / "cache"))
    precompute(plain.replace(codec={"name": "dense-fp32"}))
    found = train(
        plain.replace(
            teacher=None, batch_schedule=SCHEDULE, loss={"kind": "soft"},
            codec={"name": "dense-fp32"},
        )
    )  # fmt: skip
    assert found["teacher"]["from"] == "cache"
    assert comparable_rows(tmp_path / "run") == comparable_rows(online)
    assert weights_equal(tmp_path / "run", online)


@pytest.mark.parametrize("bad", [BORDER - 1, BORDER])
def test_a_rollback_at_the_border_leaves_the_step_out(world, tmp_path, monkeypatch, bad):
    monkeypatch.setenv("UNRULY", f"nan:{bad}")
    config = unruly(world, tmp_path, batch_schedule=SCHEDULE, on_nonfinite="rollback")
    result = train(config)
    assert result["skipped_steps"] == [bad] and result["steps"] == TOTAL
    rows = train_rows(comparable_rows(tmp_path))
    assert [row["step"] for row in rows] == [n + 1 for n in range(TOTAL) if n != bad]
    speed = (sum(SIZES) - SIZES[bad]) / result["train_seconds"]
    assert result["images_per_s"] == pytest.approx(speed, rel=0.02)


@pytest.mark.parametrize(("step", "decay", "epochs"), [(4, 1.0, 2), (6, 1.0, 2), (8, 1.0, 3)])
def test_a_branch_is_the_run_that_was_planned_so(world, trunk, tmp_path, step, decay, epochs):
    """From before, at and after the border; a decay that would end in an epoch begins later."""
    config = wsd(world, tmp_path / "branch", 10, decay)
    train(config.replace(resume_from=str(trunk / f"checkpoints/step-{step:09d}.pt")))
    train(wsd(world, tmp_path / "planned", epochs, decay))
    assert weights_equal(tmp_path / "branch", tmp_path / "planned")
    rows = [row for row in comparable_rows(tmp_path / "planned") if row["step"] > step]
    assert comparable_rows(tmp_path / "branch") == rows


def wsd(world: Path, output: Path, epochs: int, decay: float) -> RunConfig:
    optim = {"schedule": "wsd", "decay_epochs": decay, "warmup_epochs": 0.5, "ema_decay": 0.9}
    changes = {"save_steps": 1, "optim": optim, "epochs": epochs}
    return scheduled(world, output, **changes)


@pytest.fixture(scope="module")
def trunk(world, tmp_path_factory) -> Path:
    """A run of ten epochs, stopped after its second, with a checkpoint of every step."""
    output = tmp_path_factory.mktemp("trunk") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deit_fast.training.checkpoints.KEEP", 99)
        train(wsd(world, output, 10, 1.0).replace(max_steps=TOTAL))
    return output


# ---------------------------------------------------------------------------------------------
# Refused before anything starts
# ---------------------------------------------------------------------------------------------

REFUSED = {
    "falls": ({"batch_schedule": ((2, 64), (1, 32))}, "batch_schedule=2 64 1 32: its epochs must"),
    "deit": ({"compat": "deit", "teacher": None, "num_views": None},
             "batch_schedule does not go with compat=deit: DeiT's code has one batch size"),
    "graphs": ({"cuda_graphs": True}, "with cuda_graphs: a graph has one size; choose --no-cuda"),
    "parts": ({"batch_schedule": ((1, 36),), "accumulate": 8},
              r"accumulate=8 does not divide the 36 samples of each rank \(batch_schedule's b"),
    "large": ({"batch_schedule": ((1, 211),)},
              "offers 210 views, fewer than one batch of batch_schedule's batch_size=211"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_one_size_is_refused_in_one_line(world, tmp_path, case):
    changes, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as refused:
        train(scheduled(world, tmp_path / "run").replace(**changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_processes_divide_every_batch():
    order = EpochOrder(0, 100, 3, 3)
    with pytest.raises(
        InputError, match=r"^batch_schedule's batch_size=30 is not divisible by 4 processes$"
    ):
        TrainBatches(order, 32, 2, 0, 4, ((1, 30),))


def test_a_run_keeps_its_schedule_and_an_older_one_has_none(world, tmp_path):
    config = scheduled(world, tmp_path, batch_schedule=(), max_steps=1)
    train(config)
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    state = torch.load(path, weights_only=True)
    saved = json.loads(state["config"])
    assert saved.pop("batch_schedule") == []
    save_checkpoint(path.parent, 1, state | {"config": json.dumps(saved)})
    with pytest.raises(InputError, match=r"batch_schedule \[\] there, \[\[1, 64\]\] here"):
        train(config.replace(batch_schedule=SCHEDULE))
    assert train(config.replace(max_steps=2))["steps"] == 2
