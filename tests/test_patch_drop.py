"""Patch dropout: timm's draws, of the whole batch, in training alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate
from deit_fast.models import create_student, load_weights, unfuse
from deit_fast.models.fuse import KERNELS, set_batch_part
from deit_fast.runtime.speed import training_flops
from deit_fast.training.compiling import compile_blocks
from deit_fast.training.loop import train
from helpers.runs import (
    TWO_BLOCKS,
    assert_close_runs,
    assert_stops_change_nothing,
    assert_two_processes_continue,
    comparable_rows,
    run_config,
    unruly,
)

SHAPE = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
MODEL = {"patch_drop": 0.5, "drop_path": 0.1, "args": TWO_BLOCKS}
NAMES = ("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224")
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def student(name: str = NAMES[0], patch_drop: float = 0.5, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_student(
        name, 5, 0.2, 32, patch_drop=patch_drop, **{"kernels": KERNELS[:3]} | options, **SHAPE
    ).train()


def outputs(model: nn.Module, images: torch.Tensor = IMAGES, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)
    found = model(images)
    return torch.stack(found) if isinstance(found, tuple) else found


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [(), KERNELS[:3], KERNELS])
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_model_drops_what_timms_model_drops(name, kernels):
    fused = student(name, kernels=kernels)
    plain = unfuse(copy.deepcopy(fused))
    results = []
    for model in (fused, plain):
        found = outputs(model)
        found.square().sum().backward()
        results.append([found, *(parameter.grad for parameter in model.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.equal(results[0][0], outputs(fused, seed=8))


@pytest.mark.parametrize("name", NAMES)
def test_prefix_tokens_stay_and_the_rest_is_a_random_half(name):
    """timm alone would drop the distillation token like a patch."""
    model = student(name)
    prefix, patches = model.num_prefix_tokens, 16
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for is_training in (False, True):
        outputs(model.train(is_training), IMAGES.repeat(8, 1, 1, 1))
    whole, kept = seen
    assert whole.shape[1] == prefix + patches and kept.shape[1] == prefix + patches // 2
    assert torch.equal(kept[:, :prefix], whole[:, :prefix])
    positions = torch.cdist(kept[:, prefix:], whole[:, prefix:]).argmin(-1)
    assert all(len(set(row)) == patches // 2 for row in positions.tolist())
    assert len({tuple(sorted(row)) for row in positions.tolist()}) > 1
    assert set(positions.flatten().tolist()) == set(range(patches))


@pytest.mark.parametrize("kernels", [(), KERNELS[:3]])
def test_parts_of_a_batch_drop_what_the_whole_batch_drops(kernels):
    model = student(kernels=kernels)
    set_batch_part(model, 0, 6)
    whole = outputs(model)
    parts = []
    for start in (0, 2, 4):
        set_batch_part(model, start, 6)
        parts.append(outputs(model, IMAGES[start : start + 2]))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    model.batch_part = None
    assert torch.equal(outputs(model), whole)  # and timm's for a whole batch


def test_evaluation_sees_every_patch():
    dropping, plain = student(), student(patch_drop=0.0)
    plain.load_state_dict(dropping.state_dict())
    assert torch.equal(outputs(dropping.eval()), outputs(plain.eval(), seed=9))


def test_no_step_compiles_again():
    torch._dynamo.reset()
    counter, model = CompileCounter(), student()
    compile_blocks(model, backend=counter)
    counts = []
    for step in range(4):
        set_batch_part(model, 2 * (step % 3), 6)
        outputs(model, IMAGES[:2], seed=step).sum().backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] > 0 and len(set(counts)) == 1


def test_flops_are_those_of_the_patches_that_are_kept():
    shape = {**SHAPE, "patch_size": 4, "depth": 6}
    name = "deit_tiny_distilled_patch16_224"
    flops = [
        training_flops(create_student(name, 5, 0.0, 32, patch_drop=p, fused=False, **shape), 32)
        for p in (0.0, 0.5)
    ]
    assert 0.48 < flops[1] / flops[0] < 0.55  # 34 of 66 tokens, and less attention


def test_models_without_patches_are_refused():
    for name in ("resnet18", "deit_fast.models.convnet:small_convnet"):
        with pytest.raises(InputError, match=r"patch_drop=0\.5 needs a vision transformer of timm"):
            create_student(name, 5, patch_drop=0.5)
    with pytest.raises(InputError, match="another setting decides patch_drop_rate"):
        RunConfig().replace(model={"args": ("patch_drop_rate=0",)})


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("patch-drop") / "whole"
    train(run_config(world, run, model=MODEL))
    return run


def test_an_interrupted_run_is_bit_equal(world, whole, tmp_path):
    config = run_config(world, tmp_path / "parts", model=MODEL)
    assert_stops_change_nothing(config, (4, 6), whole)


def test_a_run_is_evaluated_with_every_patch(whole):
    rows = [row for row in comparable_rows(whole) if row["kind"] == "eval"]
    assert evaluate(str(whole))["top1"] == rows[-1]["top1"]


def test_accumulation_drops_the_same_patches(world, whole, tmp_path):
    train(run_config(world, tmp_path / "run", model=MODEL, accumulate=4))
    assert_close_runs(tmp_path / "run", whole)


@pytest.mark.dist
def test_two_processes_continue_a_run_of_one(world, whole, tmp_path):
    assert_two_processes_continue(run_config(world, tmp_path / "run", model=MODEL), 4, whole)


def test_a_rollback_leaves_a_step_out(world, tmp_path, monkeypatch):
    monkeypatch.setenv("UNRULY", "nan:2")
    config = unruly(world, tmp_path, model=MODEL, on_nonfinite="rollback", max_steps=4)
    assert train(config)["skipped_steps"] == [2]
    states = load_weights(tmp_path / "model.safetensors").values()
    assert all(state.isfinite().all() for state in states)


def test_a_default_model_is_timms_without_patch_dropout():
    model = create_student(NAMES[0], 5, img_size=32, **SHAPE)
    assert isinstance(model.patch_drop, nn.Identity) and RunConfig().model.patch_drop == 0
    made = timm.create_model(NAMES[0], num_classes=5, img_size=32, **SHAPE)
    assert [*model.state_dict()] == [*made.state_dict()]
