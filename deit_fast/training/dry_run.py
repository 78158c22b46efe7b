"""`train --dry-run`: what a run has and needs, with a time measured on a few images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deit_fast.cache.reader import LogitCache
from deit_fast.cache.verify import info
from deit_fast.config import FeatureConfig, RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.fingerprint import identify, views_fingerprint
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import open_loader, open_source, require_trained_classes
from deit_fast.data.sources import Source
from deit_fast.errors import translate_errors
from deit_fast.inputs import may_exist
from deit_fast.runtime.distributed import ProcessGroup, choose_device, read_process_group
from deit_fast.runtime.pipeline_time import (
    Repeated,
    images_to_time,
    loading_processes,
    pipeline_seconds,
    processes_here,
    seconds_per_batch,
)
from deit_fast.training.batches import run_batches
from deit_fast.training.state import (
    TrainState,
    create_state,
    find_checkpoint,
    require_same_run,
    settle,
)
from deit_fast.training.step import TrainStep
from deit_fast.training.teacher import (
    RunTeacher,
    expected_fields,
    load_run_teacher,
    open_caches,
    open_teacher,
)
from deit_fast.views.plan import ViewPlan

SECONDS = 10.0  # that the timed steps may take, about
FEW = 2  # images of the first step, which sets up what later ones reuse


@dataclasses.dataclass(frozen=True)
class Measured:
    """Steps of a few images, without torch.compile.

    Attributes:
        images: of a timed step.
        loading, training, evaluating: seconds of an image, each alone: loading in one process;
            forward and backward; forward of an evaluation.
        whole: seconds of an image of the running loop, without the update of the weights.
        update: seconds of an update, whatever the number of images.
        saved: bytes that the forward keeps for the backward of an image.
        state: of the run.
    """

    images: int
    loading: float
    training: float
    evaluating: float
    whole: float
    update: float
    saved: float
    state: TrainState


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Check a run's inputs and estimate what it takes; writes nothing.

    Returns:
        `output`, `step` (of the newest checkpoint, 0 of a new run), `images`, `classes`,
        `held_out`, `teacher` (spec, or none), `caches` (of each `path`, `views`, `missing` view
        ids, `bytes`), `parameters`, `memory` (bytes of a process: weights, gradients, optimiser,
        averages and the images of a step, without loader processes), `batch_size`, `epochs`,
        `steps_per_epoch`, `steps`, `seconds` (of the steps that are left, evaluations included),
        `step_seconds`, `measured_images` (of a timed step), `loading_seconds` and
        `training_seconds` (of a step of this process, each alone).

    Raises:
        As ``train`` before its first step; a cache may be missing or incomplete.
    """
    device, group = choose_device(config.device), read_process_group()
    source = open_source(config.data, "train", config.view.image_size)
    held_out = open_source(config.data, "val", config.view.image_size)
    require_trained_classes(source, held_out)
    batches = run_batches(config, source.num_samples, group)
    checkpoint = find_checkpoint(config)
    config = settle(config, checkpoint, batches.steps)
    batches = run_batches(config, source.num_samples, group)
    batches.require_parts(config.accumulate)
    done = 0 if checkpoint is None else int(checkpoint.saved["step"])
    total = min(len(batches), config.max_steps or len(batches))

    caches, is_whole = _caches(config, source), all(map(may_exist, config.caches))
    known = config if is_whole else _for_some(config)
    # Each number of images would be compiled anew, within the time that is measured.
    teacher = _teacher(known.replace(compile="none", cuda_graphs=False), source, device, caches)
    teacher.require_lists()
    if checkpoint is not None:
        facts = identify(source, held_out) | (teacher.identity() if is_whole else {})
        require_same_run(checkpoint, config, facts, is_whole)
    config = known
    share = config.batch_size // group.world_size
    micro = share // config.accumulate
    steps = batches.steps
    left = (steps.samples(total) - steps.samples(min(done, total))) // group.world_size
    parts = f"batch_size={config.batch_size} in accumulate={config.accumulate} parts"
    with translate_errors(device, f"{parts}: a larger accumulate needs less"):
        found = _measure(config, source, teacher, device, micro, left, checkpoint is not None)
    teacher.close()

    first = min(steps.begun(min(done, total)), config.epochs - 1)
    training = found.whole * _size_share(config, range(first, config.epochs))
    evaluating = pipeline_seconds(
        found.loading,
        found.evaluating * (config.view.image_size / config.view.size_of(0)) ** 2,
        workers=loading_processes(config.data.workers),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        processes=processes_here(),
    )
    evaluations = -(-(steps.begun(total) - steps.begun(min(done, total))) // config.eval_every)
    averages = 1 if found.state.ema is None else 2
    seconds = left * training + (total - min(done, total)) * found.update
    seconds += evaluations * averages * held_out.num_samples / group.world_size * evaluating
    return {
        "output": config.output,
        "step": done,
        "images": source.num_samples,
        "classes": len(source.classes),
        "held_out": held_out.num_samples,
        "teacher": config.teacher if teacher.is_online or caches else None,
        "caches": caches,
        "parameters": sum(value.numel() for value in found.state.model.parameters()),
        "memory": _memory(found, teacher, micro, config),
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "steps_per_epoch": steps.phases[0].per_epoch,
        "steps": total,
        "seconds": seconds,
        "step_seconds": share * training + found.update,
        "measured_images": found.images,
        "loading_seconds": share * found.loading,
        "training_seconds": share * found.training + found.update,
        "device": device.type,
    }


def _caches(config: RunConfig, source: Source) -> list[dict[str, Any]]:
    """The state of the run's caches.

    Raises:
        CacheMismatch: one is of other images or views.
    """
    needed = range(config.views_used)
    found = [
        {"path": path, "views": 0, "missing": [*needed], "bytes": 0}
        for path in config.caches
        if not may_exist(path)
    ]
    for cache in _existing(config):
        cache.require(views_fingerprint(config, source))
        complete = {*cache.views}
        missing = [view for view in needed if view not in complete]
        size = info(cache.path)["bytes"]
        found.append(
            {"path": cache.where, "views": len(complete), "missing": missing, "bytes": size}
        )
    order = [*map(Path, config.caches)]
    return sorted(found, key=lambda state: order.index(Path(state["path"])))


def _existing(config: RunConfig) -> list[LogitCache]:
    """Those of the run's caches that exist."""
    paths = [path for path in config.caches if may_exist(path)]
    return open_caches(config, None if len(paths) == len(config.caches) else paths)


def _teacher(
    config: RunConfig, source: Source, device: torch.device, caches: list[dict[str, Any]]
) -> RunTeacher:
    """The run's teacher; where views are missing, it is only loaded and compared with the caches
    that exist."""
    if not any(cache["missing"] for cache in caches):
        return open_teacher(config, source, device)
    existing = _existing(config)
    if config.teacher is not None:
        teacher = load_run_teacher(config, source, device, existing)
        for cache in existing:
            cache.require(expected_fields(teacher, cache))
    return RunTeacher(config, device, caches=existing)


def _for_some(config: RunConfig) -> RunConfig:
    """Its settings where some caches are missing: what has a value for each cache has its default,
    as nobody knows which of them are of features."""
    features, default = config.features, FeatureConfig()
    names = ("weights", "losses", "normalise", "projectors")
    lists = {name: getattr(default, name) for name in names if len(getattr(features, name)) > 1}
    return config.replace(features=lists, loss={"teachers": None})


def _size_share(config: RunConfig, epochs: range) -> float:
    """Mean number of pixels of these epochs' views, relative to one of the first epoch."""
    first = config.view.size_of(0)
    return sum((config.view.size_of(epoch) / first) ** 2 for epoch in epochs) / len(epochs)


# ---------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------


def _measure(
    config: RunConfig, source: Source, teacher: RunTeacher, device: torch.device, micro: int,
    left: int, resumes: bool,
) -> Measured:  # fmt: skip
    """Steps on images of the first epoch, for half of the time that the run takes, but no longer
    than SECONDS. The weights that change are in memory only.

    Args:
        micro: images of a part of this process's step.
        left: images that this process has to train on.
        resumes: whether a checkpoint has the weights.
    """
    weights = config.model.weights
    if resumes or (weights is not None and weights.startswith("timm:")):
        weights = None  # the values do not matter, and timm would fetch them
    quick = config.replace(
        compile="none", cuda_graphs=False, accumulate=1, batch_schedule=(), profile_steps=0,
        check_teacher_every=None, model={"weights": weights},
    )  # fmt: skip
    state = create_state(quick, len(source.classes), device, source.classes, teacher.terms)
    steps = _Steps(quick, source, teacher, state, device)
    workers = loading_processes(config.data.workers)

    few = size = min(micro, FEW)
    steps.alone(few)  # sets up what later ones reuse
    if device.type == "cuda":
        few = size = micro
    else:
        found = steps.alone(few)
        rough = found.loading + found.training
        few = images_to_time(rough, workers=0, seconds=SECONDS / 2, most=micro)
        few = min(micro, _even(few))
    found = steps.alone(few)
    per_image = found.loading + found.training
    seconds = min(SECONDS, left * per_image / 2)
    if device.type == "cpu":
        size = images_to_time(per_image, workers=workers, seconds=seconds, most=micro)
        size = min(micro, _even(size))
    whole = seconds_per_batch(steps.run(size), workers=workers, seconds=seconds)
    whole = max(whole - found.update, 0.0) / size
    return dataclasses.replace(found, images=size, whole=whole)


def _even(count: int) -> int:
    """The even number below, at least FEW: some views are mixed in pairs."""
    return max(FEW, count // 2 * 2)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Training steps on images of the first epoch."""

    config: RunConfig
    source: Source
    teacher: RunTeacher
    state: TrainState
    device: torch.device

    def alone(self, images: int) -> Measured:
        """One step, its loading, update and evaluation timed one after the other."""
        step, batches = self._step(images), self._batches(images, workers=0)
        started = time.perf_counter()
        batch = next(batches)
        loading = time.perf_counter() - started
        kept: dict[int, int] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            training = self._seconds(lambda: step(batch, 0, self.config.optim.lr))
        update = self._seconds(lambda: _update(step))
        own = {value.untyped_storage().data_ptr() for value in self.state.model.parameters()}
        saved = sum(size for key, size in kept.items() if key not in own)
        pixels = ingest_batch(batch, self.config.view, torch.float32)
        evaluating = self._seconds(lambda: _forward(self.state.model, pixels))
        self.state.model.train()
        training = max(training - update, 0.0)
        return Measured(
            images=images,
            loading=loading / images,
            training=training / images,
            evaluating=evaluating / images,
            whole=0.0,
            update=update,
            saved=saved / images,
            state=self.state,
        )

    def run(self, images: int) -> Iterator[None]:
        """Steps with the run's loader, endless; gives None after each."""
        step = self._step(images)
        for batch in self._batches(images, self.config.data.workers):
            step(batch, 0, self.config.optim.lr)
            _wait(self.device)
            yield

    def _step(self, images: int) -> TrainStep:
        config, state = self.config.replace(batch_size=images), self.state
        return TrainStep(
            config, state.model, self.teacher, state.optimizer, state.ema, self.device,
            heads=state.heads,
        )  # fmt: skip

    def _batches(self, images: int, workers: int | None) -> Iterator[ViewBatch]:
        config = self.config.replace(batch_size=images)
        batches = run_batches(config, self.source.num_samples, ProcessGroup())
        first_epoch = [batches[n] for n in range(min(batches.steps.phases[0].per_epoch, 100))]
        plan = ViewPlan(config.view, self.source.num_samples)
        data = dataclasses.replace(config.data, workers=workers)
        loader = open_loader(
            data, self.source, plan, Repeated(first_epoch), device=self.device,
            attach=self._with_stored,
        )  # fmt: skip
        return iter(loader)

    def _with_stored(self, batch: ViewBatch) -> ViewBatch:
        """The batch with random logits and features in place of stored ones, if the run reads
        such."""
        if self.teacher.is_online:
            return batch
        count, reads_logits = len(batch), self.config.loss.kind != "none"
        number = max(1, len(self.teacher.logit_caches)) if reads_logits else 0
        logits = [torch.randn(count, len(self.source.classes)) for _ in range(number)]
        features = tuple(
            torch.randn(count, term.given.tokens, term.given.width) for term in self.teacher.terms
        )
        return dataclasses.replace(
            batch,
            teacher=next(iter(logits), None),
            more_teachers=tuple(logits[1:]),
            features=features,
        )

    def _seconds(self, work: Callable[[], object]) -> float:
        _wait(self.device)
        started = time.perf_counter()
        work()
        _wait(self.device)
        return time.perf_counter() - started


def _update(step: TrainStep) -> None:
    """The update of a step again, with the gradients that it left."""
    step.optimizer.step()
    if step.average is not None:
        step.average.update(0)


@torch.no_grad()
def _forward(model: nn.Module, images: torch.Tensor) -> None:
    model.eval()
    model(images)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(found: Measured, teacher: RunTeacher, micro: int, config: RunConfig) -> int:
    """Bytes: weights, gradients, optimiser, averages, teacher, and the images of a part."""
    state = found.state
    optimizer = sum(
        value.nbytes
        for values in state.optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    weights = sum(value.nbytes for value in state.model.parameters())
    average = 0 if state.ema is None else weights
    network = [] if teacher.network is None else teacher.network.parameters()
    view = 3 * config.view.image_size**2 * (1 + 4)  # uint8 and normalised
    largest = max(config.view.size_of(epoch) for epoch in range(config.epochs))
    saved = found.saved * (largest / config.view.size_of(0)) ** 2
    activations = (saved + view) * micro
    return int(2 * weights + average + optimizer + sum(v.nbytes for v in network) + activations)
