"""What the launchers of all kernels share: dtypes, registering operators, signatures to compile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels read and write
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS = TYPE_NAMES | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


def refusal(capability: tuple[int, int]) -> str | None:
    """Why GPUs of this compute capability do not run the kernels; None: they do."""
    if capability >= (8, 0):
        return None
    found = ".".join(map(str, capability))
    return f"compute capability {found}: Triton's bfloat16 and asynchronous copies need 8.0"


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    reason = refusal(torch.cuda.get_device_capability(device))
    if reason is not None:
        name = torch.cuda.get_device_name(device)
        logging.getLogger(__name__).warning("%s takes plain PyTorch: %s", name, reason)
    return reason is None


@torch.compiler.assume_constant_result
def _is_new_enough(device: torch.device) -> bool:
    return _runs_kernels(device)


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU that runs the kernels; says once of one that does not, and why."""
    return x.is_cuda and _is_new_enough(x.device)


def implement(
    library: torch.library.Library, name: str, function: Callable, fake: Callable
) -> None:
    """One implementation for CPU and CUDA, and the shapes of its results for tracing."""
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"deit_fast::{name}", fake, lib=library)


def signature(
    function: Any, values: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Types, constants and alignments that Triton's launcher would find for these values.

    Upper-case arguments are constants. Tensors may be on the meta device: their start then counts
    as aligned, as the allocator's is.
    """
    fixed = {p.name for p in function.params if p.do_not_specialize}
    types, constants, aligned = {}, {}, {}
    for name in function.arg_names:
        value = values[name]
        if value is None or name.isupper():
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = f"*{_POINTERS[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned[name] = 16
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and name not in fixed:
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "i32"
            if name not in fixed and value % 16 == 0:
                aligned[name] = 16
    return types, constants, aligned
