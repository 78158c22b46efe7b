"""A teacher is tried on held-out images before its logits are used, and on the labels after."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast import teacher_accuracy
from deit_fast.cache import LogitCache
from deit_fast.cache.record_order import RecordOrder
from deit_fast.cli import main
from deit_fast.config import CodecConfig, RunConfig
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import open_loader, open_source
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, evaluate, evaluate_model
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.precomputation import precompute
from deit_fast.precompute_job import Job, TeacherCalls
from deit_fast.recipes import digits_teacher
from deit_fast.teacher_accuracy import check_accuracy, is_near_chance, spread_ids
from deit_fast.training.loop import train
from helpers.runs import run_config

CPU = torch.device("cpu")
CHANCE = r"of 100 held-out images are right \(chance 10 %\), NO BETTER THAN CHANCE: are its weights"


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """The run of a teacher that has learned a little."""
    output = tmp_path_factory.mktemp("teacher") / "run"
    train(digits_teacher().replace(
        output=str(output), epochs=8, batch_size=16, optim={"lr": 0.03},
        data={"root": str(world / "data"), "workers": 0},
    ))  # fmt: skip
    return output


@pytest.fixture
def random(world, tmp_path) -> RunConfig:
    """A cache of a teacher with random weights."""
    return run_config(world, tmp_path / "run", cache=str(tmp_path / "cache"))


@pytest.fixture
def good(random, trained) -> RunConfig:
    spec = f"deit_fast.models.convnet:small_convnet@{trained}/model.safetensors"
    return random.replace(teacher=spec)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    return caplog


@pytest.fixture
def tried(monkeypatch) -> list[int]:
    """The number of images of each check."""
    counts: list[int] = []

    def spy(model, loader, *rest, **options):
        counts.append(loader.num_images)
        return evaluate_model(model, loader, *rest, **options)

    monkeypatch.setattr(teacher_accuracy, "evaluate_model", spy)
    return counts


def lines(caplog, pattern: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if re.search(pattern, record.getMessage())]


def check(config: RunConfig) -> float | None:
    source = open_source(config.data, "train", config.view.image_size)
    teacher = load_class_matched_teacher(config, source.classes)
    return check_accuracy(teacher, config, CPU, source)


# ---------------------------------------------------------------------------------------------
# The same figure everywhere
# ---------------------------------------------------------------------------------------------


def test_all_figures_of_a_teacher_agree_to_the_last_image(good, trained, said):
    evaluated = evaluate(str(trained))
    held_out = open_source(good.data, "val", good.view.image_size)
    teacher = load_class_matched_teacher(good, held_out.classes)
    again = evaluate_model(
        teacher, build_eval_loader(good, held_out, CPU), held_out.classes, CPU,
        forward=lambda model, images: (model(images), None),
    )  # fmt: skip
    right = [round(100 * share) for share in (evaluated["top1"], again["top1"], check(good) or 0)]
    assert evaluated["samples"] == again["samples"] == 100
    assert right[0] == right[1] == right[2] > 30
    assert lines(said, rf"^teacher {re.escape(str(good.teacher))}: {right[0]}\.0 % of 100 held-out")


def test_cached_logits_of_plain_views_are_the_online_ones_to_the_last_bit(good):
    config = good.replace(
        codec={"name": "dense-fp32"}, teacher_batch=210, num_views=1, epochs=1,
        view={"crop": "simple", "flip_prob": 0.0, "erase_prob": 0.0, "mixup_alpha": 0.0,
              "cutmix_alpha": 0.0, "repeats": 1},
    )  # fmt: skip
    written = precompute(config)
    job = Job(config)
    calls = TeacherCalls([(0, 0)], 4096, RecordOrder(210), 210)
    (batch,) = open_loader(config.data, job.source, job.plan, calls, device="cpu")
    online = job.teacher(ingest_batch(batch, config.view, torch.float32))
    stored = LogitCache.open(config.cache).gather(batch.sample_ids, 0)
    assert torch.equal(stored, online)
    right = int((online.argmax(1) == batch.labels).sum())
    assert written["teacher_agreement"] == right / 210 > 0.3


def test_a_teacher_trained_here_serves_a_subset_of_its_classes(good, tmp_path, said):
    """Its weights say the names of its classes, so neither a file nor equal counts are needed."""
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for digit in "173":
            link = tmp_path / "data" / split / digit
            link.symlink_to(Path(str(good.data.root)) / split / digit)
    config = good.replace(data={"root": str(tmp_path / "data")})
    source = open_source(config.data, "val", 16)
    teacher = load_class_matched_teacher(config, source.classes)
    assert teacher.columns.tolist() == [1, 3, 7]
    assert check(config) >= 0.5
    assert lines(said, ": 3 of its 10 classes, by name") and lines(said, r"30 .*\(chance 33\.3 %")


# ---------------------------------------------------------------------------------------------
# Before the work
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [precompute, train])
def test_a_teacher_without_knowledge_is_a_loud_warning(random, said, use):
    use(random.replace(cache=None) if use is train else random)
    (record,) = lines(said, CHANCE)
    assert record.levelno == logging.WARNING
    assert "normalisation right (mean 0.5 0.5 0.5, std 0.5 0.5 0.5)" in record.getMessage()


@pytest.mark.parametrize("use", [precompute, train])
def test_a_teacher_below_the_floor_is_refused_before_anything_is_written(random, use):
    config = random.replace(teacher_floor=0.5)
    config = config.replace(cache=None) if use is train else config
    text = r"% of 100 held-out images are right, but teacher_floor is 0.5: are .*floor 0 omits this"
    with pytest.raises(InputError, match=text) as error:
        use(config)
    assert "\n" not in str(error.value)
    assert not Path(str(random.cache)).exists()
    assert not (Path(config.output) / "metrics.jsonl").exists()
    assert not list(Path(config.output).glob("checkpoints/*"))


def test_settings_of_a_teacher_that_a_cache_replaces_are_named(good, said, tried):
    precompute(good)
    tried.clear()
    alone = good.replace(teacher=None, teacher_classes="absent.txt", teacher_floor=0.99)
    cases = (
        (good.replace(teacher_floor=0.99), "teacher_floor"),
        (alone, "teacher_classes, teacher_floor"),
        (good.replace(teacher_floor=0.0), ""),
        (good, ""),
    )
    for number, (config, named) in enumerate(cases):
        said.clear()
        train(config.replace(max_steps=1, output=f"{good.output}-{number}"))
        found = [record.getMessage() for record in lines(said, "not read by this run")]
        assert [text.partition(":")[0] for text in found] == ([named] if named else [])
    assert tried == []


def test_a_teacher_above_the_floor_goes_on(good, tried):
    assert precompute(good.replace(teacher_floor=0.3))["blocks"] > 0
    assert tried == [100]


def test_a_wrong_normalisation_is_asked_for(good, said, monkeypatch):
    """The same network, with other statistics: better than chance, far from what it can do."""
    accuracy = check(good)
    source = open_source(good.data, "train", 16)
    teacher = load_class_matched_teacher(good, source.classes)
    monkeypatch.setattr(teacher, "renormalises", True)
    teacher.scale.fill_(0.15)
    said.clear()
    lower = check_accuracy(teacher, good, CPU, source)
    assert lower < teacher_accuracy.LOW and lower < accuracy
    (record,) = lines(said, "is its normalisation right")
    assert record.levelno == logging.WARNING


def test_it_is_not_tried_where_there_is_nothing_to_learn_from_it(random, tried):
    precompute(random.replace(teacher_floor=0.0))
    assert tried == []  # as asked
    precompute(random)
    assert tried == []  # nothing is left to write
    precompute(random.replace(epochs=3, num_views=6))
    assert tried == []
    synthetic = random.replace(data={"source": "synthetic", "synthetic_samples": 64}, max_steps=1)
    train(synthetic.replace(cache=None, output=random.output + "-synthetic"))
    assert tried == []
    online = random.replace(cache=None, max_steps=2, save_steps=2)
    train(online)
    assert tried == [100]
    train(online.replace(max_steps=3))  # it resumes
    assert tried == [100]


def test_one_process_tries_it_and_with_a_floor_each(random, tried, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, floor, expected in ((1, None, []), (1, 0.01, [100]), (0, None, [100, 100])):
        monkeypatch.setenv("RANK", str(rank))
        cache = f"{random.cache}-{rank}-{floor}"
        precompute(random.replace(cache=cache, teacher_floor=floor))
        assert tried == expected


def test_without_held_out_images_the_training_images_are_used(good, tmp_path, said):
    shutil.copytree(Path(str(good.data.root)) / "train", tmp_path / "data" / "train")
    assert check(good.replace(data={"root": str(tmp_path / "data")})) > 0.3
    assert lines(said, "tried on training images, as held-out ones are missing: .* no split 'val'")
    assert lines(said, "% of 210 training images are right")


def test_the_sample_is_spread_over_the_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 60))
    ids = spread_ids(labels, 512)
    assert len(set(ids.tolist())) == 512 and (np.diff(ids) > 0).all()
    counts = np.bincount(labels[ids], minlength=100)
    assert counts.min() == 5 and counts.max() == 6
    assert spread_ids(labels[:40], 512).tolist() == list(range(40))


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_chance_is_what_guessing_reaches(classes):
    """Against 4,000 draws of 512 guesses."""
    draws = np.random.default_rng(0).binomial(512, 1 / classes, 4000) / 512
    assert np.mean([is_near_chance(share, 512, classes) for share in draws]) > 0.98
    assert not is_near_chance(1 / classes + 0.1, 512, classes)


# ---------------------------------------------------------------------------------------------
# After it
# ---------------------------------------------------------------------------------------------


def test_precompute_ends_with_the_figure_of_cache_info(good, capsys, monkeypatch):
    """Mixed views: the label of larger weight counts. `cache info` draws all of so small blocks."""
    monkeypatch.setattr(CodecConfig, "block_records", 105)
    found = precompute(good)["teacher_agreement"]
    assert main(["cache", "info", str(good.cache), "--data-root", str(good.data.root)]) == 0
    assert f"{100 * found:.2f} % of top-1 classes are the label" in capsys.readouterr().out
    assert 0.2 < found < 1
    assert precompute(good)["teacher_agreement"] is None  # it wrote nothing


def test_agreement_near_chance_is_said_loudly(random, said, capsys):
    found = precompute(random)["teacher_agreement"]
    pattern = r"the label of larger weight in .* % of 630 views .*NO BETTER THAN CHANCE"
    (record,) = lines(said, pattern)
    assert record.levelno == logging.WARNING and found < 0.2


def test_the_command_prints_it(good, capsys):
    words = ["precompute", "--recipe", "digits_student", "--epochs", "1", "--data.workers", "0",
             "--teacher", str(good.teacher), "--cache", str(good.cache),
             "--data.root", str(good.data.root), "--view.repeats", "1"]  # fmt: skip
    assert main([*words, "--teacher-floor", "0.99"]) == 2
    assert "teacher_floor is 0.99" in capsys.readouterr().err
    assert main(words) == 0
    assert re.search(r"teacher agreement  \d+\.\d\d %", capsys.readouterr().out)
