"""Triton kernels of the attention: rows stay in the packed projection, no program shares a sum.

Up to 256 tokens (``*_whole``) one program holds all keys and values of a head, or in its backward
twin all queries, as a few pieces whose sizes are powers of two, because Triton knows no others:
198 tokens are 128 + 64 + 16 = 208 rows. Only the last piece is ragged and pays for a mask. Longer
sequences (``*_blocks``) stream blocks of them past one block of rows with a running maximum, and
end with a block of its own size: the tail of 577 keys is 16 wide, not 64.

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

QUERIES, KEYS, BOTH = (tl.constexpr(i) for i in range(3))

# ---------------------------------------------------------------------------------------------
# Rows of one head: D columns, padded to WIDTH, a power of two
# ---------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(
    pointer, start, tokens, stride,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if WIDTH != D:
        if RAGGED:
            return tl.load(at, mask=(rows[:, None] < tokens) & (cols[None, :] < D), other=0.0)
        return tl.load(at, mask=cols[None, :] < D, other=0.0)
    if RAGGED:
        return tl.load(at, mask=rows[:, None] < tokens, other=0.0)
    return tl.load(at)


@triton.jit
def _store_rows(
    pointer, start, tokens, stride, value, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    value = value.to(pointer.dtype.element_ty)
    if WIDTH != D:
        tl.store(at, value, mask=(rows[:, None] < tokens) & (cols[None, :] < D))
    else:
        tl.store(at, value, mask=rows[:, None] < tokens)


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
def _only_keys(x, start, tokens, fill, KEYS: tl.constexpr, RAGGED: tl.constexpr):
    """x [queries, keys] with fill for keys past the last token."""
    if RAGGED:
        x = tl.where((start + tl.arange(0, KEYS))[None, :] < tokens, x, fill)
    return x


@triton.jit
def _query_gradient(
    q, do, lse, delta, k, v, dq, start, tokens, scale2,
    KEYS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq plus what one block of keys adds to it, without the factor scale."""
    p = tl.exp2(_dot(q, tl.trans(k), PRECISION, UPCAST) * scale2 - lse[:, None])
    p = _only_keys(p, start, tokens, 0.0, KEYS, RAGGED)
    dp = _dot(do, tl.trans(v), PRECISION, UPCAST)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return dq + _dot(ds, k, PRECISION, UPCAST)


@triton.jit
def _key_gradients(
    k, v, q, do, lse, delta, dk, dv, scale2, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """dk (without the factor scale) and dv plus what one block of queries adds to them.

    Everything is transposed, [keys, queries]: so P and dS are left operands as they come.
    """
    p = tl.exp2(_dot(k, tl.trans(q), PRECISION, UPCAST) * scale2 - lse[None, :])
    dv += _dot(p.to(do.dtype), do, PRECISION, UPCAST)
    dp = _dot(v, tl.trans(do), PRECISION, UPCAST)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return dk + _dot(ds, q, PRECISION, UPCAST), dv


@triton.jit
def _load_row_values(pointer, start, tokens, fill, ROWS: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    return tl.load(pointer + rows, mask=rows < tokens, other=fill)


@triton.jit
def _store_row_values(pointer, start, tokens, value, ROWS: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    tl.store(pointer + rows, value, mask=rows < tokens)


@triton.jit
def _row_products(a, b):
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


# ---------------------------------------------------------------------------------------------
# Up to 256 tokens: PIECES are the sizes, STARTS the first rows of what a program holds
# ---------------------------------------------------------------------------------------------


@triton.jit
def forward_whole_kernel(
    qkv, out, lse, heads, tokens, stride_b, stride_n, stride_p, stride_h, scale2,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
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
            _load_rows(k_at, STARTS[i], tokens, stride_n, PIECES[i], D, WIDTH, i == last),
        )
        values = values + (  # type: ignore[assignment]
            _load_rows(v_at, STARTS[i], tokens, stride_n, PIECES[i], D, WIDTH, i == last),
        )

    for start in range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS):
        q = _load_rows(q_at, start, tokens, stride_n, ROWS, D, WIDTH, True)
        scores = ()
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for i in tl.static_range(len(PIECES)):
            s = _dot(q, tl.trans(keys[i]), PRECISION, UPCAST)
            known = _only_keys(s, STARTS[i], tokens, float("-inf"), PIECES[i], i == last)
            top = tl.maximum(top, tl.max(known, 1))
            scores = scores + (s,)  # type: ignore[assignment]
        top = top * scale2
        total = tl.zeros([ROWS], tl.float32)
        o = tl.zeros([ROWS, WIDTH], tl.float32)
        for i in tl.static_range(len(PIECES)):
            p = tl.exp2(scores[i] * scale2 - top[:, None])
            p = _only_keys(p, STARTS[i], tokens, 0.0, PIECES[i], i == last)
            total += tl.sum(p, 1)
            o += _dot(p.to(q.dtype), values[i], PRECISION, UPCAST)
        _store_rows(out_at, start, tokens, out_stride, o / total[:, None], ROWS, D, WIDTH)
        _store_row_values(lse_at, start, tokens, top + tl.log2(total), ROWS)


# ---------------------------------------------------------------------------------------------
# Any number of tokens: FULL blocks of BLOCK rows stream past, then one of TAIL rows
# ---------------------------------------------------------------------------------------------


@triton.jit
def _forward_step(
    q, k_at, v_at, start, tokens, stride_n, top, total, o, scale2, D: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    k = _load_rows(k_at, start, tokens, stride_n, KEYS, D, WIDTH, RAGGED)
    s = _dot(q, tl.trans(k), PRECISION, UPCAST)
    known = _only_keys(s, start, tokens, float("-inf"), KEYS, RAGGED)
    higher = tl.maximum(top, tl.max(known, 1) * scale2)
    p = _only_keys(tl.exp2(s * scale2 - higher[:, None]), start, tokens, 0.0, KEYS, RAGGED)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v = _load_rows(v_at, start, tokens, stride_n, KEYS, D, WIDTH, RAGGED)
    o = o * shrink[:, None] + _dot(p.to(q.dtype), v, PRECISION, UPCAST)
    return higher, total, o


@triton.jit
def forward_blocks_kernel(
    qkv, out, lse, heads, tokens, stride_b, stride_n, stride_p, stride_h, scale2,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of ROWS queries,), the blocks of a head side by side."""
    blocks = (tokens + ROWS - 1) // ROWS
    index, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = _heads(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    out_stride = heads * D
    out_at = out + batch * tokens * out_stride + head * D

    q = _load_rows(q_at, start, tokens, stride_n, ROWS, D, WIDTH, True)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    full = (tokens - 1) // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        top, total, o = _forward_step(
            q, k_at, v_at, at, tokens, stride_n, top, total, o, scale2,
            D, WIDTH, BLOCK, False, PRECISION, UPCAST,
        )  # fmt: skip
    top, total, o = _forward_step(
        q, k_at, v_at, full, tokens, stride_n, top, total, o, scale2,
        D, WIDTH, TAIL, True, PRECISION, UPCAST,
    )  # fmt: skip
    _store_rows(out_at, start, tokens, out_stride, o / total[:, None], ROWS, D, WIDTH)
    lse_at = lse + index.to(tl.int64) * tokens
    _store_row_values(lse_at, start, tokens, top + tl.log2(total), ROWS)


@triton.jit
def _query_role(
    q_at, do_at, o_at, dq_at, lse_at, delta_at, start, tokens, stride_n, stride_p, grad_stride_n,
    out_stride, scale2, scale, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries; leaves its delta where there is a place for it."""
    q = _load_rows(q_at, start, tokens, stride_n, ROWS, D, WIDTH, True)
    do = _load_rows(do_at, start, tokens, grad_stride_n, ROWS, D, WIDTH, True)
    o = _load_rows(o_at, start, tokens, out_stride, ROWS, D, WIDTH, True)
    lse = _load_row_values(lse_at, start, tokens, float("inf"), ROWS)
    delta = _row_products(do, o)
    if delta_at is not None:
        _store_row_values(delta_at, start, tokens, delta, ROWS)
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    full = (tokens - 1) // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        k = _load_rows(k_at, at, tokens, stride_n, BLOCK, D, WIDTH, False)
        v = _load_rows(v_at, at, tokens, stride_n, BLOCK, D, WIDTH, False)
        dq = _query_gradient(
            q, do, lse, delta, k, v, dq, at, tokens, scale2, BLOCK, False, PRECISION, UPCAST
        )
    k = _load_rows(k_at, full, tokens, stride_n, TAIL, D, WIDTH, True)
    v = _load_rows(v_at, full, tokens, stride_n, TAIL, D, WIDTH, True)
    dq = _query_gradient(
        q, do, lse, delta, k, v, dq, full, tokens, scale2, TAIL, True, PRECISION, UPCAST
    )
    _store_rows(dq_at, start, tokens, 3 * out_stride, dq * scale, ROWS, D, WIDTH)


@triton.jit
def _key_step(
    k, v, q_at, do_at, o_at, lse_at, delta_at, start, tokens, stride_n, grad_stride_n, out_stride,
    dk, dv, scale2, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    q = _load_rows(q_at, start, tokens, stride_n, ROWS, D, WIDTH, RAGGED)
    do = _load_rows(do_at, start, tokens, grad_stride_n, ROWS, D, WIDTH, RAGGED)
    lse = _load_row_values(lse_at, start, tokens, float("inf"), ROWS)
    if delta_at is None:
        o = _load_rows(o_at, start, tokens, out_stride, ROWS, D, WIDTH, RAGGED)
        delta = _row_products(do, o)
    else:
        delta = _load_row_values(delta_at, start, tokens, 0.0, ROWS)
    return _key_gradients(k, v, q, do, lse, delta, dk, dv, scale2, PRECISION, UPCAST)


@triton.jit
def _key_role(
    q_at, do_at, o_at, dq_at, lse_at, delta_at, start, tokens, stride_n, stride_p, grad_stride_n,
    out_stride, scale2, scale, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys; delta is read where there is a place for it."""
    k = _load_rows(q_at + stride_p, start, tokens, stride_n, ROWS, D, WIDTH, True)
    v = _load_rows(q_at + stride_p + stride_p, start, tokens, stride_n, ROWS, D, WIDTH, True)
    dk = tl.zeros([ROWS, WIDTH], tl.float32)
    dv = tl.zeros([ROWS, WIDTH], tl.float32)
    full = (tokens - 1) // BLOCK * BLOCK
    for at in range(0, full, BLOCK):
        dk, dv = _key_step(
            k, v, q_at, do_at, o_at, lse_at, delta_at, at, tokens, stride_n, grad_stride_n,
            out_stride, dk, dv, scale2, D, WIDTH, BLOCK, False, PRECISION, UPCAST,
        )  # fmt: skip
    dk, dv = _key_step(
        k, v, q_at, do_at, o_at, lse_at, delta_at, full, tokens, stride_n, grad_stride_n,
        out_stride, dk, dv, scale2, D, WIDTH, TAIL, True, PRECISION, UPCAST,
    )  # fmt: skip
    dk_at = dq_at + out_stride
    _store_rows(dk_at, start, tokens, 3 * out_stride, dk * scale, ROWS, D, WIDTH)
    _store_rows(dk_at + out_stride, start, tokens, 3 * out_stride, dv, ROWS, D, WIDTH)


@triton.jit
def backward_kernel(
    qkv, grad_out, out, lse, delta, grad_qkv, heads, tokens,
    stride_b, stride_n, stride_p, stride_h, grad_stride_b, grad_stride_n, grad_stride_h,
    scale2, scale, ROLE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * [2 *] blocks of ROWS,). ROLE: QUERIES, KEYS, or BOTH, which shares reads.

    QUERIES leaves delta = row sums of dO * O, float [B, H, N], and KEYS reads it. BOTH has no
    delta: which of two neighbours runs first is open, so each makes its own.
    """
    blocks = (tokens + ROWS - 1) // ROWS
    block, index = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    is_key = ROLE == KEYS
    if ROLE == BOTH:
        is_key = index % 2 == 1
        index = index // 2
    batch, head = _heads(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    do_at = grad_out + batch * grad_stride_b + head * grad_stride_h
    out_stride = heads * D
    o_at = out + batch * tokens * out_stride + head * D
    dq_at = grad_qkv + batch * tokens * (3 * out_stride) + head * D
    row = index.to(tl.int64) * tokens
    lse_at = lse + row
    delta_at = delta
    if delta is not None:
        delta_at = delta + row
    if is_key:
        _key_role(
            q_at, do_at, o_at, dq_at, lse_at, delta_at, block * ROWS, tokens, stride_n, stride_p,
            grad_stride_n, out_stride, scale2, scale, D, WIDTH, ROWS, BLOCK, TAIL,
            PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _query_role(
            q_at, do_at, o_at, dq_at, lse_at, delta_at, block * ROWS, tokens, stride_n, stride_p,
            grad_stride_n, out_stride, scale2, scale, D, WIDTH, ROWS, BLOCK, TAIL,
            PRECISION, UPCAST,
        )  # fmt: skip
