"""The data of the sections that show an analysis: tokens, calibration, teacher, attention."""

from __future__ import annotations

from typing import Any

from deit_fast.tools.charts import Line
from deit_fast.tools.report.sections import (
    DASH,
    Cell,
    Chart,
    Picture,
    Table,
    decimal,
    draw,
    heads,
    label,
    numbers,
    percent,
    short,
    short_percent,
)
from deit_fast.tools.run_folder import Run, flatten, group, number, objects

CLASSIFIERS = {
    "class": "class head",
    "distillation": "distillation head",
    "sum_logits": "sum of logits",
    "sum_softmax": "sum of softmax",
}
CURVES = {"class": "class", "distillation": "distillation", "sum_logits": "sum"}
SAMPLE_CLASSES = 3  # columns for the classes of one image
Items = list[dict[str, Any]]


def analysed(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.analysis]


def _table(runs: list[Run], texts: dict[str, list[str]]) -> Table:
    """A row for each value that some run has, a column for each run."""
    rows = [[Cell(name), *numbers(row)] for name, row in texts.items() if set(row) != {DASH}]
    return Table(heads("", runs, numeric=True), rows)


def _spread(values: dict[str, Any], key: str) -> str:
    mean, std = number(values, f"{key}.mean"), number(values, f"{key}.std")
    return DASH if mean is None or std is None else f"{mean:.3f} \u00b1 {std:.3f}"


def tokens(runs: list[Run]) -> dict[str, Any] | None:
    """Cosine of the two tokens by layer, and similarity of the heads."""
    shown = analysed(runs)
    layers = [objects(run.analysis, "tokens.layers") for run in shown]
    lines = []
    for run, rows in zip(shown, layers, strict=True):
        means = [(float(x), number(row, "mean")) for x, row in enumerate(rows[:-1])]  # no norm
        lines.append(Line(run.name, run.index, [(x, y) for x, y in means if y is not None]))
    caption = "Cosine of class and distillation token after each block"
    chart = draw(caption, lines, "block (0: input)", short)
    if chart is None:
        return None

    def layer(index: int) -> list[str]:
        return [_spread(flatten(rows[index], "at"), "at") if len(rows) > 2 else DASH
                for rows in layers]  # fmt: skip

    table = {
        "cosine of the learned tokens": [
            decimal(number(r.analysis, "tokens.learned")) for r in shown
        ],
        "with position embedding": layer(0),
        "after the last block": layer(-2),
        "after the final norm": layer(-1),
        "of the heads' weights": [_spread(r.analysis, "heads.weight_cosine") for r in shown],
        "of the heads' probabilities": [
            _spread(r.analysis, "heads.probability_cosine") for r in shown
        ],
        "same decision": [percent(number(r.analysis, "heads.agreement")) for r in shown],
    }
    return {"chart": chart, "table": _table(shown, table)}


def classifiers(runs: list[Run]) -> dict[str, Any] | None:
    """Accuracy and calibration of heads, their sums and the teacher; reliability curves."""
    shown = analysed(runs)
    keys: dict[str, str] = {}
    for key, name in CLASSIFIERS.items():
        keys |= {f"{name}, top-1": f"accuracy.{key}", f"{name}, ECE": f"calibration.{key}.ece"}
    keys |= {"teacher, top-1": "teacher.top1", "teacher, ECE": "teacher.calibration.ece"}
    texts = {name: [percent(number(r.analysis, key)) for r in shown] for name, key in keys.items()}
    charts = [chart for run in shown if (chart := _reliability(run))]
    return {"table": _table(shown, texts), "charts": charts} if shown else None


def _reliability(run: Run) -> Chart | None:
    keys = {name: f"calibration.{key}.bins" for key, name in CURVES.items()}
    keys["teacher"] = "teacher.calibration.bins"
    lines = []
    for index, (name, key) in enumerate(keys.items()):
        bins = objects(run.analysis, key)
        points = [(number(row, "confidence"), number(row, "accuracy")) for row in bins]
        whole = [(x, y) for x, y in points if x is not None and y is not None]
        lines.append(Line(name, index, whole))
    if not any(line.points for line in lines):
        return None
    lines.append(Line("ideal", None, [(0.0, 0.0), (1.0, 1.0)]))
    return draw(f"Accuracy by confidence: {run.name}", lines, "confidence", short_percent, 0.0)


def disagreement(runs: list[Run]) -> Items:
    """Share of different decisions for each pair of classifiers (DeiT, table 4)."""

    def cell(value: Any) -> Cell:
        share = number({"share": value}, "share")
        shade = None if share is None else min(max(share, 0.0), 1.0)
        return Cell(decimal(share), number=True, share=shade)

    items = []
    for run in analysed(runs):
        found = group(run.analysis, "disagreement")
        names, shares = found.get("names"), found.get("shares")
        if isinstance(names, list) and isinstance(shares, list):
            rows = [
                [Cell(str(name)), *map(cell, row[: len(names)])]
                for name, row in zip(names, shares, strict=False)
                if isinstance(row, list)
            ]
            table = Table([Cell(""), *numbers(map(str, names))], rows, "shades")
            items.append({"run": label(run), "table": table})
    return items


def teachers(runs: list[Run]) -> Items:
    """Each teacher at several temperatures; equal ones once, with all their runs."""
    owners: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for run in analysed(runs):
        found = group(run.analysis, "teacher")
        if objects(found, "temperatures"):
            owners.setdefault(repr(found), (found, []))[1].append(label(run))
    return [{"runs": labels, **_temperatures(found)} for found, labels in owners.values()]


def _temperatures(found: dict[str, Any]) -> dict[str, Any]:
    rows = [flatten(row) for row in objects(found, "temperatures")]
    masses = list(group(rows[0], "mass"))
    samples = [objects(row, "classes") for row in objects(found, "sample.temperatures")]
    best = [str(item.get("name")) for item in (samples or [[]])[0][:SAMPLE_CLASSES]]
    names = ["entropy", *(f"top {k}" for k in masses), *(f"class {name}" for name in best)]
    cells = []
    for i, row in enumerate(rows):
        classes = samples[i] if i < len(samples) else []
        values = [number(row, "entropy"), *(number(row, f"mass.{k}") for k in masses)]
        values += [number(item, "probability") for item in (*classes, {}, {}, {})[: len(best)]]
        temperature = number(row, "temperature")
        first = DASH if temperature is None else f"{temperature:g}"
        cells.append([Cell(first), *numbers(map(decimal, values))])
    text = str(found.get("spec"))
    if best:
        text += f"; classes of image {found.get('sample.id')} (label {found.get('sample.label')})"
    return {"text": text, "table": Table([Cell("temperature"), *numbers(names)], cells)}


def attention(runs: list[Run]) -> Items:
    """Strips of attention maps: of the last block, and through all blocks."""
    items = []
    for run in analysed(runs):
        tiles = run.analysis.get("attention.tiles")
        order = ", ".join(map(str, tiles)) if isinstance(tiles, list) else "image, maps"
        pictures = [
            Picture(
                f"image {row.get('id')}, label {row.get('label')}",
                f"{order} of image {row.get('id')}, {run.name}",
                png,
            )
            for row in objects(run.analysis, "attention.samples")
            if (png := run.maps.get(str(row.get("picture")))) is not None
        ]
        if pictures:
            items.append({"run": label(run), "order": order, "pictures": pictures})
    return items


def left_out(runs: list[Run]) -> Items:
    """The parts of each analysis that are missing, by reason."""
    items = []
    for run in analysed(runs):
        reasons: dict[str, list[str]] = {}
        for part, reason in group(run.analysis, "left_out").items():
            reasons.setdefault(str(reason), []).append(part)
        items += [
            {"run": label(run), "text": f"{', '.join(parts)}: {reason}"}
            for reason, parts in reasons.items()
        ]
    return items
