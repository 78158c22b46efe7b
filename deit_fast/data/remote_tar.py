"""The index of tar shards in object storage: stored beside them, or made by reading each once.

It is an object beside the shards, `.deit-fast-index-DIGEST.npz`, where the digest is of their
names, sizes and ETags: it cannot be of other shards, and many machines may publish it at once. It
is kept in the user's cache folder too, and there alone where the bucket cannot be written.

Nothing vouches for a shard's bytes while its index is made, unless its ETag is their digest: that
of S3 is, the Hub's too. Otherwise each part of the shard is read until two reads agree.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deit_fast.data.left_out import LeftOut
from deit_fast.data.tar_index import COLUMNS, TEXTS, Samples, combine, fits, join_names, samples_of
from deit_fast.errors import InputError
from deit_fast.runtime.files import (
    cache_folder,
    crc32c,
    pack_arrays,
    parse_arrays,
    read_file,
    write_atomically,
)
from deit_fast.runtime.locks import one_at_a_time
from deit_fast.runtime.progress import Progress
from deit_fast.storage.etags import vouches
from deit_fast.storage.failures import ObjectExists, ObjectMissing, StorageError
from deit_fast.storage.objects import Objects, Stamp, digest_stamps
from deit_fast.storage.urls import join

log = logging.getLogger("deit_fast")

LIST = "shards.txt"  # the names of the shards, where a server cannot list them
_INDEX = ".deit-fast-index"  # also of those that a local split has
_FORMAT = 4
_READ_BYTES = 8 << 20
_SHARDS_AT_ONCE = 4
_READS = 5  # of a part, until two agree
_MIB = 1 << 20


def has_split(root: str, split: str) -> bool:
    """Whether there are shards of a split below a URL: packed ones, or tar shards."""
    objects = Objects(join(root, split))
    web = (LIST,) if objects.url.startswith("http") else ()
    for name in ("manifest.json", *web):
        try:
            objects.stat(name)
            return True
        except ObjectMissing:
            continue
    return not web and bool(objects.list())


def list_shards(objects: Objects, beside: LeftOut) -> dict[str, Stamp]:
    """The shards of a split with their stamps, sorted by name.

    Args:
        beside: counts objects that are none.

    Raises:
        InputError: a web server has no list of them, or a name in it is none.
        StorageError: no bucket, no access.
    """
    if objects.url.startswith("http"):
        return _listed_shards(objects)
    found, last = objects.list(), None
    for _ in range(_READS):  # a list has no checksum: until two agree
        last = {name: stamp for name, stamp in found.items() if _is_shard(name)}
        found = objects.list()
        if last == {name: stamp for name, stamp in found.items() if _is_shard(name)}:
            break
    else:
        raise InputError(f"{objects}: its shards change: start again when all are written")
    for name in found.keys() - last.keys():
        if not name.startswith(_INDEX):
            beside.add("objects beside the shards", name)
    return last


def _is_shard(name: str) -> bool:
    return name.endswith(".tar") and "/" not in name and not name.startswith(".")


def _listed_shards(objects: Objects) -> dict[str, Stamp]:
    where = objects.url_of(LIST)
    try:
        lines = objects.read_whole(LIST).decode().split("\n")
    except ObjectMissing:
        raise InputError(
            f"{where} does not exist: a web server has no list of its files, so this one must name "
            f"the shards, one a line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{where} is no text: it must name the shards, one a line") from None
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if not name.endswith(".tar") or names.count(name) > 1:
            raise InputError(f"{where}: {name!r} is no name of a tar shard, or is there twice")
    return objects.stat_many(sorted(names))


def open_index(objects: Objects, stamps: dict[str, Stamp]) -> dict[str, np.ndarray]:
    """`tar_index.COLUMNS`, `tar_index.TEXTS` and `crc32c`, uint32, of these shards.

    Raises:
        InputError: as `tar_index.samples_of`.
        StorageError: a shard cannot be read, or is replaced meanwhile.
    """
    name = f"{_INDEX}-{digest_stamps(stamps)}.npz"
    local = (
        cache_folder() / "tar" / f"{hashlib.sha256(objects.url.encode()).hexdigest()[:16]}{name}"
    )
    index = _load_local(local, stamps) or _load_remote(objects, name, stamps)
    if index is not None:
        return index
    with one_at_a_time(local.with_suffix(".lock"), f"reads the shards of {objects}"):
        index = _load_local(local, stamps)
        if index is None:
            index = _build(objects, stamps)
            content = pack_arrays(_header(stamps) | index)
            _store(objects, name, local, content)
    return index


def _header(stamps: dict[str, Stamp]) -> dict[str, np.ndarray]:
    return {
        "format": np.array(_FORMAT), "shards": join_names([*stamps]),
        "sizes": np.array([stamp.size for stamp in stamps.values()], np.int64),
        "etags": join_names([stamp.etag for stamp in stamps.values()]),
    }  # fmt: skip


def _load_local(path: Path, stamps: dict[str, Stamp]) -> dict[str, np.ndarray] | None:
    try:
        return _parse(read_file(path), str(path), stamps)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: %s; it is made again", path, error.strerror)
        return None


def _load_remote(
    objects: Objects, name: str, stamps: dict[str, Stamp]
) -> dict[str, np.ndarray] | None:
    try:
        return _parse(objects.read_whole(name), objects.url_of(name), stamps)
    except ObjectMissing:
        return None


def _parse(content: bytes, where: str, stamps: dict[str, Stamp]) -> dict[str, np.ndarray] | None:
    """The arrays of a stored index; None if it is damaged or of other shards."""
    header = _header(stamps)
    dtypes = {key: value.dtype for key, value in header.items()}
    dtypes |= {key: np.dtype(dtype) for key, dtype in (COLUMNS | TEXTS).items()}
    try:
        index = parse_arrays(content, where, dtypes | {"crc32c": np.dtype(np.uint32)})
    except ValueError as error:
        log.warning("%s; it is made again", error)
        return None
    is_current = all(np.array_equal(index.pop(key), value) for key, value in header.items())
    if not (is_current and fits(index, header["sizes"])) or (
        index["crc32c"].shape != index["label"].shape
    ):
        log.warning("%s does not fit the shards beside it and is made again", where)
        return None
    return index


def _store(objects: Objects, name: str, local: Path, content: bytes) -> None:
    try:
        objects.create(name, content)
        is_kept = True
    except ObjectExists:  # it was damaged
        objects.put(name, content)
        is_kept = True
    except (InputError, StorageError) as error:
        is_kept = False
        log.info("the index is not kept beside the shards: %s", error)
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(local, content)
    except OSError:
        if not is_kept:
            log.warning(
                "the index of %s could not be written; the next start reads all shards again",
                objects,
            )


# ---------------------------------------------------------------------------------------------
# Making it
# ---------------------------------------------------------------------------------------------


def _build(objects: Objects, stamps: dict[str, Stamp]) -> dict[str, np.ndarray]:
    """Read every shard, several at once, through a temporary file each."""
    log.info("%s has no index: reading its %d shards once", objects, len(stamps))
    counter = _Counter()
    total = max(1, sum(stamp.size for stamp in stamps.values()) // _MIB)
    pool = concurrent.futures.ThreadPoolExecutor(_SHARDS_AT_ONCE, "index")
    try:
        futures = [
            pool.submit(_index_shard, objects, name, stamp, counter.add)
            for name, stamp in stamps.items()
        ]
        with Progress(f"indexing {objects}", total, unit="MiB") as progress:
            shown, pending = 0, set(futures)
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, 0.5, concurrent.futures.FIRST_EXCEPTION
                )
                progress.advance(min(counter.bytes // _MIB, total) - shown)
                shown = min(counter.bytes // _MIB, total)
                for future in done:
                    future.result()  # raises
        parts = [future.result() for future in futures]
    finally:
        counter.stops = True
        pool.shutdown(cancel_futures=True)
    left_out = LeftOut()
    for _, _, one in parts:
        left_out.merge(one)
    index = combine([samples for samples, _, _ in parts], left_out)
    return index | {"crc32c": np.array([crc for _, crcs, _ in parts for crc in crcs], np.uint32)}


class _Counter:
    """Bytes that threads have read; it also tells them to stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes, self.stops = 0, False

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count
        if self.stops:
            raise InterruptedError


def _index_shard(
    objects: Objects, name: str, stamp: Stamp, count: Callable[[int], None]
) -> tuple[Samples, list[int], LeftOut]:
    """Samples of a shard, the CRC32C of their bytes, and what was left out."""
    left_out = LeftOut()
    with _temporary() as file:
        for start, stop in _ranges(stamp.size):
            file.write(objects.read(name, start, stop, stamp=stamp))
            count(stop - start)
        file.flush()
        if not vouches(stamp.etag, stamp.size, lambda start, n: os.pread(file.fileno(), n, start)):
            for start, stop in _ranges(stamp.size):
                first = os.pread(file.fileno(), stop - start, start)
                content = _read_until_equal(objects, name, start, first, stamp)
                if content != first:
                    os.pwrite(file.fileno(), content, start)
        samples = samples_of(file, objects.url_of(name), name, left_out)
        crcs = [crc32c(os.pread(file.fileno(), image.size, image.offset)) for image, _ in samples]
    return samples, crcs, left_out


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _READ_BYTES, size)) for start in range(0, size, _READ_BYTES))


def _read_until_equal(objects: Objects, name: str, start: int, first: bytes, stamp: Stamp) -> bytes:
    last = first
    for _ in range(_READS):
        content = objects.read(name, start, start + len(first), stamp=stamp)
        if content == last:
            return content
        last = content
    raise InputError(
        f"{objects.url_of(name)}: bytes {start} to {start + len(first) - 1} are others at each of "
        f"{_READS + 1} reads: the server or the network changes them"
    )


def _temporary() -> BinaryIO:
    """A file without a name in the user's cache folder, or where the system keeps such files."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()
