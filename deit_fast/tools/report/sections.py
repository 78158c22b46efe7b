"""The report's sections about views, analysis, settings and environment.

The sections of an analysis get only the groups with runs that `deit-fast analyze` has measured;
runs of one group are shown by their means.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from deit_fast.config import RunConfig
from deit_fast.config_file import RETIRED, by_dotted_key, dotted_keys, to_dict
from deit_fast.tools.analysis import table
from deit_fast.tools.analysis.table import DASH
from deit_fast.tools.report.charts import Chart, Line, line_chart, short, short_percent
from deit_fast.tools.report.groups import Group, average, group_lines
from deit_fast.tools.report.parts import DARKEST, Picture, Table, shade
from deit_fast.tools.run_folder import Run

RELIABILITY_CURVES = {"class": "class", "distillation": "distillation", "mean_logits": "mean"}
FEWEST = 10  # images of a bin of a reliability curve that is drawn


def samples(groups: list[Group]) -> list[Picture]:
    """Each distinct picture once, with the names of the runs that share it."""
    owners: dict[bytes, list[str]] = {}
    for run in _runs(groups):
        if run.samples is not None:
            owners.setdefault(run.samples, []).append(run.name)
    named = [(", ".join(names), png) for png, names in owners.items()]
    return [Picture(names, f"first views of {names}", _text(png)) for names, png in named]


def _runs(groups: list[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


# ---------------------------------------------------------------------------------------------
# Analysis: tokens, calibration, teacher, attention
# ---------------------------------------------------------------------------------------------


def _figures(groups: list[Group], figures: list[table.Figure]) -> Table:
    means = [average([run.analysis for run in group.runs]) for group in groups]
    return Table(["", *groups], table.compare(means, figures), "numbers")


def tokens(groups: list[Group]) -> dict[str, Any] | None:
    """Cosine of the two tokens by layer, and similarity of the heads."""

    def points(run: Run) -> list[tuple[float, float]]:
        layers = table.look_up(run.analysis, "tokens.layers") or []
        return [(float(x), layer["mean"]) for x, layer in enumerate(layers[:-1])]  # no norm

    caption = "Cosine of class and distillation token after each block"
    chart = line_chart(caption, group_lines(groups, points), "block (0: input)", short)
    return {"chart": chart, "table": _figures(groups, table.TOKEN_FIGURES)} if chart else None


def classifiers(groups: list[Group]) -> dict[str, Any] | None:
    """Accuracy and calibration of heads, their means and the teacher; reliability curves."""
    if not groups:
        return None
    charts = [chart for group in groups if (chart := _reliability(group))]
    return {"table": _figures(groups, table.CLASSIFIER_FIGURES), "charts": charts}


def _reliability(group: Group) -> Chart | None:
    """The curves of the group's runs together, without bins of few images."""
    keys = {name: f"calibration.{key}.bins" for key, name in RELIABILITY_CURVES.items()}
    keys["teacher"] = "teacher.calibration.bins"
    lines = []
    for index, (name, key) in enumerate(keys.items()):
        bins: dict[float, tuple[float, float, float]] = {}  # images, confidence, accuracy: sums
        for run in group.runs:
            for row in table.look_up(run.analysis, key) or []:
                n, sure, right = bins.get(row["low"], (0.0, 0.0, 0.0))
                own = float(row["count"])
                sure, right = sure + own * row["confidence"], right + own * row["accuracy"]
                bins[row["low"]] = (n + own, sure, right)
        points = [(sure / n, right / n) for _, (n, sure, right) in sorted(bins.items())
                  if n >= FEWEST]  # fmt: skip
        lines.append(Line(name, index, points))
    lines.append(Line("ideal", None, [(0.0, 0.0), (1.0, 1.0)]))
    return line_chart(
        f"Accuracy by confidence: {group.name}", lines, "confidence", short_percent, 0.0
    )


def agreement(groups: list[Group]) -> list[tuple[Group, Table]]:
    """Percentage of equal decisions for each pair of classifiers; DeiT's table 4 counts the others.

    The fourth power of a share decides its colour: most shares are close to 1.
    """
    items = []
    for group in groups:
        found = average([run.analysis["disagreement"] for run in group.runs])
        head, shares = found["names"], found["shares"]
        rows = [
            [
                name,
                *(shade(f"{100 * (1 - share):.1f}", DARKEST * (1 - share) ** 4) for share in row),
            ]
            for name, row in zip(head, shares, strict=True)
        ]
        items.append((group, Table(["", *head], rows, "numbers shades")))
    return items


def teachers(groups: list[Group]) -> list[dict[str, Any]]:
    """Each teacher at several temperatures; of those with one name, a seed each, the first."""
    runs = _runs(groups)
    by_name: dict[str, dict[str, Any]] = {}
    for teacher, owners in table.teachers([run.analysis for run in runs], runs):
        name = str(teacher["spec"]).partition("@")[0]
        if name in by_name:
            by_name[name]["others"] += owners
            continue
        title, head, rows = table.temperatures(teacher)
        chart = _temperature_chart(teacher["temperatures"])
        values = Table(head, rows, "numbers")
        by_name[name] = {
            "runs": owners, "others": [], "title": title, "table": values, "chart": chart
        }  # fmt: skip
    return list(by_name.values())


def _temperature_chart(rows: list[dict[str, Any]]) -> Chart | None:
    keys = {"entropy / log C": "uniform_share"}
    keys |= {f"probability of the top {k}": f"mass.{k}" for k in rows[0]["mass"]}
    lines = [
        Line(name, index, [(row["temperature"], table.look_up(row, key)) for row in rows])
        for index, (name, key) in enumerate(keys.items())
    ]
    caption = "Entropy and probability by temperature"
    return line_chart(caption, lines, "temperature", short_percent, 0.0)


def attention(groups: list[Group]) -> list[dict[str, Any]]:
    """Strips of attention maps of each group's first run: last block, and through all blocks."""
    items = []
    for group in groups:
        run = group.runs[0]
        samples = table.look_up(run.analysis, "attention.samples")
        if not samples:
            continue
        order = ", ".join(run.analysis["attention"]["tiles"])
        pictures = [
            Picture(
                f"image {row['id']}, label {row['label']}",
                f"{order} of image {row['id']}, {run.name}",
                _text(run.maps[row["picture"]]),
            )
            for row in samples
        ]
        items.append({"run": run, "order": order, "pictures": pictures})
    return items


def left_out(groups: list[Group]) -> list[tuple[Run, str]]:
    """The parts of each analysis that are missing, by reason."""
    return [(run, text) for run in _runs(groups) for text in table.left_out(run.analysis)]


# ---------------------------------------------------------------------------------------------
# Settings, environment, commands
# ---------------------------------------------------------------------------------------------


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return DASH if value is None else str(value)


def settings(groups: list[Group]) -> dict[str, Any]:
    """Settings that differ between the groups; those of one group that differ from the defaults."""
    heading = "Settings that differ between the runs"
    columns = [by_dotted_key(group.runs[0].config) for group in groups]
    compared = columns
    if len(groups) == 1:
        heading = "Settings that differ from the defaults"
        defaults = json.loads(json.dumps(to_dict(RunConfig())))  # tuples to lists, as in the file
        compared = [*columns, by_dotted_key(defaults)]
    keys = dict.fromkeys([*dotted_keys(), *(key for column in columns for key in column)])
    rows = [
        [key, *(_settings_of(group, key) for group in groups)]
        for key in keys
        if key != "output"
        and len({json.dumps(column.get(key, RETIRED.get(key))) for column in compared}) > 1
    ]
    configs = [(group.runs[0].name, json.dumps(group.runs[0].config, indent=2)) for group in groups]
    return {"heading": heading, "table": Table(["setting", *groups], rows, "text code"),
            "configs": configs}  # fmt: skip


def _settings_of(group: Group, key: str) -> str:
    """The value of a setting, or those of the runs of a group."""
    values = [_setting(by_dotted_key(run.config).get(key)) for run in group.runs]
    return "; ".join(dict.fromkeys(values))


def environment(groups: list[Group]) -> Table | None:
    """One column where all runs agree."""
    runs = _runs(groups)
    columns = [run.result.get("environment") or {} for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    head: list[Any] = ["", *runs]
    if len(runs) > 1 and all(column == columns[0] for column in columns):
        head, columns = ["", "all runs"], columns[:1]
    rows = [[key, *(column.get(key, DASH) for column in columns)] for key in keys]
    return Table(head, rows, "text") if rows else None


def commands(groups: list[Group]) -> list[tuple[list[Run], str]]:
    """Each distinct command with the runs that it started."""
    owners: dict[str, list[Run]] = {}
    for run in _runs(groups):
        if command := run.result.get("command"):
            owners.setdefault(str(command), []).append(run)
    return [(runs, command) for command, runs in owners.items()]
