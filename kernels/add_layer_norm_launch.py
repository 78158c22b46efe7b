"""Launcher and operators of the add_layer_norm kernels.

``deit_fast::add_layer_norm`` is the differentiable operator; it calls
``deit_fast::add_layer_norm_forward``, which also returns the statistics of the rows, and in its
backward ``deit_fast::add_layer_norm_backward``. An output that is not wanted is an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import add_layer_norm_kernel as kernel
from .launching import DTYPES, TYPE_NAMES, Launch, Plans, implement, on_gpu, signature

MOST_CHANNELS = 4096  # a longer row does not fit in the registers of its program
# Partial rows of the weight gradients: 4 programs a processor are all at work at the same time, and
# writing and reading their rows is 1.7 % of the backward's traffic for [256, 198, 384] on an H100.
PROGRAMS_PER_PROCESSOR = 4
SUM_COLS, SUM_ROWS = 16, 128
_SUMS = ("weight_sums", "bias_sums", "gamma_sums", "branch_bias_sums")

INTERPRETED = not isinstance(kernel.forward_kernel, triton.JITFunction)


def takes(residual: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels do this call: on a GPU, or on the CPU with TRITON_INTERPRET=1."""
    if not (INTERPRETED or on_gpu(residual)) or residual.shape[-1] > MOST_CHANNELS:
        return False
    return all(x is None or x.dtype in DTYPES for x in (residual, *others))


# ---------------------------------------------------------------------------------------------
# Layout and launch shapes
# ---------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """[..., C] as [rows, C], neighbouring channels side by side: a view, or else one copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def common_vector(channels: int, *rows: Tensor | None) -> int:
    """Power of two, 16 at most, that divides the start of every row of contiguous and given rows.

    16-byte accesses need 8 for two-byte and 4 for four-byte elements.
    """
    numbers = [channels, *(x.stride(0) for x in rows if x is not None), 16]
    return min(number & -number for number in numbers if number)


@functools.cache
def programs_of(device: torch.device) -> int:
    """Most partial rows; a constant of the device, so that sums are the same in every run."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_PROCESSOR * count


def _shape(channels: int, elements: int, per_thread: int) -> tuple[dict[str, int], int]:
    """BLOCK and ROWS of a program with about this many elements, and its number of warps."""
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, min(elements // block, 64))
    return {"BLOCK": block, "ROWS": rows}, max(4, block // (32 * per_thread))


def forward_shape(channels: int) -> tuple[dict[str, int], int]:
    """Long rows come two or more to a program: weight, bias and gamma are read for each program."""
    return _shape(channels, 4096 if channels > 512 else 2048, 16)


def backward_shape(channels: int, narrow: bool) -> tuple[dict[str, int], int]:
    """At most 128 registers: 4 programs of 4 warps are then on a processor all the time.

    ``narrow``: half as much per thread, where a gradient of gamma or a float32 residual stream
    takes registers of its own.
    """
    per_thread = 8 if narrow else 16
    return _shape(channels, 128 * per_thread, per_thread)


def _forward_arguments(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[dict[str, Any], int, dict[str, int]]:  # fmt: skip
    """All arguments of the forward kernel, the number of its programs, its launch options."""
    samples = residual.shape[0]
    x = as_rows(residual)
    added = None if branch is None else as_rows(branch)
    rows, channels = x.shape
    shape, warps = forward_shape(channels)
    residual_out, normed, mean, rstd = outputs
    values: dict[str, Any] = {"residual": x, "branch": added, "normed": normed}
    values |= {"residual_out": None if branch is None else residual_out}
    values |= {"weight": weight.contiguous(), "bias": bias.contiguous()}
    values |= {"gamma": None if gamma is None else gamma.contiguous()}
    values |= {"keep_scale": None if keep_scale is None else keep_scale.contiguous()}
    values |= {"mean": mean if mean.numel() else None, "rstd": rstd if rstd.numel() else None}
    values |= {"rows": rows, "rows_per_sample": rows // samples, "eps": eps}
    values |= {"residual_stride": x.stride(0)}
    values |= {"branch_stride": 0 if added is None else added.stride(0)}
    values |= {"C": channels, "VEC": common_vector(channels, x, added), **shape}
    return values, triton.cdiv(rows, shape["ROWS"]), {"num_warps": warps, "num_stages": 1}


def _backward_arguments(
    grad_residual_out: Tensor | None, grad_normed: Tensor | None, x: Tensor,
    branch: Tensor | None, weight: Tensor, gamma: Tensor | None, keep_scale: Tensor | None,
    mean: Tensor, rstd: Tensor, outputs: tuple[Tensor, ...], most_programs: int,
) -> tuple[dict[str, Any], int, dict[str, int]]:  # fmt: skip
    """All arguments of the backward kernel, the number of its programs, its launch options."""
    samples = x.shape[0]
    tensors = {"grad_residual_out": grad_residual_out, "grad_normed": grad_normed}
    tensors |= {"x": x, "branch": branch}
    values: dict[str, Any] = {
        name: None if value is None else as_rows(value) for name, value in tensors.items()
    }
    (rows, channels), vector = values["x"].shape, common_vector(x.shape[-1], *values.values())
    for name in tensors:
        values[f"{name}_stride"] = 0 if values[name] is None else values[name].stride(0)
    more_sums = outputs[4].numel() > 0 or outputs[5].numel() > 0
    shape, warps = backward_shape(channels, more_sums or x.dtype.itemsize == 4)
    tiles = triton.cdiv(rows, shape["ROWS"])
    programs = min(tiles, most_programs)
    if grad_normed is None:
        values["x"] = None
    values |= {"weight": weight.contiguous(), "mean": mean, "rstd": rstd}
    values |= {"gamma": None if gamma is None else gamma.contiguous()}
    values |= {"keep_scale": None if keep_scale is None else keep_scale.contiguous()}
    for name, output in zip(("grad_residual", "grad_branch"), outputs[:2], strict=True):
        values[name] = output if output.numel() else None
    wanted = [output.numel() > 0 for output in outputs[2:]]
    sums = iter(x.new_empty((sum(wanted), programs, channels), dtype=torch.float32))
    for name, is_wanted in zip(_SUMS, wanted, strict=True):
        values[name] = next(sums) if is_wanted else None
    values |= {"rows": rows, "rows_per_sample": rows // samples, "tiles": tiles}
    values |= {"C": channels, "VEC": vector, **shape}
    return values, programs, {"num_warps": warps, "num_stages": 1}


def _sum_arguments(
    values: dict[str, Any], programs: int, outputs: tuple[Tensor, ...]
) -> tuple[dict[str, Any], dict[str, int]]:
    """All arguments of the summing kernel after a backward with these values."""
    names = ("grad_weight", "grad_bias", "grad_gamma", "grad_branch_bias")
    result = {name: values[name] for name in (*_SUMS, "C")}
    for name, output in zip(names, outputs[2:], strict=True):
        result[name] = output if output.numel() else None
    result |= {"count": programs, "COLS": SUM_COLS, "ROWS": SUM_ROWS}
    return result, {"num_warps": 4, "num_stages": 1}


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------

_library = torch.library.Library("deit_fast", "FRAGMENT")
_ARGUMENTS = (
    "Tensor residual, Tensor? branch, Tensor weight, Tensor bias, Tensor? gamma, "
    "Tensor? keep_scale, float eps, ScalarType normed_dtype"
)
_library.define(f"add_layer_norm({_ARGUMENTS}, Tensor? branch_bias=None) -> (Tensor, Tensor)")
_library.define(
    f"add_layer_norm_forward({_ARGUMENTS}, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "add_layer_norm_backward(Tensor? grad_residual_out, Tensor? grad_normed, Tensor x, "
    "Tensor? branch, Tensor weight, Tensor bias, Tensor? gamma, Tensor? keep_scale, Tensor mean, "
    "Tensor rstd, ScalarType branch_dtype, bool[] wanted, "
    "ScalarType? branch_bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _outputs(
    residual: Tensor, branch: Tensor | None, normed_dtype: torch.dtype, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = residual.shape[:-1].numel() if statistics else 0
    residual_out = residual.new_empty((0,) if branch is None else residual.shape)
    normed = residual.new_empty(residual.shape, dtype=normed_dtype)
    mean, rstd = (residual.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    return residual_out, normed, mean, rstd


def _forward(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, normed_dtype: torch.dtype, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if residual.numel() == 0:
        return _outputs(residual, branch, normed_dtype, statistics)
    inputs = (residual, branch, weight, bias, gamma, keep_scale)
    return _forward_plans(inputs, eps, normed_dtype, statistics)  # type: ignore[return-value]


def _forward_results(inputs: Any, _: float, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(*inputs[:2], *rest)


def _forward_launches(inputs: Any, outputs: Any, eps: float, *_: Any) -> Iterator[Launch]:
    residual, branch, weight, bias, gamma, keep_scale = inputs
    values, programs, options = _forward_arguments(
        residual, branch, weight, bias, gamma, keep_scale, eps, outputs
    )
    yield Launch(kernel.forward_kernel, (programs,), values | options)


_forward_plans = Plans(_forward_results, _forward_launches)


def _forward_fake(residual, branch, *rest):  # type: ignore[no-untyped-def]
    return _outputs(residual, branch, *rest[-2:])


def _gradients(
    x: Tensor, weight: Tensor, bias_dtype: torch.dtype, gamma: Tensor | None,
    branch_dtype: torch.dtype, wanted: Sequence[bool], branch_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Empty gradients of residual, branch, weight, bias, gamma and branch_bias.

    Those that are not wanted have no elements.
    """
    gamma_dtype = weight.dtype if gamma is None else gamma.dtype
    branch_bias_dtype = branch_bias_dtype or weight.dtype
    dtypes = (x.dtype, branch_dtype, weight.dtype, bias_dtype, gamma_dtype, branch_bias_dtype)
    shapes = (x.shape, x.shape, *(weight.shape,) * 4)
    return tuple(
        x.new_empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


def _backward(
    grad_residual_out: Tensor | None, grad_normed: Tensor | None, x: Tensor,
    branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, mean: Tensor, rstd: Tensor, branch_dtype: torch.dtype,
    wanted: list[bool], branch_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x.numel() == 0:
        outputs = _gradients(x, weight, bias.dtype, gamma, branch_dtype, wanted, branch_bias_dtype)
        for output in outputs[2:]:
            output.zero_()
        return outputs
    inputs = (x, grad_residual_out, grad_normed, branch, weight, gamma, keep_scale, mean, rstd)
    return _backward_plans(inputs, branch_dtype, bias.dtype, branch_bias_dtype, tuple(wanted))


def _backward_results(
    inputs: Any, branch_dtype: torch.dtype, bias_dtype: torch.dtype,
    branch_bias_dtype: torch.dtype | None, wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    x, weight, gamma = inputs[0], inputs[4], inputs[5]
    return _gradients(x, weight, bias_dtype, gamma, branch_dtype, wanted, branch_bias_dtype)


def _backward_launches(inputs: Any, outputs: Any, *constants: Any) -> Iterator[Launch]:
    x, grad_residual_out, grad_normed, branch, weight, gamma, keep_scale, mean, rstd = inputs
    wanted = constants[-1]
    values, programs, options = _backward_arguments(
        grad_residual_out, grad_normed, x, branch, weight, gamma, keep_scale, mean, rstd,
        outputs, programs_of(x.device),
    )  # fmt: skip
    yield Launch(kernel.backward_kernel, (programs,), values | options)
    if any(wanted[2:]):
        values, options = _sum_arguments(values, programs, outputs)
        last = max(i for i, is_wanted in enumerate(wanted[2:], 1) if is_wanted)
        grid = (triton.cdiv(x.shape[-1], SUM_COLS), last)
        yield Launch(kernel.sum_kernel, grid, values | options)


_backward_plans = Plans(_backward_results, _backward_launches)


def _backward_fake(  # type: ignore[no-untyped-def]
    _grad_residual_out, _grad_normed, x, _branch, weight, bias, gamma, _keep_scale, _mean, _rstd,
    branch_dtype, wanted, branch_bias_dtype,
):  # fmt: skip
    return _gradients(x, weight, bias.dtype, gamma, branch_dtype, wanted, branch_bias_dtype)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor,
        gamma: Tensor | None, keep_scale: Tensor | None, eps: float, normed_dtype: torch.dtype,
        branch_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        residual_out, normed, mean, rstd = torch.ops.deit_fast.add_layer_norm_forward(
            residual, branch, weight, bias, gamma, keep_scale, eps, normed_dtype, True
        )
        ctx.set_materialize_grads(False)
        if branch is None:
            ctx.mark_non_differentiable(residual_out)
        ctx.branch_dtype = residual.dtype if branch is None else branch.dtype
        saved_branch = branch if ctx.needs_input_grad[4] else None
        x = residual if branch is None else residual_out
        rows = (x, saved_branch, weight, bias, gamma, keep_scale, mean, rstd)
        ctx.save_for_backward(*rows)
        # Its dtype alone: a compiled model then does not compute the value.
        ctx.branch_bias_dtype = None if branch_bias is None else branch_bias.dtype
        return residual_out, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_residual_out: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_residual_out is None and grad_normed is None:
            return (None,) * 9
        x, branch, weight, bias, gamma, keep_scale, mean, rstd = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[8]]
        both = wanted[0] and wanted[1]
        same = gamma is None and keep_scale is None and ctx.branch_dtype == x.dtype
        if grad_normed is None:  # nothing flows through the norm
            wanted[2] = wanted[3] = False
            wanted[0] = False
            wanted[1] = wanted[1] and not same
        elif same and both:
            wanted[1] = False
        gradients: list[Tensor | None] = [None] * 6
        if any(wanted):
            found = torch.ops.deit_fast.add_layer_norm_backward(
                grad_residual_out, grad_normed, x, branch, weight, bias, gamma, keep_scale,
                mean, rstd, ctx.branch_dtype, wanted, ctx.branch_bias_dtype,
            )  # fmt: skip
            gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
        if grad_normed is None and ctx.needs_input_grad[0]:
            gradients[0] = grad_residual_out
        if grad_normed is None and same and ctx.needs_input_grad[1]:
            gradients[1] = grad_residual_out
        elif same and both:
            gradients[1] = gradients[0]
        return (*gradients[:5], None, None, None, gradients[5])


def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    arguments = (*arguments, None)[:9]  # the dispatcher leaves out what has its default value
    inputs = [x for x in (*arguments[:5], *arguments[8:]) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _AddLayerNorm.apply(*arguments)
    return _without_statistics(*arguments)


def _without_statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.deit_fast.add_layer_norm_forward(*arguments[:8], False)[:2]


def _without_statistics_fake(residual, branch, *rest):  # type: ignore[no-untyped-def]
    return _outputs(residual, branch, rest[5], False)[:2]


for _name, _function, _fake in (
    ("add_layer_norm", _without_statistics, _without_statistics_fake),
    ("add_layer_norm_forward", _forward, _forward_fake),
    ("add_layer_norm_backward", _backward, _backward_fake),
):
    implement(_library, _name, _function, _fake)
_library.impl("add_layer_norm", _differentiable, "Autograd")


# ---------------------------------------------------------------------------------------------
# Ahead of time
# ---------------------------------------------------------------------------------------------


def _aot_calls(
    dtype: torch.dtype, stream: torch.dtype, channels: int, form: str
) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """The kernels that one forward and backward launches: name, function, arguments, options."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    samples, tokens = 256, 198
    residual = empty(samples, tokens, channels, of=stream)
    branch = None if form == "norm" else empty(samples, tokens, channels, of=dtype)
    weight, keep = empty(channels), empty(samples) if form in ("keep", "gamma-keep") else None
    gamma = empty(channels) if form == "gamma-keep" else None
    outputs = _outputs(residual, branch, dtype, True)
    values, _, options = _forward_arguments(
        residual, branch, weight, weight, gamma, keep, 1e-6, outputs
    )
    yield "forward", kernel.forward_kernel, values, options
    wanted = [True, branch is not None and keep is not None, True, True, gamma is not None]
    wanted.append(branch is not None)
    gradients = _gradients(residual, weight, weight.dtype, gamma, dtype, wanted, weight.dtype)
    values, programs, options = _backward_arguments(
        None if branch is None else residual, outputs[1], residual,
        None if gamma is None else branch, weight, gamma, keep, *outputs[2:], gradients,
        PROGRAMS_PER_PROCESSOR * 132,
    )  # fmt: skip
    yield "backward", kernel.backward_kernel, values, options
    values, options = _sum_arguments(values, programs, gradients)
    yield "sums", kernel.sum_kernel, values, options


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """(name, function, signature, constants, alignments, options, expectations) to compile."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (bf16, stream, channels, form)
        for channels in (192, 384, 768)
        for stream, form in ((bf16, "keep"), (bf16, "gamma-keep"), (fp32, "gamma-keep"))
    ]
    cases += [
        (bf16, bf16, 384, "norm"),
        (bf16, bf16, 384, "plain"),
        (bf16, fp32, 384, "keep"),
        (fp16, fp16, 384, "gamma-keep"),
        (fp32, fp32, 384, "gamma-keep"),
        (bf16, bf16, 1000, "gamma-keep"),
        (bf16, bf16, 4096, "gamma-keep"),
        (fp32, fp32, 4096, "keep"),
    ]
    sums_seen = set()
    for dtype, stream, channels, form in cases:
        streams = "" if stream == dtype else f"-{TYPE_NAMES[stream]}-residual"
        for part, function, values, options in _aot_calls(dtype, stream, channels, form):
            name = f"{part}-{TYPE_NAMES[dtype]}{streams}-C={channels}-{form}"
            expect: dict[str, Any] = {"wide_loads": True, "i64_rows": True, "max_regs": 128}
            expect["no_scalar_half"] = dtype.itemsize == 2
            if part == "sums":
                name = f"sums-C={channels}-{2 + (form == 'gamma-keep')}"
                expect = {"max_regs": 128}
                if name in sums_seen:
                    continue
                sums_seen.add(name)
            yield name, function, *signature(function, values), options, expect
