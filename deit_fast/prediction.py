"""A student in use: its model, its pixels and its classes from a weights file alone.

`predict` gives the most probable classes of images, batch by batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit_fast.config import Count, Workers, check
from deit_fast.data.eval import EvalTransform, Normalise
from deit_fast.data.loader import Batches
from deit_fast.data.sources import (
    UnreadableImage,
    decode,
    read_image_file,
)
from deit_fast.data.watch import note_sample
from deit_fast.errors import InputError, printable, translate_errors
from deit_fast.inputs import list_images, weights_path
from deit_fast.models.student import (
    create_student,
    forward_heads,
    mean_logits,
    require_no_code,
    top_classes,
)
from deit_fast.models.weights import fit_weights, load_weights
from deit_fast.models.weights_facts import ModelFacts, file_texts, read_facts
from deit_fast.runtime.distributed import choose_device, has_bf16
from deit_fast.runtime.weights_header import HEAD_KEY, WeightsChoice, split_key

PathLike: TypeAlias = "str | os.PathLike[str]"
ImageLike: TypeAlias = "PathLike | Image.Image"
BATCH_SIZE = 64
_MOST_WORKERS = 4

log = logging.getLogger("deit_fast")


@dataclass(frozen=True)
class Student:
    """A trained model with all that its use needs.

    ``student(images)`` gives probabilities.

    Attributes:
        model: in evaluation mode, on ``device``. ``model(x)`` gives logits [B, C] of normalised
            images, float32 [B, 3, image_size, image_size]: the mean of both heads of a distilled
            transformer, or those of the one head that was trained.
        transform: makes float32 [3, image_size, image_size] of a PIL image, on the CPU: the pixels
            of `evaluate`.
        facts: what the weights file says of the model, such as its name.
        device: where the model is.
        path: the weights file.
    """

    model: nn.Module
    transform: EvalTransform
    facts: ModelFacts
    device: torch.device
    path: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.facts.classes

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.facts.image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Channel means, for pixels in [0, 1]."""
        return self.facts.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Channel standard deviations, for pixels in [0, 1]."""
        return self.facts.std

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Probabilities, float32 [N, C], on the CPU; N is 1 for a single image.

        Args:
            images: paths of files, or PIL images of any mode and size.

        Raises:
            InputError: a file is no readable image, there is none, or the logits are not finite.
            OSError: the machine cannot read a file.
        """
        items = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else [*images]
        if not items:
            raise InputError("a student needs at least one image, got none")
        parts = []
        for start in range(0, len(items), BATCH_SIZE):
            batch = [self.transform(_opened(item)) for item in items[start : start + BATCH_SIZE]]
            parts.append(self.logits(torch.stack(batch).to(self.device)).softmax(1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, C], computed as `evaluate` does.

        Args:
            images: normalised, float32 [B, 3, image_size, image_size], on ``device``.

        Raises:
            InputError: one is not finite.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device)):
            logits = mean_logits(*forward_heads(self.model, images)).float()
        if not bool(logits.isfinite().all()):
            raise InputError(
                f"{self.path}: the student's logits are not finite: it has diverged, or its "
                f"weights file is damaged"
            )
        return logits


def _opened(image: PathLike | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    path = os.fspath(image)
    try:
        return decode(read_image_file(path), path)
    except UnreadableImage as error:
        raise InputError(printable(error)) from None


def load_student(
    run: PathLike,
    *,
    weights: WeightsChoice = "last",
    device: str = "auto",
    model: str | None = None,
) -> Student:
    """A trained student, from its weights file alone.

    Args:
        run: folder of a run, or a weights file that `train` wrote. FILE#KEY takes one of the state
            dicts of a checkpoint.
        weights: which weights of a run's folder: `last`, their moving average `ema`, or `best`,
            those of the best evaluation.
        device: auto, cpu or cuda.
        model: the model, where it is ``package.module:factory``: a file does not decide which code
            is run.

    Raises:
        InputError: there is no such file; it is damaged, or does not say which model it holds; or
            it names a factory that is not ``model``.
    """
    chosen = choose_device(device)
    path = weights_path(run, weights)
    state = load_weights(path)
    facts = read_facts(path)
    if facts is None:
        raise InputError(
            f"weights file {printable(path)} does not say which model it holds: it is of another "
            f"program, or of an earlier version; in the second case, repeat the run's train "
            f"command, which writes it again"
        )
    require_no_code(facts.name, [model] if model else [], f"weights file {path}", "--model")
    options: dict[str, Any] = facts.arguments()
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        network = create_student(
            facts.name, len(facts.classes), img_size=facts.image_size, fused=facts.fused,
            kernels=facts.kernels, residual=facts.residual, pad_head=facts.pad_head,
            head=facts.head, wide=facts.wide,
            trained_head=file_texts(path).get(HEAD_KEY, "both"), **options,
        )  # fmt: skip
    fit_weights(network, state, path)
    transform = EvalTransform(facts.image_size, facts.eval_crop, facts.mean, facts.std)
    return Student(network.to(chosen).eval(), transform, facts, chosen, split_key(path)[0])


# ---------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        path: the file.
        names: class names, the most probable first.
        probabilities: of these classes; those of all classes sum to 1.
    """

    path: str
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    run: PathLike | Student,
    images: PathLike | Iterable[PathLike],
    *,
    top: int = 5,
    weights: WeightsChoice = "last",
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    device: str = "auto",
    model: str | None = None,
) -> list[Prediction]:
    """The most probable classes of images. One that cannot be read is left out with a warning.

    Args:
        run, weights, device, model: as of ``load_student``; or a student, with which they have no
            effect.
        images: files, and folders, which are searched with their subfolders.
        top: classes of each prediction, or all where there are fewer.
        batch_size: images of each forward.
        workers: processes that load images, 0: this one; None: by the cores and the images.

    Raises:
        InputError: as ``load_student``; or there is no such image, or none at all.
        OSError: the machine cannot read a file.
        MemoryError, ChildProcessError: as ``translate_errors``.
    """
    paths = list_images([images] if isinstance(images, (str, os.PathLike)) else images)
    if not isinstance(run, Student):
        run = load_student(run, weights=weights, device=device, model=model)
    found = []
    for item in iterate_predictions(run, paths, top, batch_size, workers):
        if isinstance(item, Prediction):
            found.append(item)
        else:
            log.warning("%s", printable(item))
    return found


def iterate_predictions(
    student: Student, paths: Sequence[str], top: int, batch_size: int, workers: int | None = None
) -> Iterator[Prediction | UnreadableImage]:
    """Each image's prediction, or why it cannot be read; holds a few batches of images.

    Arguments and errors as of ``predict``.
    """
    top = min(check("top", Count, top), len(student.classes))
    check("batch_size", Count, batch_size)
    starts = range(0, len(paths), batch_size)
    workers = check("workers", Workers | None, workers)
    if workers is None:
        workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)), len(starts) - 1)
    make = partial(_load_batch, student.transform, paths, batch_size)
    normalise = Normalise(student.mean, student.std, student.device)
    batches = Batches(make, paths, starts, workers, pin_memory=student.device.type == "cuda")
    with translate_errors(student.device, f"batch_size={batch_size}: a smaller one needs less"):
        for start, (pixels, unreadable) in zip(starts, batches, strict=True):
            rows: list[tuple[list[float], list[int]]] = []
            if len(pixels):
                images = normalise(pixels.to(student.device, non_blocking=True))
                logits = student.logits(images)
                best = top_classes(logits, top)
                values = logits.softmax(1).gather(1, best)
                rows = list(zip(values.tolist(), best.tolist(), strict=True))
            readable = iter(rows)
            for index in range(start, min(start + batch_size, len(paths))):
                if index in unreadable:
                    yield UnreadableImage(paths[index], unreadable[index])
                    continue
                probabilities, labels = next(readable)
                names = tuple(student.classes[label] for label in labels)
                yield Prediction(paths[index], names, tuple(probabilities))


def _load_batch(
    transform: EvalTransform, paths: Sequence[str], batch_size: int, start: int
) -> tuple[Tensor, dict[int, str]]:
    """Pixels of the readable images, uint8 [N, S, S, 3], and why others are not, by index."""
    pixels: list[np.ndarray] = []
    unreadable = {}
    for index in range(start, min(start + batch_size, len(paths))):
        note_sample(index)
        try:
            image = decode(read_image_file(paths[index]), paths[index])
        except UnreadableImage as error:
            unreadable[index] = error.why
            continue
        pixels.append(transform.pixels(image))
    size = transform.image_size
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked), unreadable
