"""torch.compile in a run: which parts are compiled on a device, and how many graphs that took."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.models.fused import COMPILED_METHODS, FusedBlock, FusedForward
from deit_fast.models.student import forward_heads

log = logging.getLogger("deit_fast")

CompileMode: TypeAlias = Literal["none", "blocks", "model"]


def resolve_compile(
    config: RunConfig, device: torch.device, student: nn.Module | None = None
) -> CompileMode:
    """The value of ``config.compile``, with `auto` resolved for a device.

    `auto` is `blocks` on CUDA. It is `none` on a CPU, on a GPU that Triton does not support, and
    for a student without ``.blocks``.

    Args:
        student: the model to train; None considers the device alone, as for an online teacher.
    """
    if config.compile != "auto":
        return config.compile
    return "none" if _why_not(device, student) else "blocks"


def _why_not(device: torch.device, student: nn.Module | None) -> str | None:
    """Why `auto` compiles nothing; None if it compiles the blocks."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0"
    if student is not None and not _has_blocks(student):
        return f"{type(student).__name__} has no .blocks; --compile model compiles it as a whole"
    return None


def log_compile(config: RunConfig, device: torch.device, student: nn.Module) -> None:
    """Log in one line what this run compiles."""
    mode = resolve_compile(config, device, student)
    source = "compile=auto means " if config.compile == "auto" else ""
    if mode != "none":
        log.info("%scompile=%s: the first steps are slow, they compile the model", source, mode)
    elif source:
        log.info("%scompile=none: %s", source, _why_not(device, student))


def _has_blocks(model: nn.Module) -> bool:
    return isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList))


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block separately, in place: equal blocks share one compilation.

    In a fused model the embedding before the blocks is compiled too. Shapes are constants of the
    compiled code, so a second batch size is compiled again and runs as fast as the first. Blocks
    of timm take one compilation for each drop rate, so torch's limit of compilations is raised.

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
        if not isinstance(block, FusedBlock):  # timm's, or a wrapper
            block.compile(**options)
            continue
        for name in COMPILED_METHODS:
            setattr(block, name, torch.compile(getattr(block, name), **options))


def compile_evaluation(mode: CompileMode, average: nn.Module | None) -> Callable[..., Any]:
    """The compiled form of ``forward_heads`` for evaluation.

    Args:
        mode: of the run. With `blocks` the student's blocks are compiled already.
        average: the moving average; `blocks` compiles its blocks in place.
    """
    if mode == "model":
        return torch.compile(forward_heads, dynamic=False)
    if mode == "blocks" and average is not None:
        compile_blocks(average)
    return forward_heads


def raise_recompile_limit() -> None:
    """Allow as many compilations of one function as of all functions together (256 by default).

    torch's own limit of 8 is below the number of drop rates of a deep model. Beyond a limit torch
    warns and runs the function uncompiled.
    """
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, settings.accumulated_recompile_limit)


class CompileCount:
    """Counts the graphs that torch.compile makes for a run, to warn about late compilations."""

    def __init__(self) -> None:
        self._made = 0
        self._expected = {"steps", "evaluation"}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around the run's own work: other runs of the process may compile between."""
        before = _graphs()
        try:
            yield
        finally:
            self._made += _graphs() - before

    def report(self, step: int, of: Literal["steps", "evaluation"] = "steps") -> None:
        """Log how many graphs were made since the last call.

        The first call for each kind of work logs them as information, later calls as a warning.

        Args:
            step: of the run.
            of: the work since the last call.
        """
        made, self._made = self._made, 0
        if made and of in self._expected:
            log.info("torch.compile made %d graphs in the first %s", made, of)
        elif made:
            log.warning(
                "torch.compile made %d more graphs before step %d, which slowed these steps; "
                "TORCH_LOGS=recompiles says why",
                made, step,
            )  # fmt: skip
        self._expected.discard(of)


def _graphs() -> int:
    """Number of graphs that torch.compile has made in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # absent if nothing was compiled
    return utils.counters["stats"]["unique_graphs"] if utils is not None else 0
