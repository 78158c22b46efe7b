"""Launcher and operators of the attention kernels, and the table of their tiles.

``deit_fast::attention`` is the differentiable operator; ``deit_fast::attention_forward`` and
``deit_fast::attention_backward`` are its two halves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from . import attention_kernel as kernel
from .launching import DTYPES, TYPE_NAMES, Inputs, Launch, Plans, implement, on_gpu, signature
from .rows import SUM_COLS, SUM_ROWS, sum_kernel

WIDTHS = (32, 64, 96, 128)
INTERPRETED = not isinstance(kernel.backward_kernel, triton.JITFunction)
AUTOTUNE = os.environ.get("DEIT_FAST_AUTOTUNE") == "1"

# Scores of 64 queries with more keys, or wider values, do not fit in the registers of 4 warps.
WHOLE_TOKENS, SHORT_WIDTH = 208, 64
# Up to here dq and dk, dv share a launch, and with it what they read; beyond, delta is worth one,
# and whole blocks alone spill on sm_100.
SHARED_TOKENS = WHOLE_TOKENS
LEAST_HEADS = 1024  # of B * H for `per_head`: 2.6 times what an H100 runs at once
PROCESSORS = 132  # of an H100: fewer heads than twice that are split, also on other GPUs


def takes(qkv: Tensor) -> bool:
    """Whether the kernels do this call: on a GPU, or on the CPU with TRITON_INTERPRET=1."""
    return takes_width(qkv, qkv.shape[-1])


def takes_width(x: Tensor, width: int) -> bool:
    """As ``takes``, of heads so wide, projected from x."""
    return (INTERPRETED or on_gpu(x)) and x.dtype in DTYPES and width in WIDTHS


# ---------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """rows of the block that stays, block: rows of those that stream past (whole heads: 0).

    per_head: of `both`: 1 where one program does a whole head. Its keys then read what its queries
    computed, which takes a fifth of the instructions away; but a program more or less is a head.
    """

    rows: int
    block: int
    warps: int
    stages: int
    per_head: int = 0


Key = tuple[int, str, int, int]

TILES_FILE = Path(__file__).with_name("attention_tiles.json")


def read_tiles(path: Path = TILES_FILE) -> dict[Key, Tiles]:
    """The table: (architecture, kernel, bytes of an element, width) to its tiles."""
    return {
        (row["architecture"], row["kernel"], row["bytes"], row["width"]): Tiles(*row["tiles"])
        for row in json.loads(path.read_text())
    }


def write_tiles(table: dict[Key, Tiles], path: Path = TILES_FILE) -> None:
    """Put rows into the table in a file, or into a new file: a row a line, to read in a diff."""
    names = ("architecture", "kernel", "bytes", "width")
    whole = (read_tiles(path) if path.exists() else {}) | table
    rows = [
        json.dumps(
            dict(zip(names, key, strict=True))
            | {"tiles": list(tiles if tiles.per_head else tiles[:4])}
        )
        for key, tiles in sorted(whole.items(), key=lambda item: (item[0][0], item[0][2]))
    ]
    path.write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")


# Architecture 0, for which no tuning has written its own: chosen by what `python -m
# deit_fast.kernels.aot` shows, no spills under any triton, then the most resident warps, then the
# largest tile. Elements of 4 bytes go without tensor cores: float32 products in full. The depth of
# the pipeline (stages) follows from the same. Under triton 3.6 `both` at 3 and `queries` at 2 spill
# on sm_100, and `keys` at 3 has one resident block on sm_90, not two; under 3.9 `whole` at 2 takes
# 254 registers.
TILES = read_tiles()

_STREAMED = [Tiles(*t) for t in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
CANDIDATES = dict.fromkeys(("forward", "both", "queries", "keys"), _STREAMED)
PER_HEAD = Tiles(64, 32, 4, 1, per_head=1)  # by machine code the best of its kind
_PER_HEAD = [PER_HEAD._replace(block=block, stages=n) for block in (32, 64) for n in (1, 2, 3)]
CANDIDATES["both"] = [*_STREAMED, *_PER_HEAD]
CANDIDATES["whole"] = [Tiles(*t) for t in itertools.product((64, 128), (0,), (4, 8), (1, 2))]

_measured: dict[Key, Tiles] = {}


def architecture(capability: tuple[int, int]) -> int:
    """80, 86, 90 or 100: what one of them runs well, all GPUs of its kind do.

    86 stands for GPUs with the matrix instructions of Ampere whose blocks have 99 KiB of shared
    memory: GeForce and its sisters up to Blackwell (8.6, 8.9, 12.x). An A100's have 163 KiB.
    """
    if capability[0] in (9, 10, 11):
        return 90 if capability[0] == 9 else 100
    return 80 if capability in ((8, 0), (8, 7)) else 86


def _key(kind: str, qkv: Tensor, arch: int | None) -> Key:
    if arch is None:
        arch = architecture(torch.cuda.get_device_capability(qkv.device)) if qkv.is_cuda else 0
    return arch, kind, qkv.dtype.itemsize, qkv.shape[-1]


def _tiles(key: Key) -> Tiles:
    return _measured.get(key) or TILES.get(key) or TILES[(0, *key[1:])]


def _compile_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Compile at once what would otherwise compile one by one: a candidate takes seconds."""

    def compile_one(launch: Launch) -> None:
        # What does not compile raises again where it is timed.
        with torch.cuda.device(device), contextlib.suppress(OutOfResources, PTXASError):
            launch.kernel.warmup(grid=launch.grid, **launch.arguments)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, launches))


def _milliseconds(launch: Launch, device: torch.device) -> float:
    """Median time of the kernel alone, by the GPU's clock, with none of its data in the L2."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(launch, return_mode="median"))
    start = time.perf_counter()  # the interpreter: a time, but of nothing that matters
    launch()
    return 1e3 * (time.perf_counter() - start)


def _tune(key: Key, prepare: Callable[[Tiles], Launch], device: torch.device) -> dict[Tiles, float]:
    """Milliseconds of each candidate that fits; the fastest serves this key from now on."""
    candidates = CANDIDATES[key[1]]
    if device.type == "cuda":
        _compile_all(map(prepare, candidates), device)
    times = {}
    for tiles in candidates:
        with contextlib.suppress(OutOfResources, PTXASError):  # too large for this GPU
            times[tiles] = _milliseconds(prepare(tiles), device)
    if not times:
        raise RuntimeError(f"attention: none of {len(candidates)} tiles of {key} launches")
    _measured[key] = min(times, key=times.__getitem__)
    for plans in (_forward_plans, _backward_plans):
        plans.clear()  # they hold the tiles of before
    return times


def _tuned_tiles(kind: str, qkv: Tensor, prepare: Callable[[Tiles], Launch]) -> Tiles:
    key = _key(kind, qkv, None)
    capturing = qkv.is_cuda and torch.cuda.is_current_stream_capturing()
    if AUTOTUNE and key not in _measured and not capturing:
        _tune(key, prepare, qkv.device)
    return _tiles(key)


def tune(qkv: Tensor) -> Iterator[tuple[Key, dict[Tiles, float]]]:
    """Time every kernel that qkv takes, one after the other: row of the table, milliseconds."""
    scale = 1 / math.sqrt(qkv.shape[-1])
    (forward,), backward = _kinds(qkv)
    out, lse = _outputs(qkv, scale)
    grad_qkv, row_sums = torch.empty_like(qkv), _row_sums(lse, backward)

    def prepare_forward(tiles: Tiles) -> Launch:
        return _forward_launch(forward, qkv, out, lse, scale, tiles)

    with torch.cuda.device_of(qkv):
        yield (key := _key(forward, qkv, None)), _tune(key, prepare_forward, qkv.device)
        prepare_forward(_tiles(key))()  # the backward reads what it wrote
        for kind in backward:

            def prepare(tiles: Tiles, kind: str = kind) -> Launch:
                return _backward_launch(
                    kind, out, qkv, out, lse, row_sums, grad_qkv, scale, None, tiles
                )

            key = _key(kind, qkv, None)
            yield key, _tune(key, prepare, qkv.device)


def _kinds(qkv: Tensor) -> tuple[tuple[str], tuple[str, ...]]:
    """The kernels of the forward and of the backward."""
    tokens, width = qkv.shape[1], triton.next_power_of_2(qkv.shape[-1])
    short = width <= SHORT_WIDTH and qkv.dtype.itemsize == 2
    whole, shared = short and tokens <= WHOLE_TOKENS, short and tokens <= SHARED_TOKENS
    return ("whole" if whole else "forward",), ("both",) if shared else ("queries", "keys")


# ---------------------------------------------------------------------------------------------
# Arguments: what a launch and an ahead-of-time compilation share
# ---------------------------------------------------------------------------------------------


def _pieces(tokens: int) -> tuple[int, ...]:
    """Powers of two, largest first, whose sum is tokens rounded up to 16."""
    rounded = -(-tokens // 16) * 16
    return tuple(size for size in (128, 64, 32, 16) if rounded & size)


def _columns(width: int, dtype: torch.dtype) -> int:
    """Columns multiplied at once: a power of two that divides the width.

    Of float32 rows 32, as without tensor cores a thread keeps whole rows of both factors.
    """
    return 32 if dtype == torch.float32 else width & -width


def _power_of_two(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: neighbouring columns side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    qkv: Tensor, out: Tensor, lse: Tensor, scale: float, kind: str, tiles: Tiles
) -> tuple[dict[str, Any], dict[str, int], int]:
    """What all kernels take; launch options; blocks of rows in a head."""
    _, tokens, _, heads, width = qkv.shape
    rows = min(tiles.rows, _power_of_two(tokens))
    values: dict[str, Any] = {"qkv": qkv, "out": out, "lse": lse, "heads": heads, "tokens": tokens}
    strides = ("stride_b", "stride_n", "stride_p", "stride_h")
    values |= dict(zip(strides, qkv.stride(), strict=False))
    values |= {"scale2": scale * math.log2(math.e)}
    values["ROWS"] = rows
    if kind == "whole":
        pieces = _pieces(tokens)
        values |= {"D": width, "PIECES": pieces}
        values["STARTS"] = tuple(itertools.accumulate((0, *pieces[:-1])))
    else:
        columns = _columns(width, qkv.dtype)
        values |= {"WIDTH": columns, "PARTS": width // columns}
        block = min(tiles.block, _power_of_two(tokens))
        values["BLOCK"] = block
        # In float32 a tail costs more than the masks it saves: products without tensor cores, in
        # the tail and in the loop, leave room for one resident block where the loop alone has two.
        values["TAIL"] = (
            0 if qkv.dtype == torch.float32 else _power_of_two((tokens - 1) % block + 1)
        )
    values["PRECISION"] = "ieee"
    values["UPCAST"] = INTERPRETED and qkv.dtype == torch.bfloat16
    return values, {"num_warps": tiles.warps, "num_stages": tiles.stages}, -(-tokens // rows)


_ROLES = {"queries": kernel.QUERIES, "keys": kernel.KEYS, "both": kernel.BOTH}


def _backward_arguments(
    grad_out: Tensor, grad_qkv: Tensor, row_sums: Tensor | None, scale: float, role: Any,
    bias_sums: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    strides = grad_out.stride()
    values: dict[str, Any] = {"grad_out": grad_out, "grad_qkv": grad_qkv, "row_sums": row_sums}
    values["bias_sums"] = bias_sums
    values |= {"grad_stride_b": strides[0], "grad_stride_n": strides[1], "scale": scale}
    return values | {"grad_stride_h": strides[2], "ROLE": role.value}


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------

_library = torch.library.Library("deit_fast", "FRAGMENT")
_library.define("attention(Tensor qkv, float scale, Tensor? query_bias=None) -> Tensor")
_library.define("attention_forward(Tensor qkv, float scale) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale, "
    "Tensor? query_bias=None) -> (Tensor, Tensor)"
)


def _outputs(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, width))
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.float32)


def _forward_launch(
    kind: str, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, tiles: Tiles
) -> Launch:
    programs = qkv.shape[0] * qkv.shape[3]
    values, options, blocks = _arguments(qkv, out, lse, scale, kind, tiles)
    if kind == "whole":
        splits = min(blocks, -(-2 * PROCESSORS // programs))
        return Launch(kernel.forward_whole_kernel, (programs, splits), values | options)
    return Launch(kernel.forward_blocks_kernel, (programs * blocks,), values | options)


def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and log2-sum-exp2 of the scaled scores, float32 [B, H, N]."""
    qkv = _readable(qkv)
    if qkv.numel() == 0:
        return _outputs(qkv, scale)
    return _forward_plans((qkv,), scale)  # type: ignore[return-value]


def _forward_results(inputs: Inputs, scale: float) -> tuple[Tensor, Tensor]:
    (qkv,) = inputs
    assert qkv is not None
    return _outputs(qkv, scale)


def _forward_launches(inputs: Any, outputs: Any, scale: float) -> Iterator[Launch]:
    (qkv,), (out, lse) = inputs, outputs
    ((kind,), _) = _kinds(qkv)

    def prepare(tiles: Tiles) -> Launch:
        return _forward_launch(kind, qkv, out, lse, scale, tiles)

    yield prepare(_tuned_tiles(kind, qkv, prepare))


_forward_plans = Plans(_forward_results, _forward_launches)


def _row_sums(lse: Tensor, kinds: tuple[str, ...]) -> Tensor | None:
    """Place for the row sums of dO * O that one kernel of the backward writes for the next."""
    return None if "both" in kinds else lse.new_empty(lse.shape)


def _backward_launch(
    kind: str, grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, row_sums: Tensor | None,
    grad_qkv: Tensor, scale: float, query_bias: Tensor | None, tiles: Tiles,
) -> Launch:  # fmt: skip
    values, options, blocks = _arguments(qkv, out, lse, scale, kind, tiles)
    heads, role = qkv.shape[0] * qkv.shape[3], _ROLES[kind]
    programs = heads * blocks
    if kind == "both":
        programs *= 2
        if tiles.per_head and heads >= LEAST_HEADS:
            role, programs, row_sums = kernel.HEAD, heads, lse.new_empty(lse.shape)
    sums = None
    if query_bias is not None and kind != "keys":
        sums = lse.new_empty((len(qkv) * blocks, query_bias.numel()))
    values |= _backward_arguments(grad_out, grad_qkv, row_sums, scale, role, sums)
    return Launch(kernel.backward_kernel, (programs,), values | options)


def _sum_launch(sums: Tensor, grad_bias: Tensor) -> Launch:
    channels = grad_bias.numel()
    values: dict[str, Any] = {"bias_sums": sums, "grad_bias": grad_bias, "count": len(sums)}
    values |= {"C": channels, "COLS": SUM_COLS, "ROWS": SUM_ROWS, "num_warps": 4, "num_stages": 1}
    return Launch(sum_kernel, (triton.cdiv(channels, SUM_COLS),), values)


def _backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float,
    query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    qkv, grad_out = _readable(qkv), _readable(grad_out)
    inputs = (qkv, grad_out, out, lse, query_bias)
    if qkv.numel() == 0:
        grad_qkv, grad_bias = _backward_results(inputs, scale)
        return grad_qkv, grad_bias.zero_()
    return _backward_plans(inputs, scale)  # type: ignore[return-value]


def _backward_results(inputs: Any, scale: float) -> tuple[Tensor, Tensor]:
    qkv, grad_out, out, lse, query_bias = inputs
    return _gradients(grad_out, qkv, out, lse, scale, query_bias)


def _backward_launches(inputs: Any, outputs: Any, scale: float) -> Iterator[Launch]:
    (qkv, grad_out, out, lse, query_bias), (grad_qkv, grad_bias) = inputs, outputs
    kinds = _kinds(qkv)[1]
    row_sums = _row_sums(lse, kinds)
    for kind in kinds:

        def prepare(tiles: Tiles, kind: str = kind) -> Launch:
            return _backward_launch(
                kind, grad_out, qkv, out, lse, row_sums, grad_qkv, scale, query_bias, tiles
            )

        launch = prepare(_tuned_tiles(kind, qkv, prepare))
        yield launch
        sums = launch.arguments["bias_sums"]
        if sums is not None:
            yield _sum_launch(sums, grad_bias)


_backward_plans = Plans(_backward_results, _backward_launches)


def _gradients(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float,
    query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Empty gradients of qkv and of the queries' bias; the latter without elements for no bias."""
    grad_bias = qkv.new_empty(0) if query_bias is None else query_bias.new_empty(query_bias.shape)
    return qkv.new_empty(qkv.shape), grad_bias


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float, query_bias: Tensor | None = None) -> Tensor:
        out, lse = torch.ops.deit_fast.attention_forward(qkv, scale)
        ctx.save_for_backward(qkv, out, lse, query_bias if ctx.needs_input_grad[2] else None)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor | None]:
        qkv, out, lse, query_bias = ctx.saved_tensors
        grad_qkv, grad_bias = torch.ops.deit_fast.attention_backward(
            grad_out, qkv, out, lse, ctx.scale, query_bias
        )
        return grad_qkv, None, None if query_bias is None else grad_bias


def _attention(qkv: Tensor, scale: float, query_bias: Tensor | None = None) -> Tensor:
    return torch.ops.deit_fast.attention_forward(qkv, scale)[0]  # type: ignore[no-any-return]


def _attention_fake(qkv: Tensor, scale: float, query_bias: Tensor | None = None) -> Tensor:
    return _outputs(qkv, scale)[0]


def _differentiable(qkv: Tensor, scale: float, query_bias: Tensor | None = None) -> Tensor:
    wants = qkv.requires_grad or (query_bias is not None and query_bias.requires_grad)
    if torch.is_grad_enabled() and wants:
        return _Attention.apply(qkv, scale, query_bias)  # type: ignore[no-any-return]
    return _attention(qkv, scale)


for _name, _function, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_forward", _forward, _outputs),
    ("attention_backward", _backward, _gradients),
):
    implement(_library, _name, _function, _fake)
_library.impl("attention", _differentiable, "Autograd")


# ---------------------------------------------------------------------------------------------
# Ahead of time
# ---------------------------------------------------------------------------------------------


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """(name, function, signature, constants, alignments, options, expectations) to compile."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(bf16, 6, tokens, 64) for tokens in (196, 198, 576, 577)]
    shapes += [(fp16, 6, 198, 64), (bf16, 12, 198, 32)]
    shapes += [(bf16, 6, 50, 64), (bf16, 6, 198, 96), (bf16, 6, 198, 128)]
    shapes += [(fp32, 6, 198, width) for width in (64, 96, 128)]
    shapes += [(bf16, 1, 1, 64)]  # Triton makes constants of sizes that are 1
    for dtype, heads, tokens, width in shapes:
        qkv = torch.empty((256, tokens, 3, heads, width), dtype=dtype, device="meta")
        ((forward,), backward), out, lse = _kinds(qkv), *_outputs(qkv, 0.125)
        row_sums, bias = _row_sums(lse, backward), lse.new_empty(heads * width)

        def backward_of(kind: str, tiles: Tiles) -> Launch:
            return _backward_launch(kind, out, qkv, out, lse, row_sums, qkv, 0.125, bias, tiles)  # noqa: B023

        calls = {
            forward: _forward_launch(forward, qkv, out, lse, 0.125, _tiles(_key(forward, qkv, 0)))
        }
        calls |= {kind: backward_of(kind, _tiles(_key(kind, qkv, 0))) for kind in backward}
        if "both" in calls and width == 64 and tokens > 64:
            calls["head"] = backward_of("both", PER_HEAD)
        for kind, call in calls.items():
            expect: dict[str, Any] = {"wide_loads": True, "i64_rows": True}
            if kind == "head":
                expect |= {"only_on": ("sm_80", "sm_90")}  # spills on sm_100 under triton 3.9
            if dtype != fp32:
                expect |= {"tensor_cores": True, "no_scalar_half": True}
            elif kind == "keys" and width > 64:
                expect |= {"wide_stores": False}  # 16 x 32 elements are 8 bytes a thread
            yield (
                f"{kind}-{TYPE_NAMES[dtype]}-N={tokens}-D={width}",
                call.kernel,
                *signature(call.kernel, call.arguments),
                {name: call.arguments[name] for name in ("num_warps", "num_stages")},
                expect,
            )
