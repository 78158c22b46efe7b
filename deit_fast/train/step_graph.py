"""A training step as one CUDA graph: captured once, then replayed with a single launch.

Ingest, the online teacher, the student's forward, loss, backward, gradient norms, the guard's
judgement, clipping and AdamW are in the graph. What changes from step to step reaches it through
memory at fixed addresses, which is filled before the replay: the batch with its stored logits
(``StaticPart``), the learning rate, the stop flag, the position in the batch. The seed is the
generator's, which CUDA graphs read at the replay. Behind the replay come the moving average, whose
weight is a number of the host, and the copy of the guard's flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from deit_fast.data.batch import ViewBatch, map_teacher, teacher_tensors
from deit_fast.errors import InputError, first_line
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.train.optim import skips_on_device

WARM_UP = 3  # real steps before the capture: they compile, choose algorithms, make moments
_HALVES = 2  # images of a view at most: its own and its partner's


@dataclasses.dataclass
class Part:
    """What the device needs of a batch, or of one part of an accumulated batch."""

    batch: ViewBatch
    step: int  # position in the order
    offset: int  # position of the first sample in the whole batch


class Outcome(NamedTuple):
    """What a step leaves on the device: nothing of it has been read."""

    flags: Tensor  # of ``Guard.judge``
    means: Tensor  # float32 [3], as ``step.NUMBERS``
    norms: Tensor  # float32 [P], of the gradients
    total_norm: Tensor  # float32 []


Work = Callable[[list[Part]], Outcome]


class StaticPart:
    """A part whose tensors have fixed addresses; each step fills them.

    The number M of images differs from batch to batch. The memory has room for the largest M. The
    plan's rows point into it, and images behind the last one are not read.
    """

    def __init__(self, like: Part) -> None:
        batch = like.batch
        most = max(len(batch.images), _HALVES * len(batch))
        moved = {name: getattr(batch, name).clone() for name in _COPIED}
        images = batch.images.new_zeros((most, *batch.images.shape[1:]))
        teacher = None if batch.teacher is None else map_teacher(batch.teacher, torch.clone)
        batch = dataclasses.replace(
            batch, images=images, teacher=teacher, substituted=[], **moved
        )  # fmt: skip
        self.part = dataclasses.replace(like, batch=batch)

    def fill(self, part: Part) -> bool:
        """Copy a part in; False, and nothing is copied, where it is of another shape."""
        mine, batch = self.part.batch, part.batch
        count = len(batch.images)
        pairs = [(getattr(mine, name), getattr(batch, name)) for name in _COPIED]
        own, given = teacher_tensors(mine.teacher), teacher_tensors(batch.teacher)
        if len(own) != len(given) or count > len(mine.images):
            return False
        pairs += [(mine.images[:count], batch.images), *zip(own, given, strict=True)]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return False
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        # The ids stay on the host and are not part of the work.
        mine.sample_ids, mine.view_ids = batch.sample_ids, batch.view_ids
        self.part.step, self.part.offset = part.step, part.offset
        return True


_COPIED = ("plan", "labels", "partner_labels", "lam")


class Rates:
    """Learning rates as device memory: one number fills those of all parameter groups.

    Inside ``in_use`` the optimiser takes them and may be captured; outside its groups hold plain
    numbers, so that a checkpoint is the same with and without a graph.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self._rate = torch.zeros((), device=device)
        shares = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self._shares = torch.tensor(shares, dtype=torch.float32, device=device)

    def fill(self, lr: float) -> None:
        self._rate.fill_(lr)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
        try:
            for group, rate in zip(groups, (self._rate * self._shares).unbind(), strict=True):
                group |= {"lr": rate, "capturable": True}
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group |= values


class StepGraph:
    """Runs the work of each step: as it is in the first steps, then as a CUDA graph.

    A part of another shape than the first runs as it is too.

    Args:
        optimizer: a fused AdamW; its state must not be replaced without ``drop``.
        device: CUDA.
        work: the step's work, of one part.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, work: Work) -> None:
        self.device, self.work = device, work
        self.rates = Rates(optimizer, device)
        self._stream = torch.cuda.Stream(device)
        self._static: StaticPart | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outcome: Outcome | None = None
        self._warm = 0

    def __call__(self, parts: list[Part], lr: float) -> Outcome:
        """The work of a step whose generator has been seeded.

        Raises:
            InputError: something in the step cannot be captured, such as a teacher of the user's
                that waits for the device.
        """
        if self._static is None:
            self._static = StaticPart(parts[0])
        if len(parts) != 1 or not self._static.fill(parts[0]):
            return self.work(parts)
        self.rates.fill(lr)
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            return self._beside()
        if self._graph is None:
            self._capture()
        assert self._graph is not None and self._outcome is not None
        self._graph.replay()
        return Outcome(*(value.clone() for value in self._outcome))

    @property
    def is_captured(self) -> bool:
        """Whether the next step of the same shape is a replay."""
        return self._graph is not None

    def drop(self) -> None:
        """Forget the graph, which holds addresses of an optimiser state that was replaced."""
        self._graph = self._outcome = None
        self._warm = 0

    def _beside(self) -> Outcome:
        """One step on the stream of the capture, which CUDA graphs need as a warm-up."""
        assert self._static is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self.rates.in_use():
            outcome = self.work([self._static.part])
        current.wait_stream(self._stream)
        return outcome

    def _capture(self) -> None:
        assert self._static is not None
        graph = torch.cuda.CUDAGraph()
        try:
            # The threads of the loader allocate and copy at the same time. A capture that covers
            # all threads of the process would fail because of them.
            with (
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
                self.rates.in_use(),
            ):
                outcome = self.work([self._static.part])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = first_line(error)
            raise InputError(
                f"cuda_graphs: the step cannot be captured ({reason}); choose --no-cuda-graphs"
            ) from error
        self._graph, self._outcome = graph, outcome


def require_capturable(
    device: torch.device, group: ProcessGroup, optimizer: torch.optim.Optimizer
) -> None:
    """Raise InputError where a run's step cannot be one CUDA graph, with the reason."""
    if device.type != "cuda":
        raise InputError(f"cuda_graphs needs a CUDA device, and the run is on {device.type}")
    if group.world_size > 1:
        raise InputError(
            f"cuda_graphs with {group.world_size} processes: the exchange of gradients within a "
            f"graph is not tested; choose --no-cuda-graphs"
        )
    if not skips_on_device(optimizer):
        raise InputError(
            f"cuda_graphs needs torch's fused AdamW: {type(optimizer).__name__} asks the host "
            f"whether to update; choose --no-cuda-graphs"
        )
