"""The stored listing of a large split, so that a later start reads no folder of it.

    $XDG_CACHE_HOME/deit-fast/folders/KEY.index    by default below ~/.cache

One file, little-endian, each part aligned to 4096 bytes:

    header          magic, version, counts, digest of the images, length and CRC32C of each part,
                    CRC32C of the header itself
    names, ends, labels, sizes, stamps    the arrays of a `Listing`
    classes, folders                      names, each ended by a zero
    left_out                              UTF-8

The file is mapped read-only, so the processes of a machine share its memory. KEY stands for the
real path, the device and the inode of the split's folder, the version of the format and the known
extensions.

An index is used if each folder that it lists has the times and the inode that it had: then the
split has the names that were indexed. The sizes are those of the indexing, since a file that is
rewritten changes no folder. A folder that was changed shortly before the indexing may change again
within one tick of its clock: such an index serves those alone who waited for it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deit_fast.data.folder_listing import GONE, STAMP, Listing, ListingPass, stamp_of
from deit_fast.errors import InputError, printable
from deit_fast.inputs import IMAGE_SUFFIXES
from deit_fast.runtime.files import (
    cache_folder,
    crc32c,
    map_file,
    open_atomically,
    remove_orphans,
)
from deit_fast.runtime.locks import one_at_a_time

log = logging.getLogger("deit_fast")

FEWEST = 10_000  # images from which a split is indexed: fewer are listed in a fraction of a second
_MAGIC, _VERSION = b"deit-fast-folder", 1
_ALIGNMENT = 4096
TICK_NS = 2_000_000_000  # the coarsest clock of a file system
_PARTS = ("names", "ends", "labels", "sizes", "stamps", "classes", "folders", "left_out")
# magic, version, classes, images, folders, started, finished, key, digest; then the parts
_HEADER = struct.Struct(f"<16sIIQQqq32s32s{'QI' * len(_PARTS)}")
_CRC_AT = _ALIGNMENT - 4


def open_listing(folder: str, classes: list[str], verify: str) -> Listing:
    """What a split's class folders hold, from its index if there is one that may be trusted.

    One process of a machine lists a large split and the others wait for its index.

    Args:
        folder: of the split.
        classes: names of its class folders, sorted.
        verify: "names", or "sizes" to ask for every file's size, whatever the index says.

    Raises:
        InputError: as ``ListingPass``.
    """
    since = time.time_ns()
    path = _path_of(folder)
    if verify == "names":
        with suppress(FileNotFoundError, _Damaged):
            index = _read(path, folder)
            if not _why_not(index, folder, classes, verify, since):
                return index.listing
    listed = ListingPass(folder, classes)
    if listed.run(most=FEWEST):
        return listed.listing()
    with one_at_a_time(path.with_suffix(".lock"), f"lists {folder}"):
        old = None
        try:
            old = _read(path, folder)
            reason = _why_not(old, folder, classes, verify, since)
            if not reason:
                return old.listing
            log.info("listing %s again: %s", folder, reason)
        except FileNotFoundError:
            pass
        except _Damaged as error:
            log.warning("%s: it is made again", error)
        listed.run()
        listing = listed.listing()
        _compare(folder, old, listing)
        try:
            _store(path, folder, listing)
            new = _read(path, folder)
        except (OSError, InputError, _Damaged) as error:
            log.info("the listing of %s is not kept for the next start: %s", folder, error)
            return listing
        return listing if _why_not(new, folder, classes, verify, since) else new.listing


class _Damaged(Exception):
    """An index that cannot be used, with the reason."""


def _path_of(folder: str) -> Path:
    return cache_folder() / "folders" / f"{_key(folder).hex()[:32]}.index"


def _key(folder: str) -> bytes:
    real = os.path.realpath(folder)
    try:
        status = os.stat(real)
        identity = f"{status.st_dev} {status.st_ino}"
    except OSError:
        identity = ""
    text = f"{_VERSION} {identity} {' '.join(IMAGE_SUFFIXES)} "
    return hashlib.sha256(text.encode() + os.fsencode(real)).digest()


# ---------------------------------------------------------------------------------------------
# May it be used
# ---------------------------------------------------------------------------------------------


def _why_not(index: _Index, folder: str, classes: list[str], verify: str, since: int) -> str:
    """Why an index may not take the place of a pass; empty if it may.

    Args:
        since: when this process asked; an index that was made later is as good as a pass.
    """
    listing = index.listing
    if index.finished_ns < since:
        if verify != "names":
            return f"data.verify={verify}"
        if (listing.stamps[:, :2] > listing.started_ns - TICK_NS).any():
            return "a folder was changed shortly before it was indexed"
    if listing.classes != classes:
        return "its classes have changed since it was indexed"
    for name, stamp in zip(listing.folders, listing.stamps.tolist(), strict=True):
        path = os.path.join(folder, name)
        try:
            is_same = stamp_of(path)[:-1] == tuple(stamp[:-1])
        except OSError:
            is_same = False
        if not is_same:
            return f"{path} has changed since it was indexed with {stamp[-1]} entries"
    return ""


def _compare(folder: str, old: _Index | None, new: Listing) -> None:
    """Say what a pass found that the index could not see: files with other sizes."""
    if old is None or not np.array_equal(old.listing.names, new.names):
        return
    changed = np.flatnonzero(old.listing.sizes != new.sizes)
    if len(changed):
        log.warning(
            "files of %s have other sizes than at the last indexing: %d, the first is %s; what was "
            "made from the old ones will be refused", folder, len(changed),
            printable(new.name(int(changed[0]))),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """A listing in a mapped file; ``finished_ns``: when it was made, by ``time.time_ns``."""

    listing: Listing
    finished_ns: int


def _store(path: Path, folder: str, listing: Listing) -> None:
    """
    Raises:
        OSError, InputError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(path.parent)
    texts = {
        "classes": _joined(listing.classes),
        "folders": _joined(listing.folders),
        "left_out": listing.left_out.encode(),
    }
    parts = [
        memoryview(texts[name]) if name in texts else _view(getattr(listing, name))
        for name in _PARTS
    ]
    header = _HEADER.pack(
        _MAGIC, _VERSION, len(listing.classes), listing.num_images, len(listing.folders),
        listing.started_ns, time.time_ns(), _key(folder), bytes.fromhex(listing.digest),
        *(value for part in parts for value in (len(part), crc32c(part) if part else 0)),
    ).ljust(_CRC_AT, b"\0")  # fmt: skip
    with open_atomically(path) as file:
        file.write(header + struct.pack("<I", crc32c(header)))
        for part in parts:
            file.write(part)
            file.write(b"\0" * (-len(part) % _ALIGNMENT))


def _read(path: Path, folder: str) -> _Index:
    """An index with right checksums, of this folder and consistent in itself.

    Raises:
        FileNotFoundError: there is none.
        _Damaged: names the file and what is wrong.
    """
    try:
        content = map_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, InputError) as error:
        raise _Damaged(f"the index {path} cannot be read: {error}") from None
    damaged = _Damaged(f"the index {path} is damaged, or of another folder or version")
    header = content[:_ALIGNMENT].tobytes()
    if len(header) < _ALIGNMENT or crc32c(header[:_CRC_AT]) != int.from_bytes(
        header[_CRC_AT:], "little"
    ):
        raise damaged
    fields = _HEADER.unpack_from(header)
    magic, version, classes, images, folders, started, finished, key, digest = fields[:9]
    if (magic, version, key) != (_MAGIC, _VERSION, _key(folder)):
        raise damaged
    parts, start = {}, _ALIGNMENT
    for name, length, checksum in zip(_PARTS, fields[9::2], fields[10::2], strict=True):
        part = content[start : start + length]
        if len(part) != length or (length and crc32c(_view(part)) != checksum):
            raise damaged
        parts[name] = part
        start += length + -length % _ALIGNMENT
    if start != len(content):
        raise damaged
    lengths = {"ends": 8 * images, "labels": 8 * images, "sizes": 8 * images,
               "stamps": 8 * len(STAMP) * folders}  # fmt: skip
    if any(len(parts[name]) != length for name, length in lengths.items()):
        raise damaged
    columns = {name: parts[name].view("<i8") for name in lengths}
    texts = {name: _split(parts[name]) for name in ("classes", "folders")}
    listing = Listing(
        names=parts["names"], ends=columns["ends"], labels=columns["labels"],
        sizes=columns["sizes"], classes=texts["classes"], folders=texts["folders"],
        stamps=columns["stamps"].reshape(-1, len(STAMP)),
        left_out=parts["left_out"].tobytes().decode(errors="replace"),
        digest=digest.hex(), started_ns=started,
    )  # fmt: skip
    if (len(listing.classes), len(listing.folders)) != (classes, folders) or not _fits(listing):
        raise damaged
    return _Index(listing, finished)


def _fits(listing: Listing) -> bool:
    """Whether every position and label is inside of what it points into."""
    ends, labels = listing.ends, listing.labels
    return bool(
        len(ends) > 0
        and ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] == len(listing.names)
        and labels.min() >= 0 and labels.max() < len(listing.classes)
        and listing.sizes.min() >= GONE
    )  # fmt: skip


def _view(array: np.ndarray) -> memoryview:
    """The bytes of an array; of integers little-endian."""
    dtype = array.dtype if array.dtype == np.uint8 else np.dtype("<i8")
    return np.ascontiguousarray(array, dtype).data.cast("B")


def _joined(names: list[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in names)


def _split(content: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in content.tobytes().split(b"\0")[:-1]]
