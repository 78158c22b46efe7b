"""Which epoch a step belongs to, and how many samples it has."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, TypeAlias

BatchSchedule: TypeAlias = tuple[tuple[int, int], ...]
"""Pairs of a first epoch and the samples of a step over all ranks from then on; epochs rise."""


class Phase(NamedTuple):
    """Epochs with one batch size."""

    epoch: int  # the first
    step: int  # the first
    batch_size: int  # samples of a step over all ranks
    per_epoch: int  # steps of an epoch


@dataclass(frozen=True)
class RunSteps:
    """The steps of a run, whose batch size may change between epochs.

    Args:
        offered: views of an epoch over all ranks, enough for each batch. Those that fill no batch
            at the end of an epoch are dropped.
        batch_sizes: from epoch 0 on.
        epochs: number of epochs.
    """

    offered: int
    batch_sizes: BatchSchedule
    epochs: int

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Also those that begin after the last epoch."""
        phases: list[Phase] = []
        for epoch, batch_size in self.batch_sizes:
            step = _first_step(phases[-1], epoch) if phases else 0
            phases.append(Phase(epoch, step, batch_size, self.offered // batch_size))
        return tuple(phases)

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.first(self.epochs)

    def phase_of(self, step: int) -> Phase:
        """The phase of a step; the steps after the run are those of more epochs."""
        return self.phases[bisect_right(self.phases, step, key=attrgetter("step")) - 1]

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch and position in it."""
        phase = self.phase_of(step)
        epochs, position = divmod(step - phase.step, phase.per_epoch)
        return phase.epoch + epochs, position

    def begun(self, step: int) -> int:
        """Number of epochs that have begun at a step."""
        epoch, position = self.locate(step)
        return epoch + (position > 0)

    def first(self, epoch: int) -> int:
        """The first step of an epoch."""
        index = bisect_right(self.phases, epoch, key=attrgetter("epoch")) - 1
        return _first_step(self.phases[index], epoch)

    def samples(self, step: int) -> int:
        """Samples of all steps before ``step``."""
        return sum((end - phase.step) * phase.batch_size for phase, end in self._until(step))

    def _until(self, step: int) -> Iterator[tuple[Phase, int]]:
        """The phases that begin before ``step``, each with its end or ``step``."""
        ends = [phase.step for phase in self.phases[1:]]
        for phase, end in zip(self.phases, [*ends, step], strict=True):
            if phase.step < step:
                yield phase, min(end, step)

    def reached(self) -> list[tuple[Phase, int]]:
        """The phases of the run, each with the step that follows it."""
        return [*self._until(self.total)]


def _first_step(phase: Phase, epoch: int) -> int:
    return phase.step + (epoch - phase.epoch) * phase.per_epoch
