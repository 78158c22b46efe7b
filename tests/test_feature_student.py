"""Tokens that leave the student, in the forward that computes its logits, and the projectors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_fast.errors import InputError
from deit_fast.features.student import (
    FeatureHeads,
    FeatureStudent,
    HeadSpec,
    resize_grid,
    student_tokens,
)
from deit_fast.models import fuse
from deit_fast.models.convnet import small_convnet
from deit_fast.models.fuse import set_batch_part
from deit_fast.models.fused import FusedBlock
from deit_fast.models.student import forward_heads, keep_trained_head
from deit_fast.training.compiling import compile_blocks
from helpers.fused import IMAGES, KERNELS, build
from helpers.kernels import DEVICE
from helpers.processes import start_forked

ONE, GRID = HeadSpec(1, 10, False, "linear"), HeadSpec(16, 10, True, "linear")


def transformer(kind: str = "distilled", **changes: object) -> nn.Module:
    """16 patches and three blocks of 48 channels, with stochastic depth."""
    return build(kind, **({"drop_path_rate": 0.4} | changes)).train()


def convnet(name: str = "resnet10t") -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=7).train()


def heads_of(model: nn.Module, *specs: HeadSpec, **options) -> FeatureHeads:
    return FeatureHeads(model, specs or (ONE, GRID), image_size=32, **options)


def seeded(function, *arguments, seed: int = 5):
    torch.manual_seed(seed)
    return function(*arguments)


def as_tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_equal(mine, theirs) -> None:
    assert len(as_tuple(mine)) == len(as_tuple(theirs))
    for got, expected in zip(as_tuple(mine), as_tuple(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------

STUDENTS = {
    "distilled": lambda: transformer(),
    "plain": lambda: transformer("plain"),
    "deit3": lambda: transformer("deit3"),
    "average": lambda: transformer("average"),
    "dropped patches": lambda: transformer("plain", patch_drop_rate=0.25),
    "registers": lambda: transformer("plain", reg_tokens=3),
    "resnet": convnet,
    "convnext": lambda: convnet("convnext_atto"),
}


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("block", [None, 1])
def test_logits_are_those_of_the_model_bit_for_bit(kind: str, block: int | None) -> None:
    model = STUDENTS[kind]()
    if block is not None and not isinstance(model, VisionTransformer):
        return
    expected = seeded(copy.deepcopy(model), IMAGES)
    class_logits, distill_logits, tokens = seeded(student_tokens, model, IMAGES, block)
    assert_equal((class_logits, distill_logits)[: len(as_tuple(expected))], expected)
    assert (distill_logits is None) == (kind != "distilled")
    prefix = {"distilled": 2, "registers": 4, "resnet": 0, "convnext": 0}.get(kind, 1)
    assert tokens.prefix.shape[1] == prefix


@pytest.mark.parametrize("kind", ["distilled", "plain", "deit3"])
@pytest.mark.parametrize("block", [None, 0, 2])
@pytest.mark.parametrize("kernels", [(), KERNELS])
def test_fused_logits_are_those_of_the_model(kind: str, block: int | None, kernels) -> None:
    """Bit for bit if prefix tokens are enough; else but for the rounding of the last block."""
    model = fuse(transformer(kind), kernels=kernels)
    expected = as_tuple(seeded(model, IMAGES))
    found = seeded(student_tokens, model, IMAGES, block, False)
    assert_equal(tuple(x for x in found[:2] if x is not None), expected)
    assert found[2].patches.shape[1] == (0 if block in (None, 2) else 16)
    whole = seeded(student_tokens, model, IMAGES, block, True)
    for got, like in zip(whole, expected, strict=False):
        torch.testing.assert_close(got, like, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["distilled", "deit3", "average"])
@pytest.mark.parametrize("block", [None, 0, 1, -1])
@pytest.mark.parametrize("options", [{"kernels": ()}, {"kernels": KERNELS}], ids=["none", "all"])
def test_tokens_and_gradients_of_a_fused_student_are_those_of_timms(
    kind: str, block: int | None, options: dict
) -> None:
    plain = transformer(kind)
    fused = fuse(copy.deepcopy(plain), **options)
    results = []
    for model in (plain, fused):
        class_logits, _, tokens = seeded(student_tokens, model, IMAGES, block)
        weights = torch.randn(6, 32, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        joined = torch.cat(tokens, 1)
        (class_logits.sum() + (joined * weights[:, : joined.shape[1]]).sum()).backward()
        results.append([joined.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        if expected is None:  # the distillation head's
            assert got is None or not got.any()
            continue
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_tokens_of_a_block_are_its_output_before_the_final_norm() -> None:
    model = transformer("plain", drop_path_rate=0.0)
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    for block in (1, -2):
        _, _, tokens = student_tokens(model, IMAGES, block)
        assert_equal(torch.cat(tokens, 1), seen.pop())
    _, _, tokens = student_tokens(model, IMAGES)
    assert_equal(torch.cat(tokens, 1), model.forward_features(IMAGES))


def test_efficient_stochastic_depth_keeps_its_draws() -> None:
    model = fuse(transformer(), kernels=(), stochastic_depth="subset")
    expected = seeded(model, IMAGES)
    for block in (None, 0):
        assert_equal(seeded(student_tokens, model, IMAGES, block, False)[:2], expected)


def test_a_part_of_a_batch_drops_what_the_whole_batch_drops() -> None:
    model = fuse(transformer(), kernels=())
    student = FeatureStudent(model, heads_of(model))
    set_batch_part(model, 0, 6)
    whole = torch.cat(seeded(student, IMAGES)[1], 1)
    set_batch_part(model, 4, 6)
    part = torch.cat(seeded(student, IMAGES[4:])[1], 1)
    torch.testing.assert_close(part, whole[4:], rtol=1e-5, atol=1e-5)


def test_the_last_block_computes_patches_only_where_they_are_needed(monkeypatch) -> None:
    model = fuse(transformer(), kernels=())
    calls: list[str] = []
    for name in ("run", "run_last"):
        original = getattr(FusedBlock, name)
        monkeypatch.setattr(
            FusedBlock, name,
            lambda self, *a, name=name, original=original: (calls.append(name), original(self, *a)),
        )  # fmt: skip
    for specs, token, last in (
        ([ONE], "auto", "run_last"), ([ONE], "class", "run_last"), ([ONE], "mean", "run"),
        ([ONE, GRID], "auto", "run"),
    ):  # fmt: skip
        heads = heads_of(model, *specs, token=token)
        calls.clear()
        FeatureStudent(model, heads)(IMAGES)
        assert calls == ["run", "run", last]


def test_both_heads_leave_in_evaluation_mode() -> None:
    model = transformer().eval()
    found = student_tokens(model, IMAGES)
    assert_equal(found[:2], forward_heads(model, IMAGES))
    keep_trained_head(model, "distillation")
    assert student_tokens(model, IMAGES)[1] is None
    FeatureHeads(model, [ONE], image_size=32)  # its trial compares with what evaluation returns


def test_maps_of_a_convolutional_student_are_rows_of_patches() -> None:
    model = convnet().eval()
    _, _, tokens = student_tokens(model, IMAGES.repeat(1, 1, 2, 2))
    grid = model.forward_features(IMAGES.repeat(1, 1, 2, 2))
    assert tokens.patches.shape == (6, 4, 512) and tokens.prefix.shape == (6, 0, 512)
    assert_equal(tokens.patches[:, 1], grid[:, :, 0, 1])  # to the right, not down


def test_maps_with_channels_last_are_rows_of_patches() -> None:
    class Swapped(nn.Module):
        output_fmt = "NHWC"

        def forward_features(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 8).permute(0, 2, 3, 1)

        def forward_head(self, x: Tensor) -> Tensor:
            return x.mean((1, 2))

    _, _, tokens = student_tokens(Swapped(), IMAGES)
    torch.testing.assert_close(tokens.patches[:, 1], IMAGES[:, :, :8, 8:16].mean((2, 3)))


# ---------------------------------------------------------------------------------------------
# Projectors and grids
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_grids_are_pooled_by_whole_factors_and_else_interpolated(side: int) -> None:
    tokens = torch.randn(2, 16, 5, dtype=torch.float64).float()
    grid = tokens.mT.reshape(2, 5, 4, 4)
    if 4 % side == 0:
        expected = F.avg_pool2d(grid, 4 // side)
    else:
        expected = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_grid(tokens, side), expected.flatten(2).mT)


def test_half_precision_grids_are_interpolated_in_float32() -> None:
    tokens = torch.full((1, 16, 3), 1.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(resize_grid(tokens, 7), torch.ones(1, 49, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens", [4, 9, 16, 49])
def test_a_linear_projector_commutes_with_the_grid(tokens: int) -> None:
    model = transformer("plain", drop_path_rate=0.0)
    heads = heads_of(model, HeadSpec(tokens, 10, True, "linear"))
    nn.init.normal_(heads.projectors[0].bias)
    _, _, own = student_tokens(model, IMAGES)
    [found] = heads(own)
    assert found.shape == (6, tokens, 10)
    side = math.isqrt(tokens)
    torch.testing.assert_close(found, heads.projectors[0](resize_grid(own.patches, side)))
    torch.testing.assert_close(found, resize_grid(heads.projectors[0](own.patches), side))


@pytest.mark.parametrize(
    "kind, token, expected",
    [
        ("distilled", "auto", "distillation"), ("distilled", "class", "class"),
        ("plain", "auto", "class"), ("plain", "mean", "mean"), ("average", "auto", "mean"),
        ("average", "class", "class"),
    ],
)  # fmt: skip
def test_the_token_that_predicts(kind: str, token: str, expected: str) -> None:
    model = transformer(kind, drop_path_rate=0.0)
    heads = heads_of(model, HeadSpec(1, 48, False, "none"), token=token)
    [found] = FeatureStudent(model, heads)(IMAGES)[1]
    tokens = model.forward_features(IMAGES)
    prefix = model.num_prefix_tokens
    like = {"class": tokens[:, :1], "distillation": tokens[:, 1:2],
            "mean": tokens[:, prefix:].mean(1, keepdim=True)}  # fmt: skip
    assert_equal(found, like[expected])


def test_projectors_and_their_initial_weights() -> None:
    model = transformer("plain")
    before = torch.get_rng_state()
    heads = heads_of(model, ONE, HeadSpec(16, 600, True, "mlp"), hidden=900)
    linear, mlp = heads.projectors
    assert [type(part).__name__ for part in mlp] == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert [tuple(p.weight.shape) for p in (linear, mlp[0], mlp[3])] == [
        (10, 48), (900, 48), (600, 900)
    ]  # fmt: skip
    for layer in (linear, mlp[0], mlp[3]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()
    torch.set_rng_state(before)
    again = heads_of(model, ONE, HeadSpec(16, 600, True, "mlp"), hidden=900)
    assert_equal(again.projectors[1][3].weight, mlp[3].weight)  # the trial draws nothing


def test_a_convolutional_student_predicts_from_the_mean_and_the_map() -> None:
    model = convnet()
    statistics = copy.deepcopy(model.bn1.running_mean)
    heads = FeatureHeads(model, [ONE, GRID], image_size=64)
    assert_equal(model.bn1.running_mean, statistics)  # the trial leaves no trace
    images = IMAGES.repeat(1, 1, 2, 2)
    outputs, (single, grid) = FeatureStudent(model, heads)(images)
    assert single.shape == (6, 1, 10) and grid.shape == (6, 16, 10)
    assert_equal(outputs, model(images))


def test_the_student_is_saved_as_without_projectors() -> None:
    model = transformer()
    student = FeatureStudent(model, heads_of(model))
    names = student.state_dict().keys()
    assert {name[6:] for name in names if name.startswith("model.")} == model.state_dict().keys()
    assert {name for name in names if not name.startswith("model.")} == {
        f"heads.projectors.{n}.{part}" for n in (0, 1) for part in ("weight", "bias")
    }
    assert len([*student.heads.parameters()]) == 4


# ---------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------


class OwnForward(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def own_forward() -> nn.Module:
    model = transformer("plain")
    model.__class__ = OwnForward
    return model


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda: small_convnet(7), {}, "Sequential lacks forward_features"),
        (own_forward, {}, "those of OwnForward are not"),
        (convnet, {"block": 1}, "student_block=1 needs a vision transformer of timm, not ResNet"),
        (transformer, {"block": 3}, "student_block=3: the student has 3 blocks"),
        (transformer, {"block": -4}, "student_block=-4: the student has 3 blocks"),
        (convnet, {"token": "class"}, "token=class: ResNet has no class token: choose auto"),
        (STUDENTS["plain"], {"token": "distillation"}, "has no distillation token: choose auto"),
        (transformer, {"token": "cls"}, "must be one of auto, .* not 'cls'"),
        (STUDENTS["dropped patches"], {}, "model.patch_drop=0.25 leaves out patches"),
        (lambda: transformer("plain", img_size=(32, 48)), {}, "fails: AssertionError"),
    ],
)  # fmt: skip
def test_students_without_the_features_are_refused(make, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        heads_of(make(), **options)


def test_projectors_that_do_not_fit_are_refused() -> None:
    model = transformer()
    with pytest.raises(InputError, match="have 48 channels, the teacher's features 10: choose lin"):
        heads_of(model, HeadSpec(1, 10, False, "none"))
    with pytest.raises(InputError, match="must be of linear, mlp, none, not 'conv'"):
        heads_of(model, HeadSpec(1, 10, False, "conv"))


def test_dropped_patches_are_fine_for_a_token() -> None:
    heads_of(STUDENTS["dropped patches"](), ONE)


# ---------------------------------------------------------------------------------------------
# Compiled, and over several processes
# ---------------------------------------------------------------------------------------------


def loss_and_gradients(forward, student: FeatureStudent, images: Tensor = IMAGES) -> list[Tensor]:
    student.zero_grad()
    outputs, predictions = seeded(forward, images)
    loss = sum(x.square().mean() for x in (*as_tuple(outputs), *predictions))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_a_compiled_student_computes_the_same(mode: str) -> None:
    torch._dynamo.reset()
    model = fuse(transformer(), kernels=())
    student = FeatureStudent(model, heads_of(model, HeadSpec(9, 10, True, "mlp"), ONE, block=1))
    expected = loss_and_gradients(student, student)
    forward = student
    if mode == "blocks":
        compile_blocks(model, backend="aot_eager")
    else:
        forward = torch.compile(student, dynamic=False, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for got, like in zip(loss_and_gradients(forward, student), expected, strict=True):
        torch.testing.assert_close(got, like, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    torch._dynamo.reset()


def rank_of_two(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    model = fuse(transformer(), kernels=())
    torch.manual_seed(3)
    student = FeatureStudent(model, heads_of(model))
    set_batch_part(model, 3 * rank, 6)
    found = loss_and_gradients(
        DistributedDataParallel(student), student, IMAGES[3 * rank : 3 * rank + 3]
    )
    if rank == 0:
        torch.save(found[1:], Path(folder) / "gradients")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_have_the_gradients_of_one(tmp_path) -> None:
    children = [start_forked(rank_of_two, rank, str(tmp_path)) for rank in range(2)]
    model = fuse(transformer(), kernels=())
    torch.manual_seed(3)
    student = FeatureStudent(model, heads_of(model))
    set_batch_part(model, 0, 6)
    expected = loss_and_gradients(student, student)[1:]
    for child in children:
        child.join()
        assert child.exitcode == 0
    found = torch.load(tmp_path / "gradients", weights_only=True)
    for got, like in zip(found, expected, strict=True):
        torch.testing.assert_close(got, like, rtol=1e-4, atol=1e-6)
