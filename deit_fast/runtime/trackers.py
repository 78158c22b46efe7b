"""Where the rows of metrics.jsonl go besides: TensorBoard, Weights & Biases, MLflow, trackio.

A tracker is imported only if it was asked for, and fed by a thread of its own, so that no step
waits for a network. What fails in mid-run is left out after one warning. A resumed run goes on in
the tracked run that `trackers.json` names; where the tracker cannot take rows back, those that it
was given already, and that training makes again bit for bit, are not sent twice. So what a killed
process had not sent yet, a second's rows, is missing there; metrics.jsonl has them.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from deit_fast.config import TRACKERS, RunConfig
from deit_fast.config_file import to_dict
from deit_fast.errors import InputError, first_line
from deit_fast.runtime.files import write_json
from deit_fast.runtime.metrics import METRICS, highest_steps
from deit_fast.runtime.signals import Preempted

log = logging.getLogger("deit_fast")

PROJECT = "deit_fast"
_LAST_ROWS = 60.0  # seconds that the end of a finished run waits for a slow network
_LAST_ROWS_CUT_SHORT = 5.0  # of an interrupted one: who sent the signal waits ten


class Tracker(Protocol):
    """One tracked run; ``create`` functions below return one.

    Attributes:
        run: id under which a later process goes on in it.
    """

    run: str

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step; may wait for a network, may raise anything."""

    def rewind(self, step: int) -> bool:
        """Forget the rows after ``step``; whether it can."""
        return False

    def close(self, finished: bool) -> None:
        """No more rows come; ``finished``: the run came to its end."""


class _TensorBoard(Tracker):
    run = "tensorboard"  # the folder; one output has one

    def __init__(self, config: RunConfig, output: Path, run: str | None, step: int) -> None:
        self.folder = str(output / "tensorboard")
        self._open(step)
        if run is None:
            settings = json.dumps(to_dict(config), indent=2)
            self._writer.add_text("config", f"```json\n{settings}\n```")

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Its readers drop what an earlier process wrote from the purged step on.
        self._writer = SummaryWriter(self.folder, purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> bool:
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
        # Its own counter drops a row whose step it has seen, so an evaluation after a resume.
        self._run.define_metric("*", step_metric="step")
        place = self._run.dir if self._run.offline else self._run.url
        log.info("wandb: run %s, %s", self.run, place)

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
        settings = [Param(key, str(value)[:500]) for key, value in _flat(to_dict(config)).items()]
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
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
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


_CREATE: dict[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
assert tuple(_CREATE) == TRACKERS


def require_trackers(names: tuple[str, ...]) -> None:
    """Find the packages of trackers without importing them.

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
    """The trackers of a run's first rank, each with its thread.

    Args:
        config: `track` names them.
        output: the run's folder, with the metrics.jsonl of an earlier process, still uncut.
        step: where the run goes on; 0: at its start.

    Raises:
        InputError: one cannot start, and never did for this run; later that is a warning.
    """

    def __init__(self, config: RunConfig, output: Path, step: int) -> None:
        self._feeds: list[_Feed] = []
        if not config.track:
            return
        path = output / "trackers.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        digest = hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()[:12]
        written = highest_steps(output / METRICS)
        for name in config.track:
            entry = known.get(name)
            if entry is not None and step == 0 and entry["config"] != digest:
                entry = None  # the folder's checkpoints were removed for another run
            run, last = (None, {}) if entry is None else (entry["run"], entry["last"])
            if entry is not None:
                last = {kind: max(last.get(kind, 0), written.get(kind, 0))
                        for kind in {*last, *written}}  # fmt: skip
            try:
                tracker: Tracker = _CREATE[name](config, output, run, step)
            except Preempted:
                raise
            except Exception as error:
                if run is None:
                    raise InputError(
                        f"track={name} cannot start: {first_line(error, with_type=True)}"
                    ) from error
                _warn(name, error)
                continue
            known[name] = {"run": tracker.run, "last": last, "config": digest}
            self._feeds.append(_Feed(name, tracker, {} if name == "tensorboard" else last))
        write_json(path, known)

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row of metrics.jsonl; returns at once."""
        values = {f"{kind}/{name}": float(value) for name, value in row.items()
                  if isinstance(value, (int, float)) and name != "step"}  # fmt: skip
        for feed in self._feeds:
            feed.queue.put((kind, row["step"], values))

    def rewind(self, step: int) -> None:
        """The run went back to ``step``."""
        for feed in self._feeds:
            feed.queue.put(step)

    def close(self, finished: bool) -> None:
        """Wait, not for ever, until all rows are with their trackers."""
        patience = _LAST_ROWS if finished else _LAST_ROWS_CUT_SHORT
        end = time.monotonic() + patience
        for feed in self._feeds:
            feed.queue.put(finished)
        for feed in self._feeds:
            feed.thread.join(max(0.0, end - time.monotonic()))
            if feed.thread.is_alive():
                log.warning("%s did not take the last rows within %.0f s", feed.name, patience)
        self._feeds = []


class _Feed:
    """Hands a tracker its rows, on a thread.

    Its queue takes (kind, step, values) for a row, an int for a step to go back to, and at the end
    a bool: whether the run is finished.
    """

    def __init__(self, name: str, tracker: Tracker, last: dict[str, int]) -> None:
        self.name, self.tracker = name, tracker
        self.last = dict(last)  # by kind, the newest step that the tracker has
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"track-{name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not isinstance(item := self.queue.get(), bool):
                if isinstance(item, int):
                    if self.tracker.rewind(item):
                        self.last = {}
                    continue
                kind, step, values = item
                if step > self.last.get(kind, 0):
                    self.tracker.write(values, step)
                    self.last[kind] = step
            self.tracker.close(item)
        except Exception as error:  # a network's, a disk's, a server's: never the run's
            _warn(self.name, error)


def _warn(name: str, error: Exception) -> None:
    log.warning("%s is left out from here on: %s", name, first_line(error, with_type=True))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
