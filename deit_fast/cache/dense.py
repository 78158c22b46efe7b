"""Codecs that keep every logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit_fast import _C
from deit_fast.cache.records import bytes_of, decode_rows, finite_float32, refuse_rows
from deit_fast.kernels import TopK

DENSE_DTYPES = {
    "dense-fp16": torch.float16,
    "dense-bf16": torch.bfloat16,
    "dense-fp32": torch.float32,
}


@dataclass(frozen=True)
class _EveryLogit:
    num_classes: int

    name = ""

    @property
    def ids_per_record(self) -> int:
        return 0

    def manifest(self) -> dict[str, Any]:
        return {"name": self.name, "k": None, "temperatures": [], "num_classes": self.num_classes}

    def answer(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


@dataclass(frozen=True)
class DenseCodec(_EveryLogit):
    """Every logit: 2 or 4 bytes a class.

    Error, relative to the logit: float16 2^-11 (2^-25 absolute below 2^-14), bfloat16 2^-8,
    float32 none for input of up to that width. A logit beyond the dtype's range is refused.
    """

    name: str = "dense-fp16"

    @property
    def record_bytes(self) -> int:
        return self.num_classes * DENSE_DTYPES[self.name].itemsize

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        z = finite_float32(logits, self.num_classes)
        stored = z.to(DENSE_DTYPES[self.name])
        refuse_rows(~torch.isfinite(stored), z, f"does not fit {self.name.removeprefix('dense-')}")
        return bytes_of(stored)

    def decode(self, raw: Tensor, tau: float) -> Tensor | TopK:
        """Logits [n, C] in the stored dtype; tau does not matter."""
        return decode_rows(self, raw, None, tau)

    def layout(self, tau: float) -> _C.RecordLayout:
        return _C.RecordLayout(
            _C.RecordKind.copy, record_bytes=self.record_bytes, num_classes=self.num_classes
        )

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        shape, dtype = (count, self.num_classes), DENSE_DTYPES[self.name]
        return (torch.empty(shape, dtype=dtype, device=device),)


@dataclass(frozen=True)
class DenseInt8Codec(_EveryLogit):
    """Every logit in 256 even steps from the row's least to its largest: C + 8 bytes.

    Error: (max - min) / 510 + 2^-22 max |z| + 2^-141. Steps that start at the least logit are never
    coarser than symmetric ones, max |z| / 127, as max - min <= 2 max |z|. So the KL divergence of
    the decoded answer at T is below (max - min)^2 / (2 * 255^2 T^2), rounding aside.
    """

    name = "dense-int8"

    @property
    def record_bytes(self) -> int:
        return 8 + self.num_classes

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        z = finite_float32(logits, self.num_classes)
        low, high = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
        step = ((high.double() - low.double()) / 255).float()
        codes = ((z.double() - low) / step).round().nan_to_num(0.0).clamp(0, 255)  # 0 / 0: step 0
        return torch.cat([bytes_of(low), bytes_of(step), codes.to(torch.uint8)], 1)

    def decode(self, raw: Tensor, tau: float) -> Tensor | TopK:
        """Logits float32 [n, C]; tau does not matter."""
        return decode_rows(self, raw, None, tau)

    def layout(self, tau: float) -> _C.RecordLayout:
        return _C.RecordLayout(
            _C.RecordKind.int8, record_bytes=self.record_bytes, num_classes=self.num_classes
        )

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        return (torch.empty((count, self.num_classes), device=device),)


@dataclass(frozen=True)
class DenseFp8Codec(_EveryLogit):
    """Every logit's distance d below the row's largest, as float8 e4m3 times a scale: C + 8 bytes.

    Error: max(d / 16, (max - min) / 448 / 1024) + 2^-22 max |z| + 2^-141: least at the classes that
    the teacher thinks likely, which is where `dense-int8` is no better than elsewhere. The scale is
    (max - min) / 448, so that the least logit has the largest code.
    """

    name = "dense-fp8"

    @property
    def record_bytes(self) -> int:
        return 8 + self.num_classes

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        z = finite_float32(logits, self.num_classes)
        top, low = z.amax(1, keepdim=True), z.amin(1, keepdim=True)
        scale = ((top.double() - low.double()) / 448).float()
        below = ((z.double() - top) / scale).nan_to_num(0.0).clamp(-448, 0).float()
        codes = below.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([bytes_of(top), bytes_of(scale), codes], 1)

    def decode(self, raw: Tensor, tau: float) -> Tensor | TopK:
        """Logits float32 [n, C]; tau does not matter."""
        return decode_rows(self, raw, None, tau)

    def layout(self, tau: float) -> _C.RecordLayout:
        return _C.RecordLayout(
            _C.RecordKind.fp8, record_bytes=self.record_bytes, num_classes=self.num_classes
        )

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        return (torch.empty((count, self.num_classes), device=device),)
