"""Analyses side by side: rows of text for a terminal and for the report, observations of DeiT."""

from __future__ import annotations

import io
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deit_fast.runtime.files import write_json

DASH = "\u2013"
SAMPLE_CLASSES = 3  # columns for the classes of one image
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
# key of a row of ``summarise`` -> key of an analysis, see ``look_up``
ROW_KEYS = {
    **{key: key for key in ("run", "seed", "distillation", "weights", "images")},
    "undistilled_top1": "undistilled.top1",
    "cosine_learned": "tokens.learned",
    "cosine_input": "tokens.layers.0.mean",
    "cosine_last_block": "tokens.layers.-2.mean",
    "cosine_final_norm": "tokens.layers.-1.mean",
    "heads_agree": "heads.agreement",
    "heads_weight_cosine": "heads.weight_cosine.mean",
    "heads_probability_cosine": "heads.probability_cosine.mean",
    "teacher_top1": "teacher.top1",
    "teacher_ece": "teacher.calibration.ece",
    "teacher_entropy": "teacher.temperatures.0.entropy",
}
Item = TypeVar("Item")


# ---------------------------------------------------------------------------------------------
# Values as text
# ---------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f} %"


def decimal(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def spread(values: dict[str, float] | None) -> str:
    return DASH if values is None else f"{values['mean']:.3f} \u00b1 {values['std']:.3f}"


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


Figure = tuple[str, str, Callable[[Any], str]]  # name, key of an analysis, format
CLASSIFIERS = {
    "class": "class head",
    "distillation": "distillation head",
    "mean_logits": "mean of logits",
    "mean_softmax": "mean of softmaxes",
    "fusion_sum": "late fusion, sum",
    "fusion_concatenation": "late fusion, concatenation",
}
CLASSIFIER_FIGURES: list[Figure] = [
    ("held-out images", "images", count),
    *((f"{name}, top-1", f"accuracy.{key}", percent) for key, name in CLASSIFIERS.items()),
    ("undistilled run, top-1", "undistilled.top1", percent),
    ("teacher, top-1", "teacher.top1", percent),
    *((f"{name}, ECE", f"calibration.{key}.ece", percent) for key, name in CLASSIFIERS.items()),
    ("teacher, ECE", "teacher.calibration.ece", percent),
]
TOKEN_FIGURES: list[Figure] = [
    ("cosine of the learned tokens", "tokens.learned", decimal),
    ("with position embedding", "tokens.layers.0", spread),
    ("after the last block", "tokens.layers.-2", spread),
    ("after the final norm", "tokens.layers.-1", spread),
    ("cosine of the heads' weights", "heads.weight_cosine", spread),
    ("cosine of the heads' probabilities", "heads.probability_cosine", spread),
    ("same decision of both heads", "heads.agreement", percent),
]


def look_up(found: Any, key: str) -> Any:
    """The value of an analysis at a path of keys and list indices; None where it is absent."""
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found.get(part)
        if found is None:
            return None
    return found


def compare(results: Sequence[dict[str, Any]], figures: list[Figure]) -> list[list[str]]:
    """Rows of a name and a text for each analysis; a figure that none has is left out."""
    rows = [[name, *(show(look_up(r, key)) for r in results)] for name, key, show in figures]
    return [row for row in rows if set(row[1:]) != {DASH}]


def disagreement(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: share of different decisions of each pair of classifiers."""
    names, shares = found["disagreement"]["names"], found["disagreement"]["shares"]
    rows = zip(names, shares, strict=True)
    return ["", *names], [[name, *map(decimal, row)] for name, row in rows]


def teachers(
    results: Sequence[dict[str, Any]], runs: Sequence[Item]
) -> list[tuple[dict[str, Any], list[Item]]]:
    """The distinct teachers, each with all its runs; ``results[i]`` analyses ``runs[i]``."""
    owners: dict[str, tuple[dict[str, Any], list[Item]]] = {}
    for found, run in zip(results, runs, strict=True):
        if "teacher" in found:
            owners.setdefault(repr(found["teacher"]), (found["teacher"], []))[1].append(run)
    return list(owners.values())


def temperatures(teacher: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and rows: entropy, mass and the classes of one image at each temperature."""
    table, sample = teacher["temperatures"], teacher["sample"]
    masses = list(table[0]["mass"])
    best = [item["name"] for item in sample["temperatures"][0]["classes"][:SAMPLE_CLASSES]]
    title = f"{teacher['spec']}; classes of image {sample['id']} (label {sample['label']})"
    head = ["temperature", "entropy", *(f"top {k}" for k in masses), *(f"class {c}" for c in best)]
    rows = []
    for row, own in zip(table, sample["temperatures"], strict=True):
        values = [row["entropy"], *(row["mass"][k] for k in masses)]
        values += [item["probability"] for item in own["classes"][:SAMPLE_CLASSES]]
        rows.append([f"{row['temperature']:g}", *map(decimal, values)])
    return title, head, rows


def left_out(found: dict[str, Any]) -> list[str]:
    """`parts: reason` for the parts that were not measured."""
    reasons: dict[str, list[str]] = {}
    for part, reason in found["left_out"].items():
        reasons.setdefault(reason, []).append(part)
    return [f"{', '.join(parts)}: {reason}" for reason, parts in reasons.items()]


# ---------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """The values of one analysis that are compared, flat; what was not measured is absent."""
    row = {key: look_up(found, path) for key, path in ROW_KEYS.items()}
    row["top1"] = found["accuracy"][found["main"]]
    row |= {f"top1_{name}": value for name, value in found["accuracy"].items()}
    row |= {f"ece_{name}": value["ece"] for name, value in found["calibration"].items()}
    names, shares = found["disagreement"]["names"], found["disagreement"]["shares"]
    for other in {"teacher", "undistilled"}.intersection(names):
        for name in {"student", "class", "distillation", "both"}.intersection(names):
            share = shares[names.index(name)][names.index(other)]
            row[f"{name}_differs_from_{other}"] = share
    return {key: value for key, value in row.items() if value is not None}


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


def observed(results: list[dict[str, Any]]) -> list[str]:
    """A line per observation."""
    return [
        f"{item['claim']}: in {item['holds']} of {item['of']} runs, "
        f"mean difference {item['mean_difference']:+.3f}"
        for item in summarise(results)["observations"]
    ]


def render(results: list[dict[str, Any]], names: list[str], tty: bool = False) -> str:
    """All tables as text, in colour on a terminal.

    Args:
        results: as ``analyze`` returns them.
        names: short names of the runs.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns if tty else max(120, 40 + 24 * len(results))
    console = Console(file=io.StringIO(), force_terminal=tty, width=width)

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    def table(head: list[str], rows: list[list[str]]) -> None:
        shown = Table(box=None, pad_edge=False)
        for number, name in enumerate(head):
            shown.add_column(Text(name), justify="right" if number else "left")
        for row in rows:
            shown.add_row(*map(Text, row))
        console.print(shown)

    with console.capture() as capture:
        table(["", *names], compare(results, CLASSIFIER_FIGURES + TOKEN_FIGURES))
        for found, name in zip(results, names, strict=True):
            line(f"\n{name}: share of different decisions", "bold")
            table(*disagreement(found))
        for teacher, owners in teachers(results, names):
            title, head, rows = temperatures(teacher)
            line(f"\n{', '.join(owners)}: teacher {title}", "bold")
            table(head, rows)
        console.print()
        for found, name in zip(results, names, strict=True):
            for text in left_out(found):
                line(f"{name}: left out: {text}", "yellow")
        for text in observed(results):
            line(text)
    return "\n".join(text.rstrip() for text in capture.get().splitlines())
