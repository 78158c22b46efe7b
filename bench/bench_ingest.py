"""Ingest of one batch, uint8 to normalised, erased, mixed: ours against the eager chain of DeiT.

Bytes: 3 S^2 of uint8 read and 3 S^2 elements written per view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from deit_fast.kernels.ingest import CUTMIX, MIXUP, PLAN_COLUMNS, ingest

from .common import Case

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224


def plan(batch: int, generator: torch.Generator) -> Tensor:
    """A DeiT-like plan: half flipped, a quarter erased, every pair mixed; int32 [batch, 22]."""
    half = torch.zeros(batch, 8, dtype=torch.int32)
    half[:, 0] = torch.arange(batch)
    half[:, 1] = torch.arange(batch) % 2
    half[::4, 2:6] = torch.tensor([40, 60, 94, 94])  # 17.6 % of the area, the recipe's mean
    half[:, 6:] = torch.randint(1 << 31, (batch, 2), generator=generator, dtype=torch.int32)
    partner = half.view(-1, 2, 8).flip(1).reshape(-1, 8)
    mix = torch.zeros(batch, 6, dtype=torch.int32)
    kind = torch.arange(batch) // 2 % 2
    mix[:, 0] = torch.where(kind == 0, MIXUP, CUTMIX)
    mix[:, 1:] = torch.tensor([30, 30, 120, 120, 40000])
    rows = torch.cat((half, partner, mix), 1)
    assert rows.shape[1] == len(PLAN_COLUMNS)
    return rows


def eager(images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """DeiT's chain with torchvision's batch operations: its noise, one lambda for all."""
    normalize = v2.Normalize(MEAN, STD)

    def run() -> Tensor:
        x = v2.functional.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
        x = x.contiguous()
        x[1::2] = v2.functional.horizontal_flip(x[1::2])
        x = normalize(x)
        for view in x[::4]:
            view[:, 40:134, 60:154].normal_()
        return x.mul(0.61).add_(x.flip(0), alpha=0.39).to(dtype)

    return run


def cases(device: str) -> list[Case]:
    def case(batch: int, dtype: torch.dtype) -> Case:
        def build() -> dict[str, Callable[[], Any] | str]:
            generator = torch.Generator().manual_seed(0)
            shape = (batch, SIZE, SIZE, 3)
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
            rows = plan(batch, generator).to(device)
            return {
                "ours": lambda: ingest(images, rows, MEAN, STD, dtype),
                "torchvision v2": eager(images, dtype),
            }

        size = batch * 3 * SIZE * SIZE
        name = f"B={batch} S={SIZE} {str(dtype).removeprefix('torch.')}"
        return Case(name, build, bytes_moved=size * (1 + dtype.itemsize), items=batch)

    if device == "cpu":
        return [case(32, torch.float32)]
    return [case(batch, torch.bfloat16) for batch in (256, 1024)]
