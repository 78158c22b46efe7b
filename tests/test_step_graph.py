"""The step as one CUDA graph: its work on any machine, the graph itself on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.config import OptimConfig, RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.errors import InputError
from deit_fast.kernels.ingest import PLAN_COLUMNS
from deit_fast.models import create_student, fuse, load_weights
from deit_fast.models.fuse import KERNELS, set_batch_part
from deit_fast.models.student import build_model
from deit_fast.precomputation import precompute
from deit_fast.recipes import digits_student
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.training.loop import train
from deit_fast.training.optim import create_optimizer
from deit_fast.training.step import TrainStep
from deit_fast.training.step_graph import (
    WARM_UP,
    Part,
    Rates,
    StaticPart,
    require_capturable,
)
from deit_fast.training.teacher import RunTeacher
from helpers.runs import TWO_BLOCKS, run_config
from helpers.step_watch import Operators, Python, steps_of

CPU = torch.device("cpu")
COLUMNS = [PLAN_COLUMNS.index(name) for name in ("image", "partner_image")]
RUNS: dict[str, dict[str, Any]] = {
    "online": {"loss": {"kind": "soft"}, "optim": {"clip_grad": 0.5, "ema_decay": 0.99}},
    "labels": {"loss": {"kind": "none"}, "teacher": None},
    "cached": {"cache": "cache", "loss": {"kind": "soft"}},
    "dense": {"cache": "cache", "codec": {"name": "dense-fp32"}},
    "not fused": {"model": {"fused": False, "drop_path": 0.3}},
}


@pytest.fixture(params=RUNS)
def config(world, tmp_path, request) -> RunConfig:
    config = run_config(world, tmp_path / "run", **RUNS[request.param])
    if config.cache is not None:
        config = config.replace(cache=str(tmp_path / "cache"))
        precompute(config)
    return config


def rate(index: int) -> float:
    """The same number in float32, which the graph has, and in float64. A difference of 3e-8 of the
    rate would grow where gradients are rounding errors: Adam makes steps of one size from them."""
    return 2.0**-10 * (1 + index)


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    """Weights, moving average and optimiser moments, by name."""
    found = {f"model.{name}": value for name, value in step.model.state_dict().items()}
    if step.average is not None:
        averages = step.average.ema.module.state_dict()
        found |= {f"average.{name}": value for name, value in averages.items()}
    for index, state in enumerate(step.optimizer.state_dict()["state"].values()):
        found |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return found


def require_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def require_close_states(left: TrainStep, right: TrainStep) -> None:
    mine = state_of(left)
    for name, value in state_of(right).items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5, msg=name)


def widened(batch: ViewBatch, more: int) -> ViewBatch:
    """The same views with unused images in front, so that M differs."""
    plan = batch.plan.clone()
    plan[:, COLUMNS] += more
    images = torch.cat([batch.images[:1].expand(more, -1, -1, -1), batch.images])
    return dataclasses.replace(batch, images=images, plan=plan)


# ---------------------------------------------------------------------------------------------
# On any machine
# ---------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records operators that a capture forbids: pinned host memory and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name in ("_pin_memory", "is_pinned", "record_stream") or kwargs.get("pin_memory"):
            self.seen.append(name)
        return function(*args, **kwargs)


def test_the_work_of_a_step_reads_and_pins_no_memory(config):
    step, batches = steps_of(config, 3, "cpu")
    for index, batch in enumerate(batches):
        parts = step.prepare(batch, index, rate(index), stop=False)
        with Python(set()) as python, Operators() as operators, Allocations() as allocations:
            outcome = step.work(parts)
        step.finish(index, outcome)
        if index > 0:  # the first makes the optimiser's state
            assert python.seen == [] and operators.seen == [] and allocations.seen == []
    assert step.finite.poll(keep=0).is_finite


def test_work_on_a_static_part_equals_work_on_the_part(config):
    """Bit for bit, with varying numbers of images: no step reads leftovers of the one before."""
    step, batches = steps_of(config, 4, "cpu")
    other, _ = steps_of(config, 4, "cpu")  # initial weights follow from the seed
    static, counts = None, set()
    for index, batch in enumerate(batches):
        given = widened(batch, more=index % 3)
        counts.add(len(given.images))
        expected = step(batch, index, rate(index))
        parts = other.prepare(given, index, rate(index), stop=False)
        static = static or StaticPart(parts[0])
        address = static.part.batch.images.data_ptr()
        assert static.fill(parts[0])
        parts[0].batch.images.zero_()  # is not read any more
        found = other.finish(index, other.work([static.part]))
        assert static.part.batch.images.data_ptr() == address
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(counts) > 1
    mine, theirs = state_of(other), state_of(step)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_the_work_does_not_wait_for_a_gpu(monkeypatch, optimizer):
    """The calls that a GPU gets, kernels, shadow weights and patch rows included, on tensors that
    have shapes and a CUDA device but no values: whatever reads one raises an error. The backward
    stays out: torch's engine wants a driver. LAMB does read, and is refused.
    """
    here = torch.device("cuda", 0)
    monkeypatch.setattr("deit_fast.kernels.launching._runs_kernels", lambda device: True)
    monkeypatch.setattr("deit_fast.training.step.has_bf16", lambda device: True)
    module = sys.modules["deit_fast.kernels.ingest"]
    for name in ("normalised_values", "normal_quantiles"):  # no cache may keep such tensors
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    config = digits_student().replace(
        batch_size=8, loss={"kind": "soft"}, optim={"clip_grad": 1.0, "name": optimizer},
        model={"args": (*TWO_BLOCKS, "embed_dim=64", "num_heads=1"), "fused": False},
    )  # fmt: skip
    model = fuse(build_model(config, 10).train(), kernels=KERNELS)

    def no_backward(loss: torch.Tensor) -> None:
        assert loss.requires_grad
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    with FakeTensorMode():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                fake = torch.nn.Parameter(torch.empty(value.shape, device=here))
                setattr(module, name, fake)
        teacher = RunTeacher(config, here)
        step = TrainStep(config, model, teacher, create_optimizer(model, config.optim), None, here)
        assert step.patch and step.shadows
        side = config.view.image_size
        ids = torch.empty(8, dtype=torch.int64, device=here)
        rows = torch.empty(8, len(PLAN_COLUMNS), dtype=torch.int32, device=here)
        images = torch.empty(9, side, side, 3, dtype=torch.uint8, device=here)
        logits = torch.empty(8, 10, device=here)
        lam = torch.empty(8, device=here)
        batch = ViewBatch(images, rows, ids, ids, ids, ids, lam, teacher=logits)
        part = Part(batch, 0, 0)
        set_batch_part(model, 0, 8)
        static = StaticPart(part)
        assert static.fill(part)
        if optimizer == "lamb":
            with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
                step.work([static.part])
            return
        for _ in range(2):  # the first makes the moments
            outcome = step.work([static.part])
        assert {value.device for value in outcome} == {here}
        assert step.optimizer.grad_scale.device == here


def test_a_static_part_refuses_other_shapes(config):
    step, batches = steps_of(config, 2, "cpu")
    (part,) = step.prepare(batches[0], 0, 1e-3, stop=False)
    static = StaticPart(part)
    before = copy.deepcopy(static.part.batch.plan)
    half = dataclasses.replace(part, batch=batches[1].part(0, 16))
    assert not static.fill(half)
    assert not static.fill(dataclasses.replace(part, batch=widened(batches[1], more=64)))
    if part.batch.teacher is not None:
        without = dataclasses.replace(part.batch, teacher=None)
        assert not static.fill(dataclasses.replace(part, batch=without))
    assert torch.equal(static.part.batch.plan, before)


def test_rates_are_numbers_again_after_the_capture():
    model = create_student("deit_tiny_distilled_patch16_224", 3, img_size=32, depth=2)
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5))
    rates = Rates(optimizer, CPU)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    rates.fill(0.8)
    with rates.in_use():
        for group in optimizer.param_groups:
            assert group["capturable"] and isinstance(group["lr"], torch.Tensor)
            assert float(group["lr"]) == pytest.approx(0.8 * group["lr_scale"])
    assert optimizer.state_dict()["param_groups"] == before


def test_rates_on_the_device_give_the_same_update():
    first, images = torch.nn.Linear(64, 64), torch.randn(8, 64)
    pair = []
    for model in (first, copy.deepcopy(first)):
        optimizer = create_optimizer(model, OptimConfig())
        pair.append((model, optimizer, Rates(optimizer, CPU)))
    before = first.weight.detach().clone()
    for index in range(5):
        for on_device, (model, optimizer, rates) in enumerate(pair):
            model.zero_grad()
            model(images).square().sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = rate(index)
            rates.fill(rate(index))
            if on_device:
                with rates.in_use():
                    optimizer.step()
            else:
                optimizer.step()
    numbers, tensors = (model.weight for model, *_ in pair)
    assert not torch.allclose(numbers, before, atol=1e-3)
    torch.testing.assert_close(tensors, numbers, rtol=1e-6, atol=1e-6)


def test_the_tolerances_of_replays_hold_with_rates_on_the_device(config, monkeypatch):
    """What a GPU compares, without the graph: bfloat16, which amplifies the least difference."""
    monkeypatch.setattr("deit_fast.training.step.has_bf16", lambda device: True)
    step, batches = steps_of(config, WARM_UP + 5, "cpu")
    other, _ = steps_of(config, WARM_UP + 5, "cpu")
    rates = Rates(other.optimizer, CPU)
    for index, batch in enumerate(batches):
        given = widened(batch, more=index % 3)
        expected = step(given, index, rate(index))
        parts = other.prepare(given, index, rate(index), stop=False)
        rates.fill(rate(index))
        with rates.in_use():
            output = other.work(parts)
        require_close(other.finish(index, output), expected)
    require_close_states(other, step)


@pytest.mark.parametrize(
    ("device", "world_", "name", "reason"),
    [
        ("cpu", ProcessGroup(), "adamw", "needs a CUDA device, and the run is on cpu"),
        ("cuda", ProcessGroup(0, 2), "adamw", "with 2 processes: the exchange of gradients"),
        ("cuda", ProcessGroup(), "lamb", "Lamb asks the host whether to update"),
    ],
)
def test_runs_that_cannot_be_captured_are_refused(device, world_, name, reason):
    optimizer = create_optimizer(torch.nn.Linear(2, 2), OptimConfig(name=name))
    with pytest.raises(InputError, match=f"cuda_graphs.*{reason}"):
        require_capturable(torch.device(device), world_, optimizer)


def test_a_run_on_a_cpu_refuses_the_graph(world, tmp_path):
    with pytest.raises(InputError, match="cuda_graphs needs a CUDA device"):
        train(run_config(world, tmp_path / "run", cuda_graphs=True))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch) -> None:
    """Settings under which two equal steps agree bit for bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def on_gpu(config: RunConfig, **changes: Any) -> RunConfig:
    return config.replace(device="cuda", **changes)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_replays_equal_the_steps(config, exact, compiled):
    """With varying seeds, rates and numbers of images, the state equals that without a graph."""
    count = WARM_UP + 5
    plain = on_gpu(config, compile=compiled)
    step, batches = steps_of(plain, count, "cuda")
    graphed, _ = steps_of(plain.replace(cuda_graphs=True), count, "cuda")
    for index, batch in enumerate(batches):
        given = widened(batch, more=index % 3)
        expected = step(given, index, rate(index))
        found = graphed(given, index, rate(index))
        require_close(found, expected)
        assert step.finite.poll(keep=0) == graphed.finite.poll(keep=0)
        assert (graphed.graph._graph is not None) == (index >= WARM_UP)
    require_close_states(graphed, step)


def poisoned(batch: ViewBatch) -> ViewBatch:
    return dataclasses.replace(batch, lam=torch.full_like(batch.lam, float("nan")))


@pytest.mark.gpu
def test_a_batch_that_is_not_finite_changes_no_weight(world, tmp_path):
    config = on_gpu(run_config(world, tmp_path / "run", cuda_graphs=True, optim={"ema_decay": 0}))
    step, batches = steps_of(config, WARM_UP + 3, "cuda")
    for index in range(WARM_UP + 1):
        step(batches[index], index, 1e-3)
        assert step.finite.poll(keep=0).is_finite
    before = {name: value.clone() for name, value in state_of(step).items()}
    step(poisoned(batches[WARM_UP + 1]), WARM_UP + 1, 1e-3)
    verdict = step.finite.poll(keep=0)
    assert not verdict.is_finite
    assert "the loss of rank 0 is not finite" in step.finite.describe(verdict)
    assert all(torch.equal(value, before[name]) for name, value in state_of(step).items())
    step(batches[WARM_UP + 2], WARM_UP + 2, 1e-3)
    assert step.finite.poll(keep=0).is_finite
    after = state_of(step)
    assert not all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.gpu
def test_a_learning_rate_of_zero_reaches_the_graph(world, tmp_path):
    config = on_gpu(run_config(world, tmp_path / "run", cuda_graphs=True))
    step, batches = steps_of(config, WARM_UP + 3, "cuda")
    for index in range(WARM_UP + 1):
        step(batches[index], index, 1e-3)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step(batches[WARM_UP + 1], WARM_UP + 1, 0.0)
    assert all(torch.equal(value, before[n]) for n, value in step.model.state_dict().items())
    step(batches[WARM_UP + 2], WARM_UP + 2, 1e-3)
    assert not all(torch.equal(value, before[n]) for n, value in step.model.state_dict().items())


@pytest.mark.gpu
def test_replays_do_not_wait_for_the_gpu(config):
    step, batches = steps_of(on_gpu(config, cuda_graphs=True), WARM_UP + 4, "cuda")
    for index in range(WARM_UP + 1):
        step(batches[index], index, 1e-3)
        step.finite.poll(keep=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(WARM_UP + 1, WARM_UP + 4):
            step(batches[index], index, 1e-3)
            step.finite.poll(keep=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_run_with_graphs_is_resumed(world, tmp_path, exact):
    """Also without graphs: the checkpoints are the same."""
    config = on_gpu(run_config(world, tmp_path / "parts", cuda_graphs=True, save_steps=1))
    train(config.replace(max_steps=6))
    assert train(config)["steps"] == 12
    whole = config.replace(output=str(tmp_path / "whole"))
    train(whole)
    weights_close(tmp_path / "parts", tmp_path / "whole")
    mixed = config.replace(output=str(tmp_path / "mixed"))
    train(mixed.replace(max_steps=6))
    train(mixed.replace(cuda_graphs=False))
    weights_close(tmp_path / "mixed", tmp_path / "whole")


def weights_close(left: Path, right: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors"):
        theirs = load_weights(right / name)
        for key, value in load_weights(left / name).items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.gpu
def test_a_restored_state_is_captured_again(world, tmp_path):
    """Loading replaces the optimiser's moments, whose addresses the graph contains."""
    config = on_gpu(run_config(world, tmp_path / "run", cuda_graphs=True))
    step, batches = steps_of(config, WARM_UP + 2, "cuda")
    for index in range(WARM_UP + 1):
        step(batches[index], index, 1e-3)
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    step.reset()
    before = copy.deepcopy(step.optimizer.state_dict()["state"])
    step(batches[WARM_UP + 1], WARM_UP + 1, 1e-3)
    after = step.optimizer.state_dict()["state"]
    assert all(after[k]["step"] == before[k]["step"] + 1 for k in before)
