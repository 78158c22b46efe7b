"""A result file as a page to read: `python -m bench summary FILE`.

The step beside timm's, kernels beside their peers and the copy bandwidth, predicted beside
measured, hardware counters, and what failed or was not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import record
from .record import Row

STEPS = ("step",)
KERNELS = (
    *("attention", "add_layer_norm", "bias_gelu", "bias_gelu_linear", "ingest"),
    *("distillation_loss", "cache", "block", "augment", "loader"),
)
SHOWN_IF_PASSED = ("memcheck", "racecheck")  # commands whose outcome is a result
COUNTERS = ("us", "issue_active_pct", "dram_pct", "tensor_pct", "stall", "registers")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns; text to the left, the others to the right."""
    whole = [list(head), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*whole, strict=True)]
    lines = []
    for row in whole:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def number(row: Row, key: str, digits: int = 4, unit: str = "") -> str:
    return f"{row[key]:.{digits}g}{unit}" if key in row else ""


def whole(row: Row, key: str) -> str:
    return f"{row[key]:,.0f}" if key in row else ""


def factor(row: Row) -> str:
    return f"{row['ratio']:.2f}x of {row['ratio_to']}" if "ratio" in row else ""


def expected(row: Row) -> str:
    """The predicted range, and whether the measurement is below, inside or above it."""
    if "predicted" not in row:
        return ""
    low, high = row["predicted"]
    text = f"{low:.4g} to {high:.4g}"
    if "ms" not in row:
        return text
    if row["ms"] < low:
        return f"{text}, {100 * (1 - row['ms'] / low):.0f} % faster"
    if row["ms"] > high:
        return f"{text}, {100 * (row['ms'] / high - 1):.0f} % slower"
    return f"{text}, met"


def step_section(rows: Sequence[Row]) -> list[str]:
    chosen = [row for row in rows if row["bench"] in STEPS and "ms" in row]
    if not chosen:
        return ["No step was measured."]
    head = (
        "case",
        "implementation",
        "img/s",
        "ms",
        "device ms",
        "host ms",
        "against the best peer",
    )
    return table(
        head,
        (
            (row["case"], row["impl"], whole(row, "items_per_s"), number(row, "ms"),
             number(row, "device_ms"), number(row, "host_ms"), factor(row))
            for row in chosen
        ),
    )  # fmt: skip


def kernel_section(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for bench in KERNELS:
        chosen = [row for row in rows if row["bench"] == bench and "ms" in row]
        if not chosen:
            continue
        head = (bench, "implementation", "ms", "GB/s", "% of copy", "against the best peer")
        lines += table(
            head,
            (
                (row["case"], row["impl"], number(row, "ms"), whole(row, "gbps"),
                 whole(row, "roofline_pct"), factor(row))
                for row in chosen
            ),
        )  # fmt: skip
        lines.append("")
    return lines[:-1] or ["No kernel was measured."]


def prediction_section(rows: Sequence[Row], device: str) -> list[str]:
    known = record.predictions()
    name = record.predicted_device(device)
    if name is None:
        return [f"The predictions are for {' and '.join(known['devices'])}; this is {device}."]
    measured = {record.key_of(row): row for row in rows}
    lines = []
    for entry in known["rows"]:
        row = measured.get(record.key_of(entry), {})
        text = expected(row | {"predicted": entry["ms"][name]})
        shown = number(row, "ms") or ("skipped" if "skipped" in row else "not measured")
        lines.append((f"{entry['bench']}: {entry['case']}", entry["impl"], shown, text))
    return table(("case", "implementation", "ms", "predicted, ms"), lines)


def counter_section(rows: Sequence[Row]) -> list[str]:
    chosen = [row for row in rows if row["bench"] == "ncu" and "ms" in row]
    if not chosen:
        return []
    lines = [
        (row["case"], row["impl"], *(str(row.get(name, "")) for name in COUNTERS)) for row in chosen
    ]
    return table(("kernel", "implementation", *COUNTERS), lines)


def trace_section(rows: Sequence[Row]) -> list[str]:
    from .trace import table_text

    lines: list[str] = []
    for row in rows:
        if row["bench"] == "trace":
            lines += [f"{row['case']}: {row['ms']:.2f} ms busy", *table_text(
                row["kernels"], row["ms"] * 1e3).splitlines()[:13], ""]  # fmt: skip
    return lines[:-1]


def outcome_section(content: dict[str, Any]) -> list[str]:
    """Stages that did not pass, tests that failed, rows without a figure."""
    lines = []
    for stage in content.get("stages", []):
        took = f" after {stage['took_s']} s" if "took_s" in stage else ""
        reason = f": {stage['reason']}" if stage.get("reason") else ""
        lines.append(f"stage {stage['stage']}: {stage['outcome']}{took}{reason}")
        lines += [
            f"    {command['command']}: {command['outcome']}"
            + (f", exit status {command['exit_status']}" if command.get("exit_status") else "")
            for command in stage.get("commands", [])
            if command["outcome"] != "passed" or command["command"] in SHOWN_IF_PASSED
        ]
    if tests := content.get("tests"):
        counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
        lines.append(f"tests: {counts}, {tests['not_run']} not run")
        lines += [f"    FAILED {entry['test']}: {entry['message']}" for entry in tests["failures"]]
    for row in content["rows"]:
        name = f"{row['bench']}: {row['case']}, {row['impl']}"
        if "skipped" in row:
            lines.append(f"no figure: {name}: {row['skipped']}")
        elif row.get("provisional"):
            lines.append(f"provisional: {name}: the run ended before the case did")
    return lines or ["Everything was measured."]


def page(content: dict[str, Any]) -> str:
    meta, rows = content["meta"], content["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    sections = {
        "The training step": step_section(rows),
        "Kernels": kernel_section(rows),
        "Predicted and measured": prediction_section(rows, meta["device"]),
        "Hardware counters": counter_section(rows),
        "One step, kernel by kernel": trace_section(rows),
        "Outcome": outcome_section(content),
    }
    lines = [
        f"{meta['device']}, {meta['driver']}; commit {meta['commit']}, {meta['date']}",
        versions,
        meta["command"],
    ]
    for title, body in sections.items():
        if body:
            lines += ["", title, "-" * len(title), *body]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench summary", description=__doc__)
    parser.add_argument("file", type=Path, help="result file, or the folder of a script's run")
    options = parser.parse_args(arguments[1:])
    path = options.file / "results.json" if options.file.is_dir() else options.file
    try:
        content = record.read(path)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    outcomes = path.parent / "tests.jsonl"
    if outcomes.exists():  # newer than the counts in the file where a run was killed
        from .gpu import read_tests

        content["tests"] = read_tests(outcomes)
    print(page(content))
