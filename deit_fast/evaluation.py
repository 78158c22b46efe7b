"""Accuracy of a model on held-out images, for each head and each class."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deit_fast.config import RunConfig
from deit_fast.config_file import load_config
from deit_fast.data.eval import EvalLoader, Subset, spaced_ids
from deit_fast.data.open import open_source
from deit_fast.data.sources import Source, digest_images, say_warnings
from deit_fast.decisions import Decisions
from deit_fast.errors import InputError, translate_errors
from deit_fast.inputs import data_at
from deit_fast.models.fuse import head_tokens
from deit_fast.models.late_fusion import apply_late_fusion, fit_late_fusion
from deit_fast.models.student import (
    apply_heads,
    build_model,
    forward_heads,
    mean_logits,
    require_no_code,
    top_classes,
    trained_head,
)  # fmt: skip
from deit_fast.models.weights import digest_state, fit_weights, load_weights, read_identity
from deit_fast.runtime.distributed import ProcessGroup, choose_device, has_bf16
from deit_fast.runtime.files import read_json
from deit_fast.runtime.pipeline_time import loading_processes
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.weights_header import WeightsChoice, require_weights

log = logging.getLogger("deit_fast")

Heads: TypeAlias = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate, and how.

    Attributes:
        model: a classifier; its training mode is restored afterwards.
        forward: computes both heads' logits; None: ``forward_heads``.
        rows: images in each forward. A smaller batch is padded with zeros and the padding's logits
            are dropped, so that compiled code sees one batch size.
        decisions: collects the decision about each image of this process.
    """

    model: nn.Module
    forward: Heads | None = None
    rows: int | None = None
    decisions: Decisions | None = None


def evaluate_model(
    model: nn.Module,
    loader: Any,
    classes: list[str],
    device: torch.device,
    group: ProcessGroup | None = None,
    between_batches: Callable[[], None] = lambda: None,
    **how: Any,
) -> dict[str, Any]:
    """``evaluate_models`` of one model.

    Args:
        how: further attributes of ``Evaluated``.
    """
    models = [Evaluated(model, **how)]
    return evaluate_models(models, loader, classes, device, group, between_batches)[0]


@torch.no_grad()
def evaluate_models(
    models: Sequence[Evaluated],
    loader: Any,
    classes: list[str],
    device: torch.device,
    group: ProcessGroup | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Top-1 accuracy of the mean of both heads' logits, as DeiT's code (its paper: of softmaxes).

    All models see the images in one pass; the result of each is that of a pass of its own.

    Args:
        loader: yields (images float [B, 3, S, S], labels int64 [B], indices), on ``device``; with
            several processes it has a length.
        classes: class names, by label.
        group: processes that evaluate one share of the images each; the result covers all shares.
        between_batches: called after each batch, equally often on all ranks; may raise.

    Returns:
        For each model `top1` (of the mean), `loss` (cross-entropy), `samples`, `per_class` (name to
        accuracy, without classes that have no samples); for two heads `top1_class` and
        `top1_distill`; with more than five classes `top5` (of the mean).

    Raises:
        InputError: the loader has no images.
    """
    modes = [(each.model, each.model.training) for each in models]
    tallies = [_Tally(each, len(classes), device) for each in models]
    group = group or ProcessGroup()
    rounds = max(group.gather(len(loader))) if group.world_size > 1 else 0  # shares differ by one
    for each in models:
        each.model.eval()
    for images, labels, ids in loader:
        for tally in tallies:
            own = images if tally is tallies[-1] else images.clone()  # a model may write into it
            tally.add(own, labels, ids)
        rounds -= 1
        between_batches()
    for _ in range(rounds):
        between_batches()
    for model, was_training in modes:
        model.train(was_training)
    return [tally.result(classes, group) for tally in tallies]


class _Tally:
    """The correct decisions of one model, counted on the device."""

    def __init__(self, evaluated: Evaluated, num_classes: int, device: torch.device) -> None:
        self._evaluated, self._device = evaluated, device
        self._hits = torch.zeros(4, device=device)
        self._loss = torch.zeros((), device=device)
        self._per_class = torch.zeros(2, num_classes, device=device)
        self._samples, self._has_two_heads = 0, False
        self._has_top5 = num_classes > 5

    def add(self, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        how, hits = self._evaluated, self._hits
        with torch.autocast(self._device.type, torch.bfloat16, enabled=has_bf16(self._device)):
            class_logits, distill_logits = _logits(how, images)
        mean = mean_logits(class_logits, distill_logits)
        self._loss += cross_entropy(mean.float(), labels, reduction="sum")
        if how.decisions is not None:
            how.decisions.add(ids, labels, mean)
        right = mean.argmax(1) == labels
        hits[0] += right.sum()
        hits[1] += (class_logits.argmax(1) == labels).sum()
        if distill_logits is not None:
            self._has_two_heads = True
            hits[2] += (distill_logits.argmax(1) == labels).sum()
        if self._has_top5:
            hits[3] += (top_classes(mean, 5) == labels[:, None]).sum()
        # bincount and labels[right] would make the host wait for the GPU at every batch.
        self._per_class[0].index_add_(0, labels, right.float())
        self._per_class[1].index_add_(0, labels, torch.ones_like(right, dtype=torch.float32))
        self._samples += len(labels)

    def result(self, classes: list[str], group: ProcessGroup) -> dict[str, Any]:
        """As ``evaluate_models``; all processes of ``group`` must call this together."""
        sums = [self._samples, self._loss.item()]
        totals = torch.tensor(sums, dtype=torch.float64, device=self._device)
        group.sum(self._hits, self._per_class, totals)
        samples, total_loss = int(totals[0]), totals[1].item()
        if samples == 0:
            raise InputError("evaluation saw no images")
        shares = (self._hits / samples).tolist()
        result: dict[str, Any] = {"top1": shares[0], "loss": total_loss / samples}
        result["samples"] = samples
        if self._has_two_heads:
            result |= {"top1_class": shares[1], "top1_distill": shares[2]}
        if self._has_top5:
            result["top5"] = shares[3]
        right_of, total_of = self._per_class.tolist()
        result["per_class"] = {
            name: right / total
            for name, right, total in zip(classes, right_of, total_of, strict=True)
            if total
        }
        return result


def _logits(how: Evaluated, images: Tensor) -> tuple[Tensor, Tensor | None]:
    count = len(images)
    if how.rows is not None and count < how.rows:
        images = torch.cat([images, images.new_zeros((how.rows - count, *images.shape[1:]))])
    class_logits, distill_logits = (how.forward or forward_heads)(how.model, images)
    return class_logits[:count], None if distill_logits is None else distill_logits[:count]


def build_eval_loader(
    config: RunConfig, source: Any, device: torch.device, group: ProcessGroup | None = None
) -> EvalLoader:
    """This rank's share of the held-out images, resized, centre cropped and normalised."""
    group = group or ProcessGroup()
    return EvalLoader(
        source,
        image_size=config.view.image_size,
        crop=config.data.eval_crop,
        mean=config.view.mean,
        std=config.view.std,
        batch_size=max(1, config.batch_size // group.world_size),
        workers=loading_processes(config.data.workers),
        on_error=config.data.on_error,
        device=device,
        rank=group.rank,
        world_size=group.world_size,
    )


def read_run_config(run: str | Path) -> RunConfig:
    """The configuration saved in a run folder.

    Raises:
        InputError: the folder or its config.json is missing or damaged.
    """
    path = Path(run) / "config.json"
    if not os.path.lexists(path):
        raise InputError(f"{run} is no run folder: {path} does not exist")
    return load_config(str(path), RunConfig())


def load_run(
    run: str | Path,
    data_root: str | None = None,
    weights: WeightsChoice = "last",
    models: Sequence[str] = (),
) -> tuple[RunConfig, Source, nn.Module]:
    """Configuration, held-out images and model of a finished run.

    Labels follow the run's class names. One line says where a run does not record them, which of
    its classes have no image, and that these are not the run's images.

    Args:
        run: run folder with config.json and the chosen weights.
        data_root: image folder; None: the run's own.
        weights: those of the last step, their moving average, or those of the best evaluation.
        models: factories that the run may name: code runs only if the user names it.

    Raises:
        InputError: no such run, weights or data; the data has a class that the run lacks; the run
            names a factory that is not in ``models``.
    """
    config = read_run_config(run)
    require_no_code(config.model.name, models, str(Path(run) / "config.json"), "--model")
    if data_root is not None:
        config = config.replace(data=data_at(config.data, data_root, "val"))
    file = require_weights(run, weights)
    state = load_weights(file)
    _compare_result(file, state)
    facts = read_identity(file)
    classes = _recorded_classes(Path(run), facts)
    source = open_source(config.data, "val", config.view.image_size, classes)
    _compare_images(run, source, classes, facts)
    model = build_model(config, len(source.classes))
    fit_weights(model, state, file)
    return config, source, model


def _compare_result(weights: Path, state: dict[str, torch.Tensor]) -> None:
    """Log where result.json is of other weights; those of earlier versions do not say."""
    path = weights.with_name("result.json")
    known = read_json(path).get("weights") if os.path.lexists(path) else None
    digest = known.get(weights.name) if isinstance(known, dict) else None
    if digest is not None and digest != digest_state(state):
        log.warning("%s has other weights than the run that wrote %s", weights, path)


def _recorded_classes(run: Path, facts: dict[str, Any]) -> list[str] | None:
    """Class names from the weights, or from result.json, where runs of earlier versions have them;
    None where there are none."""
    names, path = facts.get("data.classes"), run / "result.json"
    if names is None and os.path.lexists(path):
        names = read_json(path).get("classes")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names or None if is_list else None


def _compare_images(
    run: str | Path, source: Source, classes: list[str] | None, facts: dict[str, Any]
) -> None:
    """Log what is not known of the held-out images, or is not as in training."""
    if classes is None:
        log.warning("%s does not record its classes: labels are taken as their order here", run)
    elif "val.images" in facts and _are_others(source, facts):
        log.warning("%s are other images than those held out in %s", source.folder, run)
    counts = np.bincount(source.labels, minlength=len(source.classes))
    missing = [source.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    if missing:
        log.warning(
            "%s has no image of %d of the %d classes of %s, the first is %r",
            source.folder, len(missing), len(source.classes), run, missing[0],
        )  # fmt: skip


def why_no_late_fusion(model: nn.Module) -> str | None:
    """Why the embeddings of two tokens cannot be fused; None where they can."""
    if not isinstance(model, VisionTransformerDistilled):
        return "the student has no distillation token"
    head = trained_head(model)
    return None if head == "both" else f"training used the {head} head alone"


@torch.no_grad()
def train_late_fusion(
    config: RunConfig, classes: list[str], model: nn.Module, device: torch.device, images: int
) -> dict[str, nn.Linear]:
    """Classifiers on the frozen embeddings of the run's training images, as evaluation sees them.

    Args:
        classes: of the model's logits.
        model: in evaluation mode, on ``device``.
        images: at most this many, evenly spaced over the training images.

    Raises:
        InputError: the training images are missing, or of other classes.
    """
    source = open_source(config.data, "train", config.view.image_size)
    if source.classes != classes:
        raise InputError(
            f"late fusion is trained on {source.folder}, whose {len(source.classes)} classes are "
            f"not the {len(classes)} of the run"
        )
    chosen = Subset(source, spaced_ids(source.num_samples, images))
    log.info("late fusion: embeddings of %d training images", chosen.num_samples)
    loader = build_eval_loader(config, chosen, device)
    tokens, labels = [], []
    for batch, of_batch, _ in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            tokens.append(head_tokens(model, batch)[:, :2].float())  # type: ignore[arg-type]
        labels.append(of_batch)
    warn_of_substitutes(loader.substituted)
    return fit_late_fusion(torch.cat(tokens), torch.cat(labels), len(classes))


@torch.no_grad()
def evaluate_late_fusion(
    model: nn.Module, heads: dict[str, nn.Linear], loader: Any, device: torch.device
) -> dict[str, dict[str, float]]:
    """`top1` and `loss` of ``heads`` and, to compare, of the mean of the two heads' softmaxes.

    Args:
        model, loader: as of ``evaluate_models``.
    """
    sums: dict[str, Tensor] = {}
    samples = 0
    for images, labels, _ in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            tokens = head_tokens(model, images)  # type: ignore[arg-type]
            pair = apply_heads(model, tokens)
        softmaxes = [logits.float().softmax(1) for logits in pair if logits is not None]
        scores = {"mean_softmax": torch.stack(softmaxes).mean(0).log()}
        scores |= {f"fusion_{key}": x for key, x in apply_late_fusion(heads, tokens).items()}
        for name, logits in scores.items():
            right = (logits.argmax(1) == labels).sum()
            both = torch.stack([right, cross_entropy(logits, labels, reduction="sum")]).double()
            sums[name] = sums[name] + both if name in sums else both
        samples += len(labels)
    shares = {name: (both / samples).tolist() for name, both in sums.items()}
    return {name: {"top1": top1, "loss": loss} for name, (top1, loss) in shares.items()}


def evaluation_text(result: dict[str, Any]) -> str:
    """An evaluation as text for the log: that of the mean, of each head and of the average."""
    parts = (("class", "top1_class"), ("distillation", "top1_distill"), ("average", "ema_top1"))
    others = [f"{name} {100 * result[key]:.2f} %" for name, key in parts if key in result]
    text = f"top-1 {100 * result['top1']:.2f} %" + (f" ({', '.join(others)})" if others else "")
    if "top5" in result:
        text += f"  top-5 {100 * result['top5']:.2f} %"
    return f"{text}  loss {result['loss']:.4f}"


def warn_of_substitutes(paths: Sequence[str]) -> None:
    """Say that others were evaluated in place of unreadable images, and that Pillow warned."""
    say_warnings()
    if paths:
        log.warning("%d unreadable images were substituted, the first is %s", len(paths), paths[0])


def _are_others(source: Source, facts: dict[str, Any]) -> bool:
    """Whether names, sizes or classes of the images differ, or the pixels of those recorded."""
    if facts["val.images"] != source.fingerprint():
        return True
    pixels, known = digest_images(source), facts.get("val.pixels")
    if not isinstance(known, dict):
        return False
    return any(pixels.get(path, digest) != digest for path, digest in known.items())


def evaluate(
    run: str,
    *,
    data_root: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    weights: WeightsChoice = "last",
    models: Sequence[str] = (),
    late_fusion: int | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run's weights on its held-out images.

    Args:
        run, data_root, weights, models: as of ``load_run``.
        batch_size: images of each forward; None: the run's.
        device: auto, cpu or cuda.
        late_fusion: as `images` of ``train_late_fusion``: the result has `late_fusion` too, see
            ``evaluate_late_fusion``.

    Raises:
        InputError: as ``load_run``, the run's student has no late fusion, or its logits are not
            finite.
        MemoryError, ChildProcessError: as ``translate_errors``.
    """
    chosen = choose_device(device)
    config, source, model = load_run(run, data_root, weights, models)
    if batch_size is not None:
        config = config.replace(batch_size=batch_size)
    if late_fusion is not None and (reason := why_no_late_fusion(model)):
        raise InputError(f"--late-fusion: {reason} in {run}")
    loader = build_eval_loader(config, source, chosen)
    with translate_errors(chosen, f"batch_size={config.batch_size}: a smaller one needs less"):
        with Progress(f"evaluate {run}", source.num_samples, unit="image") as progress:
            batches = progress.counted(loader)
            result = evaluate_model(model.to(chosen), batches, source.classes, chosen)
        if late_fusion is not None:
            heads = train_late_fusion(config, source.classes, model.eval(), chosen, late_fusion)
            result["late_fusion"] = evaluate_late_fusion(model, heads, loader, chosen)
    if not math.isfinite(result["loss"]):
        raise InputError(
            f"{run}: the student's logits are not finite: it has diverged, or its weights file is "
            f"damaged"
        )
    warn_of_substitutes(loader.substituted)
    return result
