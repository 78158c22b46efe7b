"""A run seen from inside: the profile of some steps, the history of a GPU's memory."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.runtime.distributed import ProcessGroup

log = logging.getLogger("deit_fast")

WARM_UP = 5  # steps before those that count: compilation, allocation, the loader's first batches
_TABLE_ROWS = 60
_ALLOCATIONS = 200_000  # newest events of the memory's history, about 100 MB of host memory


class StepProfiler:
    """torch.profiler over ``steps`` steady steps: trace.json (Chrome's format) and table.txt.

    Of a run that ends before, as many steps as there were; of one that ends before its sixth,
    nothing. Call it after each step.
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

    def _write(self, profiled: profile) -> None:
        """Called by torch when the last of the steps is done."""
        self._profile = None
        key = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        table = profiled.key_averages().table(sort_by=key, row_limit=_TABLE_ROWS)
        (self.folder / "table.txt").write_text(table + "\n")
        profiled.export_chrome_trace(str(self.folder / "trace.json"))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        profiled = self._profile
        if profiled is None:
            return
        if kind is not None:  # what ended the run matters more
            profiled.on_trace_ready = None
            with suppress(Exception):
                profiled.stop()
            return
        profiled.stop()
        if self._profile is not None:
            log.warning("profile_steps: fewer than %d steps, nothing was profiled", WARM_UP + 1)


class MemoryHistory:
    """Records a GPU's allocations inside the block and dumps them when it ends.

    Also when an error of torch ends it, such as too little memory; not where a signal does, which
    leaves no time.

    https://pytorch.org/memory_viz shows the file.

    Raises:
        InputError: at once, on a CPU.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if device.type != "cuda":
            raise InputError(
                f"memory_snapshot records the allocations of a GPU, and device is {device.type}"
            )
        self.path = path

    def __enter__(self) -> MemoryHistory:
        torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, (RuntimeError, MemoryError)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self.path))
        torch.cuda.memory._record_memory_history(enabled=None)


def memory_history(
    config: RunConfig, output: Path, device: torch.device, group: ProcessGroup
) -> AbstractContextManager[object]:
    """What the configuration wants of this process's allocations; each rank has its file.

    Raises:
        InputError: it wants them on a CPU.
    """
    if not config.memory_snapshot:
        return nullcontext()
    name = "memory.pickle" if group.is_first else f"memory-{group.rank}.pickle"
    return MemoryHistory(output / name, device)
