"""The seed of views, pairs and order is not the run's; earlier versions had one for both."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deit_fast.cache import CacheMismatch
from deit_fast.config import RunConfig
from deit_fast.config_file import from_earlier, load_config, to_dict
from deit_fast.data.batch import ViewBatch
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate, read_run_config
from deit_fast.models.weights import digest_state
from deit_fast.models.weights_facts import read_facts
from deit_fast.precomputation import precompute
from deit_fast.training.checkpoints import list_checkpoints, load_newest, save_checkpoint
from deit_fast.training.loop import train
from deit_fast.training.state import create_state
from deit_fast.training.step import TrainStep
from helpers.runs import comparable_rows, run_config, train_rows, weights_equal


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Digest of all tensors of the batch that each step gets."""
    seen: dict[int, str] = {}
    call = TrainStep.__call__

    def noted(self: Any, batch: ViewBatch, step: int, *rest: Any) -> Any:
        digest = hashlib.sha256()
        for tensor in batch.device_tensors():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        seen[step] = digest.hexdigest()
        return call(self, batch, step, *rest)

    monkeypatch.setattr(TrainStep, "__call__", noted)
    return seen


@pytest.fixture(scope="module")
def cache(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logits of views of seed 3."""
    folder = tmp_path_factory.mktemp("view-seed") / "cache"
    precompute(run_config(world, folder, cache=str(folder), view={"seed": 3}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------
# One cache, many runs
# ---------------------------------------------------------------------------------------------


def test_runs_of_two_seeds_read_one_cache(world, cache, tmp_path, batches) -> None:
    found, initial = [], []
    for seed in (0, 1):
        config = run_config(
            world, tmp_path / str(seed), seed=seed, cache=str(cache), teacher=None,
            view={"seed": 3}, max_steps=4, epochs=1,
        )  # fmt: skip
        result = train(config)
        assert (result["seed"], result["view_seed"]) == (seed, 3)
        found.append(dict(batches))
        state = create_state(config, 10, torch.device("cpu"))
        initial.append(digest_state(state.model.state_dict()))
    assert found[0] == found[1] and len({*found[0].values()}) == 4
    assert initial[0] != initial[1]
    assert not weights_equal(tmp_path / "0", tmp_path / "1")


def test_precompute_ignores_the_seed_of_the_run(world, cache, tmp_path) -> None:
    config = run_config(
        world, tmp_path, cache=str(tmp_path / "cache"), view={"seed": 3}, seed=5
    )  # fmt: skip
    precompute(config)
    assert contents(tmp_path / "cache") == contents(cache)
    assert precompute(config.replace(seed=6))["images"] == 0, "nothing is left to do"


def test_a_cache_of_before_names_the_flag_that_reads_it(world, cache, tmp_path) -> None:
    """`precompute --seed 3` of earlier versions wrote the same bytes as `--view.seed 3`."""
    config = run_config(world, tmp_path, cache=str(cache), teacher=None, seed=3, max_steps=1)
    with pytest.raises(CacheMismatch, match=r"one field: view\.seed is 3, .* with --view\.seed 3$"):
        train(config)
    train(config.replace(view={"seed": 3}))


def test_the_fingerprint_is_that_of_versions_before_the_setting(cache) -> None:
    names = list(json.loads((cache / "manifest.json").read_text())["fingerprint"])
    views = [name for name in names if name.startswith("view.")]
    assert views[-4:] == ["view.seed", "view.tables_sha256", "view.cutmix_form", "view.plan"]
    assert views.count("view.seed") == 1


# ---------------------------------------------------------------------------------------------
# Files of earlier versions
# ---------------------------------------------------------------------------------------------


def of_before(config: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration as versions without view.seed wrote it."""
    view = {key: value for key, value in config["view"].items() if key != "seed"}
    return json.loads(json.dumps(config | {"view": view}))


def written_before(folder: Path) -> None:
    """Make a run's newest checkpoint and config.json those of a version without view.seed."""
    path, state = load_newest(folder / "checkpoints")
    saved = of_before(json.loads(state["config"]))
    save_checkpoint(path.parent, state["step"], state | {"config": json.dumps(saved)})
    (folder / "config.json").write_text(json.dumps(saved))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose views have the seed of the run, as all had."""
    folder = tmp_path_factory.mktemp("whole")
    train(run_config(world, folder, seed=3, view={"seed": 3}, max_steps=4, epochs=1))
    return folder


def test_a_run_of_before_resumes_by_its_command(world, whole, tmp_path, caplog) -> None:
    def config(name: str) -> RunConfig:
        return run_config(world, tmp_path / name, seed=3, max_steps=4, epochs=1)

    train(config("first").replace(view={"seed": 3}, max_steps=2))
    written_before(tmp_path / "first")
    for name in ("file", "other"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
    caplog.clear()
    with caplog.at_level("INFO"):
        train(config("first"))  # the command of before
    assert "its views continue with view.seed=3, its seed" in caplog.text
    train(load_config(str(tmp_path / "file/config.json"), RunConfig()).replace(
        output=str(tmp_path / "file"), max_steps=4
    ))  # fmt: skip
    for name in ("first", "file"):
        assert weights_equal(tmp_path / name, whole)
        assert train_rows(comparable_rows(tmp_path / name)) == train_rows(comparable_rows(whole))
    assert json.loads((tmp_path / "first/config.json").read_text())["view"]["seed"] == 3
    with pytest.raises(InputError, match=r"view\.seed 3 there, 4 here"):
        train(config("other").replace(view={"seed": 4}))
    with pytest.raises(InputError, match=r"\(seed 3 there, 2 here; view\.seed 3 there, 0 here\)"):
        train(config("other").replace(seed=2))


def test_a_run_of_now_does_not_change_its_views(world, whole) -> None:
    with pytest.raises(InputError, match=r"\(view\.seed 3 there, 0 here\)"):
        train(run_config(world, whole, seed=3, max_steps=4, epochs=1))


def test_the_files_of_a_run_of_before_keep_their_meaning(whole, tmp_path) -> None:
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    written_before(old)
    config = read_run_config(old)  # what evaluate, analyze and export read
    assert (config.seed, config.view.seed) == (3, 3)
    assert config == read_run_config(whole)
    assert evaluate(str(old))["top1"] == evaluate(str(whole))["top1"]
    assert read_facts(list_checkpoints(old / "checkpoints")[-1]) is not None


def test_only_a_whole_file_of_before_gives_its_seed_to_the_views(tmp_path) -> None:
    def view_seed(values: dict[str, Any]) -> int:
        (tmp_path / "c.json").write_text(json.dumps(values))
        return load_config(str(tmp_path / "c.json"), RunConfig()).view.seed

    now = to_dict(RunConfig(seed=3))
    assert view_seed(now) == 0
    assert view_seed(of_before(now)) == 3
    assert view_seed(of_before(now | {"seed": 0})) == 0
    assert view_seed({"seed": 3}) == view_seed({"seed": 3, "view": {"repeats": 1}}) == 0
    for group, name in (("view", "std"), ("optim", "lr")):  # a user's file has some of them
        some = of_before(now)
        del some[group][name]
        assert from_earlier(some)["view"].get("seed") is None
