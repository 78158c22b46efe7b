"""The images that a teacher's network takes, and how finished views are brought to its size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deit_fast.errors import InputError, first_line, is_out_of_memory

log = logging.getLogger("deit_fast")

RESIZE = "bicubic-antialias"
"""Name of ``resize`` in fingerprints."""

# Sides in pixels that are tried where the network's own is not known.
_COMMON_SIZES = (
    224, 32, 64, 48, 16, 28, 96, 128, 160, 192, 240, 256, 288, 320, 336, 384, 448, 512, 518,
)  # fmt: skip


def resize(images: Tensor, size: int) -> Tensor:
    """Normalised images [B, 3, S, S] as [B, 3, size, size], in float32.

    Bicubic with antialiasing, ``align_corners=False`` (torch's ``interpolate``); the images
    themselves, as float32, where they have that size.
    """
    images = images.float()
    if images.shape[-1] == size:
        return images
    return nn.functional.interpolate(
        images, (size, size), mode="bicubic", align_corners=False, antialias=True
    )


class ImageTrial:
    """Tries a network on noise.

    Args:
        run: the network, on normalised images.
        device: where it runs.
    """

    def __init__(self, run: Callable[[Tensor], Any], device: torch.device) -> None:
        self.run, self.device = run, device

    def noise(self, rows: int, channels: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, channels, size, size, generator=generator).to(self.device)

    @torch.no_grad()
    def takes(self, channels: int, size: int) -> bool:
        try:
            self.run(self.noise(1, channels, size))
        except Exception as error:  # whatever such images do to a network of others
            if is_out_of_memory(error):
                raise
            return False
        return True

    def find_size(self, model: nn.Module) -> int:
        """The first side that the network takes; the first tried where it takes none."""
        sizes = [size for size in (own_size(model), *_COMMON_SIZES) if size is not None]
        return next((size for size in sizes if self.takes(3, size)), sizes[0])

    def refusal(self, model: nn.Module, size: int, error: Exception) -> InputError:
        """Why the network failed: its number of channels, its image size, or itself; the message is
        the end of a sentence.

        Args:
            size: side of the images that it failed on, pixels.
            error: of the network.
        """
        if self.takes(1, size):
            return InputError(
                "it takes images of 1 channel, the views have 3: name a factory "
                "whose network makes them grey, such as images.mean(1, keepdim=True)"
            )
        patch = patch_size(model)
        if patch is not None and size % patch:
            whole = max(1, round(size / patch)) * patch
            if can_resample(model) or self.takes(3, whole):
                return InputError(
                    f"it has patches of {patch} pixels, which do not divide images of {size}: "
                    f"give --teacher-size {whole}, to which views are then resized"
                )
        other = self.find_size(model)
        if self.takes(3, other):
            return InputError(
                f"it takes images of {other} x {other} pixels, not {size} x {size}: give "
                f"--teacher-size {other} (load_teacher: teacher_size), to which views are then "
                f"resized, set view.image_size to {other}, or name another teacher"
            )
        return InputError(
            f"it does not take images [B, 3, {size}, {size}]: {first_line(error, with_type=True)}"
        )


def own_size(model: nn.Module) -> int | None:
    """Side of the images that a model of timm or Hugging Face names, pixels."""
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        entry = getattr(model, "pretrained_cfg", None)
        size = (entry.get("input_size") or (None,))[-2:] if isinstance(entry, dict) else None
    if size is None:
        size = getattr(getattr(model, "config", None), "image_size", None)
    side = size[-1] if isinstance(size, (tuple, list)) else size
    return side if isinstance(side, int) and side > 0 else None


def patch_size(model: nn.Module) -> int | None:
    """Side of a model's patches, pixels, where it says so."""
    size: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        size = getattr(getattr(model, "config", None), "patch_size", None)
    side = max(size) if isinstance(size, (tuple, list)) and size else size
    return side if type(side) is int and side > 0 else None


def can_resample(model: nn.Module) -> bool:
    """Whether timm can prepare the model for another image size."""
    return callable(getattr(model, "set_input_size", None)) and patch_size(model) is not None


def resample_positions(model: nn.Module, image_size: int | None, name: str) -> None:
    """Prepare a timm transformer for another image size, as timm does; one that timm cannot prepare
    is left as it is, and refused where it does not take that size."""
    own, patch = own_size(model), patch_size(model)
    if image_size in (None, own) or not can_resample(model):
        return
    assert image_size is not None and patch is not None
    if image_size % patch:
        return  # it will be refused
    network: Any = model
    network.set_input_size(img_size=(image_size, image_size))
    log.info(
        "teacher %s: its position embeddings are resampled from %d to %d pixels; --teacher-size %d "
        "resizes the views instead", name, own, image_size, own,
    )  # fmt: skip
