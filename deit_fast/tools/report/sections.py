"""The data of the report's sections, each a function of the runs that are shown.

The sections of an analysis get only the runs that `deit-fast analyze` has measured.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from markupsafe import Markup

from deit_fast.config import RunConfig
from deit_fast.config_file import RETIRED, by_dotted_key, dotted_keys, to_dict
from deit_fast.tools.analysis import table
from deit_fast.tools.analysis.table import DASH, count, percent
from deit_fast.tools.report.charts import (
    COLOURS,
    Chart,
    Line,
    Points,
    Show,
    line_chart,
    short,
    short_percent,
    smooth,
)  # fmt: skip
from deit_fast.tools.run_folder import Run

LARGEST = 1e100  # of a number that is shown: sums and axes of larger ones overflow
RELIABILITY_CURVES = {"class": "class", "distillation": "distillation", "mean_logits": "mean"}


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
class Picture:
    """A PNG inside the page."""

    caption: str
    alt: str
    png: bytes


def shade(text: str, share: float, colour: int = 0) -> Markup:
    """A cell whose background shows ``share``, in [0, 1], in one of the page's colours."""
    style = f"--w:{100 * share:.1f}%;--c:var(--c{colour})"
    return Markup('<span style="{}">{}</span>').format(style, text)


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def _number(values: dict[str, Any], key: str) -> float | None:
    """A number of at most ``LARGEST``, or None."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return float(value)


def _result(key: str, show: Callable[[float | None], str]) -> Callable[[Run], str]:
    return lambda run: show(_number(run.result, key))


def _kind(run: Run) -> str:
    return run.result.get("distill") or run.config["loss"]["kind"]


def _distillation(run: Run) -> str:
    teacher = run.result.get("teacher")
    if not teacher:
        return _kind(run)
    cached = " (cached)" if teacher.get("from") == "cache" else ""
    return f"{_kind(run)}, {teacher.get('teacher.spec', 'unnamed teacher')}{cached}"


def _best_epoch(run: Run) -> str:
    top1, epoch = _number(run.result, "best_top1"), _number(run.result, "best_epoch")
    return DASH if top1 is None or epoch is None else f"{epoch:.0f} ({percent(top1)})"


def _data_wait(run: Run) -> str:
    shares = [share for row in run.train if (share := _number(row, "data_wait")) is not None]
    return percent(fmean(shares) if shares else None)


COLUMNS: dict[str, Callable[[Run], str]] = {
    "distillation": _distillation,
    "top-1": _result("top1", percent),
    "class head": _result("top1_class", percent),
    "distil. head": _result("top1_distill", percent),
    "average (EMA)": _result("ema_top1", percent),
    "best epoch": _best_epoch,
    "epochs": _result("epochs", count),
    "steps": _result("steps", count),
    "img/s": _result("images_per_s", count),
    "data wait": _data_wait,
    "substituted": lambda run: str(len(run.result.get("substituted") or [])),
}


def lead(runs: list[Run]) -> list[tuple[str, str, str]]:
    """Name, value and detail of the figures at the top of the page."""
    figures = [("Runs", str(len(runs)), "")]
    scored = [(top1, run) for run in runs if (top1 := _number(run.result, "top1")) is not None]
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
    scores = [_number(run.result, "top1") for run in runs]
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
    names = dict.fromkeys(name for accuracies in tables for name in accuracies)

    def mean(name: str) -> float:
        return fmean(accuracies[name] for accuracies in tables if name in accuracies)

    def bar(run: Run, accuracy: float | None) -> str:
        if accuracy is None:
            return DASH
        return shade(f"{100 * accuracy:.1f} %", accuracy, run.index % len(COLOURS))

    rows = [
        [name, *(bar(run, of_run.get(name)) for run, of_run in zip(runs, tables, strict=True))]
        for name in sorted(names, key=mean)
    ]
    return Table(["class", *runs], rows, "bars") if rows else None


# ---------------------------------------------------------------------------------------------
# Curves and views
# ---------------------------------------------------------------------------------------------


def curves(runs: list[Run]) -> list[Chart]:
    charts = [
        _curve(runs, "top1", "Top-1 accuracy on held-out images", short_percent),
        _curve(runs, "ema_top1", "Top-1 accuracy of the averaged weights", short_percent),
        _curve(runs, "loss", "Cross-entropy on held-out images", short),
        _training_curve(runs, "loss", "Training loss", short, None),
    ]
    return [chart for chart in charts if chart]


def throughput(runs: list[Run]) -> list[Chart]:
    waiting = "Share of time spent waiting for images"
    charts = [
        _training_curve(runs, "images_per_s", "Images per second", short, 0.0),
        _training_curve(runs, "data_wait", waiting, short_percent, 0.0),
    ]
    return [chart for chart in charts if chart]


def _curve(runs: list[Run], key: str, caption: str, show: Show) -> Chart | None:
    lines = [Line(run.name, run.index, _points(run, run.evaluations, key)) for run in runs]
    return line_chart(caption, lines, "epoch", show)


def _training_curve(
    runs: list[Run], key: str, caption: str, show: Show, floor: float | None
) -> Chart | None:
    """The smoothed curve; where smoothing changes it, with the logged one."""
    logged = [Line(run.name, run.index, _points(run, run.train, key)) for run in runs]
    smoothed = [smooth(line.points) for line in logged]
    width = max(width for _, width in smoothed)
    raw = line_chart(caption, logged, "epoch", show, floor)
    if raw is None or width == 1:
        return raw
    means = [replace(line, points=mean) for line, (mean, _) in zip(logged, smoothed, strict=True)]
    title = f"{caption}, mean of {width} neighbouring values"
    chart = line_chart(title, means, "epoch", show, floor)
    return chart and replace(chart, raw=raw.svg)


def _points(run: Run, rows: list[dict[str, Any]], key: str) -> Points:
    """(epoch, value) of the rows that have both; the step gives fractions of an epoch."""
    found = [(_number(row, "epoch"), _number(row, "step")) for row in run.evaluations]
    ends = {epoch: step for epoch, step in found if epoch and step}
    points = []
    for row in rows:
        value, step = _number(row, key), _number(row, "step")
        x = _epoch_at(step, ends) if step is not None and ends else _number(row, "epoch")
        if x is not None and value is not None:
            points.append((x, value))
    return sorted(points)


def _epoch_at(step: float, ends: dict[float, float]) -> float:
    """The epoch of a step, between the ends of epochs, whose steps may differ in number.

    Args:
        ends: last step by epoch; at least one.
    """
    epochs, steps = zip((0.0, 0.0), *sorted(ends.items()), strict=True)
    right = min(max(1, bisect_left(steps, step)), len(steps) - 1)
    length = steps[right] - steps[right - 1]
    share = (step - steps[right - 1]) / length if length > 0 else 1.0
    return epochs[right - 1] + share * (epochs[right] - epochs[right - 1])


def samples(runs: list[Run]) -> list[Picture]:
    """Each distinct picture once, with the names of the runs that share it."""
    owners: dict[bytes, list[str]] = {}
    for run in runs:
        if run.samples is not None:
            owners.setdefault(run.samples, []).append(run.name)
    named = [(", ".join(names), png) for png, names in owners.items()]
    return [Picture(names, f"first views of {names}", png) for names, png in named]


# ---------------------------------------------------------------------------------------------
# Analysis: tokens, calibration, teacher, attention
# ---------------------------------------------------------------------------------------------


def _figures(runs: list[Run], figures: list[table.Figure]) -> Table:
    rows = table.compare([run.analysis for run in runs], figures)
    return Table(["", *runs], rows, "numbers")


def tokens(runs: list[Run]) -> dict[str, Any] | None:
    """Cosine of the two tokens by layer, and similarity of the heads."""
    lines = []
    for run in runs:
        layers = table.look_up(run.analysis, "tokens.layers") or []
        points = [(float(x), layer["mean"]) for x, layer in enumerate(layers[:-1])]  # no norm
        lines.append(Line(run.name, run.index, points))
    caption = "Cosine of class and distillation token after each block"
    chart = line_chart(caption, lines, "block (0: input)", short)
    return {"chart": chart, "table": _figures(runs, table.TOKEN_FIGURES)} if chart else None


def classifiers(runs: list[Run]) -> dict[str, Any] | None:
    """Accuracy and calibration of heads, their means and the teacher; reliability curves."""
    if not runs:
        return None
    charts = [_reliability(run) for run in runs]
    return {"table": _figures(runs, table.CLASSIFIER_FIGURES), "charts": charts}


def _reliability(run: Run) -> Chart | None:
    keys = {name: f"calibration.{key}.bins" for key, name in RELIABILITY_CURVES.items()}
    keys["teacher"] = "teacher.calibration.bins"
    lines = []
    for index, (name, key) in enumerate(keys.items()):
        bins = table.look_up(run.analysis, key) or []
        lines.append(Line(name, index, [(row["confidence"], row["accuracy"]) for row in bins]))
    lines.append(Line("ideal", None, [(0.0, 0.0), (1.0, 1.0)]))
    return line_chart(
        f"Accuracy by confidence: {run.name}", lines, "confidence", short_percent, 0.0
    )


def disagreement(runs: list[Run]) -> list[tuple[Run, Table]]:
    """Share of different decisions for each pair of classifiers (DeiT, table 4)."""
    items = []
    for run in runs:
        head, rows = table.disagreement(run.analysis)
        shaded = [[name, *(shade(text, float(text)) for text in texts)] for name, *texts in rows]
        items.append((run, Table(head, shaded, "numbers shades")))
    return items


def teachers(runs: list[Run]) -> list[dict[str, Any]]:
    """Each teacher at several temperatures; equal ones once, with all their runs."""
    items = []
    for teacher, owners in table.teachers([run.analysis for run in runs], runs):
        title, head, rows = table.temperatures(teacher)
        chart = _temperature_chart(teacher["temperatures"])
        values = Table(head, rows, "numbers")
        items.append({"runs": owners, "title": title, "table": values, "chart": chart})
    return items


def _temperature_chart(rows: list[dict[str, Any]]) -> Chart | None:
    keys = {"entropy / log C": "uniform_share"}
    keys |= {f"probability of the top {k}": f"mass.{k}" for k in rows[0]["mass"]}
    lines = [
        Line(name, index, [(row["temperature"], table.look_up(row, key)) for row in rows])
        for index, (name, key) in enumerate(keys.items())
    ]
    caption = "Entropy and probability by temperature"
    return line_chart(caption, lines, "temperature", short_percent, 0.0)


def attention(runs: list[Run]) -> list[dict[str, Any]]:
    """Strips of attention maps: of the last block, and through all blocks."""
    items = []
    for run in runs:
        samples = table.look_up(run.analysis, "attention.samples")
        if not samples:
            continue
        order = ", ".join(run.analysis["attention"]["tiles"])
        pictures = [
            Picture(
                f"image {row['id']}, label {row['label']}",
                f"{order} of image {row['id']}, {run.name}",
                run.maps[row["picture"]],
            )
            for row in samples
        ]
        items.append({"run": run, "order": order, "pictures": pictures})
    return items


def left_out(runs: list[Run]) -> list[tuple[Run, str]]:
    """The parts of each analysis that are missing, by reason."""
    return [(run, text) for run in runs for text in table.left_out(run.analysis)]


# ---------------------------------------------------------------------------------------------
# Settings, environment, commands
# ---------------------------------------------------------------------------------------------


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return DASH if value is None else str(value)


def settings(runs: list[Run]) -> dict[str, Any]:
    """Settings that differ between the runs; those of one run that differ from the defaults."""
    heading = "Settings that differ between the runs"
    columns = [by_dotted_key(run.config) for run in runs]
    compared = columns
    if len(runs) == 1:
        heading = "Settings that differ from the defaults"
        defaults = json.loads(json.dumps(to_dict(RunConfig())))  # tuples to lists, as in the file
        compared = [*columns, by_dotted_key(defaults)]
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
    return [(run, command) for run in runs if (command := run.result.get("command"))]
