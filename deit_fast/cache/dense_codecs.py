"""Codecs of logits that store every class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deit_fast import _C
from deit_fast.cache.codec_base import LogitCodec, bytes_of, finite_float32, refuse_rows
from deit_fast.cache.sampled import ViewKeys
from deit_fast.runtime.device import divided

if TYPE_CHECKING:
    from torch import Tensor

DENSE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class DenseCodec(LogitCodec):
    """Every logit: 2 or 4 bytes a class.

    Error, relative to the logit: float16 2^-11 (2^-25 absolute below 2^-14), bfloat16 2^-8,
    float32 none for input of up to that width. A logit beyond the dtype's range is refused.
    """

    format: str

    kind = _C.RecordKind.copy

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"dense-{self.format}"

    @property
    def record_bytes(self) -> int:
        return self.num_classes * (4 if self.format == "fp32" else 2)

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        import torch

        z = finite_float32(logits, self.num_classes)
        stored = z.to(getattr(torch, DENSE_DTYPES[self.format]))
        refuse_rows(~torch.isfinite(stored), z, f"does not fit {self.format}")
        return bytes_of(stored)

    def decode(self, records: Tensor, tau: float) -> Tensor:
        """The records' own memory."""
        import torch

        return records.contiguous().view(getattr(torch, DENSE_DTYPES[self.format]))

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Logits in the stored dtype."""
        return (((count, self.num_classes), DENSE_DTYPES[self.format]),)


@dataclass(frozen=True)
class DenseInt8Codec(LogitCodec):
    """Every logit in 256 even steps from the row's least to its largest: C + 8 bytes.

    Error: (max - min) / 510 + 2^-22 max |z| + 2^-141. Steps that start at the least logit are never
    coarser than symmetric ones, max |z| / 127, as max - min <= 2 max |z|. So the KL divergence of
    the decoded logits at T is below (max - min)^2 / (2 * 255^2 T^2), rounding aside.
    """

    name = "dense-int8"
    kind = _C.RecordKind.int8

    @property
    def record_bytes(self) -> int:
        return 8 + self.num_classes

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        import torch

        z = finite_float32(logits, self.num_classes)
        # + 0.0: of -0 and +0 the one that a reduction gives depends on its order.
        low, high = z.amin(1, keepdim=True) + 0.0, z.amax(1, keepdim=True) + 0.0
        step = divided(high.double() - low.double(), 255).float()
        codes = ((z.double() - low) / step).round().nan_to_num(0.0).clamp(0, 255)  # 0 / 0: step 0
        return torch.cat([bytes_of(low), bytes_of(step), codes.to(torch.uint8)], 1)


@dataclass(frozen=True)
class DenseFp8Codec(LogitCodec):
    """Every logit's distance d below the row's largest, as float8 e4m3 times a scale: C + 8 bytes.

    Error: max(d / 16, (max - min) / 448 / 1024) + 2^-22 max |z| + 2^-141: least at the classes that
    the teacher finds likely, where `dense-int8` is no better than elsewhere. The scale is
    (max - min) / 448, so that the least logit has the largest code.
    """

    name = "dense-fp8"
    kind = _C.RecordKind.fp8

    @property
    def record_bytes(self) -> int:
        return 8 + self.num_classes

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        import torch

        z = finite_float32(logits, self.num_classes)
        low, top = z.amin(1, keepdim=True) + 0.0, z.amax(1, keepdim=True) + 0.0  # as above
        scale = divided(top.double() - low.double(), 448).float()
        below = ((z.double() - top) / scale).nan_to_num(0.0).clamp(-448, 0).float()
        codes = below.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([bytes_of(top), bytes_of(scale), codes], 1)
