"""The caches that one pass of a teacher writes: one for each target.

Logits go to the folder itself, features to a folder in it that is named as their target. All caches
of a pass have one order of records, and blocks that divide one unit of work, so that a unit is one
series of teacher calls.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit_fast.cache import build_feature_manifest, build_manifest
from deit_fast.cache.feature_cache import StoredForm
from deit_fast.cache.format import (
    FILE_NAME,
    UNIT_RECORDS,
    codec_of,
    holds_features,
    read_manifest,
)
from deit_fast.cache.record_order import RecordOrder, record_order
from deit_fast.cache.verify import planned
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.errors import CacheError, InputError, RowError
from deit_fast.features.statistics import (
    FILE,
    FeatureStatistics,
    StatisticsFit,
    read_statistics,
)
from deit_fast.models.teacher import Teacher
from deit_fast.models.teacher_features import TeacherOutputs

log = logging.getLogger("deit_fast")


@dataclass(frozen=True)
class TargetCache:
    """The cache of one target.

    Attributes:
        folder: of the cache.
        index: of the target among the teacher's feature targets; None: the logits.
        manifest: of the cache.
        form: how features become records; None for logits.
    """

    folder: Path
    index: int | None
    manifest: dict[str, Any]
    form: StoredForm | None = None

    @property
    def name(self) -> str:
        return "logits" if self.index is None else self.folder.name

    @property
    def shape(self) -> tuple[int, ...]:
        """What a view has before encoding: [C] of logits, [T, D'] of features."""
        codec = self.manifest["codec"]
        return (codec["num_classes"],) if self.index is None else (codec["tokens"], codec["width"])

    def to_encode(self, outputs: TeacherOutputs) -> Tensor:
        """What the codec encodes: logits [n, C], or features [n, T, D']."""
        if self.index is None:
            assert outputs.logits is not None
            return outputs.logits
        assert self.form is not None
        return self.form.prepare(outputs.features[self.index])

    def planned(self, views: Iterable[int]) -> tuple[list[tuple[int, int]], int, int]:
        """As ``cache.verify.planned``."""
        return planned(self.folder, self.manifest, views)


class TargetCaches(list[TargetCache]):
    """The caches of a pass.

    Attributes:
        unit: records of a unit of work.
        order: where a sample's record stands in each view.
        num_samples: records of a view.
    """

    def __init__(self, caches: Iterable[TargetCache], unit: int, num_samples: int) -> None:
        super().__init__(caches)
        self.unit, self.num_samples = unit, num_samples
        self.order: RecordOrder = record_order(self[0].manifest)

    @property
    def units_per_view(self) -> int:
        return -(-self.num_samples // self.unit)

    def blocks(self, cache: TargetCache, unit: int) -> range:
        """The blocks of a cache in a unit."""
        size = cache.manifest["block_records"]
        stop = min((unit + 1) * self.unit, self.num_samples)
        return range(unit * self.unit // size, -(-stop // size))

    @property
    def view_bytes(self) -> int:
        """Bytes of a view of a sample in all caches."""
        return sum(cache.manifest["record_bytes"] for cache in self)

    def planned(self, views: Sequence[int]) -> tuple[int, int, int, list[tuple[int, int]]]:
        """What writing these views would do; from the block tables, reading no data.

        Returns:
            Blocks to write; complete blocks; bytes of the view files that do not exist yet;
            (view, unit) of the units with a block to write.
        """
        to_write = kept = new_bytes = 0
        units: set[tuple[int, int]] = set()
        for cache in self:
            missing, complete, size = planned(cache.folder, cache.manifest, views)
            to_write, kept, new_bytes = to_write + len(missing), kept + complete, new_bytes + size
            per_unit = self.unit // cache.manifest["block_records"]
            units |= {(view, block // per_unit) for view, block in missing}
        return to_write, kept, new_bytes, sorted(units)


def build_caches(
    config: RunConfig,
    teacher: Teacher,
    num_samples: int,
    fingerprint: Mapping[str, Any],
    statistics: list[FeatureStatistics] | None,
) -> TargetCaches:
    """The caches of a pass with this teacher.

    Args:
        fingerprint: of views, data and teacher's dtype, without the teacher itself.
        statistics: of each feature target; None: the cache of the logits alone.

    Raises:
        InputError: a codec setting that does not fit.
    """
    assert config.cache is not None
    folder, order = Path(config.cache), "pairs" if teacher.features else stored_order(config)
    caches = []
    unit = config.codec.block_records if order is None else UNIT_RECORDS
    common: dict[str, Any] = {"num_samples": num_samples, "order": order}
    if teacher.gives_logits:
        manifest = build_manifest(
            config.codec,
            num_classes=teacher.num_classes,
            tau=config.loss.tau,
            fingerprint={**fingerprint, **teacher.fingerprint()},
            block_records=unit,
            **common,
        )
        caches.append(TargetCache(folder, None, manifest))
    for index, found in enumerate(statistics or []):
        target, (tokens, _) = teacher.features[index], teacher.shapes[index]
        features = config.features
        of_target = teacher.target_fingerprint(index) | {
            "target.reduce": features.reduce,
            "target.dim": features.dim,
            "statistics.sha256": found.sha256,
        }
        manifest = build_feature_manifest(
            features.codec,
            tokens=tokens,
            width=found.width,
            fingerprint={**fingerprint, **of_target},
            **common,
        )
        form = StoredForm(codec_of(manifest), found)
        caches.append(TargetCache(folder / target.name, index, manifest, form))
    return TargetCaches(caches, unit, num_samples)


def stored_order(config: RunConfig) -> str | None:
    """The order of the logits' records: None, by sample id, also where none are stored yet. Both
    orders hold the same records, so a pass of the logits alone keeps that of its cache."""
    folder = Path(str(config.cache))
    if not (folder / FILE_NAME).exists():
        return None
    order: str | None = read_manifest(folder).get("order")
    return order


def require_targets(config: RunConfig, teacher: Teacher) -> None:
    """Check what does not depend on statistics, before they are fitted.

    Raises:
        InputError: the projection has more channels than a target.
        CacheError: a folder holds something else than its target, or logits in another order.
    """
    dim = config.features.dim
    for target, (_, width) in zip(teacher.features, teacher.shapes, strict=True):
        if dim is not None and dim > width:
            raise InputError(
                f"features.dim={dim} must lie in [1, {width}], the channels of {target.name}"
            )
        folder = Path(str(config.cache)) / target.name
        if (folder / FILE_NAME).exists() and not holds_features(read_manifest(folder)):
            raise CacheError(
                f"{folder} holds logits, and the features {target.name} would go there: name "
                f"another --cache"
            )
    folder = Path(str(config.cache))
    has_logits = teacher.gives_logits and (folder / FILE_NAME).exists()
    if teacher.features and has_logits and stored_order(config) is None:
        names = " ".join(target.name for target in teacher.features)
        raise CacheError(
            f"cache {folder} holds logits that were written without features, by sample id: write "
            f"the features alone, --targets {names}"
        )


def stored_statistics(config: RunConfig, teacher: Teacher) -> list[FeatureStatistics] | None:
    """The statistics of the caches of all feature targets; None where one has no manifest yet.

    Raises:
        CacheError: they are missing, damaged or of another cache.
    """
    found = [_stored(config, target.name) for target in teacher.features]
    return None if None in found else found  # type: ignore[return-value]


def _stored(config: RunConfig, target: str) -> FeatureStatistics | None:
    folder = Path(str(config.cache)) / target
    if not (folder / FILE_NAME).exists():
        return None
    return read_statistics(folder, read_manifest(folder))


def fit_statistics(
    config: RunConfig, teacher: Teacher, batches: Iterable[tuple[ViewBatch, TeacherOutputs]]
) -> list[FeatureStatistics]:
    """Statistics of each feature target, fitted to a teacher's outputs for batches of views.

    Raises:
        CacheError: features of a view are not finite.
        InputError: too few features, or features without any variance.
    """
    fits = [StatisticsFit(width) for _, width in teacher.shapes]
    for batch, outputs in batches:
        for target, fit, features in zip(teacher.features, fits, outputs.features, strict=True):
            try:
                fit.add(features.cpu())
            except RowError as error:
                view, sample = (int(ids[error.row]) for ids in (batch.view_ids, batch.sample_ids))
                raise CacheError(
                    f"view {view} sample {sample}: {target.name} of teacher {teacher.spec}: "
                    f"{error.reason}"
                ) from None
    return [fit.result(config.features.reduce, config.features.dim) for fit in fits]


def publish_statistics(
    config: RunConfig,
    teacher: Teacher,
    statistics: list[FeatureStatistics],
    fingerprint: Mapping[str, Any],
    share: Callable[[Path], None] | None = None,
) -> list[FeatureStatistics]:
    """Write them for the caches that have no manifest yet; returns those that hold from now on.

    Processes that fit the same at the same time, on one machine or on several, all take those of
    the first one: its file has a name that depends on all that was fitted. A file of another fit,
    whose job ended before it had a manifest, is replaced.

    Args:
        fingerprint: of views, data and teacher's dtype.
        share: called with the file of a fit; replaces it by that of another machine, if one was
            first.
    """
    result = []
    features = config.features
    for index, (target, fitted) in enumerate(zip(teacher.features, statistics, strict=True)):
        stored = _stored(config, target.name)
        if stored is None:
            fields = {**fingerprint, **teacher.target_fingerprint(index)}
            fit = [fields, features.reduce, features.dim, features.fit_views, config.views_used]
            digest = hashlib.sha256(json.dumps(fit, sort_keys=True).encode()).hexdigest()
            folder = Path(str(config.cache)) / target.name
            folder.mkdir(parents=True, exist_ok=True)
            first = folder / f".fit-{digest[:16]}.safetensors"
            fitted.create(first)
            if share is not None:
                share(first)
            stored = FeatureStatistics.load(first, fitted.width)
            if not _holds(folder / FILE, stored):
                stored.save(folder / FILE)
        result.append(stored)
    return result


def _holds(path: Path, statistics: FeatureStatistics) -> bool:
    """Whether the file holds these statistics."""
    try:
        FeatureStatistics.load(path, statistics.width, statistics.sha256)
    except CacheError:
        return False
    return True


def placeholder_statistics(config: RunConfig, teacher: Teacher) -> list[FeatureStatistics]:
    """For an estimate: statistics of the right widths, of nothing."""
    found = []
    for _, width in teacher.shapes:
        dim = config.features.dim or width
        found.append(
            FeatureStatistics(
                mean=torch.zeros(dim, dtype=torch.float64),
                std=torch.ones(dim, dtype=torch.float64),
                phi=1.0,
                rotation=None,
                reduce_mean=None,
                reduce_matrix=torch.eye(width, dim) if config.features.dim else None,
                count=2,
            )
        )
    return found
