"""A fused model is timm's model: outputs, gradients, random draws and state dicts."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.models import create_student, fuse, unfuse
from deit_fast.training.step import compile_blocks
from helpers.fused import IMAGES, KERNELS, NAMES, SMALL, FlopCount, assert_same, build, run
from helpers.kernels import DEVICE, outer_run, run_in_the_interpreter

fusing = sys.modules["deit_fast.models.fuse"]  # the name in the package is the function's


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("kernels", [(), *((name,) for name in KERNELS[:3]), KERNELS])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_equals_timm(kind: str, kernels: tuple[str, ...], drop_path: float) -> None:
    model = build(kind, drop_path_rate=drop_path)
    theirs = run(model.train(), IMAGES)
    mine = run(fuse(model, kernels=kernels), IMAGES)
    assert_same(mine, theirs)
    unfused = run(unfuse(model), IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(unfused[0], theirs[0], strict=True))


@pytest.mark.parametrize("option", ["proj_drop_rate", "attn_drop_rate"])
def test_dropout_and_drop_path_draw_in_timms_order(option: str) -> None:
    model = build("average", drop_path_rate=0.4, **{option: 0.3}).train()
    theirs = run(model, IMAGES)
    assert_same(run(fuse(model, kernels=KERNELS), IMAGES), theirs)


@outer_run
def test_equals_timm_in_the_interpreter() -> None:
    """All three kernels in the interpreter, where this process would run their references."""
    chosen = "(deit3 or distilled) and mlp_backward and 0.4"
    assert "2 passed" in run_in_the_interpreter(f"{__file__}::test_equals_timm", "-k", chosen)


@pytest.mark.parametrize("size", ["tiny", pytest.param("small"), pytest.param("base")])
def test_deit_equals_timm(size: str) -> None:
    """The published shapes, two of the twelve blocks."""
    torch.manual_seed(2)
    model = timm.create_model(f"deit_{size}_distilled_patch16_224", depth=2, drop_path_rate=0.3)
    model.set_distilled_training(True)
    model.train().to(DEVICE)
    images = torch.randn(2, 3, 224, 224).to(DEVICE)
    theirs = run(model, images)
    assert_same(run(fuse(model, kernels=KERNELS), images), theirs)


def assert_no_worse_in_bf16(model: nn.Module, images: Tensor, compiled: bool = False) -> None:
    """Errors of a bf16 training step against float64: twice timm's at most, plus one bf16 unit.

    Under autocast the stream and the branches have different dtypes, and the weights a third.
    """

    def step(model: nn.Module, dtype: torch.dtype, forward: Callable | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = (forward or model)(images.double() if dtype == torch.float64 else images)
        gradients = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
        parameters = [*model.parameters()]
        return [*(x.detach() for x in outputs),
                *torch.autograd.grad(outputs, parameters, gradients)]  # fmt: skip

    names = ["class logits", "distillation logits", *(name for name, _ in model.named_parameters())]
    exact = step(copy.deepcopy(model).double(), torch.float64)
    theirs = step(copy.deepcopy(model), torch.bfloat16)
    fused = fuse(copy.deepcopy(model), kernels=KERNELS)
    mine = step(fused, torch.bfloat16, torch.compile(fused) if compiled else None)
    for name, got, other, true in zip(names, mine, theirs, exact, strict=True):
        mistake, allowed = ((x.double() - true).norm() for x in (got, other))
        unit = torch.finfo(torch.bfloat16).eps * true.norm()
        assert mistake <= 2 * allowed + unit, f"{name}: {mistake:.1e}, timm's {allowed:.1e}"


def test_bf16_errors_are_no_larger_than_timms() -> None:
    assert_no_worse_in_bf16(build("distilled").train(), IMAGES)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_bf16_errors_are_no_larger_than_timms_on_a_gpu(size: str, compiled: bool) -> None:
    """The published shapes with two of the twelve blocks, called as in a run."""
    model = timm.create_model(f"deit_{size}_distilled_patch16_224", depth=2)
    model.set_distilled_training(True)
    assert_no_worse_in_bf16(
        model.train().to(DEVICE), torch.randn(8, 3, 224, 224).to(DEVICE), compiled
    )


@pytest.mark.parametrize("kind", NAMES)
def test_evaluation_has_the_structure_and_values_of_timm(kind: str) -> None:
    model = build(kind).eval()
    with torch.no_grad():
        expected = model(IMAGES), model.forward_features(IMAGES)
        fuse(model, kernels=KERNELS)
        got = model(IMAGES), model.forward_features(IMAGES)
        depth = len(model.forward_intermediates(IMAGES, intermediates_only=True))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert depth == 3


def test_state_dicts_are_interchangeable() -> None:
    plain, fused = build("deit3"), fuse(build("deit3"), kernels=KERNELS)
    assert list(plain.state_dict()) == list(fused.state_dict())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.5)
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(IMAGES), plain(IMAGES), rtol=1e-5, atol=1e-5)


def test_unfuse_restores_the_classes() -> None:
    model = build("distilled")
    kinds = [type(module) for module in model.modules()]
    fuse(fuse(model, kernels=KERNELS), kernels=())
    assert any(type(m) is not kind for m, kind in zip(model.modules(), kinds, strict=True))
    unfuse(unfuse(model))
    assert [type(module) for module in model.modules()] == kinds


def test_fused_models_are_copied_and_compiled() -> None:
    model = fuse(build("deit3", drop_path_rate=0.0), kernels=KERNELS)
    expected = run(model, IMAGES)
    assert_same(run(copy.deepcopy(model), IMAGES), expected, rtol=0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, gradients = run(compiled, IMAGES)
    names = {name.removeprefix("_orig_mod."): value for name, value in gradients.items()}
    assert_same((outputs, names), expected)


@pytest.mark.parametrize("kind", ["distilled", "average"])
def test_checkpointing_and_masks_still_work(kind: str) -> None:
    model = build(kind).train()
    tokens = model.pos_embed.shape[1]
    mask = torch.rand(tokens, tokens, device=DEVICE).tril() > 0
    expected, masked = run(model, IMAGES), model.forward_features(IMAGES, attn_mask=mask)
    fuse(model, kernels=KERNELS)
    torch.testing.assert_close(model.forward_features(IMAGES, attn_mask=mask), masked)
    model.set_grad_checkpointing(True)
    assert_same(run(model, IMAGES), expected)


def test_the_last_block_computes_only_what_the_heads_read() -> None:
    """Counts the products of the linear layers: 10/12 of one block's are saved."""

    def flops(model: nn.Module) -> int:
        with FlopCount() as counter:
            model(torch.rand(1, 3, 224, 224))
        return counter.total

    model = timm.create_model("deit_small_distilled_patch16_224").cpu()
    plain = flops(model)
    width, patches = 384, 196
    assert plain - flops(fuse(model, kernels=())) == 2 * patches * 10 * width**2


# ---------------------------------------------------------------------------------------------
# Stochastic depth on subsets
# ---------------------------------------------------------------------------------------------


def test_subset_keeps_a_fixed_number_and_the_mean() -> None:
    model = build("plain", depth=1, global_pool="avg").double()
    fuse(model, kernels=(), stochastic_depth="subset").train()
    images = IMAGES[:1].double().expand(8, -1, -1, -1)
    block = model.blocks[0]
    block.drop_path1 = timm.layers.DropPath(0.5)  # timm's own rate of the only block is 0
    block.mlp.forward = lambda x: torch.zeros_like(x)
    tokens = model._pos_embed(model.patch_embed(images)).detach()
    whole = block.eval()(tokens) - tokens
    block.train()
    kept = torch.zeros(8, dtype=torch.float64)
    for _ in range(200):
        added = block(tokens) - tokens
        factor = (added / whole).flatten(1).median(1).values
        torch.testing.assert_close(
            factor.sort().values, torch.tensor([0.0] * 4 + [2.0] * 4).double()
        )
        kept += factor / 2
    assert ((kept / 200 - 0.5).abs() < 5 * (0.25 / 200) ** 0.5).all()


def test_subset_without_dropping_keeps_every_sample() -> None:
    model = build("distilled", drop_path_rate=0.0)
    expected = run(model, IMAGES)
    assert_same(run(fuse(model, kernels=KERNELS, stochastic_depth="subset"), IMAGES), expected)


@pytest.mark.parametrize("kernels", [(), KERNELS])
def test_subset_saves_the_dropped_work(kernels: tuple[str, ...]) -> None:
    def flops(stochastic_depth: str) -> int:
        model = build("average", drop_path_rate=0.5)
        for block in model.blocks:
            block.drop_path1 = block.drop_path2 = timm.layers.DropPath(0.5)
        fuse(model, kernels=kernels, stochastic_depth=stochastic_depth).train()
        with FlopCount() as counter:
            model(IMAGES)
        return counter.total - outside

    outside = 2 * 6 * 16 * (3 * 8 * 8) * 48 + 2 * 6 * 48 * 7  # patch embedding and head
    assert flops("subset") * 2 == flops("sample")


# ---------------------------------------------------------------------------------------------
# Parts that cannot be fused
# ---------------------------------------------------------------------------------------------


def change_activation(model: nn.Module) -> None:
    model.blocks[1].mlp.act = nn.ReLU()


def change_norm(model: nn.Module) -> None:
    model.blocks[1].norm2 = nn.GroupNorm(1, 17).to(DEVICE)


def change_scale(model: nn.Module) -> None:
    model.blocks[1].ls1 = nn.Dropout(0.0)


def normed_queries(model: nn.Module) -> None:
    model.blocks[1].attn.q_norm = nn.LayerNorm(16).to(DEVICE)


@pytest.mark.parametrize(
    "change, reason",
    [
        (change_activation, "block 1: bias_gelu: has activation ReLU()"),
        (change_norm, "block 1: has norm2 GroupNorm"),
        (change_scale, "block 1: has ls1 Dropout"),
        (normed_queries, "block 1: attention: has q_norm LayerNorm"),
    ],
)
def test_a_part_that_cannot_be_fused_is_named_and_stays(
    change: Callable[[nn.Module], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("plain")
    change(model)
    expected = run(model, IMAGES)
    with caplog.at_level(logging.WARNING, "deit_fast"):
        fuse(model, kernels=KERNELS)
    assert [record.message for record in caplog.records if reason in record.message]
    assert len(caplog.records) == 1
    assert type(model.blocks[0]) is fusing.FusedBlock
    assert_same(run(model, IMAGES), expected)


def test_a_model_with_another_forward_keeps_it() -> None:
    class Doubled(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Doubled(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
    model.to(DEVICE)
    expected = run(model, IMAGES)
    assert type(fuse(model, kernels=KERNELS)) is Doubled
    assert type(model.blocks[0]) is fusing.FusedBlock
    assert_same(run(model, IMAGES), expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="unknown kernel 'atention'"):
        fuse(build("plain"), kernels=("atention",))
    with pytest.raises(InputError, match="'mlp_backward' needs 'bias_gelu' beside it"):
        fuse(build("plain"), kernels=("mlp_backward",))
    with pytest.raises(InputError, match="not 'some'"):
        fuse(build("plain"), stochastic_depth="some")
    with pytest.raises(InputError, match="not Linear"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(InputError, match="'subset' needs a fused transformer"):
        create_student("deit_tiny_patch16_224", 3, fused=False, stochastic_depth="subset")


def test_create_student_fuses() -> None:
    small = {key: value for key, value in SMALL.items() if key != "img_size"}
    model = create_student("deit_tiny_distilled_patch16_224", 7, img_size=32, **small)
    assert isinstance(model.blocks[0], fusing.FusedBlock)
    assert model.blocks[0].kernels == frozenset(fusing.default_kernels())
    chosen = create_student(
        "deit_tiny_distilled_patch16_224", 7, img_size=32, kernels=("bias_gelu",), **small
    )
    assert chosen.blocks[0].kernels == {"bias_gelu"}
    with pytest.raises(InputError, match=r"kernels=\('attention',\) needs a fused transformer"):
        create_student("deit_tiny_patch16_224", 7, fused=False, kernels=("attention",))
    plain = create_student("deit_tiny_distilled_patch16_224", 7, img_size=32, fused=False, **small)
    assert type(plain.blocks[0]) is Block


@pytest.mark.slow
def test_compiled_blocks_of_a_fused_model_equal_the_model() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = build("distilled").train()
    compiled = fuse(build("distilled").train(), kernels=KERNELS)
    compile_blocks(compiled)
    images = torch.randn(4, 3, 32, 32, device=DEVICE)
    assert_same(run(compiled, images), run(plain, images))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4  # the embedding; first, middle and last block
