"""Find the teacher of a finished run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from deit_fast.cache.format import read_manifest
from deit_fast.config import RunConfig
from deit_fast.errors import CacheError, InputError
from deit_fast.models.teacher import Teacher, load_class_matched_teacher
from deit_fast.models.weights import digest_weights

log = logging.getLogger("deit_fast")


def find_teacher(
    config: RunConfig, result: dict[str, Any], spec: str | None, num_classes: int
) -> tuple[Teacher | None, str]:
    """The teacher of a run, or the reason why there is none.

    It is named by ``spec``, or else by the run's configuration, or else by the run's cache; the
    last only if the weights that the name gives have the digest that the cache recorded.

    Args:
        result: content of the run's result.json, or empty.
        num_classes: of the data.

    Raises:
        InputError: ``spec`` cannot be loaded or has another class count.
    """
    recorded = _recorded_by_cache(config, result)
    digest = recorded.get("teacher.weights_sha256")
    if spec is not None:
        teacher = load_class_matched_teacher(config.replace(teacher=spec), num_classes)
        if digest is not None and digest != digest_weights(teacher.model):
            log.warning("%s is not the teacher that the run was trained with", spec)
        return teacher, ""
    if config.loss.kind == "none":
        return None, "the run was trained without a teacher; --teacher SPEC adds one"
    if config.teacher is not None:
        try:
            return load_class_matched_teacher(config, num_classes), ""
        except InputError as error:
            return None, f"{error}; name it by --teacher SPEC"
    spec = recorded.get("teacher.spec")
    if not isinstance(spec, str):
        return None, "neither the run nor its cache names a teacher; name it by --teacher SPEC"
    try:
        teacher = load_class_matched_teacher(config.replace(teacher=spec), num_classes)
    except InputError as error:
        return None, f"{error} (named by the cache)"
    if digest != digest_weights(teacher.model):
        return None, (
            f"the cache names {spec} but not the file of its weights; name it by "
            f"--teacher {spec}@FILE"
        )
    return teacher, ""


def _recorded_by_cache(config: RunConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Fields `teacher.*` of the cache's fingerprint, from the run or from the cache's manifest."""
    recorded = result.get("teacher")
    if isinstance(recorded, dict) and "teacher.weights_sha256" in recorded:
        return recorded
    if config.cache is None:
        return {}
    try:
        fingerprint = read_manifest(Path(config.cache))["fingerprint"]
    except (CacheError, OSError):
        return {}
    return fingerprint if isinstance(fingerprint, dict) else {}
