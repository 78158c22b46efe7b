"""Which tests run here, what their ids look like, and what all of them share.

Tests that this machine cannot run are left out, and one line at the end counts them by reason.

``--outcomes FILE`` appends a line of JSON for each test as soon as it ends, so that a run that is
killed leaves the outcomes so far: bench/gpu.py reads them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common import is_gpu_lost

pytest.register_assert_rewrite("helpers")

from helpers.servers import HAS_RADOSGW, Server, s3_server  # noqa: E402

# Processes that a test starts are forked from one that has imported what they need.
multiprocessing.set_forkserver_preload(
    [
        "deit_fast.training.loop",
        "deit_fast.precomputation",
        "timm",
        "torch.distributed.launcher.api",
    ]
)

# Two cores shared by test processes and loader workers: a second thread mostly waits for the first.
torch.set_num_threads(1)


def missing_for(mark: str) -> str:
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
    config.pluginmanager.register(LeftOut(), "left out")
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(LongestFilesFirst(), "longest files first")


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


# ---------------------------------------------------------------------------------------------
# Tests that cannot run here
# ---------------------------------------------------------------------------------------------


class LeftOut:
    """Deselects what this machine cannot run, and says so in one line instead of hundreds."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    @pytest.hookimpl(trylast=True)  # when -m and -k have chosen
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if config.option.collectonly:
            return
        missing = {mark: missing_for(mark) for mark in ("gpu", "dali")}
        reasons = [self._reason(item, missing) for item in items]
        self.counts = dict(Counter(filter(None, reasons)))
        config.hook.pytest_deselected(
            items=[item for item, reason in zip(items, reasons, strict=True) if reason]
        )
        items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]

    def _reason(self, item: pytest.Item, missing: dict[str, str]) -> str:
        for mark, reason in missing.items():
            if reason and item.get_closest_marker(mark):
                return reason
        for mark in item.iter_markers("skipif"):
            if mark.args and mark.args[0] is True:
                return mark.kwargs["reason"]
        return ""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a worker of xdist tells the controller
            session.config.workeroutput["left out"] = self.counts

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.counts = getattr(node, "workeroutput", {}).get("left out", self.counts)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.counts:
            line = ", ".join(f"{count} ({reason})" for reason, count in sorted(self.counts.items()))
            terminalreporter.write_line(f"cannot run here: {line}")


# ---------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------

LONGEST_ID = 170
UNFIT = re.compile(r"[^\w.,+=-]+", re.ASCII)  # what a shell or pytest reads as something else


def text_of(value: object) -> str:
    """A value in an id, "" where it has no short text: numbers, words, dtypes, and rows of them."""
    if value is None or isinstance(value, bool | int | float | str):
        return UNFIT.sub("_", str(value)).strip("_")[:50]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple | list):
        parts = [text_of(part) for part in value]
        separator = "x" if all(isinstance(part, int) for part in value) else ","
        return separator.join(parts)[:50] if all(parts) else ""
    return ""


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Ids that a shell takes without quotes, so that a failed test is easily run again."""
    has_no_name = isinstance(val, str | bytes) or getattr(val, "__name__", "") == "<lambda>"
    return text_of(val) or (argname if has_no_name else None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unfit = [
        item.nodeid
        for item in items
        if UNFIT.search(item.nodeid.replace("::", "").translate(str.maketrans("", "", "[]/")))
        or re.search("0x[0-9a-f]{6}", item.nodeid)
        or len(item.nodeid) > LONGEST_ID
    ]
    unfit += [name for name, count in Counter(item.nodeid for item in items).items() if count > 1]
    if unfit:
        names = "\n".join(map(repr, unfit))
        raise pytest.UsageError(f"ids that cannot be selected again, give short ids=:\n{names}")


# ---------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------


class LongestFilesFirst:
    """For ``--dist loadfile``, where a long file at the end would leave a core idle."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seconds = Counter[Path]()
        for item in items:
            seconds[item.path] += 30 if item.get_closest_marker("slow") else 1
        items.sort(key=lambda item: -seconds[item.path])


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


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Server]:
    with s3_server("moto") as server:
        yield server


@pytest.fixture(scope="session")
def radosgw_server() -> Iterator[Server]:
    with s3_server("radosgw") as server:
        yield server


@pytest.fixture(
    params=[
        "moto",
        pytest.param(
            "radosgw",
            marks=pytest.mark.skipif(not HAS_RADOSGW, reason="radosgw is not installed"),
        ),
    ]
)
def each_server(request: pytest.FixtureRequest) -> Server:
    """Each server of S3 that can run here."""
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def log_level() -> None:
    """The command line sets the level of the package's logger, also in fixtures of a module."""
    logging.getLogger("deit_fast").setLevel(logging.NOTSET)


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Tests in the background of a script ignore SIGINT, as all jobs do there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
