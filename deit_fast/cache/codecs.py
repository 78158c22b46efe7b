"""Which codec of logits: by its settings, or by the manifest of a cache. To add one follow
docs/extend.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from deit_fast.cache.codec_base import Codec, LogitCodec
from deit_fast.cache.dense_codecs import DENSE_DTYPES, DenseCodec, DenseFp8Codec, DenseInt8Codec
from deit_fast.cache.sampled import ViewKeys
from deit_fast.cache.sparse_codecs import HardCodec, SampledCodec, TopKCodec
from deit_fast.config import CodecConfig
from deit_fast.errors import CacheError, InputError

if TYPE_CHECKING:
    import numpy as np

_MAX_TOPK_CLASSES = 2**18  # more integer terms of csrc/arithmetic.h could overflow their sum
_DEFAULT_K, _DEFAULT_DRAWS = 8, 8  # of `sampled`

CODECS: dict[str, Callable[..., LogitCodec]] = {
    "hard": HardCodec,
    "topk": TopKCodec,
    "sampled": SampledCodec,
    **{f"dense-{name}": partial(DenseCodec, format=name) for name in DENSE_DTYPES},
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
