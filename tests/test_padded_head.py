"""Heads whose logits have padded rows: same logits, gradients and checkpoints as timm's."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.kernels import aot, distillation_loss
from deit_fast.kernels import distillation_loss_launch as launch
from deit_fast.models import create_student
from deit_fast.models.padded_head import PaddedLinear, pad_heads

CLASSES = 21841
SHAPE: dict[str, Any] = {"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}


def student(pad_head: bool, classes: int = 1001, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    name = "deit_tiny_distilled_patch16_224"
    return create_student(name, classes, 0.0, 32, pad_head=pad_head, **SHAPE, **options)


def linears(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    plain = nn.Linear(24, 1001, bias, dtype=dtype)
    padded = copy.deepcopy(plain)
    padded.__class__ = PaddedLinear
    return plain, padded


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_logits_and_gradients_are_those_of_a_linear_layer(dtype: torch.dtype, bias: bool) -> None:
    plain, padded = linears(dtype, bias)
    rows, grad = torch.randn(6, 24, dtype=dtype), torch.randn(6, 1001, dtype=dtype)
    results = []
    for layer in (plain, padded):
        x = rows.clone().requires_grad_()
        out = layer(x)
        out.backward(grad)
        results.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert padded(rows).stride(0) * dtype.itemsize % 16 == 0 and not padded(rows).is_contiguous()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("head", ("both", "class", "distillation"))
def test_tools_see_plain_linear_layers(head: str, fused: bool) -> None:
    """Programs do not need this package, and torch.func has a rule for every operation."""
    plain = student(False, fused=False, trained_head=head).eval()
    padded = student(True, fused=fused, trained_head=head).eval()
    padded.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    program, theirs = (torch.export.export(model, (images,)) for model in (padded, plain))
    assert [n.target for n in program.graph.nodes] == [n.target for n in theirs.graph.nodes]
    for run in (
        torch.jit.script(padded), torch.jit.script(padded.train()).eval(),
        torch.jit.trace(padded.eval(), images), torch.fx.symbolic_trace(padded), program.module(),
        torch.func.vmap(lambda image: padded(image[None])[0]),
    ):  # fmt: skip
        torch.testing.assert_close(run(images), plain(images))

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        call = partial(torch.func.functional_call, model, args=(images,))
        return torch.func.grad(lambda weights: call(weights).square().sum())(
            dict(model.named_parameters())
        )

    torch.testing.assert_close(gradients(padded), gradients(plain))
    assert type(padded.head) is PaddedLinear


def test_logits_change_in_place_and_other_dtypes_raise_as_those_of_a_linear_layer() -> None:
    plain, padded = linears(torch.float32)
    rows, weights = torch.randn(6, 24), torch.randn(6, 1001)
    results = []
    for layer in (plain, padded):
        out = layer(rows)
        out.mul_(2).add_(1)[1:3].zero_()
        (out * weights).sum().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters())])
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            layer(rows.double())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    logits = padded(rows).detach()
    assert logits.untyped_storage().nbytes() == 6 * logits.stride(0) * 4, "the last row is padded"


def test_the_operator_passes_opcheck() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.deit_fast.padded_linear.default, (x, weight, None))
    bias = torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.deit_fast.padded_linear.default, (x, weight, bias))


def test_a_student_keeps_its_checkpoint_and_its_logits() -> None:
    plain, padded = student(False), student(True)
    assert list(plain.state_dict()) == list(padded.state_dict())
    padded.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 32, 32)
    for expected, got in zip(plain(images), padded(images), strict=True):
        assert torch.equal(expected, got)
        assert got.stride() == (1004, 1) and got.data_ptr() % 16 == 0


def test_autocast_casts_as_for_a_linear_layer() -> None:
    plain, padded = student(False), student(True)
    images = torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for expected, got in zip(plain(images), padded(images), strict=True):
            assert got.dtype == torch.bfloat16 and torch.equal(expected, got)
            assert got.stride() == (1008, 1)


def test_aligned_rows_are_not_padded() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        class_logits, _ = student(True, 1000)(torch.randn(2, 3, 32, 32))
    assert class_logits.is_contiguous()


def test_compiled() -> None:
    _, padded = linears(torch.float32)
    rows = torch.randn(6, 24, requires_grad=True)
    compiled = torch.compile(padded, fullgraph=True, backend="aot_eager")
    out = compiled(rows)
    assert out.stride() == (1004, 1)
    torch.testing.assert_close(out, padded(rows))
    (got,) = torch.autograd.grad(out.square().sum(), rows)
    (expected,) = torch.autograd.grad(padded(rows).square().sum(), rows)
    torch.testing.assert_close(got, expected)


def heads(pad: bool) -> list[Tensor]:
    layer = nn.Linear(8, CLASSES, dtype=torch.bfloat16)
    if pad:
        layer.__class__ = PaddedLinear
    return [layer(torch.randn(3, 8, dtype=torch.bfloat16)) for _ in range(2)]


def test_the_loss_kernel_reads_padded_logits_16_bytes_at_a_time() -> None:
    for pad, vector in ((False, 1), (True, 8)):
        for logits in heads(pad):
            assert launch._access(logits)[0] == vector
            gradient = launch._empty_gradient(logits, True, logits)
            assert gradient.stride(0) == (21848 if pad else CLASSES)


@pytest.mark.slow
def test_the_machine_code_for_padded_logits_has_16_byte_accesses() -> None:
    cases = {case[0]: aot.case_of(*case) for case in launch.aot_cases()}
    case = cases["bf16-C=21841-hard-labels-pair-ce"]
    got, _ = aot.measure(case, "sm_90")
    assert got["wide_loads"] >= 4 and got["wide_stores"] >= 4
    assert not list(aot.broken_rules(case, "sm_90", got))


def test_padded_logits_give_the_same_loss_and_gradients() -> None:
    gradients = []
    for pad in (False, True):
        model = student(pad)
        class_logits, distill_logits = model(torch.ones(2, 3, 32, 32))
        loss = distillation_loss(
            class_logits, distill_logits, torch.tensor([1, 7]), torch.tensor([3, 1000]),
            kind="hard", alpha=0.5, tau=1.0, reduction="numel",
        )  # fmt: skip
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_heads_that_cannot_be_padded_are_refused() -> None:
    model = student(False)
    model.head = nn.Identity()
    with pytest.raises(InputError, match="pad_head needs linear heads, but head of"):
        pad_heads(model)
    with pytest.raises(InputError, match="pad_head needs a model with a layer `head`"):
        pad_heads(nn.Linear(2, 2))
    with pytest.raises(InputError, match="pad_head=True needs a timm model"):
        create_student("somewhere:factory", 10, pad_head=True)


@pytest.mark.parametrize("option", [{"kernels": ("attention",)}, {"stochastic_depth": "subset"}])
def test_options_of_a_transformer_are_refused_for_a_factory(option: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))}=.* needs a timm model"):
        create_student("somewhere:factory", 10, **option)
