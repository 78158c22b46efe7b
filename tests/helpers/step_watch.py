"""The first steps of a run, and what they read back from the device."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.config import RunConfig
from deit_fast.data.open import open_loader, open_source
from deit_fast.training.state import create_state
from deit_fast.training.step import TrainStep
from deit_fast.training.teacher import open_teacher
from deit_fast.views.order import EpochOrder, TrainBatches
from deit_fast.views.plan import ViewPlan

READ_BACK = {
    "item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "unique",
    "masked_select", "__bool__", "__int__", "__float__", "__index__", "__array__",
}  # fmt: skip


def in_a_kernel() -> bool:
    """Whether a kernel's CPU path is at work; what it does on a GPU its own tests look at."""
    frame = sys._getframe(2)
    while frame is not None:
        if Path(frame.f_code.co_filename).parent.name == "kernels":
            return True
        frame = frame.f_back
    return False


class Python(TorchFunctionMode):
    """Notes what Python reads from tensors, but for those that live on the host anyway."""

    def __init__(self, on_host: set[int]) -> None:
        super().__init__()
        self.on_host, self.seen = on_host, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        known = name not in READ_BACK or args[0].data_ptr() in self.on_host
        if not known and not in_a_kernel():
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes operators whose result's value or size the host has to know, from C++ too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2") and (
            not in_a_kernel()
        ):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def steps_of(config: RunConfig, count: int, device: str) -> tuple[TrainStep, list]:
    """A step of the configuration as the loop builds it, and its first batches."""
    source = open_source(config.data, "train", config.view.image_size)
    chosen = torch.device(device)
    state = create_state(config, len(source.classes), chosen)
    teacher = open_teacher(config, source, chosen)
    step = TrainStep(config, state.model, teacher, state.optimizer, state.ema, chosen)
    plan = ViewPlan(config.view, source.num_samples)
    order = EpochOrder(config.view.seed, source.num_samples, config.view_count, config.view.repeats)
    batches = TrainBatches(order, config.batch_size, config.epochs)
    loader = open_loader(
        config.data, source, plan, batches, device=chosen, stop=count,
        attach=teacher.attach(batches, 0),
    )  # fmt: skip
    found = list(loader)
    teacher.close()
    return step, found
