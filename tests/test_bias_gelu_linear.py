"""bias_gelu_linear: against float64 and PyTorch's own error under autocast, and byte by byte.

On a machine without a GPU the kernels run in Triton's interpreter: `test_in_the_interpreter` runs
this file again in a separate process.

Accuracy: what the kernel sums in float32 and stores in float32 (the bias's gradient) is at most as
far from float64 as PyTorch's under autocast, which rounds the product and the gradient before. What
it stores in half precision is at most half as far again as PyTorch's on a GPU. Triton's interpreter
cuts float32 off to bfloat16 where hardware rounds, which doubles the error of a stored value: there
the bound is twice PyTorch's error.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deit_fast.kernels import bias_gelu_linear
from deit_fast.kernels.bias_gelu_linear import TILES, Tiles
from helpers.gelu import (
    BF16,
    FP16,
    FP32,
    NAMES,
    assert_no_worse,
    expression,
    leaves_of,
    normal,
    results,
)
from helpers.kernels import (
    DEVICE,
    interpreted,
    laid_out,
    outer_run,
    recorded,
    run_in_the_interpreter,
)

# The package exports the function under the name of its module.
MODULE = sys.modules["deit_fast.kernels.bias_gelu_linear"]
# [..., H] and C: rows that do not fill a tile, columns and channels that do not, one row.
SHAPES = (((130, 256), 64), ((2, 65, 200), 72), ((1, 64), 64), ((3, 100, 128), 40))


@outer_run
def test_in_the_interpreter() -> None:
    """All tests below, on the CPU."""
    run_in_the_interpreter(__file__)


@pytest.fixture(params=TILES, ids=lambda tiles: f"{tiles.rows}x{tiles.cols}")
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """The fused variant with these tiles, even if it is slower."""
    monkeypatch.setattr(MODULE, "CHOICE", "fused")
    monkeypatch.setattr(MODULE, "TILES", (request.param,))
    return request.param


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_accuracy(shape: tuple[int, ...], channels: int, dtype: torch.dtype, tiles: Tiles) -> None:
    torch.manual_seed(0)
    leaves = leaves_of(shape, channels, dtype)
    assert_no_worse(leaves, normal(*shape[:-1], channels, dtype=dtype), (shape, channels))


@interpreted
@pytest.mark.parametrize("layout", ("plain", "columns", "transposed", "expanded", "misaligned"))
def test_any_layout_gives_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor of what is not aligned is one of a copy."""
    monkeypatch.setattr(MODULE, "CHOICE", "fused")
    leaves, gradient = leaves_of((3, 50, 64), 24, weights=BF16), normal(3, 50, 24, dtype=BF16)
    moved = [laid_out(layout, x) for x in (leaves[0], gradient)]
    weight = leaves[2] if layout == "expanded" else laid_out(layout, leaves[2])
    got = results(bias_gelu_linear, [moved[0], leaves[1], weight, leaves[3]], moved[1])
    plain = [x.clone(memory_format=torch.contiguous_format) for x in moved]
    expected = results(bias_gelu_linear, [plain[0], *leaves[1:]], plain[1])
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, msg=name)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])


@interpreted
def test_a_nan_stays_in_its_row_and_is_in_the_sums(tiles: Tiles) -> None:
    leaves, gradient = leaves_of((5, 64), 64), normal(5, 64, dtype=BF16)
    leaves[0][1, 7] = torch.nan
    _, dx, dbias, *_ = results(bias_gelu_linear, leaves, gradient)
    assert torch.equal(dx.isnan(), leaves[0].isnan())
    assert torch.equal(dbias.isnan(), leaves[0].isnan().any(0))


@interpreted
def test_no_rows(tiles: Tiles) -> None:
    _, dx, *sums = results(bias_gelu_linear, leaves_of((0, 64), 64), normal(0, 64, dtype=BF16))
    assert dx.shape == (0, 64) and all((x == 0).all() for x in sums)


# ---------------------------------------------------------------------------------------------
# Every access to memory
# ---------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, weight: Tensor, x: Tensor, bias: Tensor, *needed: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.deit_fast.bias_gelu_linear_backward(grad, weight, x, bias, *needed)


@interpreted
@pytest.mark.parametrize(("rows", "hidden", "channels"), ((130, 256, 64), (300, 200, 136)))
def test_x_is_read_once_and_its_gradient_written_once(
    rows: int, hidden: int, channels: int, tiles: Tiles
) -> None:
    x, bias, weight, _ = leaves_of((rows, hidden), channels, weights=BF16)
    grad = normal(rows, channels, dtype=BF16)
    with recorded() as seen:
        dx, dbias = backward(grad, weight, x, bias, True, True)
    across, down = -(-hidden // tiles.cols), -(-rows // tiles.rows)
    for read, times in ((x, 1), (grad, across), (weight, down), (bias, down)):
        assert (seen.counts(seen.reads, read) == times).all()
    for written in (dx, dbias):
        assert (seen.counts(seen.writes, written) == 1).all()
    # A partial row for each row of tiles, and nothing beyond the end of any tensor
    assert seen.outside(seen.writes, [dx, dbias]) == down * hidden
    assert seen.outside(seen.reads, [x, grad, weight, bias]) == down * hidden


@interpreted
def test_what_is_saved(tiles: Tiles) -> None:
    """x and the activation, as bias_gelu and a linear layer save; no activation without a use."""
    for frozen in (False, True):
        leaves = [x.requires_grad_() for x in leaves_of((5, 64), 64, weights=BF16)]
        leaves[2].requires_grad_(not frozen)
        y = bias_gelu_linear(*leaves)
        saved = y.grad_fn.saved_tensors
        assert saved[0].data_ptr() == leaves[0].data_ptr()
        assert (saved[3] is None) == frozen


# ---------------------------------------------------------------------------------------------
# PyTorch around it
# ---------------------------------------------------------------------------------------------


@interpreted
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(tiles: Tiles) -> None:
    leaves, gradient = leaves_of((5, 64), 64), normal(5, 64, dtype=BF16)
    full = results(bias_gelu_linear, leaves, gradient)[1:]
    for needed in itertools.product((False, True), repeat=4):
        if not any(needed):
            continue
        inputs = [x.detach().requires_grad_(want) for x, want in zip(leaves, needed, strict=True)]
        with torch.autocast(DEVICE, BF16):
            y = bias_gelu_linear(*inputs)
        found = torch.autograd.grad(y, [x for x in inputs if x.requires_grad], gradient)
        expected = [x for x, want in zip(full, needed, strict=True) if want]
        for a, b in zip(found, expected, strict=True):
            # The gradient of the bias alone uses the separate variant.
            torch.testing.assert_close(a, b, rtol=1e-2, atol=5e-2)


@interpreted
def test_a_copy_of_the_weight_is_multiplied_and_gets_no_gradient(tiles: Tiles) -> None:
    leaves, gradient = leaves_of((5, 64), 64), normal(5, 64, dtype=BF16)
    copy = leaves[2].to(BF16)
    with_copy = results(lambda *given: bias_gelu_linear(*given, weight_copy=copy), leaves, gradient)
    for a, b in zip(with_copy, results(bias_gelu_linear, leaves, gradient), strict=True):
        assert torch.equal(a, b)
    doubled = [leaves[0], leaves[1], 2 * leaves[2], leaves[3]]
    same = results(lambda *given: bias_gelu_linear(*given, weight_copy=copy), doubled, gradient)
    assert all(torch.equal(a, b) for a, b in zip(with_copy, same, strict=True))


@interpreted
def test_without_a_gradient_nothing_is_saved() -> None:
    leaves = leaves_of((5, 64), 64, weights=BF16)
    expected = bias_gelu_linear(*leaves)
    assert expected.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(bias_gelu_linear(*leaves), expected)


@pytest.mark.parametrize("dtype", (BF16, FP32))
@pytest.mark.parametrize("weights", (BF16, FP32))
@pytest.mark.parametrize("autocast", (False, True))
def test_dtypes_are_those_of_a_linear_layer(
    dtype: torch.dtype, weights: torch.dtype, autocast: bool
) -> None:
    leaves = leaves_of((5, 64), 64, dtype, weights)
    if dtype != weights and not autocast:
        with pytest.raises(RuntimeError, match="same dtype"):
            bias_gelu_linear(*leaves)
        return
    gradient = normal(5, 64, dtype=BF16 if autocast else dtype)
    mine, other = (results(f, leaves, gradient, autocast) for f in (bias_gelu_linear, expression))
    assert [x.dtype for x in mine] == [x.dtype for x in other]
    for name, a, b in zip(NAMES, mine, other, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm(), name


@interpreted
def test_no_second_derivative(tiles: Tiles) -> None:
    x, *rest = leaves_of((5, 64), 64, weights=BF16)
    y = bias_gelu_linear(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.float().square().sum(), x, create_graph=True)


@interpreted
def test_opcheck(tiles: Tiles) -> None:
    x, bias, weight, out_bias = leaves_of((2, 9, 64), 24, weights=BF16)
    operators, grad = torch.ops.deit_fast, normal(2, 9, 24, dtype=BF16)
    for needed in ((True, True), (True, False), (False, True)):
        arguments = (grad, weight, x, bias, *needed)
        torch.library.opcheck(operators.bias_gelu_linear_backward.default, arguments)
    leaves = [y.requires_grad_() for y in (x, bias, weight, out_bias)]
    copy = normal(24, 64, dtype=BF16)
    for arguments in ((*leaves[:3], None, leaves[3]), (*leaves[:3], copy, None)):
        torch.library.opcheck(operators.bias_gelu_linear.default, arguments)


def autocast_sum(*leaves: Tensor) -> Tensor:
    with torch.autocast(DEVICE, BF16):
        y = bias_gelu_linear(*leaves)
    assert y.dtype == BF16
    return y.float().square().sum()


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_without_a_break(backend: str) -> None:
    outcomes = []
    values = leaves_of((3, 5, 64), 24)
    for function in (autocast_sum, torch.compile(autocast_sum, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in values]
        y = function(*leaves)
        outcomes.append((y, *torch.autograd.grad(y, leaves)))
    for mine, compiled in zip(*outcomes, strict=True):
        assert (mine - compiled).norm() <= 2e-2 * mine.norm()


@interpreted
@pytest.mark.parametrize("mode", ("training", "no_grad", "inference"))
def test_the_compiler_sees_the_matrix_products(mode: str) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[str]] = []

    def keep(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        calls = (x.target for x in module.graph.nodes if x.op == "call_function")
        graphs.append([str(x) for x in calls])
        return make_boxed_func(module.forward)

    compiled = torch.compile(autocast_sum, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    leaves = [x.requires_grad_() for x in leaves_of((3, 5, 64), 24)]
    if mode == "training":
        compiled(*leaves).backward()
    else:
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            compiled(*leaves)
    forward, *rest = graphs
    assert forward.count("aten.addmm.default") == 1
    assert forward.count("deit_fast.bias_gelu_forward.default") == 1
    assert not any("bias_gelu_linear." in name for name in forward)
    if mode == "training":
        (last,) = rest
        assert last.count("deit_fast.bias_gelu_linear_backward.default") == 1
        assert last.count("aten.mm.default") == 1  # of the weight's gradient


def test_float64_takes_the_expression_and_passes_gradcheck() -> None:
    leaves = [x.double().requires_grad_() for x in leaves_of((3, 5), 4)]
    assert torch.autograd.gradcheck(bias_gelu_linear, leaves)


@interpreted
def test_equal_in_every_run(tiles: Tiles) -> None:
    leaves, gradient = leaves_of((300, 64), 64), normal(300, 64, dtype=BF16)
    first, second = (results(bias_gelu_linear, leaves, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"bias": torch.zeros(4)}, r"bias must have shape \[3\] beside x \(2, 3\), not \(4,\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight must have shape \[C, 3\], not \(5, 4\)"),
        ({"weight": torch.zeros(3)}, r"weight must have shape \[C, 3\], not \(3,\)"),
        ({"weight": torch.zeros(5, 3).int()}, "weight must hold floats, not torch.int32"),
        ({"out_bias": torch.zeros(3)}, r"out_bias must have shape \[5\] beside weight \(5, 3\)"),
        ({"out_bias": 1.0}, "out_bias must be a tensor, not float"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight is on meta but x is on cpu"),
        ({"weight_copy": torch.zeros(5, 4)}, r"weight_copy must have shape \[5, 3\] beside weight"),
    ),
)
def test_bad_input_is_named(changed: dict[str, Tensor], message: str) -> None:
    good = {"x": torch.zeros(2, 3), "bias": torch.zeros(3), "weight": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match=message):
        bias_gelu_linear(**good | changed)


def test_a_copy_has_the_dtype_of_the_product() -> None:
    x, bias, weight, _ = leaves_of((5, 64), 24)
    message = "weight_copy is torch.float16 but the product is in torch.bfloat16"
    with torch.autocast(DEVICE, BF16), pytest.raises(ValueError, match=message):
        bias_gelu_linear(x, bias, weight, weight_copy=weight.half())


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("channels", (192, 384, 768, 1024))
@pytest.mark.parametrize("samples", (32, 33))  # 198 tokens: 6,336 rows are 49.5 tiles
def test_accuracy_on_a_gpu(samples: int, channels: int, dtype: torch.dtype, tiles: Tiles) -> None:
    torch.manual_seed(0)
    leaves = leaves_of((samples, 198, 4 * channels), channels, dtype)
    assert_no_worse(leaves, normal(samples, 198, channels, dtype=dtype, scale=1.0))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_ragged_shapes_on_a_gpu(shape: tuple[int, ...], channels: int, tiles: Tiles) -> None:
    torch.manual_seed(0)
    assert_no_worse(leaves_of(shape, channels), normal(*shape[:-1], channels, dtype=BF16))
