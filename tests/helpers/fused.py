"""Small timm models, fused or not, and the comparison of their outputs and gradients."""

from __future__ import annotations

import sys

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deit_fast.models.shadow import Shadows
from helpers.kernels import DEVICE, INTERPRETED

KERNELS = sys.modules["deit_fast.models.fuse"].KERNELS  # the package's `fuse` is the function
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
NAMES = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "plain": ("deit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"init_values": 0.3}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
}


def build(kind: str, **changes: object) -> nn.Module:
    """A small model with no constant parameters: gammas and biases differ from 0 and 1."""
    name, options = NAMES[kind]
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7, **(SMALL | options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if kind == "distilled":
        model.set_distilled_training(True)
    return model.to(DEVICE)


def run(model: nn.Module, images: Tensor, seed: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of a loss that weighs each of them differently."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(images)
    outputs = list(output) if isinstance(output, tuple) else [output]
    torch.manual_seed(seed)
    sum((out * torch.randn(out.shape).to(out)).sum() for out in outputs).backward()
    return [out.detach() for out in outputs], {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


class FlopCount(TorchDispatchMode):
    """FLOPs of the operators. torch's FlopCounterMode has hooks on all modules, so that a fused
    model calls them all.
    """

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*arguments, **(options or {}), out_val=output)
        return output


def assert_same(mine: tuple, theirs: tuple, rtol: float = 1e-5) -> None:
    """Norm of the difference, relative; a gradient that one lacks, the other lacks."""
    assert len(mine[0]) == len(theirs[0]) and mine[1].keys() == theirs[1].keys()
    pairs = [("output", *pair) for pair in zip(mine[0], theirs[0], strict=True)]
    pairs += [(name, mine[1][name], theirs[1][name]) for name in mine[1]]
    for name, got, expected in pairs:
        assert expected is not None and got is not None, name
        error = ((got - expected).norm() / expected.norm()).item()
        assert error <= rtol, f"{name}: {error:.1e}"


IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
FEW_IMAGES = IMAGES[:3]
FOLDS = INTERPRETED or DEVICE == "cuda"


def build_wide(kind: str, **changes: object) -> nn.Module:
    """Heads of 32 channels, which the attention kernels take."""
    return build(kind, **({"embed_dim": 96, "depth": 2} | changes))


def shadow_step(model: nn.Module, shadows: Shadows | None) -> tuple:
    with torch.autocast(DEVICE, torch.bfloat16):
        if shadows is None:
            return run(model, FEW_IMAGES)
        shadows.refresh()
        with shadows.current():
            return run(model, FEW_IMAGES)
