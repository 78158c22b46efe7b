"""`train`: views in, distilled student out; the same call goes on after any interruption."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from deit_fast.config import InputError, RunConfig, to_dict
from deit_fast.data.evaluation import EvalLoader
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewBatch, ViewLoader
from deit_fast.data.samples import save_samples
from deit_fast.data.sources import open_source
from deit_fast.environment import describe_command, describe_environment
from deit_fast.evaluate import build_eval_loader, choose_device, evaluate_model
from deit_fast.files import write_atomically, write_json
from deit_fast.order import EpochOrder, TrainBatches
from deit_fast.train.checkpoint import save_checkpoint
from deit_fast.train.metrics import MetricsFile, Progress
from deit_fast.train.optim import learning_rate
from deit_fast.train.state import TrainState, create_state, resume
from deit_fast.train.step import TrainStep
from deit_fast.train.teaching import CachedTeacher, create_teaching
from deit_fast.views import ViewPlan

log = logging.getLogger("deit_fast")


def train(config: RunConfig) -> dict[str, Any]:
    """Train one model as ``config`` says, in this process.

    Writes into ``config.output``: config.json, samples.png, metrics.jsonl, checkpoints/,
    model.safetensors, ema.safetensors and result.json.

    Returns:
        The content of result.json.

    Raises:
        InputError: wrong data, teacher, cache or configuration; raised before the first step.
        OSError: the disk is full or not writable; the newest checkpoints stay.
        FloatingPointError: the loss is not finite; the newest checkpoints stay.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"train runs in one process, WORLD_SIZE is {os.environ['WORLD_SIZE']}")
    device = choose_device(config.device)
    source = open_source(config.data, "train", config.view.image_size)
    held_out = open_source(config.data, "val", config.view.image_size)
    plan = ViewPlan(config.view, config.seed, source.num_samples)
    order = EpochOrder(config.seed, source.num_samples, config.view_count, config.view.repeats)
    batches = TrainBatches(order, config.batch_size, config.epochs)
    steps_per_epoch = len(batches) // config.epochs
    total = min(len(batches), config.max_steps or len(batches))
    teaching = create_teaching(config, source, device)
    state = create_state(config, len(source.classes), device)
    resume(config, state)

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", to_dict(config))
    eval_loader = build_eval_loader(config, held_out, device)
    step_once = TrainStep(config, state.model, teaching, state.optimizer, state.ema, device)
    metrics = MetricsFile(output / "metrics.jsonl", state.step)
    loader = ViewLoader(
        source,
        plan,
        batches,
        workers=config.data.workers,
        on_error=config.data.on_error,
        start=state.step,
        stop=total,
        pin_memory=device.type == "cuda",
    )
    log.info(
        "training %s on %s: %d samples of %d classes, %d epochs of %d steps, distillation: %s",
        config.model.name, device, source.num_samples, len(source.classes),
        config.epochs, steps_per_epoch, config.loss.kind,
    )  # fmt: skip
    window = _Window(config, metrics)
    teaching.follow(batches, state.step)
    evaluation: dict[str, Any] | None = None
    with Progress("train", total, state.step) as progress:
        for batch in window.timed(loader):
            batch = batch.to(device)
            if state.step == 0:
                _save_first_views(batch, config, output / "samples.png")
            lr = learning_rate(
                state.step,
                config=config.optim,
                batch_size=config.batch_size,
                steps_per_epoch=steps_per_epoch,
                steps=len(batches),
            )
            numbers = step_once(batch, state.step, lr)
            state.step += 1
            state.substituted.update(batch.substituted)
            epoch = -(-state.step // steps_per_epoch)
            done, at_epoch_end = state.step == total, state.step % steps_per_epoch == 0
            window.add(numbers)
            # Also before every checkpoint, so that none can hold a state that is not finite.
            report = done or at_epoch_end or state.step % config.log_every == 0
            progress.advance(note=window.report(state, epoch, lr) if report else None)
            pause = time.perf_counter()
            if done or (at_epoch_end and epoch % config.eval_every == 0):
                evaluation = _evaluate(state, eval_loader, source.classes, device, epoch, metrics)
            if done or (at_epoch_end and epoch % config.save_every == 0):
                save_checkpoint(output / "checkpoints", state.step, state.to_checkpoint(config))
            window.since += time.perf_counter() - pause
    teaching.close()
    metrics.close()
    if evaluation is None:  # the checkpoint was the finished run's last
        evaluation = _evaluate(state, eval_loader, source.classes, device, config.epochs, None)

    result = {
        **evaluation,
        "best_top1": state.best_top1,
        "best_epoch": state.best_epoch,
        "classes": source.classes,
        "steps": state.step,
        "epochs": config.epochs,
        "train_seconds": round(state.train_seconds, 3),
        "images_per_s": round(state.step * config.batch_size / state.train_seconds, 2),
        "substituted": sorted(state.substituted.union(eval_loader.substituted)),
        "distill": config.loss.kind,
        "teacher": _describe_teaching(config, teaching),
        "seed": config.seed,
        "environment": describe_environment(device),
        "command": describe_command(),
    }
    _save_weights(output / "model.safetensors", state.model)
    if state.ema is not None:
        _save_weights(output / "ema.safetensors", state.ema.module)
    write_json(output / "result.json", result)
    if result["substituted"]:
        log.warning(
            "%d unreadable images were substituted, the first is %s",
            len(result["substituted"]), result["substituted"][0],
        )  # fmt: skip
    return result


class _Window:
    """Means over the steps since the last line; the only place that reads numbers back.

    ``since`` moves on by what evaluation and saving take, so rates are those of training alone.
    """

    def __init__(self, config: RunConfig, metrics: MetricsFile) -> None:
        self.config, self.metrics = config, metrics
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.waited, self.steps, self.since = 0.0, 0, time.perf_counter()

    def timed(self, loader: ViewLoader) -> Iterator[ViewBatch]:
        """The loader's batches; the time until each is there counts as waiting for data."""
        clock = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - clock
            yield batch
            clock = time.perf_counter()

    def add(self, numbers: dict[str, torch.Tensor]) -> None:
        """Count a step; its numbers stay on the device."""
        for name, value in numbers.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def report(self, state: TrainState, epoch: int, lr: float) -> str:
        """Write a row, start anew, and return the text to show.

        Raises:
            FloatingPointError: a number is not finite.
        """
        means = {name: (value / self.steps).item() for name, value in self.sums.items()}
        if not all(value == value and abs(value) != float("inf") for value in means.values()):
            raise FloatingPointError(
                f"step {state.step}: {', '.join(f'{k} {v}' for k, v in means.items())}; "
                f"the checkpoints before it are in {self.config.output}/checkpoints"
            )
        seconds = time.perf_counter() - self.since
        state.train_seconds += seconds
        row = {
            "step": state.step,
            "epoch": epoch,
            **means,
            "lr": lr,
            "images_per_s": self.steps * self.config.batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self.metrics.write("train", row)
        text = (
            f"loss {row['loss']:.4f}  lr {lr:.2e}  {row['images_per_s']:.0f} img/s  "
            f"data wait {100 * row['data_wait']:.0f} %"
        )
        log.debug("step %d  %s", state.step, text)
        self._clear()
        return text


def _evaluate(
    state: TrainState,
    loader: EvalLoader,
    classes: list[str],
    device: torch.device,
    epoch: int,
    metrics: MetricsFile | None,
) -> dict[str, Any]:
    evaluation = evaluate_model(state.model, loader, classes, device)
    if state.ema is not None:
        evaluation["ema_top1"] = evaluate_model(state.ema.module, loader, classes, device)["top1"]
    if evaluation["top1"] > state.best_top1:
        state.best_top1, state.best_epoch = evaluation["top1"], epoch
    log.info(
        "epoch %d  top-1 %.2f %%  loss %.4f", epoch, 100 * evaluation["top1"], evaluation["loss"]
    )
    if metrics is not None:
        row = {key: value for key, value in evaluation.items() if key != "per_class"}
        metrics.write("eval", {"step": state.step, "epoch": epoch, **row})
    return evaluation


def _describe_teaching(config: RunConfig, teaching: object) -> dict[str, Any] | None:
    if isinstance(teaching, CachedTeacher):
        facts = {key: value for key, value in teaching.cache.manifest["fingerprint"].items()
                 if key.startswith("teacher.")}  # fmt: skip
        return {"from": "cache", "codec": teaching.cache.manifest["codec"], **facts}
    if config.loss.kind == "none" or config.teacher is None:
        return None
    return {"from": "online", "teacher.spec": config.teacher.partition("@")[0]}


def _save_first_views(batch: ViewBatch, config: RunConfig, path: Path) -> None:
    images = ingest_batch(batch, config.view, torch.float32)[:16]
    save_samples(images, config.view.mean, config.view.std, path)


def _save_weights(path: Path, model: torch.nn.Module) -> None:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state))
