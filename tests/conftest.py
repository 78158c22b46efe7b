"""Marks that this machine cannot serve are skipped with a reason; all tests have one seed."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

# Two cores shared by test processes and loader workers: a second thread mostly waits for the first.
torch.set_num_threads(1)


def absent(mark: str) -> str:
    """Why tests of this mark cannot run here; empty where they can."""
    if mark == "gpu":
        return "" if torch.cuda.is_available() else "no CUDA GPU"
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "" if found else "NVIDIA DALI is not installed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="of the chosen tests every N-th: K/N")


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("part").split("/"))
    chosen = items[part - 1 :: parts]
    if parts > 1:
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    for mark in ("gpu", "dali"):
        reason = absent(mark)
        for item in items:
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
