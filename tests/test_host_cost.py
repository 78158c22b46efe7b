"""What an operator's call costs on the host, without a GPU.

The kernels are compiled, then a driver that launches nothing takes their place. The tests count
Python's calls, which are the same on any machine. For times, in launches of a trivial kernel and
without that of a real driver: `python tests/test_host_cost.py times`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Calls of Python and C functions, by Python 3.11; a bare launch takes 24.
MOST = {
    "attention forward": 31,
    "attention backward": 43,
    "bias_gelu forward": 28,
    "bias_gelu backward": 46,
    "add_layer_norm forward": 46,
    "add_layer_norm backward": 72,
    "ingest": 40,
    "distillation_loss": 150,
    "distillation_loss forward + backward": 235,
}


def run(*arguments: str) -> Any:
    """The last line that this file prints in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.slow
def test_calls_on_the_host() -> None:
    found = run("calls")
    assert found.keys() == MOST.keys()
    too_many = {name: count for name, count in found.items() if count > MOST[name]}
    assert not too_many, f"{too_many} of at most {MOST}, all: {found}"
    assert found["attention forward"] > 20  # counted at all


@pytest.mark.slow
def test_a_planned_call_launches_what_the_first_call_did() -> None:
    found = run("plans")
    assert len(found) == 14
    assert all(launches >= 1 for launches in found.values())


@pytest.mark.slow
def test_a_plan_reads_padding_only_where_there_is_some() -> None:
    """Shape, strides and alignment are the same whether or not memory ends with the last class."""
    found = run("padding")
    assert found["room"] == found["room again"] != found["no room"] == found["no room, planned"]


# ---------------------------------------------------------------------------------------------
# The process without a driver
# ---------------------------------------------------------------------------------------------


def operators() -> dict[str, Callable[[], Any]]:
    """A call of each operator in MOST, with its checks and autograd."""
    import torch

    from deit_fast import kernels
    from deit_fast.kernels.ingest import (
        PLAN_COLUMNS,
        ingest_op,
        normal_quantiles,
        normalised_values,
    )
    from helpers import host_only

    torch.set_num_threads(1)
    loss_module: Any = sys.modules["deit_fast.kernels.distillation_loss"]
    loss_module.can_run = lambda *_: True
    loss_module._check_values = lambda *_: None  # reads values on a CPU alone

    def bound(name: str) -> Any:
        call, make = host_only.operators()[name]
        tensors = make()
        return lambda: call(*tensors)

    half = torch.bfloat16
    z_c, z_d = (torch.zeros(16, 1000, dtype=half, requires_grad=True) for _ in range(2))
    teacher, labels = torch.zeros(16, 1000, dtype=half), torch.zeros(16, dtype=torch.long)
    pair = (labels, labels.clone(), torch.ones(16))
    images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    plan = torch.zeros(4, len(PLAN_COLUMNS), dtype=torch.int32)

    def loss() -> Any:
        return kernels.distillation_loss(
            z_c, z_d, pair, teacher, kind="soft", alpha=0.5, tau=3.0, smoothing=0.1,
            reduction="batchmean", return_parts=True,
        )[0]  # fmt: skip

    calls = {name: bound(name) for name in MOST if name in host_only.operators()}
    calls["distillation_loss"] = loss
    calls["distillation_loss forward + backward"] = lambda: torch.autograd.grad(loss(), (z_c, z_d))
    calls["ingest"] = lambda: ingest_op(
        images, plan, normalised_values((0.5,) * 3, (0.2,) * 3, images.device),
        normal_quantiles(images.device), half, "nchw", 16,
    )  # fmt: skip
    return calls


def times() -> dict[str, float]:
    from helpers import host_only

    return host_only.in_launches(operators())


def calls() -> dict[str, int]:
    from helpers import host_only

    return host_only.python_calls(operators())


def plans() -> dict[str, int]:
    import torch

    import deit_fast.kernels  # noqa: F401  # defines the operators
    from helpers import host_only

    def launches(call: Any, tensors: list[torch.Tensor]) -> list[tuple[Any, Any]]:
        """Grid and arguments of each launch; a tensor as its dtype and which input it is."""
        indices = {x.data_ptr(): i for i, x in enumerate(tensors)}
        host_only.launches.clear()
        call(*tensors)

        def named(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            room = x.stride(0) * x.shape[0] if x.dim() else 1  # with a row's padding
            return x.dtype, indices.get(x.data_ptr(), f"new, {room} elements")

        return [(grid, [*map(named, arguments)]) for grid, arguments in host_only.launches]

    host_only.recording = True
    counts = {}
    for name, (call, make) in host_only.operators().items():
        first, planned = launches(call, make()), launches(call, make())
        assert len(first) == len(planned) > 0, name
        assert first == planned, (name, first, planned)
        counts[name] = len(first)
    return counts


def padding() -> dict[str, list[int]]:
    """Numbers among the arguments of the loss kernel: widths of its accesses are some of them."""
    import torch

    from deit_fast.kernels import launching
    from helpers import host_only

    host_only.recording = True
    call, make = host_only.operators()["distillation_loss and gradients, padded rows"]

    def numbers(has_room: bool) -> list[int]:
        tensors = make()
        if not has_room:
            for i, x in enumerate(tensors[:3]):
                tensors[i] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        host_only.launches.clear()
        call(*tensors)
        return [x for x in host_only.launches[0][1] if isinstance(x, int)]

    found = {"no room": numbers(False)}
    launching.clear_plans()
    found |= {"room": numbers(True), "no room, planned": numbers(False)}
    return found | {"room again": numbers(True)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from helpers import host_only as driver

        driver.install()
        driver.bare_launch()()
    except (ImportError, AttributeError, TypeError) as problem:
        print(json.dumps(f"this triton takes no driver of our own: {problem!r}"))
    else:
        parts = {"times": times, "calls": calls, "plans": plans, "padding": padding}
        print(json.dumps(parts[sys.argv[1]]()))
