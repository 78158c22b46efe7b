"""Which runs belong together: those that differ by their seeds alone, those on the same data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from deit_fast.config_file import by_dotted_key
from deit_fast.tools.report.charts import Line, Points
from deit_fast.tools.report.parts import number
from deit_fast.tools.run_folder import Run

# Settings that do not tell two experiments apart; the data is compared by its fingerprint.
NOT_COMPARED = {
    "seed", "view.seed", "output", "cache", "resume", "accept_change", "data.root", "data.workers",
    "log_every", "save_every", "save_steps", "keep_every", "track", "profile_steps", "recipe",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds alone, at least one.

    Attributes:
        index: position among all groups, which decides the colour; its runs have it too.
    """

    index: int
    name: str
    runs: list[Run]

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the runs; where two have the same, each with its view.seed: `0/3`."""
        seeds = [_seeds(run) for run in self.runs]
        alone = [seed for seed, _ in seeds]
        return alone if len({*alone}) == len(alone) else [f"{own}/{views}" for own, views in seeds]

    def scores(self, key: str = "top1") -> list[float]:
        """A number of result.json of the runs that have it."""
        found = (number(run.result, key) for run in self.runs)
        return [value for value in found if value is not None]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The groups in the order of their first runs. Two runs of equal seeds are not in one group."""
    members: dict[tuple[str, str, int], list[Run]] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for run in runs:
        key = run.data_id, _setting_key(run)
        place = (*key, str(_seeds(run)))
        repeat = seen[place] = seen.get(place, -1) + 1
        members.setdefault((*key, repeat), []).append(run)
    names = [_common_name([run.name for run in group]) for group in members.values()]
    groups = []
    for index, (group, name) in enumerate(zip(members.values(), names, strict=True)):
        own = group[0].name if names.count(name) > 1 else name
        groups.append(Group(index, own, [replace(run, index=index) for run in group]))
    return groups


def _seeds(run: Run) -> tuple[Any, Any]:
    """A run's seed and view.seed, which were one before runs had the latter."""
    seed, view = run.config.get("seed", 0), run.config.get("view")
    return seed, view.get("seed", seed) if isinstance(view, dict) else seed


def _setting_key(run: Run) -> str:
    values = {k: v for k, v in by_dotted_key(run.config).items() if k not in NOT_COMPARED}
    if isinstance(values.get("teacher"), str):  # one teacher a seed: the same network, other file
        values["teacher"] = values["teacher"].partition("@")[0]
    return json.dumps(values, sort_keys=True)


def _common_name(names: list[str]) -> str:
    """What the names share: equal parts of paths, else the same beginning; else the first."""
    if len(names) == 1:
        return names[0]
    parts = [name.split("/") for name in names]
    if len({len(part) for part in parts}) == 1:
        shared = [column[0] for column in zip(*parts, strict=True) if len(set(column)) == 1]
        if shared:
            return "/".join(shared)
    shortest = min(names, key=len)
    ends = (i for i, letter in enumerate(shortest) if any(name[i] != letter for name in names))
    start = shortest[: next(ends, len(shortest))]
    return re.sub(r"[-_./]*(seed|s)?[-_./]*$", "", start) or f"{names[0]} and others"


def by_data(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each data set; only they can be compared."""
    sets: dict[str, list[Group]] = {}
    for group in groups:
        sets.setdefault(group.runs[0].data_id, []).append(group)
    return list(sets.values())


def group_lines(groups: Sequence[Group], points_of: Callable[[Run], Points]) -> list[Line]:
    """A line for each group: the mean over its runs, with the band from least to largest.

    Runs that were not logged at the same places have a line each.
    """
    lines = []
    for group in groups:
        series = [points for run in group.runs if (points := points_of(run))]
        places = {tuple(x for x, _ in points) for points in series}
        if len(series) > 1 and len(places) == 1:
            columns = list(zip(*series, strict=True))
            means = [(column[0][0], fmean(y for _, y in column)) for column in columns]
            low = [(column[0][0], min(y for _, y in column)) for column in columns]
            high = [(column[0][0], max(y for _, y in column)) for column in columns]
            lines.append(Line(group.name, group.index, means, (low, high)))
            continue
        named = [run for run in group.runs if points_of(run)]
        for run in named:
            name = group.name if len(named) == 1 else run.name
            lines.append(Line(name, group.index, points_of(run)))
    return lines


def average(items: Sequence[Any]) -> Any:
    """Numbers are averaged, in objects and in lists of one length too; of all else the first."""
    first = items[0]
    if len(items) == 1:
        return first
    if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items):
        return fmean(items)
    if all(isinstance(item, dict) for item in items):
        shared = [key for key in first if all(key in item for item in items)]
        return {key: average([item[key] for item in items]) for key in shared}
    if all(isinstance(item, list) and len(item) == len(first) for item in items):
        return [average(column) for column in zip(*items, strict=True)]
    return first
