"""`train`: from the images to distilled students, one or several; the same call resumes them.

One pass over the views serves all students: each batch is loaded, and its teacher asked, once.
Then the students take it, one after another. A single run is a pass with one student.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.open import open_loader
from deit_fast.errors import translate_errors
from deit_fast.evaluation import evaluate_models
from deit_fast.runtime.distributed import ProcessGroup, choose_device, joined_process_group
from deit_fast.runtime.metrics import row_figures, row_text
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.run_names import log_prefix, short_names
from deit_fast.runtime.signals import Preempted, Signals
from deit_fast.runtime.speed import StepClock, StepProfiler, gc_paused
from deit_fast.students import refusals_of, require_agreement
from deit_fast.teacher_accuracy import check_accuracy
from deit_fast.training.remarks import (
    say_features,
    say_slow_step,
    say_teachers,
    say_unread_teacher_settings,
    say_unused_batches,
)
from deit_fast.training.results import finish
from deit_fast.training.run import Run
from deit_fast.training.run_data import RunData
from deit_fast.training.step_inputs import StepInputs
from deit_fast.training.teacher import open_teacher

log = logging.getLogger("deit_fast")
T = TypeVar("T")

# While several ranks evaluate, they poll for a signal every 8 batches, which take a few seconds.
# Schedulers allow about ten seconds between SIGTERM and SIGKILL.
STOP_POLL_EVERY = 8


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
    return train_together([config])[0]


def train_together(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Train several students in one pass over the views; each is bit for bit its single run.

    Students whose checkpoints are of different steps meet again: those ahead wait.

    Args:
        configs: one for each student, which agree as ``require_agreement`` says.

    Returns:
        The content of each result.json.

    Raises:
        InputError: also where the students do not agree.
        FloatingPointError: a student's loss or gradient is not finite. It stopped there, the
            others are finished.
        others: as ``train``.
    """
    require_agreement(configs)
    config = configs[0]
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
            all_runs = _Pass(configs, device, group, signals, resources)
        with translate_errors(device, sizes):
            return all_runs.run()


class _Pass:
    """One call of ``train``: the batches, and the runs that take them.

    Attributes:
        runs: in the order given.
        active: those that go on; a run whose numbers are not finite leaves.

    Args:
        resources: closes threads and files at the end, also after an error in this constructor.
    """

    def __init__(
        self, configs: Sequence[RunConfig], device: torch.device, group: ProcessGroup,
        signals: Signals, resources: ExitStack,
    ) -> None:  # fmt: skip
        self.device, self.group, self.signals = device, group, signals
        names = short_names([Path(config.output) for config in configs])
        self.runs = [
            Run(config, name if len(configs) > 1 else "", device, group, self._stop_requested)
            for config, name in zip(configs, names, strict=True)
        ]
        self.active = list(self.runs)
        self._batches_evaluated, self._has_stepped = 0, False
        self._figures: dict[str, dict[str, str]] = {}

        # -- one owner, before anything in a folder is read --------------------------------------
        group.agree(lambda: self._each(lambda run: run.own_folder(resources)))
        # -- one start, before minutes of work on the data ---------------------------------------
        group.agree(lambda: self._each(Run.claim_mirror))
        group.agree(lambda: self._each(Run.find_checkpoint))
        for run in self.runs:
            group.require_equal(run.start(), f"{run.output} must be the same folder on all nodes")
        group.agree(lambda: self._prepare(resources))
        for run in self.runs:
            group.require_equal(
                run.facts(), f"{run.config.data.root} must be the same folder on all nodes"
            )
        group.agree(self._check_teacher)

        # -- steps, which may refuse the settings, before anything is written --------------------
        self._each(Run.build)
        self._each(lambda run: run.open_output(resources))
        if group.is_first:
            say_unread_teacher_settings(self.runs[0].config)
            self._each(lambda run: say_teachers(run.config, run.teacher.logit_teachers))
            self._each(lambda run: say_features(run.config, run.teacher.terms))
            say_unused_batches(self.runs[0].config, self.data.steps)

    def _prepare(self, resources: ExitStack) -> None:
        """Data, teacher, and each run's state at step 0 or from its checkpoint."""
        self.data = data = RunData(self.runs[0].config, self.device, self.group)
        self._each(lambda run: run.settle(data))
        configs = [run.config for run in self.runs]
        # How DistributedDataParallel cuts a compiled graph is one setting of the process.
        require_agreement(configs, ["compile"] if self.group.world_size > 1 else [])
        data.order(configs[0])
        distilled = [config for config in configs if config.loss.kind != "none"]
        self.teacher = open_teacher((distilled or configs)[0], data.source, self.device)
        resources.callback(self.teacher.close)
        self._each(lambda run: run.restore(data, self.teacher.of(run.config)))

    def _check_teacher(self) -> None:
        """Try a teacher that is run online, in the first rank alone, before a new run."""
        new = [run for run in self.runs if run.teacher.is_online and not run.found]
        if new and self.group.is_first:
            network, config = self.teacher.network, new[0].config
            assert network is not None
            check_accuracy(network, config, self.device, self.data.source, self.data.held_out)

    def _each(self, action: Callable[[Run], T], runs: Iterable[Run] | None = None) -> list[T]:
        """The results of ``action`` for each run, by default all; log and refusals name the run."""
        results = []
        for run in self.runs if runs is None else runs:
            with log_prefix(run.name), refusals_of(run.name):
                results.append(action(run))
        return results

    # -----------------------------------------------------------------------------------------
    # Steps
    # -----------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """All remaining steps of all runs; returns their results.

        Raises:
            FloatingPointError: a run has failed; the others are finished.
        """
        with Progress("train", self.data.total, self._step, paced=False) as self.progress:
            while not self._train_steps():
                self.progress.go_back(self._step)
            results = self._finish()
        failed = [run for run in self.runs if run.failure]
        if not failed:
            return results
        texts = [f"{run.name}: {run.failure}" if run.name else run.failure for run in failed]
        texts += [f"{run.name} is finished" for run in self.active]
        raise FloatingPointError("; ".join(texts))

    @property
    def _step(self) -> int:
        """Step of the run that is farthest behind."""
        return min((run.state.step for run in self.active), default=self.data.total)

    def _train_steps(self) -> bool:
        """From that step to the last one; returns False where the batches must start elsewhere."""
        start, first = self._step, self.runs[0]
        self._make_up_evaluations()
        if waiting := [run for run in self.active if start < run.state.step < self.data.total]:
            self._each(
                lambda run: log.info("waits at step %d for the others", run.state.step), waiting
            )
        loader = open_loader(
            first.config.data,
            self.data.source,
            self.data.plan,
            self.data.batches,
            device=self.device,
            start=start,
            stop=self.data.total,
            attach=self.teacher.attach(self.data.batches, start),
        )
        clock = StepClock()
        profiled = first.config.profile_steps if self.group.is_first else 0
        with (
            gc_paused() as freeze_garbage,
            StepProfiler(profiled, first.output / "profile", self.device) as profiler,
            ExitStack() as first_step,
        ):
            first_step.callback(freeze_garbage)
            if not self._has_stepped:
                first_step.enter_context(self.signals.raising())  # it compiles; nothing is lost
            for step, batch in enumerate(clock.timed(loader), start):
                runs = [run for run in self.active if run.state.step == step]
                self._train(runs, batch)
                stop = self._poll(runs)
                lap = clock.lap()
                if not self._has_stepped and self.group.is_first:
                    say_slow_step(lap.seconds, first.config.log_every)
                self._has_stepped = True
                bad = [run for run in runs if not run.is_finite]
                if bad:
                    self._recover(bad)
                    runs = [run for run in runs if run not in bad]
                for run in runs:
                    run.add_time(lap)
                self._each(self._report, [run for run in runs if run.due.report])
                self.progress.advance()
                first_step.close()
                if stop and not bad:  # otherwise after the next step
                    self._save_and_exit()
                with clock.paused():
                    self._evaluate([run for run in runs if run.due.evaluate])
                    self._each(Run.save, [run for run in runs if run.due.save])
                    if any(run.due.report for run in runs):
                        gc.collect()
                    if profiled:
                        first.require_owned()
                    profiler()
                if bad and self._step != step + 1:
                    return not self.active
        return True

    def _train(self, runs: Sequence[Run], batch: ViewBatch) -> None:
        """Apply a batch to each run."""
        inputs = StepInputs(kept=len(runs) > 1)
        by_reads = {self.teacher.reads: batch}  # with what the loader has attached

        def train(run: Run) -> None:
            reads = run.teacher.reads
            if reads not in by_reads:
                by_reads[reads] = run.teacher.with_stored(batch)
            run.train(by_reads[reads], inputs)

        self._each(train, runs)

    def _poll(self, runs: Sequence[Run]) -> bool:
        """Judge the last steps; returns whether to stop, the same on all ranks."""
        stop = self.group.world_size == 1 and self._stop_requested()
        # Before what is due every step is polled, so that nothing has one that is not finite. All
        # ranks must agree on `drain`.
        drain = stop or any(any(run.due) for run in runs)
        for run in runs:
            stop |= run.poll(drain)
        if stop or not all(run.is_finite for run in runs):
            for run in runs:
                stop |= run.poll(drain=True)
        return stop

    def _recover(self, bad: Sequence[Run]) -> None:
        """Roll back the runs whose numbers are not finite; those that cannot go on leave."""
        self._each(Run.recover, bad)
        self.active = [run for run in self.active if not run.failure]
        if self.active:
            failed = [run for run in bad if run.failure]
            self._each(lambda run: log.error("%s; the others go on", run.failure), failed)

    def _report(self, run: Run) -> None:
        if (row := run.report()) is not None:
            self._show(run, row_figures(row), row_text(row, self.data.total))
        run.compile_count.report(run.state.step)

    def _show(self, run: Run, figures: dict[str, str], line: str = "") -> None:
        """A run's figures beside the bar; where there are several runs, with their names."""
        for name, text in figures.items():
            texts = self._figures.setdefault(name, {})
            texts[run.name] = f"{run.name} {text}".lstrip()
            if name not in ("speed", "wait"):  # which are those of the pass
                figures = figures | {name: ", ".join(texts.values())}
        self.progress.advance(0, line, figures)

    # -----------------------------------------------------------------------------------------
    # Signals
    # -----------------------------------------------------------------------------------------

    def _stop_requested(self) -> bool:
        """Whether this process was signalled."""
        return self.signals.received is not None

    def _save_and_exit(self) -> NoReturn:
        """Save all runs and end.

        Raises:
            Preempted: always.
        """
        self._each(Run.save, self.active)
        self._each(Run.wait_for_checkpoint, self.active)
        signal = self.signals.received or "another rank was signalled"
        where = ", ".join(
            f"step {run.state.step} in {run.checkpoints}{run.copied()}" for run in self.active
        )
        raise Preempted(signal, f"saved {where}; the same command resumes the run")

    def _poll_stop_in_evaluation(self) -> None:
        # With several ranks a poll communicates and waits for the device: not after every batch.
        self._batches_evaluated += 1
        polls = self.group.world_size == 1 or self._batches_evaluated % STOP_POLL_EVERY == 0
        if polls and self.group.any(self._stop_requested(), self.device):
            self._save_and_exit()

    # -----------------------------------------------------------------------------------------
    # Evaluation and end
    # -----------------------------------------------------------------------------------------

    def _make_up_evaluations(self) -> None:
        """Evaluate the runs of whose checkpoint's step a signal interrupted the evaluation."""
        due = [run for run in self.active if run.is_evaluation_due]
        due = [run for run in due if run.state.evaluated_step < run.state.step]
        self._evaluate(due)
        self._each(Run.save, due)

    def _evaluate(self, runs: Sequence[Run]) -> None:
        """Evaluate these runs in one pass over the held-out images."""
        if not runs:
            return
        models = [model for of_run in self._each(Run.to_evaluate, runs) for model in of_run]
        loader, classes = self.data.eval_loader, self.data.source.classes
        with self.progress.part("eval", len(loader)) as count:

            def after_batch() -> None:
                count()
                self._poll_stop_in_evaluation()

            found = iter(
                evaluate_models(models, loader, classes, self.device, self.group, after_batch)
            )

        def take(run: Run) -> None:
            evaluation = run.take_evaluation(found)
            self._show(run, {"top1": f"top-1 {100 * evaluation['top1']:.1f} %"})

        self._each(take, runs)

    def _finish(self) -> list[dict[str, Any]]:
        self._each(Run.wait_for_checkpoint, self.active)
        # Runs without an evaluation were resumed from their last checkpoint.
        self._evaluate([run for run in self.active if run.evaluation is None])
        return self._each(finish, self.active)
