"""Analyses side by side: flat rows, observations of DeiT's authors, tables for a terminal."""

from __future__ import annotations

import io
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit_fast.runtime.files import write_json

DASH = "\u2013"
OBSERVATIONS = {
    # section 5.2 of arXiv 2012.12877: +1.6 points, .100 against .112, .93 against .06
    "the distilled student is more accurate than the undistilled one": (
        "top1", "undistilled_top1",
    ),
    "the distillation head is closer to the teacher than the class head": (
        "class_differs_from_teacher", "distillation_differs_from_teacher",
    ),
    "class and distillation token are more alike after the last block than at the input": (
        "cosine_last_block", "cosine_input",
    ),
}  # fmt: skip
SHOWN = (  # key of a row, its name in the table, its format
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
    ("cosine_input", "  with position embedding", "n"),
    ("cosine_last_block", "  after the last block", "n"),
    ("cosine_final_norm", "  after the final norm", "n"),
    ("heads_agree", "same decision of both heads", "%"),
    ("heads_probability_cosine", "  cosine of their probabilities", "n"),
    ("heads_weight_cosine", "  cosine of their weights", "n"),
)


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """The values of one analysis that are compared, flat; what was not measured is absent."""
    row = {key: found[key] for key in ("run", "seed", "distillation", "weights", "images")}
    row["top1"] = found["accuracy"][found["main"]]
    row |= {f"top1_{name}": value for name, value in found["accuracy"].items()}
    row |= {f"ece_{name}": value["ece"] for name, value in found["calibration"].items()}
    if "undistilled" in found:
        row["undistilled_top1"] = found["undistilled"]["top1"]
    if "tokens" in found:
        first, *_, last, final = (layer["mean"] for layer in found["tokens"]["layers"])
        heads = found["heads"]
        row |= {
            "cosine_learned": found["tokens"]["learned"],
            "cosine_input": first,
            "cosine_last_block": last,
            "cosine_final_norm": final,
            "heads_agree": heads["agreement"],
            "heads_weight_cosine": heads["weight_cosine"]["mean"],
            "heads_probability_cosine": heads["probability_cosine"]["mean"],
        }
    names, shares = found["disagreement"]["names"], found["disagreement"]["shares"]
    for other in {"teacher", "undistilled"}.intersection(names):
        for name in {"student", "class", "distillation", "both"}.intersection(names):
            share = shares[names.index(name)][names.index(other)]
            row[f"{name}_differs_from_{other}"] = share
    if "teacher" in found:
        row["teacher_top1"] = found["teacher"]["top1"]
        row["teacher_ece"] = found["teacher"]["calibration"]["ece"]
        row["teacher_entropy"] = found["teacher"]["temperatures"][0]["entropy"]
    return row


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of all runs, and for each observation the distilled runs that can confirm it.

    Returns:
        `rows`; `observations`: each `claim`, `holds` and `of` (counts of runs), `mean_difference`
        and `differences` by run, positive where the claim holds.
    """
    rows = [row_of(found) for found in results]
    observations = []
    for claim, (more, less) in OBSERVATIONS.items():
        differences = {
            row["run"]: row[more] - row[less]
            for row in rows
            if row["distillation"] != "none" and more in row and less in row
        }
        if differences:
            observations.append(
                {
                    "claim": claim,
                    "holds": sum(value > 0 for value in differences.values()),
                    "of": len(differences),
                    "mean_difference": statistics.fmean(differences.values()),
                    "differences": differences,
                }
            )
    return {"rows": rows, "observations": observations}


def write_summary(results: list[dict[str, Any]], path: Path) -> None:
    """Write ``summarise`` with versions and command.

    Raises:
        OSError: ``path`` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"meta": results[0]["meta"], **summarise(results)})


def observed(summary: dict[str, Any]) -> list[str]:
    """A line per observation."""
    return [
        f"{item['claim']}: in {item['holds']} of {item['of']} runs, "
        f"mean difference {item['mean_difference']:+.3f}"
        for item in summary["observations"]
    ]


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def render(results: list[dict[str, Any]], names: list[str], tty: bool = False) -> str:
    """All tables as text, in colour on a terminal.

    Args:
        results: as ``analyze`` returns them.
        names: short names of the runs.
    """
    from rich.console import Console
    from rich.text import Text

    width = shutil.get_terminal_size().columns if tty else max(120, 40 + 24 * len(results))
    console = Console(file=io.StringIO(), force_terminal=tty, width=width)

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    named = list(zip(results, names, strict=True))
    summary = summarise(results)
    with console.capture() as capture:
        console.print(_values(summary["rows"], names))
        for found, name in named:
            line(f"\n{name}: share of different decisions", "bold")
            table = found["disagreement"]
            rows = [
                (row, *(f"{share:.3f}" for share in shares))
                for row, shares in zip(table["names"], table["shares"], strict=True)
            ]
            console.print(_table(["", *table["names"]], rows))
        shown: list[Any] = []
        for found, name in named:
            teacher = found.get("teacher")
            if teacher is not None and teacher not in shown:
                shown.append(teacher)
                line(f"\n{name}: teacher {teacher['spec']} by temperature", "bold")
                console.print(_temperatures(teacher))
        console.print()
        for found, name in named:
            reasons: dict[str, list[str]] = {}
            for part, reason in found["left_out"].items():
                reasons.setdefault(reason, []).append(part)
            for reason, parts in reasons.items():
                line(f"{name}: left out: {', '.join(parts)}: {reason}", "yellow")
        for text in observed(summary):
            line(text)
    return "\n".join(text.rstrip() for text in capture.get().splitlines())


def _table(heads: list[str], rows: Iterable[Iterable[str]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number or head else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _values(rows: list[dict[str, Any]], names: list[str]) -> Any:
    def text(value: float | None, kind: str) -> str:
        if value is None:
            return DASH
        return {"d": f"{value:.0f}", "%": f"{100 * value:.2f} %", "n": f"{value:.3f}"}[kind]

    shown = [item for item in SHOWN if any(item[0] in row for row in rows)]
    cells = [(label, *(text(row.get(key), kind) for row in rows)) for key, label, kind in shown]
    return _table(["", *names], cells)


def _temperatures(teacher: dict[str, Any]) -> Any:
    sample = teacher["sample"]
    masses = list(teacher["temperatures"][0]["mass"])
    best = [item["name"] for item in sample["temperatures"][0]["classes"][:3]]
    heads = ["T", "entropy", *(f"top {k}" for k in masses)]
    heads += [f"image {sample['id']} ({sample['label']}): {best[0]}", *best[1:]]
    rows = []
    for row, own in zip(teacher["temperatures"], sample["temperatures"], strict=True):
        values = [row["entropy"], *(row["mass"][k] for k in masses)]
        values += [item["probability"] for item in own["classes"][: len(best)]]
        rows.append([f"{row['temperature']:g}", *(f"{value:.3f}" for value in values)])
    return _table(heads, rows)
