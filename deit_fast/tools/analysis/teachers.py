"""The teacher of a finished run, found again; and how temperature softens what it says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit_fast.cache.format import read_manifest
from deit_fast.config import RunConfig
from deit_fast.errors import CacheError, InputError
from deit_fast.models import Teacher, load_teacher
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.models.weights import digest_weights
from deit_fast.tools.analysis.measures import TEMPERATURES, soften

log = logging.getLogger("deit_fast")

SHOWN_CLASSES = 5  # of a named sample


def find_teacher(
    config: RunConfig, result: dict[str, Any], spec: str | None, num_classes: int
) -> tuple[Teacher | None, str]:
    """The teacher of a run, or why there is none.

    Taken from ``spec`` where the user gave one; from the run's configuration; or from the name that
    the run's cache keeps, if its weights can be had by that name and are the very ones, by digest.

    Args:
        result: content of the run's result.json, or empty.
        num_classes: of the data.

    Raises:
        InputError: ``spec`` cannot be loaded or has another class count.
    """
    named = _named_by_cache(config, result)
    if spec is not None:
        teacher = load_class_matched_teacher(config.replace(teacher=spec), num_classes)
        digest = named.get("teacher.weights_sha256")
        if digest is not None and digest != digest_weights(teacher.model):
            log.warning("%s is not the teacher that the run was trained with", spec)
        return teacher, ""
    if config.loss.kind == "none":
        return None, "the run was trained without a teacher; --teacher SPEC adds one"
    if config.teacher is not None:
        try:
            return load_class_matched_teacher(config, num_classes), ""
        except InputError as error:
            return None, f"{error}; --teacher SPEC gives its place"
    if not isinstance(named.get("teacher.spec"), str):
        return None, "neither the run nor its cache names a teacher; --teacher SPEC does"
    return _load_named(config, named, num_classes)


def _named_by_cache(config: RunConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Fields `teacher.*` of the cache's fingerprint: the run keeps them, the manifest otherwise."""
    kept = result.get("teacher")
    if isinstance(kept, dict) and "teacher.weights_sha256" in kept:
        return kept
    if config.cache is None:
        return {}
    try:
        fingerprint = read_manifest(Path(config.cache))["fingerprint"]
    except (CacheError, OSError):
        return {}
    return fingerprint if isinstance(fingerprint, dict) else {}


def _load_named(
    config: RunConfig, named: dict[str, Any], num_classes: int
) -> tuple[Teacher | None, str]:
    spec = named["teacher.spec"]
    try:
        teacher = load_teacher(
            spec,
            num_classes=num_classes,
            input_mean=config.view.mean,
            input_std=config.view.std,
        )
    except InputError as error:
        return None, f"{error} (named by the cache)"
    if named.get("teacher.weights_sha256") != digest_weights(teacher.model):
        return None, (
            f"the cache names {spec} but not the place of its weights; --teacher {spec}@FILE does"
        )
    return teacher, ""


def soften_sample(logits: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """One image's answer at each temperature.

    Args:
        logits: [C].

    Returns:
        Rows of `temperature`, `entropy` (nats), `classes`: the likeliest ones with `name` and
        `probability`.
    """
    entropy, _ = soften(logits[None])
    best = logits.argsort(descending=True, stable=True)[:SHOWN_CLASSES].tolist()
    rows = []
    for place, temperature in enumerate(TEMPERATURES):
        odds = torch.softmax(logits.double() / temperature, 0)
        rows.append(
            {
                "temperature": temperature,
                "entropy": entropy[0, place].item(),
                "classes": [
                    {"name": classes[label], "probability": odds[label].item()} for label in best
                ],
            }
        )
    return rows
