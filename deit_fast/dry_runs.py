"""What `train` and `precompute` print with --dry-run."""

from __future__ import annotations

from typing import Any

from deit_fast.arguments import columns, plain, size_text
from deit_fast.cache_verbs import plan_table
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.inputs import require_precompute_inputs, require_train_inputs
from deit_fast.runtime.files import require_writable
from deit_fast.storage.urls import is_url


def training(config: RunConfig) -> str:
    """What a training has and needs: data, model, caches, memory, time.

    Raises:
        As ``train``, before its first step.
    """
    require_writable("--output", config.output)
    require_train_inputs(config, True)
    from deit_fast.runtime.progress import duration
    from deit_fast.training.dry_run import dry_run

    found = dry_run(config)
    start = f"resumes after step {found['step']}" if found["step"] else "new"
    rows = [
        ("run", f"{config.output} ({start})"),
        ("data", f"{found['images']} images of {found['classes']} classes, "
                 f"{found['held_out']} held out"),
        ("model", f"{config.model.name}: {found['parameters'] / 1e6:.2f} million parameters"),
        ("teacher", "the cache" if found["caches"] else plain(found["teacher"])),
    ]  # fmt: skip
    for cache in found["caches"]:
        missing, needed = cache["missing"], config.views_used
        text = f"all {needed} views that the run needs"
        if missing:
            few = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
            text = f"LACKS {len(missing)} of the {needed} views ({few}): precompute them first"
        rows.append(("cache", f"{cache['path']}: {text}; {size_text(cache['bytes'])}"))
    if str(config.model.weights).startswith("timm:") and not found["step"]:
        rows.append(("weights", f"{config.model.weights}: NOT CHECKED, `train` may download them"))
    steps = f"{found['steps_per_epoch']} an epoch of batch {found['batch_size']}"
    rows += [
        ("steps", f"{found['steps']}: {found['epochs']} epochs, {steps}"),
        ("memory", f"about {size_text(found['memory'])} on {found['device']}, beside the loader"),
        ("time", f"about {duration(found['seconds'])}, {found['step_seconds']:.3g} s a step"),
        ("measured", f"steps of {found['measured_images']} images, without torch.compile; each "
                     f"part alone, for a whole step: loading in one process "
                     f"{found['loading_seconds']:.3g} s, training {found['training_seconds']:.3g} s"
                     ),
    ]  # fmt: skip
    return columns(rows)


def precomputing(config: RunConfig, views: range | None, budget: int | None) -> str:
    """What a pass of the teacher would write and how long it takes.

    Args:
        views: only these; None: all that the run needs.
        budget: also propose codecs for this many bytes an image.

    Raises:
        As ``precompute``, before its first batch.
    """
    is_remote = config.cache is not None and is_url(config.cache)
    if config.cache is not None and not is_remote:
        require_writable("--cache", config.cache)
    require_precompute_inputs(config)
    from deit_fast.precomputation import estimate
    from deit_fast.runtime.pipeline_time import loading_processes
    from deit_fast.runtime.progress import duration

    found = estimate(config, views)
    workers = loading_processes(config.data.workers)
    speed = f"{found['images_per_s']:.3g} img/s a process, {found['processes']} of them"
    rows = [
        ("cache", str(config.cache)),
        ("views", str(found["views"])),
        ("blocks", f"{found['blocks']} to write, {found['kept']} there; all views are --blocks "
                   f"0:{found['units']}"),
        ("images", str(found["images"])),
        ("bytes", f"{found['bytes']} ({size_text(found['bytes'])}) of new "
                  + ("objects" if is_remote else f"files, {size_text(found['free'])} free")),
        ("time", f"{duration(found['seconds'])} at {speed}"),
        ("measured", f"batches of {found['timed_batch']} images through the whole job; each part "
                     f"alone, for a batch of {found['batch']}: loading in one process "
                     f"{found['loader_seconds']:.3g} s (the job has {workers}), "
                     f"teacher {found['teacher_seconds']:.3g} s"),
    ]  # fmt: skip
    if budget is None:
        return columns(rows)
    return "\n\n".join([columns(rows), *_plans(config, found, budget)])


def _plans(config: RunConfig, found: dict[str, Any], budget: int) -> list[str]:
    """What a budget of bytes an image buys, for each target; ``found`` is the estimate."""
    from deit_fast.cache.plan import options

    texts = []
    for target, shape in found["shapes"].items():
        is_logits = target == "logits"
        tokens, width = (1, None) if is_logits else shape
        rows = options(
            budget, samples=found["samples"], views=config.views_used,
            repeats=config.view.repeats, classes=shape[0] if is_logits else None,
            width=width, tokens=tokens, images_per_s=found["images_per_s"] * found["processes"],
        )  # fmt: skip
        try:
            table = plan_table(rows, config.views_used)
        except InputError as error:  # the other targets may fit
            table = str(error)
        texts.append(f"{budget} bytes an image for {target}:\n{table}")
    return texts
