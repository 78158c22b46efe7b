"""The source and the loader of a configuration: for training, precompute and checks alike."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from deit_fast.config import DataConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.hub_images import HubImages
from deit_fast.data.image_folder import ImageFolder
from deit_fast.data.loader import ViewLoader
from deit_fast.data.packed_shards import PackedImages, read_manifest_of
from deit_fast.data.remote_tar import has_split
from deit_fast.data.sources import Source, Synthetic
from deit_fast.data.tar_shards import TarShards
from deit_fast.errors import InputError
from deit_fast.hub_files import find_split
from deit_fast.inputs import class_folders, require_classes
from deit_fast.runtime.pipeline_time import loading_processes
from deit_fast.storage.urls import is_url
from deit_fast.views.plan import ViewPlan

log = logging.getLogger("deit_fast")


def open_source(
    data: DataConfig, split: str, image_size: int, classes: list[str] | None = None
) -> Source:
    """The training or held-out images of a configuration; logs what the split holds beside them.

    Held-out labels follow the names of the training split's classes if that split exists, so a
    class without held-out images shifts no label.

    Args:
        split: "train" or "val".
        image_size: side of synthetic images, pixels.
        classes: of a run; held-out labels then follow these names.

    Raises:
        InputError: no images; one class in all; a class with held-out images that the training
            split, or ``classes``, lacks.
    """
    source = _open_split(data, split, image_size)
    if split == "train":
        require_classes(source.folder, source.classes)
    if split != "train":
        owner = "the training split" if classes is None else "the run"
        source.follow(classes or _training_classes(data) or source.classes, owner)
    if source.left_out:
        log.info("left out of %s: %s", source.folder, source.left_out)
    return source


def _open_split(data: DataConfig, split: str, image_size: int) -> Source:
    if data.source == "synthetic":
        count = data.synthetic_samples if split == "train" else data.synthetic_samples // 4
        return Synthetic(count, data.synthetic_classes, image_size, seed=int(split == "val"))
    if data.root is None:
        raise InputError(
            "data.root is not set; expected a folder with train/<class>/<image> and "
            "val/<class>/<image>, or with shards (data.source)"
        )
    copy_bytes = data.copy_bytes
    if data.source == "packed":
        return PackedImages(data.root, split, copy_bytes)
    if data.source == "hf":
        return HubImages(data.root, split, data.image_column, data.label_column)
    if data.source == "tar":
        return TarShards(data.root, split, copy_bytes)
    return ImageFolder(data.root, split, data.verify)


def _training_classes(data: DataConfig) -> list[str] | None:
    """Names by label; None where there is no training split."""
    if data.source == "synthetic":
        return None
    if data.source == "hf":
        found = find_split(str(data.root), "train")
        return None if found is None else _open_split(data, "train", 1).classes
    root = data.root or ""
    train = os.path.join(root, "train")
    if not (has_split(root, "train") if is_url(root) else os.path.isdir(train)):
        return None
    if data.source == "packed":
        return read_manifest_of(root, "train")["classes"]
    if data.source == "tar":
        return TarShards(str(data.root), "train").classes
    return class_folders(train)


def require_trained_classes(train: Source, held_out: Source) -> None:
    """Warns of classes that have training images and no held-out images.

    Raises:
        InputError: a class has held-out images and no training images; names it.
    """
    counts = [np.bincount(s.labels, minlength=len(train.classes)) for s in (train, held_out)]
    untrained = np.flatnonzero((counts[0] == 0) & (counts[1] > 0)).tolist()
    if untrained:
        names = ", ".join(repr(train.classes[label]) for label in untrained[:3])
        raise InputError(
            f"{train.folder} has no image of {len(untrained)} of the held-out classes, such as "
            f"{names}: add some, or remove these classes from {held_out.folder}"
        )
    unmeasured = np.flatnonzero((counts[0] > 0) & (counts[1] == 0)).tolist()
    if unmeasured:
        log.warning(
            "%s has no image of %d of the %d classes, such as %r: the accuracy does not count "
            "them; move some of their images there", held_out.folder, len(unmeasured),
            len(train.classes), train.classes[unmeasured[0]],
        )  # fmt: skip


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
        source, plan, batches, workers=loading_processes(data.workers), on_error=data.on_error,
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
