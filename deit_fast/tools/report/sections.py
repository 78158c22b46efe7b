"""The data of the report's sections: results, curves, settings; tables and charts for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from deit_fast.config import RunConfig
from deit_fast.config_file import RETIRED, dotted_keys, to_dict
from deit_fast.tools.analysis.table import DASH, count, percent
from deit_fast.tools.charts import COLOURS, Line, line_chart
from deit_fast.tools.run_folder import Run, flatten, number

SMOOTH_SHARE = 20  # a training curve is averaged over this fraction of its points: 1/20
Show = Callable[[float], str]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its heading.

    Attributes:
        head, rows: texts, or runs that are shown by colour key and name.
        style: classes of CSS.
    """

    head: list[Any]
    rows: Sequence[Sequence[Any]]
    style: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart and its legend; ``raw`` is the same chart without smoothing."""

    caption: str
    svg: str
    lines: list[Line]
    raw: str | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page."""

    caption: str
    alt: str
    png: bytes


def draw(
    caption: str, lines: list[Line], x_name: str, show: Show, floor: float | None = None
) -> Chart | None:
    """A chart; None where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    svg = line_chart(lines, title=caption, x_name=x_name, show=show, floor=floor)
    return Chart(caption, svg, lines)


def shade(text: str, share: float, colour: int = 0) -> Markup:
    """A cell whose background shows ``share``, in [0, 1], in one of the page's colours."""
    style = f"--w:{100 * share:.1f}%;--c:var(--c{colour})"
    return Markup('<span style="{}">{}</span>').format(style, text)


# ---------------------------------------------------------------------------------------------
# Values as text
# ---------------------------------------------------------------------------------------------


def short_percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def short(value: float) -> str:
    return f"{value:.4g}"


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return DASH if value is None else str(value)


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def _percents(key: str) -> Callable[[Run], str]:
    return lambda run: percent(number(run.result, key))


def _counts(key: str) -> Callable[[Run], str]:
    return lambda run: count(number(run.result, key))


def _kind(run: Run) -> str:
    return run.result.get("distill") or run.config["loss"]["kind"]


def _distillation(run: Run) -> str:
    teacher = run.result.get("teacher")
    if not teacher:
        return _kind(run)
    cached = " (cached)" if teacher.get("from") == "cache" else ""
    return f"{_kind(run)}, {teacher.get('teacher.spec', 'unnamed teacher')}{cached}"


def _best_epoch(run: Run) -> str:
    top1, epoch = number(run.result, "best_top1"), number(run.result, "best_epoch")
    return DASH if top1 is None or epoch is None else f"{epoch:.0f} ({percent(top1)})"


def _data_wait(run: Run) -> str:
    shares = [share for row in run.train if (share := number(row, "data_wait")) is not None]
    return percent(sum(shares) / len(shares) if shares else None)


COLUMNS: dict[str, Callable[[Run], str]] = {
    "distillation": _distillation,
    "top-1": _percents("top1"),
    "class head": _percents("top1_class"),
    "distil. head": _percents("top1_distill"),
    "average (EMA)": _percents("ema_top1"),
    "best epoch": _best_epoch,
    "epochs": _counts("epochs"),
    "steps": _counts("steps"),
    "img/s": _counts("images_per_s"),
    "data wait": _data_wait,
    "substituted": lambda run: str(len(run.result.get("substituted") or [])),
}


def lead(runs: list[Run]) -> list[tuple[str, str, str]]:
    """Name, value and detail of the figures at the top of the page."""
    figures = [("Runs", str(len(runs)), "")]
    scored = [(top1, run) for run in runs if (top1 := number(run.result, "top1")) is not None]
    if not scored:
        return figures
    top1, best = max(scored, key=lambda pair: pair[0])
    figures.append(("Highest top-1 accuracy", percent(top1), best.name))
    plain = [value for value, run in scored if _kind(run) == "none"]
    if plain and _kind(best) != "none":
        gain = f"{100 * (top1 - max(plain)):.2f} points"
        figures.append(("Gain by distillation", gain, "above the best run without distillation"))
    return figures


def results(runs: list[Run]) -> Table:
    texts = {name: [show(run) for run in runs] for name, show in COLUMNS.items()}
    used = {name: column for name, column in texts.items() if set(column) != {DASH}}
    scores = [number(run.result, "top1") for run in runs]
    if len(runs) > 1 and "top-1" in used:
        best = max(score for score in scores if score is not None)
        used["top-1"] = [
            Markup("<b>{}</b>").format(text) if score == best else text
            for text, score in zip(used["top-1"], scores, strict=True)
        ]
    rows = [[run, *(column[i] for column in used.values())] for i, run in enumerate(runs)]
    return Table(["run", *used], rows, "cards")


def per_class(runs: list[Run]) -> Table | None:
    """Accuracies as bars, the classes with the lowest means over the runs first."""
    tables = [run.result.get("per_class") or {} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)

    def mean(name: str) -> float:
        values = [table[name] for table in tables if name in table]
        return sum(values) / len(values)

    def bar(run: Run, accuracy: float | None) -> str:
        if accuracy is None:
            return DASH
        return shade(f"{100 * accuracy:.1f} %", accuracy, run.index % len(COLOURS))

    rows = [
        [name, *(bar(run, table.get(name)) for run, table in zip(runs, tables, strict=True))]
        for name in sorted(names, key=mean)
    ]
    return Table(["class", *runs], rows, "bars") if rows else None


# ---------------------------------------------------------------------------------------------
# Curves and views
# ---------------------------------------------------------------------------------------------


def curves(runs: list[Run]) -> list[Chart]:
    held_out = "on held-out images"
    return [
        *_curve(runs, "top1", f"Top-1 accuracy {held_out}", short_percent),
        *_curve(runs, "ema_top1", "Top-1 accuracy of the averaged weights", short_percent),
        *_curve(runs, "loss", f"Cross-entropy {held_out}", short),
        *_training_curve(runs, "loss", "Training loss", short, None),
    ]


def throughput(runs: list[Run]) -> list[Chart]:
    return [
        *_training_curve(runs, "images_per_s", "Images per second", short, 0.0),
        *_training_curve(
            runs, "data_wait", "Share of time spent waiting for images", short_percent, 0.0
        ),
    ]


def _curve(runs: list[Run], key: str, caption: str, show: Show) -> list[Chart]:
    lines = [Line(run.name, run.index, _points(run, run.evaluations, key)) for run in runs]
    chart = draw(caption, lines, "epoch", show)
    return [chart] if chart else []


def _training_curve(
    runs: list[Run], key: str, caption: str, show: Show, floor: float | None
) -> list[Chart]:
    """The smoothed curve; where smoothing changes it, with the logged one."""
    logged = [Line(run.name, run.index, _points(run, run.train, key)) for run in runs]
    smoothed = [smooth(line.points) for line in logged]
    width = max(width for _, width in smoothed)
    raw = draw(caption, logged, "epoch", show, floor)
    if width == 1:
        return [raw] if raw else []
    means = [replace(line, points=mean) for line, (mean, _) in zip(logged, smoothed, strict=True)]
    title = f"{caption}, mean of {width} neighbouring values"
    chart = draw(title, means, "epoch", show, floor)
    return [replace(chart, raw=raw.svg)] if chart and raw else []


def _points(run: Run, rows: list[dict[str, Any]], key: str) -> Points:
    """(epoch, value) of the rows that have both; the step gives fractions of an epoch."""
    last = max(run.evaluations, key=lambda row: number(row, "step") or 0, default={})
    steps, epochs = number(last, "step"), number(last, "epoch")
    scale = epochs / steps if steps and epochs else None
    points = []
    for row in rows:
        value, step = number(row, key), number(row, "step")
        x = step * scale if step is not None and scale is not None else number(row, "epoch")
        if x is not None and value is not None:
            points.append((x, value))
    return sorted(points)


def smooth(points: Points) -> tuple[Points, int]:
    """Centred means over an odd number of neighbours, fewer near the ends; and that number.

    Curves of fewer than 2 * SMOOTH_SHARE points are returned unchanged.
    """
    reach = len(points) // SMOOTH_SHARE // 2
    if reach == 0:
        return points, 1
    smoothed = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)  # symmetric: a straight line stays straight
        window = points[i - near : i + near + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed, 2 * reach + 1


def samples(runs: list[Run]) -> list[Picture]:
    """Each distinct picture once, with the names of the runs that share it."""
    owners: dict[bytes, list[str]] = {}
    for run in runs:
        if run.samples is not None:
            owners.setdefault(run.samples, []).append(run.name)
    named = [(", ".join(names), png) for png, names in owners.items()]
    return [Picture(names, f"first views of {names}", png) for names, png in named]


# ---------------------------------------------------------------------------------------------
# Settings, environment, commands
# ---------------------------------------------------------------------------------------------


def settings(runs: list[Run]) -> dict[str, Any]:
    """Settings that differ between the runs; those of one run that differ from the defaults."""
    heading, columns = "Settings that differ between the runs", [flatten(r.config) for r in runs]
    compared = columns
    if len(runs) == 1:
        heading = "Settings that differ from the defaults"
        defaults = json.loads(json.dumps(to_dict(RunConfig())))  # tuples to lists, as in the file
        compared = [*columns, flatten(defaults)]
    keys = dict.fromkeys([*dotted_keys(), *(key for column in columns for key in column)])
    rows = [
        [key, *(_setting(column.get(key)) for column in columns)]
        for key in keys
        if key != "output"
        and len({json.dumps(column.get(key, RETIRED.get(key))) for column in compared}) > 1
    ]
    configs = [(run.name, json.dumps(run.config, indent=2)) for run in runs]
    return {"heading": heading, "table": Table(["setting", *runs], rows, "text code"),
            "configs": configs}  # fmt: skip


def environment(runs: list[Run]) -> Table | None:
    """One column where all runs agree."""
    columns = [run.result.get("environment") or {} for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    head: list[Any] = ["", *runs]
    if len(runs) > 1 and all(column == columns[0] for column in columns):
        head, columns = ["", "all runs"], columns[:1]
    rows = [[key, *(column.get(key, DASH) for column in columns)] for key in keys]
    return Table(head, rows, "text") if rows else None


def commands(runs: list[Run]) -> list[tuple[Run, str]]:
    found = [(run, run.result.get("command")) for run in runs]
    return [(run, command) for run, command in found if command]
