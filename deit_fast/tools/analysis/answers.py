"""One pass over held-out images: what student and teacher answer, as small values per image.

Logits are not kept: 50,000 images of 1,000 classes from three classifiers would be 600 MB.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from deit_fast.data.sources import Source
from deit_fast.errors import InputError
from deit_fast.models import Teacher, forward_heads
from deit_fast.models.teacher import has_bf16
from deit_fast.runtime.metrics import Progress
from deit_fast.tools.analysis.measures import soften
from deit_fast.tools.analysis.tokens import TokenCosines

NOTE_SECONDS = 10.0  # between lines of progress where there is no terminal


class Subset:
    """Some images of a source, as a source."""

    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source, self.ids, self.finished = source, ids, source.finished
        self.classes, self.labels = source.classes, source.labels[ids]
        self.paths: Sequence[str] = [source.paths[index] for index in ids.tolist()]

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Image.Image | np.ndarray:
        return self.source.load(int(self.ids[index]))

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | {"dataset.ids": self.ids.tolist()}


def spaced_ids(total: int, limit: int | None) -> np.ndarray:
    """At most ``limit`` sample ids, evenly spaced: ids are sorted by class, the first would be one.

    int64, ascending, from 0.
    """
    count = total if limit is None else min(limit, total)
    return np.arange(count, dtype=np.int64) * total // count


class PerImage:
    """Values per image, batch by batch; they stay on their device until the end."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._parts.setdefault(name, []).append(value)

    def finish(self) -> dict[str, Tensor]:
        """Name to values of all images, on the CPU."""
        return {name: torch.cat(parts).cpu() for name, parts in self._parts.items()}


@torch.no_grad()
def ask(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    *,
    teacher: Teacher | None = None,
    cosines: TokenCosines | None = None,
    label: str = "analyze",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the student, and the teacher where one is given, say about all images of a loader.

    Numerics are those of ``evaluate``: the same forward, precision and mean of the heads.

    Args:
        model: in evaluation mode, on ``device``.
        loader: as ``evaluate_model``'s, with a length.
        cosines: watches the model.
        label: names the progress bar.

    Returns:
        Two tables of [N] values, the second empty without a teacher. The student's: `labels`,
        `decision.X` and `confidence.X` for its classifiers X (`class`, and with two heads
        `distillation`, `sum_logits`, `sum_softmax`), `probability_cosine`, `cosines` [N, layers].
        The teacher's: `decision`, `confidence`, `entropy` [N, T], `mass` [N, T, K].

    Raises:
        InputError: an answer is not finite.
    """
    student, taught = PerImage(), PerImage()
    done, last_note = 0, time.monotonic()
    watch = cosines if cosines is not None else nullcontext()
    with watch, Progress(label, len(loader), unit="batch") as bar:
        for images, labels, _ in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                class_logits, distill_logits = forward_heads(model, images)
            student.add(labels=labels, **_heads(class_logits, distill_logits))
            if cosines is not None:
                student.add(cosines=cosines.take())
            if teacher is not None:
                taught.add(**_teacher(teacher(images)))
            done += len(labels)
            note = None
            if time.monotonic() - last_note > NOTE_SECONDS:
                note, last_note = f"{done} images", time.monotonic()
            bar.advance(note=note)
    answers = student.finish(), taught.finish()
    for who, table in zip(("student", "teacher"), answers, strict=True):
        for name, values in table.items():
            if name.startswith("confidence") and not bool(torch.isfinite(values).all()):
                raise InputError(f"{label}: the {who}'s answers are not finite")
    return answers


def _heads(class_logits: Tensor, distill_logits: Tensor | None) -> dict[str, Tensor]:
    class_odds = class_logits.float().softmax(1)
    values = _decided("class", class_logits, class_odds)
    if distill_logits is None:
        return values
    odds = distill_logits.float().softmax(1)
    mean = (class_logits + distill_logits) / 2  # decides as the sum, and is what evaluate takes
    both = (class_odds + odds) / 2
    return {
        **values,
        **_decided("distillation", distill_logits, odds),
        **_decided("sum_logits", mean, mean.float().softmax(1)),
        **_decided("sum_softmax", both, both),
        "probability_cosine": F.cosine_similarity(class_odds, odds, dim=1),
    }


def _decided(name: str, scores: Tensor, odds: Tensor) -> dict[str, Tensor]:
    decision = scores.argmax(1)
    confidence = odds.gather(1, decision[:, None])[:, 0]
    return {f"decision.{name}": decision, f"confidence.{name}": confidence}


def _teacher(logits: Tensor) -> dict[str, Tensor]:
    logits = logits.float()
    decision = logits.argmax(1)
    entropy, mass = soften(logits)
    confidence = logits.softmax(1).gather(1, decision[:, None])[:, 0]
    return {"decision": decision, "confidence": confidence, "entropy": entropy, "mass": mass}
