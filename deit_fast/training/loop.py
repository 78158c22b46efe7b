"""`train`: one run from the images to the distilled student; the same call resumes it."""

from __future__ import annotations

import copy
import gc
import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.data.fingerprint import identify
from deit_fast.data.ingest import save_views
from deit_fast.data.open import open_loader, open_source, require_trained_classes
from deit_fast.decisions import (
    PREDICTIONS_FILE,
    Decisions,
    describe_decisions,
    join_rows,
)  # fmt: skip
from deit_fast.errors import InputError, translate_errors
from deit_fast.evaluation import (
    build_eval_loader,
    evaluate_model,
    evaluation_text,
    warn_of_substitutes,
)
from deit_fast.models.fuse import unfuse
from deit_fast.models.normalisation import require_normalisation
from deit_fast.models.student import trained_head
from deit_fast.models.weights import digest_state, save_weights
from deit_fast.models.weights_facts import FACTS_KEY, facts_text
from deit_fast.runtime.distributed import ProcessGroup, choose_device, joined_process_group
from deit_fast.runtime.environment import describe_command, describe_environment
from deit_fast.runtime.files import remove_orphans, require_replaceable, write_json
from deit_fast.runtime.locks import Lock, owned_folder
from deit_fast.runtime.metrics import METRICS, MetricsFile, row_figures, row_text
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.signals import Preempted, Signals
from deit_fast.runtime.speed import (
    StepMeter,
    StepProfiler,
    gc_paused,
    model_costs,
    peak_flops,
    training_flops,
)
from deit_fast.runtime.trackers import require_trackers
from deit_fast.runtime.weights_header import (
    BEST_FILE,
    BEST_KEY,
    BEST_METRIC,
    DIGEST_KEY,
    EMA_FILE,
    HEAD_KEY,
    MODEL_FILE,
)
from deit_fast.teacher_accuracy import check_accuracy
from deit_fast.training.batches import run_batches
from deit_fast.training.checkpoints import CheckpointWriter
from deit_fast.training.compiling import (
    CompileCount,
    compile_evaluation,
    log_compile,
    resolve_compile,
)
from deit_fast.training.identity import in_short
from deit_fast.training.optim import evaluated_average, learning_rate
from deit_fast.training.remarks import (
    say_initial_share,
    say_last_size,
    say_slow_step,
    say_unread_teacher_settings,
    say_unused_batches,
)
from deit_fast.training.state import create_state, find_checkpoint, resume, roll_back, settle
from deit_fast.training.step import TrainStep
from deit_fast.training.teacher import open_teacher
from deit_fast.views.plan import ViewPlan

log = logging.getLogger("deit_fast")

# While several ranks evaluate, they poll for a signal every 8 batches, which take a few seconds.
# Schedulers allow about ten seconds between SIGTERM and SIGKILL.
STOP_POLL_EVERY = 8
# Files of the run's folder that a run replaces.
OUTPUTS = (
    "config.json", "samples.png", METRICS, MODEL_FILE, EMA_FILE, BEST_FILE, PREDICTIONS_FILE,
    "result.json",
)  # fmt: skip

LOCK_FILE = ".lock-run"  # in the run's folder, while it is trained


def train(config: RunConfig) -> dict[str, Any]:
    """Train one model, in this process or, under torchrun, together with others.

    The first rank writes into ``config.output``: config.json, samples.png, metrics.jsonl,
    checkpoints/, the weights (see ``WEIGHTS_FILES``), predictions.json and result.json; if
    configured, also trackers.json, tensorboard/ and profile/.

    Returns:
        The content of result.json.

    Raises:
        InputError: wrong data, teacher, cache or configuration, or another process trains in this
            folder: raised before the first step. Later: the folder was moved or replaced.
        OSError: the disk is full or not writable; the newest checkpoints stay.
        FloatingPointError: a loss or gradient is not finite; it changed no weight, and the newest
            checkpoints stay.
        MemoryError: too little memory of the GPU or the host; names what it depends on.
        ChildProcessError: a process of the loader died.
        Preempted: SIGTERM, SIGUSR1 or Ctrl-C; the state is saved, the same call resumes the run.
    """
    device = choose_device(config.device)
    # Signals() comes second: while processes wait for each other in C code no Python handler runs,
    # and SIGTERM must still end them.
    with (
        joined_process_group(device) as group,
        Signals() as signals,
        ExitStack() as resources,
    ):
        processes = f" over {group.world_size} processes" if group.world_size > 1 else ""
        largest = max(size for _, size in ((0, config.batch_size), *config.batch_schedule))
        sizes = (
            f"batch_size={largest}{processes} in accumulate={config.accumulate} parts: "
            f"a larger accumulate computes the same steps with less memory"
        )
        with translate_errors(device, sizes), signals.raising():
            run = _Run(config, device, group, signals, resources)
        with translate_errors(device, sizes):
            return run.run()


class _NotFinite(Exception):
    """A step's loss or gradient was not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class _Due(NamedTuple):
    """What follows a step."""

    report: bool
    evaluate: bool
    save: bool


class _Run:
    """One call of ``train``.

    Args:
        resources: closes threads and files at the end, also after an error in this constructor.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, group: ProcessGroup, signals: Signals,
        resources: ExitStack,
    ) -> None:  # fmt: skip
        self.config, self.device, self.group, self.signals = config, device, group, signals
        self.finished = self.has_stepped = False
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"

        # -- one owner, before anything in the folder is read -----------------------------------
        self.lock = group.agree(lambda: self._own_folder(resources))
        found = group.agree(lambda: self._prepare(resources))
        group.require_equal(
            {"step": self.state.step, "checkpoint": found or "none",
             "number of samples": self.source.num_samples, **in_short(self.state.identity)},
            f"{self.output} and {config.data.root} must be the same folders on all nodes",
        )  # fmt: skip
        if not found:
            group.agree(self._check_teacher)

        # -- step, which may refuse the settings, before anything is written --------------------
        is_changed = self.is_branch or bool(config.accept_change and found)
        self.config = config = self.config.replace(accept_change=())  # for this start alone
        state = self.state
        self.compile_count = CompileCount()
        self.step_once = TrainStep(
            config, state.model, self.teacher, state.optimizer, state.ema, device, group
        )
        self.eval_forward = None
        if (mode := resolve_compile(config, device, state.model)) != "none":
            average = state.ema.module if state.ema is not None else None
            self.eval_forward = compile_evaluation(mode, average)

        # -- output ----------------------------------------------------------------------------
        self.writer = CheckpointWriter(self.checkpoints, self._require_owned, self._is_kept)
        resources.callback(self._close_writer)
        self.metrics = group.agree(lambda: self._open_output(resources))
        if is_changed:
            self._save()  # from now on the run belongs to the new content, or is on its own
            self._wait_for_checkpoint()
        self.rollbacks = self.batches_evaluated = 0
        self.evaluation: dict[str, Any] | None = None
        self.decisions: Decisions | None = None
        log.info(
            "training %s on %s x %d: %d samples of %d classes, %d epochs of %s steps, "
            "distillation: %s",
            config.model.name, device.type, group.world_size, self.source.num_samples,
            len(self.source.classes), config.epochs,
            ", then ".join(str(phase.per_epoch) for phase, _ in self.steps.reached()),
            config.loss.kind,
        )  # fmt: skip
        if group.is_first:
            say_unread_teacher_settings(config)
            say_unused_batches(config, self.steps)
        log_compile(config, device, state.model)

    def _own_folder(self, resources: ExitStack) -> Lock | None:
        """The run's folder, locked by the first rank until ``resources`` close."""
        if not self.group.is_first:
            return None
        require_trackers(self.config.track)
        lock = resources.enter_context(owned_folder(self.output, LOCK_FILE, "the run"))
        for name in OUTPUTS:
            require_replaceable(self.output / name)  # now, not at the end of the run
        return lock

    def _require_owned(self) -> None:
        if self.lock is not None:
            self.lock.require_held()

    def _open_output(self, resources: ExitStack) -> MetricsFile | None:
        """Clean the folder up and write into it, in the first rank alone."""
        if not self.group.is_first:
            return None
        for folder in (self.output, self.checkpoints):
            remove_orphans(folder)
        write_json(self.output / "config.json", to_dict(self.config))
        metrics = MetricsFile(self.config, self.output, self.state.step, self.state.rows)
        resources.callback(lambda: metrics.close(self.finished))
        return metrics

    def _prepare(self, resources: ExitStack) -> str:
        """Data, teacher, and the state at step 0 or from a checkpoint, whose name it returns."""
        device, group = self.device, self.group
        config = self.config
        checkpoint = find_checkpoint(config)

        # -- data ------------------------------------------------------------------------------
        self.source = open_source(config.data, "train", config.view.image_size)
        held_out = self.held_out = open_source(config.data, "val", config.view.image_size)
        require_trained_classes(self.source, held_out)
        self.eval_loader = build_eval_loader(config, held_out, device, group)
        self.batches = run_batches(config, self.source.num_samples, group)
        self.config = config = settle(config, checkpoint, self.batches.steps)
        self.plan = ViewPlan(config.view, self.source.num_samples)
        self.batches = run_batches(config, self.source.num_samples, group)
        self.batches.require_parts(config.accumulate)
        self.steps = self.batches.steps
        self.total = min(len(self.batches), config.max_steps or len(self.batches))

        # -- teacher ---------------------------------------------------------------------------
        self.teacher = open_teacher(config, self.source, device)
        resources.callback(self.teacher.close)

        # -- model and optimiser, at step 0 or from a checkpoint -------------------------------
        classes = self.source.classes
        self.state = create_state(config, len(classes), device, classes)
        self.state.identity |= identify(self.source, held_out) | self.teacher.identity()
        self.is_branch = checkpoint is not None and checkpoint.is_branch
        if checkpoint is None:
            require_normalisation(self.state.model, config)
            return ""
        resume(config, self.state, checkpoint)
        if self.state.step > len(self.batches):
            raise InputError(
                f"{checkpoint.path} is of step {self.state.step}, but with "
                f"{self.source.num_samples} training images the run has only {len(self.batches)} "
                f"steps: restore the data, or choose another --output"
            )
        return checkpoint.path.name

    def _check_teacher(self) -> None:
        """Try a teacher that is run online, in the first rank alone."""
        network = self.teacher.network if self.teacher.is_online else None
        if network is not None and self.group.is_first:
            check_accuracy(network, self.config, self.device, self.source, self.held_out)

    # -----------------------------------------------------------------------------------------
    # Steps
    # -----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """All remaining steps, rolled back where numbers are not finite; returns the result."""
        with Progress("train", self.total, self.state.step, paced=False) as self.progress:
            while True:
                try:
                    self._train_steps()
                    return self._finish()
                except _NotFinite as error:
                    self._roll_back(error)
                    self.progress.go_back(self.state.step)

    def _train_steps(self) -> None:
        """From the state's step to the last one."""
        config, state = self.config, self.state
        self._make_up_evaluation()
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
        meter = StepMeter(self.group, self.device)
        utilisation = self._utilisation()
        profiled = config.profile_steps if self.group.is_first else 0
        with (
            gc_paused() as freeze_garbage,
            StepProfiler(profiled, self.output / "profile", self.device) as profiler,
            ExitStack() as first_step,
        ):
            first_step.callback(freeze_garbage)
            first_step.enter_context(self.signals.raising())  # it compiles; nothing is lost
            for batch in meter.timed(loader):
                if state.step == 0 and self.group.is_first:
                    self._require_owned()
                    save_views(batch, config.view, self.output / "samples.png")
                meter.utilisation = utilisation.get(batch.size)
                lr = learning_rate(state.step, config, self.steps)
                if state.step not in state.skipped:
                    state.add(self.step_once(batch, state.step, lr, self._stop_requested()))
                    meter.count(len(batch) * self.group.world_size)
                state.step += 1
                state.substituted.update(batch.substituted)
                due = self._due()
                # Before what is due every step is polled, so that nothing has one that is not
                # finite. All ranks must agree on `keep`.
                stop = self._poll_stop(keep=0 if any(due) else 1)
                seconds = meter.lap()
                state.train_seconds += seconds
                if not self.has_stepped and self.group.is_first:
                    say_slow_step(seconds, config.log_every)
                self.has_stepped = True
                row = self._report(meter, lr) if due.report else None
                if row is None:
                    self.progress.advance()
                else:
                    self.progress.advance(line=row_text(row, self.total), figures=row_figures(row))
                if due.report:
                    self.compile_count.report(state.step)
                first_step.close()
                if stop:
                    self._save_and_exit()
                with meter.paused():
                    if due.evaluate:
                        self._evaluate()
                    if due.save:
                        self._save()
                    if due.report:
                        gc.collect()
                    if profiled:
                        self._require_owned()
                    profiler()
        self._wait_for_checkpoint()

    @property
    def _epoch(self) -> int:
        """Epochs begun, counted from 1."""
        return self.steps.begun(self.state.step)

    def _due(self) -> _Due:
        config, step, epoch = self.config, self.state.step, self._epoch
        done = step == self.total
        at_epoch_end = self.steps.locate(step)[1] == 0
        report = done or step % config.log_every == 0
        return _Due(
            report=report,
            evaluate=done or self._is_evaluation_due(),
            save=done
            or (at_epoch_end and epoch % config.save_every == 0)
            or self._is_kept(step)
            or (config.save_steps is not None and step % config.save_steps == 0),
        )

    def _is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step stays."""
        epoch, rest = self.steps.locate(step)
        every = self.config.keep_every
        return every is not None and rest == 0 and epoch % every == 0

    def _is_evaluation_due(self) -> bool:
        """Whether the last step ended an epoch that is evaluated."""
        epoch, rest = self.steps.locate(self.state.step)
        return epoch > 0 and rest == 0 and epoch % self.config.eval_every == 0

    def _utilisation(self) -> dict[int, float]:
        """Model FLOPs utilisation at one image a second, by the size of the images; empty on a CPU
        or an unknown GPU."""
        peak = peak_flops(self.device)
        if peak is None:
            return {}
        plain = unfuse(copy.deepcopy(self.state.model))
        return {
            size: training_flops(plain, size) / (peak * self.group.world_size)
            for size in self.config.view.sizes
        }

    def _report(self, meter: StepMeter, lr: float) -> dict[str, Any] | None:
        """Write a row of metrics and return it; all ranks must call this together."""
        state = self.state
        if meter.steps == 0:  # every step since the last report was left out
            return None
        means = state.take_means()
        images_left = self.steps.samples(self.total) - self.steps.samples(state.step)
        speed = meter.read(images_left, self.teacher.differences())
        row = {"step": state.step, "epoch": self._epoch, **means, "lr": lr, **speed}
        self._write_row("train", row)
        return row

    def _write_row(self, kind: str, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self._require_owned()
            self.metrics.write(kind, row)

    # -----------------------------------------------------------------------------------------
    # Signals, checkpoints, rollbacks
    # -----------------------------------------------------------------------------------------

    def _stop_requested(self) -> bool:
        """Whether this process was signalled."""
        return self.signals.received is not None

    def _poll_stop(self, keep: int) -> bool:
        """Whether to stop, judged by all steps but the ``keep`` newest; the same on all ranks.

        Raises:
            _NotFinite: one of these steps was not finite.
        """
        finite = self.step_once.finite
        stop = self.group.world_size == 1 and self._stop_requested()
        while (result := finite.poll(0 if stop else keep)) is not None:
            if not result.is_finite:
                raise _NotFinite(result.step, finite.describe(result))
            stop |= result.stop
        return stop

    def _save_and_exit(self) -> None:
        """Save and end the run.

        Raises:
            Preempted: always.
        """
        self._save()
        self._wait_for_checkpoint()
        signal = self.signals.received or "another rank was signalled"
        raise Preempted(
            signal,
            f"saved step {self.state.step} in {self.checkpoints}; the same command resumes the run",
        )

    def _save(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()
            self.state.rows = self.metrics.rows
            self.writer.save(self.state.step, self.state.to_checkpoint(self.config))

    def _wait_for_checkpoint(self) -> None:
        """Return, on all ranks, when the newest checkpoint is on the disk."""
        self.writer.wait()
        self.group.barrier()

    def _roll_back(self, error: _NotFinite) -> None:
        """Restore the newest checkpoint and leave the step out from now on.

        Raises:
            FloatingPointError: the configuration says stop, there is no checkpoint, or the run was
                rolled back too often.
        """
        text = f"{error}; it changed no weight, the checkpoints are in {self.checkpoints}"
        if self.config.on_nonfinite == "stop":
            raise FloatingPointError(text)
        self._wait_for_checkpoint()
        self.rollbacks += 1
        if self.rollbacks > self.config.max_rollbacks:
            raise FloatingPointError(f"{text}; {self.config.max_rollbacks} rollbacks did not help")
        skipped = [*self.state.skipped, error.step]
        if not roll_back(self.checkpoints, self.state):
            raise FloatingPointError(f"{text}; the run has no checkpoint yet to roll back to")
        self.state.skipped = skipped
        self.step_once.reset()
        if self.metrics is not None:
            self._require_owned()
            self.metrics.roll_back(self.state.step)
        log.warning("%s; rolled back to step %d, which leaves it out", error, self.state.step)

    # -----------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------

    def _make_up_evaluation(self) -> None:
        """Evaluate at the checkpoint's step if a signal interrupted the evaluation due there."""
        if self._is_evaluation_due() and self.state.evaluated_step < self.state.step:
            self._evaluate()
            self._save()

    def _evaluate(self) -> None:
        state, epoch = self.state, self._epoch
        if state.step == self.total and self.group.is_first:
            say_last_size(self.config, self.steps, self.total)
        self.decisions = Decisions() if state.step == self.total else None
        evaluation = self._evaluate_model(state.model, self.decisions)
        if state.ema is not None:
            average = evaluated_average(state.ema.module, state.model)
            evaluation["ema_top1"] = self._evaluate_model(average)["top1"]
        if evaluation["top1"] > state.best_top1:
            state.best_top1, state.best_epoch = evaluation["top1"], epoch
            state.best_step = state.step
            if self.group.is_first:
                state.keep_best()
        log.info("epoch %d  %s", epoch, evaluation_text(evaluation))
        self.progress.show({"top1": f"top-1 {100 * evaluation['top1']:.1f} %"})
        if state.evaluated_step < state.step:
            row = {key: value for key, value in evaluation.items() if key != "per_class"}
            self._write_row("eval", {"step": state.step, "epoch": epoch, **row})
        self.evaluation, state.evaluated_step = evaluation, state.step
        self.compile_count.report(state.step, "evaluation")

    def _evaluate_model(
        self, model: torch.nn.Module, decisions: Decisions | None = None
    ) -> dict[str, Any]:
        """Evaluate on all held-out images, over all ranks.

        The result is that of `deit-fast evaluate`, unless training is compiled: then evaluation is
        compiled too, for batches of one size, to which the last batch is padded.
        """
        with self.progress.part("eval", len(self.eval_loader)) as count:

            def after_batch() -> None:
                count()
                self._poll_stop_in_evaluation()

            return evaluate_model(
                model,
                self.eval_loader,
                self.source.classes,
                self.device,
                self.group,
                after_batch,
                forward=self.eval_forward,
                rows=self.eval_loader.batch_size if self.eval_forward is not None else None,
                decisions=decisions,
            )

    def _poll_stop_in_evaluation(self) -> None:
        # With several ranks a poll communicates and waits for the device: not after every batch.
        self.batches_evaluated += 1
        polls = self.group.world_size == 1 or self.batches_evaluated % STOP_POLL_EVERY == 0
        if polls and self.group.any(self._stop_requested(), self.device):
            self._save_and_exit()

    # -----------------------------------------------------------------------------------------
    # End
    # -----------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        """Write the weights and result.json; returns its content."""
        config, state = self.config, self.state
        if self.evaluation is None:  # resumed from the last checkpoint of a finished run
            self._evaluate()
        assert self.evaluation is not None and self.decisions is not None
        decisions = join_rows(self.group.gather(self.decisions.rows()))
        substituted = {path for paths in self.group.gather(
            sorted(state.substituted.union(self.eval_loader.substituted))) for path in paths
        }  # fmt: skip
        left_out = [skipped for skipped in state.skipped if skipped < state.step]
        trained = self.steps.samples(state.step)
        trained -= sum(self.steps.phase_of(skipped).batch_size for skipped in left_out)
        result = {
            **self.evaluation,
            "best_top1": state.best_top1,
            "best_epoch": state.best_epoch,
            "best_metric": BEST_METRIC,
            "classes": self.source.classes,
            "steps": state.step,
            "epochs": config.epochs,
            "skipped_steps": state.skipped,
            "processes": self.group.world_size,
            "train_seconds": round(state.train_seconds, 3),
            "images_per_s": round(trained / state.train_seconds, 2),
            "substituted": sorted(substituted),
            "distill": config.loss.kind,
            "teacher": self.teacher.describe(),
            "seed": config.seed,
            "view_seed": config.view.seed,
            "environment": describe_environment(self.device),
            "command": describe_command(),
        }
        if self.metrics is not None:
            self._require_owned()
            self.metrics.sync()
            result["metrics"] = {"rows": self.metrics.rows, "lost": self.metrics.lost}
            result["weights"] = self._write_weights()
            result |= model_costs(unfuse(copy.deepcopy(state.model)), config.view.image_size)
            result["weights_path"] = str(self.output / MODEL_FILE)
            predictions = describe_decisions(decisions, self.held_out)
            predictions["weights_digest"] = result["weights"][MODEL_FILE]
            write_json(self.output / PREDICTIONS_FILE, predictions)
            write_json(self.output / "result.json", result)
        warn_of_substitutes(sorted(substituted))
        if self.metrics is not None:
            paths = ", ".join(str(self.output / name) for name in result["weights"])
            log.info("finished; the weights are %s", paths)
        self.finished = True
        return result

    def _write_weights(self) -> dict[str, str]:
        """Write all weights of the run into its folder; returns their digests by file."""
        state = self.state
        digests = {MODEL_FILE: self._save_weights(MODEL_FILE, state.model.state_dict())}
        if state.ema is not None:
            digests[EMA_FILE] = self._save_weights(EMA_FILE, state.ema.module.state_dict())
            say_initial_share(self.config.optim, state.step)
        if state.best is None:
            log.warning(
                "%s is not written: the run goes on from a checkpoint of an earlier version, "
                "which lacks the best weights",
                BEST_FILE,
            )
            (self.output / BEST_FILE).unlink(missing_ok=True)
            return digests
        best = {"metric": BEST_METRIC, "value": state.best_top1, "epoch": state.best_epoch,
                "step": state.best_step}  # fmt: skip
        texts = {BEST_KEY: json.dumps(best)}
        return digests | {BEST_FILE: self._save_weights(BEST_FILE, state.best, texts)}

    def _save_weights(
        self, name: str, weights: dict[str, torch.Tensor], more: dict[str, str] | None = None
    ) -> str:
        """Write weights and texts about them into the run's folder; returns the weights' digest."""
        digest = digest_state(weights)
        texts = {
            "identity": json.dumps(self.state.identity),
            FACTS_KEY: facts_text(self.config, self.source.classes),
            DIGEST_KEY: digest,
            **(more or {}),
        }
        if (head := trained_head(self.state.model)) != "both":
            texts[HEAD_KEY] = head
        save_weights(self.output / name, weights, texts)
        return digest

    def _close_writer(self) -> None:
        try:
            self.writer.wait()
        except (OSError, InputError) as error:
            log.warning("the newest checkpoint could not be written: %s", error)
