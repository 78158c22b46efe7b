"""Triton kernels of the attention: rows stay in the packed projection, no program shares a sum.

Up to 256 tokens (``*_whole``) one program holds all keys and values of a head, or in its backward
twin all queries, as a few pieces whose sizes are powers of two, because Triton knows no others:
198 tokens are 128 + 64 + 16 = 208 rows. Only the last piece is ragged and pays for a mask. Longer
sequences (``*_blocks``) stream blocks of them past one block of rows with a running maximum. The
rows that fill no whole block are a tail of its own size: for 577 keys it is 16 wide, not 64.

Rows past the last token read as zeros. As queries they get log-sum-exp +inf, which makes their
probabilities 0; as keys they are masked wherever a maximum or a sum runs over keys: before and
after the exponential, as -inf times a scale of 0 is NaN. Where each key has a row of its own no
mask is needed: what is wrong there is never stored.

Exponentials are in base 2: ``scale2`` is scale * log2(e), ``lse`` the log2 of a row's sum.
"""

# ruff: noqa: RUF005  Triton's compiler adds tuples, but cannot unpack one into another.

from __future__ import annotations

import triton
import triton.language as tl

QUERIES, KEYS, BOTH, HEAD = (tl.constexpr(i) for i in range(4))

# ---------------------------------------------------------------------------------------------
# Rows of one head: D columns as PARTS tensors of WIDTH, a power of two
# ---------------------------------------------------------------------------------------------


@triton.jit
def _load_block(
    pointer, start, tokens, stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if RAGGED:
        return tl.load(at, mask=rows[:, None] < tokens, other=0.0)
    return tl.load(at)


@triton.jit
def _store_block(pointer, start, tokens, stride, value, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=rows[:, None] < tokens)


@triton.jit
def _load_rows(
    pointer, start, tokens, stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    parts = ()
    for i in tl.static_range(PARTS):
        block = _load_block(pointer + i * WIDTH, start, tokens, stride, ROWS, WIDTH, RAGGED)
        parts = parts + (block,)  # type: ignore[assignment]
    return parts


@triton.jit
def _store_rows(
    pointer, start, tokens, stride, parts, factor,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(PARTS):
        value = parts[i] * factor
        _store_block(pointer + i * WIDTH, start, tokens, stride, value, ROWS, WIDTH)


@triton.jit
def _store_column_sums(
    pointer, parts, factor, WIDTH: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Sums over the rows of one program; those past the last token are zeros, as their P is 0."""
    for i in tl.static_range(PARTS):
        tl.store(pointer + i * WIDTH + tl.arange(0, WIDTH), tl.sum(parts[i], 0) * factor)


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([ROWS, WIDTH], tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def _heads(index, heads):
    """Batch and head of one of the B * H, 64 bits wide: packed tensors pass 2^31 elements."""
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64)


# ---------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b in float32. UPCAST: the interpreter multiplies bfloat16 as raw 16-bit patterns."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _over_columns(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b^T of rows [., D]."""
    total = _dot(a[0], tl.trans(b[0]), PRECISION, UPCAST)
    for i in tl.static_range(1, PARTS):
        total += _dot(a[i], tl.trans(b[i]), PRECISION, UPCAST)
    return total


@triton.jit
def _add_products(
    sums, a, rows, PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """sums + a rows, of rows [., D]."""
    parts = ()
    for i in tl.static_range(PARTS):
        part = sums[i] + _dot(a, rows[i], PRECISION, UPCAST)
        parts = parts + (part,)  # type: ignore[assignment]
    return parts


@triton.jit
def _only_keys(x, start, tokens, fill, KEYS: tl.constexpr, RAGGED: tl.constexpr):
    """x [queries, keys] with fill for keys past the last token."""
    if RAGGED:
        x = tl.where((start + tl.arange(0, KEYS))[None, :] < tokens, x, fill)
    return x


@triton.jit
def _query_gradient(
    q, do, lse, delta, k, v, dq, start, tokens, scale2, PARTS: tl.constexpr,
    KEYS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq plus what one block of keys adds to it, without the factor scale."""
    p = tl.exp2(_over_columns(q, k, PARTS, PRECISION, UPCAST) * scale2 - lse[:, None])
    p = _only_keys(p, start, tokens, 0.0, KEYS, RAGGED)
    dp = _over_columns(do, v, PARTS, PRECISION, UPCAST)
    ds = (p * (dp - delta[:, None])).to(k[0].dtype)
    return _add_products(dq, ds, k, PARTS, PRECISION, UPCAST)


@triton.jit
def _key_gradients(
    k, v, q, do, lse, delta, dk, dv, scale2, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk (without the factor scale) and dv plus what one block of queries adds to them.

    Everything is transposed, [keys, queries]: so P and dS are left operands as they come.
    """
    p = tl.exp2(_over_columns(k, q, PARTS, PRECISION, UPCAST) * scale2 - lse[None, :])
    dv = _add_products(dv, p.to(do[0].dtype), do, PARTS, PRECISION, UPCAST)
    dp = _over_columns(v, do, PARTS, PRECISION, UPCAST)
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)
    return _add_products(dk, ds, q, PARTS, PRECISION, UPCAST), dv


@triton.jit
def _load_row_values(
    pointer, start, tokens, fill, ROWS: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    if RAGGED:
        return tl.load(pointer + rows, mask=rows < tokens, other=fill)
    return tl.load(pointer + rows)


@triton.jit
def _store_row_values(pointer, start, tokens, value, ROWS: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    tl.store(pointer + rows, value, mask=rows < tokens)


@triton.jit
def _row_products(a, b, PARTS: tl.constexpr):
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, PARTS):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


# ---------------------------------------------------------------------------------------------
# Up to 256 tokens: PIECES are the sizes, STARTS the first rows of what a program holds
# ---------------------------------------------------------------------------------------------


@triton.jit
def forward_whole_kernel(
    qkv, out, lse, heads, tokens, stride_b, stride_n, stride_p, stride_h, scale2,
    D: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits): the blocks of query rows of a head, dealt out to its splits."""
    index = tl.program_id(0)
    batch, head = _heads(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    out_stride = heads * D
    out_at = out + batch * tokens * out_stride + head * D
    lse_at = lse + index.to(tl.int64) * tokens
    last: tl.constexpr = len(PIECES) - 1

    keys, values = (), ()
    for i in tl.static_range(len(PIECES)):
        keys = keys + (  # type: ignore[assignment]
            _load_block(k_at, STARTS[i], tokens, stride_n, PIECES[i], D, i == last),
        )
        values = values + (  # type: ignore[assignment]
            _load_block(v_at, STARTS[i], tokens, stride_n, PIECES[i], D, i == last),
        )

    for start in range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS):
        q = _load_block(q_at, start, tokens, stride_n, ROWS, D, True)
        scores = ()
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for i in tl.static_range(len(PIECES)):
            s = _dot(q, tl.trans(keys[i]), PRECISION, UPCAST)
            known = _only_keys(s, STARTS[i], tokens, float("-inf"), PIECES[i], i == last)
            top = tl.maximum(top, tl.max(known, 1))
            scores = scores + (s,)  # type: ignore[assignment]
        top = top * scale2
        total = tl.zeros([ROWS], tl.float32)
        o = tl.zeros([ROWS, D], tl.float32)
        for i in tl.static_range(len(PIECES)):
            p = tl.exp2(scores[i] * scale2 - top[:, None])
            p = _only_keys(p, STARTS[i], tokens, 0.0, PIECES[i], i == last)
            total += tl.sum(p, 1)
            o += _dot(p.to(q.dtype), values[i], PRECISION, UPCAST)
        _store_block(out_at, start, tokens, out_stride, o / total[:, None], ROWS, D)
        _store_row_values(lse_at, start, tokens, top + tl.log2(total), ROWS)


# ---------------------------------------------------------------------------------------------
# Any number of tokens: a tail of TAIL rows, then full blocks of BLOCK rows, which need no mask.
# TAIL 0: no tail; the last block may be ragged, so every block is masked.
#
# The tail comes before the loop because of wgmma (sm_90). A product behind the software-pipelined
# loop would add to the loop's accumulators after other instructions have written their registers;
# ptxas then gives up overlapping products in the whole kernel and waits for each wgmma alone
# (warning C7515, "wgmma.mma_async instructions are serialized"). In front of the loop the tail only
# sets the accumulators that the loop starts with. kernels/aot.py fails on that warning.
# ---------------------------------------------------------------------------------------------


@triton.jit
def _rows_of_loop(tokens, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    return tokens if TAIL == 0 else (tokens - 1) // BLOCK * BLOCK


@triton.jit
def _forward_step(
    q, k_at, v_at, start, tokens, stride_n, top, total, o, scale2, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    k = _load_rows(k_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    s = _over_columns(q, k, PARTS, PRECISION, UPCAST)
    known = _only_keys(s, start, tokens, float("-inf"), KEYS, RAGGED)
    higher = tl.maximum(top, tl.max(known, 1) * scale2)
    p = _only_keys(tl.exp2(s * scale2 - higher[:, None]), start, tokens, 0.0, KEYS, RAGGED)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v = _load_rows(v_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    p = p.to(q[0].dtype)
    kept = ()
    for i in tl.static_range(PARTS):
        kept = kept + (o[i] * shrink[:, None],)  # type: ignore[assignment]
    return higher, total, _add_products(kept, p, v, PARTS, PRECISION, UPCAST)


@triton.jit
def forward_blocks_kernel(
    qkv, out, lse, heads, tokens, stride_b, stride_n, stride_p, stride_h, scale2,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of ROWS queries,), the blocks of a head side by side."""
    blocks = (tokens + ROWS - 1) // ROWS
    index, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = _heads(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    out_stride = heads * (PARTS * WIDTH)
    out_at = out + batch * tokens * out_stride + head * (PARTS * WIDTH)

    q = _load_rows(q_at, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = _zeros(ROWS, WIDTH, PARTS)
    full = _rows_of_loop(tokens, BLOCK, TAIL)
    if TAIL > 0:
        top, total, o = _forward_step(
            q, k_at, v_at, full, tokens, stride_n, top, total, o, scale2,
            WIDTH, PARTS, TAIL, True, PRECISION, UPCAST,
        )  # fmt: skip
    for at in range(0, full, BLOCK):
        top, total, o = _forward_step(
            q, k_at, v_at, at, tokens, stride_n, top, total, o, scale2,
            WIDTH, PARTS, BLOCK, TAIL == 0, PRECISION, UPCAST,
        )  # fmt: skip
    for i in tl.static_range(PARTS):
        value = o[i] / total[:, None]
        _store_block(out_at + i * WIDTH, start, tokens, out_stride, value, ROWS, WIDTH)
    lse_at = lse + index.to(tl.int64) * tokens
    _store_row_values(lse_at, start, tokens, top + tl.log2(total), ROWS)


@triton.jit
def _query_step(
    q, do, lse, delta, k_at, v_at, start, tokens, stride_n, dq, scale2, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    k = _load_rows(k_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    v = _load_rows(v_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    return _query_gradient(
        q, do, lse, delta, k, v, dq, start, tokens, scale2, PARTS, KEYS, RAGGED, PRECISION, UPCAST
    )


@triton.jit
def _query_role(
    q_at, do_at, o_at, dq_at, lse_at, delta_at, sums_at, start, tokens, stride_n, stride_p,
    grad_stride_n, out_stride, scale2, scale, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries; leaves its delta where there is a place for it."""
    q = _load_rows(q_at, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    do = _load_rows(do_at, start, tokens, grad_stride_n, ROWS, WIDTH, PARTS, True)
    o = _load_rows(o_at, start, tokens, out_stride, ROWS, WIDTH, PARTS, True)
    lse = _load_row_values(lse_at, start, tokens, float("inf"), ROWS, True)
    delta = _row_products(do, o, PARTS)
    if delta_at is not None:
        _store_row_values(delta_at, start, tokens, delta, ROWS)
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    dq = _zeros(ROWS, WIDTH, PARTS)
    full = _rows_of_loop(tokens, BLOCK, TAIL)
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
    if sums_at is not None:  # before the rows: in the other order ptxas spills on sm_100
        sums_at += start // ROWS * out_stride
        _store_column_sums(sums_at, dq, scale, WIDTH, PARTS)
    _store_rows(dq_at, start, tokens, 3 * out_stride, dq, scale, ROWS, WIDTH, PARTS)


@triton.jit
def _key_step(
    k, v, q_at, do_at, o_at, lse_at, delta_at, start, tokens, stride_n, grad_stride_n, out_stride,
    dk, dv, scale2, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    q = _load_rows(q_at, start, tokens, stride_n, ROWS, WIDTH, PARTS, RAGGED)
    do = _load_rows(do_at, start, tokens, grad_stride_n, ROWS, WIDTH, PARTS, RAGGED)
    lse = _load_row_values(lse_at, start, tokens, float("inf"), ROWS, RAGGED)
    if delta_at is None:
        o = _load_rows(o_at, start, tokens, out_stride, ROWS, WIDTH, PARTS, RAGGED)
        delta = _row_products(do, o, PARTS)
    else:
        delta = _load_row_values(delta_at, start, tokens, 0.0, ROWS, RAGGED)
    return _key_gradients(k, v, q, do, lse, delta, dk, dv, scale2, PARTS, PRECISION, UPCAST)


@triton.jit
def _key_role(
    q_at, do_at, o_at, dq_at, lse_at, delta_at, start, tokens, stride_n, stride_p,
    grad_stride_n, out_stride, scale2, scale, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys; delta is read where there is a place for it."""
    k = _load_rows(q_at + stride_p, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    v = _load_rows(q_at + stride_p + stride_p, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    dk = _zeros(ROWS, WIDTH, PARTS)
    dv = _zeros(ROWS, WIDTH, PARTS)
    full = _rows_of_loop(tokens, BLOCK, TAIL)
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

    QUERIES writes delta to row_sums, and KEYS reads it. BOTH has no row_sums: which of two
    neighbours runs first is open, so each computes its own delta. HEAD does all blocks of one head:
    first those of the queries, then those of the keys, which read delta.
    """
    blocks = (tokens + ROWS - 1) // ROWS
    block, index = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if ROLE == HEAD:
        index = tl.program_id(0)
    is_key = ROLE == KEYS
    if ROLE == BOTH:
        is_key = index % 2 == 1
        index = index // 2
    batch, head = _heads(index, heads)
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
        # Hoisted out of these loops, addresses cost a third of the registers.
        for each in tl.range(0, blocks, num_stages=1, disable_licm=True):
            _query_role(
                q_at, do_at, o_at, dq_at, lse_at, delta_at, sums_at, each * ROWS, tokens, stride_n,
                stride_p, grad_stride_n, out_stride, scale2, scale, WIDTH, PARTS, ROWS, BLOCK, TAIL,
                PRECISION, UPCAST,
            )  # fmt: skip
        tl.debug_barrier()  # delta as other threads of this program wrote it
        for each in tl.range(0, blocks, num_stages=1, disable_licm=True):
            _key_role(
                q_at, do_at, o_at, dq_at, lse_at, delta_at, each * ROWS, tokens, stride_n, stride_p,
                grad_stride_n, out_stride, scale2, scale, WIDTH, PARTS, ROWS, BLOCK, TAIL,
                PRECISION, UPCAST,
            )  # fmt: skip
    elif not is_key:  # in the other order ptxas spills on sm_100 (triton 3.6, float16)
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
