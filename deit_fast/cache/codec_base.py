"""What all codecs share: what a teacher gives to records of a fixed size, and back.

Records are decoded by csrc/, on the CPU and on CUDA. torch is imported where logits are encoded or
decoded: `cache info` describes a cache without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deit_fast import _C
from deit_fast.errors import InputError, RowError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deit_fast.cache.sampled import ViewKeys
    from deit_fast.kernels.distillation_loss import TopK


@dataclass(frozen=True)
class Codec(ABC):
    """What all codecs share.

    Attributes:
        kind: how csrc/ decodes a record.
    """

    name: ClassVar[str]
    kind: ClassVar[_C.RecordKind]

    @property
    def ids_per_record(self) -> int:
        """Class ids that a record starts with; a reader refuses ids outside [0, id_limit)."""
        return 0

    @property
    def id_limit(self) -> int:
        """Number of classes; 0 where records hold no class ids."""
        return 0

    @property
    def first_temperature(self) -> float:
        """The first that records hold; 1 where they suit every temperature."""
        return 1.0

    @property
    @abstractmethod
    def record_bytes(self) -> int:
        """Bytes per record."""

    @abstractmethod
    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        """Float logits [n, num_classes], or features [n, tokens, width], to uint8
        [n, record_bytes], on their device; the same bytes on any device.

        Args:
            keys: which views they are of; only `sampled` needs it.

        Raises:
            InputError: another shape or dtype.
            RowError: a value that is not finite, or out of the codec's range.
        """

    def decode(self, records: Tensor, tau: float) -> Tensor | TopK:
        """uint8 [n, record_bytes] to a teacher form of ``kernels.distillation_loss``, or to
        features [n, tokens, width]. Every form but `topk` is the same at all temperatures.

        Runs on the device of ``records``, on CUDA on the current stream without waiting for it. A
        build without nvcc decodes on the CPU.

        Raises:
            CacheError: the records hold nothing for temperature ``tau``.
        """
        import torch

        device = records.device
        on_cuda = records.is_cuda and _C.with_cuda
        stored = records.contiguous() if on_cuda else records.cpu().contiguous()
        outputs = self.empty(len(stored), stored.device)
        addresses = [output.data_ptr() for output in outputs]
        arguments = self.layout(tau), stored.data_ptr(), len(stored), addresses
        if on_cuda:
            stream = torch.cuda.current_stream(device).cuda_stream
            with torch.cuda.device(device):
                _C.decode_records_cuda(*arguments, stored.get_device(), stream)
        else:
            _C.decode_records(*arguments)
        return self.form(tuple(output.to(device) for output in outputs), tau)

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """The manifest's "codec"."""

    @abstractmethod
    def layout(self, tau: float) -> _C.RecordLayout:
        """How csrc/ decodes a record at ``tau``."""

    @abstractmethod
    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shapes and dtypes of the tensors that csrc/ decodes ``count`` records to."""

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        """Those tensors, uninitialised."""
        import torch

        return tuple(
            torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for shape, dtype in self.outputs(count)
        )

    def form(self, outputs: tuple[Tensor, ...], tau: float) -> Tensor | TopK:
        """Those tensors, filled at ``tau``, as ``decode`` returns them."""
        return outputs[0]


@dataclass(frozen=True)
class LogitCodec(Codec):
    """What the codecs of logits share. One defines ``name``, ``kind``, ``record_bytes`` and
    ``encode``; the other members as given here suit one that stores every logit."""

    num_classes: int

    @property
    def id_limit(self) -> int:
        return self.num_classes

    def manifest(self) -> dict[str, Any]:
        """name, k, temperatures, num_classes."""
        return {"name": self.name, "k": None, "temperatures": [], "num_classes": self.num_classes}

    def layout(self, tau: float) -> _C.RecordLayout:
        return self._layout()

    def _layout(self, **more: Any) -> _C.RecordLayout:
        return _C.RecordLayout(
            self.kind,
            record_bytes=self.record_bytes,
            num_classes=self.num_classes,
            id_bytes=id_bytes(self.num_classes),
            **more,
        )

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        return (((count, self.num_classes), "float32"),)


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def id_bytes(num_classes: int) -> int:
    """Bytes of a stored class id."""
    return 2 if num_classes <= 65536 else 4


def ids_of(stored: Tensor, num_classes: int) -> Tensor:
    """Class ids int32 [n, m] of their bytes, uint8 [n, m * id_bytes]."""
    import torch

    if id_bytes(num_classes) == 4:
        return stored.contiguous().view(torch.int32)
    return stored.contiguous().view(torch.int16).int() & 0xFFFF  # stored without a sign


def id_bytes_of(ids: Tensor, num_classes: int) -> Tensor:
    """The bytes, uint8 [n, m * id_bytes], of class ids int32 [n, m]."""
    size = id_bytes(num_classes)
    return bytes_of(ids).unflatten(1, (-1, 4))[:, :, :size].flatten(1)


def bytes_of(values: Tensor) -> Tensor:
    """[n, m] of any dtype as uint8 [n, m * itemsize], in the machine's order: little-endian."""
    import torch

    return values.contiguous().view(torch.uint8)


def require_logits(logits: Tensor, num_classes: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != num_classes or not logits.is_floating_point():
        raise InputError(
            f"logits must be float [n, {num_classes}], "
            f"not {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        )


def finite_float32(logits: Tensor, num_classes: int) -> Tensor:
    import torch

    require_logits(logits, num_classes)
    z = logits.detach().float()
    refuse_rows(~torch.isfinite(z), logits, "is not finite")
    return z


def refuse_rows(bad: Tensor, values: Tensor, reason: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RowError(row, f"teacher logit {values[row, column].item():g} {reason}")
