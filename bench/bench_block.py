"""One transformer block and whole DeiT models, forward and backward: timm's against fused, each
kernel on and off, eager and compiled.

This decides ``DEFAULT_KERNELS``: a kernel stays on where the compiled model is faster with it. The
block is DeiT-S's at 198 tokens with stochastic depth 0.1; "whole model" includes both heads. Fused
models without kernels show what the shorter last block saves by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from deit_fast.models.fuse import KERNELS, fuse

from .common import Case

DROP_PATH = 0.1
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads


def model_of(size: str, depth: int, device: str) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        f"deit_{size}_distilled_patch16_224", depth=depth, drop_path_rate=DROP_PATH
    )
    model.set_distilled_training(True)
    return model.train().to(device)


def step(function: Callable[..., Any], inputs: torch.Tensor, device: str) -> Callable[[], Any]:
    """Forward under bfloat16 autocast (float32 on a CPU) and backward."""

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = function(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

    return run


def variants(model: nn.Module, pick: Callable[[Any], nn.Module], compiled: bool) -> dict[str, Any]:
    """timm's, and fused with every useful set of kernels; ``pick`` takes what is called."""
    sets: dict[str, tuple[str, ...]] = {"ours, all kernels": KERNELS, "ours, no kernel": ()}
    sets |= {f"ours, {name} only": (name,) for name in KERNELS}
    sets |= {f"ours, all but {name}": tuple(k for k in KERNELS if k != name) for name in KERNELS}
    modules = {"timm": pick(model)}
    for name, kernels in sets.items():
        modules[name] = pick(fuse(copy.deepcopy(model), kernels=kernels))
    suffix = " torch.compile" if compiled else ""
    return {
        name + suffix: torch.compile(module) if compiled else module
        for name, module in modules.items()
    }


def block_case(batch: int, device: str, compiled: bool) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        x = torch.randn(batch, 198, SIZES["small"][0], device=device, requires_grad=True)
        found = variants(model_of("small", 2, device), lambda m: m.blocks[1], compiled)
        return {name: step(block, x, device) for name, block in found.items()}

    how = "compiled" if compiled else "eager"
    return Case(f"block DeiT-S B={batch} {how}", build, items=batch)


def model_case(size: str, batch: int, depth: int, device: str, compiled: bool) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        images = torch.randn(batch, 3, 224, 224, device=device)
        found = variants(model_of(size, depth, device), lambda m: m, compiled)
        return {name: step(model, images, device) for name, model in found.items()}

    how = "compiled" if compiled else "eager"
    return Case(f"DeiT-{size} depth={depth} B={batch} {how}", build, items=batch)


def cases(device: str) -> list[Case]:
    if device == "cpu":  # ours has no kernel there: what the stream itself costs or saves
        return [block_case(8, device, False), model_case("tiny", 8, 12, device, False)]
    found = [block_case(256, device, compiled) for compiled in (False, True)]
    for size, batch in (("small", 256), ("tiny", 512), ("base", 128)):
        found += [model_case(size, batch, 12, device, compiled) for compiled in (False, True)]
    return found
