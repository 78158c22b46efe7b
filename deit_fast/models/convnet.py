"""A small convolutional classifier: the demo's teacher, and a pattern for your own."""

from __future__ import annotations

from torch import nn


def small_convnet(num_classes: int, width: int = 16) -> nn.Module:
    """Three stages of two 3x3 convolutions with batch norm, then global average pooling.

    Takes images [B, 3, S, S] of any S >= 8; 73,000 parameters at the default width.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, width << stage, 3, padding=1, bias=False),
                nn.BatchNorm2d(width << stage),
                nn.ReLU(inplace=True),
            ]
            channels = width << stage
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers)
