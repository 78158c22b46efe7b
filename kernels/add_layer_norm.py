"""The residual sum and the LayerNorm between two parts of a transformer block, in one pass:

    residual_out = residual + keep_scale[b] * gamma[c] * branch
    normed       = (residual_out - mean) / sqrt(var + eps) * weight + bias

mean and var run over the C channels of a token, var without Bessel's correction (Ba et al. 2016);
gamma is LayerScale (Touvron et al. 2021, "Going deeper with image transformers"); keep_scale is
stochastic depth, 0 or 1 / (1 - p) for each sample (Huang et al. 2016; timm's DropPath).

Bytes, in tensors of [B, N, C]: the forward reads residual and branch and writes both results, 4.
The backward reads both gradients and residual_out and writes two gradients, 5; 4 where branch and
residual have the same gradient (no gamma, no keep_scale, one dtype); 6 with gamma, whose gradient
needs branch. Eager PyTorch moves 9 in the forward with gamma and keep_scale. In addition the
forward writes two floats per row, and the backward one partial sum of weight gradients per program.

Numerics: float32 inside, two-pass variance. The statistics are those of residual_out as stored, so
that forward and backward see the same rows. The weight gradients are summed in a fixed order: the
same bits in every run on one kind of GPU.

A CPU, float64, and more than 4096 channels take the reference in plain PyTorch; with
TRITON_INTERPRET=1 a CPU runs the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor
from .launching import (
    TYPE_NAMES,
    Launch,
    can_run,
    first_derivative_only,
    launch,
    operator,
    planned,
    recording,
    scratch,
)
from .rows import (
    SUM_COLS,
    SUM_ROWS,
    add_up,
    as_rows,
    common_vector,
    contiguous,
    max_programs,
    row_tile,
)

__all__ = ["add_layer_norm"]

MAX_CHANNELS = 4096  # a longer row does not fit in the registers of its program


def reference(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in PyTorch's own operations."""
    x = residual
    if branch is not None:
        scale = gamma
        if keep_scale is not None:
            keep = keep_scale.view(-1, *(1,) * (residual.dim() - 1))
            scale = keep if gamma is None else keep * gamma
        added = residual + branch if scale is None else torch.addcmul(residual, branch, scale)
        x = added.to(residual.dtype)
    # For half-precision rows PyTorch on a CPU sums the weight gradients in half precision, an error
    # of 22 % for 1,088 rows. The kernels sum in float32, and so does this.
    rows = x.float() if x.device.type == "cpu" and x.dtype.itemsize == 2 else x
    weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
    return x, F.layer_norm(rows, rows.shape[-1:], weight, bias, eps).to(normed_dtype)


# ---------------------------------------------------------------------------------------------
# Kernels. A program holds ROWS rows of C channels in registers, in BLOCK lanes, the next power of
# two: mean and variance take two passes over registers, none over memory. C is a constant, so that
# the compiler knows where a row ends.
#
# The programs of the backward walk through the rows and sum weight gradients in registers; each
# writes one partial sum.
# ---------------------------------------------------------------------------------------------


@triton.jit
def _per_channel(pointer, cols, C: tl.constexpr):
    return tl.load(pointer + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _per_sample(pointer, at, rows, rows_per_sample):
    return tl.load(pointer + at // rows_per_sample, mask=at < rows, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=("rows", "rows_per_sample", "residual_stride", "branch_stride", "eps")
)
def forward_kernel(
    residual, branch,  # [rows, C]; branch may be None
    weight, bias, gamma,  # [C]; gamma may be None
    keep_scale,  # [rows / rows_per_sample] or None
    residual_out, normed,  # [rows, C], contiguous; no residual_out without a branch
    mean, rstd,  # float32 [rows]; None if no backward follows
    rows, rows_per_sample, residual_stride, branch_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    valid = (at < rows)[:, None] & (cols < C)[None, :]
    x = tl.load(residual + row_tile(at, cols, residual_stride, VEC), mask=valid, other=0.0)
    x = x.to(tl.float32)
    w, b = _per_channel(weight, cols, C), _per_channel(bias, cols, C)
    out = row_tile(at, cols, C, VEC)
    if branch is not None:
        added = tl.load(branch + row_tile(at, cols, branch_stride, VEC), mask=valid, other=0.0)
        added = added.to(tl.float32)
        if gamma is not None:
            added *= _per_channel(gamma, cols, C)
        if keep_scale is not None:
            added *= _per_sample(keep_scale, at, rows, rows_per_sample)[:, None]
        # The statistics are those of the stored values, which the backward reads.
        stored = (x + added).to(residual_out.dtype.element_ty)
        tl.store(residual_out + out, stored, mask=valid)
        x = stored.to(tl.float32)
    average = tl.sum(x, 1) / C
    centred = tl.where(valid, x - average[:, None], 0.0)
    # The mean of what the rounding of the first sum lost, which matters for a mean of, say, 1000.
    shift = tl.sum(centred, 1) / C
    variance = tl.maximum(tl.sum(centred * centred, 1) / C - shift * shift, 0.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    y = (centred - shift[:, None]) * inverse[:, None] * w + b
    tl.store(normed + out, y.to(normed.dtype.element_ty), mask=valid)
    if mean is not None:
        tl.store(mean + at, average + shift, mask=at < rows)
        tl.store(rstd + at, inverse, mask=at < rows)


@triton.jit
def _store_partial(pointer, sums, cols, C: tl.constexpr):
    tl.store(pointer + tl.program_id(0) * C + cols, tl.sum(sums, 0), mask=cols < C)


@triton.jit(
    do_not_specialize=(
        *("rows", "rows_per_sample", "tiles", "x_stride", "branch_stride"),
        *("grad_residual_out_stride", "grad_normed_stride"),
    )
)
def backward_kernel(
    grad_residual_out, grad_normed,  # [rows, C]; one of them may be None
    x, branch,  # [rows, C]: what was normalised; branch if gamma needs a gradient
    weight, gamma, keep_scale, mean, rstd,
    grad_residual, grad_branch,  # [rows, C], contiguous; None where not needed
    weight_sums, bias_sums, gamma_sums, branch_bias_sums,  # float32 [programs, C] or None
    rows, rows_per_sample, tiles, x_stride, branch_stride,
    grad_residual_out_stride, grad_normed_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    to_input: tl.constexpr = (
        grad_residual is not None
        or grad_branch is not None
        or gamma_sums is not None
        or branch_bias_sums is not None
    )
    if grad_normed is not None and to_input:
        w = _per_channel(weight, cols, C)
    if gamma is not None and (grad_branch is not None or branch_bias_sums is not None):
        scale = _per_channel(gamma, cols, C)
    if weight_sums is not None:
        for_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    if bias_sums is not None:
        for_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    if gamma_sums is not None:
        for_gamma = tl.zeros([ROWS, BLOCK], tl.float32)
    if branch_bias_sums is not None:
        for_branch_bias = tl.zeros([ROWS, BLOCK], tl.float32)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tile * ROWS + tl.arange(0, ROWS)
        valid = (at < rows)[:, None] & (cols < C)[None, :]
        out = row_tile(at, cols, C, VEC)
        g = tl.zeros([ROWS, BLOCK], tl.float32)
        if grad_residual_out is not None and to_input:
            offsets = row_tile(at, cols, grad_residual_out_stride, VEC)
            g += tl.load(grad_residual_out + offsets, mask=valid, other=0.0).to(tl.float32)
        if grad_normed is not None:
            offsets = row_tile(at, cols, grad_normed_stride, VEC)
            dy = tl.load(grad_normed + offsets, mask=valid, other=0.0).to(tl.float32)
            if bias_sums is not None:
                for_bias += dy
            if weight_sums is not None or to_input:
                value = tl.load(x + row_tile(at, cols, x_stride, VEC), mask=valid, other=0.0)
                average = tl.load(mean + at, mask=at < rows, other=0.0)[:, None]
                inverse = tl.load(rstd + at, mask=at < rows, other=0.0)[:, None]
                # Beyond the row's end x_hat is not 0, but dy is.
                x_hat = (value.to(tl.float32) - average) * inverse
                if weight_sums is not None:
                    for_weight += dy * x_hat
                if to_input:
                    dy *= w
                    along = tl.sum(dy * x_hat, 1)[:, None] / C
                    g += (dy - tl.sum(dy, 1)[:, None] / C - x_hat * along) * inverse
        if grad_residual is not None:
            tl.store(grad_residual + out, g.to(grad_residual.dtype.element_ty), mask=valid)
        if grad_branch is not None or gamma_sums is not None or branch_bias_sums is not None:
            if keep_scale is not None:
                g *= _per_sample(keep_scale, at, rows, rows_per_sample)[:, None]
            if gamma_sums is not None:
                added = tl.load(
                    branch + row_tile(at, cols, branch_stride, VEC), mask=valid, other=0.0
                )
                for_gamma += tl.where(valid, g * added.to(tl.float32), 0.0)
            if grad_branch is not None or branch_bias_sums is not None:
                if gamma is not None:
                    g *= scale
                if branch_bias_sums is not None:
                    for_branch_bias += g  # rows past the last are 0; columns are not stored
                if grad_branch is not None:
                    tl.store(grad_branch + out, g.to(grad_branch.dtype.element_ty), mask=valid)

    if weight_sums is not None:
        _store_partial(weight_sums, for_weight, cols, C)
    if bias_sums is not None:
        _store_partial(bias_sums, for_bias, cols, C)
    if gamma_sums is not None:
        _store_partial(gamma_sums, for_gamma, cols, C)
    if branch_bias_sums is not None:
        _store_partial(branch_bias_sums, for_branch_bias, cols, C)


@triton.jit(do_not_specialize=("count",))
def sum_kernel(
    weight_sums, bias_sums, gamma_sums, branch_bias_sums,  # float32 [count, C] or None
    grad_weight, grad_bias, grad_gamma, grad_branch_bias,  # [C] or None
    count, C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums up. The second axis of the grid selects the gradient."""
    which = tl.program_id(1)
    if which == 0:
        add_up(weight_sums, grad_weight, count, C, COLS, ROWS)
    elif which == 1:
        add_up(bias_sums, grad_bias, count, C, COLS, ROWS)
    elif which == 2:
        add_up(gamma_sums, grad_gamma, count, C, COLS, ROWS)
    else:
        add_up(branch_bias_sums, grad_branch_bias, count, C, COLS, ROWS)


# ---------------------------------------------------------------------------------------------
# Launchers and operators
# ---------------------------------------------------------------------------------------------


def _tile(channels: int, elements: int, per_thread: int) -> dict[str, int]:
    """Tile and options of a launch with about these elements per program and per thread."""
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, min(elements // block, 64))
    warps = max(4, block // (32 * per_thread))
    return {"BLOCK": block, "ROWS": rows, "num_warps": warps, "num_stages": 1}


def _forward_tile(channels: int) -> dict[str, int]:
    """At least two rows up to 2048 channels, so that rows share the loads of weight and bias."""
    return _tile(channels, 4096 if channels > 512 else 2048, 16)


def _backward_tile(channels: int, narrow: bool) -> dict[str, int]:
    """At most 128 registers, so that 4 programs of 4 warps run on a multiprocessor at once.

    narrow: half the elements per thread, where the gradient of gamma or branch_bias or a float32
    residual stream needs additional registers.
    """
    per_thread = 8 if narrow else 16
    return _tile(channels, 128 * per_thread, per_thread)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _results(
    residual: Tensor, branch: Tensor | None, normed_dtype: torch.dtype, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual_out, normed, mean and rstd without values; those not needed have no elements."""
    rows = residual.shape[:-1].numel() if statistics else 0
    residual_out = residual.new_empty((0,) if branch is None else residual.shape)
    normed = residual.new_empty(residual.shape, dtype=normed_dtype)
    mean, rstd = (residual.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    return residual_out, normed, mean, rstd


@planned
def _forward(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, normed_dtype: torch.dtype, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    results = residual_out, normed, mean, rstd = _results(
        residual, branch, normed_dtype, statistics
    )
    if residual.numel() == 0:
        return results
    x, added = as_rows(residual), _rows(branch)
    (rows, C), tile = x.shape, _forward_tile(x.shape[1])
    launch(
        forward_kernel, (triton.cdiv(rows, tile["ROWS"]),),
        residual=x, branch=added, weight=weight.contiguous(), bias=bias.contiguous(),
        gamma=contiguous(gamma), keep_scale=contiguous(keep_scale),
        residual_out=None if branch is None else residual_out, normed=normed,
        mean=mean if statistics else None, rstd=rstd if statistics else None,
        rows=rows, rows_per_sample=rows // len(residual), residual_stride=x.stride(0),
        branch_stride=_stride(added), eps=eps, C=C, VEC=common_vector(C, x, added), **tile,
    )  # fmt: skip
    return results


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, branch_dtype: torch.dtype,
    needed: Sequence[bool], branch_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of residual, branch, weight, bias, gamma and branch_bias, without values.

    Those that are not needed have no elements.
    """
    gamma_dtype = weight.dtype if gamma is None else gamma.dtype
    branch_bias_dtype = branch_bias_dtype or weight.dtype
    dtypes = (x.dtype, branch_dtype, weight.dtype, bias.dtype, gamma_dtype, branch_bias_dtype)
    shapes = (x.shape, x.shape, *(weight.shape,) * 4)
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needed, strict=True)
    )


@planned
def _backward(
    grad_residual_out: Tensor | None, grad_normed: Tensor | None, x: Tensor,
    branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, mean: Tensor, rstd: Tensor, branch_dtype: torch.dtype,
    needed: list[bool], branch_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    gradients = _gradients(x, weight, bias, gamma, branch_dtype, needed, branch_bias_dtype)
    if x.numel() == 0:
        for gradient in gradients[2:]:
            gradient.zero_()
        return gradients
    grad_residual, grad_branch, *weight_gradients = (
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )
    samples, x, branch = len(x), as_rows(x), _rows(branch)
    grad_residual_out, grad_normed = _rows(grad_residual_out), _rows(grad_normed)
    (rows, C), narrow = x.shape, needed[4] or needed[5] or x.dtype.itemsize == 4
    tile = _backward_tile(C, narrow)
    tiles = triton.cdiv(rows, tile["ROWS"])
    programs = min(tiles, max_programs(x.device))
    weight_sums, bias_sums, gamma_sums, branch_bias_sums = sums = [
        None if gradient is None else scratch(x, programs, C) for gradient in weight_gradients
    ]
    launch(
        backward_kernel, (programs,),
        grad_residual_out=grad_residual_out, grad_normed=grad_normed,
        x=None if grad_normed is None else x, branch=branch, weight=weight.contiguous(),
        gamma=contiguous(gamma), keep_scale=contiguous(keep_scale), mean=mean, rstd=rstd,
        grad_residual=grad_residual, grad_branch=grad_branch, weight_sums=weight_sums,
        bias_sums=bias_sums, gamma_sums=gamma_sums, branch_bias_sums=branch_bias_sums,
        rows=rows, rows_per_sample=rows // samples, tiles=tiles,
        x_stride=x.stride(0), branch_stride=_stride(branch),
        grad_residual_out_stride=_stride(grad_residual_out),
        grad_normed_stride=_stride(grad_normed),
        C=C, VEC=common_vector(C, grad_residual_out, grad_normed, x, branch), **tile,
    )  # fmt: skip
    if any(needed[2:]):
        grad_weight, grad_bias, grad_gamma, grad_branch_bias = weight_gradients
        last = max(i for i, gradient in enumerate(sums, 1) if gradient is not None)
        launch(
            sum_kernel, (triton.cdiv(C, SUM_COLS), last),
            weight_sums=weight_sums, bias_sums=bias_sums, gamma_sums=gamma_sums,
            branch_bias_sums=branch_bias_sums, grad_weight=grad_weight, grad_bias=grad_bias,
            grad_gamma=grad_gamma, grad_branch_bias=grad_branch_bias,
            count=programs, C=C, COLS=SUM_COLS, ROWS=SUM_ROWS, num_warps=4, num_stages=1,
        )  # fmt: skip
    return gradients


def _backward_fake(  # type: ignore[no-untyped-def]
    _grad_residual_out, _grad_normed, x, _branch, weight, bias, gamma, _keep_scale, _mean, _rstd,
    branch_dtype, needed, branch_bias_dtype,
):  # fmt: skip
    return _gradients(x, weight, bias, gamma, branch_dtype, needed, branch_bias_dtype)


_ARGUMENTS = (
    "Tensor residual, Tensor? branch, Tensor weight, Tensor bias, Tensor? gamma, "
    "Tensor? keep_scale, float eps, ScalarType normed_dtype"
)
forward_op = operator(
    f"add_layer_norm_forward({_ARGUMENTS}, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, lambda residual, branch, *rest: _results(residual, branch, *rest[-2:]),
)  # fmt: skip
backward_op = operator(
    "add_layer_norm_backward(Tensor? grad_residual_out, Tensor? grad_normed, Tensor x, "
    "Tensor? branch, Tensor weight, Tensor bias, Tensor? gamma, Tensor? keep_scale, Tensor mean, "
    "Tensor rstd, ScalarType branch_dtype, bool[] needed, ScalarType? branch_bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake,
)  # fmt: skip


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor,
        gamma: Tensor | None, keep_scale: Tensor | None, eps: float, normed_dtype: torch.dtype,
        branch_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        residual_out, normed, mean, rstd = forward_op(
            residual, branch, weight, bias, gamma, keep_scale, eps, normed_dtype, True
        )
        ctx.set_materialize_grads(False)
        if branch is None:
            ctx.mark_non_differentiable(residual_out)
        ctx.branch_dtype = residual.dtype if branch is None else branch.dtype
        saved_branch = branch if ctx.needs_input_grad[4] else None
        x = residual if branch is None else residual_out
        ctx.save_for_backward(x, saved_branch, weight, bias, gamma, keep_scale, mean, rstd)
        # The dtype alone: a compiled model then does not compute the value.
        ctx.branch_bias_dtype = None if branch_bias is None else branch_bias.dtype
        return residual_out, normed

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, grad_residual_out: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_residual_out is None and grad_normed is None:
            return (None,) * 9
        x, branch, weight, bias, gamma, keep_scale, mean, rstd = ctx.saved_tensors
        for_residual, for_branch = ctx.needs_input_grad[:2]
        # Then the branch's gradient is that of the residual.
        same = gamma is None and keep_scale is None and ctx.branch_dtype == x.dtype
        needed = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[8]]
        if grad_normed is None:  # the residual's gradient is grad_residual_out as it is
            needed[0] = needed[2] = needed[3] = False
            needed[1] = for_branch and not same
        elif same and for_residual and for_branch:
            needed[1] = False
        gradients: list[Tensor | None] = [None] * 6
        if any(needed):
            found = backward_op(
                grad_residual_out, grad_normed, x, branch, weight, bias, gamma, keep_scale,
                mean, rstd, ctx.branch_dtype, needed, ctx.branch_bias_dtype,
            )  # fmt: skip
            gradients = [g if need else None for g, need in zip(found, needed, strict=True)]
        if grad_normed is None and for_residual:
            gradients[0] = grad_residual_out
        if same and for_branch and not needed[1]:
            gradients[1] = grad_residual_out if grad_normed is None else gradients[0]
        return (*gradients[:5], None, None, None, gradients[5])


add_layer_norm_op = operator(
    f"add_layer_norm({_ARGUMENTS}, Tensor? branch_bias=None) -> (Tensor, Tensor)",
    lambda *arguments: forward_op(*arguments[:8], False)[:2], None, _AddLayerNorm,
)  # fmt: skip


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time."""
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
    for dtype, stream, C, form in cases:
        forward, backward, sums = _aot_launches(dtype, stream, C, form)
        streams = "" if stream == dtype else f"-{TYPE_NAMES[stream]}-residual"
        name = f"{TYPE_NAMES[dtype]}{streams}-C={C}-{form}"
        expect = {"wide_loads": True, "i64_rows": True, "max_regs": 128}
        expect["no_scalar_half"] = dtype.itemsize == 2
        yield f"forward-{name}", forward, expect
        yield f"backward-{name}", backward, expect
        # of weight and bias, with a branch also of its bias, with gamma also of gamma
        name = f"sums-C={C}-{2 + (form != 'norm') + (form == 'gamma-keep')}"
        if name not in sums_seen:
            yield name, sums, {"max_regs": 128}
        sums_seen.add(name)


def _aot_launches(dtype: torch.dtype, stream: torch.dtype, C: int, form: str) -> list[Launch]:
    """The launches of one forward and backward."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    residual = empty(256, 198, C, dtype=stream)
    branch = None if form == "norm" else empty(256, 198, C, dtype=dtype)
    weight, keep = empty(C), empty(256) if form in ("keep", "gamma-keep") else None
    gamma = empty(C) if form == "gamma-keep" else None
    has_branch = branch is not None
    needed = [True, has_branch and keep is not None, True, True, gamma is not None, has_branch]
    with recording() as recorded:
        _, normed, mean, rstd = _forward(
            residual, branch, weight, weight, gamma, keep, 1e-6, dtype, True
        )
        _backward(
            residual if has_branch else None, normed, residual, None if gamma is None else branch,
            weight, weight, gamma, keep, mean, rstd, dtype, needed, weight.dtype,
        )  # fmt: skip
    return recorded.launches


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def uses_kernels(residual: Tensor, *others: Tensor | None) -> bool:
    """Whether add_layer_norm runs these tensors on its kernels, and not in plain PyTorch."""
    return residual.shape[-1] <= MAX_CHANNELS and can_run(residual, *others)


def with_bias_gradient(value: Tensor, bias: Tensor) -> Tensor:
    """value, whose gradient also flows into bias as if it had just been added; adds zeros."""
    return value + (bias - bias.detach()).to(value.dtype)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    gamma: Tensor | None = None,
    keep_scale: Tensor | None = None,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum; without a branch a LayerNorm.

    Dtypes: the arguments may have different ones, e.g. a float32 residual stream, a bfloat16 branch
    and float32 weights. residual_out has the residual's dtype, each gradient that of its argument.
    normed has the branch's (without a branch the residual's), or inside ``torch.autocast`` that of
    autocast, where F.layer_norm would give float32 on a GPU for the next linear layer to cast.
    Autocast changes nothing else.

    Args:
        residual: float [B, ..., C].
        branch: float, of the residual's shape, or None.
        weight, bias: float [C].
        gamma: LayerScale, float [C]; 1 if None.
        keep_scale: DropPath, float [B], a factor of each sample's branch; 1 if None. It gets no
            gradient.
        eps: added to the variance.
        branch_bias: float [C], the bias that the branch already contains without a gradient, as
            in ``F.linear(x, weight, bias.detach())``. Its value is not read. Its gradient is
            computed here: the column sums of the branch's gradient, in float32 in the same pass.

    Returns:
        (residual_out, normed), both of the residual's shape. Without a branch residual_out is the
        residual itself.

    Raises:
        ValueError: shapes, dtypes, devices or an eps that do not fit, by name and value.
    """
    _check(residual, branch, weight, bias, gamma, keep_scale, eps, branch_bias)
    normed_dtype = _normed_dtype(residual, branch)
    if keep_scale is not None:
        keep_scale = keep_scale.detach()
    inputs = (residual, branch, weight, bias, gamma, keep_scale)
    if not uses_kernels(*inputs, branch_bias):
        if branch is not None and branch_bias is not None:
            branch = with_bias_gradient(branch, branch_bias)
        return reference(residual, branch, *inputs[2:], float(eps), normed_dtype)
    residual_out, normed = add_layer_norm_op(*inputs, float(eps), normed_dtype, branch_bias)
    return residual if branch is None else residual_out, normed


def _normed_dtype(residual: Tensor, branch: Tensor | None) -> torch.dtype:
    device = residual.device.type
    if torch.is_autocast_enabled(device) and residual.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return residual.dtype if branch is None else branch.dtype


def _check(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep_scale: Tensor | None, eps: float, branch_bias: Tensor | None,
) -> None:  # fmt: skip
    check_tensor("residual", residual, "floats")
    if residual.dim() < 2 or residual.shape[-1] == 0:
        raise ValueError(
            f"residual must have shape [B, ..., C] with C > 0, not {tuple(residual.shape)}"
        )
    samples, channels = residual.shape[:1], residual.shape[-1:]
    check_tensor("weight", weight, "floats", channels, residual, "residual")
    check_tensor("bias", bias, "floats", channels, residual, "residual")
    if branch is not None:
        check_tensor("branch", branch, "floats", residual.shape, residual, "residual")
    for name, value, shape in (
        ("gamma", gamma, channels), ("keep_scale", keep_scale, samples),
        ("branch_bias", branch_bias, channels),
    ):  # fmt: skip
        if value is None:
            continue
        check_tensor(name, value, "floats", shape, residual, "residual")
        if branch is None:
            raise ValueError(f"{name} of shape {tuple(value.shape)} needs a branch, which is None")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, but is {eps}")
