"""Units of work: parts of a teacher's pass that any process may compute, anywhere and at any time.

A scheduler (a Slurm array, an indexed job of Kubernetes, Ray) chooses numbers of units. Nothing
else is shared: a unit is computed from the settings alone, its bytes do not depend on who computes
it or how often, and its blocks are published whole. A unit that is there is not computed again.

Unit number n is unit n % U of view n // U, where a view has U units. A unit is a block of logits
or, with features, 4096 records.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from deit_fast.cache import LogitCacheWriter
from deit_fast.cache.format import FILE_NAME
from deit_fast.config import RunConfig
from deit_fast.errors import CacheMismatch, first_line, printable, translate_errors
from deit_fast.precompute_job import (
    Job,
    PendingUnits,
    Written,
    say_unread_grid,
    summary_of,
    write_units,
)
from deit_fast.runtime.distributed import read_process_group
from deit_fast.runtime.files import create_atomically, read_json, sealed_json
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.signals import Signals

log = logging.getLogger("deit_fast")

TRIES = 3  # of a unit; after them it is in quarantine
TRIES_FOLDER = "tries"  # in the cache's folder

_Unit = tuple[int, int]  # view, and number in it


class Units:
    """The units of a configuration, with its teacher on the device.

    An unexpected failure of a unit is tried again, alone. After ``TRIES`` the unit is in
    quarantine: it is left out and named, until the files of its tries are removed. A try is noted
    before the work, so that one that kills the process counts too. Failures of the machine (disk,
    memory, network) are not the unit's and end the call.

    Raises:
        InputError, CacheMismatch, OSError: as ``precompute``.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._job = job = Job(config)
        with translate_errors(job.device, job.remedy):
            if not self._is_begun():
                job.check_teacher(range(config.views_used))
            self._caches = job.open_caches()
        self._tries = Tries(Path(str(config.cache)) / TRIES_FOLDER)
        say_unread_grid(config)

    def _is_begun(self) -> bool:
        """Whether another process has checked the teacher, and published the cache."""
        teacher, folder = self._job.teacher, Path(str(self._config.cache))
        first = folder if teacher.gives_logits else folder / teacher.features[0].name
        return (first / FILE_NAME).exists()

    @property
    def total(self) -> int:
        """Number of units of all views of the run."""
        return self._config.views_used * self._caches.units_per_view

    def compute(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Compute and publish units; those beyond ``total`` are none. Under torchrun each process
        takes every n-th of them.

        Returns:
            As ``precompute``, with `units`, `total`, and `quarantined` (one dict each: `unit`,
            `view`, `samples`: positions of its records, `why`).

        Raises:
            OSError, MemoryError: of the machine; published units stay.
            Preempted: SIGTERM, SIGUSR1 or Ctrl-C; published units stay.
        """
        group, per_view = read_process_group(), self._caches.units_per_view
        chosen = [number for number in numbers if 0 <= number < self.total]
        units = [divmod(number, per_view) for number in chosen[group.rank :: group.world_size]]
        started = time.perf_counter()
        written = Written(torch.zeros((), dtype=torch.int64, device=self._job.device))
        with Signals() as signals, signals.raising():
            pending = self._pending(units)
            log.info(
                "precomputing %d of %d units: %d blocks to write, %d there",
                len(units), self.total, pending.missing, pending.kept,
            )  # fmt: skip
            tries = self._tries.counts()
            fresh = [unit for unit in pending.units if self._number(unit) not in tries]
            with Progress("precompute", pending.images, unit="image") as progress:
                suspects = [unit for unit in pending.units if unit not in fresh]
                suspects += self._compute_together(fresh, written, progress)
                for unit in suspects:
                    self._compute_alone(unit, written, progress)
        return summary_of(self._job, self._caches, written, started) | {
            "units": len(units),
            "total": self.total,
            "blocks": pending.missing,
            "kept": pending.kept,
            "quarantined": self._quarantined(units),
        }

    def _number(self, unit: _Unit) -> int:
        return unit[0] * self._caches.units_per_view + unit[1]

    def _writers(self, opened: ExitStack) -> list[LogitCacheWriter]:
        return [
            opened.enter_context(LogitCacheWriter(cache.folder, cache.manifest, locked=False))
            for cache in self._caches
        ]

    def _pending(self, units: Sequence[_Unit]) -> PendingUnits:
        with ExitStack() as opened:
            return PendingUnits(self._caches, self._writers(opened), units)

    def _compute_together(
        self, units: Sequence[_Unit], written: Written, progress: Progress
    ) -> list[_Unit]:
        """All units in one pass, in which loading, teacher and writing overlap; returns those that
        are left, where one has failed."""
        finished: list[_Unit] = []
        begun: list[_Unit] = []

        def announce(index: int) -> None:
            # The teacher may have begun on the unit after it too.
            for unit in units[index : index + 2]:
                if unit not in begun:
                    begun.append(unit)
                    self._tries.begin(self._number(unit))

        def finish(index: int) -> None:
            finished.append(units[index])
            self._tries.clear(self._number(units[index]))

        try:
            with ExitStack() as opened:
                write_units(
                    self._job, self._caches, self._writers(opened), units, written,
                    announce=announce, finished=finish, progress=progress,
                )  # fmt: skip
        except BaseException as error:
            if not _leaves_device_broken(error):
                for unit in begun:  # which of them it was shows when each runs alone
                    if unit not in finished:
                        self._tries.clear(self._number(unit))
            if not _is_of_the_unit(error):
                raise
            log.warning("%s; the units that are left run alone", first_line(error, 300))
        return [unit for unit in units if unit not in finished]

    def _compute_alone(self, unit: _Unit, written: Written, progress: Progress) -> None:
        number = self._number(unit)
        while self._tries.counts().get(number, 0) < TRIES:
            with ExitStack() as opened:
                writers = self._writers(opened)
                if not PendingUnits(self._caches, writers, [unit]).units:
                    break
                name = self._tries.begin(number)
                try:
                    write_units(
                        self._job, self._caches, writers, [unit], written,
                        announce=lambda index: None, finished=lambda index: None,
                        progress=progress,
                    )  # fmt: skip
                except BaseException as error:
                    if not _is_of_the_unit(error):
                        if not _leaves_device_broken(error):
                            self._tries.withdraw(name)
                        raise
                    reason = first_line(error, 500, type(error).__module__ == "builtins")
                    self._tries.note(name, printable(reason))
                    continue
                break
        else:
            return
        self._tries.clear(number)

    def _quarantined(self, units: Sequence[_Unit]) -> list[dict[str, Any]]:
        """Those of ``units`` that are in quarantine and not there."""
        counts = self._tries.counts()
        held = [unit for unit in units if counts.get(self._number(unit), 0) >= TRIES]
        found = []
        for view, unit in self._pending(held).units if held else ():
            number, size = self._number((view, unit)), self._caches.unit
            stop = min((unit + 1) * size, self._caches.num_samples)
            why = self._tries.why(number)
            found.append({"unit": number, "view": view, "samples": [unit * size, stop], "why": why})
        return found


def _is_of_the_unit(error: BaseException) -> bool:
    """Whether the images of the unit may be to blame, rather than machine, settings or a signal."""
    if isinstance(error, ChildProcessError):
        return True
    ours = isinstance(error, Exception)
    machine = isinstance(error, (OSError, MemoryError, CacheMismatch))
    return ours and not machine and not _leaves_device_broken(error)


def _leaves_device_broken(error: BaseException) -> bool:
    """Whether no later call of this process can use the GPU."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def quarantine_text(quarantined: Sequence[dict[str, Any]], cache: str) -> str:
    """One line for each unit in quarantine, and the remedy."""
    lines = [
        f"unit {row['unit']} (view {row['view']}, records {row['samples'][0]} to "
        f"{row['samples'][1] - 1}) failed {TRIES} times: {row['why']}"
        for row in quarantined
    ]
    remedy = f"look at the images, then remove {cache}/{TRIES_FOLDER} and run the units again"
    return "\n".join([f"{len(lines)} units are in quarantine: {remedy}", *lines])


class Tries:
    """Notes of the tries of units, as small files that are there while a unit is not.

    Args:
        folder: of the notes; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, number: int) -> str:
        """Note a try before its work; returns the note's name."""
        self._folder.mkdir(exist_ok=True)
        count = 0
        while True:
            count += 1
            name = f"unit-{number:09d}-{count}.json"
            if not (self._folder / name).exists():
                create_atomically(self._folder / name, sealed_json({"unit": number}))
                return name

    def note(self, name: str, why: str) -> None:
        """Add why the try failed."""
        content = sealed_json({"why": why})
        create_atomically(self._folder / name.replace(".json", ".why.json"), content)

    def withdraw(self, name: str) -> None:
        """The try did not count."""
        with suppress(FileNotFoundError):
            (self._folder / name).unlink()

    def clear(self, number: int) -> None:
        """Remove the notes of a unit."""
        for path in self._folder.glob(f"unit-{number:09d}-*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()  # if it is empty

    def counts(self) -> dict[int, int]:
        """Number of tries by unit."""
        counts: dict[int, int] = {}
        for path in self._folder.glob("unit-*"):
            if found := re.fullmatch(r"unit-(\d+)-\d+\.json", path.name):
                counts[int(found[1])] = counts.get(int(found[1]), 0) + 1
        return counts

    def why(self, number: int) -> str:
        """Why the last try failed, as far as it is known."""
        for path in sorted(self._folder.glob(f"unit-{number:09d}-*.why.json"), reverse=True):
            with suppress(Exception):
                return str(read_json(path)["why"])
        return "its process died"
