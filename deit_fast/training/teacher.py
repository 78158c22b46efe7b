"""The teacher of a run: stored logits that come with each batch, or a network run in the step."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.cache import LogitCache, ReadAhead
from deit_fast.cache.codecs import SampledCodec
from deit_fast.cache.format import manifest_sha256
from deit_fast.cache.verify import compare_logits, open_for_run, pick_pixels, require_tau
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch, map_teacher
from deit_fast.data.fingerprint import require_same_pixels, views_fingerprint
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.sources import Source
from deit_fast.errors import CacheError, InputError
from deit_fast.inputs import require_teacher_settings
from deit_fast.kernels.distillation_loss import TopK
from deit_fast.models.teacher import Teacher, load_class_matched_teacher
from deit_fast.training.compiling import resolve_compile
from deit_fast.views.plan import ViewPlan

PIXEL_CHECKS = 32  # views made again before training on a cache: under a second


class RunTeacher:
    """A cache, a network, both (the network checks the cache), or neither.

    The loader attaches stored logits to each batch. Without a cache the step runs the network on
    the images that the student sees; on CUDA beside the student, on a stream of its own.

    Args:
        config: of the run.
        network: on ``device``.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        network: Teacher | None = None,
        cache: LogitCache | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.network, self.cache = network, cache
        self.is_online = network is not None and cache is None
        on_cuda = self.is_online and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._read_ahead: ReadAhead | None = None
        self._largest: float | None = None

    # -- stored logits ---------------------------------------------------------------------------

    def attach(self, batches: Sequence, start: int) -> Callable[[ViewBatch], ViewBatch] | None:
        """What a loader of ``batches`` calls with each batch from step ``start`` on, to add its
        stored logits; None without a cache."""
        self.close()
        if self.cache is None:
            return None
        cache, steps = self.cache, iter(range(start, len(batches)))

        def with_logits(batch: ViewBatch) -> ViewBatch:
            step = next(steps)
            if self._read_ahead is None:  # only now: the loader's processes have been forked
                self._read_ahead = cache.prefetch(batches, start=step)
            self._read_ahead.advance(step)
            return self.with_logits(batch)

        return with_logits

    def with_logits(self, batch: ViewBatch) -> ViewBatch:
        """The batch with the stored logits that this run reads; with none where it reads none."""
        stored = None if self.cache is None else self.stored(batch)
        return dataclasses.replace(batch, teacher=stored)

    @property
    def reads(self) -> float | None:
        """What this run reads of its cache: runs with equal values get equal batches."""
        return None if self.cache is None else self.config.loss.tau

    def of(self, config: RunConfig) -> RunTeacher:
        """The teacher of another run, with the same network and cache.

        Raises:
            CacheError: the cache records nothing for that run's temperature.
        """
        if config is self.config:
            return self
        require_teacher_settings(config)
        if config.loss.kind == "none":
            return RunTeacher(config, self.device)
        if self.cache is not None:
            require_tau(self.cache, config.loss.tau)
        other = copy.copy(self)
        other.config = config
        return other

    def stored(self, batch: ViewBatch) -> Tensor | TopK:
        """The cache's logits of a batch, on the run's device."""
        assert self.cache is not None
        ids, codec = (batch.sample_ids, batch.view_ids), self.cache.codec
        if self.config.loss.kind == "hard" and isinstance(codec, SampledCodec):
            return codec.decisions(self.cache.gather_records(*ids)).to(self.device)
        return self.cache.gather(*ids, tau=self.config.loss.tau, device=self.device)

    # -- the network -----------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits [B, C]. On CUDA its stream starts when the images are ready;
        ``join`` comes before the logits are read."""
        assert self.network is not None
        if self._stream is None:
            return self.network(images)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            return self.network(images)

    def join(self) -> None:
        """Make the current stream wait for ``forward``."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    # -- the network against the stored logits ---------------------------------------------------

    def check(self, batch: ViewBatch, step: int) -> None:
        """At every `check_teacher_every`-th step, compare as `cache verify --teacher` does.

        Waits for the device. Skips a batch in which an unreadable image was replaced: the teacher
        may have seen the image itself.

        Raises:
            CacheError: the logits differ by more than rounding and arithmetic explain.
        """
        every = self.config.check_teacher_every
        if self.network is None or self.cache is None or every is None:
            return
        if batch.teacher is None or step % every or batch.substituted:
            return
        errors, allowed = compare_logits(
            map_teacher(batch.teacher, Tensor.cpu),
            self.network(ingest_batch(batch, self.config.view, torch.float32)).cpu(),
            codec=self.cache.codec,
            tau=self.config.loss.tau,
            keys=self.cache.keys(batch.sample_ids, batch.view_ids),
        )
        self._largest = max(self._largest or 0.0, float(errors.max()))
        excess = errors - allowed
        row = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        if not excess[row] <= 0:
            raise CacheError(
                f"cache {self.cache.path}: at step {step + 1} the teacher's logits of view "
                f"{int(batch.view_ids[row])} of sample {int(batch.sample_ids[row])} are not those "
                f"of the cache: log-probabilities differ by {float(errors[row]):.3g}, "
                f"{float(allowed[row]):.3g} is allowed (check_teacher_every={every})"
            )

    def differences(self) -> dict[str, float]:
        """For the log: the largest difference that ``check`` found since the last call."""
        largest, self._largest = self._largest, None
        return {} if largest is None else {"teacher_difference": largest}

    # -- the end ---------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any] | None:
        """Where the logits came from, for result.json."""
        if self.cache is not None:
            codec = self.cache.manifest["codec"]
            return {"from": "cache", "codec": codec, **self._fingerprint}
        return {"from": "online", **self._fingerprint} if self._fingerprint else None

    def identity(self) -> dict[str, Any]:
        """Facts for the run's identity; those of a teacher are equal to those of its cache."""
        found = self._fingerprint
        optional = [name for name in ("columns", "size") if f"teacher.{name}" in found]
        names = ["spec", "mean", "std", *optional]
        facts: dict[str, Any] = {}
        if "teacher.weights_sha256" in found:
            facts["teacher.model"] = {name: found.get(f"teacher.{name}") for name in names}
            facts["teacher.weights"] = found["teacher.weights_sha256"]
        if self.cache is not None:
            facts["cache.manifest"] = manifest_sha256(self.cache.manifest).hex()
        return facts

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """The teacher's, from the cache where there is one; of a network at the first call."""
        if self.cache is not None:
            fields = self.cache.manifest["fingerprint"]
            return {key: fields[key] for key in fields if key.startswith("teacher.")}
        return {} if self.network is None else self.network.fingerprint()

    def close(self) -> None:
        """End the threads that read ahead."""
        read_ahead, self._read_ahead = self._read_ahead, None
        if read_ahead is not None:
            read_ahead.close()


def open_teacher(config: RunConfig, source: Source, device: torch.device) -> RunTeacher:
    """Choose by the configuration: no distillation, ``cache``, ``teacher``, or both.

    Raises:
        InputError: distillation without teacher or cache; a teacher of another class count.
        CacheMismatch: the cache is of another teacher, recipe, seed, data set or decoder; names
            each differing field.
        CacheError: a view is missing or damaged; the loader makes other pixels than the teacher
            saw.
    """
    require_teacher_settings(config)
    if config.loss.kind == "none":
        return RunTeacher(config, device)
    teacher = load_class_matched_teacher(config, source.classes, device) if config.teacher else None
    if config.cache is None:
        assert teacher is not None
        compiled = resolve_compile(config, device) != "none"
        network = teacher.to_device(device, compiled, config.model.fused)
        return RunTeacher(config, device, network=network)
    cache = open_for_run(config.cache, config.loss.tau)
    expected = views_fingerprint(config, source)
    stored = cache.manifest["fingerprint"]
    cache.require(expected | (teacher.expected_fields(stored) if teacher else {}))
    missing = sorted(set(range(config.views_used)) - set(cache.views))
    if missing:
        # With several sizes num_views is the number of epochs.
        some = missing[0] // config.view.repeats * config.view.repeats
        fewer = f", or train with --num-views {some}"
        if not some or config.view.size_schedule:
            fewer = ""
        raise InputError(
            f"cache {config.cache} lacks {len(missing)} of the run's {config.views_used} views, "
            f"the first is {missing[0]}: precompute them{fewer}"
        )
    require_same_pixels(
        pick_pixels(cache.path, cache.manifest, range(config.views_used), PIXEL_CHECKS),
        source,
        ViewPlan(config.view, source.num_samples),
        data=config.data,
        device=device,
        where=f"cache {config.cache}",
    )
    if teacher is None or config.check_teacher_every is None:
        return RunTeacher(config, device, cache=cache)
    # As in `precompute`: under `auto` neither compiled nor fused.
    network = teacher.to_device(device, config.compile not in ("auto", "none"))
    return RunTeacher(config, device, network=network, cache=cache)
