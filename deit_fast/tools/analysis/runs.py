"""`analyze`: measure runs, compare them, write the findings into the folder of each.

Each run folder gets `analysis/analysis.json`, `analysis/predictions.json` and pictures; the report
shows them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit_fast.data.eval import spaced_ids
from deit_fast.decisions import PREDICTIONS_FILE, describe_decisions
from deit_fast.errors import InputError
from deit_fast.runtime.distributed import choose_device, read_process_group
from deit_fast.runtime.environment import describe_command, describe_environment
from deit_fast.runtime.files import require_replaceable, write_json
from deit_fast.runtime.locks import owned_folder
from deit_fast.runtime.weights_header import WeightsChoice
from deit_fast.tools.analysis import measures, tokens
from deit_fast.tools.analysis.one_run import OpenRun, measure, open_run, undistilled
from deit_fast.tools.analysis.table import CLASSIFIERS
from deit_fast.tools.run_folder import ANALYSIS_FILE, ANALYSIS_FOLDER, ANALYSIS_FORMAT


def analyze(
    paths: list[Path],
    *,
    teacher: str | None = None,
    teacher_classes: str | None = None,
    teacher_mean: tuple[float, float, float] | None = None,
    teacher_std: tuple[float, float, float] | None = None,
    download: bool = False,
    data_root: str | None = None,
    weights: WeightsChoice = "last",
    max_images: int | None = None,
    sample: int | None = None,
    maps: int = 4,
    device: str = "auto",
    models: Sequence[str] = (),
    late_fusion: int | None = None,
) -> list[dict[str, Any]]:
    """Analyse finished runs on their held-out images; runs on the same images are compared.

    Args:
        paths: run folders with config.json and the chosen ``weights``, see ``load_run``.
        teacher: spec of the teacher of all runs; none: each run's own, see ``find_teacher``.
        teacher_classes, teacher_mean, teacher_std: as the settings; none: without ``teacher`` each
            run's own, with it what the teacher's weights or timm say.
        download: let timm fetch the weights of a teacher without a file; else such a teacher of a
            run is left out, and a given one refused.
        data_root: another image folder than that of the runs.
        max_images: use at most this many images, evenly spaced; none: all.
        sample: id of the held-out image that is shown at all temperatures and whose attention map
            comes first; none: the one for which the teacher's entropy is largest.
        maps: number of images with attention maps.
        device: auto, cpu or cuda.
        models: factories that runs may name as their model.
        late_fusion: train classifiers on both tokens' embeddings of this many training images of
            each run, see ``train_late_fusion``; none: without.

    Returns:
        A JSON object per run, as written to its `analysis/analysis.json`. A part that could not
        be measured is absent; `left_out` gives the reason.

    Raises:
        InputError: a run, its weights or data are missing or damaged, or another process analyses
            one of the runs.
        OSError: a run folder cannot be written.
    """
    if read_process_group().world_size > 1:
        raise InputError("analyze runs in one process: start it without torchrun")
    for path in paths:
        for name in (ANALYSIS_FILE, PREDICTIONS_FILE):
            require_replaceable(path / ANALYSIS_FOLDER / name)
    where = choose_device(device)
    runs = [
        open_run(
            path, where, teacher=teacher, teacher_classes=teacher_classes,
            teacher_mean=teacher_mean, teacher_std=teacher_std, download=download,
            data_root=data_root, weights=weights,
            max_images=max_images, sample=sample, models=models, late_fusion=late_fusion,
        )
        for path in paths
    ]  # fmt: skip
    with ExitStack() as locks:
        for folder in {(run.path / ANALYSIS_FOLDER).resolve() for run in runs}:
            locks.enter_context(owned_folder(folder, ".lock-analysis", "the analysis"))
        for number, run in enumerate(runs):
            measure(run, runs[:number], where)
        return [_write(run, runs, weights, sample, maps, where) for run in runs]


def _write(
    run: OpenRun, runs: list[OpenRun], weights: WeightsChoice, sample: int | None, maps: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Write a run's analysis into its folder; returns the content of its analysis.json."""
    found = describe(run, undistilled(run, runs), weights, device)
    folder = run.path / ANALYSIS_FOLDER
    first = sample
    if run.teacher is not None:
        found["teacher"]["sample"] = _sample(run, run.teacher, sample, device)
        first = found["teacher"]["sample"]["id"]
    reason = tokens.why_no_attention(run.model)
    if reason is None:
        found |= _attention(run, first, maps, folder, device)
    else:
        found["left_out"]["attention"] = reason
    write_json(folder / PREDICTIONS_FILE, _predictions(run))
    write_json(folder / ANALYSIS_FILE, found)
    return found


def _predictions(run: OpenRun) -> dict[str, Any]:
    """The content of predictions.json, with the teacher's decisions where there is one."""
    assert run.decisions is not None
    teacher = None
    if run.taught:
        teacher = run.taught["decision"].numpy(), run.taught["confidence"].numpy()
    content = describe_decisions(run.decisions, run.source, teacher)
    return {**content, "weights_digest": run.weights_digest}


def describe(
    run: OpenRun, plain: OpenRun | None, weights: WeightsChoice, device: torch.device
) -> dict[str, Any]:
    """All findings about a run except those about single images.

    Args:
        plain: the run without distillation to compare with.
    """
    student, config = run.student, run.config
    classifiers = [name for name in CLASSIFIERS if f"decision.{name}" in student]
    left_out: dict[str, str] = {}
    found: dict[str, Any] = {
        "format": ANALYSIS_FORMAT,
        "run": str(run.path),
        "meta": describe_environment(device)
        | {"date": time.strftime("%Y-%m-%d"), "command": describe_command()},
        "model": config.model.name,
        "distillation": config.loss.kind,
        "seed": config.seed,
        "weights": weights,
        "weights_digest": run.weights_digest,
        "images": len(student["labels"]),
        "held_out": run.source.num_samples,
        "classes": len(run.source.classes),
        "accuracy": {name: _mean(run.right(name)) for name in classifiers},
        "calibration": {
            name: measures.calibration(student[f"confidence.{name}"], run.right(name))
            for name in classifiers
        },
        "main": run.main,
    }
    if "cosines" not in student:
        left_out["tokens"] = left_out["heads"] = "the student has no distillation token"
    else:
        found["tokens"] = _tokens(run)
        if run.main == "mean_logits":
            found["heads"] = _heads(run)
        else:
            left_out["heads"] = f"training used the {run.main} head alone"
    if run.no_late_fusion is not None:
        left_out["late fusion"] = run.no_late_fusion
    if run.teacher is not None:
        right = run.taught["decision"] == student["labels"]
        found["teacher"] = {
            "spec": run.teacher.spec,
            "top1": _mean(right),
            "calibration": measures.calibration(run.taught["confidence"], right),
            "temperatures": measures.temperature_table(
                run.taught["entropy"], run.taught["mass"], run.teacher.num_classes
            ),
        }
    else:
        left_out["teacher"] = run.no_teacher
    found["disagreement"] = measures.disagreement(_decisions(run, plain))
    if plain is not None:
        found["undistilled"] = {"run": str(plain.path), "top1": _mean(plain.right(plain.main))}
    elif config.loss.kind != "none":
        left_out["undistilled"] = "no run with loss.kind none on the same images was given"
    found["left_out"] = left_out
    return found


def _mean(flags: Tensor) -> float:
    return flags.double().mean().item()


def _tokens(run: OpenRun) -> dict[str, Any]:
    layers = zip(tokens.layer_names(run.model), run.student["cosines"].unbind(1), strict=True)
    return {
        "learned": tokens.learned_cosine(run.model),
        "layers": [{"name": name, **measures.spread(values)} for name, values in layers],
    }


def _heads(run: OpenRun) -> dict[str, Any]:
    student = run.student
    return {
        "weight_cosine": measures.spread(tokens.head_cosines(run.model)),
        "agreement": _mean(student["decision.class"] == student["decision.distillation"]),
        "probability_cosine": measures.spread(student["probability_cosine"]),
    }


def _decisions(run: OpenRun, plain: OpenRun | None) -> dict[str, Tensor]:
    """Decisions of each classifier, in the order of DeiT's table 4."""
    decisions = {"truth": run.student["labels"]}
    if run.taught:
        decisions["teacher"] = run.taught["decision"]
    if plain is not None:
        decisions["undistilled"] = plain.student[f"decision.{plain.main}"]
    names = {"class": "class", "distillation": "distillation", "both": "mean_logits"}
    if run.main != "mean_logits":
        names = {"student": run.main}
    return decisions | {name: run.student[f"decision.{key}"] for name, key in names.items()}


def _identity(run: OpenRun, index: int) -> dict[str, Any]:
    label = run.source.classes[int(run.source.labels[index])]
    return {"id": index, "path": run.source.paths[index], "label": label}


def _sample(run: OpenRun, teacher: Any, sample: int | None, device: torch.device) -> dict[str, Any]:
    """The teacher's probabilities of one image at all temperatures."""
    if sample is None:
        sample = int(run.ids[int(run.taught["entropy"][:, 0].argmax())])
    logits = teacher(run.images([sample], device))[0].float().cpu()
    rows = measures.soften_sample(logits, run.source.classes)
    return {**_identity(run, sample), "temperatures": rows}


def _attention(
    run: OpenRun, first: int | None, count: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Draw attention maps of some images into ``folder``.

    Args:
        first: id of the image that comes first.
        count: number of images.

    Returns:
        Empty, or `attention` with `tiles` (the content of a strip, left to right) and `samples`.
    """
    ids = spaced_ids(run.source.num_samples, count).tolist() if count else []
    if first is not None and count:
        ids = [first, *(i for i in ids if i != first)][:count]
    for path in folder.glob("attention-*.png"):
        path.unlink()  # of an earlier analysis, which may have shown other images
    if not ids:
        return {}
    images = run.images(ids, device)
    weights = tokens.attention_weights(run.model, images)
    names = tokens.token_names(run.model)
    last = tokens.token_maps(run.model, weights[-1].mean(1))
    through = tokens.token_maps(run.model, tokens.rollout(weights))
    mean, std = run.config.view.mean, run.config.view.std
    rows = []
    for row, index in enumerate(ids):
        maps = torch.cat([last, through], 1)[row]
        rows.append(
            {
                **_identity(run, index),
                "on_patches": dict(zip(names, last[row].sum((1, 2)).tolist(), strict=True)),
                "picture": tokens.draw_strip(folder, index, images[row], mean, std, maps),
            }
        )
    tiles = ["image", *(f"{name} token" for name in names), *(f"{n} rollout" for n in names)]
    return {"attention": {"tiles": tiles, "samples": rows}}
