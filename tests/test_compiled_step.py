"""The compiled step of a run: it never waits, and a process group changes no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from deit_fast.precomputation import precompute
from helpers.runs import run_config
from helpers.step_watch import steps_of

WARM_UP, STEPS = 3, 20

DEVICES = [
    pytest.param("cpu", "gloo", "none", id="gloo"),
    pytest.param("cuda", "nccl", "blocks", id="nccl", marks=pytest.mark.gpu),
]


@contextmanager
def alone_in_a_group(backend: str, store: Path) -> Iterator[None]:
    dist.init_process_group(backend, store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(("device", "backend", "compiled"), DEVICES)
def test_a_process_group_of_one_rank_changes_no_number(
    world,
    tmp_path,
    monkeypatch,
    device,
    backend,
    compiled,
):
    """Gradients pass through DDP's buckets and an all-reduce of the backend."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = run_config(world, tmp_path / "run", device=device, compile=compiled)

    def losses(wrapped: bool) -> list[torch.Tensor]:
        step, batches = steps_of(config, 6, device)
        if wrapped:
            ids = [0] if device == "cuda" else None
            step.forward = DistributedDataParallel(
                step.forward, device_ids=ids, gradient_as_bucket_view=True
            )
        return [step(batch, index, 1e-3)["loss"].cpu() for index, batch in enumerate(batches)]

    alone = losses(wrapped=False)
    with alone_in_a_group(backend, tmp_path / "store"):
        grouped = losses(wrapped=True)
    assert torch.equal(torch.stack(alone), torch.stack(grouped))
    assert len(set(map(float, alone))) == len(alone), "the model did not learn"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("online", "cached"))
def test_20_compiled_steps_do_not_wait_for_the_gpu(world, tmp_path, name):
    config = run_config(world, tmp_path / "run", device="cuda", compile="blocks", epochs=3)
    if name == "cached":
        config = config.replace(cache=str(tmp_path / "cache"))
        precompute(config)
    step, batches = steps_of(config, WARM_UP + STEPS, "cuda")
    for index in range(WARM_UP):  # compiles, allocates
        step(batches[index], index, 1e-3)
        step.finite.poll(keep=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(WARM_UP, WARM_UP + STEPS):
            step(batches[index], index, 1e-3)
            step.finite.poll(keep=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
