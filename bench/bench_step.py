"""One whole training step from uint8 pixels: cached and online teacher, beside timm's own task.

Ours is ``deit_fast.train.step.TrainStep`` with ingest, both heads' loss, backward, AdamW. The peer
is timm's TokenDistillationTask with the same student, teacher, pixels and optimiser settings; it is
given labels instead of mixed pairs, which saves it a little work. Weights are random: the figures
are times, and the cache holds the answers of the same random teacher.

"fed by": our step (no teacher) with a loader in its steady state, on photographs as bench_loader's,
beside the same step with a batch at hand: 1 - ratio is the share of the step that waits for data.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.task import TokenDistillationTask
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deit_fast.cache import LogitCache, LogitCacheWriter, build_manifest
from deit_fast.config import (
    CodecConfig,
    DataConfig,
    InputError,
    LossConfig,
    ModelConfig,
    RunConfig,
    ViewRecipe,
)
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewBatch, make_batch
from deit_fast.data.open import open_loader
from deit_fast.data.sources import Synthetic, open_source
from deit_fast.evaluate import build_model
from deit_fast.models import Teacher, create_student
from deit_fast.models.teachers import has_bf16
from deit_fast.pack import pack
from deit_fast.train.optim import create_optimizer
from deit_fast.train.speed import training_flops
from deit_fast.train.step import PHASES, TrainStep
from deit_fast.train.teaching import CachedTeacher, NoTeacher, OnlineTeacher, Teaching
from deit_fast.views import ViewPlan

from .bench_loader import Endless, write_photographs
from .common import Case

CLASSES = 1000
LEARNING_RATE = 1e-4


def settings(student: str, size: int, batch: int) -> RunConfig:
    return RunConfig(
        batch_size=batch,
        view=ViewRecipe(image_size=size),
        model=ModelConfig(name=student),
        loss=LossConfig(kind="soft", reduction="batchmean"),
    )


def write_cache(folder: str, config: RunConfig, batch: ViewBatch, logits: torch.Tensor) -> None:
    """A cache of view 0 that covers the batch's samples."""
    manifest = build_manifest(
        CodecConfig(block_records=len(batch)),
        num_classes=CLASSES,
        num_samples=len(batch),
        tau=config.loss.tau,
        fingerprint={},
    )
    with LogitCacheWriter(folder, manifest) as writer:
        writer.write(batch.sample_ids, 0, logits)


def ours(
    config: RunConfig, next_batch: Callable[[], ViewBatch], teaching: Teaching, device: torch.device
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = build_model(config, CLASSES).to(device).train()
    optimizer = create_optimizer(model, config.optim)
    step = TrainStep(config, model, teaching, optimizer, None, device)
    places = itertools.count()

    def once() -> None:
        step(next_batch(), next(places), LEARNING_RATE)
        step.guard.read()  # as the loop does after every step

    return once


def timms(
    config: RunConfig, batch: ViewBatch, teacher: nn.Module, device: torch.device
) -> Callable:
    torch.manual_seed(0)
    config = config.replace(model={"fused": False})
    model = build_model(config, CLASSES).to(device).train()
    optimizer = create_optimizer(model, config.optim)
    task = TokenDistillationTask(
        model,
        teacher,
        criterion=nn.CrossEntropyLoss(label_smoothing=config.loss.smoothing),
        distill_type="soft",
        task_loss_weight=0.5,
        device=device,
        verbose=False,
    )

    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def step() -> None:
        images = ingest_batch(batch, config.view, torch.float32)
        images = images.contiguous(memory_format=layout)  # as timm's --channels-last
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            loss = task(images, batch.labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()

    return step


def split(step: Callable[[], Any], device: torch.device, calls: int = 5) -> dict[str, float]:
    """Share of each phase in the time of a step, percent; "other" is what no phase holds.

    On a GPU the device's time, so that "other" is idling, zeroing and the guard.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        if cuda:
            torch.cuda.synchronize()
        whole = (time.perf_counter() - start) * 1e6
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    spent = phase_times(events, cuda)
    shares = {name: round(100 * used / whole, 1) for name, used in spent.items()}
    return shares | {"other": round(100 - sum(shares.values()), 1)}


def phase_times(events: Sequence[Any], cuda: bool) -> dict[str, float]:
    """Microseconds of each phase that there is; on CUDA those of the kernels launched in it.

    By the time of their launch, as backward launches them from a thread of autograd's own, and they
    do not count among what the phase itself calls.

    Args:
        events: of the host: name, time_range, kernels.
    """
    phases = [(name, event.time_range) for name in PHASES for event in events
              if event.name == f"step: {name}"]  # fmt: skip
    spent = dict.fromkeys((name for name, _ in phases), 0.0)
    if not cuda:
        for name, span in phases:
            spent[name] += span.elapsed_us()
        return spent
    for event in events:
        if not event.kernels:
            continue
        at = event.time_range.start
        for name, span in phases:
            if span.start <= at <= span.end:
                # not the phase's own span on the device, which holds them all
                spent[name] += sum(k.duration for k in event.kernels if k.name != f"step: {name}")
                break
    return spent


def fed_case(student: str, size: int, batch_size: int, device: str, loader: str) -> Case:
    """A loader in its steady state before the step, against the step with a batch at hand.

    What a loader has made beforehand is taken from it, not timed, before each of its calls. The
    data wait is what is missing to a ratio of 1.
    """
    place = torch.device(device)
    steps = 10 if device == "cuda" else 4
    workers = os.cpu_count() or 1
    passed: list[Iterator[ViewBatch]] = []

    def build() -> dict[str, Callable[[], Any] | str]:
        folder = tempfile.TemporaryDirectory()
        write_photographs(Path(folder.name), batch_size)
        data = DataConfig(root=folder.name, val="train", workers=workers)
        if loader == "packed":
            pack(data, f"{folder.name}/pack")
            data = dataclasses.replace(data, source="packed", root=f"{folder.name}/pack")
        else:
            data = dataclasses.replace(data, loader=loader)
        config = settings(student, size, batch_size).replace(loss={"kind": "none"})
        source = open_source(data, "train", size)
        plan = ViewPlan(config.view, 0, batch_size)
        ids = np.arange(batch_size)
        try:
            opened = open_loader(data, source, plan, Endless((ids, 0 * ids)), device=place)
        except InputError as error:  # no DALI
            return {"ours, fed": str(error)}
        passed[:] = [iter(opened)]
        first = next(passed[0])
        fed = ours(config, partial(next, passed[0]), NoTeacher(), place)
        at_hand = ours(config, lambda: first, NoTeacher(), place)

        def repeated(step: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                assert folder
                for _ in range(steps):
                    step()

            return run

        return {"ours, fed": repeated(fed), "batch at hand": repeated(at_hand)}

    def before(name: str) -> None:
        if name == "ours, fed":
            for _ in range(2 * workers + 2):
                next(passed[0])

    name = f"{short(student)} {size}px B={batch_size} fed by {loader}, {workers} workers"
    return Case(name, build, items=steps * batch_size, before=before)


def short(student: str) -> str:
    return student.removesuffix("_distilled_patch16_224")


def cases(device: str) -> list[Case]:
    place = torch.device(device)

    def case(student: str, teacher: str, size: int, batch_size: int) -> Case:
        steps: dict[str, Callable[[], Any]] = {}

        def build() -> dict[str, Callable[[], Any] | str]:
            config = settings(student, size, batch_size)
            source = Synthetic(batch_size, CLASSES, size, 0)
            plan = ViewPlan(config.view, 0, batch_size)
            ids = np.arange(batch_size)
            batch = make_batch(source, plan, ids, 0 * ids, on_error="fail").to(place)
            torch.manual_seed(1)
            network = timm.create_model(teacher, num_classes=CLASSES).to(place).eval()
            answering = Teacher(network, teacher).place(place)
            with tempfile.TemporaryDirectory() as folder:
                logits = answering(ingest_batch(batch, config.view, torch.float32))
                write_cache(str(Path(folder) / "cache"), config, batch, logits.float())
                cache = LogitCache.open(Path(folder) / "cache")
                stored = CachedTeacher(cache, place, tau=1.0, tail="bucket")
                stored(batch, logits)  # the file stays mapped after its name is gone
            stored.follow(Endless((batch.sample_ids.numpy(), batch.view_ids.numpy())))

            def at_hand() -> ViewBatch:
                return batch

            plain = config.replace(loss={"kind": "none"})
            online = OnlineTeacher(answering, place)
            steps.update({
                "ours, cached top-16": ours(config, at_hand, stored, place),
                "ours, online teacher": ours(config, at_hand, online, place),
                "ours, no teacher": ours(plain, at_hand, NoTeacher(), place),
            })  # fmt: skip
            return steps | {"timm, online teacher": timms(config, batch, network, place)}

        def facts() -> dict[str, dict[str, Any]]:
            """FLOPs of an image, and where the time of our steps goes."""
            student_flops = training_flops(create_student(student, CLASSES, img_size=size), size)
            teacher_flops = (
                training_flops(timm.create_model(teacher, num_classes=CLASSES), size) // 3
            )
            found: dict[str, dict[str, Any]] = {}
            for name, step in steps.items():
                flops = student_flops + ("online" in name) * teacher_flops
                found[name] = {"flops_per_item": flops, "phases_pct": split(step, place)}
            found["timm, online teacher"] = {"flops_per_item": student_flops + teacher_flops}
            return found

        name = f"{short(student)} {teacher} {size}px B={batch_size}"
        return Case(name, build, items=batch_size, facts=facts)

    tiny, small, base = (f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base"))
    if device == "cpu":
        return [case(tiny, "regnety_016", 96, 16), fed_case(tiny, 96, 16, device, "packed")]
    return [
        case(small, "regnety_160", 224, 256),
        case(tiny, "regnety_160", 224, 256),
        case(base, "regnety_160", 224, 256),
        *(
            fed_case(student, 224, 256, device, loader)
            for student in (small, tiny)
            for loader in ("packed", "dali-triton", "pillow")
        ),
    ]
