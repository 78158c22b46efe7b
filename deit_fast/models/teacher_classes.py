"""A teacher's classes and the data's: which of its outputs a run uses, and in which order.

Names decide where both sides have them. The teacher's come from a file of the user, from its own
weights, or, for timm's models with ImageNet's numbers of classes, from timm's lists of synsets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from deit_fast.config import RunConfig
from deit_fast.data.sources import equal_names
from deit_fast.errors import InputError, did_you_mean, printable
from deit_fast.inputs import fine_tune_command
from deit_fast.runtime.files import read_file

log = logging.getLogger("deit_fast")

_CORRECT = "give each class of the data one line"


def choose_columns(
    config: RunConfig,
    classes: Sequence[str],
    count: int,
    *,
    lines: Sequence[str] | None,
    own: Sequence[str] | None,
) -> list[int] | None:
    """The teacher's outputs that are the data's classes; None: all, in their order.

    Logs once where they are not the data's classes as they stand, or do not say so.

    Args:
        classes: of the data, by label.
        count: number of the teacher's outputs.
        lines: of the file of ``teacher_classes``, where there is one.
        own: the teacher's own names of its outputs, where it has some.

    Raises:
        InputError: as ``match_classes``; or the file has not a line for each output.
    """
    owner = f"teacher {config.teacher}"
    if lines is None:
        names = _both_have_names(own, classes)
        name, _, weights = (config.teacher or "").partition("@")
        command = fine_tune_command(name, weights, config.data.root)
        ask = f"{command}; or say which output is which by --teacher-classes FILE"
        columns = match_classes(classes, names, count, owner, ask)
    else:
        names, what = lines, f"teacher_classes {printable(config.teacher_classes)}"
        if len(names) != count:
            raise InputError(
                f"{what} has {len(names)} lines, {owner} has {count} outputs: give each one line"
            )
        columns = match_classes(classes, names, count, what, _CORRECT)
    if columns is not None and len(columns) == count:
        log.info("%s: its %d classes have another order, taken by name", owner, count)
    elif columns is not None:
        log.info("%s: %d of its %d classes, by name", owner, len(columns), count)
    elif names is None:
        log.info("%s: its %d outputs count as the data's classes in their order, as it or the "
                 "data has no names", owner, count)  # fmt: skip
    return columns


def match_classes(
    classes: Sequence[str], names: Sequence[str] | None, count: int, owner: str, remedy: str
) -> list[int] | None:
    """The output of each class; None where they are the outputs as they stand.

    Args:
        classes: names of the data's classes, by label.
        names: of the teacher's outputs, [count]; one that is no class of the data may occur
            repeatedly. None: unknown; as many outputs as classes are then taken in their order.
        count: number of the outputs.
        owner, remedy: for messages: what has these names, and what to do.

    Raises:
        InputError: a class has no output, or two; or there are no names, and the counts differ.
    """
    if names is None:
        if count == len(classes):
            return None
        raise InputError(
            f"{owner} has {count} classes, the data set has {len(classes)}, and not both have "
            f"names: {remedy}"
        )
    if list(names) == list(classes):
        return None
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    missing = [name for name in classes if name not in places]
    if missing:
        raise InputError(
            f"{owner} lacks {len(missing)} of the data's {len(classes)} classes, such as "
            f"{missing[0]!r}{did_you_mean(missing[0], places)}: {remedy}"
        )
    if (twice := equal_names(classes)) is not None:
        raise InputError(
            f"classes {twice[1]} and {twice[2]} of the data are both named {twice[0]!r}, and "
            f"those of {owner} are not the same: {remedy}"
        )
    columns = [places[name][0] for name in classes]
    for name in classes:
        if len(places[name]) > 1:
            first, second = places[name][:2]
            raise InputError(
                f"{owner} has class {name!r} twice, as outputs {first} and {second}: {remedy}"
            )
    return None if columns == list(range(count)) else columns


def read_class_file(path: str) -> list[str]:
    """The lines of a file of class names, without spaces around them.

    Raises:
        InputError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, InputError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read teacher_classes {printable(path)}: {reason}") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def imagenet_synsets(count: int, classes: Sequence[str]) -> Sequence[str] | None:
    """The names of the classes of timm's list of ImageNet that has ``count`` of them.

    The count is only a hint, so one of the data's classes, at least, must be in the list; all of
    them where the data has as many classes. Else None.
    """
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    names = ImageNetInfo(subset).label_names()
    needed = 1 if len(classes) < len(names) else len(classes)
    return names if len({*names} & {*classes}) >= needed else None


def _both_have_names(names: Sequence[str] | None, classes: Sequence[str]) -> Sequence[str] | None:
    """The names of the teacher's outputs; None where they or the data's are unknown.

    Tar shards without classes.txt number their classes. Such numbers are names only where the other
    side has all of them.
    """
    if names is None or {*classes} <= {*names}:
        return names
    return None if _are_numbers(names) or _are_numbers(classes) else names


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether they are no more than the labels themselves."""
    return list(names) == [str(label) for label in range(len(names))]
