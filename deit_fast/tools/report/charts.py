"""Line charts as inline SVG: direct labels, hover titles, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 600, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 118, 14, 44  # margins; the right one holds the lines' names
LABEL_GAP = 15  # least distance of two names, in units of the view box
MAX_POINTS = 240  # points of a line; more are averaged, a screen shows no more
COLOURS = 8  # --c0 .. --c7 in the style sheet; later lines repeat them with another dash
DASHES = ("", "7 4", "2 4", "10 3 2 3")


@dataclass(frozen=True)
class Line:
    """One line: its name, its place among all runs (decides its colour), its points."""

    name: str
    index: int
    points: list[tuple[float, float]]


def line_chart(
    lines: list[Line], *, title: str, x_name: str, show: Callable[[float], str], floor: float | None
) -> str:
    """An SVG element.

    Args:
        lines: those without points are left out.
        title: what the vertical axis shows, for readers who cannot see it.
        x_name: name of the horizontal axis.
        show: a value as text, for ticks and hover titles.
        floor: a value that the vertical axis includes, or None to fit the data.
    """
    lines = [Line(li.name, li.index, thin(li.points)) for li in lines if li.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([] if floor is None else [floor])
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_axes(x_ticks, y_ticks, place, x_name, show, (x_low, y_low)),
    ]
    ends = spread([place(*line.points[-1])[1] for line in lines])
    parts += [_path(line, place) for line in lines]
    parts += [_dots(line, place, x_name, show) for line in lines]
    parts += [_name(line, end) for line, end in zip(lines, ends, strict=True)]
    return "".join([*parts, "</svg>"])


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours; the last stays as it is."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means, points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values, about ``count`` of them, that enclose [low, high]."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    unit = 10 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def spread(heights: list[float]) -> list[float]:
    """Heights moved apart until names at them do not overlap; order is kept."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = [0.0] * len(heights)
    below = TOP - LABEL_GAP / 2
    for i in order:
        below = placed[i] = max(heights[i], below + LABEL_GAP)
    limit = float(HEIGHT - BOTTOM + LABEL_GAP / 2)
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - LABEL_GAP
    return placed


Place = Callable[[float, float], tuple[float, float]]


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    place: Place,
    x_name: str,
    show: Callable[[float], str],
    origin: tuple[float, float],
) -> list[str]:
    parts = []
    right = WIDTH - RIGHT
    for tick in y_ticks:
        y = place(origin[0], tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(show(tick))}</text>"
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        x = place(tick, origin[1])[0]
        if not LEFT - 0.5 <= x <= right + 0.5:
            continue
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (LEFT + right) / 2
    parts.append(
        f'<text class="tick" x="{middle:.0f}" y="{base + 37}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )
    return parts


def _stroke(index: int) -> str:
    dash = DASHES[index // COLOURS % len(DASHES)]
    return f'style="--c:var(--c{index % COLOURS})"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _path(line: Line, place: Place) -> str:
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
    return f'<polyline class="line" {_stroke(line.index)} points="{steps}"/>'


def _dots(line: Line, place: Place, x_name: str, show: Callable[[float], str]) -> str:
    dots = []
    for number, (x, y) in enumerate(line.points):
        across, down = place(x, y)
        kind = "dot last" if number == len(line.points) - 1 else "dot"
        title = escape(f"{line.name}: {show(y)} at {x_name} {x:.4g}")
        dots.append(
            f'<circle class="{kind}" cx="{across:.1f}" cy="{down:.1f}" r="4">'
            f"<title>{title}</title></circle>"
        )
    return f'<g style="--c:var(--c{line.index % COLOURS})">{"".join(dots)}</g>'


def _name(line: Line, height: float) -> str:
    x = WIDTH - RIGHT + 12
    text = line.name if len(line.name) <= 15 else f"…{line.name[-14:]}"
    return (
        f'<text class="name" style="--c:var(--c{line.index % COLOURS})" x="{x}" '
        f'y="{height + 4:.1f}">{escape(text)}<title>{escape(line.name)}</title></text>'
    )
