"""A teacher that fails as the variable FRAGILE says: `KIND:NUMBER`.

slow: each call takes NUMBER ms. always: at each call. raise, memory, disk, cuda, term: at call
NUMBER of the process. kill-rows: at each call of NUMBER images, with SIGKILL.
"""

from __future__ import annotations

import os
import signal
import time

from torch import Tensor, nn

from helpers.feature_teacher import Rows

_ERRORS = {
    "raise": ValueError("a teacher that failed"),
    "memory": MemoryError("too large"),
    "disk": OSError(5, "Input/output error", "a disk"),
    "cuda": RuntimeError("CUDA error: device-side assert triggered"),
}


class Fragile(Rows):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.calls += len(images) > 4  # without those that try the teacher
        kind, _, number = os.environ.get("FRAGILE", "none:0").partition(":")
        if kind == "kill-rows" and len(images) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == int(number) and kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "slow":
            time.sleep(int(number) / 1000)
        if kind == "always" and len(images) > 4:
            raise _ERRORS["raise"]
        if self.calls == int(number) and kind in _ERRORS:
            raise _ERRORS[kind]
        return super().forward(images)


def fragile(num_classes: int) -> nn.Module:
    return Fragile(num_classes)
