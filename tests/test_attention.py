"""The attention kernels: against float64, against their own laws, byte by byte.

As in test_distillation_loss_kernel: on a machine without a GPU `test_in_the_interpreter` runs this
file again in a process whose triton is the interpreter; on a GPU the tests marked gpu run the
compiled kernels.

Accuracy: the error against the float64 reference is at most twice that of PyTorch's own attention
(the math backend, the same dtype), plus two units of the last place of the result and, in float32,
of the largest term that a sum runs over: near 0 either implementation may be closer by chance.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deit_fast.kernels import (
    aot,
    attention,
    attention_backward,
    attention_forward,
    attention_tiles,
    launching,
)
from deit_fast.kernels.attention import attention_qkvpacked, launchers_of, reference
from deit_fast.kernels.attention_tiles import PER_HEAD, TILES, Tiles, key_of, tiles_of
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 5, 17, 64, 198, 300)
WIDTHS = (32, 64, 96, 128)


@pytest.mark.slow
@outer_run
def test_in_the_interpreter() -> None:
    """All tests below, on the CPU."""
    run_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------
# Inputs and peers
# ---------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * spread).to(DEVICE, dtype)


def in_pytorch(qkv: Tensor, scale: float | None = None) -> Tensor:
    """As timm calls PyTorch's attention; the math backend, in the dtype of qkv."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def results(function: Any, qkv: Tensor, grad_out: Tensor, scale: float | None = None) -> list:
    """Output and gradient."""
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, scale)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad_out)]


def truth(qkv: Tensor, grad_out: Tensor, scale: float | None = None) -> list:
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return results(reference, qkv.double(), grad_out.double(), scale)


def assert_no_worse(qkv: Tensor, grad_out: Tensor, scale: float | None = None) -> None:
    ours = results(attention_qkvpacked, qkv, grad_out, scale)
    theirs = results(in_pytorch, qkv, grad_out, scale)
    true = truth(qkv, grad_out, scale)
    assert ours[0].is_contiguous() and [x.dtype for x in ours] == [qkv.dtype] * 2
    terms = [true[0].norm(), true[1].norm() + grad_out.double().norm() * (scale or 1)]
    for name, mine, other, exact, term in zip(
        ("output", "gradient"), ours, theirs, true, terms, strict=True
    ):
        mistake, allowed = (mine.double() - exact).norm(), 2 * (other.double() - exact).norm()
        allowed += 2 * torch.finfo(mine.dtype).eps * exact.norm()
        allowed += 2 * torch.finfo(torch.float32).eps * term
        assert mistake <= allowed, (
            f"{name} {tuple(qkv.shape)} {qkv.dtype}: {mistake:.1e} of {exact.norm():.1e}, "
            f"PyTorch's own {(other.double() - exact).norm():.1e}"
        )


def largest_errors(qkv: Tensor, grad_out: Tensor) -> list[float]:
    """How far one element of output and gradient may be from float64's, by the rule above."""
    theirs, true = results(in_pytorch, qkv, grad_out), truth(qkv, grad_out)
    rounding = 2 * torch.finfo(qkv.dtype).eps
    return [
        float(2 * (other.double() - exact).abs().max() + rounding * exact.abs().max())
        for other, exact in zip(theirs, true, strict=True)
    ]


def check_accuracy(dtype: torch.dtype, batch: int, tokens: int, heads: int, width: int) -> None:
    qkv = normal(batch, tokens, 3, heads, width, dtype=dtype)
    assert_no_worse(qkv, normal(batch, tokens, heads, width, dtype=dtype))


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_accuracy(tokens: int, dtype: torch.dtype) -> None:
    """Widths take turns; every kernel meets every dtype it serves."""
    turn = TOKENS.index(tokens) + DTYPES.index(dtype)
    batch, heads = ((2, 2), (1, 1))[tokens > 17]
    check_accuracy(dtype, batch, tokens, heads, WIDTHS[turn % 4])
    if tokens <= 17:
        for width in WIDTHS:
            check_accuracy(dtype, 1, tokens, 1, width)


@interpreted
@pytest.mark.parametrize("width", (96, 128))
@pytest.mark.parametrize("tokens", (33, 70, 197))
def test_accuracy_of_wide_float32(tokens: int, width: int) -> None:
    """Part by part of its columns, several blocks and a ragged one; the heads are neighbours."""
    check_accuracy(torch.float32, 1, tokens, 2, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_has_kernels_and_tiles(width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 50, 198, 209, 577, 4096):
        qkv = torch.empty(2, tokens, 3, 2, width, dtype=dtype, device="meta")
        on_kernels = attention.uses_kernels(qkv, width)
        assert on_kernels == INTERPRETED, "on a CPU outside of the interpreter: none"
        for kind, launcher in launchers_of(qkv).items():
            made = attention_tiles.recorded_launch(launcher, tiles_of(key_of(kind, qkv)))
            values = made.arguments
            assert values.get("D", 0) == width or values["WIDTH"] * values["PARTS"] == width
            if kind != "whole":
                blocks = made.grid[0] // (8 if kind == "both" else 4)  # for 2 x 2 heads
                assert blocks * values["ROWS"] >= tokens > (blocks - 1) * values["ROWS"]


@interpreted
@pytest.mark.parametrize("tokens", (16, 33, 65, 112, 176, 197, 208, 209))
def test_accuracy_at_every_set_of_pieces(tokens: int) -> None:
    check_accuracy(torch.float16, 1, tokens, 1, 32)


def test_pieces_hold_all_tokens_and_only_the_last_is_ragged() -> None:
    for tokens in range(1, attention_forward.WHOLE_TOKENS + 1):
        pieces = attention_forward.pieces_of(tokens)
        assert sum(pieces) - 16 < tokens <= sum(pieces) and sum(pieces[:-1]) < tokens
        assert len(pieces) <= 3 and all(size & (size - 1) == 0 for size in pieces)


@interpreted
@pytest.mark.parametrize("layout", ("token first", "odd strides", "columns", "slice of NaN"))
@pytest.mark.parametrize("tokens", (19, 270))
def test_memory_layouts(layout: str, tokens: int) -> None:
    shape = (2 if tokens == 19 else 1, tokens, 3, 1, 32)
    qkv = normal(*shape, dtype=torch.float16)
    grad_out = normal(*shape[:2], *shape[3:], dtype=torch.float16)
    plain = results(attention_qkvpacked, qkv, grad_out)
    nan = torch.full((shape[0], tokens + 70, 3, 2, 34), math.nan, dtype=torch.float16)
    if layout == "token first":
        qkv, grad_out = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (qkv, grad_out))
    elif layout == "odd strides":
        nan[:, :tokens, :, :1, 1:33] = qkv
        qkv = nan[:, :tokens, :, :1, 1:33]
    elif layout == "columns":
        qkv, grad_out = (torch.stack((x, x * math.nan), -1)[..., 0] for x in (qkv, grad_out))
        assert qkv.stride(-1) == grad_out.stride(-1) == 2
    else:
        nan[:, 35 : tokens + 35, :, 1:, :32] = qkv
        qkv = nan[:, 35 : tokens + 35, :, 1:, :32]
    for got, expected in zip(results(attention_qkvpacked, qkv, grad_out), plain, strict=True):
        assert torch.equal(got, expected) and got.is_contiguous()


@interpreted
@pytest.mark.parametrize("tokens", (18, 270))
def test_expanded_gradient(tokens: int) -> None:
    leaf = normal(1, tokens, 3, 2, 32).requires_grad_()
    attention_qkvpacked(leaf).sum().backward()  # a gradient without strides
    _, expected = truth(leaf, torch.ones(1, tokens, 2, 32))
    torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------------------------------------
# Laws
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("tokens", "dtype"), ((21, torch.bfloat16), (70, torch.float32), (260, torch.float16))
)
def test_laws(tokens: int, dtype: torch.dtype) -> None:
    qkv = normal(1, tokens, 3, 1, 32, dtype=dtype)
    grad_out = normal(1, tokens, 1, 32, dtype=dtype)
    close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    out, gradient = results(attention_qkvpacked, qkv, grad_out)
    order = torch.randperm(tokens)
    # In another order the same sums round differently: either result is as far from the exact one
    # as it may be, so the two are at most twice that apart.
    between = [{"rtol": 0, "atol": 2 * error} for error in largest_errors(qkv, grad_out)]

    keys_moved = qkv.clone()
    keys_moved[:, :, 1:] = qkv[:, order, 1:]
    torch.testing.assert_close(attention_qkvpacked(keys_moved), out, **between[0])

    moved = results(attention_qkvpacked, qkv[:, order], grad_out[:, order])
    torch.testing.assert_close(moved[0], out[:, order], **between[0])
    torch.testing.assert_close(moved[1], gradient[:, order], **between[1])

    ones = qkv.clone()
    ones[:, :, 2] = 1
    expected = torch.ones_like(out)
    torch.testing.assert_close(attention_qkvpacked(ones), expected, **close)
    # Then no output depends on the scores: only values pull.
    pull = results(attention_qkvpacked, ones, grad_out)[1]
    assert pull[:, :, :2].abs().max() < 20 * close["atol"] and pull[:, :, 2].abs().max() > 0.05

    # A constant added to all keys shifts each row of scores.
    shifted = qkv.float()
    shifted[:, :, 1] += 1
    exact = attention_qkvpacked(qkv.float())
    torch.testing.assert_close(attention_qkvpacked(shifted), exact, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("tokens", (7, 150, 261))
def test_scale_zero_is_the_mean_of_the_values(tokens: int) -> None:
    qkv, grad_out = normal(1, tokens, 3, 2, 32), normal(1, tokens, 2, 32)
    out, gradient = results(attention_qkvpacked, qkv, grad_out, 0.0)
    mean = qkv[:, :, 2].mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-6)
    assert (gradient[:, :, :2] == 0).all()
    mean = grad_out.mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(gradient[:, :, 2], mean, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (37, 259))
def test_scores_of_200(tokens: int, dtype: torch.dtype) -> None:
    """All scores far below 0 too: an unmasked padded key would win, or overflow to NaN."""
    qkv = normal(1, tokens, 3, 1, 32, dtype=dtype, spread=0.1)
    grad_out = normal(1, tokens, 1, 32, dtype=dtype)
    for sign in (1, -1):
        qkv[:, :, 0], qkv[:, :, 1, :, :16] = 2.5, sign * 2.5
        qkv[:, :3, 1] *= -sign
        assert_no_worse(qkv, grad_out, 2.0)
        scores = 2 * (qkv[0, :, 0, 0].double() @ qkv[0, :, 1, 0].double().t())
        assert scores.abs().max() > 190


@interpreted
@pytest.mark.parametrize("tokens", (40, 258))
def test_a_nan_is_seen_where_it_belongs(tokens: int) -> None:
    qkv = normal(1, tokens, 3, 2, 32)
    qkv[0, 3, 0, 1, 5] = math.nan  # a query of head 1
    ill = attention_qkvpacked(qkv).isnan()
    assert ill[0, 3, 1].all() and ill.sum() == 32


@interpreted
def test_empty_batch() -> None:
    leaf = normal(0, 9, 3, 2, 32, dtype=torch.bfloat16).requires_grad_()
    out = attention_qkvpacked(leaf)
    assert out.shape == (0, 9, 2, 32) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert leaf.grad.shape == leaf.shape


# ---------------------------------------------------------------------------------------------
# Every access to memory
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("tokens", "width"), ((50, 64), (70, 96)))
def test_bytes_of_a_head(tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_forward, "PROCESSORS", 1)  # two heads are enough: none is split
    qkv = normal(1, tokens, 3, 2, width, dtype=torch.float16)
    with recorded() as seen:
        out, lse = torch.ops.deit_fast.attention_forward(qkv, 0.1)
    assert (seen.counts(seen.reads, qkv) == 1).all()  # one block of queries
    assert seen.outside(seen.reads, [qkv]) == 0
    assert (seen.counts(seen.writes, out) == 1).all()
    assert (seen.counts(seen.writes, lse) == 1).all()
    assert seen.outside(seen.writes, [out, lse]) == 0

    grad_out = normal(1, tokens, 2, width, dtype=torch.float16)
    with recorded() as seen:
        grad, _ = torch.ops.deit_fast.attention_backward(grad_out, qkv, out, lse, 0.1)
    assert (seen.counts(seen.writes, grad) == 1).all()
    delta = 0 if width == 64 else 2 * tokens
    assert seen.outside(seen.writes, [grad]) == delta
    assert seen.outside(seen.reads, [qkv, grad_out, out, lse]) == delta
    for x in (qkv, grad_out):  # once for dq, once for dk and dv
        assert (seen.counts(seen.reads, x) == 2).all()


@interpreted
def test_keys_and_values_of_198_tokens_are_read_once_a_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qkv = normal(1, 198, 3, 2, 32, dtype=torch.float16)
    for processors, splits in ((1, 1), (2, 2), (132, 4)):
        monkeypatch.setattr(attention_forward, "PROCESSORS", processors)
        with recorded() as seen:
            torch.ops.deit_fast.attention_forward(qkv, 0.1)
        reads = seen.counts(seen.reads, qkv)
        assert (reads[:, :, 0] == 1).all() and (reads[:, :, 1:] == splits).all()


# ---------------------------------------------------------------------------------------------
# PyTorch's machinery
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("tokens", "dtype"), ((9, torch.bfloat16), (65, torch.float32)))
def test_opcheck(tokens: int, dtype: torch.dtype) -> None:
    operators = torch.ops.deit_fast
    qkv = normal(tokens, 1, 3, 1, 32, dtype=dtype).transpose(0, 1)
    torch.library.opcheck(operators.attention.default, (qkv.clone().requires_grad_(), 0.2))
    torch.library.opcheck(operators.attention.default, (qkv, 0.2))
    torch.library.opcheck(operators.attention_forward.default, (qkv, 0.2))
    out, lse = operators.attention_forward(qkv, 0.2)
    grad_out = normal(1, 1, 1, 32, dtype=dtype).expand_as(out)
    torch.library.opcheck(operators.attention_backward.default, (grad_out, qkv, out, lse, 0.2))
    bias = normal(32).requires_grad_()
    leaf = qkv.clone().requires_grad_()
    torch.library.opcheck(operators.attention.default, (leaf, 0.2, bias))
    arguments = (grad_out, qkv, out, lse, 0.2, bias.detach())
    torch.library.opcheck(operators.attention_backward.default, arguments)


@pytest.mark.parametrize("tokens", (13, 198, 230))  # one kernel; the same; queries and keys apart
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_query_bias_has_the_gradient_of_one_added_before(tokens: int, dtype: torch.dtype) -> None:
    """Its error against float64 is at most that of PyTorch's sum over the gradient of qkv."""
    qkv, bias, grad = normal(2, tokens, 3, 2, 32), normal(64), normal(2, tokens, 2, 32)

    def gradient(dtype: torch.dtype, is_folded: bool) -> Tensor:
        leaf = bias.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
        leaf.requires_grad_()
        added = (leaf.detach() if is_folded else leaf).to(dtype).view(1, 1, 1, 2, 32)
        x = qkv.to(dtype)
        x = torch.cat((x[:, :, :1] + added, x[:, :, 1:]), 2)
        out = attention_qkvpacked(x, query_bias=leaf if is_folded else None)
        return torch.autograd.grad(out, leaf, grad.to(dtype))[0].double()

    exact = gradient(torch.float64, False)
    folded, separate = ((gradient(dtype, way) - exact).norm() for way in (True, False))
    assert folded <= 1.05 * separate + 1e-6 * exact.norm()


@pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="kernels run interpreted or on a GPU"
)
@pytest.mark.parametrize("tokens", (13, 70, 198))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_one_program_a_head_gives_the_gradients_of_one_a_block(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys read the row sums that its queries wrote, where a block computes its own."""
    qkv, grad = normal(2, tokens, 3, 2, 64, dtype=dtype), normal(2, tokens, 2, 64, dtype=dtype)
    bias = normal(128)
    out, lse = torch.ops.deit_fast.attention_forward(qkv, 0.125)

    def gradients() -> tuple[Tensor, Tensor]:
        launching.clear_plans()
        return torch.ops.deit_fast.attention_backward(grad, qkv, out, lse, 0.125, bias)  # type: ignore[no-any-return]

    by_block = gradients()
    key = key_of("both", qkv)
    monkeypatch.setitem(attention_tiles.measured, key, PER_HEAD)
    few = gradients()  # too few heads to keep a GPU busy
    monkeypatch.setattr(attention_backward, "MIN_HEADS", 4)
    made = attention_tiles.recorded_launch(launchers_of(qkv)["both"], tiles_of(key))
    assert made.grid == (4,) and made.arguments["row_sums"] is not None
    by_head = gradients()
    launching.clear_plans()
    for block, other, head in zip(by_block, few, by_head, strict=True):
        assert torch.equal(block, other)
        assert (block - head).double().norm() <= 1e-3 * block.double().norm()


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_without_a_break(backend: str) -> None:
    """In the interpreter the operator, outside of it the reference."""
    weight = normal(96, 32, spread=0.1)

    def block(x: Tensor) -> Tensor:
        qkv = (x @ weight.t()).view(2, 11, 3, 1, 32)
        return attention_qkvpacked(qkv).flatten(2) + x

    x, outcomes = normal(2, 11, 32), []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        outcomes.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(outcomes[0], outcomes[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64))
def test_autocast_casts_as_pytorch_does(dtype: torch.dtype) -> None:
    leaf = normal(1, 13, 3, 2, 32, dtype=dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention_qkvpacked(leaf)
        q, k, v = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype
    inner = leaf.detach() if dtype == torch.float64 else leaf.detach().bfloat16()
    assert torch.equal(out, attention_qkvpacked(inner))
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert gradient.dtype == dtype and gradient.abs().max() > 0


@interpreted
@pytest.mark.parametrize("kinds", (["whole", "both"], ["forward", "queries"]))
def test_tuning_writes_each_kernel_as_it_is_measured(
    kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(attention_tiles, "measured", {})
    # Two each: the interpreter needs seconds for all.
    few = {kind: tiles[:2] for kind, tiles in attention_tiles.CANDIDATES.items()}
    monkeypatch.setattr(attention_tiles, "CANDIDATES", few)
    if "forward" in kinds:  # the kernels of long sequences; the run breaks off before the last
        monkeypatch.setattr(attention_forward, "WHOLE_TOKENS", 0)
        monkeypatch.setattr(attention_backward, "SHARED_TOKENS", 0)
        del few["keys"]
    qkv = normal(1, 3, 3, 1, 32, dtype=torch.float16)
    path = tmp_path / "measured.json"
    with contextlib.suppress(KeyError):
        attention.write_tuned(qkv, path)
    table = attention_tiles.read_tiles(path)
    assert [key[1:] for key in table] == [(kind, 2, 32) for kind in kinds]
    assert all(tiles in few[key[1]] for key, tiles in table.items())
    assert attention_tiles.measured == table and all(tiles_of(key) == table[key] for key in table)
    printed = capsys.readouterr().out
    for kind in kinds:
        assert f"{kind}, 3 tokens, D=32, sm_0, ms:" in printed
    rows = re.findall(
        r"^ +\d+\.\d{4}  rows=\d+ block=\d+ warps=\d+ stages=\d( per_head=1)?$", printed, re.M
    )
    assert len(rows) == 2 * len(kinds)
    assert attention_tiles.read_tiles() == TILES, "the installed table is as it was"


@interpreted
def test_first_call_tunes_where_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "measured", {})
    monkeypatch.setattr(attention_tiles, "AUTOTUNE", True)
    monkeypatch.setattr(
        attention_tiles, "CANDIDATES", {k: v[:2] for k, v in attention_tiles.CANDIDATES.items()}
    )
    check_accuracy(torch.float32, 1, 5, 1, 32)
    assert [key[1] for key in attention_tiles.measured] == ["forward", "queries", "keys"]


def test_every_depth_of_the_pipeline_is_a_candidate() -> None:
    for kind in ("forward", "both", "queries", "keys"):
        assert {tiles.stages for tiles in attention_tiles.CANDIDATES[kind]} == {1, 2, 3}
    for (_, kind, size, _), tiles in TILES.items():
        if size == 2 and kind != "whole" and tiles.block >= 32:
            assert tiles in attention_tiles.CANDIDATES[kind], "the table's own tiles are timed too"


@interpreted
def test_tuning_says_that_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "measured", {})
    shared = attention_tiles.OutOfResources(200 * 1024, 99 * 1024, "shared memory")

    def too_large(tiles: Tiles) -> None:
        raise shared

    key = (86, "whole", 2, 64)
    with pytest.raises(RuntimeError, match=r"none of 8 tiles of \(86, 'whole', 2, 64\) launches"):
        attention_tiles.tune(key, too_large, torch.device("cpu"))
    assert attention_tiles.measured == {}, "the next call takes the table's tiles"


@outer_run
def test_candidates_are_compiled_ahead_of_their_timing() -> None:
    """In threads, for a GPU that is not there: the calls that are timed then compile nothing."""
    script = """
import contextlib, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from deit_fast.kernels.attention import launchers_of
from deit_fast.kernels.attention_tiles import Tiles, compile_all, recorded_launch

class Driver:  # of a GPU that compiles and launches nothing
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

class Nothing:
    __get__ = lambda self, *_: lambda *_, **__: launched.append(1)

triton.runtime.driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
CompiledKernel._init_handles = CompiledKernel.launch_metadata = lambda *_: None
CompiledKernel.run = Nothing()
compile_one, compiled, launched = triton.JITFunction._do_compile, [], []
triton.JITFunction._do_compile = lambda *args: compiled.append(1) or compile_one(*args)

qkv = torch.zeros(1, 16, 3, 1, 32, dtype=torch.bfloat16)
candidates = [Tiles(16, 0, warps, stages) for warps in (4, 8) for stages in (1, 2)]
launches = [recorded_launch(launchers_of(qkv)["whole"], tiles) for tiles in candidates]
with triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as triton.knobs.cache.dir:
    compile_all(launches, qkv.device)
    assert (len(compiled), len(launched)) == (4, 0), (compiled, launched)
    for one in launches:
        one()
assert (len(compiled), len(launched)) == (4, 4), (compiled, launched)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        *(((8, 0), 80), ((8, 6), 86), ((8, 7), 80), ((8, 9), 86), ((9, 0), 90)),
        *(((10, 0), 100), ((10, 3), 100), ((11, 0), 100), ((12, 0), 86), ((12, 1), 86)),
    ],
)
def test_tiles_tuned_on_an_a100_stay_there(capability: tuple[int, int], architecture: int) -> None:
    """GPUs with 99 KiB of shared memory for a block have rows of their own."""
    assert attention_tiles.architecture(capability) == architecture


def test_gpus_before_ampere_are_refused_with_a_reason() -> None:
    assert launching.refusal((8, 0)) is launching.refusal((12, 0)) is None
    assert launching.refusal((7, 5)).startswith("compute capability 7.5: ")


@outer_run
def test_sizes_of_one_are_constants_as_for_tritons_launcher() -> None:
    qkv = torch.empty(1, 1, 3, 1, 64, device="meta")
    launcher = launchers_of(qkv)["forward"]
    made = attention_tiles.recorded_launch(launcher, Tiles(64, 32, 8, 1))
    types, constants, _ = aot.signature(made.kernel, made.arguments)
    assert (constants["heads"], constants["tokens"]) == (1, 1)
    assert types["heads"] == types["tokens"] == "constexpr" and types["stride_n"] == "i32"


def test_the_table_on_the_disk_takes_measured_rows(tmp_path) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(attention_tiles.TILES_FILE.read_bytes())
    measured = {
        (90, "whole", 2, 64): Tiles(128, 0, 8, 2),
        (0, "whole", 2, 32): Tiles(1, 2, 3, 4),
    }
    attention_tiles.write_tiles(measured, path)
    assert attention_tiles.read_tiles(path) == TILES | measured
    attention_tiles.write_tiles({}, path)
    before = path.read_text()
    attention_tiles.write_tiles({}, path)
    assert path.read_text() == before and len(before.splitlines()) == len(TILES) + 1 + 2
    assert TILES[(0, "whole", 2, 64)] == Tiles(64, 0, 4, 1)


# ---------------------------------------------------------------------------------------------
# Reference and bad input
# ---------------------------------------------------------------------------------------------


def test_reference_has_the_gradient_of_its_formula() -> None:
    qkv = normal(1, 5, 3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_qkvpacked(x, 0.7), qkv)
    with torch.no_grad():
        torch.testing.assert_close(attention_qkvpacked(qkv, 0.7), in_pytorch(qkv, 0.7))


def test_other_widths_take_the_reference() -> None:
    qkv = normal(2, 6, 3, 2, 24, dtype=torch.bfloat16)
    torch.testing.assert_close(attention_qkvpacked(qkv), in_pytorch(qkv), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), "qkv must be a tensor, not NoneType"),
        ((torch.zeros(2, 5, 3, 32),), r"\[B, N, 3, H, D\], not \(2, 5, 3, 32\)"),
        ((torch.zeros(2, 5, 2, 1, 32),), r"\[B, N, 3, H, D\], not \(2, 5, 2, 1, 32\)"),
        ((torch.zeros(2, 0, 3, 1, 32),), r"N, H, D > 0, not \(2, 0, 3, 1, 32\)"),
        ((torch.zeros(2, 5, 3, 1, 32).int(),), r"qkv must hold floats, not torch.int32"),
        ((torch.zeros(2, 5, 3, 1, 32), -1.0), r"scale must be finite and not negative, not -1.0"),
        ((torch.zeros(2, 5, 3, 1, 32), math.nan), r"scale must be finite .* not nan"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention_qkvpacked(*arguments)


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


def training_call(tokens: int, batch: int = 8, width: int = 64) -> tuple[Any, Tensor]:
    leaf = normal(batch, tokens, 3, 6, width, dtype=torch.bfloat16).requires_grad_()
    grad_out = normal(batch, tokens, 6, width, dtype=torch.bfloat16)

    def call() -> list[Tensor]:
        out = attention_qkvpacked(leaf)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad_out)]

    return call, leaf


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", (*TOKENS, 197, 208, 256, 577, 1025))
def test_accuracy_on_a_gpu(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_accuracy(dtype, 2, tokens, 2, width)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (198, 577))
def test_agrees_with_pytorch_at_training_shapes(tokens: int) -> None:
    check_accuracy(torch.bfloat16, 8, tokens, 6, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (198, 577))
def test_250_repeats_are_equal(tokens: int) -> None:
    call, _ = training_call(tokens, batch=60)
    assert_250_repeats_are_equal(call)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (198, 577))
def test_no_call_waits_for_the_device(tokens: int) -> None:
    call, _ = training_call(tokens)
    assert_waits_for_nothing(call)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (198, 577))
def test_graph_replay_with_other_inputs(tokens: int) -> None:
    call, leaf = training_call(tokens)
    assert_replays(call, [leaf])


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    qkv = torch.zeros(1800, 578, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv[-1] = normal(578, 3, 12, 64, dtype=torch.bfloat16)
    grad_out = torch.zeros(1800, 578, 12, 64, device="cuda", dtype=torch.bfloat16)
    grad_out[-1] = normal(578, 12, 64, dtype=torch.bfloat16)
    whole = results(attention_qkvpacked, qkv, grad_out)
    last = results(attention_qkvpacked, qkv[-1:], grad_out[-1:])
    assert all(torch.equal(a[-1:], b) for a, b in zip(whole, last, strict=True))
