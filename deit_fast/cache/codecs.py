"""Codecs: what a teacher gives to records of a fixed size, and back; those of logits.

Records are decoded by csrc/, on the CPU and on CUDA. To add a codec follow docs/extend.md. torch is
imported where logits are encoded or decoded: `cache info` describes a cache without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from deit_fast import _C
from deit_fast.cache.sampled import ViewKeys, draw_tails, sampled_form
from deit_fast.config import CodecConfig
from deit_fast.errors import CacheError, InputError, RowError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from deit_fast.kernels.distillation_loss import TopK

_DENSE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_MAX_TOPK_CLASSES = 2**18  # more integer terms of csrc/arithmetic.h could overflow their sum
_DEFAULT_K, _DEFAULT_DRAWS = 8, 8  # of `sampled`
_CUDA_LIMITS = (1023, 8)  # k and temperatures that csrc/cuda/record_codec.cu takes
# FloatType in csrc/cuda, by torch's names
_CUDA_FLOATS = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}


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
        return _C.RecordLayout(
            self.kind,
            record_bytes=self.record_bytes,
            num_classes=self.num_classes,
            id_bytes=id_bytes(self.num_classes),
        )

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        return (((count, self.num_classes), "float32"),)


@dataclass(frozen=True)
class HardCodec(LogitCodec):
    """The teacher's argmax: 2 bytes a record, 4 above 65,536 classes. Exact; ties: lowest id."""

    name = "hard"
    kind = _C.RecordKind.hard

    @property
    def ids_per_record(self) -> int:
        return 1

    @property
    def record_bytes(self) -> int:
        return id_bytes(self.num_classes)

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        largest = _finite_float32(logits, self.num_classes).argmax(1)
        return _id_bytes_of(largest.int()[:, None], self.num_classes)

    def decode(self, records: Tensor, tau: float) -> Tensor:
        return _ids_of(records, self.num_classes)[:, 0].long()

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Class ids."""
        return (((count,), "int64"),)


@dataclass(frozen=True)
class TopKCodec(LogitCodec):
    """The k most probable classes and the exact mass of all others.

    Bytes: k class ids of 2 bytes (4 above 65,536 classes), k log-probabilities of 2, a log tail
    mass and a log normaliser of 4 each per temperature: 72 at k=16 and one temperature.

    Order: descending logit (as float32), ties by ascending id. A log-probability is
    z_i - logsumexp(z), rounded to float16; below -65504 it is stored as -65504. The log tail mass
    at T is log(sum outside the ids of exp(z/T) / sum of exp(z/T)), summed over the outside itself
    rather than as 1 - inside, rounded to float32; -inf for k = C. The log normaliser at T is
    logsumexp(l/T) of the log-probabilities as stored, less the log of their true mass at T, so that
    decoding is one product and one subtraction, and ids and tail together have mass one.

    csrc/topk_encode.h computes all that in float64 with IEEE operations in a fixed order, and the
    sums as integers of 2^-44: CPU and CUDA give the same bytes, whatever the batch. A sum's
    relative error is below C * 2^-44, under 2e-8 at 262,144 classes, the most it takes.

    Error at a recorded T, with l the true log-probabilities of the ids at T=1 and
    L = max |l|: |log p_i(T) - true| <= L / (1024 T) + 1e-5 (float16 rounds by at most
    L / 2048, and normalising adds no more than that again). The tail's relative error is below
    1e-6 of max(1, |log tail|).

    Attributes:
        true_class: records end with the true class's log-probability, float32. Caches of earlier
            versions may have it; it is skipped when read and no longer written.
    """

    k: int
    temperatures: tuple[float, ...]
    true_class: bool = False

    name = "topk"
    kind = _C.RecordKind.topk

    @property
    def record_bytes(self) -> int:
        return self._tail_offset + 8 * len(self.temperatures) + 4 * self.true_class

    @property
    def ids_per_record(self) -> int:
        return self.k

    @property
    def first_temperature(self) -> float:
        return self.temperatures[0]

    @property
    def _tail_offset(self) -> int:
        return self.k * (id_bytes(self.num_classes) + 2)

    def manifest(self) -> dict[str, Any]:
        values = super().manifest() | {"k": self.k, "temperatures": list(self.temperatures)}
        return values | ({"true_class": True} if self.true_class else {})

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        """On CUDA a kernel on the current stream; checking for values that are not finite then
        waits for it."""
        import torch

        _require_logits(logits, self.num_classes)
        z = logits.detach()
        on_cuda = (
            z.is_cuda
            and _C.with_cuda
            and self.k <= _CUDA_LIMITS[0]
            and len(self.temperatures) <= _CUDA_LIMITS[1]
        )
        if not on_cuda:
            z = z.cpu().float()
        elif str(z.dtype) not in _CUDA_FLOATS:
            z = z.float()
        z = z.contiguous()
        size = self.record_bytes - 4 * self.true_class
        records = torch.empty((len(z), size), dtype=torch.uint8, device=z.device)
        arguments = (
            self.num_classes,
            self.k,
            id_bytes(self.num_classes),
            [1.0 / tau for tau in self.temperatures],
            z.data_ptr(),
        )
        if on_cuda:
            first = torch.full((1,), len(z), dtype=torch.int64, device=z.device)
            stream = torch.cuda.current_stream(z.device).cuda_stream
            with torch.cuda.device(z.device):
                _C.encode_topk_cuda(
                    *arguments, _CUDA_FLOATS[str(z.dtype)], len(z), records.data_ptr(),
                    first.data_ptr(), z.get_device(), stream,
                )  # fmt: skip
            found = int(first)
            bad = found if found < len(z) else -1
        else:
            bad = _C.encode_topk(*arguments, len(z), records.data_ptr())
        if bad >= 0:
            value = logits[bad][~torch.isfinite(z[bad]).to(logits.device)][0].item()
            raise RowError(bad, f"teacher logit {value:g} is not finite")
        records = torch.nn.functional.pad(records, (0, self.record_bytes - size))
        return records.to(logits.device)

    def layout(self, tau: float) -> _C.RecordLayout:
        """With l_i stored at T=1 and c the normaliser at tau, log p_i(tau) = l_i / tau - c."""
        return _C.RecordLayout(
            self.kind,
            record_bytes=self.record_bytes,
            num_classes=self.num_classes,
            id_bytes=id_bytes(self.num_classes),
            k=self.k,
            tail_offset=self._tail_offset + 8 * self._temperature_index(tau),
            tau=tau,
        )

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Class ids, log-probabilities, log tail mass."""
        return ((count, self.k), "int32"), ((count, self.k), "float32"), ((count,), "float32")

    def form(self, outputs: tuple[Tensor, ...], tau: float) -> TopK:
        from deit_fast.kernels.distillation_loss import TopK

        ids, log_probs, log_tail = outputs
        return TopK(ids, log_probs, log_tail)

    def _temperature_index(self, tau: float) -> int:
        for index, recorded in enumerate(self.temperatures):
            if math.isclose(recorded, tau, rel_tol=1e-12):
                return index
        known = ", ".join(f"{value:g}" for value in self.temperatures)
        raise CacheError(f"the cache has no tail mass at temperature {tau:g}; recorded: {known}")


@dataclass(frozen=True)
class SampledCodec(LogitCodec):
    """An exact head of the k most probable classes, and draws of the others: the expectation of the
    soft loss's gradient over views is that of all logits. k = 0 samples all classes, as "Sparse
    Logit Sampling" does (arXiv 2503.16870).

    The draws are with replacement, by the teacher's probabilities outside the head. A drawn class
    stands for 1 / draws of the tail's mass, so head and draws have mass one. Each temperature has
    draws of its own, made by the same random words, which are a function of seed, sample and view.

    Bytes: class ids of 2 bytes (4 above 65,536 classes): k of the head and, for each temperature,
    the draws; k log-probabilities of 2; a log tail mass and a log normaliser of 4 each per
    temperature: 48 at k=6 and 8 draws. For k = 0: the id of the most probable class and the draws.

    Error: the head and the tail mass have that of `topk`. The draws have no bias beyond it, but
    variance. A draw is frozen with its view: only distinct views average it out. A class that was
    drawn often may outweigh the most probable one: hard distillation takes ``decisions``.
    """

    k: int
    draws: int
    temperatures: tuple[float, ...]

    name = "sampled"
    kind = _C.RecordKind.copy

    @property
    def record_bytes(self) -> int:
        ids = self.ids_per_record * id_bytes(self.num_classes)
        return ids + (2 * self.k + 8 * len(self.temperatures) if self.k else 0)

    @property
    def ids_per_record(self) -> int:
        return self._head.k + self.draws * len(self.temperatures)

    @property
    def first_temperature(self) -> float:
        return self.temperatures[0]

    @property
    def _head(self) -> TopKCodec:
        """Of the exact part; for k = 0 of the record's first id."""
        return TopKCodec(self.num_classes, max(1, self.k), self.temperatures)

    def manifest(self) -> dict[str, Any]:
        values = {"k": self.k, "draws": self.draws, "temperatures": list(self.temperatures)}
        return super().manifest() | values

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        """On the host, also of logits on CUDA."""
        import torch

        if keys is None:
            raise InputError("codec sampled needs to know which views the logits are of")
        head = self._head.encode(logits).cpu()
        ids, rest = head.split([self._head_bytes, head.shape[1] - self._head_bytes], 1)
        heads = _ids_of(ids, self.num_classes)[:, : self.k]
        z = logits.detach().cpu().float()
        draws = draw_tails(z, heads, self.temperatures, keys.words(self.draws))
        parts = [ids, _id_bytes_of(draws.flatten(1), self.num_classes)]
        return torch.cat([*parts, rest] if self.k else parts, 1).to(logits.device)

    @property
    def _head_bytes(self) -> int:
        return self._head.k * id_bytes(self.num_classes)

    def decode(self, records: Tensor, tau: float) -> TopK:
        return self.form((records,), tau)

    def layout(self, tau: float) -> _C.RecordLayout:
        self._head.layout(tau)  # raises where nothing is recorded at tau
        return super().layout(tau)

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """The records themselves."""
        return (((count, self.record_bytes), "uint8"),)

    def form(self, outputs: tuple[Tensor, ...], tau: float) -> TopK:
        """A TopK of k + draws classes, with the tail mode "drop"."""
        import torch

        from deit_fast.kernels.distillation_loss import TopK

        records, size = outputs[0], self.draws * id_bytes(self.num_classes)
        start = self._head_bytes
        at = start + size * self._head._temperature_index(tau)
        draws = _ids_of(records[:, at : at + size], self.num_classes)
        if self.k:
            rest = records[:, start + size * len(self.temperatures) :]
            head = self._head.decode(torch.cat([records[:, :start], rest], 1), tau)
        else:
            none = torch.empty((len(records), 0), device=records.device)
            head = TopK(none.int(), none, none.sum(1))
        return sampled_form(head, draws)

    def decisions(self, records: Tensor) -> Tensor:
        """The teacher's classes, int64 [n], from uint8 [n, record_bytes]."""
        return _ids_of(records[:, : id_bytes(self.num_classes)], self.num_classes)[:, 0].long()


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

        z = _finite_float32(logits, self.num_classes)
        stored = z.to(getattr(torch, _DENSE_DTYPES[self.format]))
        _refuse_rows(~torch.isfinite(stored), z, f"does not fit {self.format}")
        return bytes_of(stored)

    def decode(self, records: Tensor, tau: float) -> Tensor:
        """The records' own memory."""
        import torch

        return records.contiguous().view(getattr(torch, _DENSE_DTYPES[self.format]))

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Logits in the stored dtype."""
        return (((count, self.num_classes), _DENSE_DTYPES[self.format]),)


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

        z = _finite_float32(logits, self.num_classes)
        low, high = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
        step = ((high.double() - low.double()) / 255).float()
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

        z = _finite_float32(logits, self.num_classes)
        top, low = z.amax(1, keepdim=True), z.amin(1, keepdim=True)
        scale = ((top.double() - low.double()) / 448).float()
        below = ((z.double() - top) / scale).nan_to_num(0.0).clamp(-448, 0).float()
        codes = below.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([bytes_of(top), bytes_of(scale), codes], 1)


# ---------------------------------------------------------------------------------------------
# Choice
# ---------------------------------------------------------------------------------------------

CODECS: dict[str, Callable[..., LogitCodec]] = {
    "hard": HardCodec,
    "topk": TopKCodec,
    "sampled": SampledCodec,
    **{f"dense-{name}": partial(DenseCodec, format=name) for name in _DENSE_DTYPES},
    "dense-int8": DenseInt8Codec,
    "dense-fp8": DenseFp8Codec,
}


def codec_from_config(config: CodecConfig, num_classes: int, tau: float) -> LogitCodec:
    """The codec of a new cache; ``tau`` is recorded where the configuration names no temperature.

    Raises:
        InputError: k or num_classes out of range.
    """
    k, draws = config.k, config.draws
    if k is None:
        k = min(_DEFAULT_K, num_classes // 2) if config.name == "sampled" else min(16, num_classes)
    if draws is None:
        draws = min(_DEFAULT_DRAWS, num_classes - k)
    temperatures = config.temperatures if config.temperatures is not None else (tau,)
    temperatures = tuple(sorted({float(t) for t in temperatures}))
    return _create(config.name, num_classes, k, temperatures, draws=draws)


def codec_from_manifest(values: Mapping[str, Any], where: str) -> LogitCodec:
    """The codec of logits that a manifest's "codec" describes.

    Raises:
        CacheError: it describes none; the message starts with ``where``.
    """
    if set(values) - {"true_class", "draws"} != {"name", "k", "temperatures", "num_classes"}:
        raise CacheError(f"{where}: codec needs name, k, temperatures, num_classes")
    name, k, temperatures = values["name"], values["k"], values["temperatures"]
    if not isinstance(name, str) or name not in CODECS:
        raise CacheError(f"{where}: codec.name must be one of {', '.join(CODECS)}, not {name!r}")
    if type(values["num_classes"]) is not int:
        raise CacheError(f"{where}: codec.num_classes must be an integer")
    if not isinstance(temperatures, list) or not all(_is_positive(t) for t in temperatures):
        raise CacheError(f"{where}: codec.temperatures must be positive numbers")
    if name in ("topk", "sampled") and (type(k) is not int or not temperatures):
        raise CacheError(f"{where}: codec.k and codec.temperatures are needed by {name}")
    draws = values.get("draws")
    if name == "sampled" and type(draws) is not int:
        raise CacheError(f"{where}: codec.draws must be an integer")
    floats = [float(t) for t in temperatures]
    true_class = values.get("true_class", False) is True
    try:
        codec = _create(name, values["num_classes"], k, tuple(floats), true_class, draws)
    except InputError as error:
        raise CacheError(f"{where}: {error}") from None
    if codec.manifest() != {**values, "temperatures": floats}:
        raise CacheError(
            f"{where}: codec has k, draws, temperatures or true_class that {name} does not take"
        )
    return codec


def _create(
    name: str,
    num_classes: int,
    k: int,
    temperatures: tuple[float, ...],
    true_class: bool = False,
    draws: int | None = None,
) -> LogitCodec:
    if not 1 <= num_classes < 2**31:
        raise InputError(f"codec.num_classes must lie in [1, 2^31), not {num_classes}")
    if name not in ("topk", "sampled"):
        return CODECS[name](num_classes)
    if num_classes > _MAX_TOPK_CLASSES:
        raise InputError(f"{name} takes at most {_MAX_TOPK_CLASSES} classes, not {num_classes}")
    if name == "sampled":
        assert draws is not None
        if k < 0 or draws < 1 or k + draws > num_classes:
            raise InputError(
                f"codec.k={k} and codec.draws={draws}: sampled takes k of 0 or more and draws of 1 "
                f"or more, together at most {num_classes}, the class count"
            )
        return SampledCodec(num_classes, k, draws, temperatures)
    if not 1 <= k <= num_classes:
        raise InputError(f"codec.k must lie in [1, {num_classes}], the class count, not {k}")
    return TopKCodec(num_classes, k, temperatures, true_class)


def keys_of(
    codec: Codec, fingerprint: Mapping[str, Any], samples: np.ndarray, views: np.ndarray
) -> ViewKeys | None:
    """What ``codec.encode`` needs beside the logits; None for all codecs but `sampled`.

    Args:
        fingerprint: the cache's, which has the seed of its views.
        samples, views: integers [n].

    Raises:
        InputError: the fingerprint has no seed.
    """
    if not isinstance(codec, SampledCodec):
        return None
    seed = fingerprint.get("view.seed")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise InputError(
            f"codec sampled needs the seed of the views: view.seed in the fingerprint must be an "
            f"integer in [0, 2^64), not {seed!r}"
        )
    return ViewKeys(seed, samples, views)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def id_bytes(num_classes: int) -> int:
    """Bytes of a stored class id."""
    return 2 if num_classes <= 65536 else 4


def _ids_of(stored: Tensor, num_classes: int) -> Tensor:
    """Class ids int32 [n, m] of their bytes, uint8 [n, m * id_bytes]."""
    import torch

    if id_bytes(num_classes) == 4:
        return stored.contiguous().view(torch.int32)
    return stored.contiguous().view(torch.int16).int() & 0xFFFF  # stored without a sign


def _id_bytes_of(ids: Tensor, num_classes: int) -> Tensor:
    """The bytes, uint8 [n, m * id_bytes], of class ids int32 [n, m]."""
    size = id_bytes(num_classes)
    return bytes_of(ids).unflatten(1, (-1, 4))[:, :, :size].flatten(1)


def bytes_of(values: Tensor) -> Tensor:
    """[n, m] of any dtype as uint8 [n, m * itemsize], in the machine's order: little-endian."""
    import torch

    return values.contiguous().view(torch.uint8)


def _require_logits(logits: Tensor, num_classes: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != num_classes or not logits.is_floating_point():
        raise InputError(
            f"logits must be float [n, {num_classes}], "
            f"not {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        )


def _finite_float32(logits: Tensor, num_classes: int) -> Tensor:
    import torch

    _require_logits(logits, num_classes)
    z = logits.detach().float()
    _refuse_rows(~torch.isfinite(z), logits, "is not finite")
    return z


def _refuse_rows(bad: Tensor, values: Tensor, reason: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RowError(row, f"teacher logit {values[row, column].item():g} {reason}")
