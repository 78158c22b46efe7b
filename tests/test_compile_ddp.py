"""Compiled models over two processes: gradients are exchanged during the backward."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

from deit_fast.config import LossConfig, RunConfig
from deit_fast.models import fuse
from deit_fast.models.fuse import KERNELS, set_batch_part
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.training.step import parallel

CPU = torch.device("cpu")
RANKS, SHARE, DEPTH = 2, 4, 3


def student() -> nn.Module:
    """5.4 MB of parameters, so that DDP makes a first bucket of 1 MB and a second one."""
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, depth=DEPTH, embed_dim=192, num_heads=3,
        num_classes=10, drop_path_rate=0.2,
    )  # fmt: skip
    model.set_distilled_training(True)
    return fuse(model.train(), kernels=KERNELS)


def gradients(forward: Any, model: nn.Module, rank: int, kind: str, parts: int) -> list:
    """Of one step in ``parts``. Without a teacher those of the second head are None or, as a
    compiled graph makes them, 0."""
    for parameter in model.parameters():
        parameter.grad = None
    images = torch.randn(RANKS, SHARE, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for part in range(parts):
        set_batch_part(model, SHARE * rank, RANKS * SHARE)
        torch.manual_seed(7 + part)
        exchanges = part == parts - 1
        with torch.enable_grad() if exchanges else forward.no_sync():
            heads = forward(images[rank])
            sum(z.square().sum() for z in (heads if kind == "hard" else heads[:1])).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


CASES = {
    # mode, whether torch splits a graph, loss.kind, whether an exchange begins early, graphs
    "model": ("model", True, "hard", True, 1),
    # With a head that may have no gradient DDP's first bucket holds most of so small a model.
    "model, one head": ("model", True, "none", False, 1),
    "model, not split": ("model", False, "hard", False, 1),
    "blocks": ("blocks", False, "hard", True, 4),
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {name: run_case(rank, *case[:3]) for name, case in CASES.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_case(rank: int, mode: str, splits: bool, kind: str) -> dict[str, Any]:
    """Whether gradients are those of the plain model, an exchange began early, and the graphs."""
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    order: list[str] = []

    def compile_backward(graph, _):
        def run(arguments):
            order.append("backward")
            return make_boxed_func(graph.forward)(arguments)

        run._boxed_call = True
        return run

    # The graphs of AOTAutograd as they are: a backward's gradients come out together, as compiled.
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
                           bw_compiler=compile_backward)  # fmt: skip
    compiling = mock.patch.object(torch, "compile", partial(torch.compile, backend=backend))
    config = RunConfig(compile=mode, loss=LossConfig(kind=kind))
    model = student()
    plain = copy.deepcopy(model)
    with compiling:
        wrapped = parallel(config, model, CPU, ProcessGroup(rank, RANKS, rank))
    assert isinstance(wrapped, DistributedDataParallel)
    torch._dynamo.config.optimize_ddp &= splits
    expected = parallel(config.replace(compile="none"), plain, CPU, ProcessGroup(rank, RANKS, rank))

    def exchange(_, bucket):  # DDP refuses annotations that are strings
        order.append(f"bucket {bucket.index()}")
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / RANKS)

    wrapped.register_comm_hook(None, exchange)
    is_equal = True
    for parts in (1, 1, 2):  # DDP settles on its buckets in the first step
        order.clear()
        found = gradients(wrapped, model, rank, kind, parts)
        is_equal &= all(map(torch.equal, found, gradients(expected, plain, rank, kind, parts)))
    last = len(order) - 1 - order[::-1].index("backward")
    return {
        "equal": is_equal,
        "early": order.index("bucket 0") < last,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - before,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    """By rank and case."""
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_exchanged_during_the_backward(found, name):
    """And are those of the model that is not compiled, to the last bit. Ranks and parts of a batch
    add no compilation.

    A graph that is not split exchanges nothing before all of it has run.
    """
    *_, early, graphs = CASES[name]
    for of_rank in found:
        assert of_rank[name] == {"equal": True, "early": early, "graphs": graphs}
