"""Teacher features brought to a common scale, in float32, by the statistics of their cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.features.statistics import FeatureStatistics

NORMALISERS = ("none", "standard", "phi_s", "layer_norm")


class Normaliser(nn.Module):
    """Normalises features [..., D'] and keeps what it needs on its device.

    none         x
    standard     (x - mean) / std of each channel; the std of a dead channel counts as the floor
    phi_s        (x - mean) R' / phi: each channel has variance 1, distances keep their ratios
    layer_norm   each token minus its mean, over its deviation; no statistics

    It has no parameter, and its state dict is empty.

    Args:
        kind: one of these names.
        statistics: of the features; may be None where they are not read.

    Raises:
        InputError: an unknown name; statistics that are missing; PHI-S for a number of channels for
            which no Hadamard matrix is known.
    """

    shift: Tensor
    scale: Tensor
    rotation: Tensor

    def __init__(self, kind: str, statistics: FeatureStatistics | None) -> None:
        super().__init__()
        if kind not in NORMALISERS:
            names = ", ".join(NORMALISERS)
            raise InputError(f"features.normalise must be one of {names}, not {kind!r}")
        self.kind = kind
        if kind in ("none", "layer_norm"):
            return
        if statistics is None:
            raise InputError(
                f"features.normalise={kind} needs the statistics of a feature cache: choose "
                f"layer_norm or none"
            )
        self._keep("shift", statistics.mean)
        if kind == "standard":
            self._keep("scale", statistics.scale)
            return
        if statistics.rotation is None:
            raise InputError(
                f"features.normalise=phi_s: no Hadamard matrix is known for {statistics.width} "
                f"channels: choose standard"
            )
        self._keep("scale", torch.tensor(statistics.phi, dtype=torch.float64))
        self._keep("rotation", statistics.rotation)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features float [..., D'] to float32 [..., D'], also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.kind == "none":
                return x
            if self.kind == "layer_norm":
                return F.layer_norm(x, x.shape[-1:])
            x = x - self.shift
            if self.kind == "phi_s":
                x = x @ self.rotation.T
            return x / self.scale

    def restore(self, z: Tensor) -> Tensor:
        """Features from normalised ones, float32; the inverse of ``forward``.

        Raises:
            InputError: layer_norm, which forgets each token's mean and deviation.
        """
        if self.kind == "layer_norm":
            raise InputError("features.normalise=layer_norm has no inverse")
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.kind == "none":
                return z
            z = z * self.scale
            if self.kind == "phi_s":
                z = z @ self.rotation
            return z + self.shift
