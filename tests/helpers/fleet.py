"""A run on a machine that is lost in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from deit_fast.cli import main
from deit_fast.storage.objects import Objects
from helpers.runs import AtStep


def train_until_lost(settings: str, step: int, url: str) -> None:
    """`train --config SETTINGS` in a process that is killed at a step, once ``url`` has a whole
    checkpoint of the run."""

    def lose() -> None:
        while not any(name.endswith(".json") for name in Objects(url).list("checkpoints/")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    with AtStep(step, lose):
        sys.exit(main(["train", "--config", settings]))


def train(settings: str) -> None:
    sys.exit(main(["train", "--config", settings]))


def write_settings(path: os.PathLike[str], config: dict) -> str:
    with open(path, "w") as file:
        json.dump(config, file)
    return os.fspath(path)
