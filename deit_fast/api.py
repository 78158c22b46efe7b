"""The verbs as Python functions, for notebooks and scripts; the command line calls them too.

They raise ``InputError`` for wrong input, set up no logging and end no process. Their log is
Python's logger `deit_fast`: ``logging.basicConfig(level="INFO")`` shows it. torch is imported by
the call that needs it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from deit_fast.arguments import first_settings, with_teacher
from deit_fast.config import RunConfig
from deit_fast.config_file import from_dict
from deit_fast.errors import InputError
from deit_fast.inputs import (
    require_data_root,
    require_precompute_inputs,
    require_run,
    require_train_inputs,
    weights_path,
    with_local_output,
)
from deit_fast.runtime.distributed import read_process_group
from deit_fast.runtime.files import require_writable
from deit_fast.runtime.weights_header import BEST_FILE, MODEL_FILE, WeightsChoice
from deit_fast.storage.urls import is_url
from deit_fast.students import for_each, require_agreement

PathLike: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class TrainResult:
    """A finished run. Accuracies are shares in [0, 1] of the held-out images.

    Attributes:
        path: the run's folder, which `evaluate`, `predict` and `load_student` take.
        weights: its last weights.
        best: those of its best evaluation.
        top1: of the mean of both heads' logits.
        top1_class, top1_distill: of each head; None where only one head is trained.
        top5: None for five classes or fewer.
        best_top1: the highest ``top1`` of all evaluations.
        details: the content of result.json.
    """

    path: Path
    weights: Path
    best: Path
    top1: float
    top1_class: float | None
    top1_distill: float | None
    top5: float | None
    best_top1: float
    details: dict[str, Any]


@dataclass(frozen=True)
class PrecomputeResult:
    """The logits that one call has written.

    Attributes:
        path: the cache's folder.
        images: views that the teacher has seen in this call.
        seconds: what they took.
        teacher_agreement: share of these views whose label of larger weight is the teacher's class;
            None if there were none.
        details: everything that the command prints.
    """

    path: Path
    images: int
    seconds: float
    teacher_agreement: float | None
    details: dict[str, Any]


@dataclass(frozen=True)
class EvaluateResult:
    """Accuracies on the held-out images, shares in [0, 1].

    Attributes:
        path: the run's folder.
        weights: the file that was measured.
        top1: of the mean of both heads' logits.
        top1_class, top1_distill: of each head; None where only one head is trained.
        top5: None for five classes or fewer.
        loss: cross-entropy of the mean.
        samples: number of images.
        per_class: accuracy of each class that has images.
        details: everything that the command prints.
    """

    path: Path
    weights: Path
    top1: float
    top1_class: float | None
    top1_distill: float | None
    top5: float | None
    loss: float
    samples: int
    per_class: dict[str, float]
    details: dict[str, Any]


def train(
    config: RunConfig | PathLike | None = None,
    /,
    *,
    recipe: str | None = None,
    data: PathLike | Mapping[str, Any] | None = None,
    teacher: str | None = None,
    cache: PathLike | None = None,
    output: PathLike | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a student against a teacher, or against its cached logits; the same call resumes it.

    An existing run is not overwritten: a call with the same settings resumes it, and one with
    others is refused.

    Args:
        config: all settings: a ``RunConfig``, or a file as the command's ``--config`` takes it.
        recipe: start from this recipe, before ``config``.
        data: folder of the images, or the settings of the group `data`.
        teacher, cache, output: as the command's flags.
        settings: every other setting by its name. A dictionary changes settings of a group,
            ``optim={"lr": 1e-3}``; an object such as ``OptimConfig(lr=1e-3)`` is the whole group.

    Raises:
        InputError: wrong settings, data, teacher or cache, before the first step.
        OSError: the disk is full or not writable; the newest checkpoints stay.
        FloatingPointError: a loss or gradient is not finite; the newest checkpoints stay.
        MemoryError: too little memory of the GPU or the host.
        ChildProcessError: a process of the loader died.
        Preempted: Ctrl-C, a notebook's interrupt or SIGTERM in the main thread; the state is saved.
    """
    return train_together([_settings(config, recipe, data, teacher, cache, output, settings)])[0]


def train_together(students: Sequence[RunConfig | PathLike], /) -> list[TrainResult]:
    """Train several students in one pass over the views; the same call resumes them.

    Images are loaded, and the teacher is asked, once for all students. Each one is bit for bit what
    ``train`` makes of its settings, in a folder of its own.

    Args:
        students: all settings of each: a ``RunConfig``, or a file such as a run's config.json. They
            may differ in ``output``, ``seed``, ``model``, ``loss``, ``optim``, the student's side
            of ``features``, and in what is logged, evaluated and saved when.

    Raises:
        InputError: as ``train``, or they differ in another setting; names it and two students.
        FloatingPointError: the numbers of a student are not finite. It stopped there; the others
            are finished.
        others: as ``train``.
    """
    configs = [
        student if isinstance(student, RunConfig) else first_settings(None, os.fspath(student))
        for student in students
    ]
    if not configs:
        raise InputError("no students: give the settings of one or more")
    configs = [*map(with_local_output, configs)]
    require_agreement(configs)
    group = read_process_group()
    if group.world_size == 1:  # others would wait for one that ends before it joins
        for config in configs:
            require_writable("--output", config.output)
        for_each(configs, require_train_inputs)
    from deit_fast.training.loop import train_together as run

    return [
        _train_result(Path(config.output), details)
        for config, details in zip(configs, run(configs), strict=True)
    ]


def _train_result(path: Path, details: dict[str, Any]) -> TrainResult:
    return TrainResult(
        path=path,
        weights=path / MODEL_FILE,
        best=path / BEST_FILE,
        **_accuracies(details),
        best_top1=details["best_top1"],
        details=details,
    )


def precompute(
    config: RunConfig | PathLike | None = None,
    /,
    *,
    recipe: str | None = None,
    data: PathLike | Mapping[str, Any] | None = None,
    teacher: str | None = None,
    cache: PathLike | None = None,
    views: range | None = None,
    blocks: range | None = None,
    **settings: Any,
) -> PrecomputeResult:
    """Write a teacher's logits for every augmented view into a cache; the same call resumes it.

    Args:
        config, recipe, data, teacher, cache, settings: as of ``train``.
        views: only these views; None: all that the run needs.
        blocks: in place of ``views``: only these units of work, counted over all views. Any process
            may compute any of them at any time, also several at once; ``details`` has
            `quarantined`, the units that failed three times. For many calls see ``units.Units``.

    Raises:
        InputError: wrong settings, data or teacher, or the cache holds something else.
        Preempted: with ``blocks``: a signal; published units stay.
        OSError: the disk is full; complete blocks stay.
        MemoryError, ChildProcessError: as of ``train``.
    """
    chosen = _settings(config, recipe, data, teacher, cache, None, settings)
    is_remote = chosen.cache is not None and is_url(chosen.cache)
    if chosen.cache is not None and not is_remote:
        require_writable("--cache", chosen.cache)
    if read_process_group().world_size == 1:
        require_precompute_inputs(chosen)
    if views is not None and blocks is not None:
        raise InputError(f"blocks={blocks} counts over all views: leave out views={views}")
    if blocks is not None or is_remote:
        from deit_fast.units import Units

        units = Units(chosen)
        details = units.compute(units.of_views(views) if blocks is None else units.existing(blocks))
    else:
        from deit_fast.precomputation import precompute as run

        details = run(chosen, views)
    return PrecomputeResult(
        path=Path(str(chosen.cache)),
        images=details["images"],
        seconds=details["seconds"],
        teacher_agreement=details["teacher_agreement"],
        details=details,
    )


def evaluate(
    run: PathLike,
    /,
    *,
    data_root: PathLike | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    weights: WeightsChoice = "last",
    model: str | None = None,
    late_fusion: int | None = None,
) -> EvaluateResult:
    """Measure the accuracy of a finished run.

    Args:
        run: the run's folder.
        data_root: images to measure on, a folder of them or shards; None: the run's.
        batch_size: images per step; None: the run's.
        device: auto, cpu or cuda.
        weights: `last`, their moving average `ema`, or `best`, those of the best evaluation.
        model: the run's model, where it is ``package.module:factory``: a file does not decide which
            code is run.
        late_fusion: also train classifiers on the sum and on the concatenation of both tokens'
            embeddings, on this many training images; ``details`` has their accuracies.

    Raises:
        InputError: no such run, weights or data, or they do not fit each other.
        MemoryError, ChildProcessError: as of ``train``.
    """
    require_run(os.fspath(run))
    if data_root is not None:
        require_data_root(os.fspath(data_root), "val")
    from deit_fast.evaluation import evaluate as measure

    details = measure(
        os.fspath(run),
        data_root=None if data_root is None else os.fspath(data_root),
        batch_size=batch_size,
        device=device,
        weights=weights,
        models=[model] if model else [],
        late_fusion=late_fusion,
    )
    return EvaluateResult(
        path=Path(run),
        weights=Path(weights_path(run, weights)),
        **_accuracies(details),
        loss=details["loss"],
        samples=details["samples"],
        per_class=details["per_class"],
        details=details,
    )


def _accuracies(details: Mapping[str, Any]) -> dict[str, Any]:
    return {name: details.get(name) for name in ("top1", "top1_class", "top1_distill", "top5")}


def _settings(
    config: RunConfig | PathLike | None,
    recipe: str | None,
    data: PathLike | Mapping[str, Any] | None,
    teacher: str | None,
    cache: PathLike | None,
    output: PathLike | None,
    settings: Mapping[str, Any],
) -> RunConfig:
    """The settings of a run, in the order of the command line.

    Raises:
        InputError: a setting is unknown or out of range, or ``recipe`` has no effect.
    """
    if isinstance(config, RunConfig):
        if recipe is not None:
            raise InputError(
                f"recipe={recipe} has no effect beside a RunConfig, which has all settings: change "
                f"find_recipe({recipe!r})() with its method replace"
            )
        base = config
    else:
        base = first_settings(recipe, None if config is None else os.fspath(config))
    base = with_teacher(base, teacher, settings)
    root = {"root": data} if isinstance(data, (str, os.PathLike)) else data
    named = {"data": root, "teacher": teacher, "cache": cache, "output": output}
    given = {name: value for name, value in named.items() if value is not None}
    return from_dict(base, _plain({**settings, **given}))


def _plain(value: Any) -> Any:
    """Paths as texts and groups as dictionaries, also inside of dictionaries."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value
