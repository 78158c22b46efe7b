"""Progressive image sizes: the size belongs to the view, so caches and resumed runs know it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

from deit_fast.cache import CacheMismatch, LogitCache
from deit_fast.config import DataConfig, RunConfig, ViewConfig
from deit_fast.data.augment import augment_table
from deit_fast.data.loader import MixOperands, ViewLoader, make_batch
from deit_fast.data.open import open_loader, open_source
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate
from deit_fast.kernels.augment import TABLE_COLUMNS
from deit_fast.models import create_student, load_weights
from deit_fast.models.fuse import patch_side
from deit_fast.models.student import build_model
from deit_fast.precomputation import estimate, precompute
from deit_fast.precompute_job import Times
from deit_fast.runtime.speed import training_flops
from deit_fast.tools.verify_against_teacher import leading_labels, verify_against_teacher
from deit_fast.training.compiling import compile_blocks
from deit_fast.training.loop import train
from deit_fast.views.plan import ViewPlan, lam_of
from deit_fast.views.rng import CUTMIX
from helpers import small_blocks
from helpers.processes import start_forked
from helpers.runs import (
    assert_stops_change_nothing,
    assert_two_processes_continue,
    comparable_rows,
    run_config,
    unruly,
    weights_equal,
)

SCHEDULE = ((0, 8), (1, 16))
BORDER = 6  # the first step of the second epoch


def sized(world: Path, output: Path, **changes: Any) -> RunConfig:
    """Two epochs of six steps, the first at 8 pixels, the second at 16."""
    view = {"image_size": 16, "size_schedule": SCHEDULE, "repeats": 1}
    base = {"num_views": None, "view": view, "loss": {"kind": "soft"}}
    return run_config(world, output, **(base | changes))


@pytest.fixture(scope="module")
def online(world, tmp_path_factory) -> Path:
    """An uninterrupted run with an online teacher."""
    run = tmp_path_factory.mktemp("sizes") / "online"
    train(sized(world, run))
    return run


@pytest.fixture(scope="module")
def cached(world, tmp_path_factory) -> RunConfig:
    """The settings of a run with a complete cache."""
    folder = tmp_path_factory.mktemp("cached")
    config = sized(world, folder / "run", cache=str(folder / "cache"), codec={"name": "dense-fp32"})
    precompute(config)
    return config


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------

RECIPES = {
    "randaugment": {},
    "three_augment": {"crop": "simple", "augment": "three_augment", "color_jitter": 0.3},
}


@pytest.fixture(params=RECIPES)
def plans(request) -> tuple[ViewPlan, dict[int, ViewPlan]]:
    """A plan of two sizes, each for a cycle of two views; and by size, plans of that size alone."""
    settings = {"seed": 3, "repeats": 2, "erase_prob": 0.5, **RECIPES[request.param]}
    both = ViewConfig(image_size=16, size_schedule=((0, 12), (2, 16)), **settings)
    alone = {size: ViewConfig(image_size=size, **settings) for size in (12, 16)}
    return ViewPlan(both, 210), {size: ViewPlan(view, 210) for size, view in alone.items()}


def test_a_view_is_that_of_a_run_with_its_size_alone(world, plans):
    """Plan, crop, weights of the labels and pixels, whatever the other views of the batch are."""
    both, alone = plans
    data = DataConfig(root=str(world / "data"))
    source = open_source(data, "train", 16)
    samples, views = np.arange(210), np.arange(210) % 5
    rows = both.rows(samples, views)
    boxes = both.crop_boxes(samples, views, 20 + samples, 300 - samples)
    lams = lam_of(rows, both.sizes(views))
    assert (rows["mix_kind"] == CUTMIX).sum() > 50 and (rows["erase"][:, 2] > 0).sum() > 50
    for size, plan in alone.items():
        chosen = (views < 2) == (size == 12)
        expected = plan.rows(samples, views)[chosen]
        assert np.array_equal(rows[chosen], expected)
        crops = plan.crop_boxes(samples, views, 20 + samples, 300 - samples)[chosen]
        assert np.array_equal(boxes[chosen], crops)
        assert np.array_equal(lams[chosen], lam_of(expected, size))
        view = {12: 1, 16: 2}[size]
        assert both.view.size_of(view) == size == both.size_of_all([view])
        left, right = (
            make_batch(source, p, samples[:40], np.full(40, view), on_error="fail")
            for p in (both, plan)
        )
        assert left.size == size and torch.equal(left.images, right.images)
        assert torch.equal(left.plan, right.plan) and torch.equal(left.lam, right.lam)


def test_loader_processes_make_batches_of_each_size(world, plans):
    both, _ = plans
    source = open_source(DataConfig(root=str(world / "data")), "train", 16)
    batches = [(np.arange(8), np.full(8, view)) for view in (0, 2, 1, 3)]
    loaded = list(ViewLoader(source, both, batches, workers=1, on_error="fail"))
    assert [batch.size for batch in loaded] == [12, 16, 12, 16]
    again = make_batch(source, both, *batches[2], on_error="fail")
    assert torch.equal(loaded[2].images, again.images)


@pytest.mark.dali
def test_dali_makes_the_same_views(world):
    view = ViewConfig(seed=3, image_size=16, size_schedule=((0, 12), (2, 16)), repeats=2)
    data = DataConfig(root=str(world / "data"), loader="dali-cpu", workers=1)
    source, plan = open_source(data, "train", 16), ViewPlan(view, 210)
    batches = [(np.arange(8), np.full(8, view)) for view in (0, 3)]
    for batch, ids in zip(
        open_loader(data, source, plan, batches, device="cpu"), batches, strict=True
    ):
        expected = make_batch(source, plan, *ids, on_error="fail")
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.plan, expected.plan)


def test_the_augment_kernels_table_is_that_of_the_views_size():
    both = ViewConfig(seed=3, image_size=16, size_schedule=((0, 12), (3, 16)))
    plan = ViewPlan(both, 210)
    operands = MixOperands.of(plan, np.arange(100), np.zeros(100, np.int64))
    boxes = np.tile([0, 0, 30, 40], (len(operands.needed), 1))
    images = np.zeros(len(operands.needed))
    table = augment_table(both, operands.needed, boxes, images, operands.size)
    alone = augment_table(ViewConfig(image_size=12), operands.needed, boxes, images)
    assert torch.equal(table.rows, alone.rows) and torch.equal(table.weights, alone.weights)
    assert table.rows.shape[1] == len(TABLE_COLUMNS)
    other = augment_table(ViewConfig(image_size=16), operands.needed, boxes, images)
    assert not torch.equal(table.rows, other.rows)


def test_a_batch_has_one_size(plans):
    both, _ = plans
    with pytest.raises(ValueError, match=r"one size, not of \[12, 16\] pixels"):
        MixOperands.of(both, [0, 1], [1, 2])
    parts = both.batches_of([0, 1, 1, 1, 2, 2, 1], 2)
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert both.batches_of([], 2) == []


# ---------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------


def test_a_cached_teacher_equals_an_online_one_at_each_size(cached, online):
    result = train(cached.replace(teacher=None))
    run = Path(cached.output)
    assert result["teacher"]["from"] == "cache"
    assert comparable_rows(run) == comparable_rows(online)
    assert weights_equal(run, online)


def test_a_cache_of_sizes_is_verified_against_its_teacher(world, cached):
    data = DataConfig(root=str(world / "data"), workers=0)
    found = verify_against_teacher(str(cached.cache), str(cached.teacher), data, samples=40)
    assert (found["records"], found["failed"]) == (40, 0) and found["pixels"] > 30
    ids, views = np.arange(210), np.arange(210) % 2
    labels = leading_labels(LogitCache.open(cached.cache), data, ids, views)
    plan = ViewPlan(cached.view, 210)
    rows = plan.rows(ids, views)
    area = rows["box"][:, 2] * rows["box"][:, 3] / np.where(views == 0, 64, 256)
    own = np.where(rows["mix_kind"] == CUTMIX, 1 - area >= 0.5, rows["lam"] >= 32768)
    source = open_source(data, "train", 16)
    assert np.array_equal(labels, source.labels[np.where(own, ids, rows["partner"])])


def test_a_cache_of_other_sizes_is_refused(cached, tmp_path):
    for schedule in ((), ((0, 12), (1, 16))):
        other = cached.replace(output=str(tmp_path), view={"size_schedule": schedule})
        with pytest.raises(CacheMismatch, match=r"one field: view\.size_schedule is \[\[0, 8\]"):
            train(other)


def test_a_cache_that_lacks_views_is_no_reason_for_fewer_views(world, tmp_path):
    config = sized(world, tmp_path / "run", cache=str(tmp_path / "cache"))
    precompute(config, range(1))
    with pytest.raises(InputError, match=r"lacks 1 of the run's 2 views.*: precompute them$"):
        train(config)


def test_bytes_depend_on_neither_process_count_nor_interruption(world, tmp_path):
    def start(name: str, *more: str, **variables: str):
        size = ["--view.image-size", "16", "--view.size-schedule", "0", "8", "1", "16"]
        teacher = f"deit_fast.models.convnet:small_convnet@{world}/teacher.safetensors"
        return start_forked(
            small_blocks.run,
            ["precompute", "--recipe", "digits_student", "--epochs", "2", "--view.repeats", "1",
             "--num-views", "none", *size, "--teacher", teacher, "--teacher-batch", "32",
             "--cache", str(tmp_path / name), "--data.root", str(world / "data"),
             "--data.workers", "0", *more],
            **variables,
        )  # fmt: skip

    def contents(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}

    jobs = [start("whole"), start("parts", "--views", "1:2")]
    jobs += [start("ranks", RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in (0, 1)]
    for job in jobs:
        job.join(120)
    killed = start("parts")
    while killed.is_alive() and not (tmp_path / "parts" / "view-00000.dlc").exists():
        killed.join(0.002)
    killed.kill()
    killed.join()
    last = start("parts")
    last.join(120)
    assert [job.exitcode for job in (*jobs, last)] == [0] * 5
    assert len(contents("whole")) == 5  # manifest, two views, and the digests of their pixels
    assert contents("ranks") == contents("whole") == contents("parts")


def test_an_estimate_covers_the_images_of_every_size(cached, tmp_path, monkeypatch):
    # Seconds of an image, by view: to load, of the teacher, of the job.
    seconds = {0: (1.0, 4.0, 4.5), 1: (2.0, 8.0, 9.5)}
    asked = []

    def time_batches(job, caches, most, view, images, limit):
        asked.append((most, view, images))
        return Times(most, *seconds[view])

    monkeypatch.setattr("deit_fast.precompute_job.Job.time_batches", time_batches)
    planned = cached.replace(cache=str(tmp_path / "cache"), teacher_batch=32)
    found = estimate(planned)
    assert sorted(asked) == [(32, 0, 210), (32, 1, 210)] and found["images"] == 420
    assert (found["loader_seconds"], found["teacher_seconds"]) == (32 * 1.5, 32 * 6.0)
    assert found["seconds"] == pytest.approx(210 * (4.5 + 9.5), rel=0.01)
    assert estimate(planned, range(1))["seconds"] == pytest.approx(210 * 4.5, rel=0.01)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)  # one of the processes gets no block, the others one each
    shared = estimate(planned)
    assert (shared["processes"], shared["blocks"]) == (3, 2)
    assert shared["seconds"] == pytest.approx(found["seconds"] / 2, rel=0.01)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def test_a_run_stopped_inside_a_size_and_at_its_border_is_bit_equal(world, online, tmp_path):
    config = sized(world, tmp_path / "parts")
    assert_stops_change_nothing(config, (3, BORDER, BORDER + 2), online)


@pytest.mark.dist
def test_two_processes_continue_a_run_of_one_over_the_border(world, online, tmp_path):
    assert_two_processes_continue(sized(world, tmp_path / "run"), BORDER - 2, online)


@pytest.mark.parametrize("bad", [BORDER - 1, BORDER])
def test_a_rollback_at_the_border_leaves_the_step_out(world, tmp_path, monkeypatch, bad):
    monkeypatch.setenv("UNRULY", f"nan:{bad}")
    view = {"image_size": 16, "size_schedule": SCHEDULE, "repeats": 1}
    config = unruly(world, tmp_path, num_views=None, view=view, on_nonfinite="rollback")
    result = train(config.replace(max_steps=BORDER + 2))
    assert result["skipped_steps"] == [bad] and result["steps"] == BORDER + 2
    states = load_weights(tmp_path / "model.safetensors").values()
    assert all(state.isfinite().all() for state in states)


def test_a_run_is_evaluated_at_its_last_size(world, online):
    rows = [row for row in comparable_rows(online) if row["kind"] == "eval"]
    assert evaluate(str(online))["top1"] == rows[-1]["top1"]
    state = load_weights(online / "model.safetensors")
    assert state["pos_embed"].shape[1] == 2 + (16 // 4) ** 2
    plain = sized(online, online, view={"size_schedule": ()})
    build_model(plain, 10).load_state_dict(state)  # the weights of any student of that size


def test_a_run_that_ends_before_its_last_size_says_so_once(world, online, tmp_path, caplog):
    """One that is cut short, one of fewer epochs, and a branch; not one that reaches it."""
    said = "the run ends at 8 pixels, before the last size of view.size_schedule: it is evaluated"

    def lines(config: RunConfig) -> list[str]:
        caplog.clear()
        result = train(config)
        assert result["top1"] == evaluate(config.output)["top1"]
        return [line for line in caplog.messages if line.startswith("the run ends at")]

    short = sized(world, tmp_path / "short", eval_every=1)
    (line,) = lines(short.replace(max_steps=BORDER - 1))
    assert line == f"{said} at view.image_size=16"
    assert len(lines(short.replace(max_steps=BORDER))) == 1
    assert lines(short.replace(max_steps=BORDER + 1)) == []
    optim = {"schedule": "wsd", "decay_epochs": 1.0, "warmup_epochs": 0.5}
    view = {"image_size": 16, "size_schedule": ((0, 8), (3, 16)), "repeats": 1}
    long = sized(world, tmp_path / "long", epochs=5, optim=optim, view=view, save_steps=3)
    assert len(lines(long.replace(max_steps=BORDER))) == 1
    branch = long.replace(
        output=str(tmp_path / "branch"), optim={"decay_epochs": 0.5},
        resume_from=str(tmp_path / f"long/checkpoints/step-{BORDER:09d}.pt"),
    )  # fmt: skip
    assert len(lines(branch)) == 1


@pytest.mark.parametrize("kernels", [(), ("attention", "add_layer_norm", "bias_gelu")])
def test_a_fused_student_takes_every_size_as_timm_does(kernels):
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    arguments = ("deit_tiny_distilled_patch16_224", 5)
    torch.manual_seed(0)
    fused = create_student(
        *arguments, img_size=32, other_sizes=(16, 24), kernels=kernels, **shape
    ).eval()
    plain = timm.create_model(
        arguments[0], num_classes=5, img_size=32, dynamic_img_size=True, **shape
    ).eval()
    plain.load_state_dict(fused.state_dict())
    assert (
        patch_side(fused) is None
    )  # ingest writes images, whose position embeddings are resampled
    for size in (16, 24, 32):
        images = torch.randn(2, 3, size, size)
        for model in (fused, plain):
            model.zero_grad()
            model(images).square().sum().backward()
        torch.testing.assert_close(fused(images), plain(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused.pos_embed.grad, plain.pos_embed.grad, rtol=1e-3, atol=1e-4)


def test_each_size_is_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    model = create_student(
        "deit_tiny_distilled_patch16_224", 5, img_size=16, other_sizes=(8,), patch_size=8,
        embed_dim=32, depth=2, num_heads=2,
    )  # fmt: skip
    compile_blocks(model, backend=counter)
    counts = []
    for size in (8, 8, 16, 16, 8):
        sum(out.sum() for out in model(torch.randn(2, 3, size, size))).backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] == counts[1] < counts[2] == counts[3] == counts[4]


def test_flops_are_those_of_each_size():
    """Of a block-sized share: tokens fall with the area, attention with its square."""
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    name = "deit_tiny_distilled_patch16_224"
    several = create_student(name, 5, img_size=32, other_sizes=(16,), fused=False, **shape)
    for size in (16, 32):
        alone = create_student(name, 5, img_size=size, fused=False, **shape)
        assert training_flops(several, size) == training_flops(alone, size)


# ---------------------------------------------------------------------------------------------
# Refused before anything starts
# ---------------------------------------------------------------------------------------------

REFUSED = {
    "cycle": ({"view": {"repeats": 3, "size_schedule": ((0, 8), (2, 16))}},
              "epoch 2 is inside a cycle of view.repeats=3 epochs.*change it to 0 or 3"),
    "reused": ({"num_views": 1}, "num_views=1: a run of 2 epochs would come back.*none or 2"),
    "deit": ({"compat": "deit", "teacher": None, "num_views": None}, "compat=deit"),
    "graphs": ({"cuda_graphs": True}, "cuda_graphs: a graph has one size"),
    "synthetic": ({"data": {"source": "synthetic"}}, "data.source=synthetic"),
    "simple": ({"view": {"crop": "simple", "augment": "none", "size_schedule": ((0, 4), (1, 16))}},
               "at least 5"),
    "patch": ({"view": {"size_schedule": ((0, 10), (1, 16))}},
              "patches of 4 pixels, and the image size 10 of view.size_schedule"),
    "student": ({"model": {"name": "swin_tiny_patch4_window7_224", "args": (), "drop_path": 0.0}},
                "swin_tiny_patch4_window7_224' takes no images of 16 pixels"),
    "teacher": ({"teacher": "timm:deit_tiny_patch16_224@{}"},
                "takes no images of 8 pixels, a size of view.size_schedule.*every size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_one_size_is_refused_in_one_line(world, tmp_path, case):
    changes, words = REFUSED[case]
    if case == "teacher":
        path = tmp_path / "vit.pth"
        torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=10).state_dict(), path)
        changes = {"teacher": changes["teacher"].format(path)}
    with pytest.raises(InputError, match=words) as refused:
        train(sized(world, tmp_path / "run").replace(**changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_schedule_of_the_defaults_is_none():
    assert ViewConfig().size_schedule == () and ViewConfig().sizes == (224,)
    assert [ViewConfig().size_of(view) for view in (0, 299)] == [224, 224]
    view = ViewConfig(size_schedule=((0, 96), (3, 160), (9, 224)))
    assert [view.size_of(v) for v in (0, 2, 3, 8, 9, 300)] == [96, 96, 160, 160, 224, 224]
    assert view.sizes == (96, 160, 224)
    with pytest.raises(InputError, match="epoch 4 is inside a cycle"):
        dataclasses.replace(view, size_schedule=((0, 96), (4, 224)))
