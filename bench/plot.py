"""Charts and tables of result files: `python -m bench plot [FILE...] --out DIR`.

For each device and bench there is a chart of each implementation's speed relative to the strongest
peer, and, if the rows have it, one of its share of the measured copy bandwidth. A bar is the figure
of a row, its whisker the range from the 20th to the 80th percentile. Rows that were not measured
are not drawn. SVG keeps text as text; the background is transparent, and every colour can be read
on white and on nearly black.

`--markdown FILE` also writes the figures as tables between two marks of that file, with links to
the result files and the charts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
MARKS = ("<!-- made by python -m bench plot: begin -->", "<!-- bench plot: end -->")
TEXT = "#7b7b7b"
OURS, PEER = "#2f8f4e", "#6f7fb3"
GROUNDS = ("#ffffff", "#131416")  # a page by day and by night; what colours are judged against
INCHES_PER_BAR = 0.23


@dataclass(frozen=True)
class Bar:
    """One implementation of one case; ``low`` and ``high`` from its percentiles."""

    case: str
    impl: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """The measured rows of one bench in one result file."""

    path: Path
    meta: dict[str, Any]
    bench: str
    rows: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """Of its chart files: folder of the device and bench."""
        return f"{self.path.parent.name}-{self.bench}"


# ---------------------------------------------------------------------------------------------
# Result files
# ---------------------------------------------------------------------------------------------


def committed() -> list[Path]:
    """The result files of this repository, oldest first; of one day in the order of commits."""
    from . import record

    def age(path: Path) -> tuple[str, int, str]:
        meta = json.loads(path.read_text())["meta"]
        count = record.output_of("git", "rev-list", "--count", meta["commit"])
        return meta["date"], int(count or 0), path.name

    files = (HERE / "results").glob("*/*.json")
    return sorted((path for path in files if _is_bench(json.loads(path.read_text()))), key=age)


def unordered() -> str:
    """Why ``committed`` cannot tell the order of results of one day; empty where it can."""
    from . import record

    if record.output_of("git", "rev-parse", "--is-shallow-repository") != "false":
        return "no git history, or a shallow one"
    return ""


def _is_bench(content: Any) -> bool:
    rows = content.get("rows") if isinstance(content, dict) else None
    if not rows:
        return False
    return all("bench" in row for row in rows) and "commit" in content["meta"]


def read(paths: Sequence[Path]) -> list[Result]:
    """Results by device and bench; of several files with the same bench the last one counts.

    Raises:
        ValueError: a file that is not a result of `python -m bench`.
    """
    found: dict[tuple[str, str], Result] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        if not _is_bench(content):
            raise ValueError(f"{path}: not a result of `python -m bench`")
        for bench in dict.fromkeys(row["bench"] for row in content["rows"]):
            rows = tuple(row for row in content["rows"] if row["bench"] == bench and "ms" in row)
            if rows:
                found[path.parent.name, bench] = Result(path, content["meta"], bench, rows)
    return [found[key] for key in sorted(found)]


def comparisons(result: Result) -> list[Bar]:
    """How many times faster than the strongest peer of its case; cases without a peer are left."""
    bars = []
    for row in result.rows:
        if "ratio" not in row:
            continue
        peer = row["ratio"] * row["ms"]  # the peer's median, ms
        low, high = peer / row["ms_p80"], peer / row["ms_p20"]
        case = f"{row['case']}\nagainst {row['ratio_to']}"
        bars.append(Bar(case, row["impl"], row["ratio"], low, high))
    return bars


def rooflines(result: Result) -> list[Bar]:
    """Per cent of the copy bandwidth that the same run measured."""
    bars = []
    for row in result.rows:
        if "roofline_pct" not in row:
            continue
        peak = row["roofline_pct"] * row["ms"]
        bars.append(Bar(row["case"], row["impl"], row["roofline_pct"], peak / row["ms_p80"],
                        peak / row["ms_p20"]))  # fmt: skip
    return bars


# ---------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------


def draw(bars: Sequence[Bar], title: str, unit: str, limit: float) -> Figure:
    """Horizontal bars by case, with a line at ``limit``; ``unit`` follows each number."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(bar.case for bar in bars))
    positions, ticks, position = [], [], 0.0
    for case in cases:
        members = [bar for bar in bars if bar.case == case]
        ticks.append(position + (len(members) - 1) / 2)
        positions += [position + i for i in range(len(members))]
        position += len(members) + 0.8
    ordered = [bar for case in cases for bar in bars if bar.case == case]

    figure = Figure(figsize=(9, 1.1 + INCHES_PER_BAR * position), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    values = [bar.value for bar in ordered]
    spread = [
        [max(bar.value - bar.low, 0) for bar in ordered],
        [max(bar.high - bar.value, 0) for bar in ordered],
    ]
    colours = [OURS if bar.impl.startswith("ours") else PEER for bar in ordered]
    axes.barh(positions, values, 0.8, color=colours, xerr=spread, ecolor=TEXT)
    reach = max(max(bar.high for bar in ordered), limit)
    for y, bar in zip(positions, ordered, strict=True):
        label = f"{bar.value:.2f}{unit}  {bar.impl}"
        axes.text(max(bar.high, bar.value) + reach / 90, y, label, va="center", color=TEXT,
                  fontsize=7.5)  # fmt: skip
    axes.axvline(limit, color=TEXT, linewidth=1, linestyle="--", alpha=0.5, zorder=0)
    axes.set_yticks(ticks, cases, fontsize=8, color=TEXT)
    axes.set_xlim(0, reach * 1.55)
    axes.set_ylim(position - 0.3, -1)
    axes.tick_params(colors=TEXT, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(TEXT)
    axes.set_title(title, fontsize=9, color=TEXT, loc="left")
    return figure


def charts(result: Result) -> dict[str, Figure]:
    """Figures of a result by the stem of their files."""
    found = {}
    where = f"{result.meta['device']}, {result.meta['date']}, {result.meta['commit']}"
    if bars := comparisons(result):
        title = f"{result.bench}: times faster than the strongest peer (dashed)\n{where}"
        found[result.name] = draw(bars, title, "x", 1.0)
    if bars := rooflines(result):
        title = f"{result.bench}: % of measured copy bandwidth (dashed: all of it)\n{where}"
        found[f"{result.name}-roofline"] = draw(bars, title, " %", 100.0)
    return found


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """The figure as SVG and PNG; the same bytes from the same figures."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.svg", folder / f"{stem}.png"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deit_fast"}):
        figure.savefig(paths[0], metadata={"Date": None, "Creator": None})
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    lines = [line.rstrip() for line in paths[0].read_text().splitlines()]
    paths[0].write_text("\n".join(lines) + "\n")
    return paths


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def as_markdown(results: Sequence[Result], page: Path, folder: Path) -> str:
    """One section per result: where it was measured, its charts, its rows."""
    from . import record

    parts = []
    for result in results:
        source = os.path.relpath(result.path, page.parent)
        meta = result.meta
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        parts.append(f"### {result.bench} on {result.path.parent.name}\n")
        parts.append(
            f"{meta['device']}; {meta['driver']}; {versions}. Measured at commit "
            f"{meta['commit']} on {meta['date']} by\n`{meta['command']}`: "
            f"[{result.path.name}]({source}).\n"
        )
        for stem in charts(result):
            image = os.path.relpath(folder / f"{stem}.svg", page.parent)
            parts.append(f"![{stem}]({image})\n")
        rows = f"<!-- measured: {_from_root(result.path)} -->\n{_table(result)}"
        parts.append(record.folded(f"All {len(result.rows)} rows", rows))
    return "\n".join([*parts, _predictions()]).rstrip()


def _predictions() -> str:
    """What was predicted before any measurement; a result file of the device shows it too."""
    from . import record

    known = record.predictions()
    devices = known["devices"]
    source = "<!-- computed: bench/predictions.json -->"
    head = ("bench", "case", "implementation", *(f"{device}, ms" for device in devices), "from")
    lines = [source, f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in known["rows"]:
        ranges = [f"{low:g} to {high:g}" for low, high in (row["ms"][name] for name in devices)]
        cells = (row["bench"], row["case"], row["impl"], *ranges, row["from"])
        lines.append(f"| {' | '.join(cells)} |")
    rows = record.folded(f"All {len(known['rows'])} predictions", "\n".join(lines))
    return f"### Predicted before any measurement\n\n{source}\n{known['note']}\n\n{rows}"


def _from_root(path: Path) -> str:
    return os.path.relpath(path.resolve(), HERE.parent)


def _table(result: Result) -> str:
    optional = {"gbps": "GB/s", "roofline_pct": "% of copy", "items_per_s": "items/s"}
    shown = {key: head for key, head in optional.items() if any(key in row for row in result.rows)}
    head = ["case", "implementation", "ms", "p20 to p80, ms", *shown.values(), "x", "of"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in result.rows:
        cells = [
            row["case"],
            row["impl"],
            _plain(row["ms"]),
            f"{_plain(row['ms_p20'])} to {_plain(row['ms_p80'])}",
            *(_plain(row[key]) if key in row else "" for key in shown),
            f"{row['ratio']:.{2 if row['ratio'] >= 0.1 else 5}f}" if "ratio" in row else "",
            row.get("ratio_to", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plain(value: float) -> str:
    """Four digits, without an exponent."""
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def write_markdown(results: Sequence[Result], page: Path, folder: Path) -> None:
    """Replace the tables of a page.

    Raises:
        ValueError: as ``record.replace_between``.
    """
    from .record import replace_between

    replace_between(page, MARKS, as_markdown(results, page, folder) + "\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help="result files; none: the committed ones"
    )
    parser.add_argument("--out", type=Path, default=Path("build/plots"), help="folder of charts")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write tables there too")
    options = parser.parse_args(arguments[1:])
    try:
        results = read(options.files or committed())
        written = [
            path
            for result in results
            for stem, figure in charts(result).items()
            for path in save(figure, options.out, stem)
        ]
        if options.markdown:
            write_markdown(results, options.markdown, options.out)
            written.append(options.markdown)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not written:
        raise SystemExit("nothing to draw: no row has a peer or a roofline")
    print("\n".join(map(str, written)))
