"""bias_gelu: against float64 and PyTorch's own error, byte by byte, against OpInfo samples.

On a machine without a GPU the kernels run in Triton's interpreter, which has to be chosen before
triton is imported: `test_in_the_interpreter` runs this file again in a separate process.

Accuracy: the error against the float64 reference is at most twice that of plain PyTorch operations
in the dtype of x, plus two units of the result's last place and, for a slope near its zero, one
rounding of a slope of 1. Grid: every layout x every dtype pair x every third
shape of SHAPES, so that each dtype pair meets all shapes twice.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import bias_gelu
from deit_fast.kernels.rows import max_programs
from helpers.gelu import normal
from helpers.kernels import (
    DEVICE,
    INTERPRETED,
    assert_250_repeats_are_equal,
    assert_replays,
    assert_waits_for_nothing,
    interpreted,
    laid_out,
    outer_run,
    recorded,
    run_in_the_interpreter,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of x and of bias.
DTYPES = ((FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16), (FP32, BF16))
# Some have more rows than all programs hold at once, and not a multiple of that number.
SHAPES = ((0, 7), (3, 1), (3, 100, 7), (2, 33, 192), (5, 384), (3, 1000), (2, 9, 1536), (2, 4096))
LAYOUTS = ("plain", "columns", "transposed", "expanded", "misaligned", "slice")


@outer_run
def test_in_the_interpreter() -> None:
    """All tests below, on the CPU."""
    run_in_the_interpreter(__file__)


def plain(x: Tensor, bias: Tensor) -> Tensor:
    """A linear layer's bias in its dtype, then PyTorch's GELU."""
    return F.gelu(x + bias.to(x.dtype))


def results(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, bias: Tensor, gradient: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def assert_no_worse(x: Tensor, bias: Tensor, gradient: Tensor, note: str = "") -> None:
    mine, other = results(bias_gelu, x, bias, gradient), results(plain, x, bias, gradient)
    truth = results(plain, x.double(), bias.double(), gradient.double())
    for name, got, theirs, true in zip(("y", "dx", "dbias"), mine, other, truth, strict=True):
        assert got.dtype == theirs.dtype and got.shape == true.shape, name
        allowed = 2 * (theirs.double() - true).norm() + 2 * torch.finfo(got.dtype).eps * true.norm()
        unit = torch.finfo(FP32).eps
        allowed += unit * (x if name == "y" else gradient).double().norm() + 1e-12
        if FP16 in (x.dtype, got.dtype):  # values below its range are lost in any implementation
            allowed += 6e-8 * got.numel() ** 0.5
        mistake = (got.double() - true).norm()
        assert mistake <= allowed, f"{name} {note}: {mistake:.2e} of {true.norm():.2e}, {allowed=}"


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


def check_accuracy(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    turn = LAYOUTS.index(layout)
    for i, shape in enumerate(SHAPES[(turn + DTYPES.index(dtypes)) % 3 :: 3]):
        x = laid_out(layout, normal(*shape, dtype=dtypes[0]))
        gradient = laid_out(LAYOUTS[(turn + i) % 6], normal(*shape, dtype=dtypes[0], scale=1.0))
        bias = normal(shape[-1], dtype=dtypes[1], scale=1.0)
        assert_no_worse(x, bias, gradient, f"{layout} {dtypes} {shape}")


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_accuracy(layout, dtypes)


@interpreted
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_large_and_small_values(dtype: torch.dtype) -> None:
    """For large |u| the result is u or 0 and the slope 1 or 0; no intermediate value overflows."""
    far = torch.tensor([[-6e4, -50.0, -20.0, 20.0, 50.0, 6e4]], dtype=dtype, device=DEVICE)
    zero, ones = torch.zeros(6, device=DEVICE), torch.ones(1, 6, dtype=dtype, device=DEVICE)
    y, slope, _ = results(bias_gelu, far, zero, ones)
    assert torch.equal(y, far.clamp_min(0)) and torch.equal(slope, (far > 0).to(dtype))
    x = torch.linspace(-50, 50, 2002, device=DEVICE).to(dtype).view(2, 1001)
    assert_no_worse(x, normal(1001, scale=1e-3), torch.ones_like(x))
    assert_no_worse(x / 5e4, normal(1001, scale=1e-3), torch.ones_like(x))


@interpreted
def test_the_left_tail_keeps_its_digits() -> None:
    """Where 1 + erf has lost them, and also PyTorch's own float32."""
    x = torch.linspace(-5, 0, 2001, device=DEVICE)[None]
    y, slope, _ = results(bias_gelu, x, torch.zeros(2001, device=DEVICE), torch.ones_like(x))
    double = x.double().requires_grad_()
    true = F.gelu(double)
    (true_slope,) = torch.autograd.grad(true.sum(), double)
    torch.testing.assert_close(y.double(), true.detach(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(slope.double(), true_slope, rtol=1e-5, atol=1e-7)


def of_values(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """function(x) and its slope."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def alone(x: Tensor) -> Tensor:
    return bias_gelu(x[:, None], torch.zeros(1, device=DEVICE))[:, 0]


@interpreted
@pytest.mark.parametrize("values", ("all of bfloat16", "grid of float32"))
def test_largest_error_is_at_most_that_of_pytorch(values: str) -> None:
    """Of float32 results, over all values; y is also compared after its rounding to bfloat16."""
    if values == "grid of float32":
        x = torch.linspace(-12, 12, 1 << 17, device=DEVICE)
    else:
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
        x = x[x.abs() < 1e38].float().to(DEVICE)  # PyTorch's own overflows beyond on a CPU
    mine, theirs, truth = of_values(alone, x), of_values(F.gelu, x), of_values(F.gelu, x.double())
    for got, other, true in zip(mine, theirs, truth, strict=True):
        assert (got - true).abs().max() <= (other - true).abs().max()
    true = truth[0][x > -5]
    unit = torch.exp2(true.abs().clamp_min(torch.finfo(BF16).tiny).log2().floor() - 7)
    worst = [
        ((y[x > -5].to(BF16).double() - true).abs() / unit).max().item()
        for y in (mine[0], theirs[0])
    ]
    assert worst[0] < 0.51 and worst[0] <= worst[1], worst  # 0.5 is correctly rounded


@interpreted
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
def test_what_is_infinite_stays_visible(dtype: torch.dtype) -> None:
    """inf and nan give values that are not finite, as PyTorch's do; large numbers give none."""
    largest = torch.finfo(dtype).max / 2
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, largest, -largest], device=DEVICE)
    for got, expected in zip(
        of_values(alone, x.to(dtype)), of_values(F.gelu, x.to(dtype)), strict=True
    ):
        assert got.isfinite().tolist() == expected.isfinite().tolist() == [False] * 3 + [True] * 2
        torch.testing.assert_close(got[3:], expected[3:])


@interpreted
def test_of_zero_it_is_that_of_the_bias() -> None:
    bias = normal(48)
    y = bias_gelu(torch.zeros(3, 48, device=DEVICE), bias)
    expected = F.gelu(bias.double()).float().expand(3, 48)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-7)
    assert torch.equal(y, bias_gelu(bias.expand(3, 48), torch.zeros(48, device=DEVICE)))


@interpreted
def test_the_bias_is_not_rounded_to_the_dtype_of_x() -> None:
    """1 + 2^-10 is no bf16 number: with a rounded bias the result would be gelu(0)."""
    x, bias = torch.full((2, 8), -1.0).to(DEVICE, BF16), torch.full((8,), 1 + 2**-10, device=DEVICE)
    expected = F.gelu(torch.full((2, 8), 2**-10, device=DEVICE)).to(BF16)
    assert torch.equal(bias_gelu(x, bias), expected) and expected.all()


@interpreted
def test_a_nan_is_seen_and_stays_in_its_place() -> None:
    x = normal(3, 48)
    x[1, 7] = torch.nan
    y, dx, dbias = results(bias_gelu, x, normal(48), torch.ones_like(x))
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(dx.isnan(), x.isnan())
    assert torch.equal(dbias.isnan(), x.isnan().any(0))


@interpreted
def test_frozen_inputs_get_no_gradient_and_the_other_the_same() -> None:
    x, bias, gradient = normal(3, 5, 48), normal(48), normal(3, 5, 48)
    full = results(bias_gelu, x, bias, gradient)[1:]
    for needed in (0, 1):
        leaves = [x.detach(), bias.detach()]
        leaf = leaves[needed].requires_grad_()
        y = bias_gelu(*leaves)
        with recorded() as seen:
            (found,) = torch.autograd.grad(y, leaf, gradient)
        assert torch.equal(found, full[needed])
        partial = 48 * max_programs(x.device) if needed else 0
        assert sum(map(len, seen.writes)) <= found.numel() + partial


# ---------------------------------------------------------------------------------------------
# Every access to memory
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("shape", ((2, 33, 192), (2, 25, 1536), (3, 1000), (3, 300, 7)))
def test_each_element_is_read_once_and_written_once(shape: tuple[int, ...]) -> None:
    x, gradient = normal(*shape, dtype=BF16), normal(*shape, dtype=BF16)
    bias, channels = normal(shape[-1]), shape[-1]
    with recorded() as seen:
        y = torch.ops.deit_fast.bias_gelu_forward(x, bias)
    assert (seen.counts(seen.reads, x) == 1).all() and (seen.counts(seen.writes, y) == 1).all()
    assert seen.outside(seen.reads, [x, bias]) == seen.outside(seen.writes, [y]) == 0
    with recorded() as seen:
        dx, dbias = torch.ops.deit_fast.bias_gelu_backward(gradient, x, bias, True, True)
    for read, written in ((x, dx), (gradient, dbias)):
        assert (seen.counts(seen.reads, read) == 1).all()
        assert (seen.counts(seen.writes, written) == 1).all()
    programs = seen.outside(seen.writes, [dx, dbias]) / channels
    assert 1 <= programs <= max_programs(x.device) and programs == int(programs)
    assert seen.outside(seen.reads, [x, gradient, bias]) == programs * channels


@interpreted
def test_x_and_bias_alone_are_saved() -> None:
    x, bias = normal(3, 48).requires_grad_(), normal(48).requires_grad_()
    out = bias_gelu(x, bias)  # torch 2.11 lets go of what it saved when its result goes
    saved = out.grad_fn.saved_tensors
    assert [y.data_ptr() for y in saved] == [x.data_ptr(), bias.data_ptr()]


# ---------------------------------------------------------------------------------------------
# OpInfo: PyTorch's own test samples
# ---------------------------------------------------------------------------------------------


@interpreted
def test_opinfo_samples_of_gelu() -> None:
    internal = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = (op for op in internal.op_db if op.name == "nn.functional.gelu")
    ran = 0
    for sample in info.sample_inputs("cpu", FP32, requires_grad=False):
        x = sample.input.detach()
        if sample.kwargs.get("approximate", "none") != "none" or x.dim() == 0 or x.numel() == 0:
            continue
        gradient = normal(*x.shape)
        got = results(bias_gelu, x, torch.zeros(x.shape[-1]), gradient)[:2]
        double = x.double().requires_grad_()
        true = F.gelu(double, **sample.kwargs)
        truth = (true, *torch.autograd.grad(true, double, gradient.double()))
        for mine, other in zip(got, truth, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)
        ran += 1
    assert ran >= 3


# ---------------------------------------------------------------------------------------------
# PyTorch around it
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES[:2])
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, bias = normal(4, 5, 24, dtype=dtypes[0]), normal(24, dtype=dtypes[1])
    x = laid_out("transposed", x)
    operators = torch.ops.deit_fast
    torch.library.opcheck(operators.bias_gelu_forward.default, (x, bias))
    for needed in ((True, True), (True, False), (False, True)):
        arguments = (x.clone(), x, bias, *needed)
        torch.library.opcheck(operators.bias_gelu_backward.default, arguments)
    leaves = (x.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(operators.bias_gelu.default, leaves)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_without_a_break(backend: str) -> None:
    def mlp(x: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE, BF16):
            half = bias_gelu(x.to(BF16), bias)
        assert half.dtype == BF16
        return (bias_gelu(x * 2, bias) * 3 + half).square().sum()

    outcomes = []
    x, bias = normal(3, 5, 32), normal(32)
    for function in (mlp, torch.compile(mlp, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = function(*leaves)
        outcomes.append((y, *torch.autograd.grad(y, leaves)))
    # Inductor leaves the roundings to bfloat16 out that lie inside one of its loops.
    bound = 2e-4 if backend == "aot_eager" else 2e-2
    for mine, compiled in zip(*outcomes, strict=True):
        assert (mine - compiled).norm() <= bound * mine.norm()


def fused(mlp: torch.nn.Module, x: Tensor) -> Tensor:
    return mlp.fc2(bias_gelu(F.linear(x, mlp.fc1.weight), mlp.fc1.bias))


@pytest.mark.parametrize("autocast", (False, True))
def test_the_mlp_of_timm(autocast: bool) -> None:
    layers = pytest.importorskip("timm.layers")
    mlp, x = layers.Mlp(16, 64).to(DEVICE), normal(2, 5, 16)
    true = torch.autograd.grad(mlp(x).square().sum(), mlp.parameters())
    outcomes = []
    for function in (mlp, lambda x: fused(mlp, x)):
        with torch.autocast(DEVICE, BF16, enabled=autocast):
            y = function(x)
        outcomes.append((y, *torch.autograd.grad(y.float().square().sum(), mlp.parameters())))
    expected, got = outcomes
    if not autocast:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got[0].dtype == expected[0].dtype == (BF16 if autocast else FP32)
    for mine, theirs, truth in zip(got[1:], expected[1:], true, strict=True):
        assert mine.dtype == FP32
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-2 * truth.norm()


def test_float64_takes_the_reference_and_passes_gradcheck() -> None:
    leaves = [normal(3, 5, dtype=torch.float64), normal(5, dtype=torch.float64)]
    with recorded() if INTERPRETED else torch.enable_grad() as seen:
        assert torch.autograd.gradcheck(bias_gelu, [x.requires_grad_() for x in leaves])
    assert not INTERPRETED or not seen.reads


@pytest.mark.skipif(INTERPRETED, reason="a CPU takes the reference without the interpreter alone")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_the_reference(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_accuracy(layout, dtypes)


def test_equal_in_every_run() -> None:
    x, bias, gradient = normal(3, 33, 192, dtype=BF16), normal(192), normal(3, 33, 192, dtype=BF16)
    first, second = (results(bias_gelu, x, bias, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    (
        (
            torch.zeros(2, 3),
            torch.zeros(4),
            r"bias must have shape \[3\] beside x \(2, 3\), not \(4,\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), r"bias must have shape \[3\] .*, not \(2, 3\)"),
        (torch.zeros(2, 3), None, "bias must be a tensor, not NoneType"),
        (torch.zeros(2, 3).int(), torch.zeros(3), "x must hold floats, not torch.int32"),
        (torch.tensor(1.0), torch.zeros(1), r"x must have shape \[..., C\] with C > 0, not \(\)"),
        (torch.zeros(2, 3), torch.zeros(3, device="meta"), "bias is on meta but x is on cpu"),
    ),
)
def test_bad_input_is_named(x: Tensor, bias: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_on_a_gpu(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_accuracy(layout, dtypes)
    x, gradient = (laid_out(layout, normal(32, 198, 1536, dtype=dtypes[0])) for _ in range(2))
    assert_no_worse(x, normal(1536, dtype=dtypes[1]), gradient)


def batch(channels: int) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A call with its inputs on the device; returns (output and gradients, inputs)."""
    shape = (64, 198, channels)
    x, gradient, bias = normal(*shape, dtype=BF16), normal(*shape, dtype=BF16), normal(channels)
    leaves = [x.requires_grad_(), bias.requires_grad_()]

    def call() -> list[Tensor]:
        y = bias_gelu(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    return call, leaves


@pytest.mark.gpu
@pytest.mark.parametrize("channels", (768, 1536, 3072))
def test_250_repeats_are_equal(channels: int) -> None:
    call, _ = batch(channels)
    assert_250_repeats_are_equal(call)


@pytest.mark.gpu
def test_no_call_waits_for_the_device() -> None:
    call, _ = batch(1536)
    assert_waits_for_nothing(call)


@pytest.mark.gpu
def test_graph_replay_with_other_inputs() -> None:
    call, leaves = batch(1536)
    assert_replays(call, leaves)
