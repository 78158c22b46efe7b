"""Features from a teacher through its caches into a student, with the commands of a user."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from deit_fast import cli
from deit_fast.cache import LogitCache
from deit_fast.config_file import to_dict
from deit_fast.errors import CacheError, CacheMismatch, InputError
from deit_fast.models import load_weights
from deit_fast.precomputation import estimate, precompute
from deit_fast.training.dry_run import dry_run
from deit_fast.training.loop import train, train_together
from helpers.feature_runs import LOSSES, OTHER, ROWS, config_of, make_caches, numbers, trained
from helpers.feature_teacher import WIDTH
from helpers.runs import last_state, weights_equal

SMALL = ("embed_dim=32", "depth=2", "num_heads=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_caches(tmp_path_factory.mktemp("made"))


def test_a_pass_writes_a_cache_for_each_target(made):
    shapes = {"cache/cls": (1, WIDTH), "cache/patches": (16, WIDTH), "other/cls": (1, WIDTH)}
    for name, (tokens, width) in shapes.items():
        cache = LogitCache.open(made / name)
        assert (cache.codec.tokens, cache.codec.width) == (tokens, width)
        assert cache.manifest["order"] == "pairs" and cache.views == [0, 1, 2]
        assert cache.gather([5, 0], [1, 1]).shape == (2, tokens, width)
    assert LogitCache.open(made / "cache").manifest["order"] == "pairs"
    assert not (made / "other/manifest.json").exists()  # it has no logits


def test_a_grid_without_patches_is_named(made, tmp_path, caplog):
    config = config_of(made, targets=("cls",), features={"grid": 2}, cache=str(tmp_path))
    with caplog.at_level("WARNING"):
        precompute(config, range(1))
    assert "features.grid=2: not read, the targets are cls without patches" in caplog.text


@pytest.mark.parametrize("kind", ["soft", "none"])
def test_cached_features_give_the_losses_and_gradients_of_the_online_teacher(made, tmp_path, kind):
    online = config_of(made, cache=None, loss={"kind": kind}, features=LOSSES)
    caches = [str(made / name) for name in ("cache", "cache/cls", "cache/patches")]
    cached = online.replace(cache=caches[0], more_caches=tuple(caches[1:]), teacher=None)
    rows = trained(online, tmp_path / "online")
    assert rows == trained(cached, tmp_path / "cached")  # losses and gradient norms, bit for bit
    assert weights_equal(tmp_path / "online", tmp_path / "cached", ["model.safetensors"])
    assert {"cls_loss", "patches_loss"} <= rows[0].keys()
    assert rows[-1]["patches_loss"] < rows[0]["patches_loss"]


def test_a_quantised_cache_gives_them_within_the_bound_of_its_codec(made, tmp_path):
    config = config_of(made, loss={"kind": "none"}, features=LOSSES, max_steps=1, teacher=None)
    exact = trained(config.replace(cache=str(made / "cache/patches")), tmp_path / "exact")
    stored = trained(config.replace(cache=str(made / "fp8/patches")), tmp_path / "fp8")
    assert stored != exact
    # features lie in [-1, 1]: an error of 2^-4 of each moves a mean square by little more
    assert stored[0]["patches_loss"] == pytest.approx(exact[0]["patches_loss"], rel=0.05)


def test_each_term_is_logged_and_counts_with_its_weight(made, tmp_path):
    caches = {"cache": str(made / "cache/cls"), "more_caches": (str(made / "other/cls"),)}
    config = config_of(made, loss={"kind": "none"}, teacher=None, **caches)
    rows = trained(
        config.replace(features={"weights": (2.0, 0.5), "losses": ("mse", "cosine")}),
        tmp_path / "run",
    )
    for row in rows:
        total = row["base_loss"] + 2 * row["cls_loss"] + 0.5 * row["cls_loss_2"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_two_teachers_of_logits_are_averaged_by_weight(made, tmp_path, caplog):
    second = tmp_path / "second"
    precompute(config_of(made, teacher=OTHER, targets=("logits",), cache=str(second)))
    config = config_of(
        made, teacher=None, cache=str(made / "cache"), more_caches=(str(second),),
        loss={"teachers": (3.0, 1.0)},
    )  # fmt: skip
    with caplog.at_level("INFO"):
        both = trained(config, tmp_path / "both")[0]
    assert f"logits learned: {ROWS} with weight 0.75, {OTHER} with weight 0.25" in caplog.text
    assert both["distill_loss"] == pytest.approx(
        0.75 * both["distill_loss_1"] + 0.25 * both["distill_loss_2"], rel=1e-5
    )
    for number, cache in ((1, made / "cache"), (2, second)):
        alone = config.replace(cache=str(cache), more_caches=(), loss={"teachers": None})
        first = trained(alone, tmp_path / f"alone{number}")[0]
        assert first["distill_loss"] == pytest.approx(both[f"distill_loss_{number}"], rel=1e-6)


@pytest.mark.parametrize("drop", ["random", "dune"])
def test_teachers_are_left_out_by_view_and_step(made, tmp_path, drop):
    caches = {"cache": str(made / "cache/cls"), "more_caches": (str(made / "other/cls"),)}
    config = config_of(made, loss={"kind": "none"}, teacher=None, **caches)
    config = config.replace(features={**LOSSES, "drop": drop})
    rows = trained(config, tmp_path / "run")
    parts = trained(config.replace(accumulate=2), tmp_path / "parts")
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    for row in rows:
        everything = row["base_loss"] + row["cls_loss"] + row["cls_loss_2"]
        assert row["loss"] != pytest.approx(everything, rel=1e-6)


def test_features_resume_to_the_weights_of_an_uninterrupted_run(made, tmp_path):
    config = config_of(
        made, teacher=None, cache=str(made / "cache"), more_caches=(str(made / "cache/cls"),),
        save_steps=1, features={"projectors": ("mlp",), "hidden": 16},
    )  # fmt: skip
    train(config.replace(output=str(tmp_path / "whole")))
    parts = config.replace(output=str(tmp_path / "parts"))
    train(parts.replace(max_steps=2))
    train(parts)
    assert weights_equal(tmp_path / "whole", tmp_path / "parts")
    heads = [last_state(tmp_path / name)["heads"] for name in ("whole", "parts")]
    assert heads[0].keys() == heads[1].keys() and len(heads[0]) > 2
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


@pytest.mark.parametrize("source", ["cache", "online", "timm"])
def test_students_of_one_pass_are_their_single_runs(made, tmp_path, source):
    """One with logits and features, one with features alone and other losses of them."""
    base = config_of(made, cache=None)
    if source == "cache":
        more = str(made / "cache/cls"), str(made / "cache/patches")
        base = base.replace(cache=str(made / "cache"), more_caches=more, teacher=None)
    if source == "timm":
        torch.manual_seed(5)
        network = timm.create_model("resnet10t", num_classes=10)
        save_file(network.state_dict(), tmp_path / "weights.safetensors")
        base = base.replace(
            teacher=f"timm:resnet10t@{tmp_path / 'weights.safetensors'}", view={"image_size": 32},
            targets=("logits", "pooled", "patches"), model={"args": ("patch_size=8", *SMALL)},
        )  # fmt: skip
    alone = {"losses": ("cosine", "smooth_l1"), "weights": (0.5, 2.0)}
    students = {
        "alone": base.replace(loss={"kind": "none"}, seed=1, features=alone),
        "both": base.replace(features=LOSSES),
    }
    together = tmp_path / "together"
    train_together([c.replace(output=str(together / name)) for name, c in students.items()])
    for name, config in students.items():
        single = tmp_path / name
        assert numbers(together / name) == trained(config, single)
        assert weights_equal(together / name, single)
        mine, theirs = last_state(together / name), last_state(single)
        assert mine["identity"] == theirs["identity"]
        assert mine["heads"].keys() == theirs["heads"].keys()
        assert all(torch.equal(mine["heads"][key], theirs["heads"][key]) for key in mine["heads"])


def test_projectors_are_no_part_of_the_exported_weights(made, tmp_path):
    config = config_of(made, teacher=None, cache=str(made / "cache/cls"), loss={"kind": "none"})
    trained(config, tmp_path / "features")
    trained(config.replace(cache=None, targets=("logits",)), tmp_path / "labels")
    weights = [load_weights(tmp_path / name / "model.safetensors") for name in
               ("features", "labels")]  # fmt: skip
    assert weights[0].keys() == weights[1].keys()


def test_initial_weights_do_not_depend_on_the_terms(made, tmp_path):
    config = config_of(made, teacher=None, cache=str(made / "cache/cls"), loss={"kind": "none"})
    rows = trained(config.replace(max_steps=1), tmp_path / "features")
    labels = trained(config.replace(max_steps=1, cache=None, targets=("logits",)),
                     tmp_path / "labels")  # fmt: skip
    assert rows[0]["base_loss"] == labels[0]["base_loss"]


# ---------------------------------------------------------------------------------------------
# The same bytes
# ---------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture
def small_units(monkeypatch):
    """Units of 32 records, so that a view of the digits has several; blocks of 8 or fewer."""
    monkeypatch.setattr("deit_fast.cache.format.UNIT_RECORDS", 32)
    monkeypatch.setattr("deit_fast.target_caches.UNIT_RECORDS", 32)
    monkeypatch.setattr("deit_fast.cache.format._FEATURE_BLOCK_BYTES", 8 * 16 * (WIDTH + 4))


def test_an_interrupted_pass_gives_the_bytes_of_a_whole_one(made, tmp_path, small_units):
    config = config_of(made, features={"codec": "fp8"}, teacher_batch=20)
    whole = config.replace(cache=str(tmp_path / "whole"))
    precompute(whole)
    parts = config.replace(cache=str(tmp_path / "parts"))
    precompute(parts, views=range(1, 2))
    for name in ("view-00001.dlc", "patches/view-00001.dlc"):  # a block of each is damaged
        path = tmp_path / "parts" / name
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    found = precompute(parts)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert 0 < found["kept"] < found["blocks"]


def test_the_share_of_each_process_gives_the_bytes_of_one(made, tmp_path, small_units, monkeypatch):
    config = config_of(made, features={"codec": "int8-standard"}, teacher_batch=20)
    precompute(config.replace(cache=str(tmp_path / "one")))
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        precompute(config.replace(cache=str(tmp_path / "three")))
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_statistics_of_a_job_that_ended_before_its_manifest_are_fitted_again(made, tmp_path):
    config = config_of(made, targets=("patches",), cache=str(tmp_path / "cache"),
                       features={"codec": "fp8"})  # fmt: skip
    left = tmp_path / "cache/patches/statistics.safetensors"
    left.parent.mkdir(parents=True)
    shutil.copy(made / "other/cls/statistics.safetensors", left)
    os.utime(left, (0, 0))
    precompute(config)
    assert files(tmp_path / "cache") == files(made / "fp8")


def test_targets_added_later_leave_the_others_as_they_are(made, tmp_path):
    config = config_of(made, cache=str(tmp_path / "cache"))
    precompute(config.replace(targets=("cls",)))
    before = files(tmp_path / "cache/cls")
    precompute(config.replace(targets=("cls", "patches")))
    assert files(tmp_path / "cache/cls") == before
    assert LogitCache.open(tmp_path / "cache/patches").views == [0, 1, 2]


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": OTHER}, "teacher.spec"),
        ({"features": {"codec": "fp16"}}, "codec.name"),
        ({"features": {"grid": 2}}, "target.grid"),
        ({"features": {"reduce": "pca", "dim": 4}}, "target.dim"),
        ({"teacher_batch": 9}, "teacher.batch"),
        ({"view": {"seed": 4}}, "view.seed"),
    ],
)  # fmt: skip
def test_another_cache_in_the_folder_is_refused_by_the_fields_name(made, tmp_path, changes, field):
    shutil.copytree(made / "fp8", tmp_path / "cache")
    config = config_of(made, targets=("patches",), cache=str(tmp_path / "cache"),
                       features={"codec": "fp8"}).replace(**changes)  # fmt: skip
    with pytest.raises((CacheMismatch, CacheError, InputError), match=field):
        precompute(config)


def test_other_statistics_are_refused(made, tmp_path):
    shutil.copytree(made / "fp8/patches", tmp_path / "patches")
    shutil.copy(made / "other/cls/statistics.safetensors", tmp_path / "patches")
    config = config_of(made, teacher=None, cache=str(tmp_path / "patches"), loss={"kind": "none"})
    with pytest.raises(CacheError, match=r"statistics .*SHA-256"):
        train(config.replace(output=str(tmp_path / "run")))


def test_a_cache_of_features_alone_has_no_logits(made, tmp_path):
    config = config_of(made, teacher=None, cache=str(made / "cache/cls"))
    with pytest.raises(InputError, match=r"loss.kind=soft needs logits, .*add the cache of the"):
        train(config.replace(output=str(tmp_path / "run")))


def test_statistics_are_needed_to_normalise_an_online_teacher(made, tmp_path):
    config = config_of(made, cache=None, features={"normalise": ("phi_s",)})
    with pytest.raises(InputError, match=r"features.normalise=phi_s of cls needs the statistics"):
        train(config.replace(output=str(tmp_path / "run")))


def test_a_setting_for_each_term_must_have_as_many_values(made, tmp_path):
    config = config_of(made, cache=None, features={"weights": (1.0, 2.0, 3.0)})
    config = config.replace(output=str(tmp_path / "run"))
    text = r"features.weights=1.0 2.0 3.0 has 3 values for 2 feature terms: give one for each term"
    with pytest.raises(InputError, match=text):
        train(config)
    text = r"features.weights=1.0 2.0 3.0 has 3 values, and the run learns no features: add a"
    with pytest.raises(InputError, match=text):
        train(config.replace(cache=str(made / "cache"), teacher=None))
    text = r"loss.teachers=1.0 2.0 must be 1 weight, one for each teacher of logits"
    with pytest.raises(InputError, match=text):
        train(config.replace(features={"weights": (1.0,)}, loss={"teachers": (1.0, 2.0)}))


# ---------------------------------------------------------------------------------------------
# The teacher against its cache, estimates
# ---------------------------------------------------------------------------------------------


def test_the_teacher_is_compared_with_its_cached_features(made, tmp_path):
    config = config_of(
        made, cache=str(made / "fp8/patches"), loss={"kind": "none"}, check_teacher_every=1
    )
    rows = trained(config.replace(features={"codec": "fp8"}), tmp_path / "run")
    assert 0 < rows[0]["teacher_difference"] < 0.06
    with pytest.raises(CacheMismatch, match=r"teacher.spec"):
        trained(config.replace(teacher=OTHER), tmp_path / "other")


def test_cached_features_are_verified_against_the_teacher(made, capsys):
    data = ["--data-root", str(made / "data")]
    argument = ["cache", "verify", str(made / "fp8/patches")]
    assert cli.main([*argument, "--teacher", ROWS, *data]) == 0
    text = capsys.readouterr().out
    assert "64" in text and "of its length" in text and "nats" not in text
    assert cli.main([*argument, "--teacher", OTHER, *data]) != 0
    assert "teacher.spec" in capsys.readouterr().err


def test_a_dry_run_proposes_codecs_for_every_target_with_the_hours_of_this_teacher(
    made, tmp_path, capsys
):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(config_of(made, cache=str(tmp_path / "cache")))))
    words = ["precompute", "--config", str(file)]
    budget = 3 * (WIDTH + 4)  # of fp8: a group of three repeated views
    assert cli.main([*words, "--dry-run", "--bytes-per-image", str(budget)]) == 0
    found = capsys.readouterr().out.split(f"{budget} bytes an image for ")[1:]
    assert [text.split(":")[0] for text in found] == ["logits", "cls", "patches"]
    logits, cls, patches = found
    assert "dense-fp16" in logits and "--features" not in logits
    assert re.search(rf"codec fp8 +{WIDTH + 4} +3 +{27 * 10 // 3 * budget} bytes +\d\.\d h", cls)
    assert "take, features" in cls and "too small" in patches
    assert not (tmp_path / "cache").exists()
    assert cli.main([*words, "--bytes-per-image", "900"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_estimates_cover_features(made, tmp_path):
    config = config_of(made, cache=str(tmp_path / "cache"), features={"codec": "fp8"})
    found = estimate(config)
    count = found["images"] // 3
    record = 10 * 4 + (WIDTH + 4) + 16 * (WIDTH + 4)
    assert found["bytes"] > 3 * count * record and not (tmp_path / "cache").exists()
    assert found["shapes"] == {"logits": (10,), "cls": (1, WIDTH), "patches": (16, WIDTH)}
    planned = dry_run(
        config.replace(output=str(tmp_path / "run"), cache=str(made / "cache"), teacher=None,
                       more_caches=(str(made / "cache/cls"),))
    )  # fmt: skip
    assert [cache["missing"] for cache in planned["caches"]] == [[], []]
    assert planned["seconds"] > 0
