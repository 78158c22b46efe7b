"""What a run says of settings that have no effect in it, or another one than it seems."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from deit_fast.config import (
    MOST_INITIAL_SHARE,
    TEACHER_SETTINGS,
    FeatureConfig,
    OptimConfig,
    RunConfig,
)
from deit_fast.runtime.progress import duration
from deit_fast.runtime.weights_header import MODEL_FILE
from deit_fast.training.feature_terms import FeatureTerm
from deit_fast.views.steps import RunSteps

log = logging.getLogger("deit_fast")

SLOW_STEP = 5.0  # seconds


def say_unread_teacher_settings(config: RunConfig) -> None:
    """Name the settings of a teacher that a run from a cache does not read."""
    if config.cache is None:
        return
    # a teacher beside the cache is compared with it, but not measured
    names = TEACHER_SETTINGS if config.teacher is None else ("teacher_floor",)
    if unread := [name for name in names if getattr(config, name)]:
        log.warning(
            "%s: not read by this run, whose logits are those of cache %s: give it to precompute",
            ", ".join(unread), config.cache,
        )  # fmt: skip


def say_teachers(config: RunConfig, teachers: Sequence[str]) -> None:
    """Name the teachers of several caches of logits, with their shares of the loss."""
    if len(teachers) > 1 and config.loss.kind != "none":
        pairs = zip(teachers, config.loss.shares(len(teachers)), strict=True)
        texts = [f"{teacher} with weight {share:.3g}" for teacher, share in pairs]
        log.info("logits learned: %s", ", ".join(texts))


def say_features(config: RunConfig, terms: Sequence[FeatureTerm]) -> None:
    """Name the features that a run learns, and the settings of features that it does not read."""
    if terms:
        texts = [f"{term.name} {term.loss} with weight {term.weight:g}" for term in terms]
        log.info("features learned: %s", ", ".join(texts))
    if config.cache is None:
        return
    held = {term.given.target for term in terms}
    if unlearned := [target for target in config.feature_targets if target not in held]:
        log.warning(
            "targets %s: no cache of this run holds them, so it does not learn them; name their "
            "folders by --more-caches", ", ".join(unlearned),
        )  # fmt: skip
    default = FeatureConfig()
    for term in terms:
        for name in ("block", "norm", "grid", "reduce", "dim"):
            value = getattr(config.features, name)
            stored = term.given.fields.get(f"target.{name}")
            if name == "grid" and term.given.target != "patches":
                continue
            counts_from_last = name == "block" and value is not None and value < 0
            if value not in (getattr(default, name), stored) and not counts_from_last:
                log.warning(
                    "features.%s=%s: not read by this run, which learns the %s of a cache with %s",
                    name, value, term.given.target, stored,
                )  # fmt: skip


def say_unused_batches(config: RunConfig, steps: RunSteps) -> None:
    """Name the batch sizes that begin after the last epoch."""
    for phase in steps.phases[len(steps.reached()) :]:
        log.warning(
            "batch_schedule: the batch size %d from epoch %d on is not used, the run has %d epochs",
            phase.batch_size, phase.epoch, config.epochs,
        )  # fmt: skip


def say_last_size(config: RunConfig, steps: RunSteps, total: int) -> None:
    """Say where a run of ``total`` steps ends before the size that it is evaluated at."""
    size = config.view.size_of(steps.locate(max(total - 1, 0))[0])
    if size != config.view.image_size:
        log.warning(
            "the run ends at %d pixels, before the last size of view.size_schedule: it is "
            "evaluated at view.image_size=%d", size, config.view.image_size,
        )  # fmt: skip


def say_initial_share(config: OptimConfig, steps: int) -> None:
    """Say where a run was too short for its moving average."""
    share = config.initial_share(steps)
    if share > MOST_INITIAL_SHARE:
        log.warning(
            "the moving average is %.1f %% the initial weights after %d steps: use %s, or train "
            "with a smaller optim.ema_decay or with optim.ema_warmup",
            100 * share, steps, MODEL_FILE,
        )  # fmt: skip


def say_slow_step(seconds: float, log_every: int) -> None:
    """Where the first step took long, how long, as the next line may come much later."""
    if seconds >= SLOW_STEP:
        log.info(
            "the first step took %s; a line comes every %d steps", duration(seconds), log_every
        )
