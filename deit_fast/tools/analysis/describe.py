"""What a run's answers say, as the JSON object that its analysis keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit_fast.runtime.environment import describe_command, describe_environment
from deit_fast.tools.analysis import measures, pictures, tokens
from deit_fast.tools.analysis.answers import spaced_ids
from deit_fast.tools.analysis.subject import Subject, held_out_images
from deit_fast.tools.analysis.teachers import soften_sample
from deit_fast.tools.run_folder import ANALYSIS_FORMAT

CLASSIFIERS = ("class", "distillation", "sum_logits", "sum_softmax")


def describe(
    subject: Subject, twin: Subject | None, ema: bool, device: torch.device
) -> dict[str, Any]:
    """All figures of a run but those that need single images.

    Args:
        twin: the run without distillation to compare with.
    """
    answers, config = subject.answers, subject.config
    labels = answers["labels"]
    left_out: dict[str, str] = {}
    found: dict[str, Any] = {
        "format": ANALYSIS_FORMAT,
        "run": str(subject.path),
        "meta": describe_environment(device)
        | {"date": time.strftime("%Y-%m-%d"), "command": describe_command()},
        "model": config.model.name,
        "distillation": config.loss.kind,
        "seed": config.seed,
        "weights": "ema" if ema else "model",
        "images": len(labels),
        "held_out": subject.source.num_samples,
        "classes": len(subject.source.classes),
        "accuracy": {},
        "calibration": {},
    }
    for name in CLASSIFIERS:
        if f"decision.{name}" not in answers:
            continue
        right = answers[f"decision.{name}"] == labels
        found["accuracy"][name] = right.double().mean().item()
        found["calibration"][name] = measures.calibration(answers[f"confidence.{name}"], right)
    found["main"] = subject.main
    model: Any = subject.model
    reason = tokens.why_no_cosines(model)
    if reason is None:
        found["tokens"] = {
            "learned": tokens.learned_cosine(model),
            "layers": [
                {"name": name, **measures.spread(answers["cosines"][:, layer])}
                for layer, name in enumerate(subject.layers)
            ],
        }
        one, two = answers["decision.class"], answers["decision.distillation"]
        found["heads"] = {
            "weight_cosine": measures.spread(tokens.head_cosines(model)),
            "agreement": (one == two).double().mean().item(),
            "probability_cosine": measures.spread(answers["probability_cosine"]),
        }
    else:
        left_out["tokens"] = left_out["heads"] = reason
    found |= _teaching(subject, left_out)
    found["disagreement"] = measures.disagreement(_decisions(subject, twin))
    if twin is not None:
        found["undistilled"] = {
            "run": str(twin.path),
            "top1": (twin.answers[f"decision.{twin.main}"] == labels).double().mean().item(),
        }
    elif config.loss.kind != "none":
        left_out["undistilled"] = "no run with loss.kind none on the same images was given"
    found["left_out"] = left_out
    return found


def _decisions(subject: Subject, twin: Subject | None) -> dict[str, Tensor]:
    """In the order of DeiT's table 4."""
    answers = subject.answers
    decisions = {"truth": answers["labels"]}
    if subject.taught:
        decisions["teacher"] = subject.taught["decision"]
    if twin is not None:
        decisions["undistilled"] = twin.answers[f"decision.{twin.main}"]
    if subject.main == "class":
        return decisions | {"student": answers["decision.class"]}
    return decisions | {
        "class": answers["decision.class"],
        "distillation": answers["decision.distillation"],
        "both": answers["decision.sum_logits"],
    }


def _teaching(subject: Subject, left_out: dict[str, str]) -> dict[str, Any]:
    teacher, taught = subject.teacher, subject.taught
    if teacher is None:
        left_out["teacher"] = subject.no_teacher
        return {}
    right = taught["decision"] == subject.answers["labels"]
    return {
        "teacher": {
            "spec": teacher.spec,
            "top1": right.double().mean().item(),
            "calibration": measures.calibration(taught["confidence"], right),
            "temperatures": measures.temperature_table(
                taught["entropy"], taught["mass"], teacher.num_classes
            ),
        }
    }


def softening(subject: Subject, sample: int | None, device: torch.device) -> dict[str, Any]:
    """One image's answers at all temperatures."""
    assert subject.teacher is not None
    if sample is None:
        sample = int(subject.ids[int(subject.taught["entropy"][:, 0].argmax())])
    logits = subject.teacher(held_out_images(subject, [sample], device))[0].float().cpu()
    return {
        **_identity(subject, sample),
        "temperatures": soften_sample(logits, subject.source.classes),
    }


def _identity(subject: Subject, index: int) -> dict[str, Any]:
    source = subject.source
    return {
        "id": index,
        "path": source.paths[index],
        "label": source.classes[int(source.labels[index])],
    }


def attention(
    subject: Subject,
    first: int | None,
    count: int,
    folder: Path,
    device: torch.device,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Draw attention of some images into ``folder``; where that cannot be, say so in ``left_out``.

    Args:
        first: id of the image that comes first.
        count: images.

    Returns:
        Empty, or `attention` with `tiles` (what a strip shows, from the left) and `samples`.
    """
    reason = tokens.why_no_attention(subject.model)
    if reason is not None:
        left_out["attention"] = reason
        return {}
    ids = spaced_ids(subject.source.num_samples, count).tolist() if count else []
    if first is not None and count:
        ids = [first, *(i for i in ids if i != first)][:count]
    pictures.remove_strips(folder)
    if not ids:
        return {}
    images = held_out_images(subject, ids, device)
    weights = tokens.attention_weights(subject.model, images)
    names = tokens.token_names(subject.model)
    last = tokens.token_maps(subject.model, weights[-1].mean(1))
    through = tokens.token_maps(subject.model, tokens.rollout(weights))
    view, rows = subject.config.view, []
    for place, index in enumerate(ids):
        name = pictures.draw_strip(
            folder, index, images[place], view.mean, view.std, torch.cat([last, through], 1)[place]
        )
        rows.append(
            {
                **_identity(subject, index),
                "on_patches": dict(zip(names, last[place].sum((1, 2)).tolist(), strict=True)),
                "picture": name,
            }
        )
    tiles = ["image", *(f"{name} token" for name in names), *(f"{n} rollout" for n in names)]
    return {"attention": {"tiles": tiles, "samples": rows}}
