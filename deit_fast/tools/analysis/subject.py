"""A run that is analysed: its configuration, model, data and teacher, and their answers."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deit_fast.config import RunConfig
from deit_fast.data.open import open_source
from deit_fast.data.sources import Source
from deit_fast.errors import InputError
from deit_fast.evaluate import build_eval_loader, read_run_config
from deit_fast.models import Teacher, load_weights
from deit_fast.models.student import build_model
from deit_fast.models.weights import fit_weights
from deit_fast.tools.analysis.answers import Subset, ask, spaced_ids
from deit_fast.tools.analysis.teachers import find_teacher
from deit_fast.tools.analysis.tokens import TokenCosines, why_no_cosines

log = logging.getLogger("deit_fast")


@dataclass
class Subject:
    """A run that is analysed: what it was, its model, and what it answered."""

    path: Path
    config: RunConfig
    result: dict[str, Any]
    source: Source
    ids: np.ndarray
    model: nn.Module
    teacher: Teacher | None
    no_teacher: str
    data: str
    answers: dict[str, Tensor]
    taught: dict[str, Tensor]
    layers: list[str]

    @property
    def main(self) -> str:
        """The classifier that ``evaluate`` judges the run by."""
        return "sum_logits" if "decision.sum_logits" in self.answers else "class"


def open_subject(
    run: Path,
    spec: str | None,
    data_root: str | None,
    ema: bool,
    max_images: int | None,
    sample: int | None,
    device: torch.device,
) -> Subject:
    """Load a run; arguments as of ``analyze``.

    Raises:
        InputError: the run, its weights or its data are missing or damaged.
    """
    config = read_run_config(run)
    if data_root is not None:
        config = config.replace(data={"root": data_root})
    source = open_source(config.data, "val", config.view.image_size)
    if sample is not None and not 0 <= sample < source.num_samples:
        raise InputError(
            f"--sample {sample}: held-out images of {run} are 0 to {source.num_samples - 1}"
        )
    model = build_model(config, len(source.classes))
    weights = run / ("ema.safetensors" if ema else "model.safetensors")
    fit_weights(model, load_weights(weights), weights)
    result = _read_result(run)
    teacher, reason = find_teacher(config, result, spec, len(source.classes))
    return Subject(
        path=run,
        config=config,
        result=result,
        source=source,
        ids=spaced_ids(source.num_samples, max_images),
        model=model.to(device).eval(),
        teacher=None if teacher is None else teacher.to_device(device),
        no_teacher=reason,
        data=str(source.fingerprint()["dataset.sha256"]),
        answers={},
        taught={},
        layers=[],
    )


def _read_result(run: Path) -> dict[str, Any]:
    """Of a run that has not finished: empty; its weights can be analysed all the same."""
    path = run / "result.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: not a JSON object")
    return values


def measure(subject: Subject, before: list[Subject], device: torch.device) -> None:
    """Fill in the answers; a teacher that answered about the same pixels is not asked again."""
    known = next((s for s in before if _same_questions(s, subject)), None)
    config, model = subject.config, subject.model
    watch = TokenCosines(model) if why_no_cosines(model) is None else None
    subset = Subset(subject.source, subject.ids)
    label = f"analyze {subject.path}"
    log.info("%s: %d held-out images", label, len(subject.ids))
    subject.answers, taught = ask(
        model,
        build_eval_loader(config, subset, device),
        device,
        teacher=subject.teacher if known is None else None,
        cosines=watch,
        label=label,
    )
    subject.taught = taught if known is None else known.taught
    subject.layers = [] if watch is None else watch.names


def _same_questions(one: Subject, two: Subject) -> bool:
    if one.teacher is None or two.teacher is None:
        return False
    views = [(s.config.view, s.config.data.eval_crop, s.data) for s in (one, two)]
    same_images = all(
        getattr(views[0][0], name) == getattr(views[1][0], name)
        for name in ("image_size", "mean", "std")
    )
    prints = [s.teacher.fingerprint() for s in (one, two) if s.teacher is not None]
    return same_images and views[0][1:] == views[1][1:] and prints[0] == prints[1]


def held_out_images(subject: Subject, ids: list[int], device: torch.device) -> Tensor:
    """Held-out images by id, [n, 3, S, S], as evaluation makes them."""
    config = subject.config.replace(batch_size=len(ids), data={"workers": 0})
    loader = build_eval_loader(config, Subset(subject.source, np.array(ids)), device)
    return next(iter(loader))[0]


def undistilled(subject: Subject, subjects: list[Subject]) -> Subject | None:
    """The run without distillation to compare a distilled one with: on the same images.

    Of several the one that shares most: first the model but for its token, then the seed.
    """
    if subject.config.loss.kind == "none":
        return None
    plain = [
        other
        for other in subjects
        if other.config.loss.kind == "none"
        and other.data == subject.data
        and np.array_equal(other.ids, subject.ids)
    ]

    def differs(other: Subject) -> tuple[bool, bool]:
        names = {s.config.model.name.replace("distilled_", "") for s in (subject, other)}
        return len(names) > 1, other.config.seed != subject.config.seed

    return min(plain, key=differs, default=None)
