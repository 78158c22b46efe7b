"""Held-out images: resize, centre crop, normalise; every image exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deit_fast.data.loader import Batches, load_readable
from deit_fast.data.resize import resize_shorter_side
from deit_fast.data.sources import Source, in_rgb
from deit_fast.errors import InputError
from deit_fast.runtime.device import divided


class Subset:
    """Some images of a source, as a source."""

    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source, self.ids, self.finished = source, ids, source.finished
        self.classes, self.labels = source.classes, source.labels[ids]
        self.paths: Sequence[str] = [source.paths[index] for index in ids.tolist()]

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    def fetch(self, samples: Sequence[int]) -> None:
        self.source.fetch(self.ids[list(samples)].tolist())

    def load(self, index: int) -> Image.Image | np.ndarray:
        return self.source.load(int(self.ids[index]))


def spaced_ids(total: int, limit: int | None) -> np.ndarray:
    """At most ``limit`` sample ids, int64, ascending from 0.

    They are evenly spaced: samples are sorted by class, so the first ones would be of one class.
    """
    count = total if limit is None else min(limit, total)
    return np.arange(count, dtype=np.int64) * total // count


class EvalLoader:
    """This rank's held-out images: (float32 [B, 3, S, S], labels int64 [B], ids int64 [B]).

    The rank takes a contiguous share of the ids, without padding. Ranks may differ by one image and
    in their number of batches, so count correct predictions and reduce once at the end.

    Args:
        crop: side of the centre crop as a share of the resized shorter side.
        batch_size: images per batch of this rank; the last batch holds the rest.
        on_error: as `ViewLoader`.
        device: where to normalise; the bytes are copied there first, a quarter of the traffic.

    Attributes:
        substituted: paths of the unreadable files met so far.

    Raises:
        InputError: while iterating, with on_error="fail" or when no image is readable.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        crop: float,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        on_error: str = "substitute",
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not one of {world_size} processes")
        count = source.num_samples
        ids = np.arange(count * rank // world_size, count * (rank + 1) // world_size)
        batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
        self.batch_size, self.num_images = batch_size, len(ids)
        self.substituted: list[str] = []
        self.device = torch.device(device)
        self._normalise = Normalise(mean, std, self.device)
        self._loader = Batches(
            partial(_make_batch, source, image_size, crop, batches, on_error),
            source.paths,
            range(len(batches)),
            workers,
            pin_memory=self.device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for pixels, labels, ids, substituted in self._loader:
            self.substituted += [path for path in substituted if path not in self.substituted]
            images = self._normalise(pixels.to(self.device, non_blocking=True))
            yield images, labels.to(self.device, non_blocking=True), ids


def _make_batch(
    source: Source,
    image_size: int,
    crop: float,
    batches: list[np.ndarray],
    on_error: str,
    index: int,
) -> tuple[Any, ...]:
    """uint8 [B, S, S, 3], labels, ids, substituted paths."""
    ids = batches[index]
    pixels = np.empty((len(ids), image_size, image_size, 3), np.uint8)
    substituted: list[str] = []
    taken = []
    source.fetch(ids.tolist())
    for row, sample in enumerate(ids.tolist()):
        image, found = load_readable(source.load, source.paths, sample, on_error, substituted)
        taken.append(found)
        whole = source.finished
        pixels[row] = np.asarray(image) if whole else eval_pixels(image, image_size, crop)
    return *map(torch.from_numpy, (pixels, source.labels[taken], ids)), substituted


class Normalise:
    """Turns pixels, uint8 [B, S, S, 3], into float32 [B, 3, S, S] of mean 0 and deviation 1.

    Args:
        mean, std: channel statistics, for pixels in [0, 1].
        device: where the pixels are.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device | str
    ) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1).to(device)
        self._std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        channels = pixels.permute(0, 3, 1, 2)
        return ((divided(channels.to(torch.float32), 255) - self._mean) / self._std).contiguous()


@dataclass(frozen=True)
class EvalTransform:
    """The pixels of evaluation: a PIL image of any mode becomes float32 [3, S, S], on the CPU.

    Attributes:
        image_size: S, pixels.
        crop: side of the centre crop as a share of the resized shorter side.
        mean, std: channel statistics, for pixels in [0, 1].
    """

    image_size: int
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resized and cropped: uint8 [S, S, 3]."""
        return eval_pixels(in_rgb(image), self.image_size, self.crop)

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(self.pixels(image).copy())
        return Normalise(self.mean, self.std, "cpu")(pixels[None])[0]


def eval_pixels(image: Image.Image | np.ndarray, size: int, crop: float) -> np.ndarray:
    """Resize the shorter side to int(size / crop), then crop: uint8 [size, size, 3].

    torchvision's `Resize` (bicubic) and `CenterCrop` of a PIL image, bit for bit.
    """
    resized = resize_shorter_side(np.asarray(image), int(size / crop))
    height, width = resized.shape[:2]
    left, top = round((width - size) / 2), round((height - size) / 2)  # half to even
    return resized[top : top + size, left : left + size]
