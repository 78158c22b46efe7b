"""`demo`: the whole workflow on small images: teacher, cache, three students, analysis, report.

The images are scikit-learn's digits (1,797 images of 8x8 pixels, from the UCI repository): they are
part of the package and need no download.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deit_fast.errors import InputError
from deit_fast.recipes import digits_student, digits_teacher

log = logging.getLogger("deit_fast")

TRAIN_EVERY = 3  # every third image is for training, the others are held out


def demo(
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    workers: int = 1,
    save: Path | None = None,
    save_analysis: Path | None = None,
) -> dict[str, Any]:
    """Train a teacher, cache its logits, train the same student three times, compare.

    Args:
        output: folder of data, runs and report; what it holds already is not computed again.
        seeds: one teacher and three students are trained for each.
        workers: decoding processes.
        save, save_analysis: JSON files for the result, and for the analysis of all students.

    Returns:
        `rows`: per seed the teacher's and the students' top-1 accuracy; `mean`: over the seeds;
        `gain`: better distilled student minus undistilled one, percentage points; `observed`: a
        line per observation of DeiT's authors, with how often it holds here; `seconds`; `report`:
        path.
    """
    from deit_fast.precomputation import precompute
    from deit_fast.runtime.files import write_json
    from deit_fast.tools.analysis.runs import analyze
    from deit_fast.tools.analysis.table import observed, write_summary
    from deit_fast.tools.report.page import write_report
    from deit_fast.training.loop import train

    if not seeds:
        raise InputError("demo needs at least one seed")
    started = time.perf_counter()
    write_digits(output / "data")
    data = {"root": str(output / "data"), "workers": workers}
    rows, runs, analyses = [], [], []
    for seed in seeds:
        folder = output / f"seed-{seed}"
        row: dict[str, float] = {"seed": seed}
        chosen: dict[str, Any] = {"seed": seed, "view": {"seed": seed}, "data": data}
        teacher = digits_teacher().replace(output=str(folder / "teacher"), **chosen)
        log.info("seed %d: teacher", seed)
        row["teacher"] = train(teacher)["top1"]
        spec = f"{teacher.model.name}@{folder}/teacher/model.safetensors"
        student = digits_student().replace(output=str(folder), **chosen)
        log.info("seed %d: teacher logits of all views", seed)
        precompute(student.replace(teacher=spec, cache=str(folder / "cache")))
        for kind in ("none", "hard", "soft"):
            log.info("seed %d: student, distillation %s", seed, kind)
            run = student.replace(output=str(folder / kind), loss={"kind": kind})
            if kind == "none":  # without distillation token, as DeiT's undistilled models
                run = run.replace(model={"name": run.model.name.replace("distilled_", "")})
            else:
                run = run.replace(cache=str(folder / "cache"))
            row[kind] = train(run)["top1"]
            runs.append(folder / kind)
        analyses += analyze(runs[-3:], teacher=spec)
        rows.append(row)
    mean = {
        name: sum(row[name] for row in rows) / len(rows)
        for name in ("teacher", "none", "hard", "soft")
    }
    result = {
        "rows": rows,
        "mean": mean,
        "gain": 100 * (max(mean["hard"], mean["soft"]) - mean["none"]),
        "observed": observed(analyses),
        "seconds": round(time.perf_counter() - started, 1),
        "report": str(output / "report.html"),
    }
    write_report(runs, output / "report.html", "deit_fast demo: digits")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        write_json(save, {"meta": analyses[0]["meta"], **result})
    if save_analysis is not None:
        write_summary(analyses, save_analysis)
    return result


def write_digits(root: Path) -> None:
    """Write scikit-learn's digits as an image folder: `train` and `val`, a folder per digit.

    Every third image of each class belongs to `train`.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if seen[label] % TRAIN_EVERY else "train"
        seen[label] += 1
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:04d}.png"
        if not path.exists():
            grey = np.round(image * 255 / 16).astype(np.uint8)  # 17 grey levels, 0 .. 16
            Image.fromarray(grey).save(path)
