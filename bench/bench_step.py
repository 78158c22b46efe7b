"""One whole training step from uint8 pixels, ours beside timm's own task.

Ours is ``deit_fast.training.step.TrainStep`` with ingest, both heads' loss, backward, AdamW. The
peer is timm's TokenDistillationTask with the same student, teacher, pixels and optimiser settings;
it is given labels instead of mixed pairs, which saves it a little work. Weights are random: the
figures are times, and the cache holds the logits of the same random teacher.

"student": the teacher's logits are in memory on both sides. "teacher": ours reads them from a cache
or runs the teacher; timm runs the teacher. On CUDA both sides are compiled, ours block by block as
``compile=auto`` does, timm's task by its own ``compile()``. A figure is the wall-clock time of 30
consecutive steps, so it includes launch overhead. cuDNN searches the fastest convolutions for
timm's side, as timm's training script has it. Ours leaves the choice to cuDNN's rules, as `train`
does: a search may choose differently in the next run, whose bits must be the same. ``device_ms`` is
the time in which at least one kernel ran, ``host_ms`` the time until the call of one step returns.

"fed by": our step (no teacher) with a loader in its steady state, on the photographs of
bench_loader, compared with the same step on a batch in memory. 1 - ratio is the share of the step
that waits for data.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
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
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deit_fast.cache import LogitCache, LogitCacheWriter, build_manifest
from deit_fast.config import CodecConfig, DataConfig, LossConfig, ModelConfig, RunConfig, ViewConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import make_batch
from deit_fast.data.open import open_loader, open_source
from deit_fast.data.sources import Synthetic
from deit_fast.errors import InputError
from deit_fast.models import Teacher, create_student
from deit_fast.models.fuse import KERNELS
from deit_fast.models.student import build_model
from deit_fast.runtime.distributed import has_bf16
from deit_fast.runtime.speed import training_flops
from deit_fast.tools.pack import pack
from deit_fast.training.compiling import CompileMode
from deit_fast.training.optim import create_optimizer
from deit_fast.training.step import PHASES, TrainStep
from deit_fast.training.teacher import RunTeacher
from deit_fast.views.plan import ViewPlan

from .bench_loader import Endless, write_photographs
from .common import Case, Lazy
from .record import Row
from .trace import busy_us, device_intervals

CLASSES = 1000
LEARNING_RATE = 1e-4
NARROW = "ours, bfloat16 stream"  # the residual stream, as an option
NARROW_MLP = "ours, bfloat16 stream, mlp_backward"  # another option beside it
STEPS_IN_A_ROW = 30  # of one timing on a GPU
TINY, SMALL, BASE = (f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base"))

Step = Callable[[], Any]


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


def settings(student: str, size: int, batch: int, compile_mode: CompileMode = "none") -> RunConfig:
    return RunConfig(
        batch_size=batch,
        view=ViewConfig(image_size=size),
        model=ModelConfig(name=student),
        loss=LossConfig(kind="soft", reduction="batchmean"),
        compile=compile_mode,
    )


class TeacherAtHand(nn.Module):
    """A teacher for timm's task that returns the same logits for every batch."""

    logits: Tensor

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits, persistent=False)
        self.num_classes = logits.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def ours(config: RunConfig, next_batch: Callable[[], ViewBatch], teacher: RunTeacher) -> Step:
    torch.manual_seed(0)
    model = build_model(config, CLASSES).to(teacher.device).train()
    optimizer = create_optimizer(model, config.optim)
    step = TrainStep(config, model, teacher, optimizer, None, teacher.device)
    positions = itertools.count()

    def once() -> None:
        step(next_batch(), next(positions), LEARNING_RATE)
        step.finite.poll()  # as the loop does after every step

    return once


def timms(
    config: RunConfig, batch: ViewBatch, teacher: nn.Module, device: torch.device, compiled: bool
) -> Step:
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
    # As timm's --channels-last, for the teacher too.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    task.to(memory_format=layout)
    if compiled:
        task.compile()

    def step() -> None:
        images = ingest_batch(batch, config.view, torch.float32)
        images = images.contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            loss = task(images, batch.labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return searched(step)


def searched(step: Step) -> Step:
    """The step with convolutions that cuDNN has searched; the search is in the first call."""

    def run() -> None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            step()

    return run


def synthetic_batch(config: RunConfig, device: torch.device) -> ViewBatch:
    """View 0 of random images, on the device."""
    batch_size = config.batch_size
    source = Synthetic(batch_size, CLASSES, config.view.image_size, 0)
    plan = ViewPlan(config.view, batch_size)
    ids = np.arange(batch_size)
    return make_batch(source, plan, ids, 0 * ids, on_error="fail").to(device)


def random_logits(batch_size: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(batch_size, CLASSES, generator=draw) * 3).to(device)


def student_steps(
    student: str, size: int, batch_size: int, device: torch.device
) -> dict[str, Step]:
    """Every way to run the step with the teacher's logits in memory, by name."""
    config = settings(student, size, batch_size)
    batch = synthetic_batch(config, device)
    logits = random_logits(batch_size, device)

    def our_step(**changes: Any) -> Lazy:
        changed = config.replace(**changes)

        def build() -> Step:
            with_logits = dataclasses.replace(batch, teacher=logits)
            return ours(changed, lambda: with_logits, RunTeacher(changed, device))

        return Lazy(build)

    def timm_step(compiled: bool) -> Lazy:
        return Lazy(lambda: timms(config, batch, TeacherAtHand(logits), device, compiled))

    if device.type != "cuda":  # Inductor needs minutes for a model on two cores
        return {"ours": our_step(), "timm, eager": timm_step(False)}
    return {
        "ours": our_step(compile="blocks"),
        "timm, compiled": timm_step(True),
        NARROW: our_step(compile="blocks", model={"residual": "bfloat16"}),
        NARROW_MLP: our_step(compile="blocks", model={"residual": "bfloat16", "kernels": KERNELS}),
        "ours, eager": our_step(),
        "timm, eager": timm_step(False),
        "ours, CUDA graphs": our_step(compile="blocks", cuda_graphs=True),
        "ours, compile=model": our_step(compile="model"),
    }


# ---------------------------------------------------------------------------------------------
# Where the time of a step goes
# ---------------------------------------------------------------------------------------------


def profiled(step: Step, device: torch.device, calls: int) -> tuple[profile, float]:
    """The profiler of some consecutive steps, and their wall-clock time in microseconds."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    with profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        if cuda:
            torch.cuda.synchronize()
        whole = (time.perf_counter() - start) * 1e6
    return profiler, whole


def step_facts(step: Step, device: torch.device, calls: int = 5) -> dict[str, Any]:
    """device_ms on a GPU, and the share of each phase of our own step."""
    facts: dict[str, Any] = {}
    profiler, whole = profiled(step, device, calls)
    events = list(profiler.events())
    if device.type == "cuda":
        facts["device_ms"] = busy_us(device_intervals(events)) / calls / 1e3
    if shares := split(events, whole, device.type == "cuda"):
        facts["phases_pct"] = shares
    return facts


def host_time(step: Step, device: torch.device) -> Row:
    """host_ms: time until the call of a step returns, on a GPU that is idle when it begins."""
    if device.type != "cuda":
        return {}
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return {"host_ms": statistics.median(times)}


def split(events: Sequence[Any], whole: float, cuda: bool) -> dict[str, float]:
    """Share of each phase in the time of our step, percent; "other" is outside all phases.

    On a GPU the device's time, so that "other" is idling, zeroing and the guard.
    """
    spent = phase_times([event for event in events if event.device_type == DeviceType.CPU], cuda)
    if not spent:
        return {}
    shares = {name: round(100 * used / whole, 1) for name, used in spent.items()}
    return shares | {"other": round(100 - sum(shares.values()), 1)}


def phase_times(events: Sequence[Any], cuda: bool) -> dict[str, float]:
    """Microseconds of each phase that occurs; on CUDA those of the kernels launched in it.

    A kernel belongs to the phase in which it is launched: the backward launches kernels from
    autograd's thread, so the profiler does not attribute them to the phase.

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


# ---------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------


def short(student: str) -> str:
    return student.removesuffix("_distilled_patch16_224")


def student_case(
    student: str, size: int, batch_size: int, device: torch.device, kind: str, names: Sequence[str]
) -> Case:
    """The step with logits in memory, run in the named ways."""
    steps: dict[str, Step] = {}

    def build() -> dict[str, Step | str]:
        found = student_steps(student, size, batch_size, device)
        steps.update({name: found[name] for name in names if name in found})
        return dict(steps)

    def facts(name: str) -> Row:
        flops = training_flops(create_student(student, CLASSES, img_size=size, fused=False), size)
        return {"flops_per_item": flops} | step_facts(steps[name], device)

    name = f"{short(student)} {kind} {size}px B={batch_size}"
    return step_case(name, build, steps, batch_size, device, facts)


def teacher_case(
    student: str, teacher: str, size: int, batch_size: int, device: torch.device
) -> Case:
    """The step with the teacher's network or with a cache of its logits."""
    steps: dict[str, Step] = {}
    cuda = device.type == "cuda"

    def build() -> dict[str, Step | str]:
        config = settings(student, size, batch_size, "blocks" if cuda else "none")
        batch = synthetic_batch(config, device)
        logits = random_logits(batch_size, device)

        def network() -> nn.Module:
            torch.manual_seed(1)
            made: nn.Module = timm.create_model(teacher, num_classes=CLASSES)
            return made.to(device).eval()

        def cached() -> Step:
            with tempfile.TemporaryDirectory() as folder:
                write_cache(str(Path(folder) / "cache"), config, batch, logits)
                cache = LogitCache.open(Path(folder) / "cache")
                stored = RunTeacher(config, device, caches=[cache])
                stored.with_stored(batch)  # the file stays mapped after its name is gone
            attach = stored.attach(Endless((batch.sample_ids.numpy(), batch.view_ids.numpy())), 0)
            assert attach is not None
            return ours(config, lambda: attach(batch), stored)

        def online() -> Step:
            loaded = Teacher(network(), teacher).to_device(device, compiled=cuda)
            return ours(config, lambda: batch, RunTeacher(config, device, network=loaded))

        steps["ours, cached top-16"] = Lazy(cached)
        steps["timm, online teacher"] = Lazy(
            lambda: timms(config, batch, network(), device, compiled=cuda)
        )
        steps["ours, online teacher"] = Lazy(online)
        if cuda:
            steps["ours, online teacher, cuDNN search"] = Lazy(lambda: searched(online()))
        return dict(steps)

    def facts(name: str) -> Row:
        """FLOPs of an image, and where the time of our steps goes."""
        flops = training_flops(create_student(student, CLASSES, img_size=size, fused=False), size)
        if "online" in name:
            flops += training_flops(timm.create_model(teacher, num_classes=CLASSES), size) // 3
        return {"flops_per_item": flops} | step_facts(steps[name], device)

    name = f"{short(student)} teacher {teacher} {size}px B={batch_size}"
    return step_case(name, build, steps, batch_size, device, facts)


def step_case(
    name: str, build: Callable[[], dict[str, Step | str]], steps: dict[str, Step],
    batch_size: int, device: torch.device, facts: Callable[[str], Row],
) -> Case:  # fmt: skip
    """A case whose implementations are whole steps, which ``build`` puts into ``steps``."""
    return Case(
        name, build, items=batch_size,
        repeats=STEPS_IN_A_ROW if device.type == "cuda" else 1,
        quick_facts=lambda name: host_time(steps[name], device), facts=facts,
    )  # fmt: skip


def write_cache(folder: str, config: RunConfig, batch: ViewBatch, logits: torch.Tensor) -> None:
    """A cache of view 0 that covers the batch's samples."""
    manifest = build_manifest(
        CodecConfig(), num_classes=CLASSES, num_samples=len(batch), tau=config.loss.tau,
        fingerprint={}, block_records=len(batch),
    )  # fmt: skip
    with LogitCacheWriter(folder, manifest) as writer:
        writer.write(batch.sample_ids, 0, logits)


def fed_case(student: str, size: int, batch_size: int, device: str, loader: str) -> Case:
    """The step with a loader in its steady state, compared with the step on a batch in memory.

    Before each timed call the batches that the loader has prefetched are taken from it. The data
    wait is 1 minus the ratio.
    """
    target = torch.device(device)
    steps = 10 if device == "cuda" else 4
    workers = os.cpu_count() or 1
    passed: list[Iterator[ViewBatch]] = []

    def build() -> dict[str, Callable[[], Any] | str]:
        folder = tempfile.TemporaryDirectory()
        write_photographs(Path(folder.name), batch_size)
        Path(folder.name, "val").symlink_to(Path(folder.name, "train"))
        data = DataConfig(root=folder.name, workers=workers)
        if loader == "packed":
            pack(data, f"{folder.name}/pack")
            data = dataclasses.replace(data, source="packed", root=f"{folder.name}/pack")
        else:
            chosen: Any = loader
            data = dataclasses.replace(data, loader=chosen)
        compiled: CompileMode = "blocks" if device == "cuda" else "none"
        config = settings(student, size, batch_size, compiled).replace(loss={"kind": "none"})
        source = open_source(data, "train", size)
        plan = ViewPlan(config.view, batch_size)
        ids = np.arange(batch_size)
        try:
            opened = open_loader(data, source, plan, Endless((ids, 0 * ids)), device=target)
        except InputError as error:  # no DALI
            return {"ours, fed": str(error)}
        passed[:] = [iter(opened)]
        first = next(passed[0])
        fed = ours(config, partial(next, passed[0]), RunTeacher(config, target))
        at_hand = ours(config, lambda: first, RunTeacher(config, target))

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


def cases(device: str) -> list[Case]:
    target = torch.device(device)
    if device == "cpu":
        return [
            student_case(TINY, 96, 16, target, "student", ("ours", "timm, eager")),
            teacher_case(TINY, "regnety_016", 96, 16, target),
            fed_case(TINY, 96, 16, device, "packed"),
        ]
    main = ("ours", "timm, compiled")
    graphs, eager = ("ours, CUDA graphs", "ours, compile=model"), ("ours, eager", "timm, eager")
    ways = (*main, NARROW, *graphs, NARROW_MLP, *eager)  # what no time is left for comes last
    return [
        student_case(SMALL, 224, 256, target, "student", main),
        student_case(TINY, 224, 256, target, "student", main),
        teacher_case(SMALL, "regnety_160", 224, 256, target),
        student_case(SMALL, 224, 256, target, "ways to run", ways),
        student_case(BASE, 224, 256, target, "student", main),
        student_case(TINY, 224, 256, target, "ways to run", ways),
        teacher_case(TINY, "regnety_160", 224, 256, target),
        *(
            fed_case(student, 224, 256, device, loader)
            for student in (SMALL, TINY)
            for loader in ("packed", "dali-cpu", "pillow")
        ),
    ]
