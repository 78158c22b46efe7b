"""The rows of metrics.jsonl and the line that a person reads, every ``log_every`` steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch

from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.open import DeviceLoader
from deit_fast.models import unfuse
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.runtime.metrics import MetricsFile
from deit_fast.runtime.profile import peak_flops, training_flops
from deit_fast.train.state import TrainState


class Window:
    """Means over the steps since the last line; the only place that reads numbers back.

    The sums belong to the state, so that a row which an interruption cut in two comes out whole.
    ``since`` moves on by what evaluation and saving take, so rates are those of training alone.
    """

    def __init__(
        self, config: RunConfig, state: TrainState, metrics: MetricsFile | None,
        group: ProcessGroup, device: torch.device, total: int,
    ) -> None:  # fmt: skip
        self.config, self.state, self.metrics = config, state, metrics
        self.group, self.device, self.total = group, device, total
        peak = peak_flops(device)
        self.utilisation_of_one = None if peak is None else (
            training_flops(unfuse(copy.deepcopy(state.model)), config.view.image_size)
            / (peak * group.world_size)
        )  # fmt: skip
        self._start()

    def _start(self) -> None:
        self.waited, self.steps, self.since = 0.0, 0, time.perf_counter()

    def timed(self, loader: DeviceLoader) -> Iterator[ViewBatch]:
        """The loader's batches; the time until each is there counts as waiting for data."""
        clock = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - clock
            yield batch
            clock = time.perf_counter()

    def add(self, numbers: dict[str, torch.Tensor]) -> None:
        """Count a step; its numbers stay on the device."""
        sums = self.state.sums
        for name, value in numbers.items():
            sums[name] = sums[name] + value if name in sums else value
        self.state.summed += 1
        self.steps += 1

    def report(self, epoch: int, lr: float, noticed: dict[str, float]) -> str:
        """Write a row, start anew, and return the text to show; all ranks must call it together.

        ``noticed``: more for the row, by the same names on all ranks; the largest counts.
        """
        state = self.state
        if self.steps == 0:  # all of them were left out
            return ""
        means = {name: (value / state.summed).item() for name, value in state.sums.items()}
        seconds = time.perf_counter() - self.since
        largest = {"data_wait": self.waited / seconds, **noticed}
        values = torch.tensor([*largest.values()], dtype=torch.float64, device=self.device)
        self.group.maximum(values)
        state.train_seconds += seconds
        speed = self._speed(seconds) | dict(zip(largest, values.tolist(), strict=True))
        if self.metrics is not None:
            row = {"step": state.step, "epoch": epoch, **means, "lr": lr, **speed}
            self.metrics.write("train", row)
        text = f"step {state.step}/{self.total}  {_line(means, lr, speed)}"
        state.sums, state.summed = {}, 0
        self._start()
        return text

    def _speed(self, seconds: float) -> dict[str, float]:
        """Since the last line: ``mfu`` is absent on an unknown GPU, memory on a CPU."""
        rate = self.steps * self.config.batch_size / seconds
        speed = {
            "step_ms": 1e3 * seconds / self.steps,
            "images_per_s": rate,
            "images_per_s_per_process": rate / self.group.world_size,
            "seconds_left": (self.total - self.state.step) * seconds / self.steps,
        }
        if self.utilisation_of_one is not None:
            speed["mfu"] = rate * self.utilisation_of_one
        if self.device.type == "cuda":
            speed["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return speed


def _line(means: dict[str, float], lr: float, speed: dict[str, float]) -> str:
    """What a person reads every ``log_every`` steps."""
    parts = [
        f"loss {means['loss']:.4f} (base {means['base_loss']:.4f}, "
        f"distillation {means['distill_loss']:.4f})",
        f"lr {lr:.2e}",
        f"gradient {means['grad_norm']:.3g}",
        f"{speed['step_ms']:.0f} ms",
        f"{speed['images_per_s']:.0f} img/s",
        f"data wait {100 * speed['data_wait']:.0f} %",
        f"MFU {100 * speed['mfu']:.0f} %" if "mfu" in speed else "MFU n/a",
    ]
    if "peak_memory_bytes" in speed:
        parts.append(f"{speed['peak_memory_bytes'] / 2**30:.1f} GiB")
    minutes, seconds = divmod(round(speed["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    return "  ".join([*parts, f"{hours}:{minutes:02}:{seconds:02} left"])
