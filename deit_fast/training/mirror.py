"""A copy of a run in object storage, from which other machines resume.

    URL/run.json                                  which run owns the URL
    URL/checkpoints/step-000000100-1a2b3c4d.pt    a checkpoint, its checksum in its name
    URL/checkpoints/step-000000100.json           its manifest; without it a checkpoint is none
    URL/config.json, metrics.jsonl, ...           the other files of the run's folder

Checkpoints are written to the disk first, as without a copy. A thread then copies the newest; the
run does not wait for it. A manifest is created after its checkpoint is verified. The first run that
writes to a URL owns it, and another one is refused before it writes. A run is known by its folder,
or takes the URL's checkpoint as its start.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from deit_fast.errors import InputError, first_line
from deit_fast.runtime.files import (
    crc32c,
    is_end_intact,
    is_intact,
    open_atomically,
    open_regular,
    parse_json,
    parse_object,
    read_json,
    sealed_json,
    write_atomically,
    write_json,
)
from deit_fast.runtime.locks import one_at_a_time
from deit_fast.runtime.metrics import METRICS
from deit_fast.runtime.progress import Progress
from deit_fast.storage.failures import ObjectDamaged, ObjectExists, ObjectMissing, StorageError
from deit_fast.storage.objects import Objects, Part
from deit_fast.training.checkpoints import KEEP, Stays, list_checkpoints, never, step_of

log = logging.getLogger("deit_fast")

GRACE_SECONDS = 20.0  # after a signal: schedulers kill a process 30 s after it
OWNER = "run.json"  # at the URL
OWN = "mirror.json"  # in the run's folder: the URL, and the id of the run that owns it
_FOLDER = "checkpoints"
_FILE = re.compile(r"checkpoints/step-(\d{9,})-[0-9a-f]{8}\.pt")
_MANIFEST = re.compile(r"checkpoints/step-(\d{9,})\.json")
_CHUNK_BYTES = 8 << 20
_TOGETHER = 8


class Entry(NamedTuple):
    """A checkpoint at the URL."""

    step: int
    file: str
    size: int
    crcs: list[int]  # of each _CHUNK_BYTES


class Mirror:
    """The copy of one run.

    Args:
        url: of the copy.
        output: the run's folder.
        stays: of ``save_checkpoint``.
    """

    def __init__(self, url: str, output: Path, stays: Stays = never) -> None:
        self.objects = Objects(url)
        self._output, self._checkpoints, self._stays = output, output / "checkpoints", stays
        self._lock = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._thread: threading.Thread | None = None
        self._left = 0  # bytes of the upload that runs
        self._error: Exception | None = None

    # -----------------------------------------------------------------------------------------
    # Before the run
    # -----------------------------------------------------------------------------------------

    def claim(self, settings: str, resume: bool) -> None:
        """Make the URL this run's, or find that it is.

        Args:
            settings: a digest of what the run may not change.
            resume: whether it resumes from a checkpoint at the URL.

        Raises:
            InputError: the URL has another run, or one that is not to be resumed.
        """
        for link in self._checkpoints.glob(".mirror-*"):  # of a process that was killed
            link.unlink(missing_ok=True)
        there = self._owner()
        if there is None:
            new = {"id": os.urandom(16).hex(), "settings": settings}
            self.objects.create(OWNER, sealed_json(new), lambda found: True)
            there = self._owner() or new  # another process may have been first
        if self._own_id() != there["id"]:
            if self._newest_local() is not None or not resume:
                raise InputError(
                    f"{self.objects} has another run, and {self._output} is not its folder: choose "
                    f"another URL, or delete what is there"
                )
            if there["settings"] != settings:
                raise InputError(
                    f"{self.objects} has a run with other settings: give this one another URL, or "
                    f"the settings in {self.objects.url_of('config.json')}"
                )
        self._remember(there["id"])

    def _owner(self) -> dict[str, str] | None:
        """What the URL says of its run."""
        try:
            found = parse_json(self.objects.read_whole(OWNER), self.objects.url_of(OWNER))
        except ObjectMissing:
            return None
        return {name: str(found.get(name)) for name in ("id", "settings")}

    def _own_id(self) -> str | None:
        """Of the run that this folder has at the URL."""
        path = self._output / OWN
        found = read_json(path) if path.exists() else {}
        return str(found.get("id")) if found.get("url") == self.objects.url else None

    def _remember(self, run: str) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        if self._own_id() != run:
            write_json(self._output / OWN, {"url": self.objects.url, "id": run})

    def offer(self) -> None:
        """Copy the newest checkpoint of the folder, if those at the URL are older or damaged."""
        local = self._newest_local()
        if local is None:
            return
        step, newest = step_of(local), max(self._entries(), default=-1)
        if step > newest or (step == newest and self._entry(step) is None):
            self._upload(step, local)  # older ones stay until the run has its steps

    def fetch(self) -> None:
        """Fetch the newest checkpoint at the URL, if it is newer than those in the folder; the
        processes of a machine one after another.

        Raises:
            StorageError: it cannot be read.
        """
        lock = self._output / ".lock-fetch"
        with one_at_a_time(lock, f"fetches a checkpoint from {self.objects}"):
            local = self._newest_local()
            steps = sorted(self._entries(), reverse=True)
            for step in steps:
                if local is not None and step <= step_of(local):
                    return
                entry = self._entry(step)
                if entry is not None:
                    self._download(entry)
                    return
            if steps and local is None:
                raise InputError(
                    f"no checkpoint at {self.objects} is whole: delete {self.objects}/{_FOLDER} to "
                    f"start again"
                )

    def _newest_local(self) -> Path | None:
        for path in reversed(list_checkpoints(self._checkpoints)):
            with suppress(OSError, InputError), open_regular(path) as file:
                if is_end_intact(file) is not False:
                    return path
        return None

    def _entries(self) -> dict[int, str]:
        """Names of the manifests, by step."""
        names = self.objects.list(f"{_FOLDER}/step-")
        return {int(m[1]): name for name in names if (m := _MANIFEST.fullmatch(name))}

    def _entry(self, step: int) -> Entry | None:
        """What a manifest says; None where its checkpoint is not there, or other bytes."""
        name = f"{_FOLDER}/step-{step:09d}.json"
        try:
            content = self.objects.read(name, check=lambda found: is_intact(found) is True)
            found = parse_object(content, self.objects.url_of(name))
            crcs = [int(crc, 16) for crc in found["parts_crc32c"]]
            if found["step"] != step:
                raise ValueError
            entry = Entry(step, f"{_FOLDER}/{found['file']}", found["size"], crcs)
            is_whole = self.objects.stat(entry.file).size == entry.size
            if is_whole and len(crcs) == -(-entry.size // _CHUNK_BYTES):
                return entry
        except (ObjectMissing, ObjectDamaged, InputError, KeyError, TypeError, ValueError):
            pass
        log.warning("%s is not used: its checkpoint is not whole", self.objects.url_of(name))
        return None

    def _download(self, entry: Entry) -> None:
        stamp = self.objects.stat(entry.file)
        starts = range(0, entry.size, _CHUNK_BYTES)
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        path = self._checkpoints / f"step-{entry.step:09d}.pt"
        parts = [
            Part(entry.file, start, min(start + _CHUNK_BYTES, entry.size), stamp, _check_of(crc))
            for start, crc in zip(starts, entry.crcs, strict=True)
        ]
        with (
            Progress(f"fetching step {entry.step}", len(starts), unit="part") as progress,
            open_atomically(path) as file,
        ):
            for first in range(0, len(parts), _TOGETHER):
                try:
                    contents = self.objects.read_parts(parts[first : first + _TOGETHER])
                except ObjectDamaged:
                    raise InputError(
                        f"{self.objects.url_of(entry.file)} is damaged: delete it to resume from "
                        f"the checkpoint before"
                    ) from None
                for content in contents:
                    file.write(content)
                    progress.advance()
        log.info("fetched step %d from %s", entry.step, self.objects)
        if (owner := self._owner()) is not None:
            self._remember(owner["id"])
        with suppress(ObjectMissing):  # those of the folder, if any, are older
            write_atomically(self._output / METRICS, self.objects.read_whole(METRICS))

    # -----------------------------------------------------------------------------------------
    # During the run
    # -----------------------------------------------------------------------------------------

    def submit(self, step: int, path: Path) -> None:
        """Copy a checkpoint that is on the disk, in the background. One that still waits is left
        out for it."""
        link = path.with_name(f".mirror-{path.name}")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)  # it stays while the file itself may be deleted
        except OSError:  # a file system without links: should the file go, a newer one follows
            link = path
        with self._lock:
            if self._waiting is not None:
                _drop(self._waiting[1])
            self._waiting = step, link
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    self._lock.notify_all()
                    return
                (step, link), self._waiting = self._waiting, None
            try:
                self._left = link.stat().st_size
                self._upload(step, link)
                self._rotate(step)
                self._error = None
            except Exception as error:
                self._error = error
                log.warning("step %d is not copied: %s", step, first_line(error, 500))
            finally:
                self._left = 0
                _drop(link)

    def _upload(self, step: int, path: Path) -> None:
        whole, crcs = _crcs_of(path)
        name = f"step-{step:09d}-{whole:08x}.pt"
        self.put_files(["config.json", METRICS, "samples.png"])
        stamp = self.objects.put(f"{_FOLDER}/{name}", path)
        texts = [f"{crc:08x}" for crc in crcs]
        manifest = {"step": step, "file": name, "size": stamp.size, "parts_crc32c": texts}
        place, content = f"{_FOLDER}/step-{step:09d}.json", sealed_json(manifest)
        try:
            self.objects.create(place, content)
        except ObjectExists:
            if self._entry(step) is None:
                self.objects.put(place, content)
            else:  # an earlier process of this run has copied the step
                self.objects.delete(f"{_FOLDER}/{name}")

    def _rotate(self, step: int) -> None:
        """As ``save_checkpoint`` does on the disk; a manifest goes before its file."""
        entries = self._entries()
        up_to_here = sorted(other for other in entries if other <= step)
        for old in up_to_here[:-KEEP]:
            if not self._stays(old):
                self.objects.delete(entries[old])
        kept = self._entries()
        for name in self.objects.list(f"{_FOLDER}/step-"):
            # One of a later step may be about to get its manifest from another process.
            match = _FILE.fullmatch(name)
            if match and int(match[1]) < step and int(match[1]) not in kept:
                self.objects.delete(name)

    def put_files(self, names: list[str]) -> None:
        """Copy files of the run's folder, those that are there."""
        for name in names:
            if (self._output / name).exists():
                self.objects.put(name, self._output / name)

    def finish(self, names: list[str]) -> None:
        """Wait for the copies, and copy what a run leaves at its end.

        Raises:
            StorageError: the run is finished, and its copy is not.
        """
        try:
            self.wait()
            self.put_files(names)
        except StorageError as error:
            why = f"the run is finished in {self._output}; the same command copies it"
            number = error.errno or errno.EIO
            raise StorageError(number, f"{error.strerror}; {why}", error.filename) from None

    def wait(self, seconds: float | None = None) -> str:
        """Wait for the copies; returns what became of them, for a line of the log.

        Args:
            seconds: at most so long; None: until they are there.

        Raises:
            Exception: without ``seconds``: why the newest could not be copied.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._thread is None, seconds)
            if self._thread is not None:
                left = self._left + (self._waiting[1].stat().st_size if self._waiting else 0)
                return f"{left / 1e6:.0f} MB are not copied to {self.objects} yet"
            error, self._error = self._error, None
        if error is not None and seconds is None:
            raise error
        return f"not copied: {error}" if error is not None else f"copied to {self.objects}"


def _drop(link: Path) -> None:
    """Remove a link that ``submit`` made."""
    if link.name.startswith(".mirror-"):
        with suppress(OSError):
            link.unlink(missing_ok=True)


def _crcs_of(path: Path) -> tuple[int, list[int]]:
    """CRC32C of a file, and of each of its parts."""
    whole, crcs = 0, []
    with open_regular(path) as file:
        while content := file.read(_CHUNK_BYTES):
            whole = crc32c(content, whole)
            crcs.append(crc32c(content))
    return whole, crcs


def _check_of(crc: int) -> Callable[[bytes], bool]:
    return lambda content: crc32c(content) == crc
