"""What a fused stream adds to timm's: folded bias gradients, patch rows, a dtype, shadows.

The folding runs where the kernels run: the tests are repeated in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from deit_fast.errors import InputError
from deit_fast.kernels import add_layer_norm, ingest
from deit_fast.models import create_student, fuse, unfuse
from deit_fast.models.fuse import patch_side
from deit_fast.models.shadow import Shadows
from deit_fast.training.compiling import compile_blocks
from helpers.fused import (
    FEW_IMAGES,
    FOLDS,
    KERNELS,
    assert_same,
    build_wide,
    run,
    shadow_step,
)
from helpers.kernels import DEVICE, INTERPRETED, outer_run, run_in_the_interpreter
from helpers.plans import MEAN, STD, photos, random_rows


@outer_run
def test_all_in_the_interpreter() -> None:
    assert "failed" not in run_in_the_interpreter(__file__)


@pytest.mark.parametrize("kind", ["distilled", "deit3", "average"])
def test_bias_gradients_against_float64(kind: str) -> None:
    """Each bias separately: a gradient whose exact value is 0 has no relative error."""
    model = build_wide(kind, drop_path_rate=0.3).train()
    _, true = run(copy.deepcopy(model).double(), FEW_IMAGES.double())
    _, mine = run(fuse(model, kernels=KERNELS), FEW_IMAGES)
    for name, gradient in mine.items():
        if not name.endswith("bias"):
            continue
        pairs = [(gradient, true[name])]
        if name.endswith("qkv.bias"):
            pairs = list(zip(gradient.chunk(3), true[name].chunk(3), strict=True))
            keys, exact_keys = pairs.pop(1)
            queries = pairs[0][1].norm()
            assert exact_keys.norm() <= 1e-10 * queries, "the keys' bias has no gradient"
            assert keys.norm() <= 1e-5 * queries
            if FOLDS and not name.startswith("blocks.1"):  # the last block has its own attention
                assert not keys.any()
        for found, expected in pairs:
            assert (found - expected).norm() <= 1e-5 * expected.norm(), name


def hooked(layer: nn.Module, calls: list[str]) -> None:
    layer.register_forward_hook(lambda *_: calls.append("hook"))


def hooked_before(layer: nn.Module, calls: list[str]) -> None:
    layer.register_forward_pre_hook(lambda *_: calls.append("hook"))


def hooked_backward(layer: nn.Module, calls: list[str]) -> None:
    layer.register_full_backward_hook(lambda *_: calls.append("hook"))


def overridden(layer: nn.Module, calls: list[str]) -> None:
    forward = layer.forward

    def wrapper(x: Tensor) -> Tensor:
        calls.append("hook")
        return forward(x)

    layer.forward = wrapper


WAYS = [hooked, overridden] if INTERPRETED else [hooked, hooked_before, hooked_backward, overridden]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_hook_on_a_layer_runs_and_changes_no_gradient(way, layer: str) -> None:
    model = build_wide("distilled", drop_path_rate=0.3).train()
    theirs = run(model, FEW_IMAGES)
    fuse(model, kernels=KERNELS)
    calls: list[str] = []
    for number in (0, 1):  # the last block has its own attention
        way(model.blocks[number].get_submodule(layer), calls)
    assert_same(run(model, FEW_IMAGES), theirs)
    assert calls == ["hook"] * 2


@pytest.mark.parametrize("name", ["qkv.bias", "proj.bias", "fc2.bias", "qkv.weight", "proj.weight"])
def test_a_frozen_parameter_changes_no_other_gradient(name: str) -> None:
    model = build_wide("distilled").train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.endswith(name))
    outputs, gradients = run(model, FEW_IMAGES)
    mine = run(fuse(model, kernels=KERNELS), FEW_IMAGES)
    assert {key for key, value in mine[1].items() if value is None} == {
        key for key, value in gradients.items() if value is None
    }
    keep = [key for key, value in gradients.items() if value is not None]
    assert_same(
        (mine[0], {key: mine[1][key] for key in keep}),
        (outputs, {key: gradients[key] for key in keep}),
    )


# ---------------------------------------------------------------------------------------------
# Rows of patches
# ---------------------------------------------------------------------------------------------


def rows_of(images: Tensor, side: int) -> Tensor:
    """[B, 3, S, S] to [B, N, 3 side^2]: channels, then lines, then columns of a patch."""
    rows = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # B, 3, y, side, x, side
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def test_rows_of_patches_give_the_output_of_images() -> None:
    model = build_wide("distilled").train()
    fuse(model, kernels=KERNELS)
    assert patch_side(model) == 8
    assert_same(run(model, rows_of(FEW_IMAGES, 8)), run(model, FEW_IMAGES))


def test_ingest_writes_the_rows_that_the_model_expects() -> None:
    arguments = (photos(4, 32), random_rows(6, 4), MEAN, STD, torch.float32)
    rows = ingest(*arguments, layout="patches", patch=8)
    assert torch.equal(rows, rows_of(ingest(*arguments), 8))


@pytest.mark.parametrize("change", [{"dynamic_img_pad": True}, {"dynamic_img_size": True},
                                    {"in_chans": 1}])  # fmt: skip
def test_a_patch_embedding_that_needs_images_accepts_no_patches(change: dict) -> None:
    model = fuse(build_wide("plain", **change), kernels=KERNELS)
    assert patch_side(model) is None


def test_a_model_that_is_not_fused_accepts_no_patches() -> None:
    model = build_wide("plain")
    assert patch_side(model) is None
    assert patch_side(unfuse(fuse(model, kernels=()))) is None


# ---------------------------------------------------------------------------------------------
# The residual stream in bfloat16
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [(), KERNELS])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_stream_is_bfloat16_and_nothing_else_changes(
    kernels: tuple[str, ...], autocast: bool
) -> None:
    """Its error against float64 is the rounding of each sum, a few units of bfloat16."""
    model = build_wide("deit3", drop_path_rate=0.3).train()
    true = run(copy.deepcopy(model).double(), FEW_IMAGES.double())
    dtypes: set[torch.dtype] = set()

    def step(residual: str) -> tuple:
        fused = fuse(copy.deepcopy(model), kernels=kernels, residual=residual)
        norm_in = fused.blocks[1].norm1.register_forward_pre_hook(
            lambda _, x: dtypes.add(x[0].dtype)
        )
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            result = run(fused, FEW_IMAGES)
        norm_in.remove()
        return result

    def errors(result: tuple) -> list[float]:
        pairs = [*zip(result[0], true[0], strict=True)]
        pairs += [(result[1][name], true[1][name]) for name in true[1]]
        return [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]

    wide, narrow = errors(step("float32")), errors(step("bfloat16"))
    assert max(narrow) <= max(3 * max(wide), 0.05)
    assert sum(narrow) > sum(wide), "nothing was rounded"


@pytest.mark.parametrize("kernels", [(), KERNELS])
def test_the_mean_after_a_bfloat16_stream_is_not_rounded(kernels: tuple[str, ...]) -> None:
    """global_pool="avg" norms after the mean; without autocast the head needs float32."""
    model = build_wide("average").train()
    (true, *_), _ = run(model, FEW_IMAGES)
    (narrow, *_), _ = run(fuse(model, kernels=kernels, residual="bfloat16"), FEW_IMAGES)
    assert narrow.dtype == torch.float32
    assert (narrow - true).norm() <= 0.05 * true.norm()


@pytest.mark.parametrize("kernels", [(), KERNELS])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.1.norm2", "norm"])
def test_a_norm_without_weights_is_not_given_bfloat16(
    kernels: tuple[str, ...], autocast: bool, path: str
) -> None:
    """It gets the dtype of the model's weights, which the next layer needs without autocast."""
    results = []
    for residual in ("float32", "bfloat16"):
        model = fuse(build_wide("plain").train(), kernels=kernels, residual=residual)
        model.set_submodule(path, nn.LayerNorm(96, elementwise_affine=False))
        seen: list[torch.dtype] = []
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, x, s=seen: s.append(x[0].dtype)
        )
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            (output, *_), _ = run(model, FEW_IMAGES)
        assert seen == [torch.float32]
        results.append(output)
    true, narrow = results
    assert narrow.dtype == true.dtype and (narrow - true).norm() <= 0.05 * true.norm()


@pytest.mark.skipif(not FOLDS, reason="the reference saves float32 copies")
def test_a_bfloat16_stream_saves_bfloat16_rows() -> None:
    """No float32 tensor of the stream's size is saved for the backward."""
    model = build_wide("distilled").train()
    fuse(model, kernels=KERNELS, residual="bfloat16")
    saved: list[torch.dtype] = []

    def note(x: Tensor) -> Tensor:
        if x.dim() == 3 and x.shape[1:] == (18, 96):
            saved.append(x.dtype)
        return x

    with (torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
          torch.autocast(DEVICE, torch.bfloat16)):  # fmt: skip
        model(FEW_IMAGES)
    assert saved and set(saved) == {torch.bfloat16}


def test_an_unsupported_residual_is_refused() -> None:
    with pytest.raises(InputError, match="residual must be one of float32, bfloat16, not 'half'"):
        fuse(build_wide("plain"), residual="half")
    model = build_wide("plain")
    model.blocks[1].norm2 = nn.GroupNorm(3, 96).to(DEVICE)
    with pytest.raises(InputError, match="residual=bfloat16 needs a model whose blocks"):
        fuse(model, residual="bfloat16")
    assert type(model.blocks[0]).__name__ == "Block", "the model is as it was"
    with pytest.raises(InputError, match="'bfloat16' needs a fused transformer"):
        create_student("deit_tiny_patch16_224", 3, fused=False, residual="bfloat16")


def test_the_layer_norm_reference_sums_bfloat16_gradients_in_float32() -> None:
    """PyTorch's layer_norm on a CPU does not: the gradient of bias is 22 % off for 1,088 rows."""
    rows = torch.randn(1088, 64, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    grad = torch.randn(1088, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    weight, bias = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE, requires_grad=True)
    _, normed = add_layer_norm(rows.view(17, 64, 64), None, weight, bias, eps=1e-6)
    (found,) = torch.autograd.grad(normed, bias, grad.view(17, 64, 64))
    true = grad.double().sum(0)
    assert (found.double() - true).norm() <= 1e-5 * true.norm()


# ---------------------------------------------------------------------------------------------
# Shadow weights
# ---------------------------------------------------------------------------------------------


def test_shadow_weights_give_autocasts_outputs_and_more_exact_gradients() -> None:
    model = build_wide("distilled", drop_path_rate=0.3).train()
    true = run(copy.deepcopy(model).double(), FEW_IMAGES.double())
    fuse(model, kernels=KERNELS)
    shadows = Shadows(model, torch.bfloat16)
    assert len(shadows._copies) == 2 * 2 * 4
    cast, read = shadow_step(model, None), shadow_step(model, shadows)
    assert all(torch.equal(x, y) for x, y in zip(cast[0], read[0], strict=True))
    for name, gradient in read[1].items():
        assert gradient.dtype == torch.float32
        theirs, mine = ((x - true[1][name]).norm() for x in (cast[1][name], gradient))
        assert mine <= 1.1 * theirs + 1e-3 * true[1][name].norm(), name


def test_shadows_follow_the_weights_and_are_read_only_in_training_steps() -> None:
    model = fuse(build_wide("distilled").train(), kernels=KERNELS)
    shadows = Shadows(model, torch.bfloat16)
    before = shadow_step(model, shadows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    after, plain = shadow_step(model, shadows), shadow_step(model, None)
    assert not torch.equal(before[0][0], after[0][0])
    assert all(torch.equal(x, y) for x, y in zip(after[0], plain[0], strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1
    stale = run(model, FEW_IMAGES)  # outside of the step nothing reads them
    assert_same(stale, run(copy.deepcopy(model), FEW_IMAGES))


def test_shadows_follow_weights_whose_memory_is_replaced() -> None:
    model = fuse(build_wide("distilled").train(), kernels=KERNELS)
    shadows = Shadows(model, torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1
    read, plain = shadow_step(model, shadows), shadow_step(model, None)
    assert all(torch.equal(x, y) for x, y in zip(read[0], plain[0], strict=True))


class Float32Norm(nn.LayerNorm):
    """A LayerNorm as autocast runs it on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).float()


def test_a_shadow_casts_its_input() -> None:
    """As in a training step, the backward runs outside autocast."""
    model = build_wide("distilled").train()
    for block in model.blocks:
        block.mlp.norm = Float32Norm(block.mlp.fc2.in_features)
    fuse(model, kernels=KERNELS).to(DEVICE)
    shadows = Shadows(model, torch.bfloat16)
    shadows.refresh()
    gradients = []
    for current in (contextlib.nullcontext(), shadows.current()):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16), current:
            heads = model(FEW_IMAGES.to(DEVICE))
        sum(z.float().square().sum() for z in heads).backward()
        gradients.append([block.mlp.fc2.weight.grad.clone() for block in model.blocks])
    for plain, read in zip(*gradients, strict=True):
        assert (read - plain).norm() <= 0.05 * plain.norm()


def test_copies_pickles_and_state_dicts_contain_no_shadows() -> None:
    model = fuse(build_wide("distilled").train(), kernels=KERNELS)
    names = set(model.state_dict())
    Shadows(model, torch.bfloat16)
    assert set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.blocks[0]))):
        assert all(getattr(module, "shadows", None) is None for module in other.modules())
    assert not any("shadows" in module.__dict__ for module in unfuse(model).modules())


# ---------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "graphs"), [("model", 1), ("blocks", 5)])
def test_the_stream_compiles_without_graph_breaks(mode: str, graphs: int) -> None:
    """Blocks: the embedding, and the first, second, middle and last block."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build_wide("distilled", depth=4, drop_path_rate=0.3).train()
    fuse(model, kernels=KERNELS, residual="bfloat16")
    shadows = Shadows(model, torch.bfloat16)
    plain = shadow_step(model, shadows)
    counter = CompileCounterWithBackend("aot_eager")
    if mode == "blocks":
        compile_blocks(model, backend=counter)
    else:
        model.compile(backend=counter, dynamic=False)
    for _ in range(2):
        compiled = shadow_step(model, shadows)
        assert counter.frame_count == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same(compiled, plain, rtol=1e-2)
