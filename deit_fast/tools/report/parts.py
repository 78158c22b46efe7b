"""What the report's sections are made of: tables, pictures, numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from deit_fast.tools.analysis.table import DASH

LARGEST = 1e100  # of a number that is shown: sums and axes of larger ones overflow
DARKEST = 0.55  # share of colour behind text: darker backgrounds lack contrast
Z_95 = 1.959964  # quantile of the normal distribution for an interval of 95 %


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its heading.

    Attributes:
        head, rows: texts, or runs and groups that are shown by colour key and name.
        style: classes of CSS.
    """

    head: list[Any]
    rows: Sequence[Sequence[Any]]
    style: str


@dataclass(frozen=True)
class Picture:
    """A picture inside the page; ``kind`` is its format, ``data`` its content in base64."""

    caption: str
    alt: str
    data: str
    kind: str = "png"


def shade(text: object, share: float, colour: int = 0, style: str = "") -> Markup:
    """A cell whose background shows ``share``, in [0, 1], in one of the page's colours.

    Args:
        style: class of CSS.
    """
    css = f"--w:{100 * share:.1f}%;--c:var(--c{colour})"
    extra = Markup(' class="{}"').format(style) if style else ""
    return Markup('<span{} style="{}">{}</span>').format(extra, css, text)


def number(values: dict[str, Any], key: str) -> float | None:
    """A number of at most ``LARGEST``, or None."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return float(value)


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there."""
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def mean_and_deviation(values: Sequence[float]) -> str:
    """Shares as percentages: their mean, of several also the sample's standard deviation."""
    text = f"{100 * fmean(values):.2f}"
    return f"{text} %" if len(values) == 1 else f"{text} \u00b1 {100 * stdev(values):.2f} %"


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability that was observed as ``share`` of ``count``.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    square = Z_95**2 / count
    middle = (share + square / 2) / (1 + square)
    reach = Z_95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return middle - reach, middle + reach


def interval(share: float | None, count: float | None) -> str:
    """Wilson's interval as text; a dash where share or count is missing."""
    if share is None or not count or not 0 <= share <= 1:
        return DASH
    low, high = wilson(share, count)
    return f"{100 * low:.1f} \u2013 {100 * high:.1f} %"


def amount(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 5.72 M, 1.26 G; 1000 to the next prefix."""
    if value is None:
        return DASH
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}".rstrip()
