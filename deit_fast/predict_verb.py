"""The verb `deit-fast predict`: prints each image's classes as soon as they are known."""

from __future__ import annotations

import csv as csv_module
import dataclasses
import io
import json as json_module
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from deit_fast.arguments import quiet_pipe
from deit_fast.config import Count, Workers
from deit_fast.errors import CheckFailed, InputError, printable
from deit_fast.inputs import list_images, require_weights_file, weights_path
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.weights_header import WeightsChoice

if TYPE_CHECKING:
    from deit_fast.prediction import Prediction

log = logging.getLogger("deit_fast")

_WIDEST_PATH, _WIDEST_NAME = 60, 30  # characters; longer ones are not cut, but not aligned either


def predict(
    run: str,
    images: tuple[str, ...],
    /,
    *,
    top: Count = 5,
    json: bool = False,
    csv: bool = False,
    weights: WeightsChoice = "last",
    batch_size: Count = 64,
    workers: Workers | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    model: str | None = None,
) -> str:
    """Name the most probable classes of images.

    Prints a line for each image. One that cannot be read is a line on stderr, and the exit status
    is then 1.

    Args:
        run: Folder of a run, or one of its weights files.
        images: Image files, and folders, which are searched with their subfolders.
        top: Number of classes of each image.
        json: Print a JSON object for each image, one a line: path, names, probabilities.
        csv: Print a row for each class of each image: path, rank, name, probability.
        weights: Weights of a run's folder: those of the last step, their moving average `ema`, or
            those of the best evaluation.
        batch_size: Images per step.
        workers: Processes that load images; none: by the cores and the images.
        device: `auto`: CUDA where available.
        model: The run's model, where it is `package.module:factory`: the file of a run does not
            decide which code is run.
    """
    if json and csv:
        raise InputError("--json and --csv are two forms of the same output: choose one")
    if not images:
        raise InputError("predict needs an image or a folder; see `deit-fast predict --help`")
    paths = list_images(images)  # before torch is imported
    require_weights_file(weights_path(run, weights))
    from deit_fast.prediction import Prediction, iterate_predictions, load_student

    student = load_student(run, weights=weights, device=device, model=model)
    line_of, out = _text_line(paths, student.classes), sys.stdout  # which a bar would replace
    if json:
        line_of = _json_line
    elif csv:
        line_of = _csv_lines
        print("path,rank,name,probability", file=out)
    unreadable = 0
    with _progress(len(paths)) as advance, quiet_pipe():
        for item in iterate_predictions(student, paths, top, batch_size, workers):
            if isinstance(item, Prediction):
                print(line_of(item), file=out, flush=True)
            else:
                unreadable += 1
                log.warning("%s", printable(item))
            advance()
    if unreadable:
        log.warning("%d of %d images cannot be read", unreadable, len(paths))
        raise CheckFailed("")
    return ""


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """What advances a bar, or writes log lines; nothing where the lines on a terminal show it."""
    if sys.stdout.isatty():
        yield lambda: None
        return
    with Progress("predict", total, unit="image") as progress:
        yield progress.advance


def _json_line(item: Prediction) -> str:
    return json_module.dumps(dataclasses.asdict(item))


def _csv_lines(item: Prediction) -> str:
    text = io.StringIO()
    rows = enumerate(zip(item.names, item.probabilities, strict=True), 1)
    csv_module.writer(text, lineterminator="\n").writerows([item.path, i, *row] for i, row in rows)
    return text.getvalue().removesuffix("\n")


def _text_line(paths: Sequence[str], classes: Sequence[str]) -> Callable[[Prediction], str]:
    """What makes a line for a terminal, in columns wide enough for all but the longest texts."""
    path_width, name_width = _width(paths, _WIDEST_PATH), _width(classes, _WIDEST_NAME)

    def line(item: Prediction) -> str:
        pairs = zip(item.names, item.probabilities, strict=True)
        parts = [f"{printable(name):<{name_width}} {100 * p:5.1f} %" for name, p in pairs]
        return "  ".join([f"{printable(item.path):<{path_width}}", *parts])

    return line


def _width(texts: Sequence[str], most: int) -> int:
    return min(most, max(len(printable(text)) for text in texts))
