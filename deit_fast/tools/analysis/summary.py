"""Analyses side by side: flat rows, and whether what DeiT's authors observed holds in them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from deit_fast.runtime.files import write_json

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


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one analysis that are compared, flat; what was not measured is absent."""
    row = {key: found[key] for key in ("run", "seed", "distillation", "weights", "images")}
    row["top1"] = found["accuracy"][found["main"]]
    row |= {f"top1_{name}": value for name, value in found["accuracy"].items()}
    row |= {f"ece_{name}": value["ece"] for name, value in found["calibration"].items()}
    if "undistilled" in found:
        row["undistilled_top1"] = found["undistilled"]["top1"]
    if "tokens" in found:
        layers = {layer["name"]: layer["mean"] for layer in found["tokens"]["layers"]}
        row["cosine_learned"] = found["tokens"]["learned"]
        row["cosine_input"], *_, row["cosine_last_block"], row["cosine_final_norm"] = (
            layers.values()
        )
        heads = found["heads"]
        row["heads_agree"] = heads["agreement"]
        row["heads_weight_cosine"] = heads["weight_cosine"]["mean"]
        row["heads_probability_cosine"] = heads["probability_cosine"]["mean"]
    names, shares = found["disagreement"]["names"], found["disagreement"]["shares"]
    for other in ("teacher", "undistilled"):
        if other in names:
            for name in ("student", "class", "distillation", "both"):
                if name in names:
                    share = shares[names.index(name)][names.index(other)]
                    row[f"{name}_differs_from_{other}"] = share
    if "teacher" in found:
        first = found["teacher"]["temperatures"][0]
        row["teacher_top1"] = found["teacher"]["top1"]
        row["teacher_ece"] = found["teacher"]["calibration"]["ece"]
        row["teacher_entropy"] = first["entropy"]
    return row


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of all runs, and each observation with the runs that can tell.

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


def write_summary(results: list[dict[str, Any]], path: Path, command: str | None = None) -> None:
    """Write ``summarise`` with what is needed to repeat it.

    Args:
        command: in place of the one that the analyses keep.

    Raises:
        OSError: ``path`` cannot be written.
    """
    meta = dict(results[0]["meta"]) | ({} if command is None else {"command": command})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"meta": meta, **summarise(results)})


def observed(summary: dict[str, Any]) -> list[str]:
    """A line per observation."""
    return [
        f"{item['claim']}: in {item['holds']} of {item['of']} runs, "
        f"mean difference {item['mean_difference']:+.3f}"
        for item in summary["observations"]
    ]
