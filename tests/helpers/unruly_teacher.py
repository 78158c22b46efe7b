"""A teacher that does harm at a chosen call: `helpers.unruly_teacher:convnet@weights`.

UNRULY="SIGTERM:5" signals this process at its sixth batch, "SIGKILL:5" kills it, "nan:5" returns
NaN for that batch, "oom:5" asks for more memory than there is, "drift:5" changes its own weights
from then on; "nan:5:1" does so in rank 1 alone.
"""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

from deit_fast.models.convnet import small_convnet


class Unruly(nn.Sequential):
    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) < 4:  # the loader's question for the number of classes
            return super().forward(images)
        action, at, *rank = os.environ.get("UNRULY", "none:0").split(":")
        chosen = self.calls == int(at) and rank in ([], [os.environ.get("RANK", "0")])
        self.calls += 1
        if chosen and action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, action))
        if chosen and action == "oom":
            torch.empty(1 << 50)
        if chosen and action == "drift":
            with torch.no_grad():
                self[-1].weight *= -9
        logits = super().forward(images)
        return logits * float("nan") if chosen and action == "nan" else logits


def convnet(num_classes: int) -> nn.Module:
    return Unruly(*small_convnet(num_classes))
