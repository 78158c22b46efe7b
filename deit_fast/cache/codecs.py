"""How a teacher's answer becomes a record of fixed size, and back.

To add a codec: a class with the members of ``Codec`` below, one line in ``CODECS``, its layout in
docs/cache-format.md, its name in ``config.CodecConfig``, its error bound in tests/test_cache.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deit_fast.cache.errors import CacheError, RowError
from deit_fast.config import CodecConfig, InputError
from deit_fast.kernels import TopK

HALF_MIN = -65504.0  # the most negative float16
DENSE_DTYPES = {
    "dense-fp16": torch.float16,
    "dense-bf16": torch.bfloat16,
    "dense-fp32": torch.float32,
}


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

    def encode(self, logits: Tensor) -> Tensor:
        """Float logits [n, num_classes] to uint8 [n, record_bytes].

        Raises:
            InputError: another shape or dtype.
            RowError: a logit that is not finite, or not in the codec's range.
        """
        ...

    def decode(self, raw: Tensor, tau: float, tail: str) -> Tensor | TopK:
        """uint8 [n, record_bytes] to a teacher form of ``kernels.distillation_loss``."""
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

    def encode(self, logits: Tensor) -> Tensor:
        labels = _finite_float32(logits, self.num_classes).argmax(1)
        return _pack_ids(labels[:, None], self.num_classes)

    def decode(self, raw: Tensor, tau: float, tail: str) -> Tensor:
        """int64 [n] class ids; tau and tail do not matter."""
        return _unpack_ids(raw, 0, 1, self.num_classes)[:, 0].long()


@dataclass(frozen=True)
class TopKCodec:
    """The k most probable classes and the exact mass of all others.

    Bytes: k class ids of 2 bytes (4 above 65,536 classes), k log-probabilities of 2, one log tail
    mass of 4 per temperature: 68 at k=16 and one temperature.

    Order: descending logit (as float32), ties by ascending id. A log-probability is
    z_i - logsumexp(z), in float64, rounded to float16; below -65504 it is stored as -65504.
    The log tail mass at T is log(sum outside the ids of exp(z/T) / sum of exp(z/T)), summed
    over the outside itself rather than as 1 - inside, rounded to float32; -inf for k = C.

    Error at a recorded T, with l the true log-probabilities of the ids at T=1 and
    L = max |l|: |log p_i(T) - true| <= L / (1024 T) + 1e-5 (float16 rounds by at most
    L / 2048, and normalising adds no more than that again). The tail's relative error is
    below 1e-6 of max(1, |log tail|).
    """

    num_classes: int
    k: int
    temperatures: tuple[float, ...]

    @property
    def record_bytes(self) -> int:
        return self._tail_offset + 4 * len(self.temperatures)

    @property
    def ids_per_record(self) -> int:
        return self.k

    @property
    def _probs_offset(self) -> int:
        return self.k * id_bytes(self.num_classes)

    @property
    def _tail_offset(self) -> int:
        return self._probs_offset + 2 * self.k

    def manifest(self) -> dict[str, Any]:
        return _codec_manifest("topk", self.num_classes, self.k, self.temperatures)

    def encode(self, logits: Tensor) -> Tensor:
        z = _finite_float32(logits, self.num_classes)
        ids = _largest(z, self.k)
        z = z.double()
        inside = z.gather(1, ids)
        outside = z.scatter_(1, ids, -math.inf) if self.k < self.num_classes else None
        at_one, log_tail = _normaliser(inside, outside, 1.0)
        log_probs = (inside - at_one[:, None]).clamp(min=HALF_MIN)
        tails = [
            log_tail if tau == 1 else _normaliser(inside, outside, tau)[1]
            for tau in self.temperatures
        ]
        return torch.cat(
            [
                _pack_ids(ids, self.num_classes),
                _bytes_of(log_probs.half()),
                _bytes_of(torch.stack(tails, 1).float()),
            ],
            dim=1,
        )

    def decode(self, raw: Tensor, tau: float, tail: str) -> TopK:
        """ids int32 [n, k], log-probabilities float32 [n, k] and log tail float32 [n] at ``tau``.

        With l_i stored at T=1 and t the tail at tau, log p_i(tau) = l_i / tau - c,
        c = logsumexp(l / tau) - log(1 - exp(t)): ids and tail together have mass one.

        Raises:
            CacheError: no tail mass is recorded at ``tau``.
        """
        place = self._temperature_index(tau)
        ids = _unpack_ids(raw, 0, self.k, self.num_classes)
        scaled = _columns(raw, self._probs_offset, self.k, torch.float16).float() / tau
        log_tail = _columns(raw, self._tail_offset + 4 * place, 1, torch.float32)[:, 0]
        log_inside = torch.log(-torch.expm1(log_tail))
        shift = torch.logsumexp(scaled, 1) - log_inside
        return TopK(ids, scaled - shift[:, None], log_tail, tail)

    def _temperature_index(self, tau: float) -> int:
        for index, recorded in enumerate(self.temperatures):
            if math.isclose(recorded, tau, rel_tol=1e-12):
                return index
        known = ", ".join(f"{value:g}" for value in self.temperatures)
        raise CacheError(f"the cache has no tail mass at temperature {tau:g}; recorded: {known}")


@dataclass(frozen=True)
class DenseCodec:
    """Every logit: 2 or 4 bytes a class.

    Error, relative to the logit: float16 2^-11 (2^-25 absolute below 2^-14), bfloat16 2^-8,
    float32 none for input of up to that width. A logit beyond the dtype's range is refused.
    """

    num_classes: int
    name: str

    @property
    def record_bytes(self) -> int:
        return self.num_classes * DENSE_DTYPES[self.name].itemsize

    @property
    def ids_per_record(self) -> int:
        return 0

    def manifest(self) -> dict[str, Any]:
        return _codec_manifest(self.name, self.num_classes)

    def encode(self, logits: Tensor) -> Tensor:
        z = _finite_float32(logits, self.num_classes)
        stored = z.to(DENSE_DTYPES[self.name])
        _refuse_rows(~torch.isfinite(stored), z, f"does not fit {self.name.removeprefix('dense-')}")
        return _bytes_of(stored)

    def decode(self, raw: Tensor, tau: float, tail: str) -> Tensor:
        """Logits [n, C] in the stored dtype; tau and tail do not matter."""
        return raw.contiguous().view(DENSE_DTYPES[self.name])


def codec_from_config(config: CodecConfig, num_classes: int, tau: float) -> Codec:
    """The codec of a new cache; ``tau`` is recorded where the configuration names no temperature.

    Raises:
        InputError: k or num_classes out of range.
    """
    k = config.k if config.k is not None else min(16, num_classes)
    temperatures = config.temperatures if config.temperatures is not None else (tau,)
    return _create(config.name, num_classes, k, tuple(sorted({float(t) for t in temperatures})))


def codec_from_manifest(values: Mapping[str, Any], where: str) -> Codec:
    """The codec that a manifest's "codec" describes.

    Raises:
        CacheError: it describes none; the message starts with ``where``.
    """
    if set(values) != {"name", "k", "temperatures", "num_classes"}:
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
    try:
        codec = _create(name, values["num_classes"], k, tuple(float(t) for t in temperatures))
    except InputError as error:
        raise CacheError(f"{where}: {error}") from None
    if codec.manifest() != {**values, "temperatures": [float(t) for t in temperatures]}:
        raise CacheError(f"{where}: codec has k or temperatures that {name} does not take")
    return codec


CODECS: dict[str, Callable[[int, int, tuple[float, ...]], Codec]] = {
    "hard": lambda num_classes, k, temperatures: HardCodec(num_classes),
    "topk": TopKCodec,
    **{
        name: lambda num_classes, k, temperatures, name=name: DenseCodec(num_classes, name)  # type: ignore[misc]
        for name in DENSE_DTYPES
    },
}


def _create(name: str, num_classes: int, k: int, temperatures: tuple[float, ...]) -> Codec:
    if not 1 <= num_classes < 2**31:
        raise InputError(f"codec.num_classes must lie in [1, 2^31), not {num_classes}")
    if name == "topk" and not 1 <= k <= num_classes:
        raise InputError(f"codec.k must lie in [1, {num_classes}], the class count, not {k}")
    return CODECS[name](num_classes, k, temperatures)


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


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------


def _finite_float32(logits: Tensor, num_classes: int) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] != num_classes or not logits.is_floating_point():
        raise InputError(
            f"logits must be float [n, {num_classes}], "
            f"not {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        )
    z = logits.detach().float()
    _refuse_rows(~torch.isfinite(z), logits, "is not finite")
    return z


def _refuse_rows(bad: Tensor, values: Tensor, reason: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RowError(row, f"teacher logit {values[row, column].item():g} {reason}")


def _largest(z: Tensor, k: int) -> Tensor:
    """Column ids [n, k] by descending value, equal values by ascending id.

    torch.topk leaves ties open, so it gets int64 keys without any: a float's bits as an integer of
    the same order above, the reversed id below.
    """
    bits = (z + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0, which it ties with
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    reversed_ids = 0xFFFFFFFF - torch.arange(z.shape[1], device=z.device)
    keys = ordered * 2**32 + reversed_ids
    return 0xFFFFFFFF - (keys.topk(k, dim=1).values & 0xFFFFFFFF)


def _normaliser(inside: Tensor, outside: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """logsumexp of all z / tau, and the log of the outside's share; float64 [n]."""
    log_inside = _log_sum_exp(inside / tau)
    if outside is None:
        return log_inside, torch.full_like(log_inside, -math.inf)
    log_outside = _log_sum_exp(outside / tau)
    share = -torch.logaddexp(torch.zeros_like(log_inside), log_inside - log_outside)
    return torch.logaddexp(log_inside, log_outside), share


def _log_sum_exp(x: Tensor) -> Tensor:
    """Over columns, about the row's largest value. Sums by halves, so that a row's bits do not
    depend on how many rows stand beside it, as those of torch.sum may."""
    largest = x.amax(1)
    terms = torch.exp(x - largest[:, None])
    while terms.shape[1] > 1:
        half = (terms.shape[1] + 1) // 2
        terms[:, : terms.shape[1] - half] += terms[:, half:]
        terms = terms[:, :half]
    return torch.log(terms[:, 0]) + largest


# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------


def _bytes_of(values: Tensor) -> Tensor:
    """[n, m] of any dtype as uint8 [n, m * itemsize], little-endian as the machine is."""
    return values.contiguous().view(torch.uint8)


def id_bytes(num_classes: int) -> int:
    return 2 if num_classes <= 65536 else 4


def _pack_ids(ids: Tensor, num_classes: int) -> Tensor:
    """Class ids [n, k] as the low 2 or all 4 bytes of each."""
    words = _bytes_of(ids.int()).view(*ids.shape, 4)
    return words[:, :, : id_bytes(num_classes)].reshape(ids.shape[0], -1)


def _unpack_ids(raw: Tensor, offset: int, count: int, num_classes: int) -> Tensor:
    """int32 [n, count]"""
    if id_bytes(num_classes) == 4:
        return _columns(raw, offset, count, torch.int32)
    return _columns(raw, offset, count, torch.int16).int() & 0xFFFF


def _columns(raw: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` numbers from byte ``offset`` of each row; a copy only where they lie askew."""
    size = dtype.itemsize
    if offset % size == 0 and raw.shape[1] % size == 0:
        first = offset // size
        return raw.contiguous().view(dtype)[:, first : first + count]
    return raw[:, offset : offset + count * size].contiguous().view(dtype)
