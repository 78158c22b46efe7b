"""Codecs of a teacher's features: float tensors [n, tokens, width] to records, and back.

A value is always encoded from its float32, by itself or with its token, so the bytes do not depend
on the batch. torch is imported where features are encoded or decoded, as in `codecs.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from deit_fast import _C
from deit_fast.cache.codec_base import Codec, bytes_of
from deit_fast.errors import CacheError, InputError, RowError
from deit_fast.runtime.device import divided

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.cache.sampled import ViewKeys

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_LEAST_SCALE = 2.0**-126  # the least normal float32: a smaller one would itself be inexact
_MOST_AMAX = 2.0**128 - 2.0**107  # above it a rounded scale times its largest code could overflow
_MOST = 2**24  # tokens, and channels: far more than any network has


@dataclass(frozen=True)
class FeatureCodec(Codec):
    """What the codecs of features share. A record holds one view's tokens one after another.

    Attributes:
        tokens: T; patches are row-major.
        width: D, channels of a token.
    """

    tokens: int
    width: int

    def manifest(self) -> dict[str, Any]:
        """name, tokens, width."""
        return {"name": self.name, "tokens": self.tokens, "width": self.width}

    def layout(self, tau: float = 1.0) -> _C.RecordLayout:
        """The same at every ``tau``."""
        return _C.RecordLayout(
            self.kind,
            record_bytes=self.record_bytes,
            num_classes=self.width,
            tokens=self.tokens,
        )

    def encode(self, features: Tensor, keys: ViewKeys | None = None) -> Tensor:
        """Float features [n, tokens, width] to uint8 [n, record_bytes], on their device.

        Raises:
            InputError: another shape or dtype.
            RowError: a value that is not finite, or out of the codec's range.
        """
        import torch

        shape = self.tokens, self.width
        if tuple(features.shape[1:]) != shape or not features.is_floating_point():
            raise InputError(
                f"features must be float [n, {self.tokens}, {self.width}], "
                f"not {str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
            )
        x = features.detach().float()
        # Before encoding: float8 e4m3 has no infinity, so an overflow would be stored as 448.
        _refuse(~torch.isfinite(features), features, "is not finite")
        _refuse(~torch.isfinite(x), features, "does not fit float32")
        return self._encode(x)

    @abstractmethod
    def _encode(self, x: Tensor) -> Tensor:
        """Finite float32 [n, tokens, width] to records."""

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Features [n, tokens, width], float32."""
        return (((count, self.tokens, self.width), "float32"),)


@dataclass(frozen=True)
class FloatFeatures(FeatureCodec):
    """Every value as float16, bfloat16 or float32: 2 or 4 bytes a channel.

    Error, relative to the value: fp16 2^-11 (2^-25 absolute below 2^-14; beyond 65504 is refused),
    bf16 2^-8, fp32 none. Values that the dtype holds exactly come back bit for bit.
    """

    format: str

    kind = _C.RecordKind.copy

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.format

    @property
    def record_bytes(self) -> int:
        return self.tokens * self.width * (4 if self.format == "fp32" else 2)

    def _encode(self, x: Tensor) -> Tensor:
        import torch

        stored = x.to(getattr(torch, _DTYPES[self.format]))
        _refuse(~torch.isfinite(stored), x, f"does not fit {self.format}")
        return bytes_of(stored.reshape(len(x), -1))

    def decode(self, records: Tensor, tau: float = 1.0) -> Tensor:
        """Features in the stored dtype; the records' own memory."""
        import torch

        values = records.contiguous().view(getattr(torch, _DTYPES[self.format]))
        return values.view(len(records), self.tokens, self.width)

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Features [n, tokens, width] in the stored dtype."""
        return (((count, self.tokens, self.width), _DTYPES[self.format]),)


@dataclass(frozen=True)
class _ScaledFeatures(FeatureCodec):
    """A float32 scale and a byte per channel for each token. The scale is the largest magnitude of
    the token divided by that of a code, but at least 2^-126; 0 for a token of zeros."""

    @property
    def record_bytes(self) -> int:
        return self.tokens * (4 + self.width)

    def _scaled(self, x: Tensor, largest_code: float) -> tuple[Tensor, Tensor]:
        """Scales [n, T, 1], and the values in units of them within +-``largest_code``."""
        import torch

        amax = x.abs().amax(2, keepdim=True)
        scale = divided(amax.clamp(max=_MOST_AMAX), largest_code).clamp(min=_LEAST_SCALE)
        units = (x / scale).clamp(-largest_code, largest_code)
        return torch.where(amax > 0, scale, 0.0), units

    def _records(self, scale: Tensor, codes: Tensor) -> Tensor:
        import torch

        tokens = torch.cat([bytes_of(scale), codes.view(torch.uint8)], 2)
        return tokens.reshape(len(tokens), self.record_bytes)


@dataclass(frozen=True)
class Fp8Features(_ScaledFeatures):
    """float8 e4m3 times a float32 scale s for each token: T (D + 4) bytes.

    Error of a value x: at most 2^-4 |x| + 2^-10 s + 2^-149, with s = max(amax / 448, 2^-126) of its
    token, rounded to float32. So the error follows each value, and a channel far larger than the
    others costs them little: below 2^-10 s, which is amax / 458752, a value becomes 0.
    """

    name = "fp8"
    kind = _C.RecordKind.token_fp8

    def _encode(self, x: Tensor) -> Tensor:
        import torch

        scale, units = self._scaled(x, 448.0)
        return self._records(scale, units.to(torch.float8_e4m3fn))


@dataclass(frozen=True)
class Int8Features(_ScaledFeatures):
    """255 even steps s for each token, a float32: T (D + 4) bytes.

    Error of a value: at most s / 2 + 2^-22 amax, with s = max(amax / 127, 2^-126) of its token; so
    amax / 254 and rounding. One channel far larger than the others makes all of them coarse: such
    features are stored after each channel was divided by its deviation.

    Attributes:
        standardised: named `int8-standard`: the values were divided so before they came here.
    """

    standardised: bool = False

    kind = _C.RecordKind.token_int8

    @property
    def name(self) -> str:  # type: ignore[override]
        return "int8-standard" if self.standardised else "int8"

    def _encode(self, x: Tensor) -> Tensor:
        import torch

        scale, units = self._scaled(x, 127.0)
        return self._records(scale, units.round().to(torch.int8))


FEATURE_CODECS: dict[str, Callable[[int, int], FeatureCodec]] = {
    "fp8": Fp8Features,
    "int8": Int8Features,
    "int8-standard": partial(Int8Features, standardised=True),
    **{name: partial(FloatFeatures, format=name) for name in _DTYPES},
}


def feature_codec(name: str, tokens: int, width: int) -> FeatureCodec:
    """The codec of this name for features [n, tokens, width].

    Raises:
        InputError: an unknown name, or a size out of range.
    """
    if name not in FEATURE_CODECS:
        raise InputError(f"codec.name must be one of {', '.join(FEATURE_CODECS)}, not {name!r}")
    for what, value in (("tokens", tokens), ("width", width)):
        if type(value) is not int or not 1 <= value <= _MOST:
            raise InputError(f"codec.{what} must lie in [1, {_MOST}], not {value!r}")
    return FEATURE_CODECS[name](tokens, width)


def feature_codec_from_manifest(values: Mapping[str, Any], where: str) -> FeatureCodec:
    """The codec of features that a manifest's "codec" describes.

    Raises:
        CacheError: it describes none; the message starts with ``where``.
    """
    if set(values) != {"name", "tokens", "width"}:
        raise CacheError(f"{where}: codec of features needs name, tokens, width")
    if not isinstance(values["name"], str):
        raise CacheError(f"{where}: codec.name must be text, not {values['name']!r}")
    try:
        return feature_codec(values["name"], values["tokens"], values["width"])
    except InputError as error:
        raise CacheError(f"{where}: {error}") from None


def _refuse(bad: Tensor, values: Tensor, reason: str) -> None:
    """Raise a RowError for the first of the values [n, T, D] that is bad."""
    if bad.any():
        row, token, channel = bad.nonzero()[0].tolist()
        value = values[row, token, channel].item()
        raise RowError(
            row, f"teacher feature {value:g} of token {token}, channel {channel} {reason}"
        )
