"""Faults of users with features: each is refused by one line, or the result is right."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deit_fast import cache_verbs
from deit_fast.cache import LogitCache
from deit_fast.cache.export import export
from deit_fast.cache.feature_cache import FeatureCache, Given
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.errors import CacheError, CheckFailed, InputError
from deit_fast.precomputation import estimate, precompute
from deit_fast.training.checkpoints import save_checkpoint
from deit_fast.training.dry_run import dry_run
from deit_fast.training.feature_terms import FeatureTerms, build_terms
from deit_fast.training.loop import train, train_together
from deit_fast.training.remarks import say_features
from helpers.feature_runs import LOSSES, OTHER, ROWS, config_of, make_caches, trained
from helpers.feature_teacher import WIDTH
from helpers.like_cuda import WaitingCopies
from helpers.runs import last_state

WITHOUT_NUMBERS = "helpers.feature_teacher:rows_without_numbers"
TRANSFORMER = "helpers.feature_teacher:transformer"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_caches(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def begun(made) -> Path:
    """An online run of class token and patches, after its first step."""
    config = config_of(made, cache=None, loss={"kind": "none"}, features=LOSSES, max_steps=1)
    trained(config, made / "begun")
    return made / "begun"


# ---------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caches", "here"),
    [
        (["cache/patches", "cache/cls"], "patches grid=4 width=12, cls width=12 here"),
        (["cache/patches", "fp8/patches"], "patches grid=4 width=12, patches grid=4 width=12 here"),
        (["cache/cls"], "cls width=12 here"),
        ([], "none here"),
    ],
)
def test_projectors_go_on_with_their_own_features_alone(made, begun, tmp_path, caches, here):
    """A projector of one target fits the shape of another, so only its name tells them apart."""
    shutil.copytree(begun, tmp_path / "run")
    first, *more = [str(made / name) for name in caches] or [None]
    config = config_of(
        made, cache=first, more_caches=tuple(more), teacher=None, loss={"kind": "none"},
        features=LOSSES, output=str(tmp_path / "run"),
        accept_change=("teacher.model", "teacher.weights", "cache.manifest"),
    )  # fmt: skip
    there = r"\(features cls width=12, patches grid=4 width=12 there, "
    with pytest.raises(InputError, match=rf"{there}{here}\): choose another --output"):
        train(config)


def test_a_run_without_features_cannot_resume_with_them(made, tmp_path):
    config = config_of(made, cache=str(made / "cache"), teacher=None, max_steps=1)
    trained(config, tmp_path)
    state = last_state(tmp_path)
    state.pop("heads")  # as in a checkpoint of a version before features
    save_checkpoint(tmp_path / "checkpoints", 1, state)
    more = (str(made / "cache/cls"),)
    with pytest.raises(InputError, match="features none there, cls width=12 here"):
        train(config.replace(output=str(tmp_path), more_caches=more, max_steps=2,
                             accept_change=("cache.manifest",)))  # fmt: skip
    assert trained(config.replace(max_steps=2), tmp_path)


def test_a_selection_of_classes_is_no_other_teacher(made, tmp_path):
    """Logits of selected outputs and features, which know no selection, are of one teacher."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["none of them", *map(str, reversed(range(10)))]))
    online = config_of(
        made, cache=None, targets=("logits", "cls"), teacher_classes=str(names), max_steps=1
    )
    cached = online.replace(
        cache=str(tmp_path / "cache"), more_caches=(str(tmp_path / "cache/cls"),)
    )
    precompute(cached.replace(more_caches=()))
    trained(cached, tmp_path / "soft")
    trained(online.replace(max_steps=2), tmp_path / "soft")
    none = online.replace(loss={"kind": "none"}, output=str(tmp_path / "none"))
    train_together([online.replace(output=str(tmp_path / "other")), none])
    trained(none.replace(max_steps=2), tmp_path / "none")


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def refuse(match: str, config: RunConfig) -> None:
    """A run is refused before anything is written."""
    with pytest.raises(InputError, match=match):
        train(config)
    assert not (Path(config.output) / "metrics.jsonl").exists()


@pytest.mark.parametrize("teachers", [(1.0, 2.0), (1.0, 2.0, 3.0)])
def test_weights_of_teachers_are_counted_before_the_first_step(made, tmp_path, teachers):
    config = config_of(made, cache=str(made / "cache"), teacher=None, output=str(tmp_path / "run"))
    config = config.replace(loss={"teachers": teachers})
    refuse("1 weight, one for each teacher of logits$", config)
    with pytest.raises(InputError, match=r"1 weight, one for each teacher of logits$"):
        dry_run(config)


@pytest.mark.parametrize("other", ["cache/cls/", "copy"])
def test_a_cache_counts_once(made, tmp_path, other):
    if other == "copy":
        shutil.copytree(made / "cache/cls", tmp_path / "copy")
    again = str(tmp_path / "copy") if other == "copy" else f"{made}/{other}"
    config = config_of(
        made, cache=str(made / "cache/cls"), more_caches=(again,), teacher=None,
        loss={"kind": "none"}, output=str(tmp_path / "run"),
    )  # fmt: skip
    refuse("or a copy of it, which would count twice", config)


def test_an_online_teacher_has_no_projection(made, tmp_path):
    config = config_of(made, cache=None, output=str(tmp_path / "run"))
    pca = config.replace(features={"reduce": "pca", "dim": 4})
    refuse("features.reduce=pca needs the statistics of a feature cache", pca)
    refuse("features.reduce=none with features.dim=4", config.replace(features={"dim": 4}))


def test_patches_of_several_sizes_need_the_teachers_size(made, tmp_path):
    config = config_of(made, cache=None, output=str(tmp_path / "run"))
    sizes = config.replace(num_views=None, view={"repeats": 1, "size_schedule": ((0, 12), (1, 16))})
    refuse("targets patches with view.size_schedule", sizes)


def test_two_blocks_of_a_teacher_are_checked_each_by_itself(made, tmp_path):
    """Two caches of one target; and one of a block in two codecs."""
    base = config_of(made, teacher=TRANSFORMER, targets=("cls",), view={"image_size": 32},
                     loss={"kind": "none"}, check_teacher_every=1, max_steps=1)  # fmt: skip
    made_of = {"first": {"block": 0}, "last": {"block": -1}, "rough": {"block": 1, "codec": "fp8"}}
    for name, features in made_of.items():
        precompute(base.replace(cache=str(tmp_path / name), features=features))
    first, *more = [str(tmp_path / name / "cls") for name in made_of]
    rows = trained(base.replace(cache=first, more_caches=tuple(more)), tmp_path / "run")
    assert 0 < rows[0]["teacher_difference"] < 0.06


@pytest.mark.parametrize(
    ("kind", "there", "missing"),
    [("none", ["cache/cls"], ["later"]), ("soft", ["cache/cls"], ["logits", "later"])],
)
def test_a_dry_run_names_the_caches_that_are_not_there(made, tmp_path, kind, there, missing):
    """Which of them are of features is not known yet, nor how many weights their terms need."""
    first, *more = [f"{made}/{name}/" for name in there] + [
        f"{tmp_path}/{name}" for name in missing
    ]
    config = config_of(made, cache=first, more_caches=tuple(more), teacher=None,
                       loss={"kind": kind, "teachers": (1.0, 2.0) if kind == "soft" else None},
                       features={"weights": (1.0, 2.0)})  # fmt: skip
    found = dry_run(config)["caches"]
    assert [Path(cache["path"]).name for cache in found] == ["cls", *missing]
    assert [len(cache["missing"]) for cache in found] == [0] + [3] * len(missing)


def test_a_setting_that_a_cache_decides_is_said(made, caplog):
    config = config_of(made, cache=str(made / "fp8/patches"), loss={"kind": "none"},
                       features={"grid": 2, "block": 1, "dim": 12})  # fmt: skip
    given = FeatureCache(LogitCache.open(made / "fp8/patches")).given
    with caplog.at_level(logging.WARNING):
        say_features(config, build_terms(config, [given]))
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith("targets cls: no cache of this run holds them")
    assert [text.partition(":")[0] for text in texts[1:]] == [
        "features.block=1", "features.grid=2", "features.dim=12"
    ]  # fmt: skip
    caplog.clear()
    learned = config.replace(targets=("patches",), features={"grid": 4, "block": -1, "dim": None})
    say_features(learned, build_terms(learned, [given]))
    assert not caplog.records


def test_a_floor_that_cannot_be_measured_is_said(made, tmp_path, caplog):
    config = config_of(made, targets=("cls",), cache=str(tmp_path), teacher_floor=0.9)
    precompute(config, views=range(1))
    assert "teacher_floor=0.9: not measured" in caplog.text


@pytest.mark.parametrize("drop", ["random", "dune"])
def test_teachers_that_are_left_out_change_no_images_weight(made, drop):
    config = config_of(made, features={"drop": drop, "weights": (2.0, 0.5, 0.25), **LOSSES})
    given = [Given("cls", teacher, 1, 4, {}) for teacher in ("first", "second", "second")]
    terms = FeatureTerms(config, build_terms(config, given), torch.device("cpu"))
    ids, nothing = torch.arange(64), torch.zeros(64)
    batch = ViewBatch(nothing, nothing, ids, ids.int(), ids, ids, nothing)
    ours, theirs = [torch.zeros(64, 1, 4)] * 3, [torch.ones(64, 1, 4)] * 3
    total, means = terms(ours, theirs, batch, 0)
    assert [mean.item() for mean in means] == [1, 1, 1]
    assert total.item() == pytest.approx(2.75)  # of mean squares that are all 1
    weightless = config.replace(features={"weights": (0.0, 1.0, 1.0)})
    terms = FeatureTerms(weightless, build_terms(weightless, given), torch.device("cpu"))
    assert terms(ours, theirs, batch, 0)[0].isfinite()


def test_teachers_are_left_out_without_waiting_for_a_gpu(made):
    """Their draws are copied in the middle of a step, behind all that is queued."""
    config = config_of(made, features={"drop": "dune", **LOSSES})
    given = [Given("cls", teacher, 1, 4, {}) for teacher in ("first", "second")]
    ids, nothing = torch.arange(64), torch.zeros(64)
    batch = ViewBatch(nothing, nothing, ids, ids.int(), ids, ids, nothing)
    with FakeTensorMode(allow_non_fake_inputs=True), WaitingCopies() as copies:
        here = torch.device("cuda", 0)
        terms = FeatureTerms(config, build_terms(config, given), here)
        features = [torch.empty(64, 1, 4, device=here)] * 2
        total, _ = terms(features, features, batch, 0)
    assert total.device == here and copies.count == 1 and copies.waiting == []


def test_the_teacher_of_a_result_is_that_of_its_logits(made, tmp_path):
    """Whatever the order of the caches: `analyze` compares its decisions with the student's."""
    config = config_of(made, cache=str(made / "other/cls"), more_caches=(str(made / "cache"),),
                       teacher=None, max_steps=1, output=str(tmp_path))  # fmt: skip
    found = train(config)["teacher"]
    assert (found["teacher.spec"], found["more"][0]["teacher.spec"]) == (ROWS, OTHER)


@pytest.mark.parametrize("every", [None, 1])
def test_one_teacher_beside_caches_of_several_is_refused_with_the_remedy(made, tmp_path, every):
    config = config_of(made, cache=str(made / "other/cls"), more_caches=(str(made / "cache"),),
                       check_teacher_every=every, output=str(tmp_path))  # fmt: skip
    remedy = "leave --teacher out" if every is None else (
        "leave --teacher and --check-teacher-every out"
    )  # fmt: skip
    with pytest.raises(InputError, match=f"these are of 2 teachers: .*: {remedy}$"):
        train(config)


# ---------------------------------------------------------------------------------------------
# Folders and files
# ---------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_before_the_fit(made, tmp_path, monkeypatch):
    monkeypatch.setattr("deit_fast.precompute_job.Job._fit", lambda self: pytest.fail("a fit"))
    config = config_of(made, targets=("cls",), cache=str(tmp_path))
    wide = config.replace(features={"reduce": "pca", "dim": WIDTH + 1})
    for work in (precompute, estimate):
        with pytest.raises(InputError, match=r"features.dim=13 must lie in \[1, 12\]"):
            work(wide)
    shutil.copytree(made / "other/cls", tmp_path / "kept")
    (tmp_path / "cls").write_text("a file")
    with pytest.raises(FileExistsError):
        precompute(config)
    (tmp_path / "cls").unlink()
    logits = tmp_path / "logits"
    precompute(config.replace(targets=("logits",), cache=str(logits)))
    with pytest.raises(CacheError, match="by sample id: write the features alone, --targets cls"):
        precompute(config.replace(targets=("logits", "cls"), cache=str(logits)))
    logits.rename(tmp_path / "cls")
    for work in (precompute, estimate):
        with pytest.raises(CacheError, match="cls holds logits, and the features cls would go"):
            work(config)


def test_a_view_without_numbers_is_named_by_the_fit(made, tmp_path):
    config = config_of(made, targets=("cls",), cache=str(tmp_path), teacher=WITHOUT_NUMBERS)
    with pytest.raises(
        CacheError, match=r"view 0 sample 5: cls of .*: its features are not finite"
    ):
        precompute(config)


def test_logits_of_a_pass_with_features_go_on_alone(made, tmp_path):
    shutil.copytree(made / "cache", tmp_path / "cache")
    (tmp_path / "cache/view-00001.dlc").unlink()
    found = precompute(config_of(made, targets=("logits",), cache=str(tmp_path / "cache")))
    assert (found["blocks"], found["kept"]) == (1, 2)
    paths = [root / "cache/view-00001.dlc" for root in (made, tmp_path)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_verify_finds_what_is_wrong_with_statistics(made, tmp_path):
    shutil.copytree(made / "fp8/patches", tmp_path / "patches")
    path = tmp_path / "patches/statistics.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckFailed, match=r"statistics.safetensors: .* its checksum differs"):
        cache_verbs.verify(str(tmp_path / "patches"))
    path.unlink()
    with pytest.raises(CheckFailed, match="are missing: write this cache again"):
        cache_verbs.verify(str(tmp_path / "patches"))


def test_an_export_of_standardised_features_has_the_teachers_scale(made, tmp_path):
    config = config_of(made, targets=("cls",), cache=str(tmp_path / "cache"))
    precompute(config.replace(features={"codec": "int8-standard"}))
    assert "(as stored, standardised)" in cache_verbs.info(str(tmp_path / "cache/cls"))
    export(tmp_path / "cache/cls", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["features"][:, 0]
    exact = LogitCache.open(made / "cache/cls").gather(range(90), 0)
    assert torch.allclose(found, exact, atol=0.02)


def test_features_of_a_bfloat16_teacher_may_differ_by_its_rounding(made):
    """A cache that a GPU wrote, compared with the teacher in float32."""
    cache = FeatureCache(LogitCache.open(made / "cache/cls"))
    stored = cache.cache.gather(range(90), 0)
    for dtype, is_right in (("float32", False), ("bfloat16", True)):
        cache.cache.manifest["fingerprint"]["teacher.dtype"] = dtype
        error, allowed = cache.compare(stored, stored * 1.01, False)
        assert bool((error <= allowed).all()) == is_right
