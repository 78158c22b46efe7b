"""Sections that `deit-fast analyze` feeds: tokens and heads, who agrees with whom, the teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

from deit_fast.tools.report.charts import Line, line_chart
from deit_fast.tools.report.html import (
    DASH,
    figure,
    html_table,
    percent_text,
    picture,
    round_percent_text,
    run_label,
    short_text,
)
from deit_fast.tools.report.runs import Run, group, number, objects

CLASSIFIERS = {
    "class": "class head",
    "distillation": "distillation head",
    "sum_logits": "sum of logits",
    "sum_softmax": "sum of softmax",
}
CURVES = {"class": "class", "distillation": "distillation", "sum_logits": "sum"}  # short names
Measure = Callable[[dict[str, Any]], str]  # of an analysis, as text
SAMPLE_CLASSES = 3  # columns of a softened image


def tokens(runs: list[Run]) -> str:
    """Cosine of both tokens by layer, and how alike the heads are."""
    lines = []
    for index, run in enumerate(runs):
        layers = objects(group(run.analysis, "tokens"), "layers")
        # the final norm is no block, but what the heads read: it stands in the table
        values = [(float(x), number(layer, "mean")) for x, layer in enumerate(layers[:-1])]
        lines.append(Line(run.name, index, [(x, y) for x, y in values if y is not None]))
    if not any(line.points for line in lines):
        return ""
    caption = "Cosine of class and distillation token after each block"
    chart = line_chart(lines, title=caption, x_name="block (0: input)", show=short_text, floor=None)
    measures: list[tuple[str, Measure]] = [
        ("cosine of the learned tokens", lambda a: _plain(number(group(a, "tokens"), "learned"))),
        ("with their positions", lambda a: _layer(a, 0)),
        ("after the last block", lambda a: _layer(a, -2)),
        ("as the heads read them", lambda a: _layer(a, -1)),
        ("of the heads' weights", lambda a: _spread(group(group(a, "heads"), "weight_cosine"))),
        (
            "of their probabilities",
            lambda a: _spread(group(group(a, "heads"), "probability_cosine")),
        ),
        ("same decision", lambda a: percent_text(number(group(a, "heads"), "agreement"))),
    ]
    note = (
        '<p class="note">Mean and standard deviation over held-out images (for weights: over '
        "classes). DeiT's authors found 0.06 between the learned tokens and 0.93 at the last layer "
        "on ImageNet: alike, yet not the same.</p>"
    )
    table = f"<div>{_measures(runs, measures)}</div>"
    return f'<div class="charts">{figure(caption, _scroll(chart))}{table}</div>{note}'


def classifiers(runs: list[Run]) -> str:
    """Accuracy and calibration of heads, their sums and the teacher, and the curves."""
    analysed = [run for run in runs if run.analysis]
    if not analysed:
        return ""
    measures: list[tuple[str, Measure]] = []
    for key, name in CLASSIFIERS.items():
        measures.append((f"{name}, top-1", partial(_accuracy, key=key)))
        measures.append((f"{name}, ECE", partial(_head_error, key=key)))
    measures += [
        ("teacher, top-1", lambda a: percent_text(number(group(a, "teacher"), "top1"))),
        ("teacher, ECE", lambda a: _error(group(a, "teacher"), "calibration")),
    ]
    table = _measures(runs, measures)
    note = (
        '<p class="note">ECE: expected calibration error, 15 bins; the share by which confidence '
        "and accuracy differ. Below the dashed line a classifier is too sure of itself, above it "
        "not sure enough.</p>"
    )
    figures = "".join(_reliability(run) for run in analysed)
    return f'{table}{note}<div class="charts">{figures}</div>'


def disagreement(runs: list[Run]) -> str:
    """Share of different decisions, each classifier with each (DeiT, table 4)."""
    parts = []
    for run, label in _with_labels(runs):
        found = group(run.analysis, "disagreement")
        names, shares = found.get("names"), found.get("shares")
        if not isinstance(names, list) or not isinstance(shares, list):
            continue
        rows = [
            [escape(str(name)), *(_number_cell(_plain(_finite(value))) for value in row)]
            for name, row in zip(names, shares, strict=False)
            if isinstance(row, list)
        ]
        heads = ["", *(_number_head(str(name)) for name in names)]
        parts.append(f"<div><h3>{label}</h3>{html_table(heads, rows)}</div>")
    if not parts:
        return ""
    note = (
        '<p class="note">Share of held-out images on which two classifiers decide differently; '
        "undistilled is the run without distillation on the same images, both is the sum of the "
        "heads' logits.</p>"
    )
    return f'{note}<div class="charts">{"".join(parts)}</div>'


def teacher(runs: list[Run]) -> str:
    """The teacher's answers at several temperatures; equal ones once, with their runs."""
    owners: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run, label in _with_labels(runs):
        found = group(run.analysis, "teacher")
        if objects(found, "temperatures"):
            owners.setdefault(repr(found), (found, []))[1].append(label)
    parts = [_temperatures(found, labels) for found, labels in owners.values()]
    if not parts:
        return ""
    note = (
        '<p class="note">Entropy in nats and the mass of the k likeliest classes, means over '
        "held-out images; beside them one image's likeliest classes.</p>"
    )
    return note + "".join(parts)


def attention(runs: list[Run]) -> str:
    """Where the tokens look: strips of the last block's attention, and of all blocks'."""
    parts = []
    for run, label in _with_labels(runs):
        found = group(run.analysis, "attention")
        tiles = found.get("tiles")
        order = ", ".join(map(str, tiles)) if isinstance(tiles, list) else "image, maps"
        figures = [
            figure(
                f"image {row.get('id')}, label {row.get('label')}",
                picture(png, f"{order} of image {row.get('id')}, {run.name}"),
            )
            for row in objects(found, "samples")
            if (png := run.strips.get(str(row.get("picture")))) is not None
        ]
        if figures:
            parts.append(
                f'<h3>{label}</h3><p class="note">From the left: {escape(order)}.</p>'
                f'<div class="charts">{"".join(figures)}</div>'
            )
    if not parts:
        return ""
    note = (
        '<p class="note">Attention of the last block from each token to the patches, mean over '
        "heads; rollout multiplies all blocks. Each map is scaled to its own maximum.</p>"
    )
    return note + "".join(parts)


def left_out(runs: list[Run]) -> str:
    """What could not be analysed, and why."""
    rows = []
    for run, label in _with_labels(runs):
        reasons: dict[str, list[str]] = {}
        for part, reason in group(run.analysis, "left_out").items():
            reasons.setdefault(str(reason), []).append(part)
        rows += [
            f"<li>{label}: {escape(', '.join(parts))}: {escape(reason)}</li>"
            for reason, parts in reasons.items()
        ]
    return f"<ul>{''.join(rows)}</ul>" if rows else ""


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def _with_labels(runs: list[Run]) -> list[tuple[Run, str]]:
    """Analysed runs with their names in their colours."""
    return [(run, run_label(run, index)) for index, run in enumerate(runs) if run.analysis]


def _measures(runs: list[Run], measures: list[tuple[str, Measure]]) -> str:
    """A row per measure that some run has, a column per analysed run."""
    shown = _with_labels(runs)
    texts = [(name, [show(run.analysis) for run, _ in shown]) for name, show in measures]
    rows = [[name, *map(_number_cell, row)] for name, row in texts if set(row) != {DASH}]
    heads = [f'<th scope="col" class="number">{label}</th>' for _, label in shown]
    return html_table(["", *heads], rows)


def _accuracy(analysis: dict[str, Any], key: str) -> str:
    return percent_text(number(group(analysis, "accuracy"), key))


def _head_error(analysis: dict[str, Any], key: str) -> str:
    return _error(group(analysis, "calibration"), key)


def _error(curves: dict[str, Any], key: str) -> str:
    return percent_text(number(group(curves, key), "ece"))


def _reliability(run: Run) -> str:
    curves = group(run.analysis, "calibration")
    named = [(short, group(curves, name)) for name, short in CURVES.items()]
    named.append(("teacher", group(group(run.analysis, "teacher"), "calibration")))
    lines = []
    for index, (name, curve) in enumerate(named):
        points = [
            (x, y)
            for row in objects(curve, "bins")
            if (x := number(row, "confidence")) is not None
            and (y := number(row, "accuracy")) is not None
        ]
        lines.append(Line(name, index, points))
    if not any(line.points for line in lines):
        return ""
    # the place of the first dashed line among the charts' strokes
    lines.append(Line("ideal", 15, [(0.0, 0.0), (1.0, 1.0)]))
    caption = f"Accuracy by confidence: {run.name}"
    chart = line_chart(
        lines, title=caption, x_name="confidence", show=round_percent_text, floor=0.0
    )
    return figure(caption, _scroll(chart))


def _temperatures(found: dict[str, Any], labels: list[str]) -> str:
    rows, sample = objects(found, "temperatures"), group(found, "sample")
    masses = list(group(rows[0], "mass"))
    own = objects(sample, "temperatures")
    best = [str(item.get("name")) for item in objects(own[0], "classes")] if own else []
    best = best[:SAMPLE_CLASSES]
    heads = ["temperature", "entropy", *(f"top {k}" for k in masses)]
    heads += [f"class {name}" for name in best]
    cells = []
    for place, row in enumerate(rows):
        values = [number(row, "entropy"), *(number(group(row, "mass"), k) for k in masses)]
        odds = objects(own[place], "classes")[: len(best)] if place < len(own) else []
        values += [number(item, "probability") for item in odds]
        temperature = number(row, "temperature")
        first = DASH if temperature is None else f"{temperature:g}"
        cells.append([first, *(_number_cell(_plain(value)) for value in values)])
    spec = escape(str(found.get("spec")))
    text = f"<h3>{', '.join(labels)}</h3><p>{spec}"
    if best:
        text += f", and image {escape(str(sample.get('id')))} "
        text += f"(label {escape(str(sample.get('label')))}) by class"
    return f"{text}</p>{html_table([heads[0], *map(_number_head, heads[1:])], cells)}"


def _layer(analysis: dict[str, Any], place: int) -> str:
    layers = objects(group(analysis, "tokens"), "layers")
    return _spread(layers[place]) if len(layers) > 2 else DASH


def _spread(values: dict[str, Any]) -> str:
    mean, std = number(values, "mean"), number(values, "std")
    return DASH if mean is None or std is None else f"{mean:.3f} \u00b1 {std:.3f}"


def _finite(value: Any) -> float | None:
    return number({"value": value}, "value")


def _plain(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _number_cell(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'


def _number_head(text: str) -> str:
    return f'<th scope="col" class="number">{escape(text)}</th>'


def _scroll(chart: str) -> str:
    return f'<div class="scroll">{chart}</div>'
