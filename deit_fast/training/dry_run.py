"""`train --dry-run`: what a run has and needs, with a time measured on a few images."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch
from torch import nn

from deit_fast.cache.format import views_on_disk
from deit_fast.cache.verify import info, open_for_run
from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.fingerprint import identify, views_fingerprint
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import open_loader, open_source, require_trained_classes
from deit_fast.data.sources import Source
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.runtime.distributed import ProcessGroup, choose_device, read_process_group
from deit_fast.runtime.pipeline_time import (
    loading_processes,
    pipeline_seconds,
    processes_here,
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
from deit_fast.training.teacher import RunTeacher, open_teacher
from deit_fast.views.plan import ViewPlan

SECONDS = 8.0  # that the timed step may take, about
FEW = 2  # images of the first step, which sets up what later ones reuse


@dataclasses.dataclass(frozen=True)
class Measured:
    """One step of a few images in this process, without torch.compile.

    Attributes:
        images: of the step.
        loading, training, evaluating: seconds of these images: loading in one process; forward,
            backward and update; forward alone.
        saved: bytes that the forward keeps for the backward.
        state: of the run.
    """

    images: int
    loading: float
    training: float
    evaluating: float
    saved: int
    state: TrainState


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Check a run's inputs and estimate what it takes; writes nothing.

    Returns:
        `output`, `step` (of the newest checkpoint, 0 of a new run), `images`, `classes`,
        `held_out`, `teacher` (spec, or none), `cache` (None, or `path`, `views`, `missing` view
        ids, `bytes`), `parameters`, `memory` (bytes of a process: weights, gradients, optimiser,
        averages and the images of a step, without loader processes), `batch_size`, `epochs`,
        `steps_per_epoch`, `steps`, `seconds` (of the steps that are left, evaluations included),
        `step_seconds`, `measured_images`, `loading_seconds`, `training_seconds`.

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

    cache = _cache(config, source)
    teacher = _teacher(config, source, device, cache)
    if checkpoint is not None:
        require_same_run(checkpoint, config, identify(source, held_out) | teacher.identity())
    share = config.batch_size // group.world_size
    micro = share // config.accumulate
    found = _measure(config, source, teacher, device, micro, checkpoint is not None)
    teacher.close()

    per_image = 1 / found.images
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    workers = loading_processes(config.data.workers)
    options = {"workers": workers, "threads": threads, "processes": processes_here()}
    training, evaluating = (
        pipeline_seconds(found.loading * per_image, seconds * per_image, **options)
        for seconds in (found.training * _size_share(config), found.evaluating)
    )
    steps = batches.steps
    left = (steps.samples(total) - steps.samples(min(done, total))) / group.world_size
    evaluations = -(-(steps.begun(total) - steps.begun(min(done, total))) // config.eval_every)
    averages = 1 if found.state.ema is None else 2
    seconds = left * training
    seconds += evaluations * averages * held_out.num_samples / group.world_size * evaluating
    return {
        "output": config.output,
        "step": done,
        "images": source.num_samples,
        "classes": len(source.classes),
        "held_out": held_out.num_samples,
        "teacher": config.teacher if config.loss.kind != "none" else None,
        "cache": cache,
        "parameters": sum(value.numel() for value in found.state.model.parameters()),
        "memory": _memory(found, teacher, micro, config),
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "steps_per_epoch": steps.phases[0].per_epoch,
        "steps": total,
        "seconds": seconds,
        "step_seconds": share * training,
        "measured_images": found.images,
        "loading_seconds": found.loading,
        "training_seconds": found.training,
        "device": device.type,
    }


def _cache(config: RunConfig, source: Source) -> dict[str, Any] | None:
    """The state of the run's cache; None for a run that reads none.

    Raises:
        CacheMismatch: it is of other images or views.
    """
    if config.cache is None or config.loss.kind == "none":
        return None
    needed = range(config.views_used)
    if not os.path.exists(config.cache):
        return {"path": config.cache, "views": 0, "missing": [*needed], "bytes": 0}
    cache = open_for_run(config.cache, config.loss.tau)
    cache.require(views_fingerprint(config, source))
    complete = {*cache.views} if views_on_disk(cache.path) else set()
    missing = [view for view in needed if view not in complete]
    size = info(config.cache)["bytes"]
    return {"path": config.cache, "views": len(complete), "missing": missing, "bytes": size}


def _teacher(
    config: RunConfig, source: Source, device: torch.device, cache: dict[str, Any] | None
) -> RunTeacher:
    """The run's teacher; where views are missing, its network alone is loaded and checked."""
    if cache is None or not cache["missing"]:
        return open_teacher(config, source, device)
    if config.teacher is not None:
        teacher = load_class_matched_teacher(config, source.classes, device)
        if os.path.exists(cache["path"]):
            stored = open_for_run(cache["path"], config.loss.tau)
            stored.require(teacher.expected_fields(stored.manifest["fingerprint"]))
    return RunTeacher(config, device)


def _size_share(config: RunConfig) -> float:
    """Mean number of pixels of a view, relative to one at the last size."""
    sides = [config.view.size_of(epoch) for epoch in range(config.epochs)]
    return sum((side / config.view.image_size) ** 2 for side in sides) / len(sides)


# ---------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------


def _measure(
    config: RunConfig, source: Source, teacher: RunTeacher, device: torch.device, micro: int,
    resumes: bool,
) -> Measured:  # fmt: skip
    """Steps on the first images of the run; the weights that change are in memory only."""
    weights = config.model.weights
    if resumes or (weights is not None and weights.startswith("timm:")):
        weights = None  # the values do not matter, and timm would fetch them
    quick = config.replace(
        compile="none", cuda_graphs=False, accumulate=1, batch_schedule=(), profile_steps=0,
        check_teacher_every=None, model={"weights": weights},
    )  # fmt: skip
    classes = source.classes
    state = create_state(quick, len(classes), device, classes)
    few = min(micro, FEW)
    saved, _, seconds = _step(quick, source, teacher, state, device, few)
    _, loading, seconds = _step(quick, source, teacher, state, device, few)
    most = micro if device.type == "cuda" else int(SECONDS / max(seconds + loading, 1e-6) * few)
    images = max(few, min(micro, most) // 2 * 2)
    saved, loading, seconds = _step(quick, source, teacher, state, device, images)
    batch = next(iter(_loader(quick, source, device, images)))
    evaluating = _forward(state.model, ingest_batch(batch, quick.view, torch.float32), device)
    return Measured(images, loading, seconds, evaluating, saved, state)


def _loader(config: RunConfig, source: Source, device: torch.device, images: int) -> Any:
    config = config.replace(batch_size=images)
    batches = run_batches(config, source.num_samples, ProcessGroup())
    plan = ViewPlan(config.view, config.seed, source.num_samples)
    data = dataclasses.replace(config.data, workers=0)
    return open_loader(data, source, plan, batches, device=device, stop=1)


def _step(
    config: RunConfig, source: Source, teacher: RunTeacher, state: TrainState,
    device: torch.device, images: int,
) -> tuple[int, float, float]:  # fmt: skip
    """Bytes kept for the backward, seconds to load, seconds to train, of one step."""
    config = config.replace(batch_size=images)
    step = TrainStep(config, state.model, teacher, state.optimizer, state.ema, device)
    loader = iter(_loader(config, source, device, images))
    started = time.perf_counter()
    batch: ViewBatch = next(loader)
    loading = time.perf_counter() - started
    if config.loss.kind != "none" and not teacher.is_online:  # stands for stored logits
        batch = dataclasses.replace(
            batch, teacher=torch.randn(len(batch), len(source.classes), device=device)
        )
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    _wait(device)
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        step(batch, 0, config.optim.lr)
    _wait(device)
    seconds = time.perf_counter() - started
    own = {value.untyped_storage().data_ptr() for value in state.model.parameters()}
    return sum(size for key, size in kept.items() if key not in own), loading, seconds


@torch.no_grad()
def _forward(model: nn.Module, images: torch.Tensor, device: torch.device) -> float:
    model.eval()
    started = time.perf_counter()
    model(images)
    _wait(device)
    return time.perf_counter() - started


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
    activations = (found.saved / found.images + view) * micro
    return int(2 * weights + average + optimizer + sum(v.nbytes for v in network) + activations)
