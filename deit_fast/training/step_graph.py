"""A training step as one CUDA graph: captured once, then replayed with a single launch.

The graph contains ingest, the online teacher, the student's forward, loss, backward, gradient
norms, the finite check, clipping and AdamW. Inputs that change from step to step reach it through
memory at fixed addresses, filled before the replay: the batch with what is stored of it
(``StaticPart``), the learning rate, the stop flag, the offset in the batch, and the generator's
seed, which CUDA graphs read at the replay. After the replay come the moving average, whose weight
is a number on the host, and the copy of the check's flags.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_fast.data.batch import ViewBatch
from deit_fast.errors import InputError, first_line
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.training.optim import skips_on_device

WARM_UP = 3  # steps before the capture: they compile, choose algorithms, allocate moments
_IMAGES_PER_VIEW = 2  # at most: its own and that of the sample mixed into it
_COPIED = ("plan", "labels", "partner_labels", "lam")


@dataclasses.dataclass
class Part:
    """What the device needs of a batch, or of one part of an accumulated batch."""

    batch: ViewBatch
    step: int  # position in the order
    offset: int  # position of the first sample in the whole batch


class StepOutput(NamedTuple):
    """Results of a step on the device; none of them has been read."""

    flags: Tensor  # of ``FiniteCheck.check``
    means: Tensor  # float32 [numbers], as ``TrainStep.numbers``
    norms: Tensor  # float32 [P], of the gradients
    total_norm: Tensor  # float32 []


Work = Callable[[list[Part]], StepOutput]


class StaticPart:
    """A part whose tensors have fixed addresses; each step fills them.

    The number M of images differs from batch to batch, and the memory has room for the largest M.
    The plan's rows index into it; images behind the last one are not read.
    """

    def __init__(self, like: Part) -> None:
        batch = like.batch
        capacity = max(len(batch.images), _IMAGES_PER_VIEW * len(batch))
        copies: dict[str, Any] = {name: getattr(batch, name).clone() for name in _COPIED}
        images = batch.images.new_zeros((capacity, *batch.images.shape[1:]))
        copies |= batch.map_stored(torch.clone)
        batch = dataclasses.replace(batch, images=images, substituted=[], **copies)
        self.part = dataclasses.replace(like, batch=batch)

    def fill(self, part: Part) -> bool:
        """Copy a part in. Returns False, without copying, if its shapes are different."""
        target, source = self.part.batch, part.batch
        count = len(source.images)
        pairs = [(getattr(target, name), getattr(source, name)) for name in _COPIED]
        ours, theirs = target.stored_tensors(), source.stored_tensors()
        if len(ours) != len(theirs) or count > len(target.images):
            return False
        pairs += [(target.images[:count], source.images), *zip(ours, theirs, strict=True)]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return False
        for a, b in pairs:
            a.copy_(b, non_blocking=True)
        # The ids stay on the host; the device does not read them.
        target.sample_ids, target.view_ids = source.sample_ids, source.view_ids
        self.part.step, self.part.offset = part.step, part.offset
        return True


class Rates:
    """Learning rates in device memory; filling one number sets those of all parameter groups.

    Inside ``in_use`` the optimiser reads them and can be captured. Outside, its groups hold plain
    numbers, so that checkpoints do not depend on the graph.
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
    """Runs the work of each step: directly in the first steps, then as a CUDA graph.

    A part of another shape than the first always runs directly.

    Args:
        optimizer: a fused AdamW; call ``reset`` when its state is replaced.
        device: CUDA.
        work: the step's work, of one part.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, work: Work) -> None:
        self.device, self.work = device, work
        self.rates = Rates(optimizer, device)
        self._stream = torch.cuda.Stream(device)
        self._static: StaticPart | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: StepOutput | None = None
        self._warm = 0

    def __call__(self, parts: list[Part], lr: float) -> StepOutput:
        """The work of a step whose generator has been seeded.

        Raises:
            InputError: part of the step cannot be captured, such as a teacher of the user's that
                waits for the device.
        """
        if self._static is None:
            self._static = StaticPart(parts[0])
        if len(parts) != 1 or not self._static.fill(parts[0]):
            return self.work(parts)
        self.rates.fill(lr)
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            return self._warm_up(self._static.part)
        if self._graph is None:
            self._capture(self._static.part)
        assert self._graph is not None and self._output is not None
        self._graph.replay()
        return StepOutput(*(value.clone() for value in self._output))

    def reset(self) -> None:
        """Drop the graph, which holds addresses of an optimiser state that was replaced."""
        self._graph = self._output = None
        self._warm = 0

    def _warm_up(self, part: Part) -> StepOutput:
        """One step on the capture's stream, as CUDA graphs require before a capture."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self.rates.in_use():
            output = self.work([part])
        current.wait_stream(self._stream)
        return output

    def _capture(self, part: Part) -> None:
        graph = torch.cuda.CUDAGraph()
        handled = sys.exc_info()[1]  # by the caller
        try:
            # The loader's threads allocate and copy at the same time; a capture of all threads of
            # the process would fail because of them.
            with (
                pool_of_a_capture(graph, self.device) as pool,
                torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
                self.rates.in_use(),
            ):
                output = self.work([part])
        except RuntimeError as error:
            if (cause := memory_error(error, handled)) is not None:
                raise cause from None
            raise InputError(
                f"cuda_graphs: the step cannot be captured ({first_line(error)}); "
                f"choose --no-cuda-graphs"
            ) from error
        self._graph, self._output = graph, output


@contextmanager
def pool_of_a_capture(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[Any]:
    """A new memory pool for one capture. After one that fails, the process continues as before.

    Where an operation has made the capture invalid, `torch.cuda.graph` ends without restoring the
    current stream, the generator and the allocator (`CUDAGraph::capture_end` raises first). In
    torch 2.11 the graph does not give back its pool then.
    """
    current = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[current.device_index]
    state, pool = generator.get_state(), torch.cuda.graph_pool_handle()
    try:
        yield pool
    except BaseException:
        torch.cuda.set_stream(current)
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        with suppress(RuntimeError):
            graph.reset()
        with suppress(RuntimeError):  # the first raises where the graph has done both
            torch._C._cuda_endAllocateToPool(current.device_index, pool)
            torch._C._cuda_releasePool(current.device_index, pool)
        raise


def memory_error(
    error: BaseException | None, handled: BaseException | None
) -> torch.OutOfMemoryError | None:
    """The lack of memory during which this error occurred: a capture that an error ends can raise
    another one.

    Args:
        handled: was being handled when the capture began, so it is not of the capture.
    """
    while error is not None and error is not handled:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        error = error.__context__
    return None


def require_capturable(
    device: torch.device, group: ProcessGroup, optimizer: torch.optim.Optimizer
) -> None:
    """Raise InputError, with the reason, if a run's step cannot be one CUDA graph."""
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
