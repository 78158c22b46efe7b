"""How every kernel's test file runs it: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
APPROXIMATE = os.environ.get("DEIT_FAST_TEST_APPROXIMATE") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
outer_run = pytest.mark.skipif(INTERPRETED, reason="is the inner run")


def speed_the_interpreter() -> None:
    """Let Triton's interpreter do once what it does at every call or operation, with equal results.

    Of a test's time three quarters went into patching triton.language at every call of a function
    inside a kernel, into making types, and into an overflow check whose result nothing reads.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def patch_once(function: Callable[..., Any]) -> SimpleNamespace:
        patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    np_dtype_of, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        if dtype.name not in known:  # types of blocks and pointers have no hash
            known[dtype.name] = np_dtype_of(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = np_dtype
    # Shape and element type are all that a block type depends on; all but the handle of a tensor
    # depends on its type.
    share_attributes(tl.block_type, lambda element, shape: (element.name, *map(int, shape)))
    share_attributes(tl.tensor, lambda handle, type: type.name, own="handle")
    # Only an assertion in debug mode reads it.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def share_attributes(kind: Any, key: Callable[..., Any], own: str = "") -> None:
    """Let objects that are made with arguments of the same key share the values of all attributes
    but ``own``, which is the first argument.
    """
    make, known = kind.__init__, {}

    def init(self: Any, *arguments: Any) -> None:
        name = key(*arguments)
        if name not in known:
            make(self, *arguments)
            known[name] = {k: value for k, value in vars(self).items() if k != own}
        vars(self).update(known[name])
        if own:
            setattr(self, own, arguments[0])

    kind.__init__ = init


def approximate_in_the_interpreter(seed: int) -> None:
    """Give the interpreter's functions random errors as large as those of a GPU.

    Largest relative errors: `ex2.approx.ftz.f32` 2^-22, `div.full.f32` two units in the last place
    (PTX ISA), square roots and Triton's logarithms one. Powers of two divide exactly.
    """
    from triton.runtime import interpreter

    builder, draw = interpreter.InterpreterBuilder, np.random.default_rng(seed)
    least = np.finfo(np.float32).tiny

    def rough(exact: Any, error: float) -> Any:
        """Subnormal numbers become 0; 1 and what is not finite stay."""
        if exact.data.dtype != np.float32:
            return exact
        with np.errstate(all="ignore"):
            values = exact.data * (1 + draw.uniform(-error, error, exact.data.shape))
            values = np.where(np.isfinite(exact.data) & (exact.data != 1), values, exact.data)
            values = np.where(np.abs(exact.data) < least, 0, values).astype(np.float32)
        return interpreter.TensorHandle(values, exact.dtype)

    def function(name: str, error: float) -> None:
        exact = getattr(builder, name)
        setattr(builder, name, lambda self, x: rough(exact(self, x), error))

    for name, error in (
        ("create_exp2", 2**-22), ("create_sqrt", 2**-23),
        ("create_log", 2**-23), ("create_log2", 2**-23),
    ):  # fmt: skip
        function(name, error)
    divide = builder.create_fdiv

    def division(self: Any, x: Any, y: Any) -> Any:
        exact = divide(self, x, y)
        error = np.where(np.abs(np.frexp(y.data)[0]) == 0.5, 0, 2**-22)
        return rough(exact, np.broadcast_to(error, exact.data.shape))

    builder.create_fdiv = division


if INTERPRETED:
    if APPROXIMATE:
        approximate_in_the_interpreter(seed=0)
    speed_the_interpreter()


def run_in_the_interpreter(*arguments: str, approximate: bool = False) -> str:
    """pytest with these arguments, in a process where kernels are interpreted; what it printed.

    The interpreter has to be chosen before triton is imported.

    Args:
        approximate: see ``approximate_in_the_interpreter``.
    """
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        | {"DEIT_FAST_TEST_APPROXIMATE": str(int(approximate))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def laid_out(form: str, x: Tensor) -> Tensor:
    """The values of x in another memory layout, among NaN; "expanded" repeats the first value."""
    if form == "columns":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
    if form == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if form == "expanded":
        return x.flatten()[:1].expand(x.shape) if x.numel() else x
    if form == "misaligned":
        return F.pad(x.flatten(), (1, 3), value=torch.nan)[1 : 1 + x.numel()].view(x.shape)
    if form == "slice":
        return F.pad(x, (0, 8), value=torch.nan)[..., : x.shape[-1]]
    return x.clone()


Call = Callable[[], Sequence[Tensor]]


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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


# ---------------------------------------------------------------------------------------------
# Accesses to memory, in Triton's interpreter
# ---------------------------------------------------------------------------------------------


class Accesses:
    """Addresses that the interpreter read and wrote, one entry per element."""

    def __init__(self) -> None:
        self.reads: list[np.ndarray] = []
        self.writes: list[np.ndarray] = []

    @staticmethod
    def counts(events: list[np.ndarray], x: Tensor) -> np.ndarray:
        """How often each element of x was touched, in the shape of x."""
        touched = np.concatenate(events) if events else np.zeros(0, np.int64)
        index = np.zeros(tuple(x.shape), np.int64)
        for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
            shape = [1] * x.dim()
            shape[axis] = size
            index = index + np.arange(size).reshape(shape) * stride
        address = x.data_ptr() + index * x.element_size()
        values, counts = np.unique(touched, return_counts=True)
        table = dict(zip(values.tolist(), counts.tolist(), strict=True))
        return np.vectorize(lambda a: table.get(a, 0))(address)

    @staticmethod
    def outside(events: list[np.ndarray], tensors: list[Tensor]) -> int:
        """Accesses that lie in none of the storages."""
        touched = np.concatenate(events) if events else np.zeros(0, np.int64)
        inside = np.zeros(touched.shape, bool)
        for x in tensors:
            start = x.untyped_storage().data_ptr()
            inside |= (touched >= start) & (touched < start + x.untyped_storage().nbytes())
        return int((~inside).sum())


@contextmanager
def recorded() -> Iterator[Accesses]:
    from triton.runtime import interpreter

    builder, seen = interpreter.interpreter_builder, Accesses()
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(events: list[np.ndarray], pointers: Any, mask: Any) -> None:
        events.append(np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)].astype(np.int64))

    def counting_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note(seen.reads, pointers, mask)
        return load(pointers, mask, *rest, **named)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(seen.writes, pointers, mask)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield seen
    finally:
        del builder.create_masked_load, builder.create_masked_store
