"""How a teacher's answer becomes a record of fixed size, and back.

To add a codec: a class with the members of ``Codec`` below, one line in ``CODECS``, its layout in
docs/cache-format.md, its name in ``config.CodecConfig``, its error bound in
tests/test_cache_codecs.py. Where its records are not the answer's own bytes, a RecordKind and its
decoding in csrc/record_codec.cpp and csrc/cuda/decode.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from deit_fast import _C
from deit_fast.cache.dense import DENSE_DTYPES, DenseCodec, DenseFp8Codec, DenseInt8Codec
from deit_fast.cache.records import (
    decode_rows,
    finite_float32,
    id_bytes,
    pack_ids,
    require_logits,
)
from deit_fast.config import CodecConfig
from deit_fast.errors import CacheError, InputError, RowError
from deit_fast.kernels import TopK

_MAX_TOPK_CLASSES = 2**18  # so many integers of csrc/arithmetic.h add up without overflow
_CUDA_LIMITS = (1023, 8)  # k and temperatures that csrc/cuda/encode.cu takes
_CUDA_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # FloatType in csrc/cuda


class Codec(Protocol):
    """Encoding of logits [n, num_classes]; works on the device that its input is on."""

    @property
    def num_classes(self) -> int: ...

    @property
    def record_bytes(self) -> int: ...

    @property
    def ids_per_record(self) -> int:
        """Class ids that a record starts with. A reader refuses ids outside [0, num_classes)."""
        ...

    def manifest(self) -> dict[str, Any]:
        """name, k, temperatures, num_classes: the manifest's "codec"."""
        ...

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Float logits [n, num_classes] to uint8 [n, record_bytes]; the same bytes on any device.

        Args:
            labels: int [n], the samples' own classes; looked at where the codec keeps the true
                class's log-probability.

        Raises:
            InputError: another shape or dtype.
            RowError: a logit that is not finite, or not in the codec's range.
        """
        ...

    def decode(self, raw: Tensor, tau: float) -> Tensor | TopK:
        """uint8 [n, record_bytes] to a teacher form of ``kernels.distillation_loss``."""
        ...

    def layout(self, tau: float) -> _C.RecordLayout:
        """How csrc/ decodes a record at ``tau``."""
        ...

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        """The tensors that csrc/ decodes ``count`` records to; RecordKind says which."""
        ...

    def answer(self, outputs: tuple[Tensor, ...]) -> Tensor | TopK:
        """Those tensors, filled, as ``decode`` returns them."""
        ...


@dataclass(frozen=True)
class HardCodec:
    """The teacher's argmax: 2 bytes a record, 4 above 65,536 classes. Exact; ties: lowest id."""

    num_classes: int

    @property
    def record_bytes(self) -> int:
        return id_bytes(self.num_classes)

    @property
    def ids_per_record(self) -> int:
        return 1

    def manifest(self) -> dict[str, Any]:
        return _codec_manifest("hard", self.num_classes)

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        largest = finite_float32(logits, self.num_classes).argmax(1)
        return pack_ids(largest[:, None], self.num_classes)

    def decode(self, raw: Tensor, tau: float) -> Tensor | TopK:
        """int64 [n] class ids; tau does not matter."""
        return decode_rows(self, raw, None, tau)

    def layout(self, tau: float) -> _C.RecordLayout:
        return _C.RecordLayout(
            _C.RecordKind.hard,
            record_bytes=self.record_bytes,
            num_classes=self.num_classes,
            id_bytes=id_bytes(self.num_classes),
        )

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        return (torch.empty(count, dtype=torch.int64, device=device),)

    def answer(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


@dataclass(frozen=True)
class TopKCodec:
    """The k most probable classes and the exact mass of all others.

    Bytes: k class ids of 2 bytes (4 above 65,536 classes), k log-probabilities of 2, a log tail
    mass and a log normaliser of 4 each per temperature, 4 for the true class where it is kept: 72
    at k=16 and one temperature, 76 with the true class.

    Order: descending logit (as float32), ties by ascending id. A log-probability is
    z_i - logsumexp(z), rounded to float16; below -65504 it is stored as -65504. The log tail mass
    at T is log(sum outside the ids of exp(z/T) / sum of exp(z/T)), summed over the outside itself
    rather than as 1 - inside, rounded to float32; -inf for k = C. The log normaliser at T is
    logsumexp(l/T) of the log-probabilities as stored, less the log of their true mass at T, so that
    decoding is one product and one subtraction, and ids and tail together have mass one. The true
    class's log-probability at T=1 is a float32.

    csrc/topk_encode.h computes all that in float64 with IEEE operations in a fixed order, and the
    sums as integers of 2^-44: CPU and CUDA give the same bytes, whatever the batch. A sum's
    relative error is below C * 2^-44, under 2e-8 at 262,144 classes, the most it takes.

    Error at a recorded T, with l the true log-probabilities of the ids at T=1 and
    L = max |l|: |log p_i(T) - true| <= L / (1024 T) + 1e-5 (float16 rounds by at most
    L / 2048, and normalising adds no more than that again), for the true class too, of which
    only the normalising part remains. The tail's relative error is below 1e-6 of
    max(1, |log tail|).
    """

    num_classes: int
    k: int
    temperatures: tuple[float, ...]
    true_class: bool = False

    @property
    def record_bytes(self) -> int:
        return self._true_class_offset + 4 * self.true_class

    @property
    def ids_per_record(self) -> int:
        return self.k

    @property
    def _tail_offset(self) -> int:
        return self.k * (id_bytes(self.num_classes) + 2)

    @property
    def _true_class_offset(self) -> int:
        return self._tail_offset + 8 * len(self.temperatures)

    def manifest(self) -> dict[str, Any]:
        values = _codec_manifest("topk", self.num_classes, self.k, self.temperatures)
        return values | ({"true_class": True} if self.true_class else {})

    def encode(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """On CUDA a kernel on the current stream, which the check for values that are not finite
        then waits for."""
        require_logits(logits, self.num_classes)
        z = logits.detach()
        on_cuda = (
            z.is_cuda
            and _C.with_cuda
            and self.k <= _CUDA_LIMITS[0]
            and len(self.temperatures) <= _CUDA_LIMITS[1]
        )
        if not on_cuda:
            z = z.cpu().float()
        elif z.dtype not in _CUDA_FLOATS:
            z = z.float()
        z = z.contiguous()
        label_ids = self._labels(labels, len(z), z.device)
        records = torch.empty((len(z), self.record_bytes), dtype=torch.uint8, device=z.device)
        arguments = (
            self.num_classes,
            self.k,
            id_bytes(self.num_classes),
            [1.0 / tau for tau in self.temperatures],
            z.data_ptr(),
        )
        addresses = (0 if label_ids is None else label_ids.data_ptr(), records.data_ptr())
        if on_cuda:
            first = torch.full((1,), len(z), dtype=torch.int64, device=z.device)
            stream = torch.cuda.current_stream(z.device).cuda_stream
            with torch.cuda.device(z.device):
                _C.encode_topk_cuda(
                    *arguments, _CUDA_FLOATS[z.dtype], len(z), *addresses, first.data_ptr(),
                    z.get_device(), stream,
                )  # fmt: skip
            found = int(first)
            bad = found if found < len(z) else -1
        else:
            bad = _C.encode_topk(*arguments, len(z), *addresses)
        if bad >= 0:
            value = logits[bad][~torch.isfinite(z[bad]).to(logits.device)][0].item()
            raise RowError(bad, f"teacher logit {value:g} is not finite")
        return records.to(logits.device)

    def _labels(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        if not self.true_class:
            return None
        if labels is None:
            raise InputError("codec.true_class needs the labels of the samples")
        ids = torch.as_tensor(labels).to(device, torch.int64).contiguous()
        if ids.shape != (count,) or (count and not 0 <= ids.min() <= ids.max() < self.num_classes):
            raise InputError(f"labels must be [{count}], each in [0, {self.num_classes})")
        return ids

    def decode(self, raw: Tensor, tau: float) -> Tensor | TopK:
        """ids int32 [n, k], log-probabilities float32 [n, k] and log tail float32 [n] at ``tau``.

        With l_i stored at T=1 and c the normaliser at tau, log p_i(tau) = l_i / tau - c: ids and
        tail together have mass one.

        Raises:
            CacheError: no tail mass is recorded at ``tau``.
        """
        return decode_rows(self, raw, None, tau)

    def decode_true_class(self, raw: Tensor, tau: float) -> Tensor:
        """Log-probability of the true class at ``tau``, float32 [n]: l / tau - c.

        Raises:
            CacheError: the records do not hold it, or no tail mass at ``tau``.
        """
        if not self.true_class:
            raise CacheError("the cache does not hold the true class (codec.true_class)")
        start = self._tail_offset + 8 * self._temperature_index(tau) + 4
        shift = raw[:, start : start + 4].contiguous().view(torch.float32)[:, 0]
        start = self._true_class_offset
        stored = raw[:, start : start + 4].contiguous().view(torch.float32)[:, 0]
        return stored / tau - shift

    def layout(self, tau: float) -> _C.RecordLayout:
        return _C.RecordLayout(
            _C.RecordKind.topk,
            record_bytes=self.record_bytes,
            num_classes=self.num_classes,
            id_bytes=id_bytes(self.num_classes),
            k=self.k,
            tail_offset=self._tail_offset + 8 * self._temperature_index(tau),
            tau=tau,
        )

    def empty(self, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
        return (
            torch.empty((count, self.k), dtype=torch.int32, device=device),
            torch.empty((count, self.k), dtype=torch.float32, device=device),
            torch.empty(count, dtype=torch.float32, device=device),
        )

    def answer(self, outputs: tuple[Tensor, ...]) -> TopK:
        ids, log_probs, log_tail = outputs
        return TopK(ids, log_probs, log_tail)

    def _temperature_index(self, tau: float) -> int:
        for index, recorded in enumerate(self.temperatures):
            if math.isclose(recorded, tau, rel_tol=1e-12):
                return index
        known = ", ".join(f"{value:g}" for value in self.temperatures)
        raise CacheError(f"the cache has no tail mass at temperature {tau:g}; recorded: {known}")


def codec_from_config(config: CodecConfig, num_classes: int, tau: float) -> Codec:
    """The codec of a new cache; ``tau`` is recorded where the configuration names no temperature.

    Raises:
        InputError: k or num_classes out of range.
    """
    k = config.k if config.k is not None else min(16, num_classes)
    temperatures = config.temperatures if config.temperatures is not None else (tau,)
    distinct = tuple(sorted({float(t) for t in temperatures}))
    return _create(config.name, num_classes, k, distinct, config.true_class)


def codec_from_manifest(values: Mapping[str, Any], where: str) -> Codec:
    """The codec that a manifest's "codec" describes.

    Raises:
        CacheError: it describes none; the message starts with ``where``.
    """
    if set(values) - {"true_class"} != {"name", "k", "temperatures", "num_classes"}:
        raise CacheError(f"{where}: codec needs name, k, temperatures, num_classes")
    name, k, temperatures = values["name"], values["k"], values["temperatures"]
    if not isinstance(name, str) or name not in CODECS:
        raise CacheError(f"{where}: codec.name must be one of {', '.join(CODECS)}, not {name!r}")
    if type(values["num_classes"]) is not int:
        raise CacheError(f"{where}: codec.num_classes must be an integer")
    if not isinstance(temperatures, list) or not all(_is_positive(t) for t in temperatures):
        raise CacheError(f"{where}: codec.temperatures must be positive numbers")
    if name == "topk" and (type(k) is not int or not temperatures):
        raise CacheError(f"{where}: codec.k and codec.temperatures are needed by topk")
    true_class = values.get("true_class", False) is True
    try:
        codec = _create(
            name, values["num_classes"], k, tuple(float(t) for t in temperatures), true_class
        )
    except InputError as error:
        raise CacheError(f"{where}: {error}") from None
    if codec.manifest() != {**values, "temperatures": [float(t) for t in temperatures]}:
        raise CacheError(
            f"{where}: codec has k, temperatures or true_class that {name} does not take"
        )
    return codec


CODECS: dict[str, Callable[..., Codec]] = {
    "hard": HardCodec,
    "topk": TopKCodec,
    **{name: partial(DenseCodec, name=name) for name in DENSE_DTYPES},
    "dense-int8": DenseInt8Codec,
    "dense-fp8": DenseFp8Codec,
}


def _create(
    name: str, num_classes: int, k: int, temperatures: tuple[float, ...], true_class: bool
) -> Codec:
    if not 1 <= num_classes < 2**31:
        raise InputError(f"codec.num_classes must lie in [1, 2^31), not {num_classes}")
    if name != "topk":
        return CODECS[name](num_classes)
    if num_classes > _MAX_TOPK_CLASSES:
        raise InputError(f"topk takes at most {_MAX_TOPK_CLASSES} classes, not {num_classes}")
    if not 1 <= k <= num_classes:
        raise InputError(f"codec.k must lie in [1, {num_classes}], the class count, not {k}")
    return TopKCodec(num_classes, k, temperatures, true_class)


def _codec_manifest(
    name: str, num_classes: int, k: int | None = None, temperatures: tuple[float, ...] = ()
) -> dict[str, Any]:
    return {
        "name": name,
        "k": k,
        "temperatures": list(temperatures),
        "num_classes": num_classes,
    }


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30
