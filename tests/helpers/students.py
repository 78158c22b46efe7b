"""Small students with one head and with two, for losses and timm's tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS, CLASSES = 6, 11


class TwoHeads(nn.Module):
    """A student with two heads, with the few names that timm's tasks ask for."""

    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012
    num_classes, in_chans = CLASSES, 3

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dist = (nn.Linear(12, CLASSES, dtype=torch.float64) for _ in "ab")

    def set_distilled_training(self, enable: bool) -> None:
        assert enable

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x.flatten(1)), self.head_dist(x.flatten(1))


class OneHead(nn.Module):
    """A teacher, or a student without a distillation head, that counts its calls."""

    pretrained_cfg = TwoHeads.pretrained_cfg
    num_classes, in_chans = CLASSES, 3

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, CLASSES, dtype=torch.float64)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return 3 * self.head(x.flatten(1))


def inputs() -> Tensor:
    return torch.randn(ROWS, 3, 2, 2, dtype=torch.float64)
