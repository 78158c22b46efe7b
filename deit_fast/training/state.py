"""The state of a training run.

To restore is to load a saved state. A new process resumes a run from its newest checkpoint. A run
rolls back to it after a step that was not finite.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_fast.config import OptimConfig, RunConfig
from deit_fast.config_file import RETIRED, WITHOUT_INFLUENCE, by_dotted_key, from_earlier, to_dict
from deit_fast.errors import InputError, first_line, is_out_of_memory, printable
from deit_fast.features.student import FeatureHeads, HeadSpec
from deit_fast.models.normalisation import Normalisation
from deit_fast.models.pretrained import pretrained_name
from deit_fast.models.student import build_model
from deit_fast.models.weights import digest_state, load_weights, start_from
from deit_fast.models.weights_facts import read_facts
from deit_fast.training.checkpoints import list_checkpoints, load_checkpoint, load_newest
from deit_fast.training.feature_terms import FeatureTerm
from deit_fast.training.identity import FEATURES, features_text, require_same
from deit_fast.training.optim import (
    add_parameters,
    create_average,
    create_optimizer,
    decay_start,
    require_schedule,
)
from deit_fast.views.steps import RunSteps

log = logging.getLogger("deit_fast")

# Settings that may differ between a checkpoint and the command that resumes from it: those that
# change pixels, weights and learning rates by rounding at most.
_FREE_TO_CHANGE = {
    "recipe", "output", "mirror", "resume", "max_steps", "device", "compile", "cuda_graphs",
    "log_every", "eval_every", "save_every", "save_steps", "keep_every", "on_nonfinite",
    "accumulate", "teacher", "teacher_batch", "teacher_classes", "teacher_floor", "teacher_mean",
    "teacher_std", "teacher_size", "cache", "more_caches", "data.root", "data.workers", "track",
    "data.verify", "data.local_copy_gb", "check_teacher_every", "profile_steps", "accept_change",
} | WITHOUT_INFLUENCE  # fmt: skip

_OF_A_BRANCH = {"epochs", "optim.decay_epochs", "resume_from"}  # may differ where it begins

_COUNTS = ("step", "evaluated_step", "summed", "best_top1", "best_epoch", "train_seconds")

# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Model, moving average, optimiser, position in the order, and counts."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    heads: FeatureHeads | None = None  # projectors of the feature terms, trained beside the model
    step: int = 0
    evaluated_step: int = 0
    skipped: list[int] = field(default_factory=list)  # steps left out after they were not finite
    sums: dict[str, Tensor] = field(default_factory=dict)  # of steps not yet in a row of metrics
    summed: int = 0  # number of these steps
    best_top1: float = -1.0
    best_epoch: int = 0
    best_step: int = -1  # -1: not known, in checkpoints of earlier versions
    best: dict[str, Tensor] | None = None  # weights of this step, in host memory
    train_seconds: float = 0.0
    substituted: set[str] = field(default_factory=set)
    rows: int = 0  # of metrics.jsonl when the state was saved
    identity: dict[str, Any] = field(default_factory=dict)  # what the run is made of

    def add(self, numbers: dict[str, Tensor]) -> None:
        """Add a step's numbers, which stay on the device, to the sums."""
        for name, value in numbers.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.summed += 1

    def take_means(self) -> dict[str, float]:
        """Means since the last call. Waits for the device. Empty where no step was added."""
        means = {name: (value / self.summed).item() for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    def keep_best(self) -> None:
        """Copy the weights: they are those of the best evaluation so far."""
        weights = self.model.state_dict()
        self.best = {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}

    def to_checkpoint(self, config: RunConfig) -> dict[str, Any]:
        """Tensors and plain values only, so that ``weights_only=True`` can load them."""
        return {
            "config": json.dumps(to_dict(config)),
            "identity": json.dumps(self.identity),
            **{name: getattr(self, name) for name in _COUNTS},
            "rows": self.rows,
            "best_step": self.best_step,
            "best": self.best if self.best_step != self.step else None,  # else it is `model`
            "skipped": list(self.skipped),
            "sums": dict(self.sums),
            "substituted": sorted(self.substituted),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict() if self.heads is not None else None,
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            # No state of a generator: views, order and stochastic depth depend on seed and step.
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Load what ``to_checkpoint`` returned."""
        self.model.load_state_dict(saved["model"])
        if self.heads is not None:
            self.heads.load_state_dict(saved["heads"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in _COUNTS:
            setattr(self, name, saved[name])
        self.rows = saved.get("rows", 0)  # absent in earlier versions
        self.best_step = saved.get("best_step", -1)  # absent in earlier versions
        self.best = saved["model"] if self.best_step == self.step else saved.get("best")
        device = next(self.model.parameters()).device
        self.sums = {name: value.to(device) for name, value in saved["sums"].items()}
        self.skipped, self.substituted = list(saved["skipped"]), set(saved["substituted"])


def _build_heads(
    config: RunConfig, model: nn.Module, terms: Sequence[FeatureTerm]
) -> FeatureHeads | None:
    """The projectors of the student's tokens to the targets of the terms; None without terms.

    Args:
        model: the student, of which tokens are taken.
    """
    if not terms:
        return None
    features = config.features
    specs = [
        HeadSpec(
            tokens=term.given.tokens,
            width=term.given.width,
            is_grid=term.given.target == "patches",
            projector=term.projector,
        )
        for term in terms
    ]  # fmt: skip
    return FeatureHeads(
        model,
        specs,
        hidden=features.hidden,
        token=features.token,
        block=features.student_block,
        image_size=config.view.image_size,
    )


def create_state(
    config: RunConfig,
    num_classes: int,
    device: torch.device,
    classes: Sequence[str] | None = None,
    terms: Sequence[FeatureTerm] = (),
) -> TrainState:
    """A run's state at step 0. The initial weights depend on ``seed`` and `model.weights` alone;
    those of the model not on ``terms``.

    Args:
        classes: names of the classes, which the heads in `model.weights` follow.
        terms: feature terms of the loss, whose projectors are trained beside the model.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes)
    identity: dict[str, Any] = {"model.weights": None}
    if config.model.weights is not None:
        weights = load_weights(config.model.weights)
        identity["model.weights"] = digest_state(weights)
        _start_from(model, weights, config, classes)
        _compare_normalisation(config, config.model.weights)
    torch.manual_seed(config.seed)
    heads = _build_heads(config, model, terms)
    model.to(device).train()
    average = create_average(model, config.optim)
    optimizer = create_optimizer(model, config.optim, config.compat)
    if heads is not None:
        heads.to(device).train()
        add_parameters(optimizer, heads, config.optim.weight_decay)
    return TrainState(model, average, optimizer, heads, identity=identity)


def _start_from(
    model: nn.Module, weights: dict[str, Tensor], config: RunConfig, classes: Sequence[str] | None
) -> None:
    """``start_from``; where the weights are of another model, the message says whose they are."""
    path = str(config.model.weights)
    try:
        start_from(model, weights, path, classes)
    except InputError as error:
        ours, theirs = config.model.name.partition(".")[0], pretrained_name(path)
        if theirs is None and (facts := read_facts(path)) is not None:
            theirs = facts.name
        if theirs is None or theirs.partition(".")[0] == ours:
            raise
        raise InputError(
            f"{error}: they are of {theirs}, model.name is {ours}: give --model.weights "
            f"timm:{ours}, a file, or none"
        ) from None


def _compare_normalisation(config: RunConfig, weights: str) -> None:
    """Say where weights were trained with other channel statistics than the run's images have."""
    ours = Normalisation(config.view.mean, config.view.std)
    theirs: Normalisation | None = None
    if (name := pretrained_name(weights)) is not None:
        entry: Any = timm.get_pretrained_cfg(name)
        theirs = Normalisation(tuple(entry.mean), tuple(entry.std))
    elif (facts := read_facts(weights)) is not None:
        theirs = Normalisation(facts.mean, facts.std)
    if theirs is not None and not theirs.is_close(ours):
        log.info("weights %s: trained on images of %s, here they have %s", weights, theirs, ours)


# ---------------------------------------------------------------------------------------------
# Resume and roll back
# ---------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """The checkpoint from which a run continues."""

    path: Path
    saved: dict[str, Any]  # of ``TrainState.to_checkpoint``
    settings: dict[str, Any]  # of its run, as ``to_dict``
    is_branch: bool  # of another run, from which this one branches


def find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The newest checkpoint in the run's folder, else that of ``resume_from``, else None.

    Raises:
        InputError: there is one and ``--no-resume`` was given, or it is none of a run.
    """
    folder = Path(config.output) / "checkpoints"
    if not config.resume:
        if list_checkpoints(folder):
            raise InputError(f"--no-resume, but {folder} has checkpoints: choose another --output")
        found = None
    else:
        found = load_newest(folder)
    is_branch = found is None and config.resume_from is not None
    if is_branch:
        path = Path(str(config.resume_from))
        found = path, load_checkpoint(path)
    if found is None:
        return None
    path, saved = found
    with _named(path):
        return Checkpoint(path, saved, from_earlier(json.loads(saved["config"])), is_branch)


def settle(config: RunConfig, checkpoint: Checkpoint | None, steps: RunSteps) -> RunConfig:
    """``config`` with what the checkpoint decides; ``steps`` are those of a run as configured.

    A moving average that warms up continues to do so, as in all runs of earlier versions. A run
    of a version before view.seed keeps the views of its seed. A branch ends ``decay_epochs`` after
    its checkpoint, at the end of an epoch.

    Raises:
        InputError: no run can branch from the checkpoint, or the schedule's settings exclude each
            other.
    """
    if checkpoint is not None:
        with _named(checkpoint.path):
            config = _with_views(_with_warm_up(config, checkpoint), checkpoint)
            if config.resume_from is not None and config.optim.schedule == "wsd":
                config = _with_epochs(config, checkpoint, steps)
    require_schedule(config)
    return config


def _with_warm_up(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    warms_up = checkpoint.settings["optim"].get("ema_warmup", False) is True
    if not warms_up or config.optim.ema_warmup or not config.optim.ema_decay:
        return config
    log.info("%s: its moving average continues with optim.ema_warmup, as begun", checkpoint.path)
    return config.replace(optim={"ema_warmup": True})


def _with_views(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """The command of before, which gave only the seed, keeps the views of before."""
    is_known = "seed" in json.loads(checkpoint.saved["config"])["view"]
    if is_known or config.view.seed or config.seed != checkpoint.settings["seed"]:
        return config
    if config.seed:
        log.info("%s: its views continue with view.seed=%d, its seed", checkpoint.path, config.seed)
    return config.replace(view={"seed": config.seed})


def _with_epochs(config: RunConfig, checkpoint: Checkpoint, steps: RunSteps) -> RunConfig:
    path, settings = checkpoint.path, checkpoint.settings
    if not checkpoint.is_branch:
        return config.replace(epochs=settings["epochs"])  # as it began
    optim, step = settings["optim"], checkpoint.saved["step"]
    if optim.get("schedule") != "wsd":
        raise InputError(
            f"{path} is of a run with optim.schedule={optim.get('schedule', 'cosine')}, whose "
            f"learning rate falls from the start: branch from one with optim.schedule=wsd"
        )
    its = OptimConfig(schedule="wsd", decay_epochs=optim["decay_epochs"])
    start = decay_start(its, replace(steps, epochs=settings["epochs"]))
    if step > start:
        raise InputError(
            f"{path} is of step {step}, but its run decays from step {start}: branch from an "
            f"earlier checkpoint (keep_every keeps them)"
        )
    fewest = max(1, steps.locate(step)[0] + int(config.optim.decay_epochs or 0) - 1)
    epochs = next(
        epochs for epochs in itertools.count(fewest)
        if decay_start(config.optim, replace(steps, epochs=epochs)) >= step
    )  # fmt: skip
    log.info("branching from %s, step %d: %d epochs in all", path, step, epochs)
    return config.replace(epochs=epochs)


def resume(config: RunConfig, state: TrainState, checkpoint: Checkpoint) -> None:
    """Restore a checkpoint.

    Raises:
        InputError: the checkpoint belongs to another configuration, or the run is made of something
            else than ``state.identity`` (names all that differs with both values).
    """
    with _named(checkpoint.path):
        require_same_run(checkpoint, config, state.identity)
        state.restore(checkpoint.saved)
        if checkpoint.is_branch:
            state.rows = 0  # those of metrics.jsonl are in the other run's folder
    log.info("resuming from %s, step %d", checkpoint.path, state.step)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file where its content is not that of a checkpoint."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = printable(first_line(error, with_type=True))
        raise InputError(f"{path} is no checkpoint of a run ({reason}): remove it") from None


def roll_back(folder: Path, state: TrainState) -> bool:
    """Restore the newest checkpoint of this run; returns whether there is one."""
    found = load_newest(folder)
    if found is not None:
        state.restore(found[1])
    return found is not None


def require_same_run(
    checkpoint: Checkpoint, config: RunConfig, identity: dict[str, Any], knows_teacher: bool = True
) -> None:
    """
    Args:
        knows_teacher: whether ``identity`` says what the run learns.

    Raises:
        InputError: the checkpoint is of another run; names all that differs.
    """
    path, saved = checkpoint.path, checkpoint.saved
    facts = json.loads(saved["identity"]) if "identity" in saved else None
    own = json.loads(json.dumps(identity))
    differing = _differences(checkpoint.settings, json.loads(json.dumps(to_dict(config))))
    remedy = "choose another --output"
    if checkpoint.is_branch:
        differing = {key: text for key, text in differing.items() if key not in _OF_A_BRANCH}
        remedy = "a branch keeps all settings but optim.decay_epochs"
    if facts is not None:
        differing.pop("model.weights", None)  # a path; its content is one of the facts
        # The first checkpoints with projectors do not say of what.
        is_known = FEATURES in facts or saved.get("heads") is None
        if knows_teacher and is_known and (text := features_text(facts, own)):
            differing[FEATURES] = text
    if differing:
        text = "; ".join(differing.values())
        raise InputError(f"{path} is of another configuration ({text}): {remedy}")
    if facts is None:
        log.info(
            "%s is of an earlier version: its checksums are of its parts only, and whether data "
            "and teacher are still the same is not known", path,
        )  # fmt: skip
        return
    require_same(facts, own, config.accept_change, str(path))


def digest_settings(config: RunConfig) -> str:
    """A digest of the settings that a run keeps from its start, as far as they are no defaults."""
    defaults, own = (
        by_dotted_key(json.loads(json.dumps(to_dict(each)))) for each in (RunConfig(), config)
    )
    free = _FREE_TO_CHANGE | _OF_A_BRANCH
    kept = {key: own[key] for key in sorted(own) if key not in free and own[key] != defaults[key]}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def _differences(saved: dict[str, Any], chosen: dict[str, Any]) -> dict[str, str]:
    """Texts about settings that differ, by dotted key.

    A setting that is missing, because it is newer, counts as its default.
    """
    defaults = by_dotted_key(json.loads(json.dumps(to_dict(RunConfig())))) | RETIRED
    old, new = (defaults | by_dotted_key(values) for values in (saved, chosen))
    return {
        key: f"{key} {old[key]!r} there, {new[key]!r} here"
        for key in defaults
        if key not in _FREE_TO_CHANGE and old[key] != new[key]
    }
