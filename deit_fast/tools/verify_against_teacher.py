"""A cache against its teacher: some records are computed again from the images and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from deit_fast.cache import LogitCache
from deit_fast.cache.feature_cache import FeatureCache, is_features, target_of
from deit_fast.cache.verify import THRESHOLD, compare_logits, is_bf16, pick_pixels
from deit_fast.config import DataConfig, RunConfig, ViewConfig, constants
from deit_fast.config_file import from_dict
from deit_fast.data.batch import ViewBatch, main_labels
from deit_fast.data.fingerprint import require_same_pixels, views_fingerprint
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import open_loader, open_source
from deit_fast.errors import CacheError, InputError
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.models.teacher_features import TeacherOutputs
from deit_fast.runtime.distributed import choose_device, has_bf16
from deit_fast.views.plan import ViewPlan, lam_of

_BATCH = 16


def stored_view(cache: LogitCache) -> ViewConfig:
    """Settings of a cache's views, from its fingerprint.

    Raises:
        CacheError: the fingerprint has none, as that of an imported cache.
    """
    found = cache.manifest["fingerprint"]
    names = [*(item.name for item in fields(ViewConfig)), *constants(ViewConfig)]
    optional = {"size_schedule"}
    names = [name for name in names if name not in optional or f"view.{name}" in found]
    missing = [key for key in names if f"view.{key}" not in found]
    if missing:
        raise CacheError(
            f"cache {cache.path} does not say how its views are made: its fingerprint lacks "
            f"view.{missing[0]}"
        )
    values = {name: found[f"view.{name}"] for name in names}
    try:
        return from_dict(ViewConfig(), values, "view.")
    except InputError as error:
        raise CacheError(f"cache {cache.path}: fingerprint: {error}") from None


def leading_labels(
    cache: LogitCache, data: DataConfig, samples: np.ndarray, views: np.ndarray
) -> np.ndarray:
    """Label of the image with the larger share of each view, int64 [n]; opens no image.

    Raises:
        CacheMismatch: another data set.
        CacheError: the cache does not say how its views are made.
    """
    view = stored_view(cache)
    source = open_source(data, "train", view.image_size)
    cache.require(source.fingerprint())
    plan = ViewPlan(view, source.num_samples)
    rows = plan.rows(samples, views)
    own, partner = (torch.from_numpy(source.labels[rows[name]]) for name in ("sample", "partner"))
    lam = torch.from_numpy(lam_of(rows, plan.sizes(rows["view"])))
    return main_labels(own, partner, lam).numpy()


def verify_against_teacher(
    path: str,
    teacher: str,
    data: DataConfig,
    *,
    teacher_classes: str | None = None,
    teacher_mean: tuple[float, float, float] | None = None,
    teacher_std: tuple[float, float, float] | None = None,
    samples: int = 64,
    threshold: float = THRESHOLD,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Compute random records again from the images, with the cache's own view settings.

    A record's error is in nats, at the first recorded temperature; ``cache.verify.compare_logits``
    defines it and how large it may be beyond ``threshold``. That of features is relative to their
    length, see ``FeatureCache.compare``, without ``threshold``.

    Args:
        teacher, data, teacher_classes, teacher_mean, teacher_std: what the cache was made from;
            their fingerprints are compared first.
        samples: number of records to compute again.

    Returns:
        `records`, `failed` (count), `worst` (`view`, `sample`, `error`, `allowed`: of the record
        with the largest excess), `unit` (of the error), `pixels` (digests compared).

    Raises:
        CacheMismatch: another teacher, data set or view settings; names each differing field.
        CacheError: the pixels of a view differ, a record is damaged, no view is complete.
    """
    cache = LogitCache.open(path)
    view = stored_view(cache)
    config = RunConfig(
        teacher=teacher,
        teacher_classes=teacher_classes,
        teacher_mean=teacher_mean,
        teacher_std=teacher_std,
        teacher_size=cache.manifest["fingerprint"].get("teacher.size"),
        data=data,
        view=view,
    )
    source = open_source(data, "train", view.image_size)
    cache.require(views_fingerprint(config, source))  # first: a teacher may take a minute to load
    chosen = choose_device(device)
    target = target_of(cache) if is_features(cache) else "logits"
    model = load_class_matched_teacher(config, source.classes, chosen, [target]).to_device(chosen)
    index = 0 if is_features(cache) else None
    cache.require(model.expected_fields(cache.manifest["fingerprint"], index))
    if not cache.views:
        raise CacheError(f"cache {path} has no complete view")
    plan = ViewPlan(view, source.num_samples)
    digests = pick_pixels(cache.path, cache.manifest, cache.views, samples)
    require_same_pixels(digests, source, plan, data=data, device=chosen, where=f"cache {path}")

    ids, views = _draw(cache, samples, seed)
    compare = _comparison(cache, threshold, chosen)
    batches = [(ids[part], views[part]) for part in plan.batches_of(views, _BATCH)]
    data = dataclasses.replace(data, workers=0)
    errors, allowed = [], []
    for batch in open_loader(data, source, plan, batches, device=chosen):
        found, bound = compare(batch, model.outputs(ingest_batch(batch, view, torch.float32)))
        errors.append(found)
        allowed.append(bound)
    error, limit = torch.cat(errors), torch.cat(allowed)
    worst = int((error - limit).argmax())
    return {
        "records": len(ids),
        "failed": int((error > limit).sum()),
        "worst": {
            "view": int(views[worst]),
            "sample": int(ids[worst]),
            "error": float(error[worst]),
            "allowed": float(limit[worst]),
        },
        "unit": "of its length" if is_features(cache) else "nats",
        "pixels": len(digests),
    }


def _comparison(
    cache: LogitCache, threshold: float, device: torch.device
) -> Callable[[ViewBatch, TeacherOutputs], tuple[torch.Tensor, torch.Tensor]]:
    """What compares the records of a batch with the teacher's outputs: errors and bounds [n]."""
    tau = cache.codec.first_temperature
    features = FeatureCache(cache) if is_features(cache) else None

    def compare(batch: ViewBatch, outputs: TeacherOutputs) -> tuple[torch.Tensor, torch.Tensor]:
        if features is not None:
            stored = features.gather(batch, "cpu")
            return features.compare(stored, outputs.features[0].cpu(), has_bf16(device))
        assert outputs.logits is not None
        return compare_logits(
            cache.gather(batch.sample_ids, batch.view_ids, tau=tau),
            outputs.logits.cpu(),
            codec=cache.codec,
            tau=tau,
            keys=cache.keys(batch.sample_ids, batch.view_ids),
            threshold=threshold,
            wrote_bf16=is_bf16(cache),
        )

    return compare


def _draw(cache: LogitCache, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample and view ids of random distinct records of the complete views, int64 [n]."""
    complete, per_view = np.array(cache.views, np.int64), cache.manifest["num_samples"]
    records = len(complete) * per_view
    chosen = np.random.default_rng(seed).choice(records, min(count, records), replace=False)
    chosen.sort()
    return chosen % per_view, complete[chosen // per_view]
