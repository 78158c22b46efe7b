"""Reading teacher logits: random records of many views, on the host or from GPU memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_fast import _C
from deit_fast.cache.codecs import Codec, codec_from_manifest
from deit_fast.cache.errors import CacheError, format_errors
from deit_fast.cache.manifest import (
    fields,
    read_manifest,
    require_equal,
    view_path,
    view_spec,
    views_on_disk,
)
from deit_fast.config import InputError
from deit_fast.kernels import TopK

# Memory maps kept open. A step touches view.repeats views; a view that comes back after so many
# others is mapped and verified anew.
_OPEN_VIEWS = 256
_UPLOAD_BYTES = 1 << 26


class LogitCache:
    """A cache opened for reading. Safe to use from several threads and across fork.

    Views are opened when first asked for; a block's checksum is compared before its first record
    is handed out. Whatever is missing, incomplete or damaged raises; nothing is ever filled in.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.codec: Codec = codec_from_manifest(manifest["codec"], str(path))
        self._num_samples: int = manifest["num_samples"]
        self._open = lru_cache(_OPEN_VIEWS)(lambda view_id: open_view(path, manifest, view_id))

    @classmethod
    def open(cls, path: str | Path) -> LogitCache:
        """Open the cache in a folder.

        Raises:
            CacheError: no manifest there, or a damaged one.
        """
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def views(self) -> list[int]:
        """Ids of the views whose every block is marked complete, in order.

        Raises:
            CacheError: a view file's header or block table is damaged.
        """
        complete = []
        for view_id in views_on_disk(self.path):
            with format_errors():
                file = _C.ViewFile(
                    str(view_path(self.path, view_id)), view_spec(self.manifest, view_id)
                )
                if file.first_incomplete() is None:
                    complete.append(view_id)
        return complete

    def require(self, expected: Mapping[str, Any]) -> None:
        """Compare some of the manifest's fields with what a run expects.

        Args:
            expected: fields by dotted name (fingerprint keys, `codec.k`, `num_samples`), or parts
                of a manifest in its own nested form.

        Raises:
            CacheMismatch: names every field that differs or is absent, with both values.
        """
        require_equal(self.path, fields(self.manifest), fields(expected))

    def gather(
        self, sample_ids: Any, view_ids: Any, *, tau: float = 1.0, tail: str = "bucket"
    ) -> Tensor | TopK:
        """The teacher's answers about views, in a form that ``kernels.distillation_loss`` takes.

        Args:
            sample_ids: integers [n].
            view_ids: integers [n], or one for all.
            tau: temperature of the distillation loss; `topk` must have recorded it.
            tail: how the loss counts what `topk` left out.

        Returns:
            On the CPU: dense logits [n, C], a TopK, or labels int64 [n].

        Raises:
            InputError: a sample id out of range, shapes that differ.
            CacheError: a view that is not there, is incomplete or damaged, naming file and block;
                a temperature that was not recorded.
        """
        return self.codec.decode(self.gather_records(sample_ids, view_ids), tau, tail)

    def gather_records(self, sample_ids: Any, view_ids: Any) -> Tensor:
        """The stored bytes, uint8 [n, record_bytes], that ``gather`` decodes. Raises as it does."""
        samples, which, views = _locate(sample_ids, view_ids, self._num_samples)
        readers = [self._open(view_id) for view_id in views]
        raw = torch.empty((len(samples), self.codec.record_bytes), dtype=torch.uint8)
        with format_errors():
            _C.gather(
                readers,
                which.ctypes.data,
                samples.ctypes.data,
                len(samples),
                raw.data_ptr(),
                self.codec.record_bytes,
            )
        return raw

    def to_device(self, view_ids: Iterable[int], device: torch.device | str) -> ResidentLogits:
        """Copy whole views, verified, into a device's memory and gather there.

        Takes num_samples * record_bytes a view: 87 MB for ImageNet at top-16.

        Raises:
            CacheError: as ``gather``.
        """
        ids = sorted({int(view_id) for view_id in view_ids})
        bytes_of_record = self.codec.record_bytes
        records = torch.empty(
            (len(ids) * self._num_samples, bytes_of_record), dtype=torch.uint8, device=device
        )
        step = max(1, _UPLOAD_BYTES // bytes_of_record)
        for place, view_id in enumerate(ids):
            reader = self._open(view_id)
            for start in range(0, self._num_samples, step):
                stop = min(start + step, self._num_samples)
                part = torch.empty((stop - start, bytes_of_record), dtype=torch.uint8)
                with format_errors():
                    reader.read(start, stop, part.data_ptr())
                offset = place * self._num_samples
                records[offset + start : offset + stop] = part.to(device)
        return ResidentLogits(self.codec, ids, self._num_samples, records)


class ResidentLogits:
    """Raw records of some views in a device's memory; see ``LogitCache.to_device``."""

    def __init__(
        self, codec: Codec, view_ids: list[int], num_samples: int, records: Tensor
    ) -> None:
        self.codec, self.views, self._num_samples = codec, view_ids, num_samples
        self._records = records
        self._first_rows = {view_id: i * num_samples for i, view_id in enumerate(view_ids)}

    def gather(
        self, sample_ids: Any, view_ids: Any, *, tau: float = 1.0, tail: str = "bucket"
    ) -> Tensor | TopK:
        """As ``LogitCache.gather``, on the device. Ids on the host are copied there without
        waiting for the device; ids that are on the device have to be waited for.

        Raises:
            InputError: a sample id out of range, shapes that differ.
            CacheError: a view that was not put on the device; a temperature not recorded.
        """
        samples, which, views = _locate(sample_ids, view_ids, self._num_samples)
        unknown = [view_id for view_id in views if view_id not in self._first_rows]
        if unknown:
            raise CacheError(f"view {unknown[0]} was not put on {self._records.device}")
        first_rows = np.array([self._first_rows[view_id] for view_id in views], np.int64)
        rows = torch.from_numpy(first_rows[which] + samples)
        raw = _gather_rows(self._records, rows.to(self._records.device, non_blocking=True))
        return self.codec.decode(raw, tau, tail)


def _gather_rows(records: Tensor, rows: Tensor) -> Tensor:
    """records [m, bytes] uint8 at rows [n] int64, on their device."""
    if records.device.type != "cuda" or not _C.with_cuda:
        return records.index_select(0, rows)
    out = torch.empty((len(rows), records.shape[1]), dtype=torch.uint8, device=records.device)
    with torch.cuda.device(records.device):
        _C.gather_cuda(
            records.data_ptr(),
            records.shape[0],
            records.shape[1],
            rows.data_ptr(),
            len(rows),
            out.data_ptr(),
            records.get_device(),
            torch.cuda.current_stream().cuda_stream,
        )
    return out


def open_view(path: Path, manifest: Mapping[str, Any], view_id: int) -> _C.ViewReader:
    """A complete view, its header and size checked.

    Raises:
        CacheError: the view is not there, incomplete or damaged; names view and block.
    """
    name = view_path(path, view_id)
    try:
        with format_errors():
            reader = _C.ViewReader(str(name), view_spec(manifest, view_id))
            block = reader.first_incomplete()
    except FileNotFoundError:
        raise CacheError(f"view {view_id} is not in the cache: there is no {name}") from None
    if block is not None:
        raise CacheError(f"{name}: view {view_id} is incomplete: block {block} is not written yet")
    return reader


def _locate(
    sample_ids: Any, view_ids: Any, num_samples: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Sample ids, places of their views, both int64 [n], and the views at these places."""
    samples, views = _host_ids(sample_ids, "sample"), _host_ids(view_ids, "view")
    if views.ndim == 0:
        views = np.full(samples.shape, views)
    if samples.ndim != 1 or samples.shape != views.shape:
        raise InputError(
            f"sample and view ids must be [n], not {list(samples.shape)} and {list(views.shape)}"
        )
    if len(samples) and samples.view(np.uint64).max() >= num_samples:  # negative ones are huge
        outside = samples[(samples < 0) | (samples >= num_samples)][0]
        raise InputError(f"sample id {outside} is not in [0, {num_samples})")
    which = np.empty(len(views), np.int64)
    distinct = _C.distinct(views.ctypes.data, len(views), which.ctypes.data)
    if distinct and min(distinct) < 0:
        raise InputError(f"view id {min(distinct)} is negative")
    return samples, which, distinct


def _host_ids(ids: Any, name: str) -> np.ndarray:
    """Contiguous int64 in host memory."""
    values = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    if values.size and values.dtype.kind not in "iu":
        raise InputError(f"{name} ids must be integers, not {values.dtype}")
    return np.asarray(values, np.int64, order="C")
