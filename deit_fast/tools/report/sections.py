"""The data of each section of the report: tables, charts and pictures for the template."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from deit_fast.config import RunConfig
from deit_fast.config_file import RETIRED, dotted_keys, to_dict
from deit_fast.tools.charts import Line, dash, line_chart
from deit_fast.tools.run_folder import Run, flatten, group, number, objects

DASH = "\u2013"
SMOOTH_SHARE = 20  # a training curve is averaged over this fraction of its points: 1/20
SAMPLE_CLASSES = 3  # columns for the classes of one image
CLASSIFIERS = {
    "class": "class head",
    "distillation": "distillation head",
    "sum_logits": "sum of logits",
    "sum_softmax": "sum of softmax",
}
Show = Callable[[float], str]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        run: position of the run whose colour key precedes the text.
        number: whether the cell is aligned to the right.
        share: fraction, in [0, 1], that its background shows: as a bar in the colour of the run
            ``bar``, or else as a shade.
    """

    text: str
    run: int | None = None
    number: bool = False
    strong: bool = False
    code: bool = False
    share: float | None = None
    bar: int | None = None

    @property
    def dash(self) -> str:
        return dash(self.run)


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its heading. ``style`` is a class of CSS."""

    head: list[Cell]
    rows: list[list[Cell]]
    style: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn chart and its legend; ``raw`` is the same chart without smoothing."""

    caption: str
    svg: Markup
    lines: list[Line]
    raw: Markup | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page."""

    caption: str
    alt: str
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def draw(
    caption: str, lines: list[Line], x_name: str, show: Show, floor: float | None = None
) -> Chart | None:
    """A chart; None where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    svg = line_chart(lines, title=caption, x_name=x_name, show=show, floor=floor)
    return Chart(caption, svg, lines)


# ---------------------------------------------------------------------------------------------
# Values as text
# ---------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f} %"


def _short_percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


def _decimal(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.4g}"


def _spread(values: dict[str, Any]) -> str:
    mean, std = number(values, "mean"), number(values, "std")
    return DASH if mean is None or std is None else f"{mean:.3f} \u00b1 {std:.3f}"


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return DASH if value is None else str(value)


def _label(run: Run) -> Cell:
    return Cell(run.name, run=run.index)


def _heads(first: str, runs: Sequence[Run], numeric: bool = False) -> list[Cell]:
    return [Cell(first), *(Cell(run.name, run=run.index, number=numeric) for run in runs)]


def _numbers(texts: Sequence[str]) -> list[Cell]:
    return [Cell(text, number=True) for text in texts]


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def _distillation(run: Run) -> str:
    kind = run.result.get("distill") or group(run.config, "loss").get("kind")
    return str(kind) if kind else DASH


def _teacher(run: Run) -> str:
    teacher = run.result.get("teacher")
    if not isinstance(teacher, dict):
        return DASH
    spec = teacher.get("teacher.spec") or teacher.get("teacher.name") or run.config.get("teacher")
    source = teacher.get("from")
    return f"{spec} (cached)" if spec and source == "cache" else str(spec or source or "yes")


def _best_epoch(run: Run) -> str:
    top1, epoch = number(run.result, "best_top1"), number(run.result, "best_epoch")
    return DASH if top1 is None or epoch is None else f"{epoch:.0f} ({_percent(top1)})"


def _data_wait(run: Run) -> float | None:
    shares = [share for row in run.train if (share := number(row, "data_wait")) is not None]
    return sum(shares) / len(shares) if shares else None


def _substituted(run: Run) -> str:
    paths = run.result.get("substituted")
    return str(len(paths)) if isinstance(paths, list) else DASH


COLUMNS: dict[str, Callable[[Run], str]] = {
    "distillation": _distillation,
    "teacher": _teacher,
    "top-1": lambda run: _percent(number(run.result, "top1")),
    "class head": lambda run: _percent(number(run.result, "top1_class")),
    "distil. head": lambda run: _percent(number(run.result, "top1_distill")),
    "average (EMA)": lambda run: _percent(number(run.result, "ema_top1")),
    "best epoch": _best_epoch,
    "epochs": lambda run: _count(number(run.result, "epochs")),
    "steps": lambda run: _count(number(run.result, "steps")),
    "img/s": lambda run: _count(number(run.result, "images_per_s")),
    "data wait": lambda run: _percent(_data_wait(run)),
    "substituted": _substituted,
}


def lead(runs: list[Run]) -> list[tuple[str, str, str]]:
    """Name, value and detail of the figures at the top of the page."""
    figures = [("Runs", str(len(runs)), "")]
    scored = [(top1, run) for run in runs if (top1 := number(run.result, "top1")) is not None]
    if not scored:
        return figures
    top1, best = max(scored, key=lambda pair: pair[0])
    figures.append(("Highest top-1 accuracy", _percent(top1), best.name))
    plain = [value for value, run in scored if _distillation(run) == "none"]
    if plain and _distillation(best) != "none":
        gain = f"{100 * (top1 - max(plain)):.2f} points"
        figures.append(("Gain by distillation", gain, "above the best run without distillation"))
    return figures


def results(runs: list[Run]) -> Table:
    texts = {name: [show(run) for run in runs] for name, show in COLUMNS.items()}
    used = {name: column for name, column in texts.items() if set(column) != {DASH}}
    numeric = {name: name not in ("distillation", "teacher") for name in used}
    top = max((number(run.result, "top1") or 0 for run in runs), default=0)
    rows = []
    for i, run in enumerate(runs):
        best = len(runs) > 1 and number(run.result, "top1") == top
        cells = [
            Cell(column[i], number=numeric[name], strong=best and name == "top-1")
            for name, column in used.items()
        ]
        rows.append([_label(run), *cells])
    heads = [Cell(name, number=numeric[name]) for name in used]
    return Table([Cell("run"), *heads], rows, "cards")


def per_class(runs: list[Run]) -> Table | None:
    tables = [group(run.result, "per_class") for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)

    def mean(name: str) -> float:
        values = [v for table in tables if (v := number(table, name)) is not None]
        return sum(values) / len(values) if values else 2.0  # last

    def bar(value: float | None, run: int) -> Cell:
        if value is None:
            return Cell(DASH)
        return Cell(f"{100 * value:.1f} %", share=min(max(value, 0.0), 1.0), bar=run)

    rows = [
        [Cell(name), *(bar(number(table, name), i) for i, table in enumerate(tables))]
        for name in sorted(names, key=mean)
    ]
    return Table(_heads("class", runs), rows, "bars") if rows else None


# ---------------------------------------------------------------------------------------------
# Curves and views
# ---------------------------------------------------------------------------------------------


def curves(runs: list[Run]) -> list[Chart]:
    held_out = "on held-out images"
    return [
        *_curve(runs, "top1", f"Top-1 accuracy {held_out}", _short_percent),
        *_curve(runs, "ema_top1", "Top-1 accuracy of the averaged weights", _short_percent),
        *_curve(runs, "loss", f"Cross-entropy {held_out}", _short),
        *_training_curve(runs, "loss", "Training loss", _short, None),
    ]


def throughput(runs: list[Run]) -> list[Chart]:
    return [
        *_training_curve(runs, "images_per_s", "Images per second", _short, 0.0),
        *_training_curve(
            runs, "data_wait", "Share of time spent waiting for images", _short_percent, 0.0
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
# Analysis
# ---------------------------------------------------------------------------------------------

Measure = Callable[[dict[str, Any]], str]  # a value of an analysis, as text


def _analysed(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.analysis]


def _measures(runs: list[Run], measures: dict[str, Measure]) -> Table:
    """A row for each measure that some run has, a column for each analysed run."""
    shown = _analysed(runs)
    texts = {name: [show(run.analysis) for run in shown] for name, show in measures.items()}
    rows = [[Cell(name), *_numbers(row)] for name, row in texts.items() if set(row) != {DASH}]
    return Table(_heads("", shown, numeric=True), rows)


def tokens(runs: list[Run]) -> dict[str, Any] | None:
    """Cosine of the two tokens by layer, and similarity of the heads."""

    def layer(analysis: dict[str, Any], index: int) -> str:
        layers = objects(group(analysis, "tokens"), "layers")
        return _spread(layers[index]) if len(layers) > 2 else DASH

    lines = []
    for run in runs:
        layers = objects(group(run.analysis, "tokens"), "layers")[:-1]  # without the final norm
        means = [(float(x), number(layer, "mean")) for x, layer in enumerate(layers)]
        lines.append(Line(run.name, run.index, [(x, y) for x, y in means if y is not None]))
    caption = "Cosine of class and distillation token after each block"
    chart = draw(caption, lines, "block (0: input)", _short)
    measures: dict[str, Measure] = {
        "cosine of the learned tokens": lambda a: _decimal(number(group(a, "tokens"), "learned")),
        "with position embedding": lambda a: layer(a, 0),
        "after the last block": lambda a: layer(a, -2),
        "after the final norm": lambda a: layer(a, -1),
        "of the heads' weights": lambda a: _spread(group(a, "heads", "weight_cosine")),
        "of the heads' probabilities": lambda a: _spread(group(a, "heads", "probability_cosine")),
        "same decision": lambda a: _percent(number(group(a, "heads"), "agreement")),
    }
    return {"chart": chart, "table": _measures(runs, measures)} if chart else None


def classifiers(runs: list[Run]) -> dict[str, Any] | None:
    """Accuracy and calibration of heads, their sums and the teacher; reliability curves."""

    def top1(key: str) -> Measure:
        return lambda a: _percent(number(group(a, "accuracy"), key))

    def ece(*keys: str) -> Measure:
        return lambda a: _percent(number(group(a, *keys), "ece"))

    measures: dict[str, Measure] = {}
    for key, name in CLASSIFIERS.items():
        measures |= {f"{name}, top-1": top1(key), f"{name}, ECE": ece("calibration", key)}
    measures["teacher, top-1"] = lambda a: _percent(number(group(a, "teacher"), "top1"))
    measures["teacher, ECE"] = ece("teacher", "calibration")
    if not _analysed(runs):
        return None
    charts = [chart for run in _analysed(runs) if (chart := _reliability(run))]
    return {"table": _measures(runs, measures), "charts": charts}


def _reliability(run: Run) -> Chart | None:
    keys = {"class": "class", "distillation": "distillation", "sum_logits": "sum"}
    curves = {name: group(run.analysis, "calibration", key) for key, name in keys.items()}
    curves["teacher"] = group(run.analysis, "teacher", "calibration")
    lines = []
    for index, (name, curve) in enumerate(curves.items()):
        rows = [(number(r, "confidence"), number(r, "accuracy")) for r in objects(curve, "bins")]
        points = [(x, y) for x, y in rows if x is not None and y is not None]
        lines.append(Line(name, index, points))
    if not any(line.points for line in lines):
        return None
    lines.append(Line("ideal", None, [(0.0, 0.0), (1.0, 1.0)]))
    return draw(f"Accuracy by confidence: {run.name}", lines, "confidence", _short_percent, 0.0)


def disagreement(runs: list[Run]) -> list[dict[str, Any]]:
    """Share of different decisions for each pair of classifiers (DeiT, table 4)."""
    items = []
    for run in _analysed(runs):
        found = group(run.analysis, "disagreement")
        names, shares = found.get("names"), found.get("shares")
        if not isinstance(names, list) or not isinstance(shares, list):
            continue
        rows = []
        for name, row in zip(names, shares, strict=False):
            values = [number({"": v}, "") for v in row] if isinstance(row, list) else []
            shade = [None if v is None else min(max(v, 0.0), 1.0) for v in values]
            cells = [
                Cell(_decimal(v), number=True, share=s) for v, s in zip(values, shade, strict=True)
            ]
            rows.append([Cell(str(name)), *cells[: len(names)]])
        table = Table([Cell(""), *_numbers([str(name) for name in names])], rows, "shades")
        items.append({"run": _label(run), "table": table})
    return items


def teachers(runs: list[Run]) -> list[dict[str, Any]]:
    """Each teacher at several temperatures; equal ones once, with all their runs."""
    owners: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for run in _analysed(runs):
        found = group(run.analysis, "teacher")
        if objects(found, "temperatures"):
            owners.setdefault(repr(found), (found, []))[1].append(_label(run))
    return [_temperatures(found, labels) for found, labels in owners.values()]


def _temperatures(found: dict[str, Any], labels: list[Cell]) -> dict[str, Any]:
    rows, sample = objects(found, "temperatures"), group(found, "sample")
    masses = list(group(rows[0], "mass"))
    sample_rows = [objects(row, "classes") for row in objects(sample, "temperatures")]
    best = [str(item.get("name")) for item in (sample_rows or [[]])[0][:SAMPLE_CLASSES]]
    heads = ["entropy", *(f"top {k}" for k in masses), *(f"class {name}" for name in best)]
    cells = []
    for i, row in enumerate(rows):
        values = [number(row, "entropy"), *(number(group(row, "mass"), k) for k in masses)]
        classes = sample_rows[i][: len(best)] if i < len(sample_rows) else []
        values += [number(item, "probability") for item in classes]
        temperature = number(row, "temperature")
        first = DASH if temperature is None else f"{temperature:g}"
        cells.append([Cell(first), *_numbers([_decimal(value) for value in values])])
        cells[-1] += [Cell(DASH)] * (1 + len(heads) - len(cells[-1]))
    text = str(found.get("spec"))
    if best:
        text += f"; classes of image {sample.get('id')} (label {sample.get('label')})"
    table = Table([Cell("temperature"), *_numbers(heads)], cells)
    return {"runs": labels, "text": text, "table": table}


def attention(runs: list[Run]) -> list[dict[str, Any]]:
    """Strips of attention maps: of the last block, and through all blocks."""
    items = []
    for run in _analysed(runs):
        found = group(run.analysis, "attention")
        tiles = found.get("tiles")
        order = ", ".join(map(str, tiles)) if isinstance(tiles, list) else "image, maps"
        pictures = [
            Picture(
                f"image {row.get('id')}, label {row.get('label')}",
                f"{order} of image {row.get('id')}, {run.name}",
                png,
            )
            for row in objects(found, "samples")
            if (png := run.maps.get(str(row.get("picture")))) is not None
        ]
        if pictures:
            items.append({"run": _label(run), "order": order, "pictures": pictures})
    return items


def left_out(runs: list[Run]) -> list[dict[str, Any]]:
    """The parts of each analysis that are missing, by reason."""
    items = []
    for run in _analysed(runs):
        reasons: dict[str, list[str]] = {}
        for part, reason in group(run.analysis, "left_out").items():
            reasons.setdefault(str(reason), []).append(part)
        items += [
            {"run": _label(run), "text": f"{', '.join(parts)}: {reason}"}
            for reason, parts in reasons.items()
        ]
    return items


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
        [Cell(key, code=True), *(Cell(_setting(column.get(key))) for column in columns)]
        for key in keys
        if key != "output"
        and len({json.dumps(column.get(key, RETIRED.get(key))) for column in compared}) > 1
    ]
    configs = [{"name": run.name, "text": json.dumps(run.config, indent=2)} for run in runs]
    table = Table(_heads("setting", runs), rows, "text")
    return {"heading": heading, "table": table, "configs": configs}


def environment(runs: list[Run]) -> Table | None:
    """One column where all runs agree."""
    columns = [flatten(group(run.result, "environment")) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    heads = _heads("", runs)
    if all(column == columns[0] for column in columns):
        columns = columns[:1]
        heads = [Cell(""), Cell("all runs" if len(runs) > 1 else runs[0].name)]
    rows = [[Cell(key), *(Cell(_setting(column.get(key))) for column in columns)] for key in keys]
    return Table(heads, rows, "text") if rows else None


def commands(runs: list[Run]) -> list[dict[str, Any]]:
    found = [(run, run.result.get("command")) for run in runs]
    return [{"run": _label(run), "text": str(command)} for run, command in found if command]


SECTIONS: dict[str, Callable[[list[Run]], Any]] = {
    section.__name__: section
    for section in (
        lead, results, curves, per_class, throughput, tokens, classifiers, disagreement, teachers,
        attention, left_out, samples, settings, environment, commands,
    )
}  # fmt: skip
