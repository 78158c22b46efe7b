"""Rows of the files of a Hugging Face dataset: Arrow and Parquet, read by row number.

An Arrow file holds its images as they are, one after another. Their positions are taken from it
once, through a map of the file that is closed then; an image is read by `pread`, since reading a
mapped file that has been shortened kills the process. A Parquet file is encoded in groups of rows,
and one image costs the reading of its group; the groups that were read last stay in memory.
"""

from __future__ import annotations

import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from deit_fast.data.hub_columns import Columns, Labels, find_columns, image_bytes, label_values
from deit_fast.data.shard_files import ShardFiles, require_distinct, stamps_of
from deit_fast.data.sources import out_of_memory
from deit_fast.errors import InputError, first_line
from deit_fast.runtime.arrow import import_pyarrow
from deit_fast.runtime.files import open_regular
from deit_fast.runtime.progress import Progress

log = logging.getLogger("deit_fast")

GROUP_BYTES = 256 << 20  # of row groups in the memory of a process; at least one is kept
_MOST_ROWS = 100  # of a row group; of larger ones the log warns
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream that was written to its end


class Rows(ABC):
    """Images of the files of a split by row number.

    Attributes:
        starts: int64 [files + 1], the first row of each file.
        sizes: bytes of images, or of groups of rows, for the fingerprint: int64, an array a file.
    """

    starts: np.ndarray
    sizes: list[np.ndarray]

    @abstractmethod
    def read(self, row: int) -> bytes | None:
        """The encoded image; None where it is null.

        Raises:
            InputError: the file was changed or is damaged; names it.
            OSError: the machine cannot read it; names it.
        """

    def null_rows(self) -> np.ndarray:
        """The rows that are known to hold no image, int64."""
        return np.zeros(0, np.int64)


def open_rows(
    files: Sequence[str], image: str | None, label: str | None
) -> tuple[Rows, Columns, list[Labels]]:
    """The rows of a split, the columns that are read, and the labels in the order of the rows.

    Args:
        files: paths of Arrow files, or of Parquet files.
        image, label: names of columns that the user gave.

    Raises:
        InputError: a file is damaged, cut off or compressed Arrow; no such columns; a row without
            a label; files whose columns differ. Names the file.
        OSError: the machine cannot read a file; names it.
    """
    is_arrow = files[0].endswith(".arrow")
    for path in files:
        open_regular(path).close()  # a link to nothing is named
    require_distinct(files)
    stamps = stamps_of(files)
    parts = []
    with Progress(f"indexing {os.path.dirname(files[0])}", len(files), unit="file") as progress:
        for path in files:
            with named(path):
                index = _index_arrow if is_arrow else _index_parquet
                parts.append(index(path, image, label))
            progress.advance()
    first = parts[0].columns
    for path, part in zip(files, parts, strict=True):
        if part.columns != first:
            what = part.columns.difference(first)
            raise InputError(f"{path} has other columns or classes than {files[0]}: {what}")
    rows = (ArrowRows if is_arrow else ParquetRows)(files, stamps, first, parts)
    return rows, first, [labels for part in parts for labels in part.labels]


@dataclass(frozen=True)
class FileIndex:
    """What is known of a file without reading its images.

    Attributes:
        columns: which are read.
        labels: of its rows, in parts.
        sizes: int64. Arrow: length of each row's image, -1 where null. Parquet: decoded bytes of
            each group of rows.
        positions: int64. Arrow: where each row's image begins. Parquet: rows of each group.
    """

    columns: Columns
    labels: list[Labels]
    sizes: np.ndarray
    positions: np.ndarray


@contextmanager
def named(path: str, what: str = "is damaged") -> Iterator[None]:
    """Turn pyarrow's errors into one line that names the file.

    Raises:
        InputError: the content is not what it must be.
        OSError: the machine cannot read it, ENOMEM among others.
    """
    pa, _ = import_pyarrow()
    try:
        yield
    except InputError:
        raise
    except (MemoryError, pa.ArrowMemoryError):
        raise out_of_memory(path, "this file") from None
    except OSError as error:
        if error.errno is not None:
            raise OSError(error.errno, error.strerror, path) from None
        raise InputError(f"{path} {what}: {first_line(error)}; write it again") from None
    except (pa.ArrowException, ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{path} {what}: {first_line(error)}; write it again") from None


# ---------------------------------------------------------------------------------------------
# Arrow
# ---------------------------------------------------------------------------------------------


class ArrowRows(Rows):
    """Rows of Arrow files.

    Args:
        stamps: `stamps_of` the files.
    """

    def __init__(
        self, files: Sequence[str], stamps: np.ndarray, columns: Columns, parts: list[FileIndex]
    ) -> None:
        self.sizes = [part.sizes for part in parts]
        self.starts = _starts([len(part.sizes) for part in parts])
        self._offsets = np.concatenate([part.positions for part in parts])
        self._files = ShardFiles(files, stamps)

    def read(self, row: int) -> bytes | None:
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        length = int(self.sizes[number][row - int(self.starts[number])])
        return None if length < 0 else self._files.read(number, int(self._offsets[row]), length)

    def null_rows(self) -> np.ndarray:
        return np.flatnonzero(np.concatenate(self.sizes) < 0)


def _index_arrow(path: str, image: str | None, label: str | None) -> FileIndex:
    """
    Raises:
        InputError: as `open_rows`.
    """
    pa, _ = import_pyarrow()
    with open_regular(path) as file:
        start = file.read(6)
        file.seek(max(0, file.seek(0, 2) - len(_END)))
        end = file.read()
    is_stream = start != b"ARROW1"
    if is_stream and end != _END:
        raise InputError(f"{path} is cut off: its end is missing; write or download it again")
    labels, positions, sizes = [], [], []
    with pa.memory_map(path) as mapped:
        whole = mapped.read_buffer()
        mapped.seek(0)
        opened = pa.ipc.open_stream(mapped) if is_stream else pa.ipc.open_file(mapped)
        columns = find_columns(opened.schema, path, image, label)
        batches = opened if is_stream else map(opened.get_batch, range(opened.num_record_batches))
        for batch in batches:
            labels.append(label_values(batch.column(columns.label), path, columns.label))
            first, length = _positions(image_bytes(batch.column(columns.image)), whole, path)
            positions.append(first)
            sizes.append(length)
    empty = np.zeros(0, np.int64)
    return FileIndex(
        columns, labels, np.concatenate([empty, *sizes]), np.concatenate([empty, *positions])
    )


def _positions(images: Any, whole: Any, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Each image's position in the file, and its length, -1 where null; both int64 [rows].

    Args:
        images: a binary array.
        whole: the file as a buffer.

    Raises:
        InputError: the images are not in the file as they are, or their positions are damaged.
    """
    pa, _ = import_pyarrow()
    _, ends, data = images.buffers()
    width = np.dtype(np.int64 if pa.types.is_large_binary(images.type) else np.int32)
    if len(images) == 0 or data is None:  # all are null
        return np.zeros(len(images), np.int64), np.full(len(images), -1, np.int64)
    ends = np.frombuffer(ends, width, len(images) + 1, images.offset * width.itemsize)
    ends = ends.astype(np.int64)
    lengths = np.diff(ends)
    if ends[0] < 0 or (lengths < 0).any() or ends[-1] > data.size:
        raise InputError(f"{path} is damaged: the positions of its images; write it again")
    first = data.address - whole.address if data.size else 0
    if not 0 <= first <= whole.size - data.size:
        raise InputError(
            f"{path} is compressed, so that no image can be read by itself: write it again by "
            f"`save_to_disk`, or as Parquet"
        )
    if images.null_count:
        lengths[np.asarray(images.is_null())] = -1
    return first + ends[:-1], lengths


# ---------------------------------------------------------------------------------------------
# Parquet
# ---------------------------------------------------------------------------------------------


class ParquetRows(Rows):
    """Rows of Parquet files.

    Args:
        stamps: `stamps_of` the files.
    """

    def __init__(
        self, files: Sequence[str], stamps: np.ndarray, columns: Columns, parts: list[FileIndex]
    ) -> None:
        self._paths, self._stamps, self._columns = files, stamps, columns
        self.sizes = [part.sizes for part in parts]
        self.starts = _starts([int(part.positions.sum()) for part in parts])
        # Of each group of rows: its first row, its file, and its number in that file.
        rows = np.concatenate([part.positions for part in parts])
        self._first_rows = _starts(rows)
        self._file_of = np.repeat(np.arange(len(files)), [len(sizes) for sizes in self.sizes])
        self._number_of = np.concatenate([np.arange(len(sizes)) for sizes in self.sizes])
        group_bytes = np.concatenate(self.sizes)
        self._kept = max(1, GROUP_BYTES // max(1, int(group_bytes.max(initial=1))))
        most = int(rows.max(initial=0))
        if most > _MOST_ROWS and int(group_bytes.sum()) > GROUP_BYTES:
            log.warning(
                "%s and the files beside it hold up to %d images in a group of rows, which is read "
                "whole for each of them: write the data set by `save_to_disk` of the package "
                "datasets, or pack it by `deit-fast pack --source hf`", files[0], most,
            )  # fmt: skip
        self._share()

    def read(self, row: int) -> bytes | None:
        group = int(np.searchsorted(self._first_rows, row, "right")) - 1
        image = self._group(group)[row - int(self._first_rows[group])]
        return image.as_buffer().to_pybytes() if image.is_valid else None

    def _read_group(self, group: int) -> Any:
        """The images of a group of rows, a pyarrow array of large_binary."""
        pa, pq = import_pyarrow()
        number = int(self._file_of[group])
        path = self._paths[number]
        self._require_same(number)  # also a file: a FIFO would wait
        try:
            with named(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
                leaf = self._columns.leaf
                table = file.read_row_group(
                    int(self._number_of[group]), columns=[leaf], use_threads=False
                )
                images = image_bytes(table.column(0)).cast(pa.large_binary()).combine_chunks()
                rows = int(self._first_rows[group + 1] - self._first_rows[group])
                if len(images) != rows:
                    raise InputError(f"{path} is damaged: {len(images)} rows of {rows} in a group")
        except InputError:
            self._require_same(number)  # a change of the file is the better reason
            raise
        self._require_same(number)
        return images

    def _require_same(self, number: int) -> None:
        """
        Raises:
            InputError: the file is no longer the one that was indexed.
        """
        path = self._paths[number]
        try:
            is_same = np.array_equal(stamps_of([path])[0, :2], self._stamps[number, :2])
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise InputError(f"{path} was changed while it was in use: start the command again")

    def _share(self) -> None:
        # lru_cache is safe between threads, and has no lock that a fork could leave locked.
        self._group = functools.lru_cache(self._kept)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_group"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()


def _index_parquet(path: str, image: str | None, label: str | None) -> FileIndex:
    """Reads the footer and the labels.

    Raises:
        InputError: as `open_rows`.
    """
    _, pq = import_pyarrow()
    with (
        open_regular(path) as opened,
        pq.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        columns = find_columns(file.schema_arrow, path, image, label)
        table = file.read(columns=[columns.label], use_threads=False)
        labels = label_values(table.column(0), path, columns.label)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], np.int64)
        # Not `group.column(...)`, which ends the process where a footer's histogram is damaged.
        sizes = [group.total_byte_size for group in groups]
        if len(labels.codes) != rows.sum() or (rows < 0).any():
            raise InputError(f"{path} is damaged: {len(labels.codes)} labels of {rows.sum()} rows")
        return FileIndex(columns, [labels], np.array(sizes, np.int64), rows)


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of parts that follow one another begins, and the end, int64 [parts + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
