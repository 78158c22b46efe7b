"""Triton kernels of residual + LayerScale + DropPath + LayerNorm.

A program holds ROWS rows of C channels in registers, C rounded up to a power of two in BLOCK lanes:
mean and variance take two passes over registers, none over memory. C is a constant, so that the
compiler knows where a row ends; rows that start on 16 bytes take wide accesses, which it can prove
because row offsets are declared multiples of VEC (on the product: on an argument it is lost).

The backward's programs walk through the rows and keep their share of the weight gradients in
registers; each writes one partial row. A second kernel adds the partial rows up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tile(at, cols, stride, VEC: tl.constexpr):
    """Offsets [ROWS, BLOCK] of whole rows."""
    return tl.multiple_of(at.to(tl.int64) * stride, VEC)[:, None] + cols[None, :]


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
    mean, rstd,  # float32 [rows]; None where no backward follows
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
        # The statistics are those of the stored values: the backward finds the same ones.
        stored = (x + added).to(residual_out.dtype.element_ty)
        tl.store(residual_out + out, stored, mask=valid)
        x = stored.to(tl.float32)
    average = tl.sum(x, 1) / C
    centred = tl.where(valid, x - average[:, None], 0.0)
    # What the rounding of the sum left over: with a mean of 1000 this is where the digits are.
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
    x, branch,  # [rows, C]: what was normalised; branch where its gamma wants a gradient
    weight, gamma, keep_scale, mean, rstd,
    grad_residual, grad_branch,  # [rows, C], contiguous; None where not wanted
    weight_sums, bias_sums, gamma_sums, branch_bias_sums,  # float32 [programs, C]; None: unwanted
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
                # Past the row's end this is no zero, but dy is.
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
                    for_branch_bias += g  # rows past the last are 0, columns are not stored
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


@triton.jit
def add_up(partial, total, count, C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    if total is not None:
        cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
        sums = tl.zeros([ROWS, COLS], tl.float32)
        for at in range(0, count, ROWS):
            rows = at + tl.arange(0, ROWS)
            valid = (rows < count)[:, None] & (cols < C)[None, :]
            offsets = rows[:, None] * C + cols[None, :]
            sums += tl.load(partial + offsets, mask=valid, other=0.0)
        result = tl.sum(sums, 0).to(total.dtype.element_ty)
        tl.store(total + cols, result, mask=cols < C)


@triton.jit(do_not_specialize=("count",))
def sum_kernel(
    weight_sums, bias_sums, gamma_sums, branch_bias_sums,  # float32 [count, C] or None
    grad_weight, grad_bias, grad_gamma, grad_branch_bias,  # [C] or None
    count, C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over the partial rows; the second axis of the grid is the gradient."""
    which = tl.program_id(1)
    if which == 0:
        add_up(weight_sums, grad_weight, count, C, COLS, ROWS)
    elif which == 1:
        add_up(bias_sums, grad_bias, count, C, COLS, ROWS)
    elif which == 2:
        add_up(gamma_sums, grad_gamma, count, C, COLS, ROWS)
    else:
        add_up(branch_bias_sums, grad_branch_bias, count, C, COLS, ROWS)
