"""Optimisers and schedules against published values, the papers' formulas and each other."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.optim.muon import zeropower_via_newtonschulz
from timm.utils import ModelEmaV3
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.flop_counter import FlopCounterMode

from deit_fast.config import OptimConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.models import create_student
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.runtime.environment import find_apex
from deit_fast.runtime.speed import training_flops
from deit_fast.training.optim import (
    Average,
    clip_gradients,
    create_optimizer,
    learning_rate,
    scale_in_update,
    set_learning_rate,
    skips_on_device,
)
from deit_fast.training.step import compile_blocks, gradient_norms
from deit_fast.training.step_graph import require_capturable
from deit_fast.views.steps import RunSteps


def student(**options) -> torch.nn.Module:
    return create_student(
        "deit_tiny_distilled_patch16_224", 3, img_size=32, depth=3, fused=False, **options
    )


def names_by_group(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


# ---------------------------------------------------------------------------------------------
# DeiT's code
# ---------------------------------------------------------------------------------------------


def test_compat_gives_the_learning_rates_of_deits_code():
    """Printed by facebookresearch/deit with timm 0.3.2 at batch 1024: one epoch late."""
    config = RunConfig(batch_size=1024, compat="deit")  # else DeiT's defaults
    steps = RunSteps(10240, ((0, 1024),), 300)
    rates = [learning_rate(epoch * 10 + 7, config, steps) for epoch in range(300)]
    published = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993e-4, 9.990e-4]
    assert rates[:8] == pytest.approx(published, rel=5e-5)
    assert rates[299] == pytest.approx(1.0109e-5, rel=5e-5)


def test_compat_decays_the_distillation_token_and_nothing_else_changes():
    model = student()
    ours, deits = (
        {
            name
            for name, group in names_by_group(
                model, create_optimizer(model, OptimConfig(), compat)
            ).items()
            if group["weight_decay"] > 0
        }
        for compat in ("none", "deit")
    )
    assert deits - ours == {"dist_token"} and ours <= deits


# ---------------------------------------------------------------------------------------------
# Layer decay
# ---------------------------------------------------------------------------------------------


def test_layer_decay_gives_each_block_its_learning_rate():
    """BEiT: the head at the full rate, block i of L at d^(L - i), embeddings at d^(L + 1)."""
    model = student()
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5))
    set_learning_rate(optimizer, 0.8)
    rates = {name: group["lr"] for name, group in names_by_group(model, optimizer).items()}
    assert rates["head.weight"] == rates["head_dist.bias"] == pytest.approx(0.8)
    for block in range(3):
        assert rates[f"blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.8 * 0.5 ** (3 - block))
    for name in ("patch_embed.proj.weight", "cls_token", "dist_token", "pos_embed"):
        assert rates[name] == pytest.approx(0.8 * 0.5**4), name
    assert names_by_group(model, optimizer)["blocks.1.attn.qkv.weight"]["weight_decay"] == 0.05
    assert names_by_group(model, optimizer)["blocks.1.attn.qkv.bias"]["weight_decay"] == 0


def test_without_layer_decay_all_groups_share_the_learning_rate():
    model = student()
    optimizer = create_optimizer(model, OptimConfig())
    set_learning_rate(optimizer, 0.8)
    assert {group["lr"] for group in optimizer.param_groups} == {0.8}


# ---------------------------------------------------------------------------------------------
# LAMB
# ---------------------------------------------------------------------------------------------


def test_lamb_equals_the_paper():
    """You et al. 2020, algorithm 2, in float64, over three steps, with decay."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4, bias=False)
    config = OptimConfig(name="lamb", weight_decay=0.1)
    optimizer = create_optimizer(model, config)
    assert not skips_on_device(optimizer)
    w = model.weight.detach().double().clone()
    m = v = torch.zeros_like(w)
    for step in range(1, 4):
        gradient = torch.randn(4, 5)
        model.weight.grad = gradient.clone()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + 0.1 * w
        w = w - 0.01 * w.norm() / r.norm() * r
        assert torch.allclose(model.weight.double(), w, rtol=1e-5, atol=1e-7), step


# ---------------------------------------------------------------------------------------------
# Muon
# ---------------------------------------------------------------------------------------------

MUON = ["muon", "nmuon", "adamuon", "nadamuon"]
DEIT = {"Ti": "tiny", "S": "small", "B": "base"}


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", MUON)
def test_muon_is_timms(name: str, layer_decay: float | None) -> None:
    """Bit for bit over twenty steps with a schedule, against timm's factory of optimisers."""
    ours = student(embed_dim=48)
    theirs = copy.deepcopy(ours)
    config = OptimConfig(name=name, layer_decay=layer_decay)
    mine = create_optimizer(ours, config)
    timms = create_optimizer_v2(
        theirs, name, lr=config.lr, weight_decay=0.05, momentum=0.95, layer_decay=layer_decay,
        fallback_list=["head.*", "head_dist.*", "patch_embed.*"],
    )  # fmt: skip
    assert type(mine) is type(timms) and not skips_on_device(mine)
    for step in range(20):
        set_learning_rate(mine, lr := 1e-3 / (step + 1))
        for group in timms.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for mine_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine_p.grad = torch.randn_like(mine_p)
            theirs_p.grad = mine_p.grad.clone()
        mine.step()
        timms.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("compat", ["none", "deit"])
def test_muon_takes_the_matrices_of_the_blocks_and_decays_what_adamw_decays(compat) -> None:
    model = student()
    optimizer = create_optimizer(model, OptimConfig(name="muon"), compat)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    taken = {name for name, p in model.named_parameters() if optimizer.state[p]["use_muon"]}
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert taken == {f"blocks.{i}.{name}.weight" for i in range(3) for name in matrices}
    decays = [
        {name: group["weight_decay"] for name, group in names_by_group(model, found).items()}
        for found in (optimizer, create_optimizer(model, OptimConfig(), compat))
    ]
    assert decays[0] == decays[1]
    assert decays[0]["head.weight"] == 0.05 and decays[0]["cls_token"] == 0


@pytest.mark.parametrize(("width", "name"), [(192, "Ti"), (384, "S"), (768, "B")])
def test_the_stated_cost_of_muon(width: int, name: str) -> None:
    """Newton-Schulz on m x n with m <= n: 4 m^2 n + 2 m^3 FLOPs in each of five iterations."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    counted = 0
    for shape in shapes:
        with FlopCounterMode(display=False) as flops:
            zeropower_via_newtonschulz(
                torch.empty(shape, device="meta"), 5, [(1.0, 1.0, 1.0)], dtype=torch.float32
            )
        m, n = min(shape), max(shape)
        assert flops.get_total_flops() == 5 * (4 * m * m * n + 2 * m**3)
        counted += flops.get_total_flops()
    with torch.device("meta"):
        model = create_student(f"deit_{DEIT[name]}_distilled_patch16_224", 1000, fused=False)
    step = 128 * training_flops(model, 224)
    text = f"DeiT-{name} {12 * counted / 1e9:,.0f} GFLOP ({100 * 12 * counted / step:.1f} %)"
    assert text in (Path(__file__).parent.parent / "docs/operations.md").read_text()


def test_a_muon_whose_adamw_ignores_the_schedule_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("deit_fast.training.optim.Muon", lambda groups, lr, adamw_lr=None: None)
    with pytest.raises(InputError, match=r"optim\.name=nmuon needs timm 1\.0\.27 or newer"):
        create_optimizer(student(), OptimConfig(name="nmuon"))


def test_muon_of_a_model_that_is_not_timms_goes_by_shapes() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 8))
    optimizer = create_optimizer(model, OptimConfig(name="adamuon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    taken = [optimizer.state[p]["use_muon"] for p in model.parameters()]
    assert taken == [True, False, True, False]


@pytest.mark.parametrize("name", ["lamb", *MUON])
def test_what_asks_the_host_is_no_graph(name: str) -> None:
    optimizer = create_optimizer(student(), OptimConfig(name=name))
    with pytest.raises(InputError, match="cuda_graphs needs torch's fused AdamW") as error:
        require_capturable(torch.device("cuda"), ProcessGroup(), optimizer)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Passes over the parameters
# ---------------------------------------------------------------------------------------------


def updated(
    device: str, clip: Callable[..., None], found_inf: float = 0.0, bad: float = 1.0
) -> torch.nn.Module:  # fmt: skip
    """A model after five clipped steps, with gradient norms from below 0.5 to 20 times 0.5."""
    torch.manual_seed(0)
    model = student().to(device)
    optimizer: Any = create_optimizer(model, OptimConfig())
    set_learning_rate(optimizer, 1e-3)
    draw = torch.Generator().manual_seed(1)
    for length in (10.0, 0.475, 0.6, 2.0, 0.1):
        drawn = [torch.randn(p.shape, generator=draw) for p in model.parameters()]
        share = bad * length / torch.nn.utils.get_total_norm(drawn)
        for p, gradient in zip(model.parameters(), drawn, strict=True):
            p.grad = (gradient * share).to(device)
        parameters, norms = gradient_norms(model.parameters())
        clip(optimizer, parameters, torch.linalg.vector_norm(norms), 0.5)
        optimizer.found_inf = torch.tensor(found_inf, device=device)
        optimizer.step()
    return model


def in_update(optimizer, parameters, total_norm, max_norm) -> None:
    scale_in_update(optimizer, total_norm, max_norm)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_inside_the_update_equals_torchs_clip(device):
    """It divides where torch multiplies: a float32 rounding of 1.2e-7 a step."""
    ours = updated(device, in_update)
    torchs = updated(device, lambda _, p, norm, most: clip_grads_with_norm_(p, most, norm))
    unclipped = updated(device, lambda *_: None)
    for name, value in torchs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=2e-6, atol=2e-8, msg=name)
    moved = [not torch.allclose(value, unclipped.get_parameter(name), rtol=1e-5, atol=1e-6)
             for name, value in torchs.named_parameters()]  # fmt: skip
    assert sum(moved) > len(moved) / 2, "the clip did nothing"


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_that_is_not_finite_changes_no_weight(device):
    torch.manual_seed(0)
    before = student().to(device)
    after = updated(device, in_update, found_inf=1.0, bad=math.nan)
    for mine, theirs in zip(after.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_clipping_on_a_cpu_equals_torchs_bit_for_bit():
    ours = updated("cpu", clip_gradients)
    torchs = updated("cpu", lambda _, p, norm, most: clip_grads_with_norm_(p, most, norm))
    assert all(map(torch.equal, ours.parameters(), torchs.parameters()))


def test_the_moving_average_equals_timms():
    """Bit for bit; a counter among the buffers is copied."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    emas = [ModelEmaV3(model, decay=0.9, use_warmup=True) for _ in range(2)]
    average = Average(emas[0], model)
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 5))
        average.update(step)
        emas[1].update(model, step=step)
        mine, theirs = (ema.module.state_dict() for ema in emas)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert mine["1.num_batches_tracked"] == 6
    loaded = {name: torch.zeros_like(value) for name, value in theirs.items()}
    emas[0].module.load_state_dict(loaded)  # as a rollback does
    average.update(100)
    assert 0 < emas[0].module[0].weight.abs().max() < model[0].weight.abs().max()


# ---------------------------------------------------------------------------------------------
# apex
# ---------------------------------------------------------------------------------------------

NVIDIA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass\n"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "it is not installed"),
        (
            {"apex/__init__.py": "'''A toolkit for Pyramid.'''"},
            "the installed apex is PyPI's namesake",
        ),
        (NVIDIA, "it was built without its CUDA code (amp_C is missing)"),
        ({**NVIDIA, "amp_C.py": ""}, "it needs a GPU and the model is on cpu"),
        (
            {"apex/__init__.py": "raise RuntimeError('old driver')"},
            "it is broken (RuntimeError: old",
        ),
    ],
)
@pytest.mark.parametrize(("name", "torch_class"), [("adamw", "AdamW"), ("lamb", "Lamb")])
def test_apex_that_cannot_run_is_named_and_torch_is_used(
    tmp_path: Path,
    monkeypatch,
    caplog,
    files: dict[str, str],
    reason: str,
    name: str,
    torch_class: str,
) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for module in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, module)
    config = OptimConfig(impl="apex", name=name)
    assert type(create_optimizer(torch.nn.Linear(2, 2), config)).__name__ == torch_class
    for module in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[module]
    assert f"optim.impl=apex, but {reason}" in caplog.text
    assert "torch's optimiser is used" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_apex_agrees_with_torch(name: str) -> None:
    if find_apex().state != "real":
        pytest.skip(f"needs NVIDIA's apex: {find_apex()}")
    torch.manual_seed(0)
    ours = student().cuda()
    theirs = copy.deepcopy(ours)
    pair = [
        (model, create_optimizer(model, OptimConfig(name=name, impl=impl, weight_decay=0.05)))
        for model, impl in ((ours, "torch"), (theirs, "apex"))
    ]
    for _ in range(5):
        images = torch.randn(8, 3, 32, 32, device="cuda")
        for model, optimizer in pair:
            model.eval().zero_grad(set_to_none=True)
            model(images).square().sum().backward()
            set_learning_rate(optimizer, 1e-3)
            optimizer.step()
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-6), n


# ---------------------------------------------------------------------------------------------
# Conflicting settings
# ---------------------------------------------------------------------------------------------


def test_conflicting_settings_are_named():
    with pytest.raises(
        InputError, match=r"optim\.layer_decay must be a number in \(0, 1\], or none, not 1\.5"
    ):
        OptimConfig(layer_decay=1.5)
    with pytest.raises(InputError, match=r"optim\.impl=apex has no muon: choose auto or torch"):
        OptimConfig(impl="apex", name="muon")
    with pytest.raises(InputError, match="cuda_graphs with profile_steps"):
        RunConfig(cuda_graphs=True, profile_steps=3)
    with pytest.raises(InputError, match=r"needs a model with \.blocks, which Linear lacks"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_the_schedule_changes_at_every_step():
    optim = OptimConfig(warmup_epochs=2)
    config = RunConfig(batch_size=512, optim=optim)
    rates = [learning_rate(step, config, RunSteps(5120, ((0, 512),), 10)) for step in range(100)]
    assert len(set(rates)) == 100
    assert rates[0] == optim.warmup_lr
    assert rates[19] == pytest.approx(optim.warmup_lr + (optim.lr - optim.warmup_lr) * 19 / 20)
    cosine = (1 + math.cos(math.pi * 0.2)) / 2
    assert rates[20] == pytest.approx(optim.min_lr + (optim.lr - optim.min_lr) * cosine)
