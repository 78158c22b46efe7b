"""Forward of the attention: rows of the packed projection, kernels, launcher and operator.

Up to 256 tokens `forward_whole_kernel` holds all keys and values of a head in registers, as a few
pieces whose sizes are powers of two, because Triton has no other sizes: 198 tokens are 128 + 64 +
16 = 208 rows. Only the last piece is ragged and needs a mask. For longer sequences
`forward_blocks_kernel` streams blocks of keys and values past one block of queries, with a running
maximum. The rows that fill no whole block are a tail with a size of its own: for 577 keys it is 16
wide, not 64.

Rows past the last token read as zeros. As queries their log-sum-exp is +inf, which makes their
probabilities 0. As keys they are masked wherever a maximum or a sum runs over keys: before and
after the exponential, because -inf times a scale of 0 is NaN. Where each key has a row of its own,
no mask is needed, because a wrong row is never stored.

Exponentials are in base 2: ``scale2`` is scale * log2(e), ``lse`` the log2 of a row's sum.
"""

# ruff: noqa: RUF005  Triton's compiler adds tuples, but cannot unpack one into another.

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import Tiles, choose_tiles
from .launching import INTERPRETED, launch, operator, planned

# Scores of 64 queries with more keys, or wider values, do not fit in the registers of 4 warps.
WHOLE_TOKENS, SHORT_WIDTH = 208, 64
PROCESSORS = 132  # of an H100: fewer heads than twice that are split, also on other GPUs


# ---------------------------------------------------------------------------------------------
# Rows of one head: D columns as a tuple of PARTS tensors with WIDTH columns, a power of two
# ---------------------------------------------------------------------------------------------


@triton.jit
def load_block(
    pointer, start, tokens, stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if RAGGED:
        return tl.load(at, mask=rows[:, None] < tokens, other=0.0)
    return tl.load(at)


@triton.jit
def store_block(pointer, start, tokens, stride, value, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows, cols = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=rows[:, None] < tokens)


@triton.jit
def load_rows(
    pointer, start, tokens, stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    parts = ()
    for i in tl.static_range(PARTS):
        block = load_block(pointer + i * WIDTH, start, tokens, stride, ROWS, WIDTH, RAGGED)
        parts = parts + (block,)  # type: ignore[assignment]
    return parts


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([ROWS, WIDTH], tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def heads_of(index, heads):
    """Batch and head of index B * H, in 64 bits: packed tensors exceed 2^31 elements."""
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64)


@triton.jit
def load_row_values(
    pointer, start, tokens, fill, ROWS: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    if RAGGED:
        return tl.load(pointer + rows, mask=rows < tokens, other=fill)
    return tl.load(pointer + rows)


@triton.jit
def store_row_values(pointer, start, tokens, value, ROWS: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    tl.store(pointer + rows, value, mask=rows < tokens)


# ---------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b in float32. UPCAST first: the interpreter multiplies bfloat16 as 16-bit integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def over_columns(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b^T of rows [., D]."""
    total = dot(a[0], tl.trans(b[0]), PRECISION, UPCAST)
    for i in tl.static_range(1, PARTS):
        total += dot(a[i], tl.trans(b[i]), PRECISION, UPCAST)
    return total


@triton.jit
def add_products(sums, a, rows, PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """sums + a rows, of rows [., D]."""
    parts = ()
    for i in tl.static_range(PARTS):
        part = sums[i] + dot(a, rows[i], PRECISION, UPCAST)
        parts = parts + (part,)  # type: ignore[assignment]
    return parts


@triton.jit
def only_keys(x, start, tokens, fill, KEYS: tl.constexpr, RAGGED: tl.constexpr):
    """x [queries, keys] with fill for keys past the last token."""
    if RAGGED:
        x = tl.where((start + tl.arange(0, KEYS))[None, :] < tokens, x, fill)
    return x


# ---------------------------------------------------------------------------------------------
# Up to 256 tokens: PIECES are the sizes of the pieces, STARTS their first rows
# ---------------------------------------------------------------------------------------------


@triton.jit
def forward_whole_kernel(
    qkv, out, lse, heads, tokens, stride_b, stride_n, stride_p, stride_h, scale2,
    D: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, STARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits). The splits of a head share its blocks of query rows."""
    index = tl.program_id(0)
    batch, head = heads_of(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    out_stride = heads * D
    out_at = out + batch * tokens * out_stride + head * D
    lse_at = lse + index.to(tl.int64) * tokens
    last: tl.constexpr = len(PIECES) - 1

    keys, values = (), ()
    for i in tl.static_range(len(PIECES)):
        keys = keys + (  # type: ignore[assignment]
            load_block(k_at, STARTS[i], tokens, stride_n, PIECES[i], D, i == last),
        )
        values = values + (  # type: ignore[assignment]
            load_block(v_at, STARTS[i], tokens, stride_n, PIECES[i], D, i == last),
        )

    for start in range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS):
        q = load_block(q_at, start, tokens, stride_n, ROWS, D, True)
        scores = ()
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for i in tl.static_range(len(PIECES)):
            s = dot(q, tl.trans(keys[i]), PRECISION, UPCAST)
            known = only_keys(s, STARTS[i], tokens, float("-inf"), PIECES[i], i == last)
            top = tl.maximum(top, tl.max(known, 1))
            scores = scores + (s,)  # type: ignore[assignment]
        top = top * scale2
        total = tl.zeros([ROWS], tl.float32)
        o = tl.zeros([ROWS, D], tl.float32)
        for i in tl.static_range(len(PIECES)):
            p = tl.exp2(scores[i] * scale2 - top[:, None])
            p = only_keys(p, STARTS[i], tokens, 0.0, PIECES[i], i == last)
            total += tl.sum(p, 1)
            o += dot(p.to(q.dtype), values[i], PRECISION, UPCAST)
        store_block(out_at, start, tokens, out_stride, o / total[:, None], ROWS, D)
        store_row_values(lse_at, start, tokens, top + tl.log2(total), ROWS)


# ---------------------------------------------------------------------------------------------
# Any number of tokens: a tail of TAIL rows, then full blocks of BLOCK rows, which need no mask.
# TAIL 0: no tail; the last block may be ragged, so every block is masked.
#
# The tail comes before the loop because of wgmma (sm_90). A product after the software-pipelined
# loop would add to the loop's accumulators after other instructions have written their registers.
# ptxas then does not overlap any products in the kernel and waits for each wgmma alone (warning
# C7515, "wgmma.mma_async instructions are serialized"; kernels/aot.py fails on it). Before the loop
# the tail only sets the accumulators that the loop starts with.
# ---------------------------------------------------------------------------------------------


@triton.jit
def rows_of_loop(tokens, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    return tokens if TAIL == 0 else (tokens - 1) // BLOCK * BLOCK


@triton.jit
def _forward_step(
    q, k_at, v_at, start, tokens, stride_n, top, total, o, scale2, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    s = over_columns(q, k, PARTS, PRECISION, UPCAST)
    known = only_keys(s, start, tokens, float("-inf"), KEYS, RAGGED)
    higher = tl.maximum(top, tl.max(known, 1) * scale2)
    p = only_keys(tl.exp2(s * scale2 - higher[:, None]), start, tokens, 0.0, KEYS, RAGGED)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v = load_rows(v_at, start, tokens, stride_n, KEYS, WIDTH, PARTS, RAGGED)
    p = p.to(q[0].dtype)
    kept = ()
    for i in tl.static_range(PARTS):
        kept = kept + (o[i] * shrink[:, None],)  # type: ignore[assignment]
    return higher, total, add_products(kept, p, v, PARTS, PRECISION, UPCAST)


@triton.jit
def forward_blocks_kernel(
    qkv, out, lse, heads, tokens, stride_b, stride_n, stride_p, stride_h, scale2,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of ROWS queries,), the blocks of a head next to each other."""
    blocks = (tokens + ROWS - 1) // ROWS
    index, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = heads_of(index, heads)
    q_at = qkv + batch * stride_b + head * stride_h
    k_at, v_at = q_at + stride_p, q_at + stride_p + stride_p
    out_stride = heads * (PARTS * WIDTH)
    out_at = out + batch * tokens * out_stride + head * (PARTS * WIDTH)

    q = load_rows(q_at, start, tokens, stride_n, ROWS, WIDTH, PARTS, True)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = zeros(ROWS, WIDTH, PARTS)
    full = rows_of_loop(tokens, BLOCK, TAIL)
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
        store_block(out_at + i * WIDTH, start, tokens, out_stride, value, ROWS, WIDTH)
    lse_at = lse + index.to(tl.int64) * tokens
    store_row_values(lse_at, start, tokens, top + tl.log2(total), ROWS)


# ---------------------------------------------------------------------------------------------
# Launcher and operator
# ---------------------------------------------------------------------------------------------


def is_short(qkv: Tensor) -> bool:
    """Whether a head is narrow enough for the kernels of short sequences."""
    return triton.next_power_of_2(qkv.shape[-1]) <= SHORT_WIDTH and qkv.dtype.itemsize == 2


def forward_kind(qkv: Tensor) -> str:
    """The kind of kernel, as in the table of tiles."""
    return "whole" if is_short(qkv) and qkv.shape[1] <= WHOLE_TOKENS else "forward"


def readable(x: Tensor) -> Tensor:
    """x with contiguous columns, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pieces_of(tokens: int) -> tuple[int, ...]:
    """Powers of two, largest first, whose sum is the number of tokens rounded up to 16."""
    rounded = -(-tokens // 16) * 16
    return tuple(size for size in (128, 64, 32, 16) if rounded & size)


def power_of_two(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


def qkv_arguments(qkv: Tensor, scale: float) -> dict[str, Any]:
    """Arguments of all kernels that follow from qkv and the scale."""
    stride_b, stride_n, stride_p, stride_h, _ = qkv.stride()
    return {
        "qkv": qkv, "tokens": qkv.shape[1], "heads": qkv.shape[3],
        "scale2": scale * math.log2(math.e),
        "stride_b": stride_b, "stride_n": stride_n, "stride_p": stride_p, "stride_h": stride_h,
        "PRECISION": "ieee", "UPCAST": INTERPRETED and qkv.dtype == torch.bfloat16,
    }  # fmt: skip


def block_arguments(qkv: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Tile and options of the kernels that stream blocks."""
    tokens, width = qkv.shape[1], qkv.shape[-1]
    is_float32 = qkv.dtype == torch.float32
    # Columns multiplied at once, a power of two. Of float32 rows 32: without tensor cores a thread
    # keeps whole rows of both factors.
    columns = 32 if is_float32 else width & -width
    block = min(tiles.block, power_of_two(tokens))
    # In float32 a tail costs more than the masks that it saves: products without tensor cores, in
    # the tail and in the loop, leave registers for one resident block instead of two.
    tail = 0 if is_float32 else power_of_two((tokens - 1) % block + 1)
    return {
        "WIDTH": columns, "PARTS": width // columns, "BLOCK": block, "TAIL": tail,
        "ROWS": min(tiles.rows, power_of_two(tokens)),
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def forward_results(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, N, H, D] and lse, float32 [B, H, N], without values."""
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, width))
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.float32)


def launch_forward(qkv: Tensor, out: Tensor, lse: Tensor, scale: float, tiles: Tiles) -> None:
    """Write the output and the log2-sum-exp2 of the scaled scores."""
    batch, tokens, _, heads, width = qkv.shape
    programs = batch * heads
    arguments = qkv_arguments(qkv, scale) | {"out": out, "lse": lse}
    if forward_kind(qkv) == "forward":
        arguments |= block_arguments(qkv, tiles)
        grid = (programs * triton.cdiv(tokens, arguments["ROWS"]),)
        launch(forward_blocks_kernel, grid, **arguments)
        return
    rows, pieces = min(tiles.rows, power_of_two(tokens)), pieces_of(tokens)
    splits = min(triton.cdiv(tokens, rows), triton.cdiv(2 * PROCESSORS, programs))
    launch(
        forward_whole_kernel, (programs, splits), **arguments,
        D=width, ROWS=rows, PIECES=pieces,
        STARTS=tuple(itertools.accumulate((0, *pieces[:-1]))),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@planned
def forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = forward_results(qkv, scale)
    if qkv.numel() == 0:
        return out, lse

    def launcher(tiles: Tiles) -> None:
        launch_forward(qkv, out, lse, scale, tiles)

    launcher(choose_tiles(forward_kind(qkv), qkv, launcher))
    return out, lse


forward_op = operator(
    "attention_forward(Tensor qkv, float scale) -> (Tensor, Tensor)",
    lambda qkv, scale: forward(readable(qkv), scale), forward_results,
)  # fmt: skip
