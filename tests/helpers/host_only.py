"""A Triton driver that launches nothing: what is left of a call is its time on the host.

Kernels are compiled for sm_90 as ever, and their arguments bound, and recorded instead of run.
Import it in a separate process, before a kernel is launched: it replaces Triton's driver.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

launches: list[tuple[Any, ...]] = []  # of each launch its grid and arguments, while `recording`
recording = False


class _Driver:
    """What Triton's launcher asks of a driver, for tensors on the CPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def _launch(*arguments: Any, **_: Any) -> None:
    if recording:
        # Between them: stream, function, metadata and hooks.
        launches.append((arguments[:3], arguments[9:]))


def install() -> None:
    driver.set_active(_Driver())
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.run = property(lambda self: _launch)
    CompiledKernel.launch_metadata = lambda self, *_: None


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


def bare_launch() -> Callable[[], Any]:
    """The unit of host time: one launch of a kernel with four arguments."""
    x, y = torch.zeros(1024), torch.zeros(1024)
    return lambda: _copy[(1,)](x, y, 1024, BLOCK=1024, num_warps=4)


def in_launches(calls: dict[str, Callable[[], Any]], rounds: int = 150) -> dict[str, float]:
    """Host time of each call in bare launches: the least of several rounds that take turns.

    A busy machine makes single rounds longer, not the shortest of them.
    """
    calls = {"bare": bare_launch(), **calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(4):
                call()
            times[name].append(time.perf_counter() - start)
    least = {name: min(seen) for name, seen in times.items()}
    return {name: seconds / least["bare"] for name, seconds in least.items() if name != "bare"}


def python_calls(calls: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """How many functions, of Python and C, one of many calls enters."""
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        entered = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal entered
            entered += event in ("call", "c_call")

        gc.disable()  # its callbacks come at any time
        sys.setprofile(count)
        call()
        sys.setprofile(None)
        gc.enable()
        counts[name] = entered
    return counts


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def operators() -> dict[str, tuple[Callable[..., Any], Callable[[], list[torch.Tensor]]]]:
    """Every operator with planned launches, as inductor calls it, and a maker of its tensors."""
    ops, half = torch.ops.deit_fast, torch.bfloat16
    rows, wide = (2, 16, 128), (2, 16, 512)

    def heads(tokens: int) -> list[torch.Tensor]:
        return [
            _randn(2, tokens, 2, 64, dtype=half), _randn(2, tokens, 3, 2, 64, dtype=half),
            _randn(2, tokens, 2, 64, dtype=half), _randn(2, 2, tokens),
        ]  # fmt: skip

    def loss(classes: int, padded: int) -> list[torch.Tensor]:
        logits = [_randn(4, padded, dtype=half)[:, :classes] for _ in range(3)]
        return [*logits, torch.randint(9, (4,)), torch.randint(9, (4,)), torch.rand(4)]

    def run_loss(z_c: Any, z_d: Any, teacher: Any, first: Any, second: Any, lam: Any) -> Any:
        return ops.distillation_loss_and_gradients(
            z_c, z_d, first, second, lam, teacher, None, None, None, "drop", "soft", "ce",
            "batchmean", 0.5, 3.0, 0.1, True, True,
        )  # fmt: skip

    def norm_backward(needed: list[bool]) -> Callable[..., Any]:
        return lambda g, n, x, w, b, k, m, s: ops.add_layer_norm_backward(
            g, n, x, None, w, b, None, k, m, s, half, needed, None
        )

    def norm_gradients() -> list[torch.Tensor]:
        vectors = [_randn(128), _randn(128), torch.rand(2), _randn(32), _randn(32)]
        return [_randn(*rows), _randn(*rows, dtype=half), _randn(*rows), *vectors]

    return {
        "attention forward": (lambda q: ops.attention_forward(q, 0.125), lambda: heads(198)[1:2]),
        "attention forward, 577 tokens": (
            lambda q: ops.attention_forward(q, 0.125), lambda: heads(577)[1:2]
        ),
        "attention backward": (
            lambda g, q, o, s: ops.attention_backward(g, q, o, s, 0.125), lambda: heads(198)
        ),
        "attention backward, 577 tokens": (
            lambda g, q, o, s: ops.attention_backward(g, q, o, s, 0.125), lambda: heads(577)
        ),
        "attention backward, bias": (
            lambda g, q, o, s, b: ops.attention_backward(g, q, o, s, 0.125, b),
            lambda: [*heads(198), _randn(128)],
        ),
        "add_layer_norm forward": (
            lambda x, y, w, b, k: ops.add_layer_norm_forward(
                x, y, w, b, None, k, 1e-6, half, True
            ),
            lambda: [_randn(*rows), _randn(*rows, dtype=half), _randn(128), _randn(128),
                     torch.rand(2)],
        ),
        "add_layer_norm forward, no branch": (
            lambda x, w, b: ops.add_layer_norm_forward(
                x, None, w, b, None, None, 1e-6, half, True
            ),
            lambda: [_randn(*rows), _randn(128), _randn(128)],
        ),
        "add_layer_norm backward": (norm_backward([True] * 4 + [False] * 2), norm_gradients),
        "bias_gelu forward": (
            ops.bias_gelu_forward, lambda: [_randn(*wide, dtype=half), _randn(512)]
        ),
        "bias_gelu backward": (
            lambda g, x, b: ops.bias_gelu_backward(g, x, b, True, True),
            lambda: [_randn(*wide, dtype=half), _randn(*wide, dtype=half), _randn(512)],
        ),
        "distillation_loss and gradients": (run_loss, lambda: loss(1000, 1000)),
        "distillation_loss and gradients, padded rows": (run_loss, lambda: loss(1001, 1008)),
        "ingest": (
            lambda *tensors: ops.ingest(*tensors, half, "nchw", 16),
            lambda: [
                torch.zeros(4, 32, 32, 3, dtype=torch.uint8),
                torch.zeros(4, 22, dtype=torch.int32), _randn(256, 3), _randn(65536),
            ],
        ),
        "scale_gradients_": (
            lambda c, d, g: ops.scale_gradients_(c, d, g, 1.0, 1.0),
            lambda: [_randn(4, 1000, dtype=half), _randn(4, 1000, dtype=half), torch.ones(())],
        ),
    }  # fmt: skip
