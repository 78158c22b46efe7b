"""Values as text, and tables: what all sections of the report share."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from deit_fast.tools.report.charts import COLOURS
from deit_fast.tools.report.runs import Run

DASH = "\u2013"


def percent_text(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f} %"


def count_text(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


def short_text(value: float) -> str:
    return f"{value:.4g}"


def round_percent_text(value: float) -> str:
    return f"{100 * value:.4g} %"


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of finished HTML cells; the first cell of a row is its heading."""
    top = "".join(c if c.startswith("<th") else f'<th scope="col">{c}</th>' for c in head)
    body = []
    for row in rows:
        first, *rest = row
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def run_label(run: Run, index: int) -> str:
    return f'<i class="key" style="--c:var(--c{index % COLOURS})"></i>{escape(run.name)}'


def run_labels(runs: list[Run]) -> list[str]:
    return [run_label(run, index) for index, run in enumerate(runs)]


def figure(caption: str, content: str) -> str:
    """Finished HTML under a caption, which is escaped."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def picture(png: bytes, alt: str) -> str:
    """A PNG inside the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img alt="{escape(alt)}" src="{source}">'
