"""Arithmetic and copies that need care on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, of any shape and floating dtype, with the same bits on every device.

    On CUDA torch divides by a Python number as it multiplies by the number's rounded reciprocal
    (`div_true_kernel_cuda`), which may differ in the last bit. It divides by a tensor exactly.
    """
    return x / x.new_full((), number)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; on CUDA neither waits for the work that is queued there."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
