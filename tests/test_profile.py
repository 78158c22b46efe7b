"""Profile, exhausted memory, garbage collection and device waits of a run."""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref
from typing import Any

import pytest
import torch

from deit_fast import cli
from deit_fast.config_file import to_dict
from deit_fast.precomputation import precompute
from deit_fast.runtime.speed import WARM_UP, gc_paused
from deit_fast.training.loop import train
from deit_fast.training.step import TrainStep
from helpers.runs import AtStep, comparable_rows, last_state, run_config, unruly, weights_equal
from helpers.step_watch import Operators, Python, steps_of

# ---------------------------------------------------------------------------------------------
# Profile
# ---------------------------------------------------------------------------------------------


def test_the_profile_contains_the_steps_after_warm_up(world, tmp_path):
    profiled = run_config(world, tmp_path / "profiled", profile_steps=3)
    train(profiled)
    trace = json.loads((tmp_path / "profiled/profile/trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{WARM_UP + index}" for index in range(3)}
    assert names.count("_LossesBackward") == 3  # of kernels.distillation_loss
    table = (tmp_path / "profiled/profile/table.txt").read_text()
    assert "Self CPU" in table and "aten::addmm" in table
    # Being watched changes no number.
    train(run_config(world, tmp_path / "plain"))
    assert comparable_rows(tmp_path / "profiled") == comparable_rows(tmp_path / "plain")
    assert weights_equal(tmp_path / "profiled", tmp_path / "plain")


def test_a_run_too_short_to_profile_warns(world, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "deit_fast"):
        train(run_config(world, tmp_path, profile_steps=3, max_steps=4))
    assert "fewer than 6 steps, nothing was profiled" in caplog.text
    assert not list((tmp_path / "profile").iterdir())


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_line(world, tmp_path, monkeypatch, capsys):
    config = unruly(world, tmp_path / "run", accumulate=2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    monkeypatch.setenv("UNRULY", "oom:7")  # two parts a step
    assert cli.main(["train", "--config", str(path)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    for part in ("out of memory on cpu", "batch_size=32", "accumulate=2", "peak ", " GiB",
                 "you tried to allocate 4503599627370496 bytes"):  # fmt: skip
        assert part in errors[0], errors[0]
    assert last_state(tmp_path / "run")["step"] == 3
    monkeypatch.delenv("UNRULY")
    assert cli.main(["train", "--config", str(path)]) == 0


def test_other_errors_are_not_reported_as_out_of_memory(world, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TrainStep, "__call__", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(run_config(world, tmp_path))


# ---------------------------------------------------------------------------------------------
# Garbage collection
# ---------------------------------------------------------------------------------------------


class Knot:
    """A reference cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_only_on_request():
    gc.enable()
    before = gc.get_freeze_count()
    with gc_paused():
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        knot = weakref.ref(Knot())
        for _ in range(3000):  # many times the automatic threshold
            Knot()
        assert knot() is not None
        gc.collect()
        assert knot() is None
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_the_collectors_settings_are_restored():
    gc.disable()
    try:
        with pytest.raises(ValueError, match="x"), gc_paused():
            raise ValueError("x")
        assert not gc.isenabled(), "it was off before"
        gc.freeze()  # by another owner
        frozen = gc.get_freeze_count()
        with gc_paused():
            pass
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_forked_process_collects_automatically():
    gc.enable()
    with gc_paused():
        child = os.fork()
        if child == 0:
            os._exit(gc.isenabled())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert not gc.isenabled()


def test_a_run_collects_garbage_only_after_its_log_lines(world, tmp_path):
    seen = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    config = run_config(world, tmp_path, log_every=3, eval_every=9)
    gc.enable()
    off = []
    with AtStep(3, lambda: off.append(gc.isenabled())), AtStep(9, seen.clear):
        gc.callbacks.append(note)
        try:
            train(config)
        finally:
            gc.callbacks.remove(note)
    assert off == [False]
    assert seen[:2] == [2, 2], "after the rows of steps 9 and 12"
    assert gc.isenabled() and gc.get_freeze_count() == 0


# ---------------------------------------------------------------------------------------------
# Waits for the device
# ---------------------------------------------------------------------------------------------


STEPS = {
    "online": {"loss": {"kind": "soft"}},
    "online hard, clipped, in parts": {"optim": {"clip_grad": 1.0}, "accumulate": 2},
    "labels": {"loss": {"kind": "none"}, "teacher": None},
    "cached": {"cache": "cache", "loss": {"kind": "soft"}},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_nothing_back(world, tmp_path, name):
    config = run_config(world, tmp_path / "run", **STEPS[name])
    if config.cache is not None:
        config = config.replace(cache=str(tmp_path / "cache"))
        precompute(config)
    step, batches = steps_of(config, 3, "cpu")
    step(batches[0], 0, 1e-3)
    for index in (1, 2):
        batch = batches[index]
        ids = {t.data_ptr() for t in (batch.sample_ids, batch.view_ids)}
        with Python(ids) as python, Operators() as operators:
            step(batch, index, 1e-3)
        assert python.seen == [] and operators.seen == []


def test_the_recorder_sees_reads():
    value = torch.ones(3)
    with Python(set()) as python, Operators() as operators:
        value.sum().item()
        bool(value[0] > 0)
        value.tolist()
        value.cpu()
        value[value > 0]
    assert python.seen == ["item", "__bool__", "tolist", "cpu"]
    assert operators.seen[:2] == ["_local_scalar_dense"] * 2
    with Python({value.data_ptr()}) as python:
        value.tolist()
    assert python.seen == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_the_gpu(world, tmp_path, name):
    config = run_config(world, tmp_path / "run", device="cuda", **STEPS[name])
    if config.cache is not None:
        config = config.replace(cache=str(tmp_path / "cache"))
        precompute(config)
    step, batches = steps_of(config, 6, "cuda")
    for index in range(3):  # compiles kernels, allocates
        step(batches[index], index, 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(3, 6):
            step(batches[index], index, 1e-3)
            step.finite.poll(keep=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
