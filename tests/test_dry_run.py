"""Dry runs: what they say is what a run then has, and they write nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.models.convnet import small_convnet
from deit_fast.models.teacher_features import TeacherOutputs
from deit_fast.runtime.pipeline_time import (
    Repeated,
    images_to_time,
    loading_processes,
    pipeline_seconds,
    seconds_per_batch,
    usable_cores,
)
from deit_fast.training.dry_run import _size_share, dry_run
from deit_fast.training.loop import train
from helpers.digits import write_few_digits
from helpers.runs import run_config


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Digits, and a teacher's weights."""
    root = tmp_path_factory.mktemp("dry-run")
    write_few_digits(root / "data")
    torch.manual_seed(0)
    save_file(small_convnet(10).state_dict(), root / "teacher.safetensors")
    return root


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder."""
    paths = [root, *root.rglob("*")]
    return {str(path): (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths}


def said(capsys: pytest.CaptureFixture, *args: str) -> dict[str, str]:
    capsys.readouterr()
    assert cli.main([*args]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_dry_run_says_what_the_run_then_has_and_writes_nothing(world, tmp_path):
    config = run_config(world, tmp_path / "run", loss={"kind": "hard"}, model={"drop_path": 0.0})
    before = tree(world), tree(tmp_path)
    found = dry_run(config)
    assert (tree(world), tree(tmp_path)) == before
    assert (found["images"], found["classes"], found["held_out"]) == (210, 10, 100)
    assert found["step"] == 0 and found["caches"] == [] and found["teacher"] == config.teacher
    assert found["seconds"] > 0 and 2 <= found["measured_images"] <= 32
    weights = 4 * found["parameters"]
    assert 5 * weights < found["memory"] < 2**30  # weights, gradients, two moments, average
    result = train(config.replace(max_steps=5, save_steps=1))
    assert found["steps"] == 12 and result["steps"] == 5
    before = tree(tmp_path)
    again = dry_run(config)
    assert tree(tmp_path) == before
    assert again["step"] == 5 and again["steps"] == 12
    with pytest.raises(InputError, match="of another configuration"):
        dry_run(config.replace(loss={"kind": "soft"}))


def test_the_command_names_the_views_that_a_cache_lacks(world, tmp_path, capsys):
    settings = [
        "--recipe", "digits_student", "--view.repeats", "1", "--batch-size", "32", "--epochs", "3",
        "--data.root", f"{world}/data", "--data.workers", "0", "--cache", f"{tmp_path}/cache",
        "--output", f"{tmp_path}/run",
    ]  # fmt: skip
    rows = said(capsys, "train", *settings, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path}/cache: LACKS 3 of the 3 views (0, 1, 2): precompute them" in rows["cache"]
    assert rows["run"] == f"{tmp_path}/run (new)" and rows["teacher"] == "the cache"
    assert rows["steps"] == "18: 3 epochs, 6 an epoch of batch 32"
    teacher = f"deit_fast.models.convnet:small_convnet@{world}/teacher.safetensors"
    said(capsys, "precompute", *settings, "--teacher", teacher, "--views", "0:2")
    before = tree(tmp_path)
    rows = said(capsys, "train", *settings, "--dry-run")
    assert "LACKS 1 of the 3 views (2): precompute them first" in rows["cache"]
    assert cli.main(["train", *settings, "--view.seed", "5", "--dry-run"]) == 2
    assert "view.seed" in capsys.readouterr().err
    said(capsys, "precompute", *settings, "--teacher", teacher)
    rows = said(capsys, "train", *settings, "--dry-run")
    assert f"{tmp_path}/cache: all 3 views that the run needs" in rows["cache"]
    assert before.keys() < tree(tmp_path).keys() and not (tmp_path / "run").exists()
    assert cli.main(["train", *settings, "--view.seed", "5", "--dry-run"]) == 2
    assert "view.seed" in capsys.readouterr().err


def test_what_a_dry_run_times_is_not_compiled(world, tmp_path, monkeypatch):
    """Each number of images would be compiled anew, and its time measured."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert dry_run(run_config(world, tmp_path / "run", compile="model"))["seconds"] > 0


def test_the_sizes_of_the_epochs_that_are_left_count():
    view = {"size_schedule": ((0, 112), (2, 224)), "image_size": 224, "repeats": 1}
    config = RunConfig().replace(epochs=4, view=view)
    assert _size_share(config, range(4)) == (1 + 1 + 4 + 4) / 4
    assert _size_share(config, range(2, 4)) == 4


def test_a_dry_precomputation_refuses_what_the_job_would_refuse(
    world, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    teacher = f"deit_fast.models.convnet:small_convnet@{world}/teacher.safetensors"
    words = ["precompute", "--recipe", "digits_student", "--data.root", f"{world}/data",
             "--teacher", teacher, "--dry-run", "--cache"]  # fmt: skip
    assert cli.main([*words, f"{tmp_path}/file"]) == 2
    assert f"{tmp_path}/file" in capsys.readouterr().err
    nan = torch.full((1000, 10), float("nan"))
    monkeypatch.setattr(
        "deit_fast.precompute_job.Job.outputs",
        lambda _, batch: TeacherOutputs(nan[: len(batch)], ()),
    )
    assert cli.main([*words, f"{tmp_path}/cache"]) == 2
    assert re.search(r"view 0 sample \d+: teacher logit nan", capsys.readouterr().err)
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(world, tmp_path, capsys):
    config = run_config(world, tmp_path / "run", batch_size=500)
    path = tmp_path / "config.json"
    from deit_fast.config_file import to_dict

    path.write_text(json.dumps(to_dict(config)))
    assert cli.main(["train", "--config", str(path), "--dry-run"]) == 2
    assert "the largest is --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "threads", "processes", "seconds"),
    [
        (0, 2, 1, 8.0),  # one after the other
        (4, 2, 1, 6.0),  # both want the two cores: loading takes 4 / 2
        (1, 1, 1, 4.0),  # a core each: the larger
        (4, 0, 1, 4.0),  # a GPU computes, two cores load: the larger, 4
        (1, 0, 1, 4.0),
        (4, 2, 2, 8.0),  # a core for each of two processes
    ],
)
def test_batches_of_a_pipeline(monkeypatch, workers, threads, processes, seconds):
    monkeypatch.setattr("deit_fast.runtime.pipeline_time.usable_cores", lambda: 2)
    found = pipeline_seconds(4.0, 4.0, workers=workers, threads=threads, processes=processes)
    assert found == seconds


@pytest.mark.parametrize(
    ("workers", "moments", "expected"),
    [
        (0, [1, 2, 3, 4, 5, 99], 1.0),  # the first two batches set up what later ones reuse
        (1, [1, 2, 3, 4, 5, 99], 1.0),
        (2, [1, 1, 1.5, 1.5, 2.5, 2.5, 3.5, 3.5, 4.5, 99], 0.5),  # two come at once, each second
        (2, [1, 1, 1.5, 1.5, 6, 99], 2.25),  # the time is over after a round
        (3, [1, 1, 1, 1, 2, 2, 5, 5, 5], 4 / 3),  # the last round is not whole
        (4, [5, 10, 15], 5.0),  # so slow that one batch has to do
        (4, [1, 2, 3.5, 4, 7, 99], 1.75),
        (4, [1, 2, 3], 0.0),  # too few
    ],
)
def test_only_whole_rounds_of_the_workers_are_timed(monkeypatch, workers, moments, expected):
    now = [0.0]
    monkeypatch.setattr("deit_fast.runtime.pipeline_time.time.perf_counter", lambda: now[0])

    def finished():
        for now[0] in moments:
            yield

    found = seconds_per_batch(finished(), workers=workers, seconds=3.0)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("per_image", "workers", "most", "expected"),
    [(0.1, 0, 64, 20), (0.1, 4, 64, 10), (0.01, 1, 64, 64), (100.0, 1, 64, 1), (0.0, 1, 64, 64)],
)
def test_timed_batches_fit_the_time(per_image, workers, most, expected):
    found = images_to_time(per_image, workers=workers, seconds=8.0, most=most)
    assert found == expected


def test_slow_work_is_timed_for_twice_the_time_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deit_fast.runtime.pipeline_time.time.perf_counter", lambda: now[0])
    for workers in range(5):
        for cost in (0.1, 0.7, 2.0, 50.0):
            now[0] = 0.0

            def finished(cost=cost):
                while True:
                    now[0] += cost
                    yield

            found = seconds_per_batch(finished(), workers=workers, seconds=3.0)
            assert found == pytest.approx(cost) and now[0] <= 6 + 2 * cost


def test_repeated_items():
    items = Repeated("abc")
    assert [items[n] for n in (0, 2, 3, 2**39 + 1)] == ["a", "c", "a", "abc"[(2**39 + 1) % 3]]
    assert len(items) > 10**9


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, 1, 1), (2, 1, 1), (4, 1, 3), (64, 1, 4), (16, 8, 1)]
)
def test_by_default_loading_leaves_a_core_free(cores, ranks, expected, monkeypatch):
    """torch warns where a loader has more processes than there are cores."""
    assert 1 <= loading_processes(None) <= usable_cores()
    monkeypatch.setattr("deit_fast.runtime.pipeline_time.usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert loading_processes(None) == expected
    assert [loading_processes(workers) for workers in (0, 9)] == [0, 9]
