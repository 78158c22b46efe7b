"""Self-attention straight from the packed projection, exact and without atomics.

With q, k, v the three [B, N, H, D] slices of qkv [B, N, 3, H, D], for every batch and head

    S = scale q k^T        P = softmax over keys of S        O = P v

and backward, from dO and the saved log-sum-exp of S (Dao et al. 2022, algorithm 4)

    dV = P^T dO    dP = dO v^T    dS = P * (dP - row sums of dO * O)
    dq = scale dS k               dk = scale dS^T q

Nothing is permuted or copied before, and dq, dk, dv are written into one packed tensor. Around
scaled_dot_product_attention timm does permute, unbind, transpose and, in the backward, stack, which
moves up to five more tensors.

Bytes: with T = B N H D elements a forward reads 3 T and writes T, and 4 bytes a row of log-sum-exp;
a backward reads qkv, O, dO and writes 3 T: 8 T. FLOPs: 4 B H N^2 D forward, 10 B H N^2 D backward;
these kernels do 14, because dq and dk, dv each recompute S and dP where others use atomic adds.

Limit, B=256 H=6 N=198 D=64 bf16 on an H100 (3.0 TB/s copy, 798 TFLOP/s): 157 MB and 15.4 GF are
52 us of memory and 19 us of tensor cores forward, 313 MB and 104 / 48 us backward. So up to some
500 tokens memory is the limit, unless tiles waste the tensor cores: for 198 tokens tiles of 192 x
128 are 40 % useful work. The forward here uses 64 rows x (128 + 64 + 16) keys, 74 % useful with the
last block of rows; the backward 64 x (6 * 32 + 16), the same. At 577 tokens 128 x (9 * 64 + 16) are
88 % useful. The backward thus issues 1.9 times its useful FLOPs, 90 us at the peak, and reads 28 T
from the L2 cache, the second limit after memory. The forward reads 4 T from it, because a head is
on chip as a whole.

Numerics: float32 scores, softmax and sums; P and dS are rounded to the dtype of qkv before their
products. float32 input is multiplied in full float32 (no TF32): correct, not fast. Two runs give
the same bits: no sum depends on the order in which programs finish.

On a GPU float32, bfloat16 and float16 with D of 32, 64, 96 or 128 run on the kernels; 96 columns
are multiplied as three times 32, without padding. float64, other D, the CPU and GPUs older than
Ampere take the reference in plain PyTorch. With TRITON_INTERPRET=1 a CPU runs the kernels in
Triton's interpreter.

Tiles come from a fixed table, attention_tiles.json. With DEIT_FAST_AUTOTUNE=1 the first call of
each kind times the candidates on its own tensors, outside of graph capture. To measure this GPU's
rows and write them into the table, or with --out into another file:

    python -m deit_fast.kernels.attention --tune [--batch 256 --heads 6 --tokens 198 577]

Times are the GPU's own (CUDA events around the kernel alone, the L2 cleared before each run).

Kernels and launchers: attention_forward.py and attention_backward.py; tiles: attention_tiles.py.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import attention_tiles
from .attention_backward import attention_op, backward_kinds, launch_backward
from .attention_forward import forward_kind, forward_results, launch_forward
from .attention_tiles import PER_HEAD, TILES_FILE, Key, Tiles, key_of, tiles_of
from .checks import check_tensor
from .launching import TYPE_NAMES, Launch, can_run

__all__ = ["attention_qkvpacked"]

WIDTHS = (32, 64, 96, 128)  # of a head


def reference(qkv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of [B, N, 3, H, D]; float32 inside, float64 for float64 input."""
    inner = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    with torch.autocast(qkv.device.type, enabled=False):  # it would make the products bfloat16
        q, k, v = qkv.to(inner).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax((q @ k.transpose(-2, -1)) * scale, dim=-1)
        return (weights @ v).transpose(1, 2).contiguous().to(qkv.dtype)


# ---------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------


def uses_kernels(x: Tensor, width: int) -> bool:
    """Whether attention_qkvpacked uses kernels for heads of this width and x's device and dtype."""
    return width in WIDTHS and can_run(x)


def attention_qkvpacked(
    qkv: Tensor, scale: float | None = None, *, query_bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T) v, with attention between all tokens.

    Args:
        qkv: float [B, N, 3, H, D], in any memory layout. The kernels read it in place if columns
            are contiguous, and otherwise from a copy. B may be 0. Under autocast it is cast like
            the input of PyTorch's own attention.
        scale: factor of the scores, finite and not negative; None: 1 / sqrt(D).
        query_bias: float [H D], the bias that the queries already contain without a gradient. Its
            value is not read. Its gradient is computed here: the sums of the queries' gradient over
            samples and tokens, in float32 in the same pass. The keys' bias needs no such argument:
            it adds one number to all scores of a query, so its gradient is 0. Nor does the values'
            bias: the weights of a query sum to 1, so its gradient is the sum of ``grad_out`` over
            samples and tokens.

    Returns:
        [B, N, H, D], contiguous, in the dtype of qkv (under autocast in that of autocast).

    Raises:
        ValueError: a shape, dtype or scale that does not fit, by name and value.
    """
    check_tensor("qkv", qkv, "floats", ("B", "N", 3, "H", "D"))
    if 0 in qkv.shape[1:]:
        raise ValueError(
            f"qkv must have shape [B, N, 3, H, D] with N, H, D > 0, not {tuple(qkv.shape)}"
        )
    if scale is None:
        scale = 1 / math.sqrt(qkv.shape[-1])
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, not {scale}")
    if query_bias is not None:
        check_tensor("query_bias", query_bias, "floats", (qkv.shape[3:].numel(),), qkv, "qkv")
    device = qkv.device.type
    if qkv.dtype != torch.float64 and torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    if uses_kernels(qkv, qkv.shape[-1]):
        result: Tensor = attention_op(qkv, float(scale), query_bias)
        return result
    if query_bias is not None:  # zeros, through which the gradient flows
        zero = (query_bias - query_bias.detach()).to(qkv.dtype).view(qkv.shape[3:])
        qkv = torch.cat((qkv[:, :, :1] + zero, qkv[:, :, 1:]), 2)
    return reference(qkv, scale)


# ---------------------------------------------------------------------------------------------
# Ahead of time
# ---------------------------------------------------------------------------------------------


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(bf16, 6, tokens, 64) for tokens in (196, 198, 576, 577)]
    shapes += [(fp16, 6, 198, 64), (bf16, 12, 198, 32)]
    shapes += [(bf16, 6, 50, 64), (bf16, 6, 198, 96), (bf16, 6, 198, 128)]
    shapes += [(fp32, 6, 198, width) for width in (64, 96, 128)]
    shapes += [(bf16, 1, 1, 64)]  # Triton makes constants of sizes that are 1
    for dtype, heads, tokens, width in shapes:
        qkv = torch.empty((256, tokens, 3, heads, width), dtype=dtype, device="meta")
        launchers = launchers_of(qkv, bias=True)
        launches = {
            kind: attention_tiles.recorded_launch(launcher, tiles_of(key_of(kind, qkv)))
            for kind, launcher in launchers.items()
        }
        if "both" in launches and width == 64 and tokens > 64:
            launches["head"] = attention_tiles.recorded_launch(launchers["both"], PER_HEAD)
        for kind, launch in launches.items():
            expect: dict[str, Any] = {"wide_loads": True, "i64_rows": True}
            if kind == "head":
                expect |= {"only_on": ("sm_80", "sm_90")}  # spills on sm_100 under triton 3.9
            if dtype != fp32:
                expect |= {"tensor_cores": True, "no_scalar_half": True}
            elif kind == "keys" and width > 64:
                expect |= {"wide_stores": False}  # 16 x 32 elements are 8 bytes a thread
            yield f"{kind}-{TYPE_NAMES[dtype]}-N={tokens}-D={width}", launch, expect


def launchers_of(qkv: Tensor, bias: bool = False) -> dict[str, Callable[[Tiles], None]]:
    """For each kernel that qkv runs on, in order, a function that launches it with given tiles."""
    scale = 1 / math.sqrt(qkv.shape[-1])
    (out, lse), grad_qkv = forward_results(qkv, scale), torch.empty_like(qkv)
    kinds = backward_kinds(qkv)
    row_sums = None if "both" in kinds else lse.new_empty(lse.shape)
    grad_bias = lse.new_empty(qkv.shape[3:].numel()) if bias else None
    launchers: dict[str, Callable[[Tiles], None]] = {
        forward_kind(qkv): lambda tiles: launch_forward(qkv, out, lse, scale, tiles)
    }
    for kind in kinds:
        launchers[kind] = functools.partial(
            launch_backward, kind, out, qkv, out, lse, row_sums, grad_qkv, grad_bias,
            scale,
        )  # fmt: skip
    return launchers


# ---------------------------------------------------------------------------------------------
# Tuning
# ---------------------------------------------------------------------------------------------


def tune(qkv: Tensor) -> Iterator[tuple[Key, dict[Tiles, float]]]:
    """Time every kernel that qkv runs on, one after the other: row of the table, milliseconds."""
    with torch.cuda.device_of(qkv):
        for kind, launcher in launchers_of(qkv).items():
            key = key_of(kind, qkv)
            yield key, attention_tiles.tune(key, launcher, qkv.device)
            launcher(tiles_of(key))  # the next kernel reads what this one writes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deit_fast.kernels.attention",
        description="Times all tiles of the attention kernels on this GPU and writes the fastest "
        "ones to a table after each kernel, so that an interrupted run keeps its results.",
    )
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[198, 577])
    parser.add_argument("--width", type=int, nargs="+", choices=WIDTHS, default=[64])
    parser.add_argument(
        "--out", type=Path, default=TILES_FILE, metavar="FILE",
        help="where the rows go; default: the table of this installation",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("--tune needs a CUDA GPU: tiles are timed, not guessed")
    for width in options.width:
        for tokens in options.tokens:
            shape = (options.batch, tokens, 3, options.heads, width)
            qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            write_tuned(qkv, options.out)


def write_tuned(qkv: Tensor, path: Path) -> None:
    """Tune the kernels that qkv runs on; after each, print all times and write the best row."""
    for key, times in tune(qkv):
        architecture, kernel, _, width = key
        print(f"{kernel}, {qkv.shape[1]} tokens, D={width}, sm_{architecture}, ms:")
        best, *_ = ranking = sorted(times, key=times.__getitem__)
        for tiles in ranking:
            rows, block, warps, stages, per_head = tiles
            more = f" {per_head=}" if per_head else ""
            print(f"  {times[tiles]:9.4f}  {rows=} {block=} {warps=} {stages=}{more}")
        attention_tiles.write_tiles({key: best}, path)
        print(f"  best written to {path}", flush=True)


if __name__ == "__main__":
    main()
