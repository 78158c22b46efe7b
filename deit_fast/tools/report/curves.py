"""Charts over the epochs: accuracy, losses, learning rate, gradient, agreement, speed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deit_fast.tools.report.charts import (
    Chart,
    Points,
    Show,
    line_chart,
    short,
    short_percent,
    smooth,
)  # fmt: skip
from deit_fast.tools.report.groups import Group, group_lines
from deit_fast.tools.report.parts import number
from deit_fast.tools.run_folder import Run


def curves(groups: list[Group]) -> list[Chart]:
    charts = [
        _curve(groups, "top1", "Top-1 accuracy, held-out images", short_percent, best=True),
        _curve(groups, "top5", "Top-5 accuracy, held-out images", short_percent),
        _curve(groups, "ema_top1", "Top-1 accuracy of the averaged weights (EMA)", short_percent),
        _curve(groups, "loss", "Cross-entropy, held-out images", short),
        *_losses(groups),
        _training_curve(groups, "agreement", "Teacher-student agreement, training views",
                        short_percent),
        _training_curve(groups, "lr", "Learning rate", short, 0.0, is_smooth=False),
        _training_curve(groups, "grad_norm", "Gradient norm", short, 0.0),
    ]  # fmt: skip
    return [chart for chart in charts if chart]


def throughput(groups: list[Group]) -> list[Chart]:
    charts = [
        _training_curve(groups, "images_per_s", "Images per second", short, 0.0),
        _training_curve(groups, "data_wait", "Share of time spent waiting for images",
                        short_percent, 0.0),
    ]  # fmt: skip
    return [chart for chart in charts if chart]


# ---------------------------------------------------------------------------------------------
# Losses: only those of one formula share an axis
# ---------------------------------------------------------------------------------------------


def _losses(groups: list[Group]) -> list[Chart | None]:
    """Both parts of the training loss; where the log has no parts, the whole loss."""
    families: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        rows = [row for run in group.runs for row in run.train]
        loss = group.runs[0].config["loss"]
        if not any("base_loss" in row for row in rows):
            families.setdefault(("loss", _whole(loss)), []).append(group)
            continue
        families.setdefault(("base_loss", _base(loss)), []).append(group)
        if loss["kind"] != "none":
            families.setdefault(("distill_loss", _distillation(loss)), []).append(group)
    return [_training_curve(members, key, title, short) for (key, title), members
            in sorted(families.items())]  # fmt: skip


def _base(loss: dict[str, Any]) -> str:
    name = {"ce": "cross-entropy", "bce": "binary cross-entropy"}.get(
        str(loss.get("base", "ce")), "loss"
    )
    smoothing = loss.get("smoothing", 0.0)
    return f"Training loss against labels ({name}, smoothing {smoothing:g})"


def _distillation(loss: dict[str, Any]) -> str:
    if loss["kind"] == "hard":
        return "Distillation loss (hard: cross-entropy with the teacher's class)"
    tau, reduction = loss.get("tau", 1.0), loss.get("reduction", "numel")
    return f"Distillation loss ({loss['kind']}: KL divergence, tau {tau:g}, {reduction})"


def _whole(loss: dict[str, Any]) -> str:
    kind = loss["kind"]
    return "Training loss" if kind == "none" else f"Training loss ({kind} distillation)"


# ---------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------


def _curve(
    groups: list[Group], key: str, caption: str, show: Show, best: bool = False
) -> Chart | None:
    lines = group_lines(groups, lambda run: _points(run, run.evaluations, key))
    return line_chart(caption, lines, "epoch", show, best=best, last=True)


def _training_curve(
    groups: list[Group], key: str, caption: str, show: Show, floor: float | None = None,
    is_smooth: bool = True,
) -> Chart | None:  # fmt: skip
    """The smoothed curve; a single run's also as it was logged, faint."""
    logged = group_lines(groups, lambda run: _points(run, run.train, key))
    if not is_smooth:
        return line_chart(caption, logged, "epoch", show, floor, last=True)
    width, lines = 1, []
    for line in logged:
        means, own = smooth(line.points)
        width = max(width, own)
        band = line.band and (smooth(line.band[0])[0], smooth(line.band[1])[0])
        faint = line.points if own > 1 and band is None else None
        lines.append(replace(line, points=means, band=band, faint=faint))
    title = caption if width == 1 else f"{caption}, mean of {width} neighbours"
    return line_chart(title, lines, "epoch", show, floor, last=True)


def _points(run: Run, rows: Sequence[dict[str, Any]], key: str) -> Points:
    """(epoch, value) of the rows that have both; the step gives fractions of an epoch."""
    found = [(number(row, "epoch"), number(row, "step")) for row in run.evaluations]
    ends = {epoch: step for epoch, step in found if epoch and step}
    points = []
    for row in rows:
        value, step = number(row, key), number(row, "step")
        x = _epoch_at(step, ends) if step is not None and ends else number(row, "epoch")
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
