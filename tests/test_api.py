"""The verbs as Python functions: they train, measure and stop as the commands do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

import deit_fast
from deit_fast import api
from deit_fast.cli import main
from deit_fast.config import LossConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.models.weights import digest_state, load_weights
from deit_fast.runtime.files import read_json
from deit_fast.runtime.signals import SIGNALS
from deit_fast.training.checkpoints import list_checkpoints
from helpers.runs import TWO_BLOCKS, AtStep, weights_equal


def settings(world: Path) -> dict[str, Any]:
    """Two epochs of the demo's student, of 6 steps each."""
    return {
        "recipe": "digits_student",
        "teacher": f"deit_fast.models.convnet:small_convnet@{world}/teacher.safetensors",
        "data": {"root": world / "data", "workers": 0},
        "model": {"args": TWO_BLOCKS},
        "teacher_floor": 0.0, "device": "cpu",
        "epochs": 2, "batch_size": 32, "num_views": 3, "log_every": 1, "save_every": 1,
        "optim": {"ema_decay": 0.9},
        "loss": LossConfig(kind="soft", reduction="batchmean"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> tuple[Path, deit_fast.PrecomputeResult, deit_fast.TrainResult]:
    """A cache and a run from it."""
    root = tmp_path_factory.mktemp("api")
    written = deit_fast.precompute(cache=root / "cache", **settings(world))
    run = deit_fast.train(cache=root / "cache", output=root / "run", **settings(world))
    return root, written, run


def test_results_name_files_and_figures(runs):
    root, written, run = runs
    assert (written.path, written.images) == (root / "cache", 3 * 210)
    assert written.teacher_agreement == written.details["teacher_agreement"] is not None
    assert run.path == root / "run"
    assert run.weights.samefile(root / "run" / "model.safetensors") and run.best.is_file()
    assert run.details == read_json(run.path / "result.json")
    assert 0 <= run.top1 <= run.best_top1 <= 1 and run.top1_distill is not None
    measured = deit_fast.evaluate(run.path, device="cpu")
    assert (measured.top1, measured.top1_class, measured.top1_distill) == (
        run.top1, run.top1_class, run.top1_distill
    )  # fmt: skip
    assert measured.samples == 100 and len(measured.per_class) == 10
    assert measured.weights == run.weights
    assert deit_fast.evaluate(run.path, weights="ema").weights.name == "ema.safetensors"
    with pytest.raises(FrozenInstanceError):
        run.top1 = 1.0  # type: ignore[misc]


def test_the_command_writes_the_same_run(world, runs, tmp_path, capsys):
    run = runs[2]
    words = ["--config", str(run.path / "config.json"), "--output", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert f"{100 * run.top1:.2f} %" in capsys.readouterr().out
    assert weights_equal(tmp_path / "run", run.path)


def test_the_same_call_resumes_and_another_is_refused(world, runs):
    root, _, run = runs
    given = settings(world) | {"output": run.path}
    before = digest_state(load_weights(run.weights))
    assert deit_fast.train(cache=root / "cache", **given).top1 == run.top1
    with pytest.raises(InputError, match="seed"):
        deit_fast.train(cache=root / "cache", **given, seed=3)
    with pytest.raises(InputError, match="resume"):
        deit_fast.train(cache=root / "cache", **given, resume=False)
    assert digest_state(load_weights(run.weights)) == before


def test_settings_come_from_recipe_file_and_keywords_as_on_the_command_line(tmp_path):
    def resolved(*args: Any, **given: Any) -> RunConfig:
        named = {name: given.pop(name, None) for name in
                 ("recipe", "data", "teacher", "cache", "output")}  # fmt: skip
        return api._settings(args[0] if args else None, **named, settings=given)

    file = tmp_path / "mine.json"
    file.write_text('{"epochs": 7, "optim": {"lr": 0.1}}')
    found = resolved(file, recipe="deit_tiny", data=Path("d"), optim={"min_lr": 0.0}, epochs=9)
    assert found.model == deit_fast.find_recipe("deit_tiny")().model
    assert (found.epochs, found.optim.lr, found.optim.min_lr) == (9, 0.1, 0.0)
    assert found.data.root == "d"
    assert resolved(found) == found
    mine = found.replace(teacher="timm:a", teacher_mean=(0.5, 0.5, 0.5), teacher_std=(1, 1, 1))
    assert resolved(mine, teacher="timm:b").teacher_mean is None  # the other teacher's
    assert resolved(
        mine, teacher="timm:b", teacher_mean=(0, 0, 0), teacher_std=(1, 1, 1)
    ).teacher_mean
    for given, message in (
        ({"lr": 1e-3}, r"unknown setting 'lr' \(did you mean optim.lr\?\)"),
        ({"optim": {"lrr": 1}}, r"unknown setting 'optim.lrr'"),
        ({"epochs": "9"}, "epochs must be a whole number"),
        ({"recipe": "deit_tinny"}, "deit_tinny"),
    ):
        with pytest.raises(InputError, match=message):
            resolved(**given)
    with pytest.raises(InputError, match="recipe=deit_tiny has no effect beside a RunConfig"):
        resolved(found, recipe="deit_tiny")


def test_wrong_paths_are_input_errors(world, tmp_path):
    for call, message in (
        (lambda: deit_fast.evaluate(tmp_path / "none"), "run folder .*none does not exist"),
        (lambda: deit_fast.train(data=tmp_path / "none", loss={"kind": "none"}), "does not exist"),
        (lambda: deit_fast.precompute(data=world / "data"), "precompute needs --teacher"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# ---------------------------------------------------------------------------------------------
# Interrupts, logging, imports
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_an_interrupt_saves_and_raises(world, runs, tmp_path):
    """As a notebook's interrupt, which is SIGINT in the main thread, with Python's handler."""
    root, _, run = runs
    given = settings(world) | {"cache": root / "cache", "output": tmp_path / "run"}
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupt = AtStep(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with interrupt, pytest.raises(deit_fast.Preempted, match="Ctrl-C: saved step"):
        deit_fast.train(**given)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    assert deit_fast.train(**given).top1 == run.top1
    assert weights_equal(tmp_path / "run", run.path)


def test_another_thread_trains_and_changes_no_handler(world, runs, tmp_path):
    root, _, run = runs
    given = settings(world) | {"cache": root / "cache", "output": tmp_path / "run"}
    found: list[Any] = []
    handlers: set[Any] = set()
    thread = threading.Thread(target=lambda: found.append(deit_fast.train(**given)))
    with AtStep(3, lambda: handlers.add(signal.getsignal(signal.SIGINT))):
        before = signal.getsignal(signal.SIGINT)
        thread.start()
        thread.join()
    assert handlers == {before}
    assert found[0].top1 == run.top1


def test_calls_set_up_no_logging(world, runs):
    loggers = (logging.getLogger(), logging.getLogger("deit_fast"))
    before = [(x.level, list(x.handlers)) for x in loggers]
    deit_fast.evaluate(runs[2].path)
    assert [(x.level, list(x.handlers)) for x in loggers] == before


def test_settings_and_errors_need_no_torch():
    code = (
        "import sys, deit_fast\n"
        "try:\n    deit_fast.train(recipe='deit_tiny', data='nowhere')\n"
        "except deit_fast.InputError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules and 'tyro' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nowhere does not exist" in done.stdout
