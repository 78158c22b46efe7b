"""How fast a run is against what its hardware could do: FLOPs of an image, peak of a GPU."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit_fast.models.fuse import unfuse

PEAK_BF16 = {
    # Dense bfloat16 FLOP/s from NVIDIA's data sheets (the sparse figures are twice these).
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def training_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs of one image's training step: three times the forward's.

    Counted on the plain model: what a fused one saves makes its utilisation higher, as its speed.
    """
    plain = unfuse(copy.deepcopy(model)).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.empty(1, 3, image_size, image_size, device="meta"))
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of the GPU, FLOP/s; None where it is not known, rather than a guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [peak for part, peak in PEAK_BF16.items() if part in name]
    return found[0] if found else None
