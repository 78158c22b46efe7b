"""One run: its weights, held-out images and teacher, and a pass through student and teacher.

Logits are reduced to a few values per image: those of 50,000 images, 1,000 classes and three
classifiers would take 600 MB.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.cache.format import read_manifest
from deit_fast.config import RunConfig
from deit_fast.data.eval import Subset, spaced_ids
from deit_fast.data.sources import Source
from deit_fast.decisions import Decisions, Rows
from deit_fast.errors import CacheError, InputError
from deit_fast.evaluation import (
    build_eval_loader,
    load_run,
    train_late_fusion,
    warn_of_substitutes,
    why_no_late_fusion,
)  # fmt: skip
from deit_fast.inputs import why_download
from deit_fast.models.fuse import head_tokens
from deit_fast.models.late_fusion import apply_late_fusion
from deit_fast.models.student import apply_heads, forward_heads, require_no_code, trained_head
from deit_fast.models.teacher import Teacher, load_class_matched_teacher
from deit_fast.models.weights import digest_weights
from deit_fast.runtime.distributed import has_bf16
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.weights_header import WeightsChoice
from deit_fast.tools.analysis.measures import softening
from deit_fast.tools.analysis.tokens import recorded_cosines
from deit_fast.tools.run_folder import read_object

log = logging.getLogger("deit_fast")

Values = dict[str, Tensor]  # name to values of all images, on the CPU


@dataclass
class OpenRun:
    """A run that is analysed.

    Attributes:
        ids: the held-out images that are used, [N].
        no_teacher: why ``teacher`` is None.
        data_digest, weights_digest: of the held-out images, of the weights.
        late_fusion: classifiers on both tokens' embeddings; none: not asked for, or not possible.
        no_late_fusion: why it is not possible.
        student, taught: values per image of student and teacher, see ``measure``.
        decisions: of the classifier that ``main`` names.
    """

    path: Path
    config: RunConfig
    source: Source
    ids: np.ndarray
    model: nn.Module
    teacher: Teacher | None
    no_teacher: str
    data_digest: str
    weights_digest: str
    late_fusion: dict[str, nn.Linear] = field(default_factory=dict)
    no_late_fusion: str | None = None
    student: Values = field(default_factory=dict)
    taught: Values = field(default_factory=dict)
    decisions: Rows | None = None

    @property
    def main(self) -> str:
        """The classifier whose accuracy ``evaluate`` reports."""
        names = ("mean_logits", "class", "distillation")
        return next(name for name in names if f"decision.{name}" in self.student)

    def right(self, classifier: str) -> Tensor:
        """Whether each decision is the label, bool [N]."""
        return self.student[f"decision.{classifier}"] == self.student["labels"]

    def images(self, ids: list[int], device: torch.device) -> Tensor:
        """Held-out images by id, [n, 3, S, S], as evaluation makes them."""
        config = self.config.replace(batch_size=len(ids), data={"workers": 0})
        return next(iter(build_eval_loader(config, Subset(self.source, np.array(ids)), device)))[0]


def open_run(
    path: Path,
    device: torch.device,
    *,
    teacher: str | None,
    teacher_classes: str | None,
    teacher_mean: tuple[float, float, float] | None,
    teacher_std: tuple[float, float, float] | None,
    download: bool,
    data_root: str | None,
    weights: WeightsChoice,
    max_images: int | None,
    sample: int | None,
    models: Sequence[str],
    late_fusion: int | None,
) -> OpenRun:
    """Load a run; arguments as of ``analyze``.

    Raises:
        InputError: the run, its weights or its data are missing or damaged.
    """
    config, source, model = load_run(path, data_root, weights, models)
    if sample is not None and not 0 <= sample < source.num_samples:
        raise InputError(
            f"--sample {sample}: held-out images of {path} are 0 to {source.num_samples - 1}"
        )
    file = path / "result.json"  # a run without it can be analysed: its weights are there
    result = read_object(file) if os.path.lexists(file) else {}
    if teacher is not None:
        config = config.with_teacher(teacher)
    flags = {
        "teacher_classes": teacher_classes, "teacher_mean": teacher_mean, "teacher_std": teacher_std
    }  # fmt: skip
    config = config.replace(**{name: flag for name, flag in flags.items() if flag is not None})
    found, reason = find_teacher(
        path, config, result, teacher is not None, source.classes, download
    )
    model.to(device).eval()
    reason_against, heads = None, {}
    if late_fusion is not None:
        reason_against = why_no_late_fusion(model)
        if reason_against is None:
            heads = train_late_fusion(config, source.classes, model, device, late_fusion)
    return OpenRun(
        path=path,
        config=config,
        source=source,
        ids=spaced_ids(source.num_samples, max_images),
        model=model,
        teacher=None if found is None else found.to_device(device),
        no_teacher=reason,
        late_fusion=heads,
        no_late_fusion=reason_against,
        data_digest=str(source.fingerprint()["dataset.sha256"]),
        weights_digest=digest_weights(model),
    )


def undistilled(run: OpenRun, runs: Sequence[OpenRun]) -> OpenRun | None:
    """The run without distillation on the same images to compare a distilled run with.

    Of several, the most similar one: first by model apart from the distillation token, then by
    seed, then by view.seed.
    """
    if run.config.loss.kind == "none":
        return None

    def differs(other: OpenRun) -> tuple[bool, bool, bool]:
        names = {r.config.model.name.replace("distilled_", "") for r in (run, other)}
        own, its = run.config, other.config
        return len(names) > 1, its.seed != own.seed, its.view.seed != own.view.seed

    plain = [
        other
        for other in runs
        if other.config.loss.kind == "none"
        and other.data_digest == run.data_digest
        and np.array_equal(other.ids, run.ids)
    ]
    return min(plain, key=differs, default=None)


# ---------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------


def find_teacher(
    run: Path,
    config: RunConfig,
    result: dict[str, Any],
    is_given: bool,
    classes: Sequence[str],
    download: bool,
) -> tuple[Teacher | None, str]:
    """The teacher of a run, or the reason why there is none.

    It is named by the configuration, or else by the run's cache, with the normalisation that the
    cache records. One that the user did not give must be a timm model whose weights have the
    digest that the run recorded.

    Args:
        config: of the run, with what the user gives in place of the run's teacher.
        result: content of the run's result.json, or empty.
        is_given: whether the user names the teacher.
        classes: of the data.
        download: let timm fetch weights that no file has.

    Raises:
        InputError: a given teacher cannot be loaded, or its classes do not fit.
    """
    recorded = _recorded_by_cache(config, result)
    digest = recorded.get("teacher.weights_sha256")
    if is_given:
        assert config.teacher is not None
        if not download and (why := why_download(config.teacher)):
            raise InputError(why)
        teacher = load_class_matched_teacher(config, classes, targets=["logits"])
        if digest is not None and digest != digest_weights(teacher.model):
            log.warning("%s is not the teacher that the run was trained with", config.teacher)
        elif flags := _differing_flags(teacher, recorded):
            log.warning("%s has the weights of the run's teacher, but %s", config.teacher, flags)
        return teacher, ""
    if config.loss.kind == "none":
        return None, "the run was trained without a teacher; --teacher SPEC adds one"
    spec = config.teacher or recorded.get("teacher.spec")
    if not isinstance(spec, str):
        return None, "neither the run nor its cache names a teacher; name it by --teacher SPEC"
    if config.teacher is None and "teacher.mean" in recorded:
        mean, std = recorded["teacher.mean"], recorded["teacher.std"]
        size = recorded.get("teacher.size")
        config = config.replace(teacher_mean=mean, teacher_std=std, teacher_size=size)
    if not download and (why := why_download(spec)):
        return None, why
    try:
        if not spec.startswith("timm:"):
            require_no_code(spec.partition("@")[0], (), str(run), "--teacher")
        named = config.replace(teacher=spec)
        teacher = load_class_matched_teacher(named, classes, targets=["logits"])
    except InputError as error:
        return None, f"{error}; name it by --teacher SPEC"
    if digest == digest_weights(teacher.model) or (digest is None and config.teacher is not None):
        flags = _differing_flags(teacher, recorded)
        return (None, f"{spec}: {flags}") if flags else (teacher, "")
    if config.teacher is None:
        return None, (
            f"the cache names {spec} but not the file of its weights; name it by "
            f"--teacher {spec}@FILE"
        )
    return None, (
        f"the weights of {spec} have changed since the training; name the run's teacher by "
        f"--teacher SPEC"
    )


def _differing_flags(teacher: Teacher, recorded: dict[str, Any]) -> str:
    """What to do where the run's teacher had another normalisation or other classes; or empty."""
    flags = {"mean": "--teacher-mean", "std": "--teacher-std", "columns": "--teacher-classes"}
    if "teacher.mean" not in recorded:
        return ""
    own = teacher.expected_fields(recorded)
    differing = [
        flag for name, flag in flags.items()
        if own.get(f"teacher.{name}") != recorded.get(f"teacher.{name}")
    ]  # fmt: skip
    return f"is used otherwise: give {' and '.join(differing)} as then" if differing else ""


def _recorded_by_cache(config: RunConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Fields `teacher.*` of the cache's fingerprint, from the run or from the cache's manifest."""
    recorded = result.get("teacher")
    if isinstance(recorded, dict) and "teacher.weights_sha256" in recorded:
        return recorded
    if config.cache is None:
        return {}
    try:
        return read_manifest(Path(config.cache))["fingerprint"]
    except (CacheError, OSError):
        return {}


# ---------------------------------------------------------------------------------------------
# One pass over the images
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(run: OpenRun, earlier: Sequence[OpenRun], device: torch.device) -> None:
    """Fill in ``student`` and ``taught`` of a run by one pass over its images.

    Tables of [N] values. The student's: `labels`, `decision.X` and `confidence.X` for its
    classifiers X (see ``student_values``), and with two heads `probability_cosine` and `cosines`
    [N, layers]. The teacher's: `decision`, `confidence`, `entropy`
    [N, T], `mass` [N, T, K]; they are taken from an earlier run with equal teacher and images. The
    forward, its precision and the mean of the heads are those of ``evaluate``.

    Raises:
        InputError: logits are not finite.
    """
    known = next((other for other in earlier if _same_teacher_and_pixels(other, run)), None)
    label = f"analyze {run.path}"
    log.info("%s: %d held-out images", label, len(run.ids))
    student: list[Values] = []
    taught: list[Values] = []
    decisions = Decisions()
    loader = build_eval_loader(run.config, Subset(run.source, run.ids), device)
    bar = Progress(label, len(run.ids), unit="image")
    with recorded_cosines(run.model) as cosines, bar:
        for images, labels, ids in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                if run.late_fusion:
                    both = head_tokens(run.model, images)  # type: ignore[arg-type]
                    heads = apply_heads(run.model, both)
                else:
                    heads = forward_heads(run.model, images)
            values = {"labels": labels, **student_values(*heads, only=trained_head(run.model))}
            decisions.add(ids, labels, heads[0] if heads[1] is None else (heads[0] + heads[1]) / 2)
            if run.late_fusion:
                for fusion, logits in apply_late_fusion(run.late_fusion, both).items():
                    values |= _decide(f"fusion_{fusion}", logits, logits.softmax(1))
            if cosines:
                values["cosines"] = torch.stack(cosines, dim=1)
                cosines.clear()
            student.append(values)
            if run.teacher is not None and known is None:
                taught.append(_teacher_values(run.teacher(images)))
            bar.advance(len(labels))
    warn_of_substitutes(loader.substituted)
    found = decisions.rows()
    run.decisions = found._replace(ids=run.ids[found.ids])
    run.student = _join(student, f"{label}: the student's logits")
    run.taught = _join(taught, f"{label}: the teacher's logits") if known is None else known.taught


def _same_teacher_and_pixels(one: OpenRun, two: OpenRun) -> bool:
    if one.teacher is None or two.teacher is None:
        return False
    views = [
        (r.config.view.image_size, r.config.view.mean, r.config.view.std, r.config.data.eval_crop)
        for r in (one, two)
    ]
    same_images = views[0] == views[1] and one.data_digest == two.data_digest
    return same_images and one.teacher.fingerprint() == two.teacher.fingerprint()


def _join(batches: list[Values], what: str) -> Values:
    """Values of all batches on the CPU; ``what`` is named where they are not finite."""
    names = batches[0] if batches else ()
    joined = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in names}
    for name, value in joined.items():
        if name.startswith("confidence") and not bool(torch.isfinite(value).all()):
            raise InputError(f"{what} are not finite")
    return joined


def student_values(
    class_logits: Tensor, distill_logits: Tensor | None, only: str = "both"
) -> Values:
    """Decisions and confidences of the heads and of their means, from logits [B, C].

    Classifiers: with two heads `class`, `distillation`, `mean_logits` (as ``evaluate`` and DeiT's
    code) and `mean_softmax` (as DeiT's paper); with one `class`, or as ``only`` names it.
    """
    class_probs = class_logits.float().softmax(1)
    if distill_logits is None:
        return _decide("class" if only == "both" else only, class_logits, class_probs)
    probs = distill_logits.float().softmax(1)
    mean = (class_logits + distill_logits) / 2
    both = (class_probs + probs) / 2
    return {
        **_decide("class", class_logits, class_probs),
        **_decide("distillation", distill_logits, probs),
        **_decide("mean_logits", mean, mean.float().softmax(1)),
        **_decide("mean_softmax", both, both),
        "probability_cosine": F.cosine_similarity(class_probs, probs, dim=1),
    }


def _decide(name: str, scores: Tensor, probs: Tensor) -> Values:
    decision = scores.argmax(1)
    confidence = probs.gather(1, decision[:, None])[:, 0]
    return {f"decision.{name}": decision, f"confidence.{name}": confidence}


def _teacher_values(logits: Tensor) -> Values:
    logits = logits.float()
    decision = logits.argmax(1)
    entropy, mass = softening(logits)
    confidence = logits.softmax(1).gather(1, decision[:, None])[:, 0]
    return {"decision": decision, "confidence": confidence, "entropy": entropy, "mass": mass}
