"""Backward of the attention: kernel, launcher and operator; and the differentiable operator.

A program owns one block of queries (dq) or of keys (dk, dv) and streams blocks of the other past
it, so no sum is shared and no atomics are needed. A tail comes before the loop, and rows past the
last token are masked, as in the forward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import (
    add_products,
    block_arguments,
    forward_op,
    heads_of,
    is_short,
    load_row_values,
    load_rows,
    only_keys,
    over_columns,
    qkv_arguments,
    readable,
    rows_of_loop,
    store_block,
    store_row_values,
    zeros,
)
from .attention_tiles import Tiles, choose_tiles
from .launching import first_derivative_only, launch, operator, planned, scratch
from .rows import launch_sum

# Up to this number of tokens one launch computes dq, dk and dv and shares what it reads. Beyond it,
# a separate launch that stores delta is worth its cost, and a single launch spills on sm_100.
SHARED_TOKENS = 208
MIN_HEADS = 1024  # of B * H for `per_head`: 2.6 times what an H100 runs at once
QUERIES, KEYS, BOTH, HEAD = (tl.constexpr(i) for i in range(4))

# ---------------------------------------------------------------------------------------------
# Gradients of one block
# ---------------------------------------------------------------------------------------------


@triton.jit
def _store_rows(
    pointer, start, tokens, stride, parts, factor,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(PARTS):
        value = parts[i] * factor
        store_block(pointer + i * WIDTH, start, tokens, stride, value, ROWS, WIDTH)


@triton.jit
def _row_products(a, b, PARTS: tl.constexpr):
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, PARTS):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def _query_step(
    q, do, lse, delta, k_at, v_at, start, tokens, stride_n, dq, scale2, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq plus what one block of keys adds to it, without the factor scale."""
    k = load_rows(k_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    v = load_rows(v_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    p = tl.exp2(over_columns(q, k, PARTS, PRECISION, UPCAST) * scale2 - lse[:, None])
    p = only_keys(p, start, tokens, 0.0, KEYS, RAGGED)
    dp = over_columns(do, v, PARTS, PRECISION, UPCAST)
    ds = (p * (dp - delta[:, None])).to(k[0].dtype)
    return add_products(dq, ds, k, PARTS, PRECISION, UPCAST)


@triton.jit
def _query_role(
    q_at, do_at, o_at, dq_at, lse_at, delta_at, sums_at, start, tokens, stride_n, stride_p,
    grad_stride_n, out_stride, scale2, scale, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries. Stores delta, the row sums of dO * O, if delta_at is given."""
    q = load_rows(q_at, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    do = load_rows(do_at, start, tokens, grad_stride_n, ROWS, WIDTH, PARTS, True)
    o = load_rows(o_at, start, tokens, out_stride, ROWS, WIDTH, PARTS, True)
    lse = load_row_values(lse_at, start, tokens, float("inf"), ROWS, True)
    delta = _row_products(do, o, PARTS)
    if delta_at is not None:
        store_row_values(delta_at, start, tokens, delta, ROWS)
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    dq = zeros(ROWS, WIDTH, PARTS)
    full = rows_of_loop(tokens, BLOCK, TAIL)
    if TAIL > 0:
        dq = _query_step(
            q, do, lse, delta, k_at, v_at, full, tokens, stride_n, dq, scale2,
            WIDTH, PARTS, TAIL, True, PRECISION, UPCAST,
        )  # fmt: skip
    for at in range(0, full, BLOCK):
        dq = _query_step(
            q, do, lse, delta, k_at, v_at, at, tokens, stride_n, dq, scale2,
            WIDTH, PARTS, BLOCK, TAIL == 0, PRECISION, UPCAST,
        )  # fmt: skip
    if sums_at is not None:  # before the rows, because otherwise ptxas spills on sm_100
        sums_at += start // ROWS * out_stride
        for i in tl.static_range(PARTS):  # rows past the last token are zeros, because P is 0
            tl.store(sums_at + i * WIDTH + tl.arange(0, WIDTH), tl.sum(dq[i], 0) * scale)
    _store_rows(dq_at, start, tokens, 3 * out_stride, dq, scale, ROWS, WIDTH, PARTS)


@triton.jit
def _key_step(
    k, v, q_at, do_at, o_at, lse_at, delta_at, start, tokens, stride_n, grad_stride_n, out_stride,
    dk, dv, scale2, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk (without the factor scale) and dv plus what one block of queries adds to them.

    All matrices are transposed, [keys, queries], so that P and dS are left operands as computed.
    """
    q = load_rows(q_at, start, tokens, stride_n, ROWS, WIDTH, PARTS, RAGGED)
    do = load_rows(do_at, start, tokens, grad_stride_n, ROWS, WIDTH, PARTS, RAGGED)
    lse = load_row_values(lse_at, start, tokens, float("inf"), ROWS, RAGGED)
    if delta_at is None:
        o = load_rows(o_at, start, tokens, out_stride, ROWS, WIDTH, PARTS, RAGGED)
        delta = _row_products(do, o, PARTS)
    else:
        delta = load_row_values(delta_at, start, tokens, 0.0, ROWS, RAGGED)
    p = tl.exp2(over_columns(k, q, PARTS, PRECISION, UPCAST) * scale2 - lse[None, :])
    dv = add_products(dv, p.to(do[0].dtype), do, PARTS, PRECISION, UPCAST)
    dp = over_columns(v, do, PARTS, PRECISION, UPCAST)
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)
    return add_products(dk, ds, q, PARTS, PRECISION, UPCAST), dv


@triton.jit
def _key_role(
    q_at, do_at, o_at, dq_at, lse_at, delta_at, start, tokens, stride_n, stride_p,
    grad_stride_n, out_stride, scale2, scale, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys. Reads delta if delta_at is given; otherwise computes it."""
    k = load_rows(q_at + stride_p, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    v = load_rows(q_at + stride_p + stride_p, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    dk = zeros(ROWS, WIDTH, PARTS)
    dv = zeros(ROWS, WIDTH, PARTS)
    full = rows_of_loop(tokens, BLOCK, TAIL)
    if TAIL > 0:
        dk, dv = _key_step(
            k, v, q_at, do_at, o_at, lse_at, delta_at, full, tokens, stride_n, grad_stride_n,
            out_stride, dk, dv, scale2, WIDTH, PARTS, TAIL, True, PRECISION, UPCAST,
        )  # fmt: skip
    for at in range(0, full, BLOCK):
        dk, dv = _key_step(
            k, v, q_at, do_at, o_at, lse_at, delta_at, at, tokens, stride_n, grad_stride_n,
            out_stride, dk, dv, scale2, WIDTH, PARTS, BLOCK, TAIL == 0, PRECISION, UPCAST,
        )  # fmt: skip
    dk_at = dq_at + out_stride
    _store_rows(dk_at, start, tokens, 3 * out_stride, dk, scale, ROWS, WIDTH, PARTS)
    _store_rows(dk_at + out_stride, start, tokens, 3 * out_stride, dv, 1.0, ROWS, WIDTH, PARTS)


@triton.jit
def backward_kernel(
    qkv, grad_out, out, lse,
    row_sums,  # float32 [B, H, N] or None: row sums of dO * O, delta
    grad_qkv,
    bias_sums,  # float32 [B * blocks, H, D] or None: a program's column sums of dq
    heads, tokens,
    stride_b, stride_n, stride_p, stride_h, grad_stride_b, grad_stride_n, grad_stride_h,
    scale2, scale, ROLE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * [2 *] blocks of ROWS,), or (B * H,). ROLE: QUERIES, KEYS, BOTH or HEAD.

    QUERIES writes delta to row_sums, and KEYS reads it. BOTH has no row_sums: its programs run in
    any order, so each computes delta itself. HEAD does all blocks of one head, first those of the
    queries, then those of the keys, which read delta.
    """
    blocks = (tokens + ROWS - 1) // ROWS
    block, index = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if ROLE == HEAD:
        index = tl.program_id(0)
    is_key = ROLE == KEYS
    if ROLE == BOTH:
        is_key = index % 2 == 1
        index = index // 2
    batch, head = heads_of(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    do_at = grad_out + batch * grad_stride_b + head * grad_stride_h
    out_stride = heads * (PARTS * WIDTH)
    o_at = out + batch * tokens * out_stride + head * (PARTS * WIDTH)
    dq_at = grad_qkv + batch * tokens * (3 * out_stride) + head * (PARTS * WIDTH)
    row = index.to(tl.int64) * tokens
    lse_at = lse + row
    delta_at = row_sums
    if row_sums is not None:
        delta_at = row_sums + row
    sums_at = bias_sums
    if bias_sums is not None:
        sums_at = bias_sums + batch * blocks * out_stride + head * (PARTS * WIDTH)
    if ROLE == HEAD:
        # Addresses hoisted out of these loops would take a third of the registers.
        for each in tl.range(0, blocks, num_stages=1, disable_licm=True):
            _query_role(
                q_at, do_at, o_at, dq_at, lse_at, delta_at, sums_at, each * ROWS, tokens, stride_n,
                stride_p, grad_stride_n, out_stride, scale2, scale, WIDTH, PARTS, ROWS, BLOCK, TAIL,
                PRECISION, UPCAST,
            )  # fmt: skip
        tl.debug_barrier()  # wait for delta from the other threads of this program
        for each in tl.range(0, blocks, num_stages=1, disable_licm=True):
            _key_role(
                q_at, do_at, o_at, dq_at, lse_at, delta_at, each * ROWS, tokens, stride_n, stride_p,
                grad_stride_n, out_stride, scale2, scale, WIDTH, PARTS, ROWS, BLOCK, TAIL,
                PRECISION, UPCAST,
            )  # fmt: skip
    elif not is_key:  # in reverse order ptxas spills on sm_100 (triton 3.6, float16)
        _query_role(
            q_at, do_at, o_at, dq_at, lse_at, delta_at, sums_at, block * ROWS, tokens, stride_n,
            stride_p, grad_stride_n, out_stride, scale2, scale, WIDTH, PARTS, ROWS, BLOCK, TAIL,
            PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _key_role(
            q_at, do_at, o_at, dq_at, lse_at, delta_at, block * ROWS, tokens, stride_n, stride_p,
            grad_stride_n, out_stride, scale2, scale, WIDTH, PARTS, ROWS, BLOCK, TAIL,
            PRECISION, UPCAST,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Launcher and operators
# ---------------------------------------------------------------------------------------------

_ROLES = {"queries": QUERIES, "keys": KEYS, "both": BOTH}


def backward_kinds(qkv: Tensor) -> tuple[str, ...]:
    """The launches of a backward, as in the table of tiles."""
    shared = is_short(qkv) and qkv.shape[1] <= SHARED_TOKENS
    return ("both",) if shared else ("queries", "keys")


def backward_results(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float,
    query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv and of the queries' bias, without values; of no bias without elements."""
    grad_bias = qkv.new_empty(0) if query_bias is None else query_bias.new_empty(query_bias.shape)
    return qkv.new_empty(qkv.shape), grad_bias


def launch_backward(
    kind: str, grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, row_sums: Tensor | None,
    grad_qkv: Tensor, grad_bias: Tensor | None, scale: float, tiles: Tiles,
) -> None:  # fmt: skip
    """Write the part of grad_qkv that belongs to a kind, and with it grad_bias."""
    arguments = qkv_arguments(qkv, scale) | block_arguments(qkv, tiles)
    blocks, heads = triton.cdiv(qkv.shape[1], arguments["ROWS"]), qkv.shape[0] * qkv.shape[3]
    role, programs = _ROLES[kind], heads * blocks
    if kind == "both":
        programs *= 2
        if tiles.per_head and heads >= MIN_HEADS:
            role, programs, row_sums = HEAD, heads, scratch(lse, *lse.shape)
    sums = None
    if grad_bias is not None and kind != "keys":
        sums = scratch(lse, len(qkv) * blocks, grad_bias.numel())
    stride_b, stride_n, stride_h, _ = grad_out.stride()
    launch(
        backward_kernel, (programs,), **arguments,
        grad_out=grad_out, out=out, lse=lse, row_sums=row_sums, grad_qkv=grad_qkv, bias_sums=sums,
        grad_stride_b=stride_b, grad_stride_n=stride_n, grad_stride_h=stride_h,
        scale=scale, ROLE=role.value,
    )  # fmt: skip
    if grad_bias is not None and sums is not None:
        launch_sum(sums, grad_bias)


@planned
def backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float,
    query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    results = grad_qkv, grad_bias = backward_results(grad_out, qkv, out, lse, scale, query_bias)
    if qkv.numel() == 0:
        grad_bias.zero_()
        return results
    kinds = backward_kinds(qkv)
    row_sums = None if "both" in kinds else scratch(lse, *lse.shape)
    for kind in kinds:

        def launcher(tiles: Tiles, kind: str = kind) -> None:
            for_bias = None if query_bias is None else grad_bias
            launch_backward(
                kind, grad_out, qkv, out, lse, row_sums, grad_qkv, for_bias, scale, tiles
            )

        launcher(choose_tiles(kind, qkv, launcher))
    return results


def _backward_of_any_layout(grad_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return backward(readable(grad_out), readable(qkv), *rest)


backward_op = operator(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale, "
    "Tensor? query_bias=None) -> (Tensor, Tensor)", _backward_of_any_layout, backward_results,
)  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float, query_bias: Tensor | None) -> Tensor:
        out, lse = forward_op(qkv, scale)
        ctx.save_for_backward(qkv, out, lse, query_bias if ctx.needs_input_grad[2] else None)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor | None]:
        qkv, out, lse, query_bias = ctx.saved_tensors
        grad_qkv, grad_bias = backward_op(grad_out, qkv, out, lse, ctx.scale, query_bias)
        return grad_qkv, None, None if query_bias is None else grad_bias


attention_op = operator(
    "attention(Tensor qkv, float scale, Tensor? query_bias=None) -> Tensor",
    lambda qkv, scale, query_bias=None: forward_op(qkv, scale)[0], None, _Attention,
)  # fmt: skip
