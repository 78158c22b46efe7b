"""Other ways to keep the records of one view, read as a data loader would: for bench_cache.

Every store has ``read(ids)``, from sample ids int64 [n] to raw records uint8 [n, bytes]. LMDB and
HDF5 hold the cache's own 72-byte records, TinyViT's layout its 68 bytes of ids and probabilities.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

K = 16
TINYVIT = np.dtype([("seed", "<i4"), ("ids", "<u2", K), ("probs", "<f2", K)])


class Store(Protocol):
    """One store, open."""

    def read(self, ids: np.ndarray) -> np.ndarray: ...

    def close(self) -> None: ...


class Memmap:
    """The data of a view file through numpy.memmap, without any check."""

    def __init__(self, folder: Path) -> None:
        layout = [int(word) for word in (folder / "layout.txt").read_text().split()]
        samples, size, offset = layout
        self.mapped = np.memmap(folder / "view-00000.dlc", np.uint8, "r", offset, (samples, size))

    def read(self, ids: np.ndarray) -> np.ndarray:
        return np.take(self.mapped, ids, axis=0)

    def close(self) -> None:
        del self.mapped  # the last reference: unmapped


class Lmdb:
    """A record a key, keys being 8 bytes, big-endian so that they are in order."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.environment = lmdb.open(
            str(folder / "records.lmdb"), readonly=True, lock=False, subdir=False, readahead=False
        )

    def read(self, ids: np.ndarray) -> np.ndarray:
        keys = ids.astype(">i8").tobytes()
        with self.environment.begin(buffers=True) as reader:
            records: list[Any] = [reader.get(keys[i : i + 8]) for i in range(0, len(keys), 8)]
            found = b"".join(records)
        return np.frombuffer(found, np.uint8).reshape(len(ids), -1)

    def close(self) -> None:
        self.environment.close()


class Hdf5:
    """A contiguous data set [N, 72]; h5py reads rows in rising order only."""

    def __init__(self, folder: Path) -> None:
        import h5py

        self.file = h5py.File(folder / "records.h5", "r")

    def read(self, ids: np.ndarray) -> np.ndarray:
        order = np.argsort(ids)
        records = np.empty((len(ids), self.file["records"].shape[1]), np.uint8)
        records[order] = self.file["records"][ids[order]]
        return records

    def close(self) -> None:
        self.file.close()


class TinyVit:
    """TinyViT's layout: a text file of keys, which every reader parses, and the values' file.

    A loader knows an image by its key: that look-up is part of a read. Records are then taken from
    a memory map, which is faster than a seek and a read for each.
    """

    def __init__(self, folder: Path) -> None:
        names = (folder / "rank0-keys.txt").read_text().splitlines()
        self.positions = {name: position for position, name in enumerate(names)}
        self.names = names
        self.mapped = np.memmap(
            folder / "rank0-values.bin", np.uint8, "r", 0, (len(names), TINYVIT.itemsize)
        )

    def read(self, ids: np.ndarray) -> np.ndarray:
        positions = [self.positions[self.names[i]] for i in ids.tolist()]
        return np.take(self.mapped, positions, axis=0)

    def close(self) -> None:
        del self.mapped  # the last reference: unmapped


STORES: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "numpy take": (Memmap, "numpy", ("view-00000.dlc",)),
    "LMDB": (Lmdb, "lmdb", ("records.lmdb",)),
    "HDF5": (Hdf5, "h5py", ("records.h5",)),
    "TinyViT layout": (TinyVit, "numpy", ("rank0-keys.txt", "rank0-values.bin")),
}
"""Name: reader, the module that it needs, its files."""


def write_stores(folder: Path, records: np.ndarray, offset: int) -> None:
    """Put uint8 [N, bytes] records, which the view in ``folder`` holds from ``offset``, into every
    store whose module is there."""
    (folder / "layout.txt").write_text(f"{len(records)} {records.shape[1]} {offset}")
    for write in (_write_lmdb, _write_hdf5):
        try:
            write(folder, records)
        except ImportError:
            continue
    values = np.zeros(len(records), TINYVIT)
    values["ids"] = records[:, : 2 * K].copy().view("<u2")
    values["probs"] = np.exp(records[:, 2 * K : 4 * K].copy().view("<f2").astype(np.float32))
    values.tofile(folder / "rank0-values.bin")
    with open(folder / "rank0-keys.txt", "w") as file:
        for i in range(len(records)):
            file.write(f"n{i // 1300:08d}/n{i // 1300:08d}_{i % 1300:05d}.JPEG\n")


def _write_lmdb(folder: Path, records: np.ndarray) -> None:
    import lmdb

    path = str(folder / "records.lmdb")
    environment = lmdb.open(path, map_size=1 << 32, subdir=False, sync=False)
    for start in range(0, len(records), 100_000):
        with environment.begin(write=True) as writer:
            for i in range(start, min(start + 100_000, len(records))):
                writer.put(i.to_bytes(8, "big"), records[i].tobytes(), append=True)
    environment.sync(True)
    environment.close()


def _write_hdf5(folder: Path, records: np.ndarray) -> None:
    import h5py

    with h5py.File(folder / "records.h5", "w") as file:
        file.create_dataset("records", data=records)


# ---------------------------------------------------------------------------------------------
# Page cache
# ---------------------------------------------------------------------------------------------


def drop_from_memory(paths: list[Path]) -> None:
    """Make the system forget files that no process maps.

    Raises:
        RuntimeError: it did not; the file system ignores the advice, as tmpfs does.
    """
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            for _ in range(5):  # a page that a core has just read stays in that core's own list
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                share = resident_share(file)
                if share <= 0.02:
                    break
                time.sleep(0.02)
        finally:
            os.close(file)
        if share > 0.02:
            raise RuntimeError(f"{share:.0%} of {path.name} stayed in memory: the file system "
                               "ignores POSIX_FADV_DONTNEED")  # fmt: skip


def resident_share(file: int) -> float:
    """Share of a file's pages that are in the page cache, from 256 of them; reads nothing."""
    pages = max(1, os.fstat(file).st_size // 4096)
    positions = np.unique(np.linspace(0, pages - 1, 256).astype(np.int64)).tolist()
    buffer, found = bytearray(1), 0
    for page in positions:
        try:
            found += os.preadv(file, [buffer], page * 4096, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            continue
    return found / len(positions)


def own_megabytes() -> float:
    """Anonymous memory of this process, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon")
