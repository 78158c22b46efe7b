"""The schedule of warm-up, stable rate and decay, and runs that branch from its checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.precomputation import precompute
from deit_fast.runtime.metrics import read_metrics
from deit_fast.training.checkpoints import list_checkpoints
from deit_fast.training.loop import train
from deit_fast.training.optim import learning_rate, require_schedule
from deit_fast.views.steps import RunSteps
from helpers.runs import (
    comparable_rows,
    in_a_child,
    last_state,
    torchrun,
    train_rows,
    unruly,
    weights_equal,
)

PER_EPOCH = 6  # steps


def wsd(world: Path, output: Path, epochs: int, decay: float, **changes: Any) -> RunConfig:
    optim = {"schedule": "wsd", "decay_epochs": decay, "warmup_epochs": 0.5, "ema_decay": 0.9}
    config = unruly(world, output, epochs=epochs, save_steps=3, keep_every=1, optim=optim)
    return config.replace(**changes)


@pytest.fixture(scope="module")
def trunk(world: Path, tmp_path_factory) -> Path:
    """A long run that was stopped after its second epoch; it would decay in its tenth."""
    output = tmp_path_factory.mktemp("trunk") / "run"
    train(wsd(world, output, 10, 1.0, max_steps=2 * PER_EPOCH))
    return output


def point(trunk: Path, step: int) -> str:
    return str(trunk / f"checkpoints/step-{step:09d}.pt")


def branch(world: Path, trunk: Path, output: Path, step: int, decay: float, **changes: Any):
    """The trunk's command with a checkpoint and a decay: its `epochs` stay those of the trunk."""
    return wsd(world, output, 10, decay, resume_from=point(trunk, step), **changes)


def assert_same_end(run: Path, planned: Path, first: int) -> None:
    """Everything equals the other run's, and so do the rows of the steps after ``first``."""
    assert weights_equal(run, planned)
    mine, theirs = last_state(run), last_state(planned)
    assert json.loads(mine["config"])["epochs"] == json.loads(theirs["config"])["epochs"]
    for key in ("model", "ema"):
        assert all(torch.equal(mine[key][name], value) for name, value in theirs[key].items())
    for index, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(mine["optimizer"]["state"][index][name]),
                               torch.as_tensor(value)), name  # fmt: skip
    assert {key: mine[key] for key in ("step", "best_top1", "best_epoch")} == {
        key: theirs[key] for key in ("step", "best_top1", "best_epoch")
    }
    rows = comparable_rows(planned)
    assert comparable_rows(run) == [row for row in rows if row["step"] > first]


# ---------------------------------------------------------------------------------------------
# The schedule
# ---------------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_falls_with_the_root() -> None:
    config = RunConfig(epochs=10, batch_size=512).replace(
        optim={"schedule": "wsd", "decay_epochs": 2.0, "warmup_epochs": 1.0}
    )
    rates = [learning_rate(step, config, RunSteps(5120, ((0, 512),), 10)) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-6 + (5e-4 - 1e-6) * step / 10 for step in range(10)])
    assert set(rates[10:81]) == {5e-4}
    for step in range(80, 100):
        share = 1 - math.sqrt((step - 80) / 20)
        assert rates[step] == pytest.approx(1e-5 + (5e-4 - 1e-5) * share)
    longer = config.replace(epochs=30)
    assert rates[:80] == [
        learning_rate(step, longer, RunSteps(5120, ((0, 512),), 30)) for step in range(80)
    ], "before its decay a run does not depend on its length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": {"decay_epochs": 2.0}}, r"optim\.decay_epochs=2\.0 needs optim\.schedule=wsd"),
        ({"resume_from": "x.pt"}, r"resume_from=x\.pt needs optim\.schedule=wsd"),
        ({"optim": {"schedule": "wsd"}}, r"wsd needs optim\.decay_epochs"),
        (
            {"optim": {"schedule": "wsd", "decay_epochs": 2.0}, "compat": "deit"},
            "compat=deit has DeiT's cosine alone",
        ),
        (
            {"optim": {"schedule": "wsd", "decay_epochs": 6.0}, "epochs": 10},
            r"optim\.warmup_epochs=5 and optim\.decay_epochs=6 are more than epochs=10",
        ),
    ],
    ids=["decay", "branch", "length", "compat", "long"],
)
def test_settings_of_a_schedule_exclude_each_other(settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_schedule(RunConfig().replace(**settings))


# ---------------------------------------------------------------------------------------------
# Branches
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "decay", "epochs"),
    [(12, 1.0, 3), (9, 0.5, 2), (9, 1.0, 3)],
    ids=["end", "inside", "later"],
)
def test_a_branch_is_the_run_that_was_planned_so(
    world: Path, trunk: Path, tmp_path: Path, step: int, decay: float, epochs: int
) -> None:
    """Also from inside an epoch; where the decay ends inside one, it begins that much later."""
    before = {path: path.read_bytes() for path in trunk.rglob("*") if path.is_file()}
    train(branch(world, trunk, tmp_path / "branch", step, decay))
    train(wsd(world, tmp_path / "planned", epochs, decay))
    assert_same_end(tmp_path / "branch", tmp_path / "planned", step)
    assert before == {path: path.read_bytes() for path in trunk.rglob("*") if path.is_file()}
    result = json.loads((tmp_path / "branch/result.json").read_text())
    assert result["metrics"] == {"rows": len(read_metrics(tmp_path / "branch/metrics.jsonl")),
                                 "lost": 0}  # fmt: skip
    config = json.loads((tmp_path / "branch/config.json").read_text())
    assert config["epochs"] == epochs and config["resume_from"] == point(trunk, step)


def test_a_branch_is_resumed_by_its_command_without_the_trunk(
    world: Path, trunk: Path, tmp_path: Path, monkeypatch
) -> None:
    """Killed in its first step, at another, rolled back, then resumed; Muon as the optimiser."""
    optim = {"name": "muon"}
    copy = tmp_path / "trunk"
    train(wsd(world, copy, 10, 1.0, max_steps=PER_EPOCH).replace(optim=optim))
    config = branch(world, copy, tmp_path / "branch", PER_EPOCH, 1.0).replace(optim=optim)
    for at in (0, 2):
        monkeypatch.setenv("UNRULY", f"SIGKILL:{at}")
        assert in_a_child(config) == -signal.SIGKILL
        shutil.rmtree(copy, ignore_errors=True)
    monkeypatch.delenv("UNRULY")
    train(config)
    train(wsd(world, tmp_path / "planned", 2, 1.0).replace(optim=optim))
    assert_same_end(tmp_path / "branch", tmp_path / "planned", PER_EPOCH)


def test_a_branch_rolls_back_to_its_beginning(world, trunk, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("UNRULY", "nan:1")
    config = branch(world, trunk, tmp_path, 12, 0.5, save_steps=None, on_nonfinite="rollback")
    result = train(config)
    assert result["skipped_steps"] == [13] and result["steps"] == 3 * PER_EPOCH


def test_many_budgets_come_from_one_cache(world: Path, tmp_path: Path) -> None:
    trunk = wsd(world, tmp_path / "run", 6, 1.0, cache=str(tmp_path / "cache"), num_views=None)
    precompute(trunk)  # six views of each image
    trunk = trunk.replace(teacher=None)
    train(trunk.replace(max_steps=2 * PER_EPOCH))
    budget = trunk.replace(resume_from=point(tmp_path / "run", 12))
    train(budget.replace(output=str(tmp_path / "branch")))
    train(trunk.replace(epochs=3, output=str(tmp_path / "planned")))
    assert_same_end(tmp_path / "branch", tmp_path / "planned", 12)
    longer = budget.replace(optim={"decay_epochs": 5.0}, output=str(tmp_path / "long"))
    with pytest.raises(InputError, match="lacks 3 of the run's 9 views, the first is 6"):
        train(longer)


@pytest.mark.dist
def test_two_processes_branch_as_one(world: Path, trunk: Path, tmp_path: Path) -> None:
    config = branch(world, trunk, tmp_path / "two", 12, 0.5)
    status, stderr = torchrun(config)
    assert status == 0, stderr[-3000:]
    train(config.replace(output=str(tmp_path / "one")))
    mine, theirs = (
        train_rows(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("two", "one")
    )
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [*range(13, 19)]
    for left, right in zip(mine, theirs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"is of another configuration \(seed 0 there, 1 here\): a branch keeps all"),
        ({"optim": {"lr": 1.0}}, r"optim\.lr 0\.008 there, 1\.0 here"),
        ({"resume_from": "absent.pt"}, r"checkpoint absent\.pt cannot be read \(No such file or d"),
        ({"resume_from": "."}, r"checkpoint \. is a folder: choose one of its files step-N\.pt"),
        ({"optim": {"decay_epochs": None}}, r"optim\.schedule=wsd needs optim\.decay_epochs"),
        ({"optim": {"schedule": "cosine"}}, r"needs optim\.schedule=wsd, not cosine"),
        ({"data": {"root": "more"}}, r"is of a run that was made of something else"),
    ],
    ids=["seed", "rate", "absent", "folder", "length", "cosine", "data"],
)
def test_a_branch_of_something_else_is_refused(
    world: Path, trunk: Path, tmp_path: Path, changes, message: str
) -> None:
    if "data" in changes:
        shutil.copytree(world / "data", tmp_path / "more")
        for path in (tmp_path / "more/train/3").iterdir():
            shutil.copy(next((tmp_path / "more/train/5").iterdir()), path)
        changes = {"data": {"root": str(tmp_path / "more")}}
    config = branch(world, trunk, tmp_path / "branch", 12, 1.0).replace(**changes)
    with pytest.raises(InputError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not list_checkpoints(tmp_path / "branch/checkpoints")


def test_no_run_branches_from_a_decay_or_a_cosine(world, trunk, tmp_path) -> None:
    train(wsd(world, tmp_path / "short", 2, 1.0))
    config = branch(world, tmp_path / "short", tmp_path / "branch", 9, 1.0)
    with pytest.raises(InputError, match=r"is of step 9, but its run decays from step 6: branch"):
        train(config)
    train(unruly(world, tmp_path / "cosine", max_steps=3, save_steps=3))
    config = branch(world, tmp_path / "cosine", tmp_path / "branch", 3, 1.0)
    with pytest.raises(InputError, match=r"is of a run with optim\.schedule=cosine"):
        train(config)
    config = branch(world, tmp_path / "short", tmp_path / "branch", 6, 1.0)
    train(config.replace(max_steps=7))
    with pytest.raises(
        InputError, match=r"resume_from '\S+' there, '\S+' here: choose|resume_from"
    ):
        train(branch(world, trunk, tmp_path / "branch", 12, 1.0))
    with pytest.raises(InputError, match=r"resume_from '\S+' there, None here"):
        train(wsd(world, tmp_path / "branch", 2, 1.0))
