"""Trackers get each row of metrics.jsonl once, and never end or delay a run.

TensorBoard is read back from its event files; wandb, MLflow and trackio run for real, without a
network, where they are installed.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.runtime import trackers
from deit_fast.runtime.metrics import MetricsFile, read_metrics
from deit_fast.runtime.signals import Preempted
from deit_fast.training.checkpoints import list_checkpoints
from deit_fast.training.loop import train
from helpers.runs import in_a_child, run_config, torchrun, unruly

Series = dict[str, list[tuple[int, float]]]  # name -> (step, value), in order


def rows_of(run: Path) -> Series:
    """The numbers of metrics.jsonl, which a tracker must hold."""
    found: Series = {}
    for row in read_metrics(run / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("kind", "step", "time"):
                found.setdefault(f"{row['kind']}/{name}", []).append((row["step"], value))
    return found


def in_tensorboard(run: Path) -> Series:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}  # fmt: skip


def assert_same(found: Series, expected: Series, rel: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        for (_, left), (_, right) in zip(found[name], points, strict=True):
            assert left == pytest.approx(right, rel=rel, abs=1e-30), name


def clocks(name: str) -> bool:
    parts = ("images_per_s", "images_per_s_per_process", "step_ms", "seconds_left", "data_wait")
    return name.removeprefix("train/") in parts


def assert_same_numbers(found: Series, expected: Series, rel: float = 1e-12) -> None:
    """Times excepted: rows that a killed process had sent are not sent again with new times."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if not clocks(name)]
    assert_same({n: found[n] for n in names}, {n: expected[n] for n in names}, rel)


def killed_and_resumed(config: RunConfig, monkeypatch) -> None:
    """Kill a run two rows after its newest checkpoint, and resume it."""
    monkeypatch.setenv("UNRULY", "SIGKILL:5")
    assert in_a_child(config) == -signal.SIGKILL
    monkeypatch.delenv("UNRULY")
    newest = list_checkpoints(Path(config.output) / "checkpoints")[-1]
    last = read_metrics(Path(config.output) / "metrics.jsonl")[-1]["step"]
    assert newest.name == f"step-{last - 2:09d}.pt"
    for path in Path(config.output).glob("tensorboard/events.*"):
        # TensorBoard sorts files by second, then by process: within a second, by luck.
        second = path.name.split(".")[3]
        path.rename(path.with_name(path.name.replace(second, str(int(second) - 1))))
    train(config)


# ---------------------------------------------------------------------------------------------
# TensorBoard
# ---------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_rows(world, tmp_path):
    train(run_config(world, tmp_path, track=("tensorboard",)))
    expected = rows_of(tmp_path)
    assert len(expected["train/loss"]) == 12 and len(expected["eval/top1"]) == 2
    assert_same(in_tensorboard(tmp_path), expected, rel=1e-6)  # float32 there


def test_tensorboard_of_a_killed_run_has_each_row_once(world, tmp_path, monkeypatch):
    config = unruly(world, tmp_path, track=("tensorboard",), save_steps=3)
    killed_and_resumed(config, monkeypatch)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert_same(in_tensorboard(tmp_path), rows_of(tmp_path), rel=1e-6)


def test_tensorboard_of_a_rolled_back_run_has_each_row_once(world, tmp_path, monkeypatch):
    monkeypatch.setenv("UNRULY", "nan:7")
    train(unruly(world, tmp_path, track=("tensorboard",), save_steps=3, on_nonfinite="rollback"))
    steps = [step for step, _ in in_tensorboard(tmp_path)["train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert_same(in_tensorboard(tmp_path), rows_of(tmp_path), rel=1e-6)


@pytest.mark.dist
def test_only_the_first_of_two_processes_tracks(world, tmp_path):
    config = unruly(world, tmp_path / "run", track=("tensorboard",), max_steps=2)
    status, stderr = torchrun(config)
    assert status == 0, stderr[-3000:]
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert_same(in_tensorboard(tmp_path / "run"), rows_of(tmp_path / "run"), rel=1e-6)


# ---------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_before_any_work(world, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # its import fails
    with pytest.raises(InputError) as caught:
        train(run_config(world, tmp_path / "run", track=(name,)))
    text = str(caught.value)
    assert f"track={name} needs the package {name}: pip install {name}" in text
    assert 'pip install "deit-fast[track]"' in text and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_are_refused(capsys):
    assert cli.main(["train", "--track", "wandb", "tensorbord"]) == 2
    assert "'mlflow', 'trackio', not 'tensorbord'" in capsys.readouterr().err
    assert cli.main(["train", "--track", "wandb", "tensorboard", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["track"] == ["wandb", "tensorboard"]


class Lost(trackers._TensorBoard):
    """Loses its network at the third row."""

    written = 0

    def write(self, values, step):
        self.written += 1
        if self.written == 3:
            raise ConnectionError("api.example\nis not there")
        super().write(values, step)


def test_a_tracker_that_fails_during_a_run_is_dropped(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(trackers._CLASSES, "tensorboard", Lost)
    with caplog.at_level(logging.WARNING, "deit_fast"):
        train(run_config(world, tmp_path / "run", track=("tensorboard",)))
    warnings = [r.message for r in caplog.records if "no more rows" in r.message]
    said = "tensorboard gets no more rows: ConnectionError: api.example"
    assert warnings == [said]
    assert [step for step, _ in in_tensorboard(tmp_path / "run")["train/loss"]] == [1, 2]
    assert len(rows_of(tmp_path / "run")["train/loss"]) == 12


class Hung(trackers._TensorBoard):
    network = threading.Event()

    def write(self, values, step):
        self.network.wait()


def test_a_tracker_that_hangs_does_not_delay_the_run(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(trackers._CLASSES, "tensorboard", Hung)
    monkeypatch.setattr(trackers, "_FLUSH_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING, "deit_fast"):  # returns while the tracker still waits
        train(run_config(world, tmp_path / "run", track=("tensorboard",), max_steps=3))
    Hung.network.set()
    assert "tensorboard did not take the last rows" in caplog.text


class NeverThere(trackers._TensorBoard):
    def _open(self, step):
        raise ConnectionError("no such server")


def test_only_a_new_run_needs_its_tracker_to_start(world, tmp_path, monkeypatch, caplog):
    config = run_config(world, tmp_path / "run", track=("tensorboard",), max_steps=2)
    with monkeypatch.context() as patch:
        patch.setitem(trackers._CLASSES, "tensorboard", NeverThere)
        with pytest.raises(InputError, match="track=tensorboard cannot start: ConnectionError: no"):
            train(config)
    train(config)
    monkeypatch.setitem(trackers._CLASSES, "tensorboard", NeverThere)
    with caplog.at_level(logging.WARNING, "deit_fast"):  # a restart needs no network
        train(config.replace(max_steps=4))
    assert "tensorboard gets no more rows: ConnectionError" in caplog.text
    assert len(rows_of(tmp_path / "run")["train/loss"]) == 4


class Kept(trackers.Tracker):
    """Keeps the rows in a file and cannot delete them, as a server."""

    def __init__(self, config, output, run, step):
        self.run = run or "first"
        self.path = output / "kept.txt"

    def write(self, values, step):
        with open(self.path, "a") as file:
            file.write(f"{' '.join(values)} {step}\n")


def test_rows_that_a_server_has_are_not_sent_again(tmp_path, monkeypatch):
    """Counted by kind: the evaluation of a step may be missing where its training row is sent."""
    monkeypatch.setitem(trackers._CLASSES, "mlflow", Kept)
    config = RunConfig(track=("mlflow",), output=str(tmp_path))

    def process(step: int, rows: list[tuple[str, int]], config: RunConfig = config) -> str:
        """One process that resumes at ``step``; returns the run that trackers.json names."""
        file = MetricsFile(config, tmp_path, step)
        for kind, at in rows:
            file.write(kind, {"step": at, "x": 1.0})
        file.close(finished=False)
        return json.loads((tmp_path / "trackers.json").read_text())["mlflow"]["run"]

    process(0, [("train", 1), ("train", 2), ("train", 3)])
    process(1, [("train", 2)])  # killed at an earlier step than the first process
    assert process(1, [("train", 2), ("train", 3), ("eval", 3), ("train", 4)]) == "first"
    sent = (tmp_path / "kept.txt").read_text().splitlines()
    assert sent == ["train/x 1", "train/x 2", "train/x 3", "eval/x 3", "train/x 4"]
    # Another run in the same folder, which has no checkpoint, is a new tracked run.
    (tmp_path / "kept.txt").unlink()
    process(0, [("train", 1)], config.replace(seed=1))
    assert (tmp_path / "kept.txt").read_text() == "train/x 1\n"


# ---------------------------------------------------------------------------------------------
# The other trackers, without a network
# ---------------------------------------------------------------------------------------------


def leveldb_records(content: bytes) -> list[bytes]:
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    records, position, block = [b""], 7, 32768
    while position + 7 <= len(content):
        if block - position % block < 7:  # no header fits into the rest of the block
            position += block - position % block
            continue
        size, part = (
            int.from_bytes(content[position + 4 : position + 6], "little"),
            content[position + 6],
        )
        records[-1] += content[position + 7 : position + 7 + size]
        if part in (1, 4):  # whole, or last
            records.append(b"")
        position += 7 + size
    return records[:-1]


def in_wandb(run: Path) -> Series:
    """All rows of the offline files of one run id."""
    from wandb.proto import wandb_internal_pb2

    folders = sorted((run / "wandb").glob("offline-run-*"))
    known = json.loads((run / "trackers.json").read_text())["wandb"]["run"]
    assert {folder.name.rpartition("-")[2] for folder in folders} == {known}
    found: Series = {}
    for folder in folders:
        for data in leveldb_records(next(folder.glob("*.wandb")).read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json)
                   for item in record.history.item}  # fmt: skip
            for name, value in row.items():
                if "/" in name:
                    found.setdefault(name, []).append((row["step"], value))
    return found


def in_mlflow(run: Path) -> Series:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("deit_fast")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    assert runs[0].data.params["optim.ema_decay"] == "0.99"
    return {
        name: [(p.step, p.value) for p in client.get_metric_history(runs[0].info.run_id, name)]
        for name in runs[0].data.metrics
    }


def in_trackio(run: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    assert len(SQLiteStorage.get_runs("deit_fast")) == 1
    known = json.loads((run / "trackers.json").read_text())["trackio"]["run"]
    found: Series = {}
    for row in SQLiteStorage.get_logs("deit_fast", known):
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, []).append((row["step"], value))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "read"), [("wandb", in_wandb), ("mlflow", in_mlflow), ("trackio", in_trackio)]
)
def test_a_resumed_run_continues_the_tracked_run(
    world, tmp_path, monkeypatch, name: str, read: Callable[[Path], Series]
):  # fmt: skip
    """Resumed two rows before the newest that the tracker has, as after a kill."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its import
    pytest.importorskip(name)
    monkeypatch.setattr(trackers, "_FLUSH_SECONDS_INTERRUPTED", 60.0)  # a busy machine
    config = unruly(world, tmp_path / "run", track=(name,), save_steps=3)
    monkeypatch.setenv("UNRULY", "SIGTERM:4")
    with pytest.raises(Preempted, match="saved step 5"):
        train(config)
    monkeypatch.delenv("UNRULY")
    list_checkpoints(tmp_path / "run/checkpoints")[-1].unlink()
    train(config)
    assert_same_numbers(read(tmp_path / "run"), rows_of(tmp_path / "run"))
