"""`train`: views in, distilled student out; the same call goes on after any interruption."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.data.batch import ViewBatch
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.open import open_loader, open_source
from deit_fast.data.samples import save_samples
from deit_fast.errors import InputError, translate_errors
from deit_fast.evaluate import build_eval_loader, evaluate_model
from deit_fast.runtime.distributed import ProcessGroup, choose_device, joined_process_group
from deit_fast.runtime.environment import describe_command, describe_environment
from deit_fast.runtime.files import write_atomically, write_json
from deit_fast.runtime.garbage import gc_paused
from deit_fast.runtime.metrics import MetricsFile, Progress
from deit_fast.runtime.profile import StepProfiler, memory_history
from deit_fast.runtime.signals import Preempted, Signals
from deit_fast.runtime.trackers import require_trackers
from deit_fast.train.compiling import CompileCount, compile_evaluation, log_compile, resolve_compile
from deit_fast.train.guard import Guard
from deit_fast.train.optim import learning_rate
from deit_fast.train.state import CheckpointWriter, create_state, resume, roll_back
from deit_fast.train.step import TrainStep
from deit_fast.train.teacher import open_teacher
from deit_fast.train.window import Window
from deit_fast.views.deit_order import DeitBatches
from deit_fast.views.order import EpochOrder, TrainBatches
from deit_fast.views.plan import ViewPlan

log = logging.getLogger("deit_fast")

EVAL_BATCHES_PER_QUESTION = 8  # whether a signal came: seconds, of the ten that there are


def train(config: RunConfig) -> dict[str, Any]:
    """Train one model as ``config`` says, in this process or with others under torchrun.

    The first rank writes into ``config.output``: config.json, samples.png, metrics.jsonl,
    checkpoints/, model.safetensors, ema.safetensors and result.json; as asked for, also
    trackers.json, tensorboard/, profile/ and memory.pickle.

    Returns:
        The content of result.json.

    Raises:
        InputError: wrong data, teacher, cache or configuration; raised before the first step.
        OSError: the disk is full or not writable; the newest checkpoints stay.
        FloatingPointError: a loss or gradient is not finite; it changed no weight, and the newest
            checkpoints stay.
        MemoryError: too little, of the GPU or the host; names what it depends on.
        ChildProcessError: a process of the loader died.
        Preempted: SIGTERM or SIGUSR1; the state is saved, the same call goes on.
    """
    device = choose_device(config.device)
    # In this order: a handler could not run while the processes wait for one another.
    with (
        joined_process_group(device) as group,
        Signals() as signals,
        memory_history(config, Path(config.output), device, group),
    ):
        processes = f" over {group.world_size} processes" if group.world_size > 1 else ""
        sizes = (
            f"batch_size={config.batch_size}{processes} in accumulate={config.accumulate} parts: "
            f"a larger accumulate takes the same steps in less"
        )
        with translate_errors(device, sizes), signals.raising():
            run = _Run(config, device, group, signals)
        try:
            with translate_errors(device, sizes):
                run.to_the_end()
                return run.finish()
        finally:
            run.close()


class _NotFinite(Exception):
    """The guard found a step whose numbers are not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class _Run:
    """Everything of one call of ``train``."""

    def __init__(
        self, config: RunConfig, device: torch.device, group: ProcessGroup, signals: Signals
    ) -> None:
        self.config, self.device, self.group, self.signals = config, device, group, signals
        share = config.batch_size // group.world_size
        if share % config.accumulate:
            raise InputError(
                f"accumulate={config.accumulate} does not divide the {share} samples of each rank"
            )
        if group.is_first:
            require_trackers(config.track)
        self.source = open_source(config.data, "train", config.view.image_size)
        self.held_out = open_source(config.data, "val", config.view.image_size)
        self.plan = ViewPlan(config.view, config.seed, self.source.num_samples)
        self.batches = _batches(config, self.source.num_samples, group)
        self.steps_per_epoch = len(self.batches) // config.epochs
        self.total = min(len(self.batches), config.max_steps or len(self.batches))
        self.teacher = open_teacher(config, self.source, device)
        self.state = create_state(config, len(self.source.classes), device)
        resume(config, self.state)
        group.barrier()  # no rank may still look for checkpoints when the first writes one

        self.output = Path(config.output)
        if group.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
            for folder in (self.output, self.output / "checkpoints"):
                for leftover in folder.glob(".tmp-*"):  # of a process killed while it wrote
                    leftover.unlink()
            write_json(self.output / "config.json", to_dict(config))
        self.eval_loader = build_eval_loader(config, self.held_out, device, group)
        state = self.state
        self.compile_count = CompileCount()
        self.step_once = TrainStep(
            config, state.model, self.teaching, state.optimizer, state.ema, device, group
        )
        self.eval_forward = None
        if (mode := resolve_compile(config, device, state.model)) != "none":
            average = state.ema.module if state.ema is not None else None
            self.eval_forward = compile_evaluation(mode, average)
        self.metrics: MetricsFile | None = None
        if group.is_first:
            self.metrics = MetricsFile(config, self.output, state.step)
        self.writer = CheckpointWriter(self.output / "checkpoints")
        self.saved_at = time.monotonic()
        self.rollbacks = self.batches_evaluated = 0
        self.finished = False
        self.evaluation: dict[str, Any] | None = None
        log.info(
            "training %s on %s x %d: %d samples of %d classes, %d epochs of %d steps, "
            "distillation: %s",
            config.model.name, device.type, group.world_size, self.source.num_samples,
            len(self.source.classes), config.epochs, self.steps_per_epoch, config.loss.kind,
        )  # fmt: skip
        log_compile(config, device, state.model)

    # -- steps ---------------------------------------------------------------------------------

    def to_the_end(self) -> None:
        """All steps that are left, and again from a checkpoint where numbers were not finite."""
        while True:
            try:
                self.train()
                return
            except _NotFinite as error:
                self.roll_back(error)

    def train(self) -> None:
        """From the state's step to the last."""
        config, state, guard = self.config, self.state, self.step_once.guard
        self._catch_up_on_evaluation()
        loader = open_loader(
            config.data,
            self.source,
            self.plan,
            self.batches,
            device=self.device,
            start=state.step,
            stop=self.total,
            attach=self.teacher.attach(self.batches, state.step),
        )
        window = Window(config, state, self.metrics, self.group, self.device, self.total)
        self.teaching.follow(self.batches)
        first = state.step
        profiled = config.profile_steps if self.group.is_first else 0
        with (
            gc_paused() as freeze_garbage,
            Progress("train", self.total, state.step) as progress,
            StepProfiler(profiled, self.output / "profile", self.device) as profiler,
            ExitStack() as stack,
        ):
            stack.enter_context(self.signals.raising())  # the first step compiles
            for batch in window.timed(loader):
                if state.step == 0 and self.group.is_first:
                    _save_first_views(batch, config, self.output / "samples.png")
                lr = self._learning_rate(state.step)
                if state.step not in state.skipped:
                    window.add(self.step_once(batch, state.step, lr, self._is_told_to_stop))
                state.step += 1
                state.substituted.update(batch.substituted)
                epoch = -(-state.step // self.steps_per_epoch)
                done = state.step == self.total
                at_epoch_end = state.step % self.steps_per_epoch == 0
                report = done or at_epoch_end or state.step % config.log_every == 0
                save = done or (at_epoch_end and epoch % config.save_every == 0)
                save |= self._is_save_due()
                # Before every checkpoint too, so that none can hold a state that is not healthy.
                stop = self._heed(guard, keep=0 if report or save else 1)
                note = window.report(epoch, lr, self.teacher.differences()) if report else None
                progress.advance(note=note)
                if report:
                    self.compile_count.report(state.step)
                if state.step == first + 1:
                    stack.close()
                    freeze_garbage()
                if stop:
                    self._leave()
                pause = time.perf_counter()
                if done or (at_epoch_end and epoch % config.eval_every == 0):
                    self._evaluate(epoch)
                if save:
                    self._save()
                if report:
                    gc.collect()
                profiler()
                window.since += time.perf_counter() - pause
        self._save_at_the_end()

    def _is_told_to_stop(self) -> bool:
        return self.signals.received is not None

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            config=self.config.optim,
            batch_size=self.config.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            steps=len(self.batches),
            compat=self.config.compat,
        )

    def _heed(self, guard: Guard, keep: int) -> bool:
        """Whether to leave, by what is known of the steps so far but the ``keep`` newest.

        All ranks get the same answer after the same step.

        Raises:
            _NotFinite: one of them changed nothing.
        """
        stop = self.group.world_size == 1 and self._is_told_to_stop()
        while (verdict := guard.read(0 if stop else keep)) is not None:
            if not verdict.healthy:
                raise _NotFinite(verdict.step, guard.explain(verdict))
            stop |= verdict.stop
        return stop

    def _leave(self) -> None:
        """Save and end the run.

        Raises:
            Preempted: always.
        """
        self._save()
        self._save_at_the_end()
        name = self.signals.received or "another rank was signalled"
        raise Preempted(
            f"{name}: saved step {self.state.step} in {self.output / 'checkpoints'}; "
            f"the same command goes on from there"
        )

    # -- checkpoints ---------------------------------------------------------------------------

    def _is_save_due(self) -> bool:
        config = self.config
        if config.save_steps is not None and self.state.step % config.save_steps == 0:
            return True
        # Only the first rank saves, so its clock alone decides.
        age = time.monotonic() - self.saved_at
        return config.save_minutes is not None and age >= 60 * config.save_minutes

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.group.is_first:
            self.writer.save(self.state.step, self.state.to_checkpoint(self.config))

    def _save_at_the_end(self) -> None:
        """Until the newest checkpoint is on the disk, for all ranks."""
        self.writer.wait()
        self.group.barrier()

    def roll_back(self, error: _NotFinite) -> None:
        """Go back to the newest checkpoint and leave the step out from then on.

        Raises:
            FloatingPointError: the configuration says stop, there is nothing to go back to, or it
                has been done too often.
        """
        checkpoints = self.output / "checkpoints"
        where = f"{error}; it changed no weight, the checkpoints are in {checkpoints}"
        if self.config.on_nonfinite == "stop":
            raise FloatingPointError(where)
        self._save_at_the_end()
        self.rollbacks += 1
        if self.rollbacks > self.config.max_rollbacks:
            raise FloatingPointError(f"{where}; {self.config.max_rollbacks} rollbacks did not help")
        skipped = [*self.state.skipped, error.step]
        if not roll_back(checkpoints, self.state):
            raise FloatingPointError(f"{where}; there is none yet to roll back to")
        self.state.skipped = skipped
        self.step_once.forget()
        if self.metrics is not None:
            self.metrics.roll_back(self.state.step)
        log.warning("%s; going on from step %d without it", error, self.state.step)

    # -- evaluation ----------------------------------------------------------------------------

    def _catch_up_on_evaluation(self) -> None:
        """An evaluation that a signal cut short: due at the checkpoint's step and not done."""
        epoch, rest = divmod(self.state.step, self.steps_per_epoch)
        is_due = epoch > 0 and rest == 0 and epoch % self.config.eval_every == 0
        if is_due and self.state.evaluated_step < self.state.step:
            self._evaluate(epoch)
            self._save()

    def _evaluate(self, epoch: int) -> None:
        state = self.state
        evaluation = self.evaluate_once(state.model)
        if state.ema is not None:
            evaluation["ema_top1"] = self.evaluate_once(state.ema.module)["top1"]
        if evaluation["top1"] > state.best_top1:
            state.best_top1, state.best_epoch = evaluation["top1"], epoch
        log.info(
            "epoch %d  top-1 %.2f %%  loss %.4f",
            epoch, 100 * evaluation["top1"], evaluation["loss"],
        )  # fmt: skip
        if self.metrics is not None and state.evaluated_step < state.step:
            row = {key: value for key, value in evaluation.items() if key != "per_class"}
            self.metrics.write("eval", {"step": state.step, "epoch": epoch, **row})
        self.evaluation, state.evaluated_step = evaluation, state.step
        self.compile_count.report(state.step, "evaluation")

    def evaluate_once(self, model: torch.nn.Module) -> dict[str, Any]:
        """All held-out images, over all ranks.

        Where training is compiled, so is this: for batches of one size, which the last is filled
        up to. Otherwise the result is the same as that of `deit-fast evaluate`.
        """
        return evaluate_model(
            model,
            self.eval_loader,
            self.source.classes,
            self.device,
            self.group,
            self._heed_in_evaluation,
            forward=self.eval_forward,
            rows=self.eval_loader.batch_size if self.eval_forward is not None else None,
        )

    def _heed_in_evaluation(self) -> None:
        # Ranks have to ask one another, which waits for the device: not at every batch.
        self.batches_evaluated += 1
        alone = self.group.world_size == 1
        asks = alone or self.batches_evaluated % EVAL_BATCHES_PER_QUESTION == 0
        if asks and self.group.any(self._is_told_to_stop(), self.device):
            self._leave()

    # -- the end -------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Weights and result.json."""
        config, state = self.config, self.state
        if self.evaluation is None:  # the checkpoint was the finished run's last
            self._evaluate(config.epochs)
        assert self.evaluation is not None
        substituted = {path for paths in self.group.gather(
            sorted(state.substituted.union(self.eval_loader.substituted))) for path in paths
        }  # fmt: skip
        result = {
            **self.evaluation,
            "best_top1": state.best_top1,
            "best_epoch": state.best_epoch,
            "classes": self.source.classes,
            "steps": state.step,
            "epochs": config.epochs,
            "skipped_steps": state.skipped,
            "processes": self.group.world_size,
            "train_seconds": round(state.train_seconds, 3),
            "images_per_s": round(state.step * config.batch_size / state.train_seconds, 2),
            "substituted": sorted(substituted),
            "distill": config.loss.kind,
            "teacher": self.teacher.describe(),
            "seed": config.seed,
            "environment": describe_environment(self.device),
            "command": describe_command(),
        }
        if self.group.is_first:
            _save_weights(self.output / "model.safetensors", state.model)
            if state.ema is not None:
                _save_weights(self.output / "ema.safetensors", state.ema.module)
            write_json(self.output / "result.json", result)
        if result["substituted"]:
            log.warning(
                "%d unreadable images were substituted, the first is %s",
                len(result["substituted"]), result["substituted"][0],
            )  # fmt: skip
        self.finished = True
        return result

    def close(self) -> None:
        """Also after an error: what the threads have in hand gets to its place."""
        self.teacher.close()
        try:
            self.writer.wait()
        except OSError as error:
            log.warning("the checkpoint under way was not written: %s", error)
        if self.metrics is not None:
            self.metrics.close(self.finished)


def _batches(
    config: RunConfig, num_samples: int, group: ProcessGroup
) -> TrainBatches | DeitBatches:
    """What this rank shows the model, step by step."""
    sizes = (config.batch_size, config.epochs, group.rank, group.world_size)
    if config.compat == "deit":
        return DeitBatches(config.view, config.seed, num_samples, *sizes)
    order = EpochOrder(config.seed, num_samples, config.view_count, config.view.repeats)
    return TrainBatches(order, *sizes)


def _save_first_views(batch: ViewBatch, config: RunConfig, path: Path) -> None:
    images = ingest_batch(batch, config.view, torch.float32)[:16]
    save_samples(images, config.view.mean, config.view.std, path)


def _save_weights(path: Path, model: torch.nn.Module) -> None:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state))
