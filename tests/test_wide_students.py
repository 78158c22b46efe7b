"""Lift and WideLast: the formulas of the paper, and everything that other students can do."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.models import create_student, unfuse
from deit_fast.models.fuse import KERNELS, set_batch_part
from deit_fast.models.weights import load_weights, start_from
from deit_fast.runtime.speed import training_flops
from deit_fast.training.compiling import compile_blocks
from helpers.fused import assert_same

PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WIDE = 128
KINDS = {"lift": (PLAIN, "lift"), "wide": (PLAIN, "wide_last"), "two": (DISTILLED, "wide_last")}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
SOME = pytest.mark.parametrize("kind", KINDS)


def student(kind: str, drop_path: float = 0.0, **options: Any) -> Any:
    """With no constant parameters."""
    name, head = KINDS[kind]
    torch.manual_seed(1)
    model = create_student(name, 5, drop_path, 32, head=head, wide=WIDE, **SHAPE | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def forward(model: Any, images: Tensor = IMAGES, seed: int = 5) -> list[Tensor]:
    """Logits of each head and features, in one forward."""
    torch.manual_seed(seed)
    logits, features = model.forward_with_features(images)
    return [*(logits if isinstance(logits, tuple) else [logits]), features]


def logits_of(model: Any, images: Tensor = IMAGES, seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    found = model(images)
    return [*found] if isinstance(found, tuple) else [found]


# ---------------------------------------------------------------------------------------------
# The formulas, written once more from the paper, token by token
# ---------------------------------------------------------------------------------------------


def norm_of(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def product(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    found = torch.stack([w[f"{name}.weight"] @ token for token in x])
    return found + w[f"{name}.bias"] if f"{name}.bias" in w else found


def block_of(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    width = x.shape[1]
    size = width // heads
    packed, outputs = product(w, f"{name}.attn.qkv", norm_of(w, f"{name}.norm1", x)), []
    for head in range(heads):
        q, k, v = (packed[:, part * width + head * size :][:, :size] for part in range(3))
        outputs.append(torch.softmax(q @ k.T / math.sqrt(size), dim=1) @ v)
    x = x + product(w, f"{name}.attn.proj", torch.cat(outputs, dim=1))
    hidden = product(w, f"{name}.mlp.fc1", norm_of(w, f"{name}.norm2", x))
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + product(w, f"{name}.mlp.fc2", hidden)


def by_the_paper(w: dict[str, Tensor], kind: str, image: Tensor) -> list[Tensor]:
    """Logits of each head and features [N, width] of one image."""
    patches = [
        image[:, y : y + 8, x : x + 8].flatten() for y in range(0, 32, 8) for x in range(0, 32, 8)
    ]
    kernel = w["patch_embed.proj.weight"].flatten(1)
    tokens = [kernel @ patch + w["patch_embed.proj.bias"] for patch in patches]
    prefix = [w[name][0, 0] for name in ("cls_token", "dist_token") if name in w]
    x = torch.stack(prefix + tokens) + w["pos_embed"][0]
    x = block_of(w, "blocks.0", x, heads=2)
    if kind == "lift":
        x = block_of(w, "blocks.1", x, heads=2)
        z = norm_of(w, "norm.norm", product(w, "norm.proj", x[len(prefix) :]))
        return [product(w, "head", z.mean(0)[None])[0], z]
    x = norm_of(w, "blocks.1.widen.norm", product(w, "blocks.1.widen.proj", x))
    x = block_of(w, "blocks.1", x, heads=WIDE // 64)
    last = norm_of(w, "norm", x)
    heads = ["head", "head_dist"][: len(prefix)]
    found = [product(w, head, last[i : i + 1])[0] for i, head in enumerate(heads)]
    return [*found, x[len(prefix) :]]


@pytest.mark.parametrize("kernels", [None, (), KERNELS])
@SOME
def test_logits_and_features_are_those_of_the_formulas(kind, kernels):
    """None: a model of timm's classes alone."""
    model = student(kind, fused=kernels is not None, kernels=kernels).double()
    weights = {name: value.double() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = [by_the_paper(weights, kind, image.double()) for image in IMAGES]
        rows = [torch.stack(part) for part in zip(*expected, strict=True)]
        found = forward(model.train(), IMAGES.double())
        assert len(found) == len(rows)
        for mine, theirs in zip(found, rows, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits_of(model, IMAGES.double()), rows[:-1])
        mean = torch.stack(rows[:-1]).mean(0)
        torch.testing.assert_close(model.eval()(IMAGES.double()), mean)
        torch.testing.assert_close(forward(model, IMAGES.double()), [mean, rows[-1]])


def test_parameters_of_the_published_students():
    """DeiT-Ti with 384 channels. Lift: W, its norm and a wide classifier for a norm and a narrow
    one. WideLast: beside these a block of 384 for one of 192."""
    narrow, wide, classes = 192, 384, 1000

    def block(width: int) -> int:
        return 12 * width**2 + 13 * width

    counts = {}
    for head in ("standard", "lift", "wide_last"):
        with torch.device("meta"):
            channels = None if head == "standard" else wide
            model = create_student(PLAIN, classes, head=head, wide=channels, fused=False)
        counts[head] = sum(parameter.numel() for parameter in model.parameters())
    assert counts["standard"] == 5_717_416
    ends = narrow * wide + 2 * wide + (wide + 1) * classes - 2 * narrow - (narrow + 1) * classes
    assert counts["lift"] == 5_717_416 + ends == 5_983_528
    assert counts["wide_last"] == counts["lift"] + 2 * wide + block(wide) - block(narrow)
    assert counts["wide_last"] == 7_313_896


def test_initial_weights_are_drawn_as_in_the_code_of_the_paper():
    torch.manual_seed(0)
    lift = create_student(PLAIN, 50, img_size=32, head="lift", wide=WIDE, **SHAPE)
    last = create_student(PLAIN, 50, img_size=32, head="wide_last", wide=WIDE, **SHAPE)
    uniform = 1 / math.sqrt(SHAPE["embed_dim"])
    weight = lift.norm.proj.weight.detach()
    assert weight.abs().max() <= uniform and lift.head.bias.std() > 0.01
    assert weight.std().item() == pytest.approx(uniform / math.sqrt(3), rel=0.05)
    block = last.blocks[1]
    for weight in (block.widen.proj.weight, block.mlp.fc1.weight, last.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not last.head.bias.any() and not last.blocks[1].attn.qkv.bias.any()


def test_a_wide_block_has_the_options_of_the_narrow_one():
    block = student("wide", 0.3).blocks[-1]
    assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == pytest.approx(0.3)
    assert (block.attn.num_heads, block.mlp.fc1.out_features) == (WIDE // 64, 4 * WIDE)
    other = create_student("deit3_small_patch16_224", 5, img_size=32, head="wide_last", wide=64,
                           **SHAPE)  # fmt: skip
    scaled: Any = other.blocks[-1]
    assert torch.equal(scaled.ls1.gamma, torch.full((64,), 1e-6)) and scaled.norm1.eps == 1e-6


# ---------------------------------------------------------------------------------------------
# The fused model
# ---------------------------------------------------------------------------------------------


def gradients(model: Any, call: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    outputs = call(model)
    torch.manual_seed(6)
    sum((out * torch.randn(out.shape)).sum() for out in outputs).backward()
    named = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return [out.detach() for out in outputs], named


@pytest.mark.parametrize("call", [forward, logits_of])
@SOME
def test_a_fused_student_computes_what_the_plain_one_does(kind, call):
    fused = student(kind, 0.3, kernels=KERNELS).train()
    assert type(fused).__name__.startswith("Fused")
    assert all("Fused" in type(block).__name__ for block in fused.blocks)
    plain = unfuse(copy.deepcopy(fused))
    assert not any("Fused" in type(part).__name__ for part in plain.modules())
    assert_same(gradients(fused, call), gradients(plain, call), rtol=2e-5)


@SOME
def test_copies_and_pickles_are_students_too(kind):
    model = student(kind).eval()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), unfuse(model)):
        with torch.no_grad():
            torch.testing.assert_close(forward(copied), forward(model))


@SOME
def test_parts_of_a_batch_drop_what_the_whole_batch_drops(kind):
    model = student(kind, 0.5).train()
    assert set_batch_part(model, 0, 6)
    whole, parts = forward(model), []
    for start in (0, 2, 4):
        set_batch_part(model, start, 6)
        parts.append(forward(model, IMAGES[start : start + 2]))
    for part, one in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(part), one, rtol=1e-4, atol=1e-5)


@SOME
def test_a_bfloat16_residual_is_close_and_keeps_its_dtype(kind):
    exact, rounded = student(kind).eval(), student(kind, residual="bfloat16").eval()
    with torch.no_grad():
        for mine, theirs in zip(forward(rounded), forward(exact), strict=True):
            error = (mine.float() - theirs).norm() / theirs.norm()
            assert 0 < error < 0.02
        with torch.autocast("cpu", torch.bfloat16):
            feature = forward(exact)[-1]
    assert feature.dtype == torch.float32  # the residual of a float32 stream stays so


def test_compiled_blocks_compute_the_same_and_compile_once():
    torch._dynamo.reset()
    model = student("two", 0.2).train()
    expected = [part.detach() for part in forward(model)]
    counter, counts = CompileCounter(), []
    compile_blocks(model, backend=counter)
    for _ in range(2):
        found = forward(model)
        sum(part.sum() for part in found).backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] == counts[1] == 3  # the embedding and two blocks
    torch.testing.assert_close(found, expected)


def test_a_compiled_model_computes_the_same():
    model = student("lift").eval()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    torch._dynamo.reset()


def test_patch_dropout_leaves_features_of_the_patches_that_are_kept():
    for kind in KINDS:
        model = student(kind, patch_drop=0.5).train()
        assert forward(model)[-1].shape == (6, 8, WIDE)
        assert forward(model.eval())[-1].shape == (6, 16, WIDE)


def test_flops_are_those_of_the_wide_layers():
    narrow = training_flops(create_student(PLAIN, 5, 0.0, 32, fused=False, **SHAPE), 32)
    lift = training_flops(student("lift", fused=False), 32)
    assert lift - narrow == 3 * 2 * (17 * 32 * WIDE + 5 * (WIDE - 32))
    last, one = training_flops(student("wide", fused=False), 32), 17 * 12 * 32**2
    added = 17 * (12 * WIDE**2 + 32 * WIDE) - one + 2 * 17**2 * (WIDE - 32) + 5 * (WIDE - 32)
    assert last - narrow == 3 * 2 * added


# ---------------------------------------------------------------------------------------------
# Weights to start from
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """Weights of the narrow model."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("narrow") / "narrow.safetensors"
    save_file(create_student(PLAIN, 5, img_size=32, **SHAPE).state_dict(), path)
    return path


def starting(model: nn.Module, path: Path, caplog: Any) -> list[str]:
    """Start from a file; returns the log's lines."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "deit_fast"):
        start_from(model, load_weights(path), path, list("abcde"))
    return caplog.messages


@pytest.mark.parametrize("kind", ["lift", "wide"])
def test_a_student_starts_from_a_narrow_model(kind, narrow, caplog):
    model, theirs = student(kind), load_file(narrow)
    own = copy.deepcopy(model.state_dict())
    parts = "norm, head" if kind == "lift" else "blocks.1, norm, head"
    assert starting(model, narrow, caplog) == [
        f"weights file {narrow}: it is of another width: {parts} keep their initial values"
    ]
    new, taken = tuple(f"{part}." for part in parts.split(", ")), 0
    for name, value in model.state_dict().items():
        is_new = name.startswith(new)
        assert torch.equal(value, own[name] if is_new else theirs[name]), name
        taken += not is_new
    assert taken == {"lift": 28, "wide": 16}[kind]


def test_a_student_with_two_heads_starts_from_one_without(narrow, caplog):
    model = student("two")
    lines = starting(model, narrow, caplog)
    assert any("no distillation token" in line for line in lines)
    assert "blocks.1, norm, head, head_dist keep their initial values" in lines[-2] + lines[-1]
    assert torch.equal(model.pos_embed[:, 2:], load_file(narrow)["pos_embed"][:, 1:])


def test_its_own_weights_load_whole_and_others_are_refused(narrow, tmp_path, caplog):
    path, made = tmp_path / "w.safetensors", student("wide")
    save_file(made.state_dict(), path)
    model = create_student(PLAIN, 5, img_size=32, head="wide_last", wide=WIDE, **SHAPE)
    assert "width" not in " ".join(starting(model, path, caplog))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), made.parameters(), strict=True)
    )
    other = create_student(PLAIN, 5, img_size=32, head="wide_last", wide=64, **SHAPE)
    with pytest.raises(InputError, match=r": blocks.1.norm1.weight is \(128,\) there, \(64,"):
        starting(other, path, caplog)
    with pytest.raises(InputError, match=r"blocks.1.norm1.weight is \(128,\) there, \(32,"):
        starting(create_student(PLAIN, 5, img_size=32, **SHAPE), path, caplog)


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


def refusal(name: str = PLAIN, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        create_student(name, 5, img_size=32, **{"wide": WIDE} | options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_cannot_be_wide_are_refused_in_one_line():
    assert "needs model.wide, the channels" in refusal(head="lift", wide=None)
    assert "model.wide=128 needs model.head" in refusal(head="standard")
    assert "heads of 64 channels, and model.wide=100" in refusal(head="wide_last", wide=100)
    assert "model.wide must be a whole number" in refusal(head="lift", wide=0)
    assert "model.head must be one of standard, lift, wide_last" in refusal(head="broad")
    assert "has a distillation token" in refusal(DISTILLED, head="lift")
    for name in ("resnet18", "deit_fast.models.convnet:small_convnet"):
        assert "head='lift' needs a vision transformer of timm" in refusal(name, head="lift")
    for name, reason in {
        "vit_base_patch16_gap_224": "has no classifier that reads a token",
        "vit_small_patch16_18x2_224": "has a block ParallelThingsBlock, not Block",
    }.items():
        assert reason in refusal(name, head="wide_last", depth=1, embed_dim=64, num_heads=1)
    with pytest.raises(InputError, match="another setting decides wide"):
        RunConfig().replace(model={"args": ("wide=3",)})
