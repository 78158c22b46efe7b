"""Short training runs on digits: their configuration, their interruption, their comparison."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.models import load_weights
from deit_fast.recipes import digits_student
from deit_fast.runtime.metrics import read_metrics
from deit_fast.runtime.weights_header import EMA_FILE, MODEL_FILE
from deit_fast.training.checkpoints import list_checkpoints
from deit_fast.training.loop import train
from helpers.processes import forked, redirect

TEACHER = "helpers.unruly_teacher:convnet@{}/teacher.safetensors"
STEPS = 12
TWO_BLOCKS = ("patch_size=4", "embed_dim=32", "depth=2", "num_heads=2")


def run_config(world: Path, output: Path, **changes) -> RunConfig:
    """Two epochs of the demo's student with everything on: mixing, repeats, EMA, drop path."""
    config = digits_student().replace(
        output=str(output),
        epochs=2,
        batch_size=32,
        num_views=3,
        teacher=f"deit_fast.models.convnet:small_convnet@{world}/teacher.safetensors",
        log_every=1,
        eval_every=1,
        save_every=1,
        data={"root": str(world / "data"), "workers": 0},
        model={"drop_path": 0.1, "args": TWO_BLOCKS},
        optim={"ema_decay": 0.99},
        view={"erase_prob": 0.25},
    )
    return config.replace(**changes)


def weights_equal(left: Path, right: Path, names: Iterable[str] = (MODEL_FILE, EMA_FILE)) -> bool:
    """Whether files of weights are equal. The best ones of a run that stopped at ``max_steps`` may
    differ: it evaluates there too."""
    for name in names:
        a, b = load_weights(left / name), load_weights(right / name)
        if set(a) != set(b) or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def comparable_rows(run: Path) -> list[dict]:
    clock = {"time", "images_per_s", "images_per_s_per_process", "step_ms", "seconds_left",
             "data_wait"}  # fmt: skip
    return [{k: v for k, v in row.items() if k not in clock}
            for row in read_metrics(run / "metrics.jsonl")]  # fmt: skip


def unruly(world: Path, output: Path, **changes) -> RunConfig:
    base = {"teacher": TEACHER.format(world), "save_steps": 1, "loss": {"kind": "soft"},
            "teacher_floor": 0.0}  # fmt: skip  # so that its calls are those of the steps
    changes = base | changes
    return run_config(world, output, **changes)


def last_state(run: Path) -> dict:
    return torch.load(list_checkpoints(run / "checkpoints")[-1], weights_only=True)


class AtStep(logging.Handler):
    """Does something in the training thread when the log's line of a step comes."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        super().__init__(logging.INFO)
        self.step, self.action = step, action
        self.done = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(f"step {self.step}/"):
            self.done += 1
            self.action()

    def __enter__(self) -> AtStep:
        self.log = logging.getLogger("deit_fast")
        self.level = self.log.level
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.log.removeHandler(self)
        self.log.setLevel(self.level)


def train_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kind"] == "train"]


def in_a_child(config: RunConfig) -> int:
    """Exit status of a process that trains; negative: the signal that killed it."""
    return forked(_train, config)


def _train(config: RunConfig) -> None:
    train(config)


def assert_close_runs(run: Path, undisturbed: Path) -> None:
    """The same samples, views and drops: losses that differ by the order of sums alone."""
    mine, theirs = (train_rows(read_metrics(path / "metrics.jsonl")) for path in (run, undisturbed))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for left, right in zip(mine, theirs, strict=True):
        for key in ("loss", "base_loss", "distill_loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=2e-4), (key, left["step"])


def assert_stops_change_nothing(config: RunConfig, stops: Sequence[int], undisturbed: Path) -> None:
    """A run that is stopped after each of these steps is bit for bit the undisturbed one."""
    for steps in stops:
        train(config.replace(max_steps=steps))
    train(config)
    run = Path(config.output)
    assert weights_equal(run, undisturbed)
    assert train_rows(comparable_rows(run)) == train_rows(comparable_rows(undisturbed))


def assert_two_processes_continue(config: RunConfig, step: int, undisturbed: Path) -> None:
    """A run of one process up to a step, then of two, is close to the undisturbed one of one."""
    train(config.replace(max_steps=step, save_steps=1))
    status, stderr = torchrun(config.replace(save_steps=1))
    assert status == 0, stderr[-3000:]
    assert_close_runs(Path(config.output), undisturbed)


def main(*arguments: str) -> None:
    torch.set_num_threads(1)  # as torchrun's OMP_NUM_THREADS=1
    sys.exit(cli.main(list(arguments)))


def torchrun(
    config: RunConfig,
    restarts: int = 0,
    call: Callable[..., None] = main,
    words: Sequence[str] = (),
    processes: int = 2,
    **environment: str,
) -> tuple[int, str]:
    """Exit status and stderr of `torchrun -m deit_fast train`, by default with two processes.

    torchrun's agent forks them instead of starting Python, whose imports take most of a short run.
    """
    path, stderr = Path(config.output).with_suffix(".json"), config.output + ".stderr"
    path.write_text(json.dumps(to_dict(config)))
    status = forked(_launch, call, str(path), words, restarts, environment, stderr, processes)
    return status, Path(stderr).read_text()


def _launch(
    call: Callable[..., None],
    path: str,
    words: Sequence[str],
    restarts: int,
    environment: dict[str, str],
    stderr: str,
    processes: int,
) -> None:
    redirect(2, stderr)
    os.environ |= environment
    standalone = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=path,
        max_restarts=restarts, start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(standalone, call)("train", "--config", path, *words)
    except ChildFailedError as error:
        sys.exit(str(error))
