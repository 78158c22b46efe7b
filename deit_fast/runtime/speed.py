"""Speed of a run: FLOPs, rates, pauses of the garbage collector, a trace of some steps."""

from __future__ import annotations

import errno
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import torch
from timm.layers import PatchDropout
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.runtime.files import require_replaceable, write_atomically

log = logging.getLogger("deit_fast")
T = TypeVar("T")

WARM_UP = 5  # steps left out: compilation, allocation, the loader's first batches
_TABLE_ROWS = 60

PEAK_BF16 = {
    # Dense bfloat16 FLOP/s from NVIDIA's data sheets (the sparse figures are twice these).
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}

# ---------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------


def training_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs of one image's training step: three times those of the forward.

    Patches that training leaves out do not count.

    Args:
        model: not fused, and moved to the meta device by this function: pass a copy. A fused model
            does less work than its plain form; counted by the plain form, that raises its
            utilisation as it raises its speed.
        image_size: side of the images, pixels.
    """
    model.to("meta").eval()
    for module in model.modules():
        if isinstance(module, PatchDropout):
            module.train()
    return 3 * _count_flops(model, image_size)


def model_costs(model: nn.Module, image_size: int) -> dict[str, int]:
    """`parameters` (their count) and `forward_flops` of one image, a multiply-add as two FLOPs.

    torch's FlopCounterMode counts them: products of matrices, convolutions, attention. Models that
    cannot run on the meta device have no `forward_flops`.

    Args:
        model, image_size: as of ``training_flops``.
    """
    costs = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    with suppress(Exception):  # code of others, at the end of a long run
        costs["forward_flops"] = _count_flops(model.to("meta").eval(), image_size)
    return costs


def _count_flops(model: nn.Module, image_size: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of the GPU, FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


class Lap(NamedTuple):
    """The time of one step, seconds."""

    seconds: float
    waited: float  # of them, for data


class StepClock:
    """Times the steps of this process; time inside ``paused`` does not count."""

    def __init__(self) -> None:
        self._waited, self._since = 0.0, time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time until each one arrives counts as waiting for data."""
        asked = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time, such as an evaluation's, out of the laps."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def lap(self) -> Lap:
        """The time since the last call; call it after each step."""
        now = time.perf_counter()
        lap = Lap(now - self._since, self._waited)
        self._since, self._waited = now, 0.0
        return lap


class StepMeter:
    """Speed of a run's steps since the last reading.

    Attributes:
        utilisation: model FLOPs utilisation at one image a second over all ranks, which depends on
            the size of the images; None: unknown.
    """

    utilisation: float | None = None

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.steps, self._images = 0, 0
        self._seconds, self._waited = 0.0, 0.0

    def count(self, images: int) -> None:
        """Record a step and its number of images over all ranks."""
        self.steps += 1
        self._images += images

    def add(self, lap: Lap) -> None:
        """Record the time of a step."""
        self._seconds += lap.seconds
        self._waited += lap.waited

    def read(self, images_left: int, others: dict[str, float]) -> dict[str, float]:
        """The speed of the laps since the last reading, as columns of a row.

        ``mfu`` is absent on an unknown GPU, ``peak_memory_bytes`` on a CPU.

        Args:
            images_left: of the run, over all ranks.
            others: more columns. They and ``data_wait`` are the maximum over the ranks, so all
                ranks must call this together, with the same names.
        """
        seconds, waited, steps = self._seconds, self._waited, self.steps
        rate = self._images / seconds
        self.steps, self._images, self._seconds, self._waited = 0, 0, 0.0, 0.0
        largest = {"data_wait": waited / seconds, **others}
        values = torch.tensor([*largest.values()], dtype=torch.float64, device=self.device)
        self.group.maximum(values)
        speed = {
            "step_ms": 1e3 * seconds / steps,
            "images_per_s": rate,
            "images_per_s_per_process": rate / self.group.world_size,
            "seconds_left": images_left / rate,
        }
        if self.utilisation is not None:
            speed["mfu"] = rate * self.utilisation
        if self.device.type == "cuda":
            speed["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return speed | dict(zip(largest, values.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------
# Garbage collection: no rank makes the others wait for a collection
# ---------------------------------------------------------------------------------------------

_paused = 0  # open gc_paused blocks that turned automatic collection off


def _enable_in_child() -> None:
    # A loader process lives as long as the run, and nothing in it collects explicitly.
    if _paused:
        gc.enable()


os.register_at_fork(after_in_child=_enable_in_child)


@contextmanager
def gc_paused() -> Iterator[Callable[[], None]]:
    """Turn automatic garbage collection off inside the block; call ``gc.collect`` between steps.

    Yields a function that excludes every object alive now from later collections. It is called
    once at the start; call it again after the first step has compiled. A collection then takes
    1 ms instead of 290 ms, and leaves untouched the memory that forked loader processes share.
    Processes forked inside the block collect automatically.
    """
    global _paused
    was_enabled = gc.isenabled()
    may_freeze = gc.get_freeze_count() == 0  # gc.unfreeze would release objects of other owners

    def freeze() -> None:
        gc.collect()
        if may_freeze:
            gc.freeze()

    gc.disable()
    _paused += was_enabled
    freeze()
    try:
        yield freeze
    finally:
        _paused -= was_enabled
        if may_freeze:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


# ---------------------------------------------------------------------------------------------
# Trace
# ---------------------------------------------------------------------------------------------


class StepProfiler:
    """torch.profiler over ``steps`` steps after the warm-up: trace.json (Chrome's format) and
    table.txt.

    Call it after each step. A shorter run is profiled to its end, one of at most ``WARM_UP`` steps
    not at all.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device) -> None:
        self.steps, self.folder, self.device = steps, folder, device
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        if self.steps == 0:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()
        return self

    def __call__(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def _write(self, finished: profile) -> None:
        """Called by torch after the last profiled step.

        Raises:
            OSError: names the file, whose old content stays.
        """
        self._profile = None
        key = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        table = finished.key_averages().table(sort_by=key, row_limit=_TABLE_ROWS)
        write_atomically(self.folder / "table.txt", f"{table}\n".encode())
        target = self.folder / "trace.json"
        require_replaceable(target)
        with TemporaryDirectory(prefix=".tmp-", dir=self.folder) as folder:
            trace = Path(folder) / target.name
            finished.export_chrome_trace(str(trace))
            if not trace.exists():  # torch tells its own log alone
                raise OSError(errno.EIO, "torch could not write it, is the disk full?", str(target))
            trace.replace(target)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profile is None:
            return
        if kind is not None:  # an error of the profiler must not hide the one that ended the run
            self._profile.on_trace_ready = None
            with suppress(Exception):
                self._profile.stop()
            return
        self._profile.stop()
        if self._profile is not None:
            log.warning("profile_steps: fewer than %d steps, nothing was profiled", WARM_UP + 1)
