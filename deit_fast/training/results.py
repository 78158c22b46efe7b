"""The end of a run: its weights, predictions.json and result.json."""

from __future__ import annotations

import copy
import json
import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deit_fast.decisions import PREDICTIONS_FILE, describe_decisions, join_rows
from deit_fast.evaluation import warn_of_substitutes
from deit_fast.models.fuse import unfuse
from deit_fast.models.student import trained_head
from deit_fast.models.weights import digest_state, save_weights
from deit_fast.models.weights_facts import FACTS_KEY, facts_text
from deit_fast.runtime.environment import describe_command, describe_environment
from deit_fast.runtime.files import write_json
from deit_fast.runtime.speed import model_costs
from deit_fast.runtime.weights_header import (
    BEST_FILE,
    BEST_KEY,
    BEST_METRIC,
    DIGEST_KEY,
    EMA_FILE,
    HEAD_KEY,
    MODEL_FILE,
)
from deit_fast.training.remarks import say_initial_share

if TYPE_CHECKING:
    from deit_fast.training.run import Run

log = logging.getLogger("deit_fast")

FILES = (
    "config.json", "metrics.jsonl", "samples.png", MODEL_FILE, EMA_FILE, BEST_FILE,
    PREDICTIONS_FILE,
)  # fmt: skip


def finish(run: Run) -> dict[str, Any]:
    """Write the weights and result.json of an evaluated run; returns the latter's content.

    All ranks must call this together.
    """
    config, state, data, group = run.config, run.state, run.data, run.group
    assert run.evaluation is not None and run.decisions is not None
    decisions = join_rows(group.gather(run.decisions.rows()))
    substituted = {path for paths in group.gather(
        sorted(state.substituted.union(data.eval_loader.substituted))) for path in paths
    }  # fmt: skip
    left_out = [skipped for skipped in state.skipped if skipped < state.step]
    trained = run.steps.samples(state.step)
    trained -= sum(run.steps.phase_of(skipped).batch_size for skipped in left_out)
    result = {
        **run.evaluation,
        "best_top1": state.best_top1,
        "best_epoch": state.best_epoch,
        "best_metric": BEST_METRIC,
        "classes": data.source.classes,
        "steps": state.step,
        "epochs": config.epochs,
        "skipped_steps": state.skipped,
        "processes": group.world_size,
        "train_seconds": round(state.train_seconds, 3),
        "images_per_s": round(trained / state.train_seconds, 2),
        "substituted": sorted(substituted),
        "distill": config.loss.kind,
        "teacher": run.teacher.describe(),
        "seed": config.seed,
        "view_seed": config.view.seed,
        "environment": describe_environment(run.device),
        "command": describe_command(),
    }
    if run.metrics is not None:
        run.require_owned()
        run.metrics.sync()
        result["metrics"] = {"rows": run.metrics.rows, "lost": run.metrics.lost}
        result["weights"] = _write_weights(run)
        result |= model_costs(unfuse(copy.deepcopy(state.model)), config.view.image_size)
        result["weights_path"] = str(run.output / MODEL_FILE)
        predictions = describe_decisions(decisions, data.held_out)
        predictions["weights_digest"] = result["weights"][MODEL_FILE]
        write_json(run.output / PREDICTIONS_FILE, predictions)
        write_json(run.output / "result.json", result)
        if run.mirror is not None:
            run.mirror.finish([*FILES, "result.json"])
            log.info("the run is copied to %s", run.mirror.objects)
    warn_of_substitutes(sorted(substituted))
    if run.metrics is not None:
        paths = ", ".join(str(run.output / name) for name in result["weights"])
        log.info("finished; the weights are %s", paths)
    run.finished = True
    return result


def _write_weights(run: Run) -> dict[str, str]:
    """Write all weights of the run into its folder; returns their digests by file."""
    state = run.state
    digests = {MODEL_FILE: _save_weights(run, MODEL_FILE, state.model.state_dict())}
    if state.ema is not None:
        digests[EMA_FILE] = _save_weights(run, EMA_FILE, state.ema.module.state_dict())
        say_initial_share(run.config.optim, state.step)
    if state.best is None:
        log.warning(
            "%s is not written: the run goes on from a checkpoint of an earlier version, "
            "which lacks the best weights",
            BEST_FILE,
        )
        (run.output / BEST_FILE).unlink(missing_ok=True)
        return digests
    best = {"metric": BEST_METRIC, "value": state.best_top1, "epoch": state.best_epoch,
            "step": state.best_step}  # fmt: skip
    texts = {BEST_KEY: json.dumps(best)}
    return digests | {BEST_FILE: _save_weights(run, BEST_FILE, state.best, texts)}


def _save_weights(
    run: Run, name: str, weights: dict[str, Tensor], more: dict[str, str] | None = None
) -> str:
    """Write weights and texts about them into the run's folder; returns the weights' digest."""
    digest = digest_state(weights)
    texts = {
        "identity": json.dumps(run.state.identity),
        FACTS_KEY: facts_text(run.config, run.data.source.classes),
        DIGEST_KEY: digest,
        **(more or {}),
    }
    if (head := trained_head(run.state.model)) != "both":
        texts[HEAD_KEY] = head
    save_weights(run.output / name, weights, texts)
    return digest
