"""The two variants of bias_gelu_linear's backward, and the choice between them."""

from __future__ import annotations

import logging
import runpy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton.testing
from torch import Tensor

from deit_fast.kernels import bias_gelu, bias_gelu_linear
from deit_fast.kernels.bias_gelu_linear import TILES, Key, Variant, can_fuse
from helpers.gelu import BF16, FP16, NAMES, assert_no_worse, leaves_of, normal, results
from helpers.kernels import (
    DEVICE,
    assert_250_repeats_are_equal,
    assert_replays,
    assert_waits_for_nothing,
    interpreted,
    outer_run,
    run_in_the_interpreter,
)

# The package exports the function under the name of its module.
MODULE = sys.modules["deit_fast.kernels.bias_gelu_linear"]


@outer_run
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@interpreted
def test_the_separate_variant_equals_bias_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit."""
    monkeypatch.setattr(MODULE, "CHOICE", "separate")
    leaves, gradient = leaves_of((3, 43, 256), 64), normal(3, 43, 64, dtype=BF16)
    mine = results(bias_gelu_linear, leaves, gradient)
    other = results(
        lambda x, bias, weight, out_bias: F.linear(bias_gelu(x, bias), weight, out_bias),
        leaves, gradient,
    )  # fmt: skip
    for name, a, b in zip(NAMES, mine, other, strict=True):
        assert torch.equal(a, b), name


@interpreted
def test_rows_of_no_whole_16_bytes_are_not_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "CHOICE", "fused")
    assert_no_worse(leaves_of((9, 100), 64), normal(9, 64, dtype=BF16))
    assert_no_worse(leaves_of((9, 64), 10), normal(9, 10, dtype=BF16))


@pytest.mark.parametrize("fastest", range(1 + len(TILES)))
def test_the_fastest_variant_is_used(
    fastest: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = [0.3, 0.2, 0.25]
    times[fastest] = 0.1
    ran: list[Variant] = []

    def timed(run: Callable[[], object], return_mode: str) -> float:
        run()
        return times[len(ran) - 1]

    monkeypatch.setattr(triton.testing, "do_bench", timed)
    with caplog.at_level(logging.INFO, "deit_fast"):
        key = MODULE._key(torch.zeros(130, 64), torch.zeros(130, 256, dtype=BF16))
        fastest_variant = MODULE._measure(ran.append, key)
    assert ran == [None, *TILES] and fastest_variant == ran[fastest]
    assert len(caplog.messages) == 1 and "100" in caplog.messages[0]


def test_close_numbers_of_rows_share_a_measurement() -> None:
    def key(rows: int, hidden: int = 256, dtype: torch.dtype = BF16) -> Key:
        return MODULE._key(torch.zeros(rows, 64), torch.zeros(2, rows // 2, hidden, dtype=dtype))

    assert key(1100) == key(2000) and key(1000) != key(1100)
    assert key(1100) != key(1100, hidden=128) and key(1100) != key(1100, dtype=FP16)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEIT_FAST_MLP_BACKWARD", "fast")
    message = "DEIT_FAST_MLP_BACKWARD must be one of measure, fused, separate, not 'fast'"
    with pytest.raises(ValueError, match=message):
        runpy.run_module("deit_fast.kernels.bias_gelu_linear")


PLANNED = """
import torch, triton.compiler.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class H100:  # compiles for one and hands its arguments to `launched`
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda _: torch.device("cpu")

launched = []
kernel = triton.compiler.compiler.CompiledKernel
kernel._init_handles = kernel.launch_metadata = lambda *_: None
kernel.run = property(lambda _: lambda *arguments, **_: launched.append(arguments))
driver.set_active(H100())

from deit_fast.kernels.bias_gelu_linear import TILES, fused

def call():
    shapes = (2, 9, 64), (2, 9, 24), (24, 64)
    x, grad, weight = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    bias = torch.zeros(64)
    results = fused(grad, weight, x, bias, True, TILES[0])
    product, sums = launched
    launched.clear()
    return [grad, weight, x, results[0], bias], results[1], product, sums

def described(arguments):
    return [a for a in arguments if hasattr(a, "block_shape")]

calls = [call(), call()]
assert len(fused._plans) == 1
for (*matrices, bias), grad_bias, product, sums in calls:
    bases = [descriptor.base.data_ptr() for descriptor in described(product)]
    assert bases == [x.data_ptr() for x in matrices]
    pointers = [x.data_ptr() for x in product if torch.is_tensor(x)]
    assert len(pointers) == 2 and pointers[0] == bias.data_ptr()
    read, written = (x.data_ptr() for x in sums if torch.is_tensor(x))
    assert read == pointers[1] and written == grad_bias.data_ptr()
fields = [[vars(x) | {"base": None} for x in described(product)] for _, _, product, _ in calls]
assert fields[0] == fields[1] and len(fields[0]) == 4
"""


@outer_run
def test_a_planned_launch_describes_the_tensors_of_its_own_call() -> None:
    """Compiled, but not run: what reaches the launcher in the first call and in a planned one."""
    done = subprocess.run([sys.executable, "-c", PLANNED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


def batch(channels: int) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A call with its inputs on the device; returns (output and gradients, inputs)."""
    leaves = [x.requires_grad_() for x in leaves_of((64, 198, 4 * channels), channels)]
    gradient = normal(64, 198, channels, dtype=BF16)

    def call() -> list[Tensor]:
        with torch.autocast(DEVICE, BF16):
            y = bias_gelu_linear(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    return call, leaves


@pytest.mark.gpu
def test_a_gpu_measures_once_and_not_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[Key, Variant] = {}
    monkeypatch.setattr(MODULE, "CHOICE", "measure")
    monkeypatch.setattr(MODULE, "_measured", measured)
    call, leaves = batch(384)
    with monkeypatch.context() as capture:
        capture.setattr(MODULE, "CHOICE", "separate")
        call()  # compiles what the capture needs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    assert not measured
    call()
    fused = can_fuse(leaves[2].t(), leaves[0])
    assert len(measured) == fused
    kept = dict(measured)
    call()
    assert measured == kept


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ("fused", "separate"))
def test_250_repeats_are_equal(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHOICE", choice)
    assert_250_repeats_are_equal(batch(384)[0])


@pytest.mark.gpu
def test_no_call_waits_for_the_device() -> None:
    assert_waits_for_nothing(batch(384)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ("fused", "separate"))
def test_graph_replay_with_other_inputs(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHOICE", choice)
    call, leaves = batch(384)
    assert_replays(call, leaves)
