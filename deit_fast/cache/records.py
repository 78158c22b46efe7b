"""Bytes of records in tensors, and the one place where they are decoded: on the CPU and on CUDA by
csrc/, in one pass over the records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deit_fast import _C
from deit_fast.errors import InputError, RowError
from deit_fast.kernels import TopK

if TYPE_CHECKING:
    from deit_fast.cache.codecs import Codec


def decode_rows(codec: Codec, records: Tensor, rows: Tensor | None, tau: float) -> Tensor | TopK:
    """Records uint8 [m, record_bytes] at ``rows`` int64 [n] (none: all) as teacher logits.

    Runs on the device of ``records``; on CUDA on the current stream, without waiting for it. A row
    out of range stops a CUDA kernel with a launch failure. A build without nvcc decodes what lies
    on CUDA on the CPU.
    """
    device = records.device
    if device.type == "cuda" and not _C.with_cuda:
        raw = records if rows is None else records.index_select(0, rows)
        logits = decode_rows(codec, raw.cpu(), None, tau)
        if isinstance(logits, TopK):
            ids, log_probs, log_tail = (field.to(device) for field in logits[:3])
            return TopK(ids, log_probs, log_tail)
        return logits.to(device)
    records = records.contiguous()
    count = len(records) if rows is None else len(rows)
    outputs = codec.empty(count, device)
    arguments = (
        codec.layout(tau),
        records.data_ptr(),
        len(records),
        0 if rows is None else rows.data_ptr(),
        count,
        [output.data_ptr() for output in outputs],
    )
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device):
            _C.decode_rows_cuda(*arguments, records.get_device(), stream)
    else:
        _C.decode_rows(*arguments)
    return codec.answer(outputs)


def require_logits(logits: Tensor, num_classes: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != num_classes or not logits.is_floating_point():
        raise InputError(
            f"logits must be float [n, {num_classes}], "
            f"not {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        )


def finite_float32(logits: Tensor, num_classes: int) -> Tensor:
    """The logits as float32.

    Raises:
        InputError: not float [n, num_classes].
        RowError: a value that is not finite.
    """
    require_logits(logits, num_classes)
    z = logits.detach().float()
    refuse_rows(~torch.isfinite(z), logits, "is not finite")
    return z


def refuse_rows(bad: Tensor, values: Tensor, reason: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RowError(row, f"teacher logit {values[row, column].item():g} {reason}")


def bytes_of(values: Tensor) -> Tensor:
    """[n, m] of any dtype as uint8 [n, m * itemsize], little-endian as the machine is."""
    return values.contiguous().view(torch.uint8)


def id_bytes(num_classes: int) -> int:
    return 2 if num_classes <= 65536 else 4


def pack_ids(ids: Tensor, num_classes: int) -> Tensor:
    """Class ids [n, k] as the low 2 or all 4 bytes of each."""
    words = bytes_of(ids.int()).view(*ids.shape, 4)
    return words[:, :, : id_bytes(num_classes)].reshape(ids.shape[0], -1)
