"""The data of the sections that show an analysis: tokens, calibration, teacher, attention.

Each function gets the runs that `deit-fast analyze` has measured.
"""

from __future__ import annotations

from typing import Any

from deit_fast.tools.analysis import table
from deit_fast.tools.charts import Line
from deit_fast.tools.report.sections import (
    Chart,
    Picture,
    Table,
    draw,
    shade,
    short,
    short_percent,
)  # fmt: skip
from deit_fast.tools.run_folder import Run

CURVES = {"class": "class", "distillation": "distillation", "sum_logits": "sum"}


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
    chart = draw(caption, lines, "block (0: input)", short)
    return {"chart": chart, "table": _figures(runs, table.TOKEN_FIGURES)} if chart else None


def classifiers(runs: list[Run]) -> dict[str, Any] | None:
    """Accuracy and calibration of heads, their sums and the teacher; reliability curves."""
    if not runs:
        return None
    charts = [_reliability(run) for run in runs]
    return {"table": _figures(runs, table.CLASSIFIER_FIGURES), "charts": charts}


def _reliability(run: Run) -> Chart | None:
    keys = {name: f"calibration.{key}.bins" for key, name in CURVES.items()}
    keys["teacher"] = "teacher.calibration.bins"
    lines = []
    for index, (name, key) in enumerate(keys.items()):
        bins = table.look_up(run.analysis, key) or []
        lines.append(Line(name, index, [(row["confidence"], row["accuracy"]) for row in bins]))
    lines.append(Line("ideal", None, [(0.0, 0.0), (1.0, 1.0)]))
    return draw(f"Accuracy by confidence: {run.name}", lines, "confidence", short_percent, 0.0)


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
        items.append(
            {
                "runs": owners,
                "title": title,
                "table": Table(head, rows, "numbers"),
                "chart": chart,
            }
        )
    return items


def _temperature_chart(rows: list[dict[str, Any]]) -> Chart | None:
    keys = {"entropy / log C": "uniform_share"}
    keys |= {f"probability of the top {k}": f"mass.{k}" for k in rows[0]["mass"]}
    lines = [
        Line(name, index, [(row["temperature"], table.look_up(row, key)) for row in rows])
        for index, (name, key) in enumerate(keys.items())
    ]
    caption = "Entropy and probability by temperature"
    return draw(caption, lines, "temperature", short_percent, 0.0)


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
