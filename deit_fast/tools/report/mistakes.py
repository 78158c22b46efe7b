"""Which classes are confused, and pictures of single images, from predictions.json."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from deit_fast.errors import InputError
from deit_fast.tools.analysis.table import DASH, count
from deit_fast.tools.report.groups import Group, by_data
from deit_fast.tools.report.parts import DARKEST, Picture, Table, shade
from deit_fast.tools.report.results import best_group
from deit_fast.tools.run_folder import Run

MOST_IN_TABLE, MOST_IN_PICTURE = 20, 100  # classes
PAIRS, CLASSES = 20, 15  # rows of the lists
TINY = 48  # pixels: the browser must not blur what it enlarges


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of a group; ``table``, ``picture`` and ``lists`` by its size."""

    group: Group
    note: str
    table: Table | None
    picture: Picture | None
    lists: list[tuple[str, Table]]


@dataclass(frozen=True)
class Example:
    """An image of the held-out ones; ``picture`` is a JPEG in base64, or None."""

    picture: str | None
    file: str
    lines: list[str]
    is_right: bool
    is_tiny: bool = False


# ---------------------------------------------------------------------------------------------
# Confusion
# ---------------------------------------------------------------------------------------------


def confusions(groups: list[Group]) -> list[Confusion]:
    """The confusion matrix of each group, the sum over its runs."""
    found = []
    for group in groups:
        predictions = [run.predictions for run in group.runs if run.predictions]
        if predictions:
            found.append(_confusion(group, predictions))
    return found


def _confusion(group: Group, predictions: list[dict[str, Any]]) -> Confusion:
    classes = predictions[0]["classes"]
    counts = sum((_matrix(item) for item in predictions[1:]), _matrix(predictions[0]))
    images = predictions[0]["images"]
    of = f"{count(images)} images" + (f" x {len(predictions)} runs" if len(predictions) > 1 else "")
    note = f"n = {of}, {count(int(counts.sum() - np.trace(counts)))} mistakes"
    if len(classes) <= MOST_IN_TABLE:
        return Confusion(group, note, _as_table(counts, classes), None, [])
    picture = _as_picture(counts, group.name) if len(classes) <= MOST_IN_PICTURE else None
    return Confusion(group, note, None, picture, _lists(counts, classes))


def _matrix(predictions: dict[str, Any]) -> np.ndarray:
    """Counts, int64 [labels, decisions]."""
    size = len(predictions["classes"])
    counts = np.zeros((size, size), np.int64)
    for label, row in enumerate(predictions["confusion"]):
        for cell in row.split():
            decision, _, number = cell.partition(":")
            counts[label, int(decision)] = int(number)
    return counts


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else DASH


def _as_table(counts: np.ndarray, classes: list[str]) -> Table:
    """Counts with the share of the row as colour; recall behind, precision below."""
    totals, decided = counts.sum(1), counts.sum(0)
    rows: list[list[Any]] = []
    for label, name in enumerate(classes):
        cells = [
            shade(count(own) if own else "", DARKEST * _share(own, totals[label]), 0,
                  "diagonal" if label == decision else "")
            for decision, own in enumerate(counts[label].tolist())
        ]  # fmt: skip
        rows.append([name, *cells, _percent(counts[label, label], totals[label])])
    precisions = [_percent(counts[i, i], decided[i]) for i in range(len(classes))]
    rows.append(["precision", *precisions, _percent(np.trace(counts), counts.sum())])
    return Table(["label", *classes, "recall"], rows, "numbers shades confusion")


def _as_picture(counts: np.ndarray, name: str) -> Picture:
    """A pixel for each pair, its colour the logarithm of the share of the row."""
    import matplotlib

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    levels = np.log1p(99 * shares) / np.log(100)
    pixels = matplotlib.colormaps["viridis"](levels, bytes=True)[..., :3]
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, format="png", optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    text = "rows: label, columns: prediction, both in the order of the classes"
    return Picture(f"{text}; colour: share of the row, logarithmic", f"confusion of {name}", data)


def _lists(counts: np.ndarray, classes: list[str]) -> list[tuple[str, Table]]:
    totals, decided, right = counts.sum(1), counts.sum(0), np.diag(counts)
    wrong = counts - np.diag(right)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(cell), len(classes)) for cell in order]
    of_pairs = [
        [classes[a], classes[b], count(int(wrong[a, b])), _percent(wrong[a, b], totals[a]),
         count(int(wrong[b, a]))]
        for a, b in pairs if wrong[a, b]
    ]  # fmt: skip
    recall = right / np.maximum(totals, 1)
    seen = [int(i) for i in np.argsort(recall, kind="stable") if totals[i]]
    missed = [_class_row(counts, classes, i) for i in seen[:CLASSES]]
    extra = np.argsort(-(decided - totals), kind="stable")[:CLASSES]
    over = [_class_row(counts, classes, int(i)) for i in extra if decided[i] > totals[i]]
    head = ["class", "images", "predicted", "recall", "precision", "F1"]
    return [
        ("Most confused pairs", Table(
            ["label", "predicted as", "images", "of the label", "reverse"],
            of_pairs, "numbers pairs")),
        ("Most missed classes", Table(head, missed, "numbers")),
        ("Most over-predicted classes", Table(head, over, "numbers")),
    ]  # fmt: skip


def _class_row(counts: np.ndarray, classes: list[str], index: int) -> list[str]:
    right, total = int(counts[index, index]), int(counts[index].sum())
    decided = int(counts[:, index].sum())
    return [
        classes[index], count(total), count(decided), _percent(right, total),
        _percent(right, decided), _percent(2 * right, total + decided),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Single images
# ---------------------------------------------------------------------------------------------


def examples(groups: list[Group], pictures: bool) -> list[tuple[Run, dict[str, list[Example]]]]:
    """Boxes of images of one run of each data set: of the best group's first run.

    Args:
        pictures: show the images themselves, not only their files' names.

    Raises:
        InputError: predictions.json names an example that it does not hold.
    """
    found = []
    for members in by_data(groups):
        known = [group for group in members if any(run.predictions for run in group.runs)]
        if known:
            best = best_group(known)
            run = next(run for run in best.runs if run.predictions)
            found.append((run, _boxes(run, pictures)))
    return found


def _boxes(run: Run, pictures: bool) -> dict[str, list[Example]]:
    rows = run.predictions["examples"]
    return {
        box: [_example(run, rows.get(key), pictures) for key in run.predictions.get(box, [])]
        for box in ("mistakes", "agreed", "grid")
    }


def _example(run: Run, row: dict[str, Any] | None, pictures: bool) -> Example:
    if row is None:
        raise InputError(f"predictions.json of {run.name} lacks an example that it names")
    is_right = row["label"] == row["prediction"]
    lines = [f"label {row['label']}: {100 * row['label_probability']:.1f} %"]
    if not is_right:
        lines.insert(0, f"predicted {row['prediction']}: {100 * row['confidence']:.1f} %")
    if "teacher" in row:
        lines.append(f"teacher {row['teacher']}: {100 * row['teacher_confidence']:.1f} %")
    file, picture = _end(row["file"]), row.get("picture")
    if picture is None or not pictures:
        return Example(None, file, lines, is_right)
    content = base64.b64decode(picture, validate=True)
    try:
        with Image.open(io.BytesIO(content), formats=["jpeg"]) as image:
            is_tiny = max(image.size) < TINY
    except OSError:
        raise InputError(f"{file} in predictions.json of {run.name} is no JPEG picture") from None
    return Example(base64.b64encode(content).decode(), file, lines, is_right, is_tiny)


def _end(path: str) -> str:
    """The last two parts of a path: folder of the class and file."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])
