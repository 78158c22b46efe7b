"""torch.compile in a run: what the setting means on a device, and how much was compiled."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.models import forward_heads
from deit_fast.models.fused import COMPILED_METHODS, FusedForward

log = logging.getLogger("deit_fast")

CompileMode: TypeAlias = Literal["none", "blocks", "model"]


def resolve_compile(
    config: RunConfig, device: torch.device, student: nn.Module | None = None
) -> CompileMode:
    """What ``config.compile`` means on a device. Any value but `auto` means itself.

    `auto` is `blocks` on CUDA. It is `none` on a CPU; on a GPU that Triton does not support; and
    for a student without ``.blocks``.

    Args:
        student: the model to train; None asks about the device alone, as for an online teacher.
    """
    if config.compile != "auto":
        return config.compile
    return "none" if _why_not(device, student) else "blocks"


def _why_not(device: torch.device, student: nn.Module | None) -> str | None:
    """Why `auto` compiles nothing; None where it compiles the blocks."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0"
    if student is not None and not _has_blocks(student):
        return f"{type(student).__name__} has no .blocks; --compile model compiles it as a whole"
    return None


def log_compile(config: RunConfig, device: torch.device, student: nn.Module) -> None:
    """One line: what is compiled in this run, and what it costs."""
    mode = resolve_compile(config, device, student)
    asked = "compile=auto means " if config.compile == "auto" else ""
    if mode != "none":
        log.info("%scompile=%s: the first steps are slow, they compile the model", asked, mode)
    elif asked:
        log.info("%scompile=none: %s", asked, _why_not(device, student))


def _has_blocks(model: nn.Module) -> bool:
    return isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList))


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block by itself, in place: equal blocks share one compilation.

    Of a fused model the embedding in front of the blocks is compiled too.

    Shapes are constants of the compiled code, so it is as fast for the second batch size of a
    process as for the first. torch's limit of compilations per function, behind which it runs that
    function uncompiled, is raised: blocks that timm runs take one compilation for each drop rate.

    Args:
        options: for torch.compile.

    Raises:
        InputError: the model has no list of blocks.
    """
    if not _has_blocks(model):
        raise InputError(
            f"compile=blocks needs a model with .blocks, which {type(model).__name__} lacks: "
            f"choose compile=model"
        )
    options = {"dynamic": False} | options
    raise_recompile_limit()
    blocks: Any = model.blocks
    if isinstance(model, FusedForward):
        model.embed = torch.compile(model.embed, **options)  # type: ignore[method-assign]
    for block in blocks:
        names = [name for name in COMPILED_METHODS if hasattr(block, name)]  # of a fused one
        for name in names:
            setattr(block, name, torch.compile(getattr(block, name), **options))
        if not names:
            block.compile(**options)


def compile_evaluation(mode: CompileMode, average: nn.Module | None) -> Callable[..., Any]:
    """What evaluation calls in place of ``forward_heads``, compiled as training is.

    Args:
        mode: of the run. By `blocks` the student's own are compiled already.
        average: the moving average, evaluated as well; `blocks` compiles its blocks in place.
    """
    if mode == "model":
        return torch.compile(forward_heads, dynamic=False)
    if mode == "blocks" and average is not None:
        compile_blocks(average)
    return forward_heads


def raise_recompile_limit() -> None:
    """Let one function be compiled as often as all functions together, 256 times by default.

    torch's own limit of 8 is less than a deep model has drop rates. Behind either limit torch warns
    and runs the function uncompiled.
    """
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, settings.accumulated_recompile_limit)


class CompileCount:
    """Counts the graphs that torch.compile makes, so that late compilations do not pass unseen."""

    def __init__(self) -> None:
        self._seen = _graphs()
        self._expected = {"steps", "evaluation"}

    def report(self, step: int, of: Literal["steps", "evaluation"] = "steps") -> None:
        """Log how many graphs were made since the last call; after the first of a kind a warning.

        Args:
            step: that the run has come to.
            of: what was done since the last call.
        """
        made, self._seen = _graphs() - self._seen, _graphs()
        if made and of in self._expected:
            log.info("torch.compile made %d graphs in the first %s", made, of)
        elif made:
            log.warning(
                "torch.compile made %d more graphs before step %d, which made those steps slow; "
                "TORCH_LOGS=recompiles says why",
                made, step,
            )  # fmt: skip
        self._expected.discard(of)


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # absent where nothing was compiled
    return utils.counters["stats"]["unique_graphs"] if utils is not None else 0
