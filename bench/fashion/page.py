"""Tables and figures of the results; refused where a run is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from bench.fashion.chart import reuse_chart
from bench.fashion.protocol import BYTES, TABLES, Arm, arms
from bench.fashion.run import read_result, result_path
from bench.plot import save
from bench.record import collect_meta, to_text

# Half width of a 95 % interval of Student's t over the standard error, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


class Row(NamedTuple):
    """An arm in a table, over its seeds. Accuracies in percent, differences in points.

    Attributes:
        gain: mean difference to the table's first arm, paired by seed; None for that arm itself.
        half_width: of its 95 % t interval; None of one seed.
    """

    table: str
    arm: str
    top1: list[float]
    gain: float | None
    half_width: float | None
    nll: float
    ece: float
    bytes_per_image: int


def interval(values: Sequence[float]) -> float:
    """Half width of the 95 % t interval of a mean."""
    return _T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def write_page(
    results: Path, out: Path, plots: Path | None = None, tables: Sequence[str] = tuple(TABLES)
) -> None:
    """Write one table for each question to ``out``, and `summary.json` beside the results.

    Args:
        plots: folder for the reuse curve.
        tables: only these, whose runs must be there.

    Raises:
        SystemExit: runs are missing (names them), or an arm has more bytes than its table allows.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for arm in arms():
        if not set(arm.tables) & set(tables):
            continue
        for seed in arm.seeds:
            result = read_result(results, arm, seed)
            if result is None:
                missing.append(str(result_path(results, arm, seed)))
            else:
                found.setdefault(arm.name, []).append(result)
    if missing:
        raise SystemExit(f"{len(missing)} runs are missing:\n" + "\n".join(missing))
    rows = {name: _rows(name, found) for name in tables}
    command = "python -m bench fashion page"
    head = f"# Results on Fashion-MNIST and digits\nMade by `{command}`.\n"
    out.write_text("\n".join([head, *(_text(TABLES[name], rows[name]) for name in tables)]))
    content = {
        "meta": collect_meta("cpu", command, None),
        "means": [figure for name in tables for row in rows[name] for figure in _figures(row)],
    }
    (results / "summary.json").write_text(to_text(content))
    if plots is not None:
        save(reuse_chart(found), plots, "fashion-reuse")


def _rows(table: str, found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    chosen: list[Arm] = [arm for arm in arms() if table in arm.tables]
    first = [100 * result["top1"] for result in found[chosen[0].name]]
    rows = []
    for arm in chosen:
        results = found[arm.name]
        used = results[0]["bytes_per_image"]
        if table == "bytes" and used > BYTES:
            raise SystemExit(f"{arm.name} has {used} bytes an image, more than {BYTES}")
        top1 = [100 * result["top1"] for result in results]
        gains = [ours - theirs for ours, theirs in zip(top1, first, strict=True)]
        is_first, is_single = arm is chosen[0], len(gains) == 1
        nll, ece = (fmean(result[key] for result in results) for key in ("nll", "ece"))
        rows.append(Row(
            table, arm.name, top1, None if is_first else fmean(gains),
            None if is_first or is_single else interval(gains), nll, ece, used,
        ))  # fmt: skip
    return rows


def _text(heading: str, rows: Sequence[Row]) -> str:
    difference = f"minus {rows[0].arm}, points"
    lines = [
        f"## {heading}",
        f"| arm | top-1, % | of each seed | {difference} | NLL | ECE | bytes/image |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {stdev(row.top1):.2f}" if len(row.top1) > 1 else ""
        width = "" if row.half_width is None else f" ± {row.half_width:.2f}"
        gain = "-" if row.gain is None else f"{row.gain:+.2f}{width}"
        each = ", ".join(f"{value:.2f}" for value in row.top1)
        cells = [row.arm, f"{fmean(row.top1):.2f}{spread}", each, gain, f"{row.nll:.4f}",
                 f"{row.ece:.4f}", row.bytes_per_image]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _figures(row: Row) -> list[dict[str, Any]]:
    """Lines of the result file: the mean with its spread, then the difference with its interval."""
    common: dict[str, Any] = {"bench": "fashion", "case": row.table, "impl": row.arm}
    spread = stdev(row.top1) if len(row.top1) > 1 else None
    found = [common | {
        "accuracy": round(fmean(row.top1), 3), "accuracy_std": spread, "seeds": len(row.top1),
        "nll": row.nll, "ece": row.ece, "bytes_per_image": row.bytes_per_image,
    }]  # fmt: skip
    if row.gain is not None:
        found.append(common | {"minus": "the first", "accuracy": round(row.gain, 3)})
    if row.half_width is not None:
        found.append(
            common | {"minus": "the first, half width", "accuracy": round(row.half_width, 3)}
        )
    return found
