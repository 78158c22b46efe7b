"""The source and the loader of a configuration: for training, precompute and checks alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deit_fast.config import DataConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.loader import ViewLoader
from deit_fast.data.packed_shards import PackedImages
from deit_fast.data.sources import ImageFolder, Source, Synthetic, class_folders
from deit_fast.data.tar_shards import TarShards
from deit_fast.errors import InputError
from deit_fast.views.plan import ViewPlan


def open_source(data: DataConfig, split: str, image_size: int) -> Source:
    """The training or held-out images of a configuration.

    Held-out labels follow the training split's classes if that split exists, so a class without
    held-out images shifts no label.

    Args:
        split: "train" or "val".
        image_size: side of synthetic images, pixels.
    """
    if data.source == "synthetic":
        count = data.synthetic_samples if split == "train" else data.synthetic_samples // 4
        return Synthetic(count, data.synthetic_classes, image_size, seed=int(split == "val"))
    if data.root is None:
        raise InputError(
            "data.root is not set; expected a folder with train/<class>/<image> and "
            "val/<class>/<image>, or with shards (data.source)"
        )
    if data.source == "packed":
        return PackedImages(data.root, split)
    train = os.path.join(data.root, "train")
    decides_classes = split == "train" or not os.path.isdir(train)
    if data.source == "tar":
        classes = None if decides_classes else TarShards(data.root, "train").classes
        return TarShards(data.root, split, classes)
    return ImageFolder(data.root, split, None if decides_classes else class_folders(train) or None)


def open_loader(
    data: DataConfig,
    source: Source,
    plan: ViewPlan,
    batches: Sequence[tuple[Any, ...]],
    *,
    device: torch.device | str,
    start: int = 0,
    stop: int | None = None,
    attach: Callable[[ViewBatch], ViewBatch] | None = None,
) -> DeviceLoader:
    """The loader of a configuration, with its batches on the device.

    Args:
        source, plan, batches, start, stop: as `ViewLoader`.
        attach: called with each batch, in order, before it is copied to the device; returns the
            batch with what it adds, such as stored teacher logits.

    Raises:
        InputError: as `ViewLoader` or `DaliLoader`.
    """
    device = torch.device(device)
    if data.loader != "pillow":
        from deit_fast.data.dali import DaliLoader

        dali = DaliLoader(source, plan, batches, data, device, start=start, stop=stop)
        return DeviceLoader(dali, device, attach)
    loader = ViewLoader(
        source, plan, batches, workers=data.workers, on_error=data.on_error,
        start=start, stop=stop, pin_memory=device.type == "cuda",
    )  # fmt: skip
    return DeviceLoader(loader, device, attach)


class DeviceLoader:
    """A loader's batches on the device, the next one made and copied while this one is used.

    What the loader itself does on the device (DALI's decoder, `kernels.augment`) and the copy, from
    pinned memory, run on a stream of their own, beside the computation.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        attach: Callable[[ViewBatch], ViewBatch] | None = None,
    ) -> None:
        self.loader, self.device, self.attach = loader, device, attach

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[ViewBatch]:
        if self.device.type != "cuda":
            yield from self._batches()
            return
        stream = torch.cuda.Stream(self.device)
        batches = self._batches()
        ahead = self._copied(batches, stream)
        while ahead is not None:
            behind = self._copied(batches, stream)
            yield self._ready(*ahead)
            ahead = behind

    def _batches(self) -> Iterator[ViewBatch]:
        return iter(self.loader) if self.attach is None else map(self.attach, self.loader)

    def _copied(
        self, batches: Iterator[ViewBatch], stream: torch.cuda.Stream
    ) -> tuple[ViewBatch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):  # the loader's own work for the batch too
            batch = next(batches, None)
            return None if batch is None else (batch.to(self.device), stream.record_event())

    def _ready(self, batch: ViewBatch, copied: torch.cuda.Event) -> ViewBatch:
        """The batch for the current stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in batch.device_tensors():
            tensor.record_stream(current)  # else its memory could be given away too early
        return batch
