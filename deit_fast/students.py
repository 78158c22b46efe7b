"""Several students that one call trains: their settings, and those in which they must agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from deit_fast.config import RunConfig, shown
from deit_fast.config_file import by_dotted_key, load_config, read_settings_file, recipe_of, to_dict
from deit_fast.errors import InputError

T = TypeVar("T")

# Settings of a student alone. All others decide views, batches, or what the teacher says of them.
_OWN = {
    "recipe", "output", "mirror", "seed", "accumulate", "compile", "log_every", "track",
    "eval_every",
    "save_every", "save_steps", "keep_every", "on_nonfinite", "resume_from", "resume",
    "accept_change", "features.weights", "features.losses", "features.normalise",
    "features.projectors", "features.hidden", "features.token", "features.student_block",
    "features.drop",
}  # fmt: skip
_OWN_GROUPS = {"model", "loss", "optim"}
# The value that several students need, and why.
_NEEDED: dict[str, tuple[Any, str]] = {
    "cuda_graphs": (False, "each graph would hold a loader's batch and a teacher of its own"),
    "profile_steps": (0, "the steps of all students would stand in one profile"),
}
_ONE_A_PROCESS = {"wandb", "trackio"}  # trackers with one run at a time


def read_students(shared: RunConfig, files: Sequence[str]) -> list[RunConfig]:
    """The settings of each student: those of its file, over the shared ones.

    A student whose file does not name its `output` gets a folder in that of the shared settings,
    with the name of the file; likewise its `mirror`, if there is a shared one.

    Raises:
        InputError: a file is wrong, or names a recipe.
    """
    return [_read_student(shared, file) for file in files]


def _read_student(shared: RunConfig, file: str) -> RunConfig:
    name = recipe_of(file)
    if name not in (None, shared.recipe):
        raise InputError(
            f"config file {file}: its recipe {name} would change the settings of all students: "
            f"name it by --recipe, or give the file only what differs"
        )
    if "output" not in read_settings_file(file):
        shared = shared.replace(output=os.path.join(shared.output, Path(file).stem))
    if shared.mirror is not None and "mirror" not in read_settings_file(file):
        shared = shared.replace(mirror=os.path.join(shared.mirror, Path(file).stem))
    return load_config(file, shared)


def require_agreement(configs: Sequence[RunConfig], more: Iterable[str] = ()) -> None:
    """Check that runs can have one loader and one teacher.

    Args:
        more: dotted keys of more settings in which they must agree.

    Raises:
        InputError: names the setting and the students that differ in it, or two students of one
            folder, or a setting that only a single student can have.
    """
    if len(configs) < 2:
        return
    folders: dict[str, int] = {}
    for number, config in enumerate(configs, 1):
        other = folders.setdefault(os.path.realpath(config.output), number)
        if other != number:
            raise InputError(
                f"students {other} and {number} have one output, {config.output}: give each a "
                f"folder of its own"
            )
    first, *others = (by_dotted_key(to_dict(config)) for config in configs)
    for key in first:
        if _is_own(key) and key not in more:
            continue
        for config, settings in zip(configs[1:], others, strict=True):
            if settings[key] != first[key]:
                raise InputError(
                    f"{key} is {shown(first[key])} for {configs[0].output} and "
                    f"{shown(settings[key])} for {config.output}: students of one pass must agree "
                    f"in it, as in all that decides views, batches and teacher"
                )
    for key, (value, reason) in _NEEDED.items():
        if first[key] != value:
            raise InputError(
                f"{key}={first[key]} with several students: {reason}; leave it out, or train each "
                f"alone"
            )
    for config in configs:
        if taken := sorted(_ONE_A_PROCESS & {*config.track}):
            raise InputError(
                f"track={taken[0]} takes one run in a process, and there are {len(configs)} "
                f"students: choose tensorboard or mlflow, or train each alone"
            )


def _is_own(key: str) -> bool:
    return key in _OWN or key.partition(".")[0] in _OWN_GROUPS


def for_each(configs: Sequence[RunConfig], action: Callable[[RunConfig], T]) -> list[T]:
    """The result of ``action`` for each student; a refusal names it where there are several.

    Raises:
        InputError: as ``action``.
    """
    results = []
    for config in configs:
        with refusals_of(config.output if len(configs) > 1 else ""):
            results.append(action(config))
    return results


@contextmanager
def refusals_of(student: str) -> Iterator[None]:
    """The message of an ``InputError`` in this block begins with the student's name; an empty one
    adds nothing."""
    try:
        yield
    except InputError as error:
        if student:
            error.args = (f"{student}: {error}",)
        raise
