"""How every kernel's test file runs it: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
outer_run = pytest.mark.skipif(INTERPRETED, reason="is the inner run")


def run_in_the_interpreter(*arguments: str) -> str:
    """pytest with these arguments, in a process where kernels are interpreted; what it printed.

    The interpreter has to be chosen before triton is imported.
    """
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


Call = Callable[[], Sequence[Tensor]]


def assert_equal(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def assert_250_repeats_are_equal(call: Call) -> None:
    first = [x.clone() for x in call()]
    for _ in range(250):
        assert_equal(call(), first)


def assert_waits_for_nothing(call: Call) -> None:
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_replays(call: Call, leaves: Sequence[Tensor]) -> None:
    """A CUDA graph of the call gives what the call gives, for other values of its inputs too."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal([x.clone() for x in captured], call())
