"""A step that cannot become a CUDA graph: what it says, and that the process can continue."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deit_fast.errors import InputError
from deit_fast.models import Teacher
from deit_fast.training.step_graph import WARM_UP, Part, StepGraph
from helpers.runs import run_config
from helpers.step_watch import steps_of


class FailedCapture:
    """In place of torch.cuda.graph: an operation has made the capture invalid, so its end raises
    and leaves all that its beginning has changed."""

    def __init__(self, graph: object, **_: object) -> None:
        pass

    def __enter__(self) -> None:
        self.changed.append("begun")

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    changed: list[Any] = []  # noqa: RUF012


class FakeGenerator:
    def __init__(self, device: torch.device) -> None:
        self.device, self.state = device, torch.tensor([1])

    def get_state(self) -> torch.Tensor:
        return self.state

    def set_state(self, state: torch.Tensor) -> None:
        self.state = state

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        FailedCapture.changed.append(("generator", other.state.tolist()))


@pytest.mark.parametrize("ended", [False, True], ids=["torch-2.11", "ended"])
@pytest.mark.parametrize("memory", [False, True], ids=["refused", "out-of-memory"])
def test_a_failed_capture_leaves_the_process_as_it_was(monkeypatch, memory, ended):
    monkeypatch.setattr(FailedCapture, "changed", [])
    changed = FailedCapture.changed
    stream = SimpleNamespace(device_index=0)
    default = FakeGenerator(torch.device("cuda", 0))
    default.state = torch.tensor([7])
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    for name, value in {
        "graph": FailedCapture,
        "CUDAGraph": lambda: SimpleNamespace(reset=lambda: changed.append("reset")),
        "current_stream": lambda device: stream,
        "set_stream": lambda stream: changed.append(stream),
        "default_generators": (default,),
        "graph_pool_handle": lambda: (0, 5),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def end(device: int, pool: tuple[int, int]) -> None:
        changed.append((device, pool))
        if ended:
            raise RuntimeError("not recording")

    def release(device: int, pool: tuple[int, int]) -> None:
        changed.append("released")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def work(parts: list[Part]) -> Any:
        raise torch.OutOfMemoryError("no 2 GiB") if memory else RuntimeError("it waits")

    graph = object.__new__(StepGraph)
    graph.device, graph.work, graph._stream = default.device, work, None
    graph.rates = SimpleNamespace(in_use=contextlib.nullcontext)
    expected = (
        pytest.raises(torch.OutOfMemoryError, match="no 2 GiB")
        if memory
        else pytest.raises(InputError, match=r"cannot be captured.*--no-cuda-graphs")
    )
    try:
        raise torch.OutOfMemoryError("of an earlier, larger batch")
    except torch.OutOfMemoryError:  # is not the reason
        with expected:
            graph._capture(None)
    after = [] if ended else ["released"]
    assert changed == ["begun", stream, ("generator", [7]), "reset", (0, (0, 5)), *after]


class Asking(torch.nn.Module):
    """A teacher that waits for the device."""

    num_classes = 10

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :10] * float(images.sum())


@pytest.mark.gpu
def test_a_teacher_that_waits_is_named(world, tmp_path):
    config = run_config(world, tmp_path / "run", cuda_graphs=True, device="cuda")
    step, batches = steps_of(config, WARM_UP + 1, "cuda")
    step.teacher.network = Teacher(Asking(), "asking").to_device(torch.device("cuda"))
    with pytest.raises(InputError, match=r"the step cannot be captured .*--no-cuda-graphs"):
        for index, batch in enumerate(batches):
            step(batch, index, 1e-3)
    # The process can follow the advice.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device="cuda").isfinite().all()
    plain, _ = steps_of(config.replace(cuda_graphs=False), 1, "cuda")
    plain(batches[0], 0, 1e-3)
    assert plain.finite.poll(keep=0).is_finite
    del step, plain, batches
    gc.collect()
    torch.cuda.empty_cache()
    pools = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}
    assert pools <= {(0, 0)}  # none keeps its memory
