"""Accuracy and cost of the runs: the figures at the top, a row for each group, classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from deit_fast.tools.analysis import table
from deit_fast.tools.analysis.table import DASH, count, percent
from deit_fast.tools.report.charts import COLOURS
from deit_fast.tools.report.groups import Group, by_data
from deit_fast.tools.report.parts import (
    Table,
    amount,
    interval,
    mean,
    mean_and_deviation,
    number,
    shade,
)  # fmt: skip
from deit_fast.tools.run_folder import Run

Column = Callable[[Group], str]
HARDEST = 30  # classes that are shown of more than twice as many


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Results:
    """The groups on one data set; ``data`` describes it, empty where there is only one."""

    data: str
    table: Table
    seeds: Table | None


def best_group(groups: Sequence[Group]) -> Group:
    """Of the groups with the most runs the one with the highest mean: with fewer seeds a lucky one
    would win."""
    most = max(len(group.scores()) for group in groups)
    longest = [group for group in groups if len(group.scores()) == most]
    return max(longest, key=lambda group: fmean(group.scores() or [0.0]))


def kind_of(run: Run) -> str:
    return run.result.get("distill") or run.config["loss"]["kind"]


# ---------------------------------------------------------------------------------------------
# Figures at the top
# ---------------------------------------------------------------------------------------------


def lead(groups: list[Group]) -> list[tuple[str, list[Tile]]]:
    """The figures of each data set, with the name of the set where there are several."""
    sets = by_data(groups)
    names = [_data_name(members) if len(sets) > 1 else "" for members in sets]
    return [(name, _tiles(members)) for name, members in zip(names, sets, strict=True)]


def _tiles(groups: list[Group]) -> list[Tile]:
    runs = sum(len(group.runs) for group in groups)
    settings = f"{len(groups)} settings" if len(groups) < runs else ""
    tiles = [Tile("Runs", str(runs), settings)]
    scored = [group for group in groups if group.scores()]
    if not scored:
        return tiles
    best = best_group(scored)
    name = "Top-1 accuracy" if len(scored) == 1 else "Highest top-1 accuracy"
    tiles.append(Tile(name, mean_and_deviation(best.scores()), _best_detail(best)))
    if (gain := _gain(best, scored)) is not None:
        tiles.append(gain)
    agreements = [_teacher_agreement(run) for run in best.runs]
    if (agreement := mean(agreements)) is not None:
        images = mean([number(run.analysis, "images") for run in best.runs])
        runs_of = "" if len(best.runs) == 1 else f", mean of {_runs_of(best)}"
        detail = f"{best.name}{runs_of}, n = {count(images)} images"
        tiles.append(Tile("Teacher-student agreement", percent(agreement), detail))
    return tiles


def _best_detail(group: Group) -> str:
    images = number(group.runs[0].result, "samples")
    of = f", n = {count(images)} images" if images else ""
    if len(group.scores()) == 1:
        around = interval(group.scores()[0], images)
        return f"{group.name}{of}" + ("" if around == DASH else f", 95 % interval {around}")
    seeds = ", ".join(str(seed) for seed in group.seeds)
    return f"{group.name}: mean \u00b1 standard deviation of {_runs_of(group)} (seeds {seeds}){of}"


def _runs_of(group: Group) -> str:
    return f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"


def _gain(best: Group, groups: list[Group]) -> Tile | None:
    """Gain of the best distilled group over undistilled runs of the same seeds and epochs."""
    if kind_of(best.runs[0]) == "none":
        return None
    found = []
    for plain in groups:
        same_budget = plain.runs[0].config.get("epochs") == best.runs[0].config.get("epochs")
        if kind_of(plain.runs[0]) == "none" and same_budget:
            pairs = _pairs(best, plain)
            if pairs:
                found.append((len(pairs), fmean(p for _, p in pairs), plain, pairs))
    if not found:
        return None
    _, _, plain, pairs = max(found, key=lambda item: item[:2])
    gains = [100 * (score - reference) for score, reference in pairs]
    spread = f" \u00b1 {stdev(gains):.2f}" if len(gains) > 1 else ""
    each = f"the same {len(gains)} seeds" if len(gains) > 1 else "one run each, same seed"
    detail = f"{best.name} against {plain.name}, {each}"
    return Tile("Gain by distillation, points", f"{fmean(gains):+.2f}{spread}", detail)


def _pairs(left: Group, right: Group) -> list[tuple[float, float]]:
    """Top-1 accuracies of the runs whose seeds both groups have."""
    scores = [
        {seed: number(run.result, "top1") for seed, run in zip(g.seeds, g.runs, strict=True)}
        for g in (left, right)
    ]
    pairs = [(one, scores[1].get(seed)) for seed, one in scores[0].items()]
    return [(one, other) for one, other in pairs if one is not None and other is not None]


def _teacher_agreement(run: Run) -> float | None:
    """Share of the held-out images with the teacher's class, where `analyze` has measured it."""
    found = table.look_up(run.analysis, "disagreement") or {}
    names = found.get("names", [])
    own = next((name for name in ("both", "student") if name in names), None)
    if own is None or "teacher" not in names:
        return None
    return 1 - float(found["shares"][names.index(own)][names.index("teacher")])


def _data_name(groups: list[Group]) -> str:
    run = groups[0].runs[0]
    root = (run.config.get("data") or {}).get("root") or "synthetic images"
    images, classes = number(run.result, "samples"), run.result.get("classes") or []
    facts = [f"{count(images)} held-out images"] if images else []
    facts += [f"{len(classes)} classes"] if classes else []
    return ", ".join([str(root), *facts, f"fingerprint {run.data_id[:8]}"])


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def _mean(key: str, show: Callable[[float | None], str]) -> Column:
    return lambda group: show(mean([number(run.result, key) for run in group.runs]))


def _mean_of(value: Callable[[Run], float | None], show: Callable[[Any], str]) -> Column:
    return lambda group: show(mean([value(run) for run in group.runs]))


def _distillation(group: Group) -> str:
    run = group.runs[0]
    teacher = run.result.get("teacher")
    if not teacher:
        return kind_of(run)
    cached = " (cached)" if teacher.get("from") == "cache" else ""
    spec = str(teacher.get("teacher.spec", "unnamed teacher"))
    name = spec if spec.startswith("timm:") else spec.rpartition(":")[2]
    return f"{kind_of(run)}, {name}{cached}"


def _top1(group: Group) -> str:
    return mean_and_deviation(group.scores()) if group.scores() else DASH


def _interval(group: Group) -> str:
    return interval(mean(group.scores()), number(group.runs[0].result, "samples"))


def _best_epoch(group: Group) -> str:
    found = [(number(run.result, "best_epoch"), number(run.result, "best_top1"))
             for run in group.runs]  # fmt: skip
    epochs = [epoch for epoch, _ in found if epoch is not None]
    top1 = mean([top1 for _, top1 in found])
    if not epochs or top1 is None:
        return DASH
    ends = dict.fromkeys(f"{epoch:.0f}" for epoch in (min(epochs), max(epochs)))
    return f"{DASH.join(ends)} ({percent(top1)})"


RESULT_COLUMNS: dict[str, Column] = {
    "distillation": _distillation,
    "seeds": lambda group: ", ".join(map(str, group.seeds)),
    "top-1": _top1,
    "95 % interval": _interval,
    "top-5": _mean("top5", percent),
    "class head": _mean("top1_class", percent),
    "distil. head": _mean("top1_distill", percent),
    "average (EMA)": _mean("ema_top1", percent),
    "teacher agreement": _mean_of(_teacher_agreement, percent),
    "best epoch": _best_epoch,
}


def results(groups: list[Group]) -> list[Results]:
    """A table for each data set: runs on other images are not ranked together."""
    sets = by_data(groups)
    return [
        Results(_data_name(members) if len(sets) > 1 else "", _accuracies(members), _each(members))
        for members in sets
    ]


def _columns(groups: Sequence[Group], columns: dict[str, Column]) -> dict[str, list[str]]:
    """The cells of each column; without columns that have no value."""
    texts = {name: [show(group) for group in groups] for name, show in columns.items()}
    return {name: column for name, column in texts.items() if set(column) != {DASH}}


def _accuracies(groups: list[Group]) -> Table:
    used = _columns(groups, RESULT_COLUMNS)
    if len(groups) > 1 and "top-1" in used:
        best = mean(best_group(groups).scores())
        used["top-1"] = [
            Markup("<b>{}</b>").format(text) if mean(group.scores()) == best else text
            for text, group in zip(used["top-1"], groups, strict=True)
        ]
    rows = [[group, *(column[i] for column in used.values())] for i, group in enumerate(groups)]
    return Table(["run", *used], rows, "cards")


def _each(groups: list[Group]) -> Table | None:
    """A row for each run, where some are shown by their mean."""
    if all(len(group.runs) == 1 for group in groups):
        return None
    single = [(run, Group(run.index, run.name, [run])) for group in groups for run in group.runs]
    used = _columns([group for _, group in single], RESULT_COLUMNS)
    used.pop("distillation", None)
    rows = [[run, *(cells[i] for cells in used.values())] for i, (run, _) in enumerate(single)]
    return Table(["run", *used], rows, "cards")


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------


def _peak_memory(run: Run) -> float | None:
    found = [number(row, "peak_memory_bytes") for row in run.train]
    return max((value for value in found if value is not None), default=None)


def _data_wait(run: Run) -> float | None:
    return mean([number(row, "data_wait") for row in run.train])


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _device(group: Group) -> str:
    run = group.runs[0]
    device = (run.result.get("environment") or {}).get("device")
    processes = number(run.result, "processes") or 1
    return DASH if device is None else f"{device} x {processes:.0f}" if processes > 1 else device


def _model(group: Group) -> str:
    settings = group.runs[0].config.get("model") or {}
    head, width = settings.get("head"), settings.get("wide")
    return f"{settings.get('name') or DASH}{f', {head} {width}' if width else ''}"


COST_COLUMNS: dict[str, Column] = {
    "model": _model,
    "parameters": _mean("parameters", amount),
    "FLOPs": _mean("forward_flops", amount),
    "peak memory": _mean_of(
        _peak_memory, lambda x: DASH if x is None else f"{x / 2**30:.1f} GiB"
    ),
    "epochs": _mean("epochs", count),
    "steps": _mean("steps", count),
    "training": _mean("train_seconds", _minutes),
    "img/s": _mean("images_per_s", count),
    "data wait": _mean_of(_data_wait, percent),
    "device": _device,
    "substituted": lambda group: str(
        sum(len(run.result.get("substituted") or []) for run in group.runs)
    ),
}  # fmt: skip


COST_NOTES = {
    "FLOPs": "FLOPs: of one image's forward, counted by torch's FlopCounterMode, a multiply-add "
    "as two.",
    "peak memory": "Peak memory: of the GPU, as torch's allocator counts.",
    "training": "Training: time in steps, without evaluation.",
    "data wait": "Data wait: share of the training time spent waiting for images.",
    "substituted": "Substituted: unreadable images that were replaced by a neighbour, sum over the "
    "runs of a row; all else are means.",
}


def costs(groups: list[Group]) -> dict[str, Any]:
    used = _columns(groups, COST_COLUMNS)
    rows = [[group, *(column[i] for column in used.values())] for i, group in enumerate(groups)]
    note = " ".join(text for name, text in COST_NOTES.items() if name in used)
    return {"table": Table(["run", *used], rows, "cards"), "note": note}


# ---------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------


def per_class(groups: list[Group]) -> dict[str, Any] | None:
    """Accuracies as bars, the classes with the lowest means first; of many only the hardest."""
    tables = []
    for group in groups:
        of_runs = [run.result.get("per_class") or {} for run in group.runs]
        names = dict.fromkeys(name for accuracies in of_runs for name in accuracies)
        tables.append({name: fmean(a[name] for a in of_runs if name in a) for name in names})
    names = dict.fromkeys(name for accuracies in tables for name in accuracies)

    def over_groups(name: str) -> float:
        return fmean(accuracies[name] for accuracies in tables if name in accuracies)

    def bar(group: Group, accuracy: float | None) -> str:
        if accuracy is None:
            return DASH
        return shade(f"{100 * accuracy:.1f} %", accuracy, group.index % len(COLOURS))

    hardest = sorted(names, key=over_groups)
    shown = hardest if len(hardest) <= 2 * HARDEST else hardest[:HARDEST]
    rows = [
        [name, *(bar(group, own.get(name)) for group, own in zip(groups, tables, strict=True))]
        for name in shown
    ]
    if not rows:
        return None
    note = f"The hardest {len(shown)} of {len(names)} classes" if len(shown) < len(names) else (
        "Hardest classes first")  # fmt: skip
    return {"note": note, "table": Table(["class", *groups], rows, "bars")}
