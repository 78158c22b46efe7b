"""Line charts by matplotlib, as SVG inside a page.

matplotlib is imported when a chart is drawn: the import takes most of a second.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

# Okabe and Ito's colours, which colour-blind readers can tell apart; with a darker yellow
COLOURS = ("#0072b2", "#d55e00", "#008a63", "#b5558f", "#b07800", "#2b95cf", "#5b4db7", "#444b53")
TEXT_COLOUR, RULE_COLOUR = "#5b6570", "#d9dee3"
# A page redefines these custom properties for its dark theme.
PROPERTIES = {f"--c{index}": colour for index, colour in enumerate(COLOURS)} | {
    "--dim": TEXT_COLOUR,
    "--rule": RULE_COLOUR,
}
DASHES = ("", "7 3", "2 2.5", "10 3 2 3")  # of the lines 0 to 7, 8 to 15, ...
MAX_POINTS = 240  # of a line; a screen cannot show more
MAX_DOTS = 40  # of a line: points with a hover title, most of a chart's bytes
SMOOTH_SHARE = 20  # a training curve is averaged over this fraction of its points: 1/20


Show = Callable[[float], str]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        index: position among all runs, which decides the colour; None: a grey reference line.
        points: (x, y), ascending in x.
        band: the least and the largest values where ``points`` are means; None: no band.
        faint: the values before they were smoothed; drawn behind the line.
    """

    name: str
    index: int | None
    points: Points
    band: tuple[Points, Points] | None = None
    faint: Points | None = None

    @property
    def colour(self) -> str:
        return TEXT_COLOUR if self.index is None else COLOURS[self.index % len(COLOURS)]


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        legend: of phones too, which have no hover titles.
    """

    caption: str
    svg: str
    legend: list[Key]


@dataclass(frozen=True)
class Key:
    """A line of the legend."""

    name: str
    index: int | None
    note: str


def short_percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def short(value: float) -> str:
    return f"{value:.4g}"


def dash(index: int | None) -> str:
    """Lengths of a line's dashes and gaps, pixels; empty for a solid line."""
    return DASHES[1] if index is None else DASHES[index // len(COLOURS) % len(DASHES)]


def line_chart(
    caption: str, lines: list[Line], x_name: str, show: Show, floor: float | None = None,
    best: bool = False, last: bool = False,
) -> Chart | None:  # fmt: skip
    """A chart as an SVG element without identifiers, so that a page can hold many.

    Args:
        caption: what the vertical axis shows, also for readers who cannot see it.
        lines: those without points are left out; without any line there is no chart.
        x_name: name of the horizontal axis.
        show: formats a value for ticks and hover titles.
        floor: a value that the vertical axis includes; None: the axis fits the data.
        best: mark the largest value of each line and name it in the legend.
        last: name the last value of each line in the legend.
    """
    lines = [_thin_line(line) for line in lines if line.points]
    if not lines:
        return None
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none", "font.size": 11, "axes.edgecolor": TEXT_COLOUR,
        "text.color": TEXT_COLOUR, "axes.labelcolor": TEXT_COLOUR, "xtick.color": TEXT_COLOUR,
        "ytick.color": TEXT_COLOUR, "grid.color": RULE_COLOUR, "xtick.major.size": 0,
        "ytick.major.size": 0, "xtick.major.pad": 6, "lines.linewidth": 2,
        "lines.scale_dashes": False, "lines.solid_joinstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.0, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            dashes = tuple(float(part) for part in dash(line.index).split())
            if line.band is not None:
                low, high = line.band
                outline = zip(*low, *reversed(high), strict=True)
                axes.fill(*outline, color=line.colour, alpha=0.16, linewidth=0)
            if line.faint is not None:
                axes.plot(*zip(*line.faint, strict=True), color=line.colour, alpha=0.3, linewidth=1)
            axes.plot(
                *zip(*line.points, strict=True), gid=f"line-{number}", color=line.colour,
                marker="o", clip_on=False, linestyle=(0, dashes) if dashes else "-",
            )  # fmt: skip
        first, end = map(float, axes.dataLim.intervalx)
        least, most = map(float, axes.dataLim.intervaly)
        least = least if floor is None else min(least, floor)
        margin = max(abs(least), abs(most)) / 10
        if most - least <= margin / 100:  # one value: ticks would repeat
            least, most = least - margin, most + (margin or 1.0)
        y_ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        rounded = y_ticks.tick_values(least, most)
        axes.set_ylim(rounded[0], rounded[-1])
        if first < end:
            axes.set_xlim(first, end)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_name)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(y_ticks)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(lambda y, _: show(y))
        content = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(content.getvalue())
    legend = []
    for number, line in enumerate(lines):
        titles = [f"{line.name}: {show(y)} at {x_name} {x:.4g}" for x, y in line.points]
        top = max(range(len(titles)), key=[y for _, y in line.points].__getitem__) if best else -1
        _add_titles(root, f"line-{number}", line.colour, titles, top)
        note = show(line.points[-1][1]) if last else ""
        if best and top < len(titles) - 1:
            note += f", best {show(line.points[top][1])} at {x_name} {line.points[top][0]:.4g}"
        legend.append(Key(line.name, line.index, note))
    return Chart(caption, _inline(root, caption), legend)


def _thin_line(line: Line) -> Line:
    band = line.band and (thin(line.band[0]), thin(line.band[1]))
    return Line(line.name, line.index, thin(line.points), band, line.faint and thin(line.faint))


def _add_titles(
    root: ElementTree.Element, gid: str, colour: str, titles: list[str], best: int
) -> None:
    """Turn some markers of a line into circles with hover titles; the style sheet hides most."""
    group = next(element for element in root.iter() if element.get("id") == gid)
    markers = [element for element in group.iter() if element.tag.endswith("}use")]
    every = math.ceil(len(markers) / MAX_DOTS)
    for position, (marker, title) in enumerate(zip(markers, titles, strict=True)):
        if position % every and position not in (best, len(markers) - 1):
            continue  # ``_inline`` removes it
        across, down = marker.attrib["x"], marker.attrib["y"]
        marker.clear()
        marker.tag = "circle"
        marker.attrib = {"class": "dot", "cx": across, "cy": down, "r": "4", "fill": colour}
        ElementTree.SubElement(marker, "title").text = title
        if position == best:
            marker.set("class", "dot best")
    markers[-1].set("class", "dot last")


def _inline(root: ElementTree.Element, title: str) -> str:
    """matplotlib's SVG as part of a page: no namespaces, identifiers, fonts or fixed colours."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}defs", "}use", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in ("id", "clip-path"):
            element.attrib.pop(name, None)
        if "style" in element.attrib:
            element.set("style", re.sub(r"font-family: [^;]*;? ?", "", element.attrib["style"]))
        for name in {"d", "x", "y", "cx", "cy"}.intersection(element.attrib):  # tenths suffice
            element.set(name, re.sub(r"(\.\d)\d+", r"\1", element.attrib[name]))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in PROPERTIES.items():
        text = re.sub(rf'(?<=[ "]){colour}(?=[;"])', f"var({name})", text)
    return re.sub(r"\s*\n\s*", " ", text)


# ---------------------------------------------------------------------------------------------
# Points
# ---------------------------------------------------------------------------------------------


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of its neighbours; the last one is kept."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [*((fmean(x for x, _ in g), fmean(y for _, y in g)) for g in groups), points[-1]]


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
        smoothed.append((x, fmean(y for _, y in window)))
    return smoothed, 2 * reach + 1
