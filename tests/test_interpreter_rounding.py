"""Triton's interpreter rounds float32 to bfloat16 toward zero; GPUs round to nearest.

A bfloat16 result of an interpreted kernel is therefore up to one unit in the last place off, which
is twice the error of a GPU, and biased. The bounds of the kernels' tests allow for it: they are two
units, or twice PyTorch's error. If this test fails, the interpreter rounds as a GPU does, and the
bounds can be halved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from helpers.kernels import interpreted, outer_run, run_in_the_interpreter


@outer_run
def test_in_the_interpreter() -> None:
    assert "1 passed" in run_in_the_interpreter(__file__)


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
