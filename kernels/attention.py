"""Self-attention straight from the packed projection, exact and without atomics.

With q, k, v the three [B, N, H, D] slices of qkv [B, N, 3, H, D], for every batch and head

    S = scale q k^T        P = softmax over keys of S        O = P v

and backward, from dO and the saved log-sum-exp of S (Dao et al. 2022, algorithm 4)

    dV = P^T dO    dP = dO v^T    dS = P * (dP - row sums of dO * O)
    dq = scale dS k               dk = scale dS^T q

Nothing is permuted or copied on the way in, and dq, dk, dv land side by side in one packed tensor:
what timm does around scaled_dot_product_attention (permute, unbind, transpose, and in the backward
a stack) costs it up to five more tensors of traffic.

Bytes: with T = B N H D elements a forward reads 3 T and writes T, and 4 bytes a row of log-sum-exp;
a backward reads qkv, O, dO and writes 3 T: 8 T. FLOPs: 4 B H N^2 D forward, 10 B H N^2 D backward;
ours does 14, because dq and dk, dv each recompute S and dP instead of meeting in atomic adds.

Limit, B=256 H=6 N=198 D=64 bf16 on an H100 (3.0 TB/s copy, 798 TFLOP/s): 157 MB and 15.4 GF are
52 us of memory and 19 us of tensor cores forward, 313 MB and 104 / 48 us backward. So up to some
500 tokens the memory binds, if tiles do not waste the tensor cores: a sequence of 198 in tiles of
192 x 128 is 40 % useful work. Here it is 64 rows x (128 + 64 + 16) keys forward, 74 % with the last
block of rows; 64 x (6 * 32 + 16) backward, the same. At 577 tokens 128 x (9 * 64 + 16) is 88 %.
The backward issues 1.9x its useful FLOPs for it, 90 us at the peak, and asks L2 for 28 T: the
second limit after the memory. The forward asks it for 4 T, a head being on chip as a whole.

Numerics: float32 scores, softmax and sums; P and dS are rounded to the dtype of qkv to be
multiplied. float32 input is multiplied in full float32 (no TF32): correct, not fast. Two runs give
the same bits: no sum depends on who comes first.

On a GPU float32, bfloat16 and float16 with D of 32, 64, 96 or 128 take the kernels; 96 columns are
multiplied as three times 32, none of them in vain. float64, other D, the CPU and GPUs older than
Ampere take the reference in plain PyTorch. With TRITON_INTERPRET=1 a CPU runs the kernels in
Triton's interpreter.

Tiles come from a fixed table, attention_tiles.json. With DEIT_FAST_AUTOTUNE=1 the first call of
each kind times the candidates on its own tensors, outside of graph capture. To measure this GPU's
rows and write them into the table, or with --out into another file:

    python -m deit_fast.kernels.attention --tune [--batch 256 --heads 6 --tokens 198 577]

Times are the GPU's own (CUDA events around the kernel alone, the L2 cleared before each run).
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from . import attention_launch as launch
from .attention_reference import reference_attention

__all__ = ["attention_qkvpacked"]


@functools.cache
def _say_once(device: str, dtype: torch.dtype, width: int) -> None:
    logging.getLogger(__name__).debug("%s, D=%d on %s takes the reference", dtype, width, device)


def attention_qkvpacked(
    qkv: Tensor, scale: float | None = None, *, query_bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T) v, every token with every other.

    Args:
        qkv: float [B, N, 3, H, D], in any memory layout; the kernels read it in place where
            neighbouring columns are neighbours in memory, and from a copy where not. B may be 0.
            Under autocast it is cast like the input of PyTorch's own attention.
        scale: factor of the scores, finite and not negative; None: 1 / sqrt(D).
        query_bias: float [H D], the bias that the queries already contain without a gradient. The
            value is not read. Its gradient is made here: the sums of the queries' gradient over
            samples and tokens, in float32 in the same pass. There is none for the keys' bias: it
            adds one number to all scores of a query, so its gradient is 0. Nor is there one for
            the values' bias: the weights of a query sum to 1, so its gradient is the sum of
            ``grad_out`` over samples and tokens.

    Returns:
        [B, N, H, D], contiguous, in the dtype of qkv (under autocast in that of autocast).

    Raises:
        ValueError: a shape, dtype or scale that does not fit, by name and value.
    """
    if not isinstance(qkv, Tensor):
        raise ValueError(f"qkv must be a tensor, not {type(qkv).__name__}")
    if qkv.dim() != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[1:]:
        raise ValueError(
            f"qkv must have shape [B, N, 3, H, D] with N, H, D > 0, not {tuple(qkv.shape)}"
        )
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must hold floats, not {qkv.dtype}")
    if scale is None:
        scale = 1 / math.sqrt(qkv.shape[-1])
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, not {scale}")
    if query_bias is not None and query_bias.shape != (qkv.shape[3:].numel(),):
        expected = (qkv.shape[3:].numel(),)
        raise ValueError(f"query_bias has shape {tuple(query_bias.shape)}, not {expected}")
    kind = qkv.device.type
    if qkv.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        qkv = qkv.to(torch.get_autocast_dtype(kind))
    if launch.takes(qkv):
        result: Tensor = torch.ops.deit_fast.attention(qkv, float(scale), query_bias)
        return result
    if query_bias is not None:  # zeros that carry the gradient
        zero = (query_bias - query_bias.detach()).to(qkv.dtype).view(qkv.shape[3:])
        qkv = torch.cat((qkv[:, :, :1] + zero, qkv[:, :, 1:]), 2)
    if not torch.compiler.is_compiling():
        _say_once(kind, qkv.dtype, qkv.shape[-1])
    return reference_attention(qkv, scale)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deit_fast.kernels.attention",
        description="Times all tiles of the attention kernels on this GPU and writes the fastest "
        "ones to a table, kernel by kernel: what an interrupted run has measured is kept.",
    )
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[198, 577])
    parser.add_argument("--width", type=int, nargs="+", choices=launch.WIDTHS, default=[64])
    parser.add_argument(
        "--out", type=Path, default=launch.TILES_FILE, metavar="FILE",
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
    """Tune the kernels that qkv takes; after each, print all times and write the best row."""
    for key, times in launch.tune(qkv):
        architecture, kernel, _, width = key
        print(f"{kernel}, {qkv.shape[1]} tokens, D={width}, sm_{architecture}, ms:")
        best, *_ = ranking = sorted(times, key=times.__getitem__)
        for tiles in ranking:
            rows, block, warps, stages, per_head = tiles
            more = f" {per_head=}" if per_head else ""
            print(f"  {times[tiles]:9.4f}  {rows=} {block=} {warps=} {stages=}{more}")
        launch.write_tiles({key: best}, path)
        print(f"  best written to {path}", flush=True)


if __name__ == "__main__":
    main()
