"""The classes that a model gives to the held-out images: confusion matrix, mistakes, pictures.

`train` and `analyze` leave them as predictions.json; the report shows them. The file keeps counts
and a few dozen examples, so its size hardly depends on the number of images.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from deit_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.data.sources import Source

PREDICTIONS_FILE, PREDICTIONS_FORMAT = "predictions.json", 1  # in the folders of run and analysis
MISTAKES, AGREED, GRID = 24, 12, 12  # examples, at most 48 pictures together
MOST_OF_A_PAIR, MOST_OF_A_CLASS = 3, 5  # mistakes: one bad class must not fill the page
SIDE, QUALITY = 96, 80  # of a picture: longer side in pixels, JPEG quality


class Rows(NamedTuple):
    """Decisions about N images.

    Attributes:
        ids, labels, decisions: int64 [N].
        confidences, label_probabilities: of the decision and of the label, float32 [N].
    """

    ids: np.ndarray
    labels: np.ndarray
    decisions: np.ndarray
    confidences: np.ndarray
    label_probabilities: np.ndarray


class Decisions:
    """Collects a batch after the other; the tensors stay on their device until ``rows``."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, ids: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Args: int64 [B], int64 [B], float [B, C]."""
        probabilities = logits.float().softmax(1)
        decisions = logits.argmax(1)  # as evaluation decides, also where logits are equal
        confidences, of_label = (
            probabilities.gather(1, classes[:, None])[:, 0] for classes in (decisions, labels)
        )
        self._batches.append((ids, labels, decisions, confidences, of_label))

    def rows(self) -> Rows:
        if not self._batches:  # fewer images than processes
            whole, real = np.empty(0, np.int64), np.empty(0, np.float32)
            return Rows(whole, whole, whole, real, real)
        columns = zip(*self._batches, strict=True)
        return Rows(*(np.concatenate([part.cpu().numpy() for part in column])
                      for column in columns))  # fmt: skip  # waits for the device


def join_rows(parts: Iterable[Rows]) -> Rows:
    """The rows of several processes."""
    return Rows(*map(np.concatenate, zip(*parts, strict=True)))


def describe_decisions(
    rows: Rows, source: Source, teacher: tuple[np.ndarray, np.ndarray] | None = None
) -> dict[str, Any]:
    """The content of predictions.json, without what says whose weights these are.

    Args:
        rows: their ids are those of ``source``.
        teacher: its decisions int64 [N] and confidences float [N] for the same rows.

    Returns:
        `images` (count), `classes`; `confusion`: for each label a text `CLASS:COUNT ...` of the
        decisions; `mistakes`, `agreed` and `grid`: ids as texts; `examples` by id: `file`,
        `label`, `prediction`, `confidence`, `label_probability`, with a teacher `teacher` and
        `teacher_confidence`, and `picture` (JPEG in base64) where the image can be read.
        `agreed`, only with a teacher: wrong, with the teacher of the same opinion.
    """
    wrong = np.flatnonzero(rows.decisions != rows.labels)
    surest = wrong[np.argsort(-rows.confidences[wrong], kind="stable")]
    boxes = {"mistakes": _spread_out(rows, surest, MISTAKES)}
    if teacher is not None:
        same = wrong[teacher[0][wrong] == rows.decisions[wrong]]
        both = np.minimum(rows.confidences[same], teacher[1][same])
        boxes["agreed"] = _spread_out(rows, same[np.argsort(-both, kind="stable")], AGREED)
    count = min(GRID, len(rows.ids))
    boxes["grid"] = (np.arange(count) * len(rows.ids) // max(count, 1)).tolist()
    chosen = dict.fromkeys(row for box in boxes.values() for row in box)
    return {
        "format": PREDICTIONS_FORMAT,
        "images": len(rows.ids),
        "classes": source.classes,
        "confusion": _confusion(rows, len(source.classes)),
        **{name: [str(rows.ids[row]) for row in box] for name, box in boxes.items()},
        "examples": {
            str(rows.ids[row]): _example(rows, row, source, teacher) for row in chosen
        },
    }  # fmt: skip


def _confusion(rows: Rows, classes: int) -> list[str]:
    cells, counts = np.unique(rows.labels * classes + rows.decisions, return_counts=True)
    texts: list[list[str]] = [[] for _ in range(classes)]
    for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
        texts[cell // classes].append(f"{cell % classes}:{count}")
    return [" ".join(row) for row in texts]


def _spread_out(rows: Rows, order: Sequence[int] | np.ndarray, most: int) -> list[int]:
    """The first rows in this order, few of each pair of classes and of each class."""
    pairs: Counter[tuple[int, int]] = Counter()
    labels: Counter[int] = Counter()
    chosen: list[int] = []
    for row in order:
        label, decision = int(rows.labels[row]), int(rows.decisions[row])
        full = pairs[label, decision] >= MOST_OF_A_PAIR or labels[label] >= MOST_OF_A_CLASS
        if full:
            continue
        pairs[label, decision] += 1
        labels[label] += 1
        chosen.append(int(row))
        if len(chosen) == most:
            break
    return chosen


def _example(
    rows: Rows, row: int, source: Source, teacher: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Any]:
    index, classes = int(rows.ids[row]), source.classes
    found: dict[str, Any] = {
        "file": source.paths[index],
        "label": classes[rows.labels[row]],
        "prediction": classes[rows.decisions[row]],
        "confidence": round(float(rows.confidences[row]), 4),
        "label_probability": round(float(rows.label_probabilities[row]), 4),
    }
    if teacher is not None:
        found["teacher"] = classes[teacher[0][row]]
        found["teacher_confidence"] = round(float(teacher[1][row]), 4)
    if (picture := _picture(source, index)) is not None:
        found["picture"] = picture
    return found


def _picture(source: Source, index: int) -> str | None:
    """The image as a small JPEG in base64; None where it cannot be read."""
    from deit_fast.data.sources import UnreadableImage  # with torch, which a report does without

    try:
        image = source.load(index)
    except (UnreadableImage, OSError, InputError):
        return None
    small = Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, format="jpeg", quality=QUALITY, optimize=True)
    return base64.b64encode(content.getvalue()).decode()
