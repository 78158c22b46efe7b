"""Operators, launches, and plans that make the next launch of the same kind cheap on the host.

A launcher is a function that allocates its results and calls `launch` once per kernel:

    @planned
    def _forward(x: Tensor, bias: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        launch(forward_kernel, grid, x=x, bias=bias, out=out, C=x.shape[-1], num_warps=4)
        return out

    forward_op = operator("bias_gelu_forward(Tensor x, Tensor bias) -> Tensor", _forward, fake)

The ahead-of-time gate calls the same launcher with tensors on the meta device inside `recording`,
and compiles the kernels that the launcher would have launched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels read and write
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU

# ---------------------------------------------------------------------------------------------
# Which tensors the kernels accept
# ---------------------------------------------------------------------------------------------


def refusal(capability: tuple[int, int]) -> str | None:
    """Why GPUs of this compute capability do not run the kernels; None if they do."""
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
    """Whether x is on a GPU that runs the kernels; warns once for each GPU that does not."""
    return x.is_cuda and _is_new_enough(x.device)


def can_run(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels run on x's device (a GPU; in the interpreter a CPU) and on all dtypes."""
    if not (INTERPRETED or on_gpu(x)):
        return False
    return all(y is None or y.dtype in DTYPES for y in (x, *others))


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's backward whose result cannot be differentiated again.

    It refuses ``create_graph=True``, which torch.compile refuses itself. ``once_differentiable``
    goes on: where ``torch.autograd.grad`` asks for the second derivative to some tensors only, it
    leaves out this Function's part of it and raises nothing.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "deit_fast's kernels have no second derivative, so no create_graph=True: call "
                "deit_fast.unfuse(model) first, and use a loss of plain PyTorch"
            )
        return backward(ctx, *gradients)

    return checked


_library = torch.library.Library("deit_fast", "FRAGMENT")


def operator(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    autograd: type[torch.autograd.Function] | None = None,
) -> Any:
    """Define ``deit_fast::NAME`` for CPU and CUDA tensors.

    Args:
        schema: "NAME(Tensor x, ...) -> ...", in the syntax of ``torch.library``.
        function: the implementation. With ``autograd`` it consists of other operators.
        fake: makes the results without values, for tracing; default: ``function`` itself.
        autograd: runs instead of ``function`` where an argument requires a gradient.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"deit_fast::{name}", fake or function, lib=_library)
    op = getattr(torch.ops.deit_fast, name).default
    if autograd is None:
        return op
    defaults = [argument.default_value for argument in op._schema.arguments]

    def differentiable(*arguments: Any) -> Any:
        arguments += tuple(defaults[len(arguments) :])  # the dispatcher leaves defaults out
        needs_gradient = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        if needs_gradient and torch.is_grad_enabled():
            return autograd.apply(*arguments)
        return function(*arguments)

    _library.impl(name, differentiable, "Autograd")
    return op


# ---------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel with its grid, and by name its arguments and options (num_warps, num_stages)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        """Launch it on the current device. Returns the compiled kernel."""
        return self.kernel[self.grid](**self.arguments)


class Recording(NamedTuple):
    """What `launch` and `scratch` were called with, in their order."""

    launches: list[Launch]
    scratch: list[Tensor]


class _State(threading.local):
    recording: Recording | None = None


_state = _State()


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Inside, `launch` notes launches and does not make them."""
    before, _state.recording = _state.recording, Recording([], [])
    try:
        yield _state.recording
    finally:
        _state.recording = before


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel on the current device.

    Args:
        arguments: those of the kernel, and options of Triton's launcher.
    """
    made = Launch(kernel, grid, arguments)
    if _state.recording is None:
        made()
    else:
        _state.recording.launches.append(made)


def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory without values, on the device of ``like``, that only the launches of a call use."""
    made = like.new_empty(shape, dtype=dtype)
    if _state.recording is not None:
        _state.recording.scratch.append(made)
    return made


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A planned launch."""

    run: Callable[..., None]  # the compiled kernel with its grid
    arguments: list[Any]  # by position; None stands for a tensor
    tensors: tuple[tuple[int, int], ...]  # (position of the argument, index of the tensor)
    # (position, index of the tensor, all other fields) of each tensor descriptor
    descriptors: tuple[tuple[int, int, dict[str, Any]], ...]


class _Plan(NamedTuple):
    """The launches of one call. A tensor's index counts arguments, then results, then scratch."""

    results: int | None  # how many; None: one tensor, not in a tuple
    new: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # results and scratch
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

_MAX_PLANS = 512  # per launcher; calls of further kinds run without a plan

_all_plans: list[dict[tuple, _Plan]] = []


def clear_plans() -> None:
    """Drop the plans of all launchers, because something else that they read has changed."""
    for plans in _all_plans:
        plans.clear()


P = ParamSpec("P")
T = TypeVar("T")


class planned(Generic[P, T]):
    """A launcher that keeps its launches for later calls of the same kind.

    The first call with tensors of these dtypes, shapes, strides and alignments, and with these
    other arguments, runs the function. The plan of this call holds the compiled kernels and their
    arguments by position. A later call allocates the results and the scratch memory, and puts the
    new addresses into the plan: it does not work out arguments, bind them by name or look up the
    compiled kernel.

    The function allocates its results and `scratch`, calls `launch`, and does nothing else on the
    device. Its launches run after it returns. All its arguments are positional; its tensors are on
    one device; its other arguments are hashable, or lists of hashable values.

    Runs without a plan: a call that passes a copy of an argument to a kernel, that has two
    arguments at one address, or that launches nothing; all calls in Triton's interpreter.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self.function = function
        self._plans: dict[tuple, _Plan] = {}
        _all_plans.append(self._plans)

    def __call__(self, *arguments: P.args, **_: P.kwargs) -> T:
        if _state.recording is not None:
            return self.function(*arguments, **_)
        index = -1  # CPU
        for x in arguments:
            if isinstance(x, Tensor):
                index = x.get_device()
                break
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(*arguments, **_)
        kinds = [
            (x.dtype, x.shape, x.stride(), x.data_ptr() & 15)
            if isinstance(x, Tensor)
            else (x if type(x) is not list else tuple(x))
            for x in arguments
        ]
        key = (index, *kinds)
        plan = self._plans.get(key)
        if plan is None:
            return self._run_unplanned(key, arguments)
        empty = _empty_on_cpu if index < 0 else _empty_on_cuda
        new = [empty(shape, strides, dtype) for shape, strides, dtype in plan.new]
        available = [*arguments, *new]
        for run, values, tensors, descriptors in plan.steps:
            values = values.copy()
            for position, number in tensors:
                values[position] = available[number]
            for position, number, fields in descriptors:
                descriptor = object.__new__(TensorDescriptor)  # its constructor checks again
                descriptor.__dict__.update(fields, base=available[number])
                values[position] = descriptor
            run(*values)
        if plan.results is None:
            return new[0]  # type: ignore[return-value]
        return tuple(new[: plan.results]) or None  # type: ignore[return-value]

    def _run_unplanned(self, key: tuple, arguments: tuple[Any, ...]) -> T:
        with recording() as recorded:
            results = self.function(*arguments)  # type: ignore[call-arg]
        compiled = [made() for made in recorded.launches]
        if len(self._plans) < _MAX_PLANS:
            plan = _plan_of(arguments, results, recorded, compiled)
            if plan is not None:
                self._plans[key] = plan
        return results


def _plan_of(
    arguments: tuple[Any, ...], results: Any, recorded: Recording, compiled: list[Any]
) -> _Plan | None:
    """The plan of a call, or None if its launches say too little about another call's."""
    # The interpreter compiles nothing.
    if not recorded.launches or not all(hasattr(kernel, "function") for kernel in compiled):
        return None
    is_tensor = isinstance(results, Tensor)
    returned = (results,) if is_tensor else tuple(results or ())
    new = [*returned, *recorded.scratch]
    addresses = [
        (x.data_ptr(), number)
        for number, x in enumerate((*arguments, *new))
        if isinstance(x, Tensor) and x.numel()
    ]
    numbers = dict(addresses)
    if len(numbers) != len(addresses):
        return None
    steps = []
    for made, kernel in zip(recorded.launches, compiled, strict=True):
        values, tensors, descriptors = [], [], []
        for position, name in enumerate(made.kernel.arg_names):
            value = made.arguments[name]
            base = value.base if isinstance(value, TensorDescriptor) else value
            if not isinstance(base, Tensor):
                values.append(value)
                continue
            values.append(None)
            number = numbers.get(base.data_ptr())
            if number is None:  # a copy of an argument
                return None
            if base is value:
                tensors.append((position, number))
            else:
                descriptors.append((position, number, vars(value) | {"base": None}))
        x, y, z = (*made.grid, 1, 1)[:3]
        steps.append(_Step(kernel[x, y, z], values, tuple(tensors), tuple(descriptors)))
    layouts = [(tuple(x.shape), x.stride(), x.dtype) for x in new]
    return _Plan(None if is_tensor else len(returned), layouts, steps)
