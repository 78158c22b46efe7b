"""``mlp_backward`` in a fused model: where it runs, and that results differ by rounding only.

The kernel runs on a GPU, or in Triton's interpreter, in half precision alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.models import fuse, unfuse
from deit_fast.models.fused import FusedMlp
from deit_fast.models.shadow import Shadows
from helpers.fused import FEW_IMAGES, FOLDS, KERNELS, assert_same, build_wide, run, shadow_step
from helpers.kernels import DEVICE, outer_run, run_in_the_interpreter

OTHERS = tuple(name for name in KERNELS if name != "mlp_backward")
runs = pytest.mark.skipif(not FOLDS, reason="needs a GPU or Triton's interpreter")


@outer_run
def test_all_in_the_interpreter() -> None:
    assert "failed" not in run_in_the_interpreter(__file__)


class _Calls(TorchDispatchMode):
    """Counts the calls of the operator."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += "bias_gelu_linear_backward" in str(function)
        return function(*arguments, **(options or {}))


@contextmanager
def counted() -> Iterator[_Calls]:
    with _Calls() as calls:
        yield calls


def half_run(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    with torch.autocast(DEVICE, torch.bfloat16):
        return run(model, FEW_IMAGES)


def test_mlp_backward_is_chosen_separately() -> None:
    for kernels, joins in ((KERNELS, True), (OTHERS, False)):
        assert fuse(build_wide("plain"), kernels=kernels).blocks[0].mlp.joins_backward is joins
    model = fuse(build_wide("plain"), kernels=KERNELS)
    assert not any(isinstance(module, FusedMlp) for module in unfuse(model).modules())


@runs
@pytest.mark.parametrize("kind", ["distilled", "deit3", "average"])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_gradients_are_as_close_as_without_it(kind: str, drop_path: float) -> None:
    model = build_wide(kind, drop_path_rate=drop_path).train()
    true = run(copy.deepcopy(model).double(), FEW_IMAGES.double())
    with counted() as calls:
        theirs = half_run(fuse(model, kernels=OTHERS))
    assert calls.count == 0
    with counted() as calls:
        mine = half_run(fuse(model, kernels=KERNELS))
    assert calls.count == 2
    assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True))
    squares = torch.zeros(2, dtype=torch.float64)
    for name, exact in true[1].items():
        pair = (mine[1][name], theirs[1][name])
        assert pair[0].dtype == torch.float32
        errors = torch.stack([(x - exact).norm() for x in pair]).cpu()
        assert errors[0] <= 1.5 * errors[1], name
        squares += errors**2
    assert squares[0] <= 1.21 * squares[1]  # of the whole gradient


@runs
def test_it_reads_shadow_weights() -> None:
    model = fuse(build_wide("distilled").train(), kernels=KERNELS)
    shadows = Shadows(model, torch.bfloat16)
    cast = shadow_step(model, None)
    with counted() as calls:
        read = shadow_step(model, shadows)
    assert calls.count == 2
    assert_same(read, cast, rtol=2e-2)


def hook(mlp: nn.Module) -> None:
    mlp.fc2.register_forward_hook(lambda *_: None)


def drop(mlp: nn.Module) -> None:
    mlp.drop1.p = 0.5


def norm(mlp: nn.Module) -> None:
    mlp.norm = nn.LayerNorm(mlp.fc2.in_features, device=DEVICE)


@pytest.mark.parametrize("change", [hook, drop, norm])
def test_a_module_between_the_two_layers_disables_it(change) -> None:
    model = build_wide("average", drop_path_rate=0.3).train()
    for block in model.blocks:
        change(block.mlp)
    theirs = run(model, FEW_IMAGES)
    model = fuse(model, kernels=KERNELS)
    assert_same(run(model, FEW_IMAGES), theirs)
    with counted() as calls:
        half_run(model)
    assert calls.count == 0


def test_a_hook_added_later_runs() -> None:
    model = fuse(build_wide("plain").train(), kernels=KERNELS)
    seen: list[Tensor] = []
    model.blocks[0].mlp.fc2.register_forward_hook(lambda _, __, y: seen.append(y))
    run(model, FEW_IMAGES)
    assert len(seen) == 1
