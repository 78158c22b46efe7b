"""Section: what changed while a run went on; and the views that it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deit_fast.tools.report.charts import Line, line_chart
from deit_fast.tools.report.html import figure, picture, round_percent_text, short_text
from deit_fast.tools.report.runs import Run, number


def _points(run: Run, rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have both; the epoch is a fraction, from the step."""
    last = max(run.evaluations, key=lambda row: number(row, "step") or 0, default={})
    step, epoch = number(last, "step"), number(last, "epoch")
    scale = epoch / step if step and epoch else None
    points = []
    for row in rows:
        value, at = number(row, key), number(row, "step")
        x = at * scale if at is not None and scale is not None else number(row, "epoch")
        if x is not None and value is not None:
            points.append((x, value))
    return sorted(points)


SMOOTH_SHARE = 20  # a training curve is averaged over this part of its points


def smooth(points: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Centred mean over an odd number of neighbours, fewer near the ends; and that number.

    Curves of fewer than 2 * SMOOTH_SHARE points stay as they are.
    """
    half = len(points) // SMOOTH_SHARE // 2
    if half == 0:
        return points, 1
    smoothed = []
    for place, (x, _) in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)  # symmetric, so that no slope is bent
        window = points[place - reach : place + reach + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed, 2 * half + 1


def _figure(
    runs: list[Run],
    key: str,
    caption: str,
    show: Callable[[float], str],
    *,
    training: bool = False,
    floor: float | None = None,
) -> str:
    lines = [
        Line(run.name, index, _points(run, run.train if training else run.evaluations, key))
        for index, run in enumerate(runs)
    ]
    if not any(line.points for line in lines):
        return ""

    def draw(lines: list[Line], title: str) -> str:
        chart = line_chart(lines, title=title, x_name="epoch", show=show, floor=floor)
        return f'<div class="scroll">{chart}</div>'

    if not training:
        return figure(caption, draw(lines, caption))
    smoothed = [smooth(line.points) for line in lines]
    width = max(width for _, width in smoothed)
    if width == 1:
        return figure(caption, draw(lines, caption))
    means = [Line(li.name, li.index, p) for li, (p, _) in zip(lines, smoothed, strict=True)]
    title = f"{caption}, mean of {width} neighbouring values"
    logged = f"{caption}, as logged"
    raw = f"<details><summary>As logged</summary>{draw(lines, logged)}</details>"
    return figure(title, draw(means, title) + raw)


def curves(runs: list[Run]) -> str:
    figures = (
        _figure(runs, "top1", "Top-1 accuracy on held-out images", round_percent_text),
        _figure(runs, "ema_top1", "Top-1 accuracy of the averaged weights", round_percent_text),
        _figure(runs, "loss", "Cross-entropy on held-out images", short_text),
        _figure(runs, "loss", "Training loss", short_text, training=True),
    )
    found = "".join(figures)
    return f'<div class="charts">{found}</div>' if found else ""


def throughput(runs: list[Run]) -> str:
    figures = (
        _figure(runs, "images_per_s", "Images per second", short_text, training=True, floor=0.0),
        _figure(
            runs, "data_wait", "Share of time spent waiting for images", round_percent_text,
            training=True, floor=0.0,
        ),
    )  # fmt: skip
    found = "".join(figures)
    return f'<div class="charts">{found}</div>' if found else ""


def samples(runs: list[Run]) -> str:
    """Each distinct picture once, under the names of the runs that share it."""
    owners: dict[bytes, list[str]] = {}
    for run in runs:
        if run.samples is not None:
            owners.setdefault(run.samples, []).append(run.name)
    figures = [
        figure(", ".join(names), picture(image, f"first views of {', '.join(names)}"))
        for image, names in owners.items()
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""
