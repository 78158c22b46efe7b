"""A cache of features as a run reads it, and the way from a teacher's features to its records.

    raw features -> reduce -> standardise (codec `int8-standard`) -> codec -> records

Reading ends before ``reduce``: a student learns reduced features as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_fast.cache.codec_base import Codec
from deit_fast.cache.feature_codecs import FeatureCodec
from deit_fast.cache.format import holds_features
from deit_fast.cache.reader import LogitCache
from deit_fast.cache.verify import THRESHOLD, compare_features, is_bf16
from deit_fast.data.batch import ViewBatch
from deit_fast.errors import CacheError
from deit_fast.features.normalise import Normaliser
from deit_fast.features.statistics import FeatureStatistics, read_statistics
from deit_fast.models.teacher_features import FeatureTarget

ARITHMETIC_BF16 = 0.05
"""Relative L2 difference of features that other batch sizes or another device explain, of a teacher
that computes in bfloat16; of one in float32 it is ``THRESHOLD``."""


class Given(NamedTuple):
    """A feature target as a teacher or a cache gives it.

    Attributes:
        teacher: what tells its teacher from others.
        tokens, width: shape [T, D] of a view's features.
        fields: which feature it is: those of a cache's fingerprint that start with `target.`.
        statistics: of the cache's features; None for those of an online teacher.
    """

    target: str
    teacher: str
    tokens: int
    width: int
    fields: Mapping[str, Any]
    statistics: FeatureStatistics | None = None


def is_features(cache: LogitCache) -> bool:
    return holds_features(cache.manifest)


def target_of(cache: LogitCache) -> FeatureTarget:
    """The target that a feature cache holds."""
    found = cache.manifest["fingerprint"]
    try:
        return FeatureTarget(
            found["target.name"], found["target.block"], found["target.norm"],
            found.get("target.grid"),
        )  # fmt: skip
    except KeyError as error:
        raise CacheError(f"cache {cache.path}: its fingerprint lacks {error.args[0]}") from None


class StoredForm:
    """How raw features of a teacher become what a codec stores, and back."""

    def __init__(self, codec: Codec, statistics: FeatureStatistics) -> None:
        self.statistics = statistics
        is_standard = codec.name == "int8-standard"
        self._scaling = Normaliser("standard", statistics) if is_standard else None

    def prepare(self, raw: Tensor) -> Tensor:
        """Features [n, T, D] as the codec encodes them, float32 [n, T, D']."""
        x = self.statistics.reduce(raw)
        return x if self._scaling is None else self._scaling.to(x.device)(x)

    def finish(self, decoded: Tensor) -> Tensor:
        """What the codec decoded, [n, T, D'], as features."""
        if self._scaling is None:
            return decoded
        return self._scaling.to(decoded.device).restore(decoded)


class FeatureCache:
    """A cache of features, its statistics and its target.

    Raises:
        CacheError: the statistics are missing, damaged or of another cache.
    """

    def __init__(self, cache: LogitCache) -> None:
        assert isinstance(cache.codec, FeatureCodec)
        self.cache = cache
        self.statistics = read_statistics(cache.path, cache.manifest)
        self.form = StoredForm(cache.codec, self.statistics)
        found = cache.manifest["fingerprint"]
        teacher = f"{found.get('teacher.spec')} {found.get('teacher.weights_sha256')}"
        self.given = Given(
            target=target_of(cache).name,
            teacher=teacher,
            tokens=cache.codec.tokens,
            width=cache.codec.width,
            fields={key: found[key] for key in found if key.startswith("target.")},
            statistics=self.statistics,
        )

    def gather(self, batch: ViewBatch, device: torch.device | str) -> Tensor:
        """The stored features [B, T, D] of a batch's views."""
        found = self.cache.gather(batch.sample_ids, batch.view_ids, device=device)
        assert isinstance(found, Tensor)
        return self.form.finish(found)

    def compare(self, stored: Tensor, raw: Tensor, in_bf16: bool) -> tuple[Tensor, Tensor]:
        """Relative L2 error of each view's stored features, and the largest allowed one, float64
        [n] each.

        Allowed are twice the codec's own error of the new features, and what arithmetic explains.

        Args:
            stored: of ``gather``.
            raw: the teacher's features, computed anew.
            in_bf16: whether it computes in bfloat16; it may have done so when the cache was made.
        """
        exact = self.statistics.reduce(raw)
        again = self.form.finish(
            self.cache.codec.decode(self.cache.codec.encode(self.form.prepare(raw)), 1.0)
        )
        threshold = ARITHMETIC_BF16 if in_bf16 or is_bf16(self.cache) else THRESHOLD
        return compare_features(stored, exact, again, threshold)
