"""One pass over the folders of a split: its images with their sizes, and what else they hold.

A pass lists each folder once and asks for each image's size while it does. The digest of names,
sizes and classes is made on the way, so a fingerprint needs no second pass.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from deit_fast import _C
from deit_fast.data.left_out import LeftOut
from deit_fast.errors import InputError
from deit_fast.inputs import IMAGE_SUFFIXES, cannot_list
from deit_fast.runtime.progress import Progress

_NO_IMAGE = "files that are no image"
GONE = _C.GONE  # size of a link to nothing
_SLOW_STAT = 200e-6  # seconds: above, it waits for a server, and threads wait at the same time
_STAT_THREADS = 16
_ENOUGH = 64  # images of a folder from which the time of a call is known
_MOMENT = 1.0  # seconds after which a pass shows its progress
_ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # as os.fsencode

STAMP = ("mtime_ns", "ctime_ns", "device", "inode", "entries")


@dataclass(frozen=True)
class Listing:
    """The images of a split, ordered as torchvision orders them: by class, folder, then name.

    Attributes:
        names: uint8, the paths below the split, one after another.
        ends: int64 [n], where each path ends.
        labels: int64 [n], positions in ``classes``.
        sizes: int64 [n], bytes; ``GONE`` for a link to nothing.
        classes: names of the class folders, sorted.
        folders: every folder that was listed, by its path below the split; the split's is empty.
        stamps: int64 [folders, 5], the columns ``STAMP``, read before the folder was listed.
        left_out: what the folders hold beside the images, as text.
        first_other: the first file that is no image; empty if there is none, or in an index.
        digest: SHA-256, in hex, over path, size and class name of each image.
        started_ns: when the pass started, by ``time.time_ns``.
    """

    names: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    classes: list[str]
    folders: list[str]
    stamps: np.ndarray
    left_out: str
    digest: str
    started_ns: int
    first_other: str = ""

    @property
    def num_images(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """Path of an image below the split."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())


def stamp_of(path: str, entries: int = 0) -> tuple[int, ...]:
    """The columns ``STAMP`` of a folder, or of what a link there leads to.

    Raises:
        OSError: it is gone or forbidden.
    """
    status = os.stat(path)
    device, inode = ((n + 2**63) % 2**64 - 2**63 for n in (status.st_dev, status.st_ino))  # int64
    return status.st_mtime_ns, status.st_ctime_ns, device, inode, entries


class ListingPass:
    """A pass over the class folders of a split, which may stop after some of them and go on later.

    Args:
        folder: of the split.
        classes: names of its class folders, sorted.

    Raises:
        InputError: a folder cannot be listed, or two paths lead to one folder: its images would
            count twice.
    """

    def __init__(self, folder: str, classes: Sequence[str]) -> None:
        self._started_ns = time.time_ns()
        self._left_out = LeftOut()
        self._folder, self._classes = folder, list(classes)
        self._started, self._slow_stat = time.perf_counter(), False
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._met: dict[tuple[int, ...], str] = {}
        self._names, self._digest = bytearray(), hashlib.sha256()
        self._ends: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._counts: list[int] = []  # images of each class that was listed
        self._found = 0
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._meet_split()

    def run(self, most: int | None = None) -> bool:
        """List class folders until all are listed, or until ``most`` images were found.

        Returns:
            Whether all are listed.
        """
        self._progress = None  # an earlier part has closed its own
        with self._stack:
            for label in range(len(self._counts), len(self._classes)):
                if most is not None and self._found >= most:
                    return False
                before = self._found
                self._list_class(self._classes[label])
                self._counts.append(self._found - before)
                if self._progress is not None:
                    self._progress.advance()
        return True

    def listing(self) -> Listing:
        """What the pass found, after ``run`` has returned True."""
        nothing = [np.empty(0, np.int64)]
        return Listing(
            names=np.frombuffer(self._names, np.uint8),
            ends=np.concatenate(self._ends or nothing),
            labels=np.repeat(np.arange(len(self._counts)), self._counts),
            sizes=np.concatenate(self._sizes or nothing),
            classes=self._classes,
            folders=list(self._stamps),
            stamps=np.array(list(self._stamps.values()), np.int64).reshape(-1, len(STAMP)),
            left_out=str(self._left_out),
            digest=self._digest.hexdigest(),
            started_ns=self._started_ns,
            first_other=self._left_out.first(_NO_IMAGE),
        )

    # -- folders -------------------------------------------------------------------------------

    def _meet_split(self) -> None:
        """Stamp the split and its classes, and count what is beside the classes."""
        split = self._stamp(self._folder)
        classes: dict[tuple[int, ...], str] = {}
        for name in self._classes:
            stamp = self._stamps[name] = self._stamp(os.path.join(self._folder, name))
            other = classes.setdefault(_identity(stamp), name)
            if other != name:
                raise InputError(
                    f"classes {other!r} and {name!r} of {self._folder} are one folder: a link"
                )
        self._met = {key: os.path.join(self._folder, name) for key, name in classes.items()}
        self._met = {_identity(split): self._folder} | self._met
        try:
            entries = os.listdir(self._folder)
        except OSError as error:
            raise cannot_list(error) from None
        for name in sorted({*entries} - {*self._classes}):
            self._left_out.add("files and hidden folders beside the classes", name)
        self._stamps = {"": (*split[:-1], len(entries))} | self._stamps

    def _stamp(self, path: str) -> tuple[int, ...]:
        try:
            return stamp_of(path)
        except OSError as error:
            raise cannot_list(error) from None

    def _list_class(self, name: str) -> None:
        """Add the images of a class, sorted by their folders' paths as text, then by name."""
        found: list[tuple[str, str, bytes, np.ndarray]] = []
        waiting = [name]
        while waiting:
            relative = waiting.pop()
            path = os.path.join(self._folder, relative)
            if relative not in self._stamps:
                self._stamps[relative] = self._stamp(path)
            stamp = self._stamps[relative]
            other = self._met.setdefault(_identity(stamp), path)
            if other != path:
                raise InputError(
                    f"{path} and {other} are one folder, through a link, and its images would "
                    f"count twice; remove the link"
                )
            listed = self._list_folder(path, relative)
            self._stamps[relative] = (*stamp[:-1], listed.entries)
            found.append((path, relative, listed.images, listed.sizes))
            waiting += [os.path.join(relative, folder) for folder in reversed(listed.folders)]
        for _, relative, images, sizes in sorted(found, key=itemgetter(0)):
            self._add(name, relative, images, sizes)

    def _list_folder(self, path: str, relative: str) -> _C.FolderList:
        """The entries of a folder; what is no image is counted."""
        started, threads = time.perf_counter(), _STAT_THREADS if self._slow_stat else 1
        try:
            listed = _C.list_folder(os.fsencode(path), IMAGE_SUFFIXES, threads)
        except OSError as error:
            raise cannot_list(error) from None
        if len(listed.sizes) >= _ENOUGH and not self._slow_stat:
            self._slow_stat = time.perf_counter() - started > _SLOW_STAT * listed.entries
        for kind, names in (
            ("hidden folders", listed.hidden_folders),
            ("hidden files", listed.hidden_files),
            (_NO_IMAGE, listed.others),
        ):
            for name in names:
                self._left_out.add(kind, os.path.join(relative, name))
        self._report(len(listed.sizes))
        return listed

    def _add(self, label: str, relative: str, images: bytes, sizes: np.ndarray) -> None:
        """Add the images of one folder, by name."""
        if not images:
            return
        names = images[:-1].decode(*_ENCODING).split("\0")
        if not images.isascii():  # bytes that are no text sort otherwise as characters
            order = sorted(range(len(names)), key=names.__getitem__)
            names, sizes = [names[index] for index in order], sizes[order]
        prefix, line_end = f"{relative}/", f"\0{label}\n"
        items = [f"{name}\0{size}" for name, size in zip(names, sizes.tolist(), strict=True)]
        lines = f"{prefix}{(line_end + prefix).join(items)}{line_end}".encode(*_ENCODING)
        self._digest.update(lines)
        zeros = np.flatnonzero(np.frombuffer(lines, np.uint8) == 0)  # two a line
        gap = len(line_end.encode(*_ENCODING))
        lengths = zeros[::2] - np.concatenate([[0], zeros[1:-1:2] + gap])
        self._ends.append(np.cumsum(lengths) + len(self._names))
        self._sizes.append(sizes)
        self._names += f"{prefix}{prefix.join(names)}".encode(*_ENCODING)

    def _report(self, images: int) -> None:
        """Count images; show the progress where the pass takes more than a moment."""
        self._found += images
        if self._progress is None:
            if time.perf_counter() - self._started < _MOMENT:
                return
            progress = Progress(
                f"listing {self._folder}", len(self._classes), len(self._counts), "class folder"
            )
            self._progress = self._stack.enter_context(progress)
        self._progress.show({"found": f"{self._found} images"})


def _identity(stamp: tuple[int, ...]) -> tuple[int, ...]:
    """Device and inode: of a folder, whatever links lead to it."""
    return stamp[2:4]
