"""Analyses as tables for a terminal, runs side by side."""

from __future__ import annotations

import io
import shutil
from typing import Any

from deit_fast.tools.analysis.summary import observed, row_of, summarise

DASH = "\u2013"
SHOWN = (  # key of a summary's row, its name here, in percent or as a plain number
    ("images", "held-out images", "d"),
    ("top1_class", "accuracy of the class head", "%"),
    ("top1_distillation", "  of the distillation head", "%"),
    ("top1_sum_logits", "  of the sum of logits", "%"),
    ("top1_sum_softmax", "  of the sum of softmax", "%"),
    ("undistilled_top1", "  of the undistilled run", "%"),
    ("teacher_top1", "  of the teacher", "%"),
    ("ece_class", "calibration error of the class head", "%"),
    ("ece_distillation", "  of the distillation head", "%"),
    ("ece_sum_logits", "  of the sum of logits", "%"),
    ("teacher_ece", "  of the teacher", "%"),
    ("cosine_learned", "cosine of the learned tokens", "n"),
    ("cosine_input", "  with their positions", "n"),
    ("cosine_last_block", "  after the last block", "n"),
    ("cosine_final_norm", "  as the heads read them", "n"),
    ("heads_agree", "both heads decide the same", "%"),
    ("heads_probability_cosine", "  cosine of their probabilities", "n"),
    ("heads_weight_cosine", "  cosine of their weights", "n"),
)


def render(results: list[dict[str, Any]], names: list[str], tty: bool = False) -> str:
    """All tables as text; with colours on a terminal.

    Args:
        results: as ``analyze`` returns them.
        names: short names of the runs.
    """
    from rich.console import Console
    from rich.text import Text

    width = shutil.get_terminal_size().columns if tty else max(120, 40 + 24 * len(results))
    console = Console(file=io.StringIO(), force_terminal=tty, width=width)
    with console.capture() as capture:
        console.print(_figures(results, names))
        for found, name in zip(results, names, strict=True):
            console.print(Text(f"\n{name}: share of different decisions", style="bold"))
            console.print(_square(found["disagreement"]))
        shown: list[Any] = []
        for found, name in zip(results, names, strict=True):
            teacher = found.get("teacher")
            if teacher is not None and teacher not in shown:
                shown.append(teacher)
                heading = f"\n{name}: its teacher {teacher['spec']}, softened"
                console.print(Text(heading, style="bold"), soft_wrap=True)
                console.print(_temperatures(teacher))
        console.print()
        for found, name in zip(results, names, strict=True):
            for line in left_out(found):
                console.print(Text(f"{name}: {line}", style="yellow"), soft_wrap=True)
        for line in observed(summarise(results)):
            console.print(Text(line), soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def left_out(found: dict[str, Any]) -> list[str]:
    """A line per reason, with all that is missing for it."""
    parts: dict[str, list[str]] = {}
    for part, reason in found["left_out"].items():
        parts.setdefault(reason, []).append(part)
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in parts.items()]


def _figures(results: list[dict[str, Any]], names: list[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    rows = [row_of(found) for found in results]
    for name in names:
        table.add_column(name, justify="right")
    for key, label, kind in SHOWN:
        if any(key in row for row in rows):
            table.add_row(label, *(_text(row.get(key), kind) for row in rows))
    return table


def _text(value: float | None, kind: str) -> str:
    if value is None:
        return DASH
    if kind == "d":
        return f"{value:d}"
    return f"{100 * value:.2f} %" if kind == "%" else f"{value:.3f}"


def _square(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in found["names"]:
        table.add_column(name, justify="right")
    for name, shares in zip(found["names"], found["shares"], strict=True):
        table.add_row(name, *(f"{share:.3f}" for share in shares))
    return table


def _temperatures(teacher: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    sample = teacher["sample"]
    masses = list(teacher["temperatures"][0]["mass"])
    best = [item["name"] for item in sample["temperatures"][0]["classes"][:3]]
    heads = ["T", "entropy", *(f"top {k}" for k in masses)]
    heads += [f"image {sample['id']} ({sample['label']}): {best[0]}", *best[1:]]
    for head in heads:
        table.add_column(head, justify="right")
    for row, own in zip(teacher["temperatures"], sample["temperatures"], strict=True):
        odds = [f"{item['probability']:.3f}" for item in own["classes"][: len(best)]]
        mass = [f"{row['mass'][k]:.3f}" for k in masses]
        table.add_row(f"{row['temperature']:g}", f"{row['entropy']:.3f}", *mass, *odds)
    return table
