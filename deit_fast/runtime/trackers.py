"""Experiment trackers that also get the rows of metrics.jsonl: TensorBoard, Weights & Biases,
MLflow, trackio.

A tracker is imported only if `track` names it. A thread feeds it, so no step waits for a network.
A tracker that fails during a run is dropped after one warning. A resumed run continues the tracked
run that `trackers.json` names. Where the tracker cannot delete rows, rows that it already has are
not sent again: training repeats them bit for bit. Rows that a killed process had not yet sent,
those of about a second, are missing in the tracker and present in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import queue
import secrets
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deit_fast.config import RunConfig
from deit_fast.config_file import by_dotted_key, to_dict
from deit_fast.errors import InputError, first_line, printable
from deit_fast.runtime.files import read_json, write_json

log = logging.getLogger("deit_fast")

PROJECT = "deit_fast"
_DROPPED = "%s gets no more rows: %s"
_FLUSH_SECONDS = 60.0  # how long the end of a finished run waits for a slow network
_FLUSH_SECONDS_INTERRUPTED = 5.0  # schedulers kill a process about ten seconds after SIGTERM


class Tracker(ABC):
    """One tracked run. A subclass is created with (config, output, run, step): ``run`` is None for
    a new tracked run, otherwise the id of the one to continue at ``step``.

    Attributes:
        run: id under which a later process continues it.
    """

    run: str

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step; may wait for a network, may raise anything."""

    def roll_back(self, step: int) -> bool:
        """Delete the rows after ``step``; returns whether the tracker can."""
        return False

    def close(self, finished: bool) -> None:  # noqa: B027 a subclass may have nothing to end
        """End the tracked run; ``finished``: the run made its last step."""


class _TensorBoard(Tracker):
    run = "tensorboard"  # the folder; a run's output has one

    def __init__(self, config: RunConfig, output: Path, run: str | None, step: int) -> None:
        self.folder = str(output / "tensorboard")
        self._open(step)
        if run is None:
            settings = json.dumps(to_dict(config), indent=2)
            self._writer.add_text("config", f"```json\n{settings}\n```")

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers of the event files drop what an earlier process wrote from the purged step on.
        self._writer = SummaryWriter(self.folder, purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def roll_back(self, step: int) -> bool:
        self._writer.close()
        self._open(step)
        return True

    def close(self, finished: bool) -> None:
        self._writer.close()


class _Wandb(Tracker):
    def __init__(self, config: RunConfig, output: Path, run: str | None, step: int) -> None:
        import wandb

        self.run = run or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", output.name),
            id=self.run,
            resume="allow",
            dir=str(output),
            config=to_dict(config),
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),
        )
        # wandb's own step counter drops a row whose step it has seen: an evaluation after a resume.
        self._run.define_metric("*", step_metric="step")
        address = self._run.dir if self._run.offline else self._run.url
        log.info("wandb: run %s, %s", self.run, address)

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow(Tracker):
    def __init__(self, config: RunConfig, output: Path, run: str | None, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()  # of MLFLOW_TRACKING_URI
        if run is not None:
            self.run = run
            self._client.update_run(run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.run = self._client.create_run(experiment, run_name=output.name).info.run_id
        values = by_dotted_key(to_dict(config))
        settings = [Param(key, str(value)[:500]) for key, value in values.items()]
        self._client.log_batch(self.run, params=settings)
        log.info("mlflow: run %s of experiment %s", self.run, name)

    def write(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1e3 * time.time())
        rows = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run, metrics=rows)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


class _Trackio(Tracker):
    def __init__(self, config: RunConfig, output: Path, run: str | None, step: int) -> None:
        import trackio

        self.run = run or f"{output.name}-{secrets.token_hex(4)}"
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the verb's result
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=self.run,
                resume="allow",
                config=to_dict(config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


_CLASSES: dict[str, Any] = {  # by the names in config.TRACKERS
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def require_trackers(names: tuple[str, ...]) -> None:
    """Check that the packages of trackers are installed, without importing them.

    Raises:
        InputError: one is not installed; names it and how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"track={name} needs the package {name}: pip install {name}, or all trackers with "
                f'pip install "deit-fast[track]"'
            )


class Trackers:
    """The trackers of a run's first rank, each fed by a thread.

    Args:
        config: `track` names them.
        output: the run's folder, with trackers.json.
        step: where the run resumes; 0 for a new run.
        logged: newest step that an earlier process logged, by kind of row.

    Raises:
        InputError: trackers.json is damaged, or a tracker of a new tracked run cannot start. On
            resume that is a warning.
    """

    def __init__(self, config: RunConfig, output: Path, step: int, logged: dict[str, int]) -> None:
        self._feeds: list[_Feed] = []
        if not config.track:
            return
        path = output / "trackers.json"
        known = read_tracked_runs(path)
        digest = hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()[:12]
        for name in config.track:
            entry = known.get(name)
            if entry is not None and step == 0 and entry["config"] != digest:
                entry = None  # another run in this folder, whose checkpoints were removed
            run, last = (entry["run"], dict(entry["last"])) if entry else (None, {})
            if run is not None:
                for kind, newest in logged.items():
                    last[kind] = max(newest, last.get(kind, 0))
            try:
                tracker: Tracker = _CLASSES[name](config, output, run, step)
            except Exception as error:
                reason = first_line(error, with_type=True)
                if run is None:
                    self.close(finished=False)
                    raise InputError(f"track={name} cannot start: {reason}") from error
                log.warning(_DROPPED, name, reason)
                continue
            known[name] = {"run": tracker.run, "last": last, "config": digest}
            self._feeds.append(_Feed(name, tracker, {} if name == "tensorboard" else last))
        write_json(path, known)

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Queue the numbers of a row of metrics.jsonl; returns at once."""
        values = {f"{kind}/{name}": float(value) for name, value in row.items()
                  if isinstance(value, (int, float)) and name != "step"}  # fmt: skip
        for feed in self._feeds:
            feed.queue.put((kind, row["step"], values))

    def roll_back(self, step: int) -> None:
        """Delete the rows after ``step`` where the tracker can."""
        for feed in self._feeds:
            feed.queue.put(step)

    def close(self, finished: bool) -> None:
        """Wait, for a limited time, until the trackers have all rows."""
        patience = _FLUSH_SECONDS if finished else _FLUSH_SECONDS_INTERRUPTED
        end = time.monotonic() + patience
        for feed in self._feeds:
            feed.queue.put(finished)
        for feed in self._feeds:
            feed.thread.join(max(0.0, end - time.monotonic()))
            if feed.thread.is_alive():
                log.warning("%s did not take the last rows within %.0f s", feed.name, patience)
        self._feeds = []


def read_tracked_runs(path: Path) -> dict[str, dict[str, Any]]:
    """By name of the tracker: id of its run, newest step by kind of row, and the run's digest."""
    try:
        known = read_json(path)
    except FileNotFoundError:
        return {}
    for name, entry in known.items():
        try:
            steps = entry["last"].values()
            is_valid = {type(entry["run"]), type(entry["config"])} == {str}
            is_valid &= all(type(step) is int for step in steps)
        except (AttributeError, KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise InputError(
                f"{path}: {printable(name)} is damaged; remove the file to start new tracked runs"
            )
    return known


class _Feed:
    """Passes rows to a tracker on a thread.

    The queue takes (kind, step, values) for a row, an int for a step to roll back to, and finally a
    bool: whether the run is finished.
    """

    def __init__(self, name: str, tracker: Tracker, last: dict[str, int]) -> None:
        self.name, self.tracker = name, tracker
        self.last = dict(last)  # newest step that the tracker has, by kind of row
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"track-{name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not isinstance(item := self.queue.get(), bool):
                if isinstance(item, int):
                    if self.tracker.roll_back(item):
                        self.last = {}
                    continue
                kind, step, values = item
                if step > self.last.get(kind, 0):
                    self.tracker.write(values, step)
                    self.last[kind] = step
            self.tracker.close(item)
        except Exception as error:  # a tracker's failure never ends the run
            log.warning(_DROPPED, self.name, first_line(error, with_type=True))
