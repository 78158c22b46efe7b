"""Kernels that break the rules of deit_fast.kernels.aot, one each and clean ones; test_aot.py runs
this file and reads the lines. Compiling needs a process without Triton's interpreter, hence a file.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.kernels.aot import Case, gate


@triton.jit
def scale_rows(
    x_ptr,  # [B, C] rows of `stride` elements
    y_ptr,  # the same
    stride,
    factor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
):
    row = tl.program_id(0)
    if WIDE_ROWS:
        row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < C).to(tl.float32)
    y = x * factor / tl.sum(x, 0)
    tl.store(y_ptr + row * stride + columns, y.to(y_ptr.dtype.element_ty), mask=columns < C)


@triton.jit
def load_block(x_ptr, start, BLOCK: tl.constexpr):
    rows, columns = start + tl.arange(0, BLOCK), tl.arange(0, 64)
    return tl.load(x_ptr + rows[:, None] * 64 + columns[None, :])


@triton.jit
def add_block(q, sums, x_ptr, start, BLOCK: tl.constexpr):
    x = load_block(x_ptr, start, BLOCK)
    weights = tl.exp2(tl.dot(q, tl.trans(x)))
    return sums + tl.dot(weights.to(x.dtype), x)


@triton.jit
def weighted_sums(
    q_ptr,  # [64, 64]
    x_ptr,  # [rows + 16, 64]
    y_ptr,  # [64, 64]
    rows,
    TAIL_FIRST: tl.constexpr,
):
    """A small attention. With the last 16 rows after the pipelined loop ptxas serializes wgmma."""
    q = load_block(q_ptr, 0, 64)
    sums = tl.zeros([64, 64], tl.float32)
    if TAIL_FIRST:
        sums = add_block(q, sums, x_ptr, rows, 16)
    for start in range(0, rows, 64):
        sums = add_block(q, sums, x_ptr, start, 64)
    if not TAIL_FIRST:
        sums = add_block(q, sums, x_ptr, rows, 16)
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y_ptr + at, sums)


SIGNATURE = {"x_ptr": "*bf16", "y_ptr": "*bf16", "stride": "i32", "factor": "fp32"}
CONSTEXPRS = {"stride": 1000, "C": 1000, "BLOCK": 1024, "WIDE_ROWS": True}
EXPECT = {"wide_loads": True, "no_scalar_half": True, "i64_rows": True, "max_regs": 255}
ALIGNED = {"x_ptr": 16, "y_ptr": 16}
GOOD = Case("good", scale_rows, SIGNATURE, CONSTEXPRS, ALIGNED, {"num_warps": 4}, EXPECT)
FLOATS = SIGNATURE | {"x_ptr": "*fp32", "y_ptr": "*fp32"}
RUN_TIME_STRIDE = {name: CONSTEXPRS[name] for name in ("C", "BLOCK", "WIDE_ROWS")}

PIPELINED = Case(
    "tail before the loop",
    weighted_sums,
    {"q_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*fp32", "rows": "i32"},
    {"TAIL_FIRST": True},
    {"q_ptr": 16, "x_ptr": 16, "y_ptr": 16},
    {"num_warps": 4, "num_stages": 3},
    {"wide_loads": True, "tensor_cores": True},
)

CASES = [
    GOOD,
    PIPELINED,
    PIPELINED._replace(name="tail after the loop", constexprs={"TAIL_FIRST": False}),
    GOOD._replace(name="run-time stride", constexprs=RUN_TIME_STRIDE),
    GOOD._replace(
        name="run-time stride, fp32",
        signature=FLOATS,
        constexprs=RUN_TIME_STRIDE,
        expect={"wide_loads": True, "max_scalar_loads": 0, "max_scalar_stores": 0},
    ),
    GOOD._replace(name="misaligned", attrs={}),
    GOOD._replace(name="int32 rows", constexprs=CONSTEXPRS | {"WIDE_ROWS": False}),
    GOOD._replace(name="double", signature=SIGNATURE | {"factor": "fp64"}),
    GOOD._replace(name="few registers", expect=EXPECT | {"max_regs": 8}),
    GOOD._replace(name="no matrices", expect=EXPECT | {"tensor_cores": True}),
    GOOD._replace(name="typing error", expect=EXPECT | {"wide_load": True}),
    # 8192 values in the registers of one warp: 256 a thread
    GOOD._replace(
        name="spills",
        constexprs=CONSTEXPRS | {"stride": 8192, "C": 8192, "BLOCK": 8192},
        signature=FLOATS,
        options={"num_warps": 1},
    ),
]

if __name__ == "__main__":
    print(*gate(CASES, ["sm_90"])[1], sep="\n")
