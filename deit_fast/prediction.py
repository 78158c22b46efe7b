"""A student in use: its model, its pixels and its classes from a weights file alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from deit_fast.data.eval import EvalTransform
from deit_fast.data.sources import UnreadableImage, decode, read_image_file
from deit_fast.errors import InputError, printable
from deit_fast.models.student import create_student, forward_heads, mean_logits, require_no_code
from deit_fast.models.weights import fit_weights, load_weights
from deit_fast.models.weights_facts import ModelFacts, file_texts, read_facts, split_key
from deit_fast.runtime.distributed import choose_device, has_bf16
from deit_fast.runtime.weights_header import (
    HEAD_KEY,
    WEIGHTS_FILES,
    WeightsChoice,
    require_weights,
)

PathLike: TypeAlias = "str | os.PathLike[str]"
ImageLike: TypeAlias = "PathLike | Image.Image"
BATCH_SIZE = 64


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
    network = create_student(
        facts.name, len(facts.classes), img_size=facts.image_size, fused=facts.fused,
        kernels=facts.kernels, residual=facts.residual, pad_head=facts.pad_head,
        trained_head=file_texts(path).get(HEAD_KEY, "both"), **options,
    )  # fmt: skip
    fit_weights(network, state, path)
    transform = EvalTransform(facts.image_size, facts.eval_crop, facts.mean, facts.std)
    return Student(network.to(chosen).eval(), transform, facts, chosen, split_key(path)[0])


def weights_path(run: PathLike, weights: WeightsChoice) -> str:
    """The weights file of a run's folder; a file, or FILE#KEY, is itself the one.

    Raises:
        InputError: the folder has no such file; ``weights`` is no choice, or chooses of a file.
    """
    if weights not in WEIGHTS_FILES:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS_FILES)}, not {weights!r}")
    if not os.path.isdir(run):
        if weights != "last":
            raise InputError(
                f"weights={weights} chooses a file of a run's folder, and {printable(run)} is none"
            )
        return os.fspath(run)
    return str(require_weights(run, weights))
