"""A teacher of logits and features whose result for an image does not depend on its batch.

`helpers.feature_teacher:rows`: patches of 4 pixels of 16-pixel images, 4 x 4 tokens of 12 channels.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

WIDTH = 12


class Rows(nn.Module):
    """A convolution over patches, run image by image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.head = nn.Linear(WIDTH, num_classes)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = torch.cat([self.patch(image[None]) for image in images]).tanh()
        patches = maps.flatten(2).transpose(1, 2)
        cls = torch.stack([rows.mean(0) for rows in patches])
        logits = torch.stack([self.head(row) for row in cls])
        return {"logits": logits, "cls": cls * 3 + 1, "patches": patches}


def transformer(num_classes: int) -> nn.Module:
    """A feature extractor as timm's: images of 32 pixels, 4 x 4 patches of 24 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
        )


def rows(num_classes: int) -> nn.Module:
    return Rows(num_classes)


class RowsWithoutNumbers(Rows):
    """Gives no number for the sixth image of a large batch."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = super().forward(images)
        found["cls"][5:6] = torch.nan
        return found


def rows_without_numbers(num_classes: int) -> nn.Module:
    return RowsWithoutNumbers(num_classes)


def other_rows(num_classes: int) -> nn.Module:
    model = Rows(num_classes)
    for parameter in model.parameters():
        parameter.data.neg_()
    return model
