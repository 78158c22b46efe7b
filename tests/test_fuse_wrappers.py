"""What is attached to the modules of a fused model acts as on timm's model.

A sweep compares fused models with timm's over options of models, attachments, modes and kernels.
``FUSE_CASES=20000 pytest tests/test_fuse_wrappers.py -k sweep`` is the large one.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from deit_fast.models import fuse
from deit_fast.models.fuse import patch_side, set_batch_part
from deit_fast.models.shadow import Shadows
from deit_fast.models.student import forward_heads
from deit_fast.training.compiling import compile_blocks
from helpers.fuse_cases import ATTACHMENTS, Adapter, Case, Scaled, draw, global_hook, make
from helpers.fused import IMAGES, KERNELS, FlopCount, assert_same, run
from helpers.kernels import DEVICE

CASES = int(os.environ.get("FUSE_CASES", 120))
SEED = int(os.environ.get("FUSE_SEED", 0))
SLOW = ("compile",)  # seconds
EAGER = tuple(name for name in ATTACHMENTS if name not in SLOW)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("group") / "store"
    store = torch.distributed.FileStore(str(path), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def result(case: Case, fused: bool) -> tuple[dict[str, Tensor | None], list, Tensor]:
    """Outputs and gradients by name, the calls of hooks, and the state of the generator."""
    choice = random.Random(case.seed)
    model = make(case.options).train(case.training)
    case.events = []
    attach = ATTACHMENTS[case.attachment]
    torch.manual_seed(3)
    if fused and case.fused_first:
        fuse(model, kernels=case.kernels)
    attach(model, case, choice)
    if fused and not case.fused_first:
        fuse(model, kernels=case.kernels)
    observed = global_hook(case) if case.attachment == "global_hook" else contextlib.nullcontext()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    images.requires_grad_(True)
    torch.manual_seed(5)
    with observed:
        output = model(images)
        outputs = list(output) if isinstance(output, tuple) else [output]
        state = torch.get_rng_state()
        values: dict[str, Tensor | None] = {f"output {n}": o for n, o in enumerate(outputs)}
        if case.attachment != "quantize":
            torch.manual_seed(6)
            sum((out * torch.randn(out.shape).to(out)).sum() for out in outputs).backward()
            values["images"] = images.grad
            values |= {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in values.items()
    }
    return full, case.events, state


def difference(case: Case) -> str:
    """What differs between timm's model and the fused one; empty: nothing."""
    try:
        theirs, their_events, their_state = result(case, fused=False)
    except Exception as error:
        with pytest.raises(type(error)):
            result(case, fused=True)
        return ""
    mine, events, state = result(case, fused=True)
    if mine.keys() != theirs.keys():
        return f"other parameters: {sorted(mine.keys() ^ theirs.keys())}"
    largest = max(x.norm().item() for n, x in theirs.items() if x is not None and n != "images")
    for name, expected in theirs.items():
        got = mine[name]
        if (got is None) != (expected is None):
            return f"gradient of {name}: {got is not None}, timm's {expected is not None}"
        if got is None or expected is None:
            continue
        if got.shape != expected.shape:
            return f"{name}: {tuple(got.shape)}, timm's {tuple(expected.shape)}"
        error = (got - expected).norm().item()
        if not error <= 1e-5 * expected.norm().item() + 1e-6 * largest:
            return f"{name}: {error:.1e} of {expected.norm().item():.1e}"
    if events != their_events:
        for number, (a, b) in enumerate(zip(events, their_events, strict=False)):
            if a != b:
                return f"hook {number}: {a}, timm's {b}"
        return f"{len(events)} calls of hooks, timm's {len(their_events)}"
    return "" if torch.equal(state, their_state) else "other random numbers are drawn"


def test_sweep(process_group: None) -> None:
    """Outputs, gradients, hooks in their order, and the number of random draws."""
    found = []
    logging.getLogger("deit_fast").setLevel(logging.ERROR)
    for seed in range(SEED, SEED + CASES):
        case = draw(seed, EAGER)
        try:
            text = difference(case)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        if text:
            found.append(f"{case}: {text}")
    assert not found, "\n".join([f"{len(found)} of {CASES} differ", *found[:40]])


# ---------------------------------------------------------------------------------------------
# What the sweep leaves out
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [(), KERNELS])
def test_a_block_that_is_compiled_alone_runs_compiled(kernels: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = fuse(make(("init_values",)).train(), kernels=kernels)
    expected = run(model, IMAGES)
    model.blocks[1].compile(backend=counter)
    assert_same(run(model, IMAGES), expected)
    assert counter.frame_count == 1


def test_compile_blocks_compiles_wrapped_blocks_too() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = fuse(make(("none",)).train())
    model.blocks[0] = Scaled(model.blocks[0])
    expected = run(model, IMAGES)
    compile_blocks(model, backend=counter)
    assert_same(run(model, IMAGES), expected)
    assert counter.frame_count == 3  # the embedding, the wrapper with its block, the last block


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = fuse(make(("none",)), kernels=KERNELS)
    for block in model.blocks:
        block.mlp.fc1 = Adapter(block.mlp.fc1)
    model.blocks[1].norm2.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "deit_fast"):
        for _ in range(2):
            model(IMAGES)
    assert caplog.messages == [
        "not fused: block 0, 1: mlp.fc1 is helpers.fuse_cases.Adapter: called as in timm's model",
        "not fused: block 1: norm2 has a hook: called as in timm's model",
    ]


def test_a_removed_hook_leaves_nothing_behind() -> None:
    model = fuse(make(("none",)))
    with FlopCount() as before:
        model(IMAGES)
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    with FlopCount() as hooked:
        model(IMAGES)
    handle.remove()
    with FlopCount() as after:
        model(IMAGES)
    assert before.total == after.total < hooked.total


@pytest.mark.parametrize("kernels", [(), KERNELS])
def test_a_called_block_gets_the_dtype_of_its_weights(kernels: tuple[str, ...]) -> None:
    """With a bfloat16 stream its output is rounded as the sums of the other blocks are."""
    model = make(("init_values",)).train()
    (true,), _ = run(model, IMAGES)
    fuse(model, kernels=kernels, residual="bfloat16")
    seen: list[torch.dtype] = []
    model.blocks[0] = Scaled(model.blocks[0])
    model.blocks[0].factor.data.fill_(1.0)
    model.blocks[1].register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    model.norm = Scaled(model.norm)
    model.norm.factor.data.fill_(1.0)
    (got,), _ = run(model, IMAGES)
    assert seen == [torch.float32]
    assert 0 < (got - true).norm() <= 0.05 * true.norm()


def test_a_called_drop_path_draws_for_what_it_sees() -> None:
    """So the parts of a batch need seeds of their own, as with timm's model."""
    model = fuse(make(("drop_path_rate",)).train())
    assert set_batch_part(model, 0, 8)
    model.blocks[1].drop_path1.register_forward_hook(lambda *_: None)
    assert not set_batch_part(model, 4, 8)
    assert model.batch_part is None


def test_rows_of_patches_reach_a_wrapped_projection_as_images() -> None:
    model = fuse(make(("none",)))
    rows = IMAGES.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 1, 3, 5)
    expected = model(IMAGES)
    assert patch_side(model) == 8
    model.patch_embed.proj.register_forward_hook(lambda _, x, y: 2 * y)
    assert patch_side(model) is None
    got = model(rows.flatten(3).flatten(1, 2))
    torch.testing.assert_close(got, model(IMAGES))
    assert not torch.allclose(got, expected)


def test_both_heads_see_what_is_attached_to_blocks() -> None:
    model = make(("distilled",)).eval()
    fused = fuse(copy.deepcopy(model))
    for each in (model, fused):
        each.blocks[1].register_forward_hook(lambda _, x, y: 1.5 * y + x[0])
        each.blocks[1].attn.qkv = Adapter(each.blocks[1].attn.qkv).to(DEVICE).eval()
        each.blocks[1].attn.qkv.load_state_dict(model.blocks[1].attn.qkv.state_dict())
    for got, expected in zip(forward_heads(fused, IMAGES), forward_heads(model, IMAGES),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected)


def test_a_copy_keeps_what_is_attached_under_autocast() -> None:
    model = fuse(make(("init_values",)).train(), kernels=KERNELS)
    for block in model.blocks:
        block.attn.proj = Adapter(block.attn.proj).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(run(copy.deepcopy(model), IMAGES), run(model, IMAGES), rtol=0)


def test_a_shadow_is_not_read_for_a_wrapped_layer() -> None:
    model = fuse(make(("none",)).train(), kernels=KERNELS)
    model.blocks[0].mlp.fc2 = Scaled(model.blocks[0].mlp.fc2)
    Shadows(model, torch.bfloat16)
    assert set(model.blocks[0].mlp.shadows) == {"fc1"}
    assert set(model.blocks[1].mlp.shadows) == {"fc1", "fc2"}


def _fused_alike(options: tuple[str, ...], change: Callable[[Any], object]) -> None:
    """A fused model that is changed before or after fusing computes what timm's changed one does,
    in both modes, with the same random draws."""
    for training, kernels, fused_first in itertools.product(*[(False, True)] * 3):
        results = []
        for is_fused in (False, True):
            model: Any = make(options)
            names = KERNELS if kernels else ()
            if is_fused and fused_first:
                fuse(model, kernels=names)
            torch.manual_seed(7)
            change(model.train(training))
            if is_fused and not fused_first:
                fuse(model, kernels=names)
            (output,), _ = run(model, IMAGES)
            results.append((output, torch.get_rng_state()))
        (theirs, their_state), (mine, state) = results
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(state, their_state)


def test_a_block_may_stand_at_several_positions() -> None:
    def share(model: Any) -> None:
        block = model.blocks[1]
        model.blocks = nn.Sequential(block, model.blocks[0], block)

    def share_parts(model: Any) -> None:
        model.blocks[0].attn, model.blocks[0].mlp = model.blocks[1].attn, model.blocks[1].mlp

    _fused_alike(("none",), share)
    _fused_alike(("none",), share_parts)


@pytest.mark.parametrize("name", ["ls1", "ls2", "drop_path1", "drop_path2"])
def test_another_module_in_the_place_of_a_scale_is_called(name: str) -> None:
    _fused_alike(
        ("init_values",), lambda model: setattr(model.blocks[1], name, nn.Linear(48, 48).to(DEVICE))
    )


def test_the_dropout_of_attention_follows_the_attention_not_the_dropout() -> None:
    """With ``fused_attn`` timm reads the dropout's rate alone."""

    def still(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()

    _fused_alike(("attn_drop_rate",), still)


@pytest.mark.parametrize("fused_attn", [True, False])
def test_another_scale_of_attention_counts_where_timm_reads_it(fused_attn: bool) -> None:
    def scale(model: Any) -> None:
        for block in model.blocks:
            block.attn.scale, block.attn.fused_attn = 0.01, fused_attn

    _fused_alike(("none",), scale)


@pytest.mark.parametrize("name", ["norm1", "norm"])
def test_a_norm_whose_weight_is_a_buffer_is_called(name: str) -> None:
    def freeze(model: Any) -> None:
        norm = model.norm if name == "norm" else model.blocks[1].norm1
        weight = norm.weight.detach()
        del norm.weight
        norm.register_buffer("weight", weight)

    _fused_alike(("none",), freeze)


def test_a_replaced_norm_before_the_blocks_runs_after_the_patches_are_dropped() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(1, keepdim=True)

    def replace(model: Any) -> None:
        model.norm_pre = Centred()

    _fused_alike(("patch_drop_rate",), replace)
