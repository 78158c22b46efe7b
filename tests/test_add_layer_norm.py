"""add_layer_norm: against float64 and PyTorch's own error, byte by byte, against OpInfo samples.

On a machine without a GPU the kernels run in Triton's interpreter, which has to be chosen before
triton is imported: `test_in_the_interpreter` runs this file again in a separate process.

Accuracy: the error against the float64 reference is at most twice that of plain PyTorch operations
in the same dtypes, plus two units of the result's last place. Grid: every form x every dtype mix x
every third shape of SHAPES, so that each dtype mix meets all shapes; memory layouts take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.add_layer_norm import MAX_CHANNELS, add_layer_norm
from deit_fast.kernels.rows import PROGRAMS_PER_PROCESSOR
from helpers import kernels
from helpers.kernels import (
    DEVICE,
    INTERPRETED,
    assert_250_repeats_are_equal,
    assert_replays,
    assert_waits_for_nothing,
    interpreted,
    outer_run,
    recorded,
    run_in_the_interpreter,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the residual stream, the branch, and weight, bias and gamma.
DTYPES = (
    *((FP32, FP32, FP32), (BF16, BF16, FP32), (FP16, FP16, FP32)),
    *((FP32, BF16, FP32), (FP32, FP16, FP32), (BF16, BF16, BF16), (BF16, FP32, FP32)),
)
# Some have more rows than four programs hold at once, and not a multiple of that number.
SHAPES = ((0, 5, 7), (3, 1, 1), (3, 100, 7), (3, 33, 192), (2, 5, 384), (3, 3, 1000), (2, 1, 4096))
FORMS = ("norm", "plain", "gamma", "keep", "gamma keep")
LAYOUTS = ("plain", "columns", "transposed", "expanded", "misaligned", "slice")
EPS = 1e-6
NAMES = ("residual_out", "normed", "residual", "branch", "weight", "bias", "gamma")


@outer_run
def test_in_the_interpreter() -> None:
    """All tests below, on the CPU."""
    run_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = FP32, offset: float = 0.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) + offset).to(DEVICE, dtype)


def laid_out(form: str, x: Tensor) -> Tensor:
    if form == "slice":  # as all tokens but the first
        return F.pad(x, (0, 0, 1, 0), value=torch.nan)[:, 1:]
    return kernels.laid_out(form, x)


def inputs(
    shape: Sequence[int], form: str, dtypes: Sequence[torch.dtype], offset: float = 0.0
) -> list[Tensor | None]:
    """residual, branch, weight, bias, gamma, keep_scale."""
    channels, (stream, half, params) = shape[-1], dtypes
    branch = None if form == "norm" else normal(*shape, dtype=half)
    gamma = normal(channels, dtype=params) if "gamma" in form else None
    keep = (torch.arange(shape[0], device=DEVICE) % 3 > 0) * 1.25 if "keep" in form else None
    weight, bias = normal(channels, dtype=params, offset=1.0), normal(channels, dtype=params)
    return [normal(*shape, dtype=stream, offset=offset), branch, weight, bias, gamma, keep]


def plain(
    residual: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, gamma: Tensor | None,
    keep: Tensor | None, out: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch's operations in these dtypes, as a block of timm with weights in its dtype."""
    x = residual
    if branch is not None:
        branch = branch if gamma is None else branch * gamma.to(branch.dtype)
        branch = branch if keep is None else branch * keep.to(branch.dtype)[:, None, None]
        x = (residual + branch).to(residual.dtype)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, EPS).to(out)


def ours(*tensors: Any) -> tuple[Tensor, Tensor]:
    *tensors, gamma, keep, _ = tensors
    return add_layer_norm(*tensors, gamma=gamma, keep_scale=keep, eps=EPS)


def results(
    function: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    double: bool = False,
) -> list[Tensor]:
    """Outputs, and gradients of all inputs but keep_scale under these of the outputs."""
    leaves = [
        x if x is None else (x.detach().double() if double else x.detach()).requires_grad_()
        for x in tensors[:5]
    ]
    keep = tensors[5].double() if double and tensors[5] is not None else tensors[5]
    first = tensors[0] if tensors[1] is None else tensors[1]
    outputs = function(*leaves, keep, torch.float64 if double else first.dtype)
    used = [
        (out, g.double() if double else g.to(out.dtype))
        for out, g in zip(outputs, gradients, strict=True)
        if g is not None
    ]
    needed = [x for x in leaves if x is not None]
    outs, gs = zip(*used, strict=True)
    found = torch.autograd.grad(outs, needed, gs, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(needed, found, strict=True)]
    return [x.detach() for x in (*outputs, *found)]


def assert_no_worse(
    tensors: list[Tensor | None], gradients: list[Tensor | None], note: str = ""
) -> None:
    mine, other = results(ours, tensors, gradients), results(plain, tensors, gradients)
    truth = results(plain, tensors, gradients, double=True)
    names = [*NAMES[:2], *(n for n, x in zip(NAMES[2:], tensors, strict=False) if x is not None)]
    for name, got, theirs, true in zip(names, mine, other, truth, strict=True):
        assert got.dtype == theirs.dtype and got.shape == true.shape, name
        allowed = 2 * (theirs.double() - true).norm()
        allowed += 2 * torch.finfo(got.dtype).eps * true.norm() + 1e-9
        if FP16 in (
            got.dtype,
            mine[1].dtype,
        ):  # values below its range are lost in any implementation
            allowed += 6e-8 * got.numel() ** 0.5
        mistake = (got.double() - true).norm()
        assert mistake <= allowed, f"{name} {note}: {mistake:.2e} of {true.norm():.2e}, {allowed=}"


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


def check_accuracy(form: str, dtypes: Sequence[torch.dtype]) -> None:
    turn = FORMS.index(form) + DTYPES.index(tuple(dtypes))
    layouts = itertools.cycle(LAYOUTS[turn % 6 :] + LAYOUTS[: turn % 6])
    for shape in SHAPES[turn % 3 :: 3]:
        tensors = inputs(shape, form, dtypes)
        for at in (0, 1):
            if tensors[at] is not None:
                layout = next(layouts)
                layout = "slice" if layout == "expanded" else layout
                tensors[at] = laid_out(layout, tensors[at])
        out = dtypes[0] if form == "norm" else dtypes[1]
        gradients = [
            laid_out(next(layouts), normal(*shape, dtype=dtype)) for dtype in (dtypes[0], out)
        ]
        assert_no_worse(tensors, gradients, f"{form} {dtypes} {shape}")


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_accuracy(form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_accuracy(form, dtypes)


@interpreted
@pytest.mark.parametrize("used", (0, 1))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES[:4])
def test_gradients_of_one_output(used: int, form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    shape = (3, 7, 48)
    gradients: list[Tensor | None] = [None, None]
    gradients[used] = normal(*shape)
    assert_no_worse(inputs(shape, form, dtypes), gradients)


@interpreted
@pytest.mark.parametrize("dtypes", ((FP32, FP32, FP32), (FP32, BF16, FP32)))
@pytest.mark.parametrize("channels", (192, 1000))
def test_rows_far_from_zero(dtypes: tuple[torch.dtype, ...], channels: int) -> None:
    """sum of x^2 - mean^2 loses all digits of the variance here."""
    shape = (2, 3, channels)
    tensors = inputs(shape, "gamma keep", dtypes, offset=1000.0)
    gradients = [normal(*shape), normal(*shape)]
    assert_no_worse(tensors, gradients)
    variance = results(ours, tensors, gradients)[0].double().var(-1, correction=0)
    x, normed = results(ours, [*tensors[:2], *inputs(shape, "", dtypes)[2:]], gradients)[:2]
    assert normed.shape == x.shape and (variance > 0.5).all()


@interpreted
@pytest.mark.parametrize("scale", ("gamma", "keep"))
def test_a_branch_scaled_by_zero_leaves_the_stream_as_it_is(scale: str) -> None:
    residual, branch, weight, bias, *_ = inputs((3, 5, 24), "plain", (BF16, BF16, FP32))
    zeros = torch.zeros(24 if scale == "gamma" else 3)
    residual_out, normed = add_layer_norm(
        residual, branch.requires_grad_(), weight, bias, eps=EPS,
        **{"gamma" if scale == "gamma" else "keep_scale": zeros},
    )  # fmt: skip
    assert torch.equal(residual_out, residual)
    alone, also_normed = add_layer_norm(residual, None, weight, bias, eps=EPS)
    assert torch.equal(normed, also_normed) and alone is residual
    (gradient,) = torch.autograd.grad(normed.sum() + residual_out.sum(), branch)
    assert not gradient.any()


@interpreted
def test_the_norm_is_that_of_the_stored_sum() -> None:
    """Not of the sum before its rounding, which the backward does not see."""
    tensors = inputs((3, 5, 192), "gamma keep", (BF16, BF16, FP32))
    residual_out, normed = ours(*tensors, None)
    _, again = add_layer_norm(residual_out, None, tensors[2], tensors[3], eps=EPS)
    assert torch.equal(normed, again)


@interpreted
def test_each_sample_gets_its_own_factor() -> None:
    """Of [B, ..., C] the first dimension counts, also in four dimensions and in two."""
    for shape in ((4, 3, 5, 16), (4, 16)):
        residual, branch, weight, bias = (normal(*s) for s in (shape, shape, (16,), (16,)))
        keep = torch.tensor([0.0, 1.0, 2.0, 4.0])
        got, _ = add_layer_norm(residual, branch, weight, bias, keep_scale=keep, eps=EPS)
        expected = residual + branch * keep.view(-1, *(1,) * (len(shape) - 1))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@interpreted
def test_frozen_inputs_get_no_gradient_and_the_others_the_same() -> None:
    shape = (3, 5, 24)
    tensors = inputs(shape, "gamma keep", (FP32, BF16, FP32))
    gradients = [normal(*shape), normal(*shape, dtype=BF16)]
    full = results(ours, tensors, gradients)[2:]
    for needed in range(5):
        leaves = [x.detach() for x in tensors[:5]]
        leaves[needed].requires_grad_()
        outputs = ours(*leaves, tensors[5], None)
        with recorded() as seen:
            (found,) = torch.autograd.grad(outputs, leaves[needed], gradients)
        torch.testing.assert_close(found, full[needed], rtol=1e-5, atol=1e-5)
        programs = 4 if needed >= 2 else 0
        most = found.numel() + 24 * programs
        assert sum(map(len, seen.writes)) <= most


# ---------------------------------------------------------------------------------------------
# Every access to memory
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("layout", ("plain", "slice", "expanded"))
@pytest.mark.parametrize("form", FORMS)
def test_forward_reads_and_writes_each_element_once(form: str, layout: str) -> None:
    shape = (2, 19, 192)
    tensors = inputs(shape, form, (FP32, BF16, FP32))
    if layout == "slice":  # rows that follow each other at another distance
        tensors[0] = F.pad(tensors[0], (0, 8))[..., :192]
    with recorded() as seen:
        outputs = torch.ops.deit_fast.add_layer_norm_forward(*tensors, EPS, BF16, True)
    for x in tensors[: 1 if form == "norm" else 2]:
        assert (seen.counts(seen.reads, x) == 1).all()
    written = outputs[1:] if form == "norm" else outputs
    for x in written:
        assert (seen.counts(seen.writes, x) == 1).all()
    assert seen.outside(seen.reads, [x for x in tensors if x is not None]) == 0
    assert seen.outside(seen.writes, list(written)) == 0
    with recorded() as seen, torch.no_grad():
        ours(*tensors, None)
    assert sum(map(len, seen.writes)) == 2 * 19 * 192 * (1 if form == "norm" else 2)


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_backward_reads_and_writes_each_element_once(form: str) -> None:
    shape, channels, rows = (3, 33, 192), 192, 99
    residual, branch, weight, bias, gamma, keep = inputs(shape, form, (BF16, BF16, FP32))
    out = torch.ops.deit_fast.add_layer_norm_forward(
        residual, branch, weight, bias, gamma, keep, EPS, BF16, True
    )
    x, mean, rstd = residual if branch is None else out[0], *out[2:]
    gradients = [None if branch is None else normal(*shape, dtype=BF16), normal(*shape, dtype=BF16)]
    saved = branch if gamma is not None else None
    needed = [True, branch is not None, True, True, gamma is not None, branch is not None]
    with recorded() as seen:
        found = torch.ops.deit_fast.add_layer_norm_backward(
            *gradients, x, saved, weight, bias, gamma, keep, mean, rstd, BF16, needed, bias.dtype
        )
    read = [y for y in (*gradients, x, saved, mean, rstd) if y is not None]
    for y in read:
        assert (seen.counts(seen.reads, y) == 1).all()
    for y, want in zip(found, needed, strict=True):
        assert y.numel() == 0 if not want else (seen.counts(seen.writes, y) == 1).all()
    partial = PROGRAMS_PER_PROCESSOR * channels * sum(needed[2:])
    others = [y for y in (weight, gamma, keep) if y is not None]
    assert seen.outside(seen.reads, [*read, *others]) == partial
    assert seen.outside(seen.writes, [y for y in found if y.numel()]) == partial
    assert rows > PROGRAMS_PER_PROCESSOR * 16


@interpreted
def test_branch_and_residual_share_a_gradient_where_it_is_the_same() -> None:
    shape = (2, 3, 24)
    residual, branch, weight, bias, *_ = inputs(shape, "plain", (BF16, BF16, FP32))
    leaves = [residual.requires_grad_(), branch.requires_grad_()]
    outputs = add_layer_norm(*leaves, weight, bias, eps=EPS)
    with recorded() as seen:
        first, second = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    assert sum(map(len, seen.writes)) == first.numel() and torch.equal(first, second)


@interpreted
def test_what_is_saved_for_the_backward() -> None:
    """residual_out, mean and rstd; branch only for a gradient of gamma."""
    for form, extra in (("keep", 0), ("gamma", 1)):
        tensors = inputs((2, 3, 24), form, (FP32, FP32, FP32))
        branch = tensors[1]
        leaves = [x if x is None else x.requires_grad_() for x in tensors[:5]]
        _, normed = ours(*leaves, tensors[5], None)
        saved = [x for x in normed.grad_fn.saved_tensors if x is not None and x.dim() == 3]
        assert len(saved) == 1 + extra
        assert sum(x.data_ptr() == branch.data_ptr() for x in saved) == extra


# ---------------------------------------------------------------------------------------------
# OpInfo: PyTorch's own test samples
# ---------------------------------------------------------------------------------------------


@interpreted
def test_opinfo_samples_of_layer_norm() -> None:
    internal = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = (op for op in internal.op_db if op.name == "nn.functional.layer_norm")
    ran = 0
    for sample in info.sample_inputs("cpu", FP32, requires_grad=False):
        normalized, *rest = sample.args
        if len(normalized) != 1 or normalized[0] == 0:
            continue
        x, channels = sample.input.detach(), normalized[0]
        x = x if x.dim() > 1 else x[None]
        weight, bias = (*rest, *(None,) * 2)[:2]
        weight = torch.ones(channels) if weight is None else weight.detach()
        bias = torch.zeros(channels) if bias is None else bias.detach()
        eps = {"eps": 1e-5} | sample.kwargs
        for branch in (None, torch.zeros_like(x)):
            leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
            _, normed = add_layer_norm(leaves[0], branch, *leaves[1:], **eps)
            doubles = [y.double().requires_grad_() for y in (x, weight, bias)]
            true = F.layer_norm(doubles[0], (channels,), *doubles[1:], **eps)
            gradient = normal(*x.shape)
            got = (normed, *torch.autograd.grad(normed, leaves, gradient))
            truth = (true, *torch.autograd.grad(true, doubles, gradient.double()))
            for mine, other in zip(got, truth, strict=True):
                torch.testing.assert_close(mine.double(), other, rtol=2e-5, atol=2e-5)
        ran += 1
    assert ran >= 3


# ---------------------------------------------------------------------------------------------
# PyTorch around it
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    tensors = inputs((2, 3, 24), form, (FP32, BF16, FP32))
    tensors[0] = laid_out("transposed", tensors[0])
    arguments = [x if x is None else x.requires_grad_() for x in tensors[:5]]
    operators = torch.ops.deit_fast
    rest = (tensors[5], EPS, BF16)
    # Without a branch the first output is a stand-in without elements and without a gradient.
    torch.library.opcheck(operators.add_layer_norm.default, (*arguments, *rest))
    branch_bias = None if form == "norm" else normal(24).requires_grad_()
    torch.library.opcheck(operators.add_layer_norm.default, (*arguments, *rest, branch_bias))
    detached = [x if x is None else x.detach() for x in arguments]
    forward = (*detached, *rest, True)
    torch.library.opcheck(operators.add_layer_norm_forward.default, forward)
    out = operators.add_layer_norm_forward(*forward)
    x = detached[0] if form == "norm" else out[0]
    needed = [True, form != "norm", True, True, "gamma" in form, form != "norm"]
    backward = (
        x.clone() if form != "norm" else None, out[1].clone(), x,
        detached[1] if needed[4] else None, *detached[2:], tensors[5], *out[2:], BF16, needed,
        FP32,
    )  # fmt: skip
    torch.library.opcheck(operators.add_layer_norm_backward.default, backward)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_without_a_break(backend: str) -> None:
    tensors = inputs((2, 5, 32), "gamma keep", (FP32, FP32, FP32))

    def block(*tensors: Any) -> Tensor:
        residual, normed = ours(*tensors, None)
        again, last = add_layer_norm(residual * 2, None, tensors[2], tensors[3], eps=EPS)
        with torch.autocast(DEVICE, BF16):
            half = ours(again, last, *tensors[2:], None)[1]
        assert half.dtype == BF16
        return (normed * 3 + residual + last).sum() + half.sum()

    outcomes = []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in tensors[:5]]
        loss = function(*leaves, tensors[5])
        outcomes.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=2e-4, atol=2e-4)


def timm_block(init_values: float | None) -> Any:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    block = vision_transformer.Block(32, 2, qkv_bias=True, init_values=init_values).to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def fused(block: Any, x: Tensor) -> Tensor:
    gammas = [getattr(layer, "gamma", None) for layer in (block.ls1, block.ls2)]
    norms = [(norm.weight, norm.bias) for norm in (block.norm1, block.norm2)]
    x, y = add_layer_norm(x, None, *norms[0], eps=block.norm1.eps)
    x, y = add_layer_norm(x, block.attn(y), *norms[1], gamma=gammas[0], eps=block.norm2.eps)
    x, y = add_layer_norm(x, block.mlp(y), *norms[0], gamma=gammas[1], eps=block.norm1.eps)
    return x


@pytest.mark.parametrize("init_values", (None, 0.5))
def test_a_block_of_timm(init_values: float | None) -> None:
    block, x = timm_block(init_values), normal(2, 5, 32)
    outcomes = []
    for function in (block, lambda x: fused(block, x)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        leaves = (leaf, *block.parameters())
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-3, atol=1e-3)


def test_inside_autocast_as_in_a_block_of_timm() -> None:
    """float32 stream, bf16 branch, and a norm whose output the next layer need not cast."""
    block, x = timm_block(0.5), normal(2, 5, 32)
    true = block(x)
    with torch.autocast(DEVICE, BF16):
        expected, got = block(x), fused(block, x)
        _, normed = add_layer_norm(x, None, block.norm1.weight, block.norm1.bias, eps=EPS)
    assert got.dtype == expected.dtype == FP32 and normed.dtype == BF16
    assert (got - true).norm() <= 2 * (expected - true).norm()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), block.parameters()))


def test_float64_takes_the_reference_and_passes_gradcheck() -> None:
    for form in FORMS:
        tensors = inputs((2, 3, 4), form, (torch.float64,) * 3)
        leaves = [x if x is None else x.requires_grad_() for x in tensors[:5]]
        with recorded() if INTERPRETED else torch.enable_grad() as seen:
            keep = None if tensors[5] is None else tensors[5].double()
            assert torch.autograd.gradcheck(lambda *t, k=keep: ours(*t, k, None), leaves)
        assert not INTERPRETED or not seen.reads


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_reference_in_other_dtypes(form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """As on a CPU: with more channels than the kernels take, everywhere."""
    shape = (2, 1, MAX_CHANNELS + 8)
    out = dtypes[0] if form == "norm" else dtypes[1]
    gradients = [normal(*shape, dtype=dtypes[0]), normal(*shape, dtype=out)]
    assert_no_worse(inputs(shape, form, dtypes), gradients)


def test_equal_in_every_run() -> None:
    shape = (3, 33, 192)
    tensors = inputs(shape, "gamma keep", (BF16, BF16, FP32))
    gradients = [normal(*shape, dtype=BF16), normal(*shape, dtype=BF16)]
    first, second = (results(ours, tensors, gradients) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (
            {"branch": torch.zeros(2, 3, 5)},
            r"branch must have shape \[2, 3, 4\] .* not \(2, 3, 5\)",
        ),
        ({"weight": torch.zeros(5)}, r"\[4\] beside residual \(2, 3, 4\), not \(5,\)"),
        ({"bias": torch.zeros(2, 4)}, r"bias must have shape \[4\] .*, not \(2, 4\)"),
        ({"gamma": torch.zeros(3)}, r"gamma must have shape \[4\] .*, not \(3,\)"),
        ({"keep_scale": torch.zeros(3)}, r"keep_scale must have shape \[2\] .*, not \(3,\)"),
        ({"keep_scale": torch.zeros(2).bool()}, "keep_scale must hold floats, not torch.bool"),
        ({"branch": None, "gamma": torch.zeros(4)}, r"gamma of shape \(4,\) needs a branch"),
        ({"branch": None, "gamma": 1e-5}, "gamma must be a tensor, not float"),
        ({"weight": None}, "weight must be a tensor, not NoneType"),
        ({"residual": torch.zeros(4)}, r"residual must have shape \[B, ..., C\] .* not \(4,\)"),
        ({"residual": torch.zeros(2, 3, 4).int()}, "residual must hold floats, not torch.int32"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta but residual is on cpu"),
        ({"eps": -1.0}, "eps must not be negative, but is -1.0"),
    ),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"residual": torch.zeros(2, 3, 4), "branch": torch.zeros(2, 3, 4), "eps": 1e-6}
    arguments |= {"weight": torch.zeros(4), "bias": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**arguments)


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_accuracy_on_a_gpu(form: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_accuracy(form, dtypes)
    shape = (32, 198, 384)
    out = dtypes[0] if form == "norm" else dtypes[1]
    gradients = [normal(*shape, dtype=dtypes[0]), normal(*shape, dtype=out)]
    assert_no_worse(inputs(shape, form, dtypes), gradients, f"{form} {dtypes} {shape}")


def batch(channels: int) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A call with its inputs on the device; returns (outputs and gradients, inputs)."""
    shape = (64, 198, channels)
    tensors = inputs(shape, "gamma keep", (BF16, BF16, FP32))
    gradients = [normal(*shape, dtype=BF16), normal(*shape, dtype=BF16)]
    leaves = [x.requires_grad_() for x in tensors[:5]]

    def call() -> list[Tensor]:
        outputs = ours(*leaves, tensors[5], None)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, gradients)]

    return call, leaves


@pytest.mark.gpu
@pytest.mark.parametrize("channels", (192, 384, 768))
def test_250_repeats_are_equal(channels: int) -> None:
    call, _ = batch(channels)
    assert_250_repeats_are_equal(call)


@pytest.mark.gpu
def test_no_call_waits_for_the_device() -> None:
    call, _ = batch(384)
    assert_waits_for_nothing(call)


@pytest.mark.gpu
def test_graph_replay_with_other_inputs() -> None:
    call, leaves = batch(384)
    assert_replays(call, leaves)


@pytest.mark.parametrize("form", ["plain", "gamma keep"])
@pytest.mark.parametrize("dtypes", [(FP32, BF16, FP32), (BF16, BF16, FP32)])
def test_a_folded_bias_has_the_gradient_of_one_added_before(
    form: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    shape = (3, 33, 192)
    residual, branch, weight, bias, gamma, keep = inputs(shape, form, dtypes)
    assert branch is not None
    last = normal(192)
    gradients = [normal(*shape, dtype=torch.float64) for _ in range(2)]

    def gradient(double: bool, folds: bool) -> Tensor:
        tensors = [x if x is None else x.double() if double else x
                   for x in (residual, branch, weight, bias, gamma, keep)]  # fmt: skip
        added = (last.double() if double else last.clone()).requires_grad_()
        held = (added.detach() if folds else added).to(tensors[1].dtype)
        tensors[1] = tensors[1] + held
        *four, scale, drops = tensors
        out = add_layer_norm(
            *four, gamma=scale, keep_scale=drops, eps=EPS, branch_bias=added if folds else None
        )
        total = sum((y.double() * g).sum() for y, g in zip(out, gradients, strict=True))
        return torch.autograd.grad(total, added)[0].double()

    expected = gradient(True, False)
    errors = [(gradient(False, folds) - expected).norm() for folds in (False, True)]
    assert errors[1] <= errors[0]
