"""The attention in plain PyTorch: what the kernels are judged against, and the CPU's path."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(qkv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of [B, N, 3, H, D]; float32 inside, float64 for float64 input."""
    inner = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    # Autocast would make the products bfloat16 again.
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = qkv.to(inner).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax((q @ k.transpose(-2, -1)) * scale, dim=-1)
        return (weights @ v).transpose(1, 2).contiguous().to(qkv.dtype)
