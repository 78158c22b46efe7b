"""What a run learns from: stored logits and features that come with each batch, or a network that
is run in the step."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.cache import LogitCache, ReadAhead
from deit_fast.cache.feature_cache import FeatureCache, Given, is_features, target_of
from deit_fast.cache.format import manifest_sha256
from deit_fast.cache.sparse_codecs import SampledCodec
from deit_fast.cache.verify import compare_logits, is_bf16, open_for_run, pick_pixels, require_tau
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch, map_teacher
from deit_fast.data.fingerprint import require_same_pixels, views_fingerprint
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.sources import Source
from deit_fast.errors import CacheError, InputError
from deit_fast.inputs import require_teacher_settings
from deit_fast.kernels.distillation_loss import TopK
from deit_fast.models.teacher import Teacher, load_class_matched_teacher
from deit_fast.models.teacher_features import FeatureTarget, targets_of
from deit_fast.runtime.device import to_device
from deit_fast.runtime.distributed import has_bf16
from deit_fast.training.compiling import resolve_compile
from deit_fast.training.feature_terms import FeatureTerm, build_terms
from deit_fast.training.identity import FEATURES
from deit_fast.views.plan import ViewPlan

PIXEL_CHECKS = 32  # views made again before training on a cache: under a second
NOT_REDUCED = {"target.reduce": "none", "target.dim": None}  # features as the network gives them


class RunTeacher:
    """Caches, a network, a cache with the network that checks it, or nothing.

    The loader attaches stored logits and features to each batch. Without a cache the step runs the
    network on the images that the student sees; on CUDA beside the student, on a stream of its own.

    Args:
        config: of the run.
        network: on ``device``.
        caches: of logits or features, in the order of the settings.

    Attributes:
        logit_names: names of the distillation losses of single teachers, where there are several.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        network: Teacher | None = None,
        caches: Sequence[LogitCache] = (),
    ) -> None:
        self.config, self.device = config, device
        self.network, self.caches = network, tuple(caches)
        self.logit_caches = [cache for cache in caches if not is_features(cache)]
        self.feature_caches = [FeatureCache(cache) for cache in caches if is_features(cache)]
        self.is_online = network is not None and not self.caches
        given = [cache.given for cache in self.feature_caches]
        if self.is_online:
            assert network is not None
            given = [
                Given(target.name, network.spec, *shape, network.target_fields(index) | NOT_REDUCED)
                for index, (target, shape) in enumerate(
                    zip(network.features, network.shapes, strict=True)
                )
            ]
        self._given = given
        several = len(self.logit_caches) > 1
        numbers = range(1, len(self.logit_caches) + 1) if several else ()
        self.logit_names = tuple(f"distill_loss_{number}" for number in numbers)
        on_cuda = self.is_online and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._read_ahead: list[ReadAhead] = []
        self._largest: float | None = None

    # -- what is stored --------------------------------------------------------------------------

    def attach(self, batches: Sequence, start: int) -> Callable[[ViewBatch], ViewBatch] | None:
        """What a loader of ``batches`` calls with each batch from step ``start`` on, to add what is
        stored of it; None without a cache."""
        self.close()
        if not self.caches:
            return None
        steps = iter(range(start, len(batches)))

        def with_stored(batch: ViewBatch) -> ViewBatch:
            step = next(steps)
            if not self._read_ahead:  # only now: the loader's processes have been forked
                self._read_ahead = [cache.prefetch(batches, start=step) for cache in self.caches]
            for reader in self._read_ahead:
                reader.advance(step)
            return self.with_stored(batch)

        return with_stored

    @property
    def reads(self) -> Hashable:
        """What this run reads of its caches: runs with equal values get equal batches."""
        loss = self.config.loss
        form = (loss.tau, loss.kind == "hard") if self.logit_caches else None
        return form, *(id(cache) for cache in self.caches)

    def of(self, config: RunConfig) -> RunTeacher:
        """The teacher of a run of the same settings of teacher and caches.

        Raises:
            CacheError: a cache records nothing for that run's temperature.
            InputError: a setting of another number of values than teachers or terms.
        """
        teacher = self if config is self.config else self._of_another(config)
        teacher.require_lists()
        return teacher

    def _of_another(self, config: RunConfig) -> RunTeacher:
        require_teacher_settings(config)
        if config.loss.kind == "none":
            caches = [cache for cache in self.caches if is_features(cache)]
            network = self.network if config.feature_targets or caches else None
            return RunTeacher(config, self.device, network=network, caches=caches)
        for cache in self.logit_caches:
            require_tau(cache.codec, config.loss.tau, cache.where)
        return RunTeacher(config, self.device, network=self.network, caches=self.caches)

    @functools.cached_property
    def terms(self) -> tuple[FeatureTerm, ...]:
        """The feature terms of the loss.

        Raises:
            InputError: as ``build_terms``.
        """
        return build_terms(self.config, self._given)

    @property
    def logit_teachers(self) -> list[str]:
        """What made the logits of each cache of them."""
        fields = [cache.manifest["fingerprint"] for cache in self.logit_caches]
        return [str(found.get("teacher.spec")) for found in fields]

    def require_lists(self) -> None:
        """
        Raises:
            InputError: a setting of another number of values than teachers or terms.
        """
        if self.config.loss.kind != "none":
            self.config.loss.shares(max(1, len(self.logit_caches)))
        _ = self.terms

    def with_stored(self, batch: ViewBatch) -> ViewBatch:
        """The batch with stored logits and features, on the run's device."""
        logits = [self._stored(cache, batch) for cache in self.logit_caches]
        first, *others = logits or [None]
        features = tuple(cache.gather(batch, self.device) for cache in self.feature_caches)
        return dataclasses.replace(
            batch, teacher=first, more_teachers=tuple(others), features=features
        )

    def _stored(self, cache: LogitCache, batch: ViewBatch) -> Tensor | TopK:
        ids = batch.sample_ids, batch.view_ids
        if self.config.loss.kind == "hard" and isinstance(cache.codec, SampledCodec):
            return to_device(cache.codec.decisions(cache.gather_records(*ids)), self.device)
        return cache.gather(*ids, tau=self.config.loss.tau, device=self.device)

    # -- the network -----------------------------------------------------------------------------

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The network's logits, [B, C] or none, and its features, [B, T, D] of each target. On CUDA
        its stream starts when the images are ready; ``join`` comes before the result is read."""
        if self._stream is None:
            return self._outputs(images)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            return self._outputs(images)

    def _outputs(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        assert self.network is not None
        found = self.network.outputs(images)
        return () if found.logits is None else (found.logits,), found.features

    def join(self) -> None:
        """Make the current stream wait for ``forward``."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    # -- the network against what is stored ------------------------------------------------------

    def check(self, batch: ViewBatch, step: int) -> None:
        """At every `check_teacher_every`-th step, compare as `cache verify --teacher` does.

        Waits for the device. Skips a batch in which an unreadable image was replaced: the teacher
        may have seen the image itself.

        Raises:
            CacheError: logits or features differ by more than rounding and arithmetic explain.
        """
        every = self.config.check_teacher_every
        if self.network is None or not self.caches or every is None:
            return
        if step % every or batch.substituted:
            return
        found = self.network.outputs(ingest_batch(batch, self.config.view, torch.float32))
        for cache, stored in zip(self.logit_caches, batch.logits, strict=True):
            assert found.logits is not None
            errors, allowed = compare_logits(
                map_teacher(stored, Tensor.cpu),
                found.logits.cpu(),
                codec=cache.codec,
                tau=self.config.loss.tau,
                keys=cache.keys(batch.sample_ids, batch.view_ids),
                wrote_bf16=is_bf16(cache),
            )
            self._require_small(errors, allowed, cache, batch, step, "logits")
        for feature_cache, stored in zip(self.feature_caches, batch.features, strict=True):
            new = found.features[self.network.features.index(target_of(feature_cache.cache))]
            errors, allowed = feature_cache.compare(stored.cpu(), new.cpu(), has_bf16(self.device))
            cache = feature_cache.cache
            self._require_small(errors, allowed, cache, batch, step, feature_cache.given.target)

    def _require_small(
        self, errors: Tensor, allowed: Tensor, cache: LogitCache, batch: ViewBatch, step: int,
        what: str,
    ) -> None:  # fmt: skip
        self._largest = max(self._largest or 0.0, float(errors.max()))
        excess = errors - allowed
        row = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        if not excess[row] <= 0:
            compared = "log-probabilities" if what == "logits" else "relative to their length they"
            raise CacheError(
                f"cache {cache.where}: at step {step + 1} the teacher's {what} of view "
                f"{int(batch.view_ids[row])} of sample {int(batch.sample_ids[row])} are not those "
                f"of the cache: {compared} differ by {float(errors[row]):.3g}, "
                f"{float(allowed[row]):.3g} is allowed "
                f"(check_teacher_every={self.config.check_teacher_every})"
            )

    def differences(self) -> dict[str, float]:
        """For the log: the largest difference that ``check`` found since the last call."""
        largest, self._largest = self._largest, None
        return {} if largest is None else {"teacher_difference": largest}

    # -- the end ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any] | None:
        """Where logits and features came from, for result.json; of several caches the first one,
        of logits where there is one, with the others as `more`."""
        if not self.caches:
            found = self._fingerprints
            return {"from": "online", **found[0]} if found else None
        pairs = [*zip(self.caches, self._fingerprints, strict=True)]
        first, *others = [
            {"from": "cache", "codec": cache.manifest["codec"], **fingerprint}
            for cache, fingerprint in sorted(pairs, key=lambda pair: is_features(pair[0]))
        ]
        return first | ({"more": others} if others else {})

    def identity(self) -> dict[str, Any]:
        """Facts for the run's identity; those of a teacher are equal to those of its caches. With
        several teachers, or caches, a fact is a list."""
        facts: dict[str, Any] = {}
        models: dict[str, dict[str, Any]] = {}
        for found in self._fingerprints:
            names = ["spec", "weights_sha256", "mean", "std"]
            names += ["size"] if "teacher.size" in found else []
            model = {name: found.get(f"teacher.{name}") for name in names}
            if model["weights_sha256"] is None:
                continue
            known = models.setdefault(json.dumps(model), model)
            # Of logits; the teacher's features are the same with and without a selection.
            if self.config.loss.kind != "none" and "teacher.columns" in found:
                known["columns"] = found["teacher.columns"]
        if models:
            weights = [model.pop("weights_sha256") for model in models.values()]
            facts |= {"teacher.model": _one([*models.values()]), "teacher.weights": _one(weights)}
        if self.terms:
            facts[FEATURES] = [dict(term.given.fields) for term in self.terms]
        if self.caches:
            hashes = [manifest_sha256(cache.manifest).hex() for cache in self.caches]
            facts["cache.manifest"] = _one(hashes)
        return facts

    @functools.cached_property
    def _fingerprints(self) -> list[dict[str, Any]]:
        """The teachers', from the caches where there are any; of a network at the first call."""
        if not self.caches:
            return [] if self.network is None else [self.network.fingerprint()]
        stored = [cache.manifest["fingerprint"] for cache in self.caches]
        return [
            {key: fields[key] for key in fields if key.startswith(("teacher.", "target."))}
            for fields in stored
        ]

    def close(self) -> None:
        """End the threads that read ahead."""
        readers, self._read_ahead = self._read_ahead, []
        for reader in readers:
            reader.close()


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def open_teacher(config: RunConfig, source: Source, device: torch.device) -> RunTeacher:
    """Choose by the configuration: nothing to learn from, caches, ``teacher``, or both.

    Raises:
        InputError: distillation without teacher or cache; a teacher of another class count; a
            teacher beside caches of several.
        CacheMismatch: a cache is of another teacher, recipe, seed, data set or decoder; names
            each differing field.
        CacheError: a view is missing or damaged; the loader makes other pixels than the teacher
            saw.
    """
    require_teacher_settings(config)
    caches = open_caches(config)
    if not caches:
        wants_logits = config.loss.kind != "none"
        if config.teacher is None or not (wants_logits or config.feature_targets):
            return RunTeacher(config, device)
        network = load_run_teacher(config, source, device)
        compiled = resolve_compile(config, device) != "none"
        return RunTeacher(
            config, device, network=network.to_device(device, compiled, config.model.fused)
        )
    teacher = load_run_teacher(config, source, device, caches) if config.teacher else None
    expected = views_fingerprint(config, source)
    for cache in caches:
        cache.require(expected | ({} if teacher is None else expected_fields(teacher, cache)))
        _require_views(config, cache)
        require_same_pixels(
            pick_pixels(cache.path, cache.manifest, range(config.views_used), PIXEL_CHECKS),
            source,
            ViewPlan(config.view, source.num_samples),
            data=config.data,
            device=device,
            where=f"cache {cache.where}",
        )
    if teacher is None or config.check_teacher_every is None:
        return RunTeacher(config, device, caches=caches)
    # As in `precompute`: under `auto` neither compiled nor fused.
    network = teacher.to_device(device, config.compile not in ("auto", "none"))
    return RunTeacher(config, device, network=network, caches=caches)


def open_caches(config: RunConfig, paths: Sequence[str] | None = None) -> list[LogitCache]:
    """The caches that a run reads, in the order of its settings. Without distillation of logits
    their caches are left out.

    Args:
        paths: some of them, where others are not there yet; None: all.

    Raises:
        CacheError: as ``open_for_run``.
        InputError: distillation of logits, and every cache is one of features; a cache twice.
    """
    chosen = config.caches if paths is None else paths
    copy_bytes = config.data.copy_bytes
    caches = [open_for_run(path, config.loss.tau, copy_bytes) for path in chosen]
    known: dict[bytes, LogitCache] = {}
    for cache in caches:
        same = known.setdefault(manifest_sha256(cache.manifest), cache)
        if same is not cache:
            raise InputError(
                f"cache {cache.where} is {same.where} or a copy of it, which would count twice: "
                f"name it once"
            )
    logits = [cache for cache in caches if not is_features(cache)]
    if config.loss.kind == "none":
        return [cache for cache in caches if is_features(cache)]
    if caches and not logits and paths is None:
        raise InputError(
            f"loss.kind={config.loss.kind} needs logits, and {', '.join(config.caches)} holds "
            f"features: add the cache of the logits, or set --loss.kind none"
        )
    return caches


def load_run_teacher(
    config: RunConfig, source: Source, device: torch.device, caches: Sequence[LogitCache] = ()
) -> Teacher:
    """The teacher of a run, with the targets of its caches, or with those that it asks for.

    Raises:
        InputError: as ``load_class_matched_teacher``, or the caches are of several teachers.
    """
    _require_one_teacher(config, caches)
    targets: list[str | FeatureTarget] = [
        target_of(cache) if is_features(cache) else "logits" for cache in caches
    ]
    if not caches:
        learns_logits = config.loss.kind != "none"
        targets = [t for t in targets_of(config) if t != "logits" or learns_logits]
    distinct = list(dict.fromkeys(targets))
    return load_class_matched_teacher(config, source.classes, device, distinct)


def expected_fields(teacher: Teacher, cache: LogitCache) -> dict[str, object]:
    """The teacher's fingerprint as a cache of its logits or features must have it."""
    index = teacher.features.index(target_of(cache)) if is_features(cache) else None
    return teacher.expected_fields(cache.manifest["fingerprint"], index)


def _require_one_teacher(config: RunConfig, caches: Sequence[LogitCache]) -> None:
    """The caches beside ``teacher`` must be its own."""
    fields = [cache.manifest["fingerprint"] for cache in caches]
    weights = {found.get("teacher.weights_sha256") for found in fields}
    if len(weights) <= 1:
        return
    pairs = zip(caches, fields, strict=True)
    each = ", ".join(f"{cache.where} of {found.get('teacher.spec')}" for cache, found in pairs)
    others = "" if config.check_teacher_every is None else " and --check-teacher-every"
    raise InputError(
        f"teacher={config.teacher} is compared with each cache, and these are of "
        f"{len(weights)} teachers: {each}: leave --teacher{others} out"
    )


def _require_views(config: RunConfig, cache: LogitCache) -> None:
    missing = sorted(set(range(config.views_used)) - set(cache.views))
    if not missing:
        return
    # With several sizes num_views is the number of epochs.
    some = missing[0] // config.view.repeats * config.view.repeats
    fewer = f", or train with --num-views {some}"
    if not some or config.view.size_schedule:
        fewer = ""
    raise InputError(
        f"cache {cache.where} lacks {len(missing)} of the run's {config.views_used} views, "
        f"the first is {missing[0]}: precompute them{fewer}"
    )
