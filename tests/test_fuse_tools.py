"""Tools that take a timm model take a fused one: copy, pickle, script, trace, export."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from timm.models._features_fx import create_feature_extractor
from timm.models.vision_transformer import Block, VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from deit_fast.errors import InputError
from deit_fast.kernels import distillation_loss
from deit_fast.models import fuse, swapped, unfuse
from deit_fast.models.fused import FusedForward
from deit_fast.models.shadow import Shadows
from deit_fast.training.step import compile_blocks
from helpers.fused import FEW_IMAGES, FOLDS, IMAGES, KERNELS, SMALL, assert_same, build, run
from helpers.kernels import DEVICE

fusing = sys.modules["deit_fast.models.fuse"]  # the name in the package is the function's
OPTIONS = {
    "no kernels": {"kernels": ()},
    "kernels": {"kernels": KERNELS, "stochastic_depth": "subset", "residual": "bfloat16"},
}


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def sent(model: nn.Module) -> nn.Module:
    """As to a process that was spawned: its tensors are in shared memory."""
    return pickle.loads(ForkingPickler.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Sized(VisionTransformer):
    """A user's subclass that has more state and pickles it its own way."""

    def __init__(self) -> None:
        super().__init__(**SMALL, num_classes=7)
        self.lock = object

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name != "lock"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"lock": object})


class Rebuilt(VisionTransformer):
    """A user's subclass that pickles the arguments of its class and its state dict."""

    def __init__(self, depth: int) -> None:
        super().__init__(**(SMALL | {"depth": depth}), num_classes=7)

    def __reduce__(self) -> tuple:
        return type(self)._load, (len(self.blocks), self.state_dict())

    @classmethod
    def _load(cls, depth: int, state: dict) -> Rebuilt:
        model = cls(depth)
        model.load_state_dict(state)
        return model


def children(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


# ---------------------------------------------------------------------------------------------
# Copies and pickles
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["distilled", "deit3", "subclass"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, saved, sent])
def test_a_copy_is_fused_with_the_same_kernels_and_options(
    kind: str, options: str, again: Callable[[nn.Module], nn.Module]
) -> None:
    plain = Sized().to(DEVICE) if kind == "subclass" else build(kind, drop_path_rate=0.3)
    model = fuse(plain, **OPTIONS[options]).train()
    other = again(model)
    assert type(other) is type(model) and children(other) == children(model)
    for mine, theirs in zip(other.blocks, model.blocks, strict=True):
        assert (mine.kernels, mine.subset) == (theirs.kernels, theirs.subset)
    assert other.residual_dtype == model.residual_dtype
    assert_same(run(other, FEW_IMAGES), run(model, FEW_IMAGES), rtol=0)
    assert children(unfuse(other)) == children(unfuse(model))
    assert type(other.blocks[0]) is Block
    assert kind != "subclass" or hasattr(other, "lock")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_pickles(protocol: int) -> None:
    model = fuse(build("distilled"), kernels=KERNELS)
    other = pickle.loads(pickle.dumps(model, protocol))
    assert type(other) is type(model)
    torch.testing.assert_close(other(FEW_IMAGES), model(FEW_IMAGES), rtol=0, atol=0)


def test_a_model_that_pickles_its_arguments_comes_back_as_it_builds_itself() -> None:
    model = fuse(Rebuilt(2).to(DEVICE).eval(), kernels=KERNELS)
    other = pickled(model)
    assert type(other) is Rebuilt and type(other.blocks[0]) is Block
    torch.testing.assert_close(other.to(DEVICE).eval()(FEW_IMAGES), model(FEW_IMAGES))


def test_a_pickle_means_the_same_in_a_process_with_other_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that loads it has not fused a model of this class, nor has it the GPU's table."""
    model = fuse(build("plain").eval(), kernels=("bias_gelu",))
    content = pickle.dumps(model)
    swapped._made.cache_clear()
    monkeypatch.setitem(fusing.DEFAULT_KERNELS, "cpu", ("attention",))
    other = pickle.loads(content)
    assert type(other).__name__ == "FusedVisionTransformer"
    assert [block.kernels for block in other.blocks] == [{"bias_gelu"}] * 3
    torch.testing.assert_close(other(FEW_IMAGES), model(FEW_IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize(
    "how, again",
    [("blocks", copy.deepcopy), ("blocks", pickled), ("module", pickled), ("wrapper", pickled)],
)
def test_a_copy_of_a_compiled_model_runs_its_own_weights(
    how: str, again: Callable[[nn.Module], nn.Module]
) -> None:
    torch._dynamo.reset()
    model = fuse(build("plain", depth=2).eval(), kernels=KERNELS)
    compiled = model
    if how == "blocks":
        compile_blocks(model, backend="eager")
    elif how == "module":
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    before = compiled(FEW_IMAGES)
    other = again(compiled)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    plain = build("plain", depth=2).eval()
    plain.load_state_dict(getattr(other, "_orig_mod", other).state_dict())
    torch.testing.assert_close(other(FEW_IMAGES), plain(FEW_IMAGES))
    torch.testing.assert_close(compiled(FEW_IMAGES), before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# Scripts, traces and exports
# ---------------------------------------------------------------------------------------------

FUSED = pytest.mark.parametrize("kernels", [(), KERNELS], ids=["plain", "kernels"])


@FUSED
@pytest.mark.parametrize("inside", [False, True])
def test_script_compiles_timms_own_model(kernels: tuple[str, ...], inside: bool) -> None:
    model = fuse(build("distilled").eval(), kernels=kernels)
    kinds = children(model)
    scripted = torch.jit.script(nn.Sequential(nn.Identity(), model) if inside else model)
    assert children(model) == kinds
    expected = build("distilled").eval()(FEW_IMAGES)
    torch.testing.assert_close(scripted(FEW_IMAGES), expected, rtol=0, atol=0)
    with torch.no_grad():
        model.head.bias.add_(1)  # one parameter for both
        model.head_dist.bias.add_(1)
    torch.testing.assert_close(scripted(FEW_IMAGES), expected + 1)


@FUSED
@pytest.mark.parametrize("part", ["blocks.2", "blocks.2.attn", "blocks.2.mlp", "patch_embed"])
def test_a_part_is_scripted_and_traced_by_fx(kernels: tuple[str, ...], part: str) -> None:
    plain = build("plain").eval().get_submodule(part)
    module = fuse(build("plain").eval(), kernels=kernels).get_submodule(part)
    x = FEW_IMAGES if part == "patch_embed" else torch.randn(3, 17, 48, device=DEVICE)
    expected = plain(x)
    torch.testing.assert_close(torch.jit.script(module)(x), expected, rtol=0, atol=0)
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.script(traced)(x), expected, rtol=0, atol=0)


@FUSED
@pytest.mark.parametrize("kind", ["distilled", "average"])
def test_fx_sees_timms_own_graph(kernels: tuple[str, ...], kind: str) -> None:
    plain, model = build(kind).eval(), fuse(build(kind).eval(), kernels=kernels)
    theirs, mine = torch.fx.symbolic_trace(plain), torch.fx.symbolic_trace(model)
    assert [str(node) for node in mine.graph.nodes] == [str(node) for node in theirs.graph.nodes]
    scripted = torch.jit.script(mine)
    for graph in (mine, scripted):
        torch.testing.assert_close(graph(FEW_IMAGES), plain(FEW_IMAGES), rtol=0, atol=0)
    if kind == "average":  # timm's resampling of positions is no part of the graph
        plain, model = (
            f(build(kind, dynamic_img_size=True).eval()) for f in (nn.Module.eval, fuse)
        )
    nodes = ["blocks.1.add_1", "blocks.2.mlp.fc1"]
    got, expected = (create_feature_extractor(m, nodes)(FEW_IMAGES) for m in (model, plain))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@FUSED
def test_exported_programs_hold_timms_own_operations(kernels: tuple[str, ...]) -> None:
    plain, model = build("distilled").eval(), fuse(build("distilled").eval(), kernels=kernels)
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    theirs, mine = (
        torch.export.export(m, (FEW_IMAGES,), dynamic_shapes=shapes) for m in (plain, model)
    )
    assert [node.target for node in mine.graph.nodes] == [
        node.target for node in theirs.graph.nodes
    ]
    torch.testing.assert_close(mine.module()(IMAGES), plain(IMAGES), rtol=0, atol=0)
    fixed = torch.export.export(model, (FEW_IMAGES,)).module()
    torch.testing.assert_close(fixed(FEW_IMAGES), plain(FEW_IMAGES), rtol=0, atol=0)


@FUSED
def test_jit_traces_hold_timms_own_operations(kernels: tuple[str, ...]) -> None:
    plain, model = build("distilled").eval(), fuse(build("distilled").eval(), kernels=kernels)
    traced = torch.jit.trace(model, FEW_IMAGES)
    torch.testing.assert_close(traced(IMAGES), plain(IMAGES), rtol=0, atol=0)


@FUSED
def test_onnx_gives_the_models_outputs(kernels: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = fuse(build("plain").eval().cpu(), kernels=kernels)
    torch.onnx.export(model, (FEW_IMAGES.cpu(),), tmp_path / "model.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: FEW_IMAGES.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(FEW_IMAGES.cpu()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Other derivatives
# ---------------------------------------------------------------------------------------------


def unfused_attention(model: nn.Module) -> nn.Module:
    """SDPA has no forward-mode and no second derivative on a CPU; timm's other form has both."""
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


@FUSED
def test_transforms_of_torch_func(kernels: tuple[str, ...]) -> None:
    plain, model = build("plain").eval(), fuse(build("plain").eval(), kernels=kernels)
    direction = torch.ones_like(FEW_IMAGES)
    parameters = dict(model.named_parameters())

    def each(model: nn.Module) -> list[Tensor]:
        call = functools.partial(torch.func.functional_call, model)
        value, tangent = torch.func.jvp(model, (FEW_IMAGES,), (direction,))
        one_by_one = torch.func.vmap(lambda x: model(x[None])[0])(FEW_IMAGES)
        of_weights = torch.func.grad(lambda p: call(p, (FEW_IMAGES,)).sum())(parameters)
        doubled = {name: 2 * value for name, value in parameters.items()}
        with forward_ad.dual_level():
            dual = model(forward_ad.make_dual(FEW_IMAGES, direction))
            forward_tangent = forward_ad.unpack_dual(dual).tangent
        return [
            value, tangent, one_by_one, *of_weights.values(), call(doubled, (FEW_IMAGES,)),
            forward_tangent,
        ]  # fmt: skip

    for got, expected in zip(
        each(unfused_attention(model)), each(unfused_attention(plain)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@FUSED
def test_second_derivatives(kernels: tuple[str, ...]) -> None:
    """On a CPU the kernels are plain PyTorch; test_bias_gelu_linear.py shows a kernel refuse."""

    def penalty(model: nn.Module) -> list[Tensor]:
        images = FEW_IMAGES.clone().requires_grad_()
        loss = unfused_attention(model)(images).square().sum()
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(model.parameters())))

    plain, model = build("plain").eval(), fuse(build("plain").eval(), kernels=kernels)
    if FOLDS and kernels:
        with pytest.raises(RuntimeError, match=r"no second derivative.*unfuse\(model\) first"):
            penalty(model)
        unfuse(model)
    for got, expected in zip(penalty(model), penalty(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_refuses_second_derivatives() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    loss = distillation_loss(
        logits, None, torch.arange(4), None, kind="none", alpha=0.0, tau=1.0, reduction="numel"
    )
    with pytest.raises(RuntimeError, match=r"no second derivative.*a loss of plain PyTorch"):
        torch.autograd.grad(loss, logits, create_graph=True)


# ---------------------------------------------------------------------------------------------
# fuse and unfuse themselves
# ---------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("order", ["fuse first", "parametrize first"])
def test_parametrized_models_stay_parametrized(order: str) -> None:
    model = build("plain").eval()
    if order == "fuse first":
        fuse(model, kernels=KERNELS)
    parametrize.register_parametrization(model, "pos_embed", Doubled(), unsafe=True)
    if order == "parametrize first":
        fuse(model, kernels=KERNELS)
    plain = build("plain").eval()
    with torch.no_grad():
        plain.pos_embed.mul_(2)
    assert isinstance(model, FusedForward)
    torch.testing.assert_close(model(FEW_IMAGES), plain(FEW_IMAGES))
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(model)
    unfuse(model)
    assert not isinstance(model, FusedForward) and parametrize.is_parametrized(model)
    torch.testing.assert_close(model(FEW_IMAGES), plain(FEW_IMAGES), rtol=0, atol=0)
    fuse(model, kernels=KERNELS)
    parametrize.remove_parametrizations(model, "pos_embed")
    assert type(model).__name__ == "FusedVisionTransformer"
    torch.testing.assert_close(model(FEW_IMAGES), plain(FEW_IMAGES))


def test_unfuse_restores_classes_under_those_of_a_wrapper() -> None:
    """As fully_shard changes classes; it needs a process group, so the class is made here."""
    model = fuse(build("plain").eval(), kernels=KERNELS)

    class Wrapper(nn.Module):
        pass

    for module in (model, *model.blocks):
        kind = type(module)
        module.__class__ = type(f"Wrapped{kind.__name__}", (Wrapper, kind), {})
    for again in (pickle.dumps, copy.deepcopy):
        with pytest.raises(InputError, match=r"WrappedFused\w+ has no pickle.*save state_dict\(\)"):
            again(model)
    unfuse(model)
    assert [base.__name__ for base in type(model).__mro__[:3]] == [
        "WrappedVisionTransformer", "Wrapper", "VisionTransformer"
    ]  # fmt: skip
    assert {type(block).__name__ for block in model.blocks} == {"WrappedBlock"}
    assert not any(isinstance(module, swapped.Swapped) for module in model.modules())
    torch.testing.assert_close(model(FEW_IMAGES), build("plain").eval()(FEW_IMAGES))


def test_unfuse_removes_what_fuse_and_a_run_set() -> None:
    model = build("deit3").train()
    before = [sorted(vars(module)) for module in model.modules()]
    fuse(model, kernels=KERNELS, residual="bfloat16")
    Shadows(model, torch.bfloat16)
    fusing.set_batch_part(model, 0, 6)
    compile_blocks(model, backend="eager")
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)  # the model says so once
    model(FEW_IMAGES)
    unfuse(model)
    assert [sorted(vars(module)) for module in model.modules()] == before


@FUSED
@pytest.mark.parametrize("kind", ["distilled", "average"])
def test_timms_methods_do_the_same(kernels: tuple[str, ...], kind: str) -> None:
    plain, model = build(kind).eval(), fuse(build(kind).eval(), kernels=kernels)
    images = torch.rand(2, 3, 48, 32, device=DEVICE)

    def same(call: Callable[[nn.Module], object], tolerance: float = 1e-4) -> None:
        torch.testing.assert_close(call(model), call(plain), rtol=tolerance, atol=tolerance)

    same(lambda m: m.forward_intermediates(FEW_IMAGES))
    same(lambda m: m.get_intermediate_layers(FEW_IMAGES, n=2, norm=True))
    for changed in (plain, model):
        changed.reset_classifier(5)
        changed.load_state_dict(plain.state_dict())
    same(lambda m: m(FEW_IMAGES))
    same(lambda m: m.set_input_size((48, 32)) or m(images))
    same(lambda m: m.set_grad_checkpointing() or m.train()(images))
    same(lambda m: m.set_grad_checkpointing(False) or m.eval()(images))
    same(lambda m: m.to(torch.bfloat16)(images.bfloat16()), tolerance=0.1)
    same(lambda m: m.double()(images.double()))
    same(lambda m: m.prune_intermediate_layers([0, 1]) and m.float()(images))
    assert len(model.blocks) == 2 and list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    "wrap, name",
    [(nn.DataParallel, "module"), (torch.compile, "_orig_mod"), (ModelEmaV3, "module")],
)
def test_a_wrapped_model_is_refused_by_name(
    wrap: Callable[[nn.Module], nn.Module], name: str
) -> None:
    wrapped = wrap(build("plain"))
    kind = type(wrapped).__name__
    with pytest.raises(
        InputError, match=rf"not {kind}: fuse\(model\.{name}\) before it is wrapped"
    ):
        fuse(wrapped)
    fuse(getattr(wrapped, name))
    unfuse(wrapped)
    assert type(getattr(wrapped, name)) is VisionTransformer
