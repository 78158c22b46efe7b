"""A teacher that writes down what it is shown: `helpers.witness_teacher:convnet@weights`.

A line for each call, the digests of its images in order, goes to the file RANK.txt in the folder
WITNESS.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from deit_fast.models.convnet import small_convnet


class Witness(nn.Sequential):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) >= 4:  # fewer: the loader's question for the number of classes
            digests = [hashlib.sha1(image.numpy().tobytes()).hexdigest()[:16] for image in images]
            with open(Path(os.environ["WITNESS"]) / f"{os.environ.get('RANK', '0')}.txt", "a") as f:
                f.write(" ".join(digests) + "\n")
        return super().forward(images)


def convnet(num_classes: int) -> nn.Module:
    return Witness(*small_convnet(num_classes))
