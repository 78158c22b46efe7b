"""One transformer block and whole DeiT models, forward and backward: timm's compared with fused
ones, each kernel on and off, eager and compiled.

The results determine ``DEFAULT_KERNELS``: a kernel is on if the compiled model is faster with it.
The block is that of DeiT-S at 198 tokens with stochastic depth 0.1; whole models include both
heads. Fused models without kernels show what the shorter last block alone saves. A whole model is
timed by the host's clock over consecutive calls, so launch overhead counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from deit_fast.models.fuse import KERNELS, fuse
from deit_fast.training.compiling import compile_blocks

from .common import Case, Lazy

DROP_PATH = 0.1
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads


def model_of(size: str, depth: int, device: str) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model(
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


def kernel_sets(compiled: bool) -> dict[str, tuple[str, ...]]:
    """Name of an implementation -> its kernels: all, none, all but one and, eager, one alone.

    mlp_backward needs bias_gelu: it is left out with it, and never alone.
    """
    sets: dict[str, tuple[str, ...]] = {"ours, all kernels": KERNELS, "ours, no kernel": ()}
    for name in KERNELS:
        out = (name, "mlp_backward") if name == "bias_gelu" else (name,)
        kept = tuple(kernel for kernel in KERNELS if kernel not in out)
        sets[f"ours, all but {' and '.join(out)}"] = kept
        if not compiled:
            alone = ("bias_gelu", name) if name == "mlp_backward" else (name,)
            sets[f"ours, {' and '.join(alone)} only"] = alone
    return sets


def variants(
    make: Callable[[], nn.Module], pick: Callable[[Any], nn.Module],
    run: Callable[[Callable[..., Any]], Callable[[], Any]], compiled: bool,
) -> dict[str, Callable[[], Any] | str]:  # fmt: skip
    """timm's, and fused with every useful set of kernels.

    Args:
        make: timm's model.
        pick: takes the module that is called from it.
        run: takes the module and returns the step to time.
        compiled: fused models block by block, as ``compile=auto`` does on a GPU; timm's as a whole,
            as its own training script does.
    """

    def timms() -> Callable[[], Any]:
        module = pick(make())
        return run(torch.compile(module) if compiled else module)

    def fused(kernels: tuple[str, ...]) -> Callable[[], Any]:
        model = fuse(make(), kernels=kernels)
        module = pick(model)
        if compiled and module is model:
            compile_blocks(module)
        elif compiled:
            module.compile()
        return run(module)

    (first, _), *sets = kernel_sets(compiled).items()
    found: dict[str, Callable[[], Any] | str] = {first: Lazy(lambda: fused(KERNELS))}
    found["timm"] = Lazy(timms)
    return found | {name: Lazy(partial(fused, kernels)) for name, kernels in sets}


def block_case(batch: int, device: str, compiled: bool) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        x = torch.randn(batch, 198, SIZES["small"][0], device=device, requires_grad=True)
        return variants(
            lambda: model_of("small", 2, device),
            lambda model: model.blocks[1],
            lambda block: step(block, x, device),
            compiled,
        )

    how = "compiled" if compiled else "eager"
    return Case(f"block DeiT-S B={batch} {how}", build, items=batch)


def model_case(size: str, batch: int, depth: int, device: str, compiled: bool) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        images = torch.randn(batch, 3, 224, 224, device=device)
        return variants(
            lambda: model_of(size, depth, device),
            lambda model: model,
            lambda model: step(model, images, device),
            compiled,
        )

    how = "compiled" if compiled else "eager"
    repeats = 10 if device == "cuda" else 1
    name = f"DeiT-{size} depth={depth} B={batch} {how}"
    return Case(name, build, items=batch, repeats=repeats)


def cases(device: str) -> list[Case]:
    if device == "cpu":  # ours has no kernel there: what the stream itself costs or saves
        return [block_case(8, device, False), model_case("tiny", 8, 12, device, False)]
    sizes = (("small", 256), ("tiny", 512), ("base", 128))
    found = [model_case(size, batch, 12, device, True) for size, batch in sizes]
    found += [model_case(size, batch, 12, device, False) for size, batch in sizes]
    return [*found, *(block_case(256, device, compiled) for compiled in (True, False))]
