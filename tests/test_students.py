"""Several students from one pass over the views: each is bit for bit its single run."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import deit_fast
from deit_fast.cli import main
from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.data.eval import EvalLoader
from deit_fast.errors import InputError
from deit_fast.precomputation import precompute
from deit_fast.runtime.files import read_json
from deit_fast.runtime.metrics import read_metrics
from deit_fast.runtime.signals import Preempted
from deit_fast.students import require_agreement
from deit_fast.training import step_inputs
from deit_fast.training.checkpoints import list_checkpoints
from deit_fast.training.loop import train, train_together
from deit_fast.training.teacher import RunTeacher
from helpers.processes import forked
from helpers.runs import (
    STEPS,
    TEACHER,
    comparable_rows,
    last_state,
    run_config,
    torchrun,
    weights_equal,
)

THREE: dict[str, dict[str, Any]] = {
    "small": {"loss": {"kind": "soft", "tau": 2.0}, "seed": 3, "save_steps": 1},
    "hard": {
        "optim": {"lr": 2e-3, "ema_decay": 0.9},
        "model": {"drop_path": 0.4, "args": ("patch_size=4", "embed_dim=32", "depth=3",
                                             "num_heads=2")},
        "loss": {"kind": "hard"}, "seed": 4, "accumulate": 2,
    },
    "plain": {"loss": {"kind": "none"}, "optim": {"ema_decay": 0.0, "name": "lamb"},
              "log_every": 5, "eval_every": 2},
}  # fmt: skip


class Careless(nn.Module):
    """A student of one head whose loss is not finite at the training steps in NAN, and that writes
    into its input where WRITES is set."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3 * 16 * 16, num_classes), 0

    def forward(self, images: Tensor) -> Tensor:
        if "WRITES" in os.environ:
            images.mul_(0.5)
        logits = self.layer(images.flatten(1))
        if self.training:
            steps = os.environ.get("NAN", "").split(",")
            logits = logits * float("nan") if str(self.calls) in steps else logits
            self.calls += 1
        return logits


CARELESS = {"model": {"name": f"{__name__}:Careless", "drop_path": 0.0, "args": ()}}


def students(base: RunConfig, folder: Path, *names: str, **changes: Any) -> list[RunConfig]:
    """Settings of students of ``THREE``, by default of all, whose outputs are in ``folder``."""
    return [
        base.replace(**THREE[name]).replace(**changes).replace(output=str(folder / name))
        for name in names or THREE
    ]


@pytest.fixture(scope="module")
def base(world, tmp_path_factory) -> RunConfig:
    """Settings with an online teacher and, in ``codec``, those of its cache."""
    return run_config(
        world, tmp_path_factory.mktemp("base"), teacher=TEACHER.format(world), teacher_floor=0.0,
        codec={"name": "topk", "k": 3, "temperatures": (1.0, 2.0)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cached(base, tmp_path_factory) -> RunConfig:
    cache = tmp_path_factory.mktemp("cache")
    precompute(base.replace(cache=str(cache)))
    return base.replace(cache=str(cache), teacher=None, teacher_floor=None)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> Path:
    """The three students, each trained alone with the online teacher."""
    folder = tmp_path_factory.mktemp("alone")
    for config in students(base, folder):
        train(config)
    return folder


def assert_same_run(run: Path, alone: Path) -> None:
    mine, theirs = read_json(run / "result.json"), read_json(alone / "result.json")
    for key in ("weights", "top1", "loss", "best_top1", "best_epoch", "metrics", "teacher", "seed"):
        assert mine[key] == theirs[key], key
    states = [last_state(folder) for folder in (run, alone)]
    assert states[0]["step"] == states[1]["step"] == STEPS
    assert weights_equal(run, alone, mine["weights"])
    assert comparable_rows(run) == comparable_rows(alone)


def test_students_of_an_online_teacher_are_their_single_runs(base, alone, tmp_path, monkeypatch):
    teacher, ingested, evaluations = [], [], []
    forward, ingest, held_out = RunTeacher.forward, step_inputs.ingest_batch, EvalLoader.__iter__

    def noted(batch: Any, *rest: Any) -> Any:
        ingested.append(len(batch))
        return ingest(batch, *rest)

    monkeypatch.setattr(
        RunTeacher, "forward", lambda self, images: teacher.append(0) or forward(self, images)
    )
    monkeypatch.setattr(step_inputs, "ingest_batch", noted)
    monkeypatch.setattr(
        EvalLoader, "__iter__", lambda self: evaluations.append(0) or held_out(self)
    )
    results = deit_fast.train_together(students(base, tmp_path))
    assert [result.path for result in results] == [tmp_path / name for name in THREE]
    for name in THREE:
        assert_same_run(tmp_path / name, alone / name)
    # `hard` takes a batch in two parts; `plain` has no teacher, but the images of `small`.
    assert len(teacher) == 3 * STEPS and sorted(ingested) == [16] * 2 * STEPS + [32] * STEPS
    # One pass over the held-out images each time serves all students and their moving averages.
    assert len(evaluations) == base.epochs
    assert results[0].details == read_json(tmp_path / "small" / "result.json")


def test_students_of_a_cache_by_the_command(cached, tmp_path, capsys, caplog):
    for config in students(cached, tmp_path / "alone"):
        train(config)
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps(to_dict(cached.replace(output=str(tmp_path / "together")))))
    files = []
    for name in ("plain", "hard", "small"):  # the first teacher has not the temperature of `small`
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(THREE[name]))
    words = ["--config", str(shared), "--students", *map(str, files)]
    with caplog.at_level(logging.INFO, "deit_fast"):
        assert main(["train", *words]) == 0
    printed = capsys.readouterr().out
    for name in THREE:
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name)
        assert str(tmp_path / "together" / name) in printed
    lines = [record.getMessage() for record in caplog.records]
    for name, every in (("small", 1), ("hard", 1), ("plain", 5)):
        steps = [line for line in lines if line.startswith(f"{name}: step ")]
        assert len(steps) == -(-STEPS // every)
        assert any(line.startswith(f"{name}: finished; the weights are ") for line in lines)
    # the command of a single run takes the folder of one of them, here a finished run
    config = tmp_path / "together" / "hard" / "config.json"
    assert main(["train", "--config", str(config)]) == 0
    assert_same_run(tmp_path / "together" / "hard", tmp_path / "alone" / "hard")


def test_a_signal_saves_all_and_they_resume_together_in_part_and_alone(
    base, alone, tmp_path, monkeypatch
):
    configs = students(base, tmp_path, save_steps=None)
    monkeypatch.setenv("UNRULY", "SIGTERM:7")  # three calls a step: the third step
    with pytest.raises(Preempted, match=r"SIGTERM: saved step 3 in .*small.*step 3 in .*hard"):
        train_together(configs)
    assert {last_state(tmp_path / name)["step"] for name in THREE} == {3}
    monkeypatch.setenv("UNRULY", "SIGTERM:1")
    with pytest.raises(Preempted, match=r"saved step 5 in .*plain"):
        train_together([configs[2], configs[0]])
    monkeypatch.delenv("UNRULY")
    train(configs[1])
    assert last_state(tmp_path / "small")["step"] == 5
    train_together(configs)  # `hard` is finished, the others are not
    for name in THREE:
        assert_same_run(tmp_path / name, alone / name)


def test_after_a_kill_those_ahead_wait(base, alone, tmp_path, monkeypatch, caplog):
    """`small` saves every step, `hard` at the end of an epoch, `plain` joins later."""
    configs = students(base, tmp_path)
    monkeypatch.setenv("UNRULY", "SIGKILL:27")  # three calls a step
    assert forked(train_together, configs[:2]) == -signal.SIGKILL
    saved = [int(list_checkpoints(tmp_path / name / "checkpoints")[-1].stem[5:])
             for name in ("small", "hard")]  # fmt: skip
    assert saved[1] == 6 < saved[0] < STEPS
    monkeypatch.delenv("UNRULY")
    with caplog.at_level(logging.INFO, "deit_fast"):
        train_together(configs)
    assert f"small: waits at step {saved[0]} for the others" in caplog.messages
    for name in THREE:
        assert_same_run(tmp_path / name, alone / name)


@pytest.mark.parametrize("on_nonfinite", ["stop", "rollback"])
def test_a_student_that_is_not_finite_leaves_the_others_as_they_are(
    base, alone, tmp_path, monkeypatch, caplog, on_nonfinite
):
    monkeypatch.setenv("NAN", "8")
    careless = base.replace(
        **CARELESS, loss={"kind": "soft"}, save_steps=4, on_nonfinite=on_nonfinite,
        output=str(tmp_path / "careless"),
    )  # fmt: skip
    small, plain = students(base, tmp_path, "small", "plain")
    if on_nonfinite == "rollback":
        train_together([small, careless, plain])
        assert read_json(tmp_path / "careless" / "result.json")["skipped_steps"] == [8]
        train(careless.replace(output=str(tmp_path / "single")))
        assert_same_run(tmp_path / "careless", tmp_path / "single")
    else:
        with pytest.raises(FloatingPointError) as caught:
            train_together([small, careless, plain])
        text = str(caught.value)
        assert text.startswith("careless: step 9: the loss of rank 0 is not finite")
        assert text.endswith("; small is finished; plain is finished")
        assert any("careless: step 9" in line and "the others go on" in line
                   for line in caplog.messages)  # fmt: skip
        assert last_state(tmp_path / "careless")["step"] == 8
        assert not (tmp_path / "careless" / "result.json").exists()
        row = read_metrics(tmp_path / "careless" / "metrics.jsonl")[-1]
        assert row["kind"] == "failure" and "step 9: the loss" in row["reason"]
    for name in ("small", "plain"):
        assert_same_run(tmp_path / name, alone / name)


def test_a_student_may_not_write_into_the_images_of_the_next(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITES", "1")
    careless = base.replace(**CARELESS, loss={"kind": "none"}, output=str(tmp_path / "careless"))
    with pytest.raises(
        InputError, match=r"Careless of .*/careless writes into its input, which several"
    ):
        train_together([careless, *students(base, tmp_path, "plain")])


@pytest.mark.dist
def test_two_processes_train_two_students(base, tmp_path):
    configs = students(base, tmp_path, "hard", "small")
    status, stderr = torchrun(configs[1].replace(output=str(tmp_path / "single")))
    assert status == 0, stderr[-3000:]
    paths = [tmp_path / f"{name}.json" for name in ("hard", "small")]
    for path, config in zip(paths, configs, strict=True):
        path.write_text(json.dumps(to_dict(config)))
    words = ["--students", *map(str, paths)]
    status, stderr = torchrun(base.replace(output=str(tmp_path / "shared")), words=words)
    assert status == 0, stderr[-3000:]
    assert_same_run(tmp_path / "small", tmp_path / "single")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, "batch_size is 32 for .*/small and 16 for .*/hard: students of one"),
        ({"view": {"erase_prob": 0.1}}, "view.erase_prob is 0.25 for .*/small and 0.1 for"),
        ({"epochs": 3}, "epochs is 2 for"),
        ({"output": "{}/small"}, "students 1 and 2 have one output, "),
        ({"output": "{}/x/../small"}, "students 1 and 2 have one output, "),
    ],
)
def test_students_that_disagree_are_refused(base, tmp_path, changes, message):
    changes = {key: value.format(tmp_path) if key == "output" else value
               for key, value in changes.items()}  # fmt: skip
    first, second = students(base, tmp_path, "small", "hard")
    with pytest.raises(InputError, match=message):
        deit_fast.train_together([first, second.replace(**changes)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile_steps": 2}, "profile_steps=2 with several students: "),
        ({"cuda_graphs": True}, "cuda_graphs=True with several students: "),
        ({"track": ("wandb",)}, "track=wandb takes one run in a process, and there are 2"),
    ],
)
def test_what_one_student_alone_can_have(base, tmp_path, changes, message):
    configs = students(base, tmp_path, "small", "plain", **changes)
    with pytest.raises(InputError, match=message):
        require_agreement(configs)
    require_agreement(configs[:1])


def test_bad_files_of_students(base, tmp_path, capsys):
    """The message names the file or the student."""
    shared, file = tmp_path / "shared.json", tmp_path / "own.json"
    shared.write_text(json.dumps(to_dict(base.replace(output=str(tmp_path / "out")))))
    for values, message in (
        ({"recipe": "deit_tiny_distilled"}, "own.json: its recipe deit_tiny_distilled would"),
        ({"sed": 1}, "own.json: unknown setting 'sed' (did you mean seed?)"),
        ({"model": {"weights": "none.pth"}}, "/out/own: weights file none.pth does not exist"),
    ):
        file.write_text(json.dumps(values))
        words = ["--config", str(shared), "--students", str(file), str(shared)]
        assert main(["train", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "--config", str(shared), "--students", str(tmp_path / "no.json")]) == 2
    assert "no.json does not exist" in capsys.readouterr().err
    with pytest.raises(InputError, match="no students"):
        deit_fast.train_together([])


@pytest.mark.parametrize("wrong", ["small", "hard"])
def test_a_wrong_list_is_refused_with_the_name_of_its_student(base, tmp_path, wrong):
    """Whether its length fits is known only of the teacher, which all students share."""
    configs = students(base, tmp_path, "small", "hard")
    configs = [
        config.replace(loss={"teachers": (1.0, 2.0)}) if config.output.endswith(wrong) else config
        for config in configs
    ]
    with pytest.raises(InputError, match=rf"^{wrong}: loss\.teachers"):
        deit_fast.train_together(configs)


def test_the_settings_of_all_students_are_printed(base, tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("epochs: 7\nmodel: {drop_path: 0.2}\n")
    words = ["--recipe", "digits_student", "--output", "here", "--students", str(own)]
    assert main(["train", *words, "--print-config"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["epochs"] == 7 and found["output"] == "here/own"
    assert found["model"]["drop_path"] == 0.2 and found["recipe"] == "digits_student"
