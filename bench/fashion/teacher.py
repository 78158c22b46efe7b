"""The protocol's teachers with their features: `small_convnet`, which by itself gives logits."""

from __future__ import annotations

from torch import Tensor, nn

from deit_fast.models.convnet import small_convnet


class FeatureConvnet(nn.Sequential):
    """`small_convnet` of width W with the names of its weights.

    Takes images [B, 3, S, S]. Gives `logits` [B, C], `pooled` [B, 4 W] and `patches`
    [B, (S // 4)^2, 4 W], the map before the last pooling, row by row.
    """

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        *stages, pooling, average, flatten, head = self
        maps = images
        for layer in stages:
            maps = layer(maps)
        pooled = flatten(average(pooling(maps)))
        patches = maps.flatten(2).transpose(1, 2)
        return {"logits": head(pooled), "pooled": pooled, "patches": patches}


def narrow(num_classes: int) -> nn.Module:
    """Teacher A to be trained."""
    return small_convnet(num_classes, 16)


def wide(num_classes: int) -> nn.Module:
    """Teacher B to be trained."""
    return small_convnet(num_classes, 24)


def narrow_features(num_classes: int) -> nn.Module:
    """Teacher A to be asked for features."""
    return FeatureConvnet(*narrow(num_classes).children())


def wide_features(num_classes: int) -> nn.Module:
    """Teacher B to be asked for features."""
    return FeatureConvnet(*wide(num_classes).children())
