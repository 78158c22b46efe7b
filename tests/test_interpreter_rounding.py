"""How the interpreter's numbers differ from those of a GPU, for which the kernels' tests allow.

Its functions are exact to half a unit in the last place, those of a GPU to two units. The bounds of
the tests on a GPU are tried here with errors of that size.

Triton's interpreter rounds float32 to bfloat16 toward zero; GPUs round to nearest.

A bfloat16 result of an interpreted kernel is therefore up to one unit in the last place off, which
is twice the error of a GPU, and biased. The bounds of the kernels' tests allow for it: they are two
units, or twice PyTorch's error. If this test fails, the interpreter rounds as a GPU does, and the
bounds can be halved.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from helpers.kernels import interpreted, outer_run, run_in_the_interpreter


@outer_run
def test_in_the_interpreter() -> None:
    assert "1 passed" in run_in_the_interpreter(__file__)


@outer_run
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("attention", 30), ("add_layer_norm", 35), ("bias_gelu", 30), ("bias_gelu_linear", 16),
        ("distillation_loss_kernel", 46),
    ],
)  # fmt: skip
def test_bounds_hold_with_the_errors_of_a_gpus_functions(name: str, least: int) -> None:
    file = str(Path(__file__).with_name(f"test_{name}.py"))
    out = run_in_the_interpreter(file, "-k", "test_accuracy", approximate=True)
    (passed,) = re.findall(r"(\d+) passed", out)
    assert int(passed) >= least


@triton.jit
def rounding_kernel(x, y, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


@interpreted
def test_the_interpreter_truncates() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    y = torch.empty(4096, dtype=torch.bfloat16)
    rounding_kernel[(1,)](x, y, COUNT=4096)
    truncated = (x.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(y.float(), truncated)
    assert not torch.equal(y, x.bfloat16())
