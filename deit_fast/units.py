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
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from deit_fast.cache import LogitCacheWriter
from deit_fast.cache.format import FILE_NAME
from deit_fast.config import RunConfig
from deit_fast.errors import CacheError, InputError, first_line, printable, translate_errors
from deit_fast.precompute_job import (
    Job,
    PendingUnits,
    Written,
    say_unread_grid,
    summary_of,
    write_units,
)
from deit_fast.remote_targets import remote_targets
from deit_fast.runtime.distributed import read_process_group
from deit_fast.runtime.files import create_atomically, parse_object, read_json, sealed_json
from deit_fast.runtime.progress import Progress
from deit_fast.runtime.signals import Signals
from deit_fast.storage.objects import Objects

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
        self._remote = remote_targets(config)
        notes: _FolderNotes | _ObjectNotes = _FolderNotes(Path(str(config.cache), TRIES_FOLDER))
        self.cache = str(config.cache)
        if self._remote is not None:
            notes = _ObjectNotes(self._remote.objects)
            self.cache = str(self._remote.objects)
            config = config.replace(cache=str(self._remote.folder))
        self._config = config
        self._job = job = Job(config)
        named = nullcontext() if self._remote is None else self._remote.named()
        with translate_errors(job.device, job.remedy), named:
            if not self._is_begun():
                job.check_teacher(range(config.views_used))
            self._caches = job.open_caches(self._remote.share_fit if self._remote else None)
            if self._remote is not None:
                self._remote.publish(self._caches)
        self._publishers = [
            None if self._remote is None else self._remote.publisher(cache)
            for cache in self._caches
        ]
        self._tries = Tries(notes)
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

    def of_views(self, views: range | None) -> range:
        """The numbers of the units of some views; None: of all that the run uses."""
        if views is None:
            return range(self.total)
        per_view = self._caches.units_per_view
        return range(views.start * per_view, views.stop * per_view)

    def existing(self, numbers: range) -> range:
        """Those of a range that are below ``total``."""
        return range(min(numbers.start, self.total), min(numbers.stop, self.total))

    def compute(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Compute and publish units. Under torchrun each process takes every n-th of them.

        Returns:
            As ``precompute``, with `units`, `total`, and `quarantined` (one dict each: `unit`,
            `view`, `samples`: positions of its records, `why`).

        Raises:
            OSError, MemoryError: of the machine; published units stay.
            Preempted: SIGTERM, SIGUSR1 or Ctrl-C; published units stay.
        """
        group, per_view = read_process_group(), self._caches.units_per_view
        units = [divmod(number, per_view) for number in numbers[group.rank :: group.world_size]]
        started = time.perf_counter()
        written = Written(torch.zeros((), dtype=torch.int64, device=self._job.device))
        with Signals() as signals, signals.raising():
            self._look_up(units)
            tries = self._tries.counts()
            with ExitStack() as opened:
                writers = self._writers(opened)
                pending = PendingUnits(self._caches, writers, units)
                log.info(
                    "precomputing %d of %d units: %d blocks to write, %d there",
                    len(units), self.total, pending.missing, pending.kept,
                )  # fmt: skip
                for unit in set(units) - set(pending.units):
                    if self._number(unit) in tries:  # its process died after it had published
                        self._tries.clear(self._number(unit))
                suspects = [unit for unit in pending.units if self._number(unit) in tries]
                fresh = [unit for unit in pending.units if self._number(unit) not in tries]
                with Progress("precompute", pending.images, unit="image") as progress:
                    suspects += self._compute_together(fresh, writers, written, progress)
                    for unit in suspects:
                        self._compute_alone(unit, written, progress)
        if self._remote is not None:
            self._remote.forget_views()
        found = summary_of(self._job, self._caches, written, started)
        if self._remote is not None:
            found |= {"cache": self.cache, "caches": [self.cache]}
        quarantined, left = self._quarantined(suspects)
        return found | {
            "units": len(units),
            "total": self.total,
            "blocks": pending.missing - left,
            "kept": pending.kept,
            "quarantined": quarantined,
        }

    def _look_up(self, units: Sequence[_Unit]) -> None:
        """Ask which blocks of these units are published, where the cache is at a URL."""
        for cache, publisher in zip(self._caches, self._publishers, strict=True):
            if publisher is not None:
                publisher.look_up(
                    (view, block)
                    for view, unit in units
                    for block in self._caches.blocks(cache, unit)
                )

    def _number(self, unit: _Unit) -> int:
        return unit[0] * self._caches.units_per_view + unit[1]

    def _writers(self, opened: ExitStack) -> list[LogitCacheWriter]:
        return [
            opened.enter_context(
                LogitCacheWriter(
                    cache.folder,
                    cache.manifest,
                    locked=False,
                    publisher=publisher,
                    reserve=publisher is None,
                )
            )
            for cache, publisher in zip(self._caches, self._publishers, strict=True)
        ]

    def _compute_together(
        self,
        units: Sequence[_Unit],
        writers: Sequence[LogitCacheWriter],
        written: Written,
        progress: Progress,
    ) -> list[_Unit]:
        """All units in one pass, in which loading, teacher and writing overlap; returns those that
        are left, where one has failed."""
        done = begun = 0  # numbers of units, in their order

        def announce(index: int) -> None:
            nonlocal begun
            stop = min(index + 2, len(units))  # the teacher may begin on the unit after it too
            for unit in units[begun:stop]:
                self._tries.begin(self._number(unit))
            begun = stop

        def finish(index: int) -> None:
            nonlocal done
            done = index + 1
            self._tries.clear(self._number(units[index]))

        try:
            write_units(
                self._job, self._caches, writers, units, written,
                announce=announce, finished=finish, progress=progress,
            )  # fmt: skip
        except BaseException as error:
            if not _leaves_device_broken(error):
                for unit in units[done:begun]:  # which of them it was shows when each runs alone
                    self._tries.clear(self._number(unit))
            if not _is_of_the_unit(error):
                raise
            log.warning("%s; the units that are left run alone", first_line(error, 300))
        return list(units[done:])

    def _compute_alone(self, unit: _Unit, written: Written, progress: Progress) -> None:
        number = self._number(unit)
        while self._tries.counts(number).get(number, 0) < TRIES:
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

    def _quarantined(self, units: Sequence[_Unit]) -> tuple[list[dict[str, Any]], int]:
        """Those of ``units`` that are in quarantine and not there, and the number of their blocks
        that are missing."""
        counts = self._tries.counts()
        held = [unit for unit in units if counts.get(self._number(unit), 0) >= TRIES]
        found: list[dict[str, Any]] = []
        if not held:
            return found, 0
        with ExitStack() as opened:
            left = PendingUnits(self._caches, self._writers(opened), held)
        for view, unit in left.units:
            number, size = self._number((view, unit)), self._caches.unit
            stop = min((unit + 1) * size, self._caches.num_samples)
            why = self._tries.why(number)
            found.append({"unit": number, "view": view, "samples": [unit * size, stop], "why": why})
        return found, left.missing


def _is_of_the_unit(error: BaseException) -> bool:
    """Whether the images of the unit may be to blame, rather than machine, settings or a signal."""
    if isinstance(error, ChildProcessError):
        return True
    ours = isinstance(error, Exception)
    machine = isinstance(error, (OSError, MemoryError, CacheError))
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
    count = "1 unit is" if len(lines) == 1 else f"{len(lines)} units are"
    return "\n".join([f"{count} in quarantine: {remedy}", *lines])


class Tries:
    """Notes of the tries of units, small files or objects that are there while a unit is not."""

    def __init__(self, notes: _FolderNotes | _ObjectNotes) -> None:
        self._notes = notes

    def begin(self, number: int) -> str:
        """Note a try before its work; returns the note's name."""
        count = 1
        while not self._notes.create(name := f"unit-{number:09d}-{count}.json", {"unit": number}):
            count += 1
        return name

    def note(self, name: str, why: str) -> None:
        """Add why the try failed."""
        self._notes.create(name.replace(".json", ".why.json"), {"why": why})

    def withdraw(self, name: str) -> None:
        """The try did not count."""
        self._notes.delete(name)

    def clear(self, number: int) -> None:
        """Remove the notes of a unit."""
        for name in self._notes.names(f"unit-{number:09d}-"):
            self._notes.delete(name)

    def counts(self, number: int | None = None) -> dict[int, int]:
        """Number of tries by unit, of all units or of one."""
        counts: dict[int, int] = {}
        for name in self._notes.names("unit-" if number is None else f"unit-{number:09d}-"):
            if found := re.fullmatch(r"unit-(\d+)-\d+\.json", name):
                counts[int(found[1])] = counts.get(int(found[1]), 0) + 1
        return counts

    def why(self, number: int) -> str:
        """Why the last try failed, as far as it is known."""
        names = [n for n in self._notes.names(f"unit-{number:09d}-") if n.endswith(".why.json")]
        for name in reversed(names):
            with suppress(Exception):
                return str(self._notes.read(name)["why"])
        return "its process died"


class _FolderNotes:
    """JSON objects in a folder, which is made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, name: str, content: dict[str, Any]) -> bool:
        try:
            self._folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise InputError(f"{self._folder} is no folder: remove it") from None
        path = self._folder / name
        if path.exists():
            return False
        create_atomically(path, sealed_json(content))
        return True

    def names(self, prefix: str) -> list[str]:
        return sorted(path.name for path in self._folder.glob(f"{prefix}*") if path.is_file())

    def read(self, name: str) -> dict[str, Any]:
        return read_json(self._folder / name)

    def delete(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()  # if it is empty


class _ObjectNotes:
    """JSON objects below a URL."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def create(self, name: str, content: dict[str, Any]) -> bool:
        # A note that is there counts as another's, also where the reply to this one was lost.
        return self._objects.create(
            f"{TRIES_FOLDER}/{name}", sealed_json(content), lambda there: True
        )

    def names(self, prefix: str) -> list[str]:
        start = f"{TRIES_FOLDER}/"
        return [name.removeprefix(start) for name in self._objects.list(start + prefix)]

    def read(self, name: str) -> dict[str, Any]:
        return parse_object(self._objects.read_whole(f"{TRIES_FOLDER}/{name}"), name)

    def delete(self, name: str) -> None:
        self._objects.delete(f"{TRIES_FOLDER}/{name}")
