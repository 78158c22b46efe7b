"""Marks that this machine cannot serve are skipped with a reason; all tests have one seed.

``--outcomes FILE`` appends a line of JSON for each test as soon as it ends, so that a run that is
killed leaves the outcomes so far: bench/gpu.py reads them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import is_gpu_lost

pytest.register_assert_rewrite("helpers")

# Two cores shared by test processes and loader workers: a second thread mostly waits for the first.
torch.set_num_threads(1)


def absent(mark: str) -> str:
    """Why tests of this mark cannot run here; empty where they can."""
    if mark == "gpu":
        return "" if torch.cuda.is_available() else "no CUDA GPU"
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "" if found else "NVIDIA DALI is not installed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # not in a worker of xdist
        config.pluginmanager.register(Outcomes(path), "outcomes")


class Outcomes:
    """Appends {"run", "collected"} once, then {"run", "test", "outcome", "message"} for each test.

    "run" is the process: several may append to one file. A test whose process died has two lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_counted = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # empty in the controller of xdist
            self._count(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._count(len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else report.longreprtext
            entry = {"test": report.nodeid, "outcome": report.outcome, "message": message[:2000]}
            self._append(entry)

    def _count(self, number: int) -> None:
        if not self.is_counted:
            self._append({"collected": number})
        self.is_counted = True

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": os.getpid()} | entry) + "\n")


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark in ("gpu", "dali"):
        reason = absent(mark)
        for item in items:
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """End a worker of xdist whose GPU context a kernel has destroyed; xdist starts another one."""
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and is_gpu_lost():
        os._exit(70)
    return result


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits as images and a teacher with random weights. Tests only read it."""
    from safetensors.torch import save_file

    from deit_fast.models.convnet import small_convnet
    from helpers.digits import write_few_digits

    root = tmp_path_factory.mktemp("world")
    write_few_digits(root / "data")
    torch.manual_seed(5)
    save_file(small_convnet(10).state_dict(), root / "teacher.safetensors")
    return root


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
