"""One student's run: its state, its folder, and what follows each of its steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.data.batch import ViewBatch
from deit_fast.data.ingest import save_views
from deit_fast.decisions import PREDICTIONS_FILE, Decisions
from deit_fast.errors import InputError, first_line
from deit_fast.evaluation import Evaluated, evaluation_text
from deit_fast.models.fuse import unfuse
from deit_fast.models.normalisation import require_normalisation
from deit_fast.models.student import forward_heads
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.runtime.files import (
    remove_orphans,
    require_replaceable,
    require_writable,
    write_json,
)
from deit_fast.runtime.locks import Lock, owned_folder
from deit_fast.runtime.metrics import METRICS, MetricsFile
from deit_fast.runtime.speed import Lap, StepMeter, peak_flops, training_flops
from deit_fast.runtime.trackers import require_trackers
from deit_fast.runtime.weights_header import BEST_FILE, EMA_FILE, MODEL_FILE
from deit_fast.training.checkpoints import CheckpointWriter, end_checksum
from deit_fast.training.compiling import (
    CompileCount,
    compile_evaluation,
    log_compile,
    resolve_compile,
)
from deit_fast.training.identity import in_short
from deit_fast.training.mirror import GRACE_SECONDS, Mirror
from deit_fast.training.optim import evaluated_average, learning_rate
from deit_fast.training.remarks import say_last_size
from deit_fast.training.state import (
    Checkpoint,
    create_state,
    digest_settings,
    find_checkpoint,
    resume,
    roll_back,
    settle,
)
from deit_fast.training.step import CheckResult, TrainStep
from deit_fast.training.step_inputs import StepInputs
from deit_fast.training.teacher import RunTeacher

if TYPE_CHECKING:
    from deit_fast.training.run_data import RunData

log = logging.getLogger("deit_fast")

# Files of the run's folder that a run replaces.
OUTPUTS = (
    "config.json", "samples.png", METRICS, MODEL_FILE, EMA_FILE, BEST_FILE, PREDICTIONS_FILE,
    "result.json",
)  # fmt: skip

LOCK_FILE = ".lock-run"  # in the run's folder, while it is trained


class Due(NamedTuple):
    """What follows a step."""

    report: bool
    evaluate: bool
    save: bool


class Run:
    """One student of a pass.

    Its life: ``own_folder``, ``find_checkpoint``, ``settle``, ``restore``, ``build`` and
    ``open_output``. Then for each batch ``train`` and ``poll``, and what is due: ``report``,
    ``to_evaluate`` and ``take_evaluation``, ``save``. At the end ``results.finish``.

    Args:
        name: for messages; empty where the run is the only one of its pass.
        stop_requested: whether this process was signalled.

    Attributes:
        due: what follows the last step.
        failure: why the run ended before its last step; empty where it did not.
    """

    def __init__(
        self,
        config: RunConfig,
        name: str,
        device: torch.device,
        group: ProcessGroup,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.config, self.name, self.device, self.group = config, name, device, group
        self._stop_requested = stop_requested
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.finished = False
        self.failure = ""
        self.due = Due(False, False, False)
        self.evaluation: dict[str, Any] | None = None
        self.decisions: Decisions | None = None
        self._lock: Lock | None = None
        self.mirror: Mirror | None = None
        if config.mirror is not None:
            self.mirror = Mirror(config.mirror, self.output, self._is_kept)
        self._checkpoint: Checkpoint | None = None
        self._not_finite: CheckResult | None = None
        self._rollbacks = 0
        self._lr = 0.0

    # -----------------------------------------------------------------------------------------
    # Before the first step
    # -----------------------------------------------------------------------------------------

    def own_folder(self, resources: ExitStack) -> None:
        """Lock the run's folder, in the first rank, until ``resources`` close."""
        if not self.group.is_first:
            return
        require_writable("--output", self.output)
        require_trackers(self.config.track)
        self._lock = resources.enter_context(owned_folder(self.output, LOCK_FILE, "the run"))
        for name in OUTPUTS:
            require_replaceable(self.output / name)  # now, not at the end of the run

    def require_owned(self) -> None:
        if self._lock is not None:
            self._lock.require_held()

    def claim_mirror(self) -> None:
        """Make the mirror this run's, in the first rank, and copy the folder's newest checkpoint
        there, so that the other machines find it."""
        if self.mirror is None or not self.group.is_first:
            return
        self.mirror.claim(digest_settings(self.config), self.config.resume)
        if self.config.resume:
            self.mirror.offer()

    def find_checkpoint(self) -> None:
        if self.mirror is not None and self.config.resume:
            self.mirror.fetch()
        self._checkpoint = find_checkpoint(self.config)

    def start(self) -> dict[str, Any]:
        """What this rank starts from, which must be equal in all ranks."""
        if self._checkpoint is None:
            return {"checkpoint": "none"}
        path = self._checkpoint.path
        # The end of the file has the checksums of all of it: two runs may have files of one name.
        return {"checkpoint": path.name, "bytes of that checkpoint": end_checksum(path)}

    def settle(self, data: RunData) -> None:
        """Let the checkpoint decide what it does of the configuration."""
        self.config = settle(self.config, self._checkpoint, data.steps)

    def restore(self, data: RunData, teacher: RunTeacher) -> None:
        """Create the state, at step 0 or from the checkpoint."""
        config, checkpoint, classes = self.config, self._checkpoint, data.source.classes
        self.data, self.steps, self.teacher = data, data.steps, teacher
        data.batches.require_parts(config.accumulate)
        self.state = create_state(config, len(classes), self.device, classes, teacher.terms)
        self.state.identity |= data.facts | teacher.identity()
        is_branch = checkpoint is not None and checkpoint.is_branch
        self._is_changed = is_branch or bool(config.accept_change and checkpoint)
        self.config = config.replace(accept_change=())  # for this start alone
        self.found = "" if checkpoint is None else checkpoint.path.name
        self._checkpoint = None  # it holds a copy of all weights
        if checkpoint is None:
            require_normalisation(self.state.model, config)
            return
        resume(config, self.state, checkpoint)
        if self.state.step > len(data.batches):
            raise InputError(
                f"{checkpoint.path} is of step {self.state.step}, but with "
                f"{data.source.num_samples} training images the run has only {len(data.batches)} "
                f"steps: restore the data, or choose another --output"
            )

    def facts(self) -> dict[str, Any]:
        """What must be equal in all ranks."""
        return {
            "number of samples": self.data.source.num_samples,
            **in_short(self.state.identity),
        }

    def build(self) -> None:
        """Create the step, which may refuse the settings, before anything is written."""
        config, state = self.config, self.state
        self.compile_count = CompileCount()
        self.step_once = TrainStep(
            config, state.model, self.teacher, state.optimizer, state.ema, self.device, self.group,
            state.heads,
        )  # fmt: skip
        self._eval_forward = None
        if (mode := resolve_compile(config, self.device, state.model)) != "none":
            average = state.ema.module if state.ema is not None else None
            self._eval_forward = compile_evaluation(mode, average)
        self._meter = StepMeter(self.group, self.device)
        self._utilisation = self._utilisation_by_size()

    def open_output(self, resources: ExitStack) -> None:
        """Clean the folder up and write into it."""
        self._writer = CheckpointWriter(
            self.checkpoints,
            self.require_owned,
            self._is_kept,
            None if self.mirror is None else self.mirror.submit,
        )
        resources.callback(self._close_writer)
        self.metrics = self.group.agree(lambda: self._open_metrics(resources))
        if self._is_changed:
            self.save()  # from now on the run belongs to the new content, or is on its own
            self.wait_for_checkpoint()
        config, steps = self.config, self.steps
        log.info(
            "training %s on %s x %d: %d samples of %d classes, %d epochs of %s steps, "
            "distillation: %s",
            config.model.name, self.device.type, self.group.world_size,
            self.data.source.num_samples, len(self.data.source.classes), config.epochs,
            ", then ".join(str(phase.per_epoch) for phase, _ in steps.reached()),
            config.loss.kind,
        )  # fmt: skip
        log_compile(config, self.device, self.state.model)

    def _open_metrics(self, resources: ExitStack) -> MetricsFile | None:
        if not self.group.is_first:
            return None
        for folder in (self.output, self.checkpoints):
            remove_orphans(folder)
        write_json(self.output / "config.json", to_dict(self.config))
        metrics = MetricsFile(self.config, self.output, self.state.step, self.state.rows)
        resources.callback(lambda: metrics.close(self.finished))
        return metrics

    def _utilisation_by_size(self) -> dict[int, float]:
        """Model FLOPs utilisation at one image a second, by the size of the images; empty on a CPU,
        an unknown GPU, and for a model whose operations cannot be counted."""
        peak = peak_flops(self.device)
        if peak is None:
            return {}
        found: dict[int, float] = {}
        try:
            plain = unfuse(copy.deepcopy(self.state.model))
            for size in self.config.view.sizes:
                found[size] = training_flops(plain, size) / (peak * self.group.world_size)
        except Exception as error:  # code of others, which may not run on the meta device
            log.info("no mfu: the model's operations cannot be counted (%s)", first_line(error))
        return found

    # -----------------------------------------------------------------------------------------
    # Steps
    # -----------------------------------------------------------------------------------------

    def train(self, batch: ViewBatch, inputs: StepInputs) -> None:
        """Apply the batch of the state's step.

        Raises:
            InputError: the model has changed images that other students take too.
        """
        state = self.state
        if state.step == 0 and self.group.is_first:
            self.require_owned()
            save_views(batch, self.config.view, self.output / "samples.png")
        self._meter.utilisation = self._utilisation.get(batch.size)
        self._lr = learning_rate(state.step, self.config, self.steps)
        if state.step not in state.skipped:
            with self.compile_count.counting():
                numbers = self.step_once(
                    batch, state.step, self._lr, self._stop_requested(), inputs
                )
            if inputs.is_changed:
                raise InputError(
                    f"the model {self.config.model.name} of {self.output} writes into its input, "
                    f"which several students share: let it copy the images, or train it alone"
                )
            state.add(numbers)
            self._meter.count(len(batch) * self.group.world_size)
        state.step += 1
        state.substituted.update(batch.substituted)
        self.due = self._due()

    def poll(self, drain: bool) -> bool:
        """Judge all steps but, unless ``drain``, the newest, which may still be running.

        Sets what ``recover`` acts on where one was not finite. The result is the same on all
        ranks, which must agree on ``drain``.

        Returns:
            Whether a rank was signalled.
        """
        finite, stop = self.step_once.finite, False
        while self._not_finite is None:
            result = finite.poll(0 if drain or stop else 1)
            if result is None:
                break
            stop |= result.stop
            if not result.is_finite:
                self._not_finite = result
        return stop

    @property
    def is_finite(self) -> bool:
        """Whether every step was, as far as polled."""
        return self._not_finite is None

    def add_time(self, lap: Lap) -> None:
        """Record the time of the last step."""
        self._meter.add(lap)
        self.state.train_seconds += lap.seconds

    @property
    def epoch(self) -> int:
        """Epochs begun, counted from 1."""
        return self.steps.begun(self.state.step)

    def _due(self) -> Due:
        config, step, epoch = self.config, self.state.step, self.epoch
        done = step == self.data.total
        at_epoch_end = self.steps.locate(step)[1] == 0
        report = done or step % config.log_every == 0
        return Due(
            report=report,
            evaluate=done or self.is_evaluation_due,
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

    def report(self) -> dict[str, Any] | None:
        """Write a row of metrics and return it; all ranks must call this together."""
        state = self.state
        if self._meter.steps == 0:  # every step since the last report was left out
            return None
        means = state.take_means()
        images_left = self.steps.samples(self.data.total) - self.steps.samples(state.step)
        speed = self._meter.read(images_left, self.teacher.differences())
        row = {"step": state.step, "epoch": self.epoch, **means, "lr": self._lr, **speed}
        self._write_row("train", row)
        return row

    def _write_row(self, kind: str, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.require_owned()
            self.metrics.write(kind, row)

    # -----------------------------------------------------------------------------------------
    # Checkpoints, steps that are not finite
    # -----------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()
            self.state.rows = self.metrics.rows
            self._writer.save(self.state.step, self.state.to_checkpoint(self.config))

    def wait_for_checkpoint(self) -> None:
        """Return, on all ranks, when the newest checkpoint is on the disk."""
        self._writer.wait()
        self.group.barrier()

    def copied(self) -> str:
        """What the mirror has of the newest checkpoint, after a signal; empty without a mirror."""
        if self.mirror is None or not self.group.is_first:
            return ""
        return f", {self.mirror.wait(GRACE_SECONDS)}"

    def recover(self) -> None:
        """After a step that was not finite: restore the newest checkpoint and leave the step out
        from now on.

        Sets ``failure``, and writes it into metrics.jsonl, where the configuration says stop, there
        is no checkpoint, or the run was rolled back too often.
        """
        self.failure = self._roll_back()
        if self.failure:
            self._write_row("failure", {"step": self.state.step, "reason": self.failure})

    def _roll_back(self) -> str:
        """Why the run cannot go on; empty where it was rolled back."""
        assert self._not_finite is not None
        bad, self._not_finite = self._not_finite, None
        message = self.step_once.finite.describe(bad)
        text = f"{message}; it changed no weight, the checkpoints are in {self.checkpoints}"
        if self.config.on_nonfinite == "stop":
            return text
        self.wait_for_checkpoint()
        self._rollbacks += 1
        if self._rollbacks > self.config.max_rollbacks:
            return f"{text}; {self.config.max_rollbacks} rollbacks did not help"
        skipped = [*self.state.skipped, bad.step]
        if not roll_back(self.checkpoints, self.state):
            return f"{text}; the run has no checkpoint yet to roll back to"
        self.state.skipped = skipped
        self.step_once.reset()
        self._meter = StepMeter(self.group, self.device)
        if self.metrics is not None:
            self.require_owned()
            self.metrics.roll_back(self.state.step)
        log.warning("%s; rolled back to step %d, which leaves it out", message, self.state.step)
        return ""

    def _close_writer(self) -> None:
        try:
            self._writer.wait()
        except (OSError, InputError) as error:
            log.warning("the newest checkpoint could not be written: %s", error)

    # -----------------------------------------------------------------------------------------
    # Evaluation
    # -----------------------------------------------------------------------------------------

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the last step ended an epoch that is evaluated."""
        epoch, rest = self.steps.locate(self.state.step)
        return epoch > 0 and rest == 0 and epoch % self.config.eval_every == 0

    def to_evaluate(self) -> list[Evaluated]:
        """The student and, where it has one, its moving average, for ``take_evaluation``.

        The result is that of `deit-fast evaluate`, unless training is compiled: then evaluation is
        compiled too, for batches of one size, to which the last batch is padded.
        """
        state = self.state
        is_last = state.step == self.data.total
        if is_last and self.group.is_first:
            say_last_size(self.config, self.steps, self.data.total)
        self.decisions = Decisions() if is_last else None
        rows = self.data.eval_loader.batch_size if self._eval_forward is not None else None
        models = [Evaluated(state.model, self._forward, rows, self.decisions)]
        if state.ema is not None:
            average = evaluated_average(state.ema.module, state.model)
            models.append(Evaluated(average, self._forward, rows))
        return models

    def _forward(self, model: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with self.compile_count.counting():
            return (self._eval_forward or forward_heads)(model, images)

    def take_evaluation(self, found: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Take the results of ``to_evaluate`` from ``found``, and write a row of metrics.

        Returns:
            The student's, with the accuracy of the average.
        """
        state, epoch = self.state, self.epoch
        evaluation = next(found)
        if state.ema is not None:
            evaluation["ema_top1"] = next(found)["top1"]
        if evaluation["top1"] > state.best_top1:
            state.best_top1, state.best_epoch = evaluation["top1"], epoch
            state.best_step = state.step
            if self.group.is_first:
                state.keep_best()
        log.info("epoch %d  %s", epoch, evaluation_text(evaluation))
        if state.evaluated_step < state.step:
            row = {key: value for key, value in evaluation.items() if key != "per_class"}
            self._write_row("eval", {"step": state.step, "epoch": epoch, **row})
        self.evaluation, state.evaluated_step = evaluation, state.step
        self.compile_count.report(state.step, "evaluation")
        return evaluation
