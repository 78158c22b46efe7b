"""Whether a teacher knows the data: its accuracy on held-out images, before its logits are used."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch

from deit_fast.config import RunConfig
from deit_fast.data.eval import Subset, spaced_ids
from deit_fast.data.open import open_source
from deit_fast.data.sources import Source
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, evaluate_model
from deit_fast.models.teacher import Teacher

log = logging.getLogger("deit_fast")

IMAGES = 512  # of the check: at 80 % accuracy a standard error of 1.8 points
LOW = 0.5  # accuracy below which the log asks


def check_accuracy(
    teacher: Teacher,
    config: RunConfig,
    device: torch.device,
    train: Source,
    held_out: Source | None = None,
) -> float | None:
    """Log the teacher's top-1 accuracy on a sample of held-out images; ask where it is low.

    The sample is the same at every call, and all images where there are not more. They are made as
    `evaluate` makes them. The network runs uncompiled, so nothing is compiled for this batch size.

    Args:
        teacher: on ``device``.
        train: images that are used where there are no held-out ones.
        held_out: None: those of the configuration.

    Returns:
        The accuracy; None where it is not measured: synthetic images, ``teacher_floor`` is 0, or a
        teacher that gives no logits.

    Raises:
        InputError: it is below ``teacher_floor``.
    """
    is_off = config.data.source == "synthetic" or config.teacher_floor == 0
    if is_off:
        return None
    if not teacher.gives_logits:
        if config.teacher_floor is not None:
            log.warning(
                "teacher_floor=%g: not measured, as %s gives features alone",
                config.teacher_floor, config.teacher,
            )  # fmt: skip
        return None
    source, kind = held_out or _open_held_out(config), "held-out"
    if source is None:
        source, kind = train, "training"
    ids = spread_ids(source.labels, IMAGES)
    rows = min(config.teacher_batch, -(-config.batch_size // config.accumulate), len(ids))
    sampled = config.replace(batch_size=rows, data={"on_error": "substitute"})
    with torch.compiler.set_stance("force_eager"):
        found = evaluate_model(
            teacher,
            build_eval_loader(sampled, Subset(source, ids), device),
            source.classes,
            device,
            forward=lambda model, images: (model(images), None),
        )
    accuracy, classes = found["top1"], len(source.classes)
    text = f"teacher {config.teacher}: {100 * accuracy:.1f} % of {len(ids)} {kind} images are right"
    question = _question(teacher)
    if config.teacher_floor is not None and accuracy < config.teacher_floor:
        raise InputError(
            f"{text}, but teacher_floor is {config.teacher_floor:g}: {question} "
            f"--teacher-floor 0 omits this check"
        )
    text += f" (chance {100 / classes:.3g} %)"
    if is_near_chance(accuracy, len(ids), classes):
        log.warning("%s, NO BETTER THAN CHANCE: %s", text, question)
    elif accuracy < LOW:
        log.warning("%s: %s", text, question)
    else:
        log.info("%s", text)
    return accuracy


def say_agreement(teacher: Teacher, config: RunConfig, agreement: float, count: int) -> None:
    """Log how often a teacher's class is the label of larger weight in ``count`` views."""
    classes = teacher.num_classes
    text = (
        f"teacher {config.teacher}: its class is the label of larger weight in "
        f"{100 * agreement:.1f} % of {count} views (chance {100 / classes:.3g} %)"
    )
    if config.data.source != "synthetic" and is_near_chance(agreement, count, classes):
        log.warning("%s, NO BETTER THAN CHANCE: %s", text, _question(teacher))
    else:
        log.info("%s", text)


def is_near_chance(accuracy: float, count: int, classes: int) -> bool:
    """Whether guessing would reach it: within three standard deviations of 1 / classes."""
    chance = 1 / classes
    return accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count)


def spread_ids(labels: np.ndarray, limit: int) -> np.ndarray:
    """At most ``limit`` sample ids, int64, ascending: evenly spaced after sorting by class."""
    return np.sort(np.argsort(labels, kind="stable")[spaced_ids(len(labels), limit)])


def _open_held_out(config: RunConfig) -> Source | None:
    """The held-out images; None where there are none, which the log says."""
    try:
        return open_source(config.data, "val", config.view.image_size)
    except InputError as error:
        log.info("the teacher is tried on training images, as held-out ones are missing: %s", error)
        return None


def _question(teacher: Teacher) -> str:
    mean, std = (" ".join(f"{value:g}" for value in values) for values in
                 (teacher.mean, teacher.std))  # fmt: skip
    return (
        f"are its weights the right ones, is its normalisation right (mean {mean}, std {std}), and "
        f"are its classes those of the data, in their order?"
    )
