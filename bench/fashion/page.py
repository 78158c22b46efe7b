"""The tables of the results; refused where a run of the protocol is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.fashion.chart import reuse_chart
from bench.fashion.protocol import BYTES, TABLES, Arm, arms
from bench.fashion.run import read_result, result_path
from bench.plot import save

# Half width of a 95 % interval of Student's t over the standard error, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def interval(values: Sequence[float]) -> float:
    """Half width of the 95 % t interval of a mean."""
    return _T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def write_page(results: Path, out: Path, plots: Path | None = None) -> None:
    """Write one table for each question, and the reuse curve into the folder ``plots``.

    Raises:
        SystemExit: runs are missing (names them), or an arm has more bytes than its table allows.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for arm in arms():
        for seed in arm.seeds:
            result = read_result(results, arm, seed)
            if result is None:
                missing.append(str(result_path(results, arm, seed)))
            else:
                found.setdefault(arm.name, []).append(result)
    if missing:
        raise SystemExit(f"{len(missing)} runs are missing:\n" + "\n".join(missing))
    parts = [_table(name, heading, found) for name, heading in TABLES.items()]
    head = "# Results on Fashion-MNIST\nMade by `python -m bench fashion page`.\n"
    out.write_text("\n".join([head, *parts]))
    if plots is not None:
        save(reuse_chart(found), plots, "fashion-reuse")


def _table(name: str, heading: str, found: dict[str, list[dict[str, Any]]]) -> str:
    chosen = [arm for arm in arms() if name in arm.tables]
    first = chosen[0]
    lines = [
        f"## {heading}",
        f"| arm | top-1, % | of each seed | minus {first.name}, points | NLL | ECE | bytes/image |",
        "|---|---|---|---|---|---|---|",
        *(_row(arm, found[arm.name], found[first.name]) for arm in chosen),
        "",
    ]
    if name == "bytes":
        for arm in chosen:
            used = found[arm.name][0]["bytes_per_image"]
            if used > BYTES:
                raise SystemExit(f"{arm.name} has {used} bytes an image, more than {BYTES}")
    return "\n".join(lines)


def _row(arm: Arm, results: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    top1 = [100 * result["top1"] for result in results]
    spread = f" ± {stdev(top1):.2f}" if len(top1) > 1 else ""
    gains = [a - 100 * b["top1"] for a, b in zip(top1, first, strict=True)]
    gain = f"{fmean(gains):+.2f}" + (f" ± {interval(gains):.2f}" if len(gains) > 1 else "")
    each = ", ".join(f"{value:.2f}" for value in top1)
    nll, ece = (fmean(result[key] for result in results) for key in ("nll", "ece"))
    used = results[0]["bytes_per_image"]
    gain = "-" if results is first else gain
    cells = [arm.name, f"{fmean(top1):.2f}{spread}", each, gain, f"{nll:.4f}", f"{ece:.4f}", used]
    return f"| {' | '.join(map(str, cells))} |"
