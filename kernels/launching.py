"""What the launchers of all kernels share: dtypes, registering operators, signatures to compile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels read and write
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS = TYPE_NAMES | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


def refusal(capability: tuple[int, int]) -> str | None:
    """Why GPUs of this compute capability do not run the kernels; None: they do."""
    if capability >= (8, 0):
        return None
    found = ".".join(map(str, capability))
    return f"compute capability {found}: Triton's bfloat16 and asynchronous copies need 8.0"


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    reason = refusal(torch.cuda.get_device_capability(device))
    if reason is not None:
        name = torch.cuda.get_device_name(device)
        logging.getLogger(__name__).warning("%s takes plain PyTorch: %s", name, reason)
    return reason is None


@torch.compiler.assume_constant_result
def _is_new_enough(device: torch.device) -> bool:
    return _runs_kernels(device)


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU that runs the kernels; says once of one that does not, and why."""
    return x.is_cuda and _is_new_enough(x.device)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of two matrices in a dtype; float32 is not rounded in between on a GPU."""
    if on_gpu(a) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def implement(
    library: torch.library.Library, name: str, function: Callable, fake: Callable
) -> None:
    """One implementation for CPU and CUDA, and the shapes of its results for tracing."""
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"deit_fast::{name}", fake, lib=library)


def signature(
    function: Any, values: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Types, constants and alignments that Triton's launcher would find for these values.

    Upper-case arguments are constants. Tensors may be on the meta device: their start then counts
    as aligned, as the allocator's is.
    """
    fixed = {p.name for p in function.params if p.do_not_specialize}
    types, constants, aligned = {}, {}, {}
    for name in function.arg_names:
        value = values[name]
        if value is None or name.isupper():
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = f"*{_POINTERS[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned[name] = 16
        elif isinstance(value, TensorDescriptor):
            tile = ", ".join(map(str, value.block_shape))
            types[name] = f"tensordesc<{_POINTERS[value.base.dtype]}[{tile}]>"
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and name not in fixed:
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "i32"
            if name not in fixed and value % 16 == 0:
                aligned[name] = 16
    return types, constants, aligned


Inputs = Sequence[Tensor | None]


class Launch(NamedTuple):
    """A kernel with its grid, and by name all its arguments and the options of the launch."""

    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        return self.function[self.grid](**self.arguments)


class _Step(NamedTuple):
    """A planned launch."""

    run: Callable[..., None]  # the compiled kernel with its grid
    arguments: list[Any]  # by position, None where a tensor goes
    places: tuple[tuple[int, int], ...]  # (position of the argument, number of the tensor)
    # The same with a tensor descriptor's fields, all but its tensor.
    described: tuple[tuple[int, int, dict[str, Any]], ...]


class _Plan(NamedTuple):
    """The launches of one call. Tensors count from the inputs over the results to the scratch."""

    results: int
    new: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # of results and scratch
    steps: list[_Step]


def _allocators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(shape, strides, dtype) to a tensor without values, on the CPU and on the current GPU.

    Those that inductor's generated code calls take half the time of torch.empty_strided, which
    takes half the time of new_empty. They have no public name.
    """

    def public(device: str) -> Callable[..., Tensor]:
        return lambda shape, strides, dtype: torch.empty_strided(
            shape, strides, dtype=dtype, device=device
        )

    guards: Any = torch._C._dynamo.guards
    return (
        getattr(guards, "_empty_strided_cpu", public("cpu")),
        getattr(guards, "_empty_strided_cuda", public("cuda")),
    )


_empty_on_cpu, _empty_on_cuda = _allocators()

_MOST_PLANS = 512  # of an operator: kinds of arguments; further ones are launched without a plan


def _kind_of(x: Tensor | None) -> tuple | None:
    """All of a tensor that a launch depends on, but for its address."""
    if x is None:
        return None
    return x.dtype, x.shape, x.stride(), x.data_ptr() & 15


class Plans:
    """The launches of one operator, worked out once for each kind of arguments.

    The first call with tensors of these dtypes, shapes, strides and alignments takes the launches
    from ``make`` and runs them through Triton's launcher. The plan keeps the compiled kernels and
    their arguments by position; later calls put new addresses in. This removes the host time of
    working out arguments, of binding them by name and of looking up the compiled kernel.

    Not planned, but launched through ``make`` each time: calls with an argument that ``make``
    copied, calls where two arguments have one address, and all calls under Triton's interpreter.

    Args:
        results: (inputs, *constants) to the operator's results, new tensors without values.
        make: (inputs, results, *constants) to the launches, in their order. Tensors in their
            arguments are inputs, results, or float32 scratch under a name that ends in ``_sums``;
            an argument may also be a host's descriptor of one.
    """

    def __init__(
        self, results: Callable[..., Sequence[Tensor]], make: Callable[..., Iterable[Launch]]
    ) -> None:
        self._results, self._make = results, make
        self._plans: dict[tuple, _Plan] = {}

    def clear(self) -> None:
        """Forget all plans: something that ``make`` reads has changed."""
        self._plans.clear()

    def __call__(self, inputs: Inputs, *constants: Any) -> tuple[Tensor, ...]:
        """Results of the operator. The first input is not None; all are on its device."""
        first: Any = inputs[0]
        index = first.get_device()  # -1: CPU
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(inputs, *constants)
        key = (constants, index, *map(_kind_of, inputs))
        plan = self._plans.get(key)
        if plan is None:
            return self._run_unplanned(key, inputs, constants)
        empty = _empty_on_cpu if index < 0 else _empty_on_cuda
        new = [empty(shape, strides, dtype) for shape, strides, dtype in plan.new]
        tensors = [*inputs, *new]
        for run, arguments, places, described in plan.steps:
            arguments = arguments.copy()
            for place, number in places:
                arguments[place] = tensors[number]
            for place, number, fields in described:
                descriptor = object.__new__(TensorDescriptor)  # its constructor checks again
                descriptor.__dict__.update(fields, base=tensors[number])
                arguments[place] = descriptor
            run(*arguments)
        return tuple(new[: plan.results])

    def _run_unplanned(self, key: tuple, inputs: Inputs, constants: tuple) -> tuple[Tensor, ...]:
        results = tuple(self._results(inputs, *constants))
        recorder = _Recorder([*inputs, *results])
        for launch in self._make(inputs, results, *constants):
            recorder.add(launch, launch())
        if recorder.is_complete and len(self._plans) < _MOST_PLANS:
            new = [(tuple(x.shape), x.stride(), x.dtype) for x in (*results, *recorder.scratch)]
            self._plans[key] = _Plan(len(results), new, recorder.steps)
        return results


class _Recorder:
    """Turns launches that were made into steps of a plan."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        used = [(x.data_ptr(), i) for i, x in enumerate(tensors) if x is not None and x.numel()]
        self.numbers, self.count = dict(used), len(tensors)
        self.steps: list[_Step] = []
        self.scratch: list[Tensor] = []
        # One address for two arguments says nothing about the next call's.
        self.is_complete = len(self.numbers) == len(used)

    def add(self, launch: Launch, compiled: Any) -> None:
        """A launch, and what Triton's launcher returned: the compiled kernel."""
        if not hasattr(compiled, "function"):
            self.is_complete = False  # the interpreter compiles nothing
        if not self.is_complete:
            return
        arguments, places, described = [], [], []
        for position, name in enumerate(launch.function.arg_names):
            value = launch.arguments[name]
            has_address = isinstance(value, (Tensor, TensorDescriptor))
            arguments.append(None if has_address else value)
            if not has_address:
                continue
            is_tensor = isinstance(value, Tensor)
            number = self._number_of(name, value if is_tensor else value.base)
            if number is None:
                self.is_complete = False
                return
            if is_tensor:
                places.append((position, number))
            else:
                described.append((position, number, vars(value) | {"base": None}))
        x, y, z = (*launch.grid, 1, 1)[:3]
        run = compiled[x, y, z]
        self.steps.append(_Step(run, arguments, tuple(places), tuple(described)))

    def _number_of(self, name: str, value: Tensor) -> int | None:
        """Number of a tensor, a new one for scratch; None for a copy."""
        known = self.numbers.get(value.data_ptr())
        if known is not None:
            return known
        if value.dtype != torch.float32 or not name.endswith("_sums"):
            return None
        self.scratch.append(value)
        return self.numbers.setdefault(value.data_ptr(), self.count + len(self.scratch) - 1)
