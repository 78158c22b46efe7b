"""Reading teacher logits: random records of many views, on the host or from GPU memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_fast import _C
from deit_fast.cache.ahead import ReadAhead
from deit_fast.cache.codecs import Codec, TopKCodec, codec_from_manifest
from deit_fast.cache.errors import format_errors
from deit_fast.cache.format import (
    fields,
    read_manifest,
    require_equal,
    view_path,
    view_specs,
    views_on_disk,
)
from deit_fast.cache.records import decode_rows
from deit_fast.errors import CacheError, InputError
from deit_fast.kernels import TopK

# Memory maps kept open after a call. A step touches view.repeats views; a view that comes back
# after so many others is mapped and verified anew.
_OPEN_VIEWS = 256
_UPLOAD_BYTES = 1 << 26
_INT64 = np.dtype(np.int64)


class LogitCache:
    """A cache opened for reading. Safe to use from several threads and across fork.

    Views are opened when first asked for; a block's checksum is compared before its first record
    is handed out. Whatever is missing, incomplete or damaged raises; nothing is ever filled in.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.codec: Codec = codec_from_manifest(manifest["codec"], str(path))
        self._num_samples: int = manifest["num_samples"]
        self._spec = view_specs(manifest)
        self._open = partial(_open_view, path, self._spec)
        self._table = _C.ViewTable()
        self._layouts: dict[float, _C.RecordLayout] = {}
        self._raw = _C.RecordLayout(
            _C.RecordKind.copy,
            record_bytes=self.codec.record_bytes,
            num_classes=self.codec.num_classes,
        )
        self._like = 0, self.codec.empty(0, None)  # empty_like costs half of empty
        self._known_out: tuple[Tensor | TopK | None, int] = None, 0  # checked last, for how many

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
                file = _C.ViewFile(str(view_path(self.path, view_id)), self._spec(view_id))
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
        self,
        sample_ids: Any,
        view_ids: Any,
        *,
        tau: float = 1.0,
        device: torch.device | str = "cpu",
        out: Tensor | TopK | None = None,
    ) -> Tensor | TopK:
        """The teacher's logits of views, in a form that ``kernels.distillation_loss`` takes.

        Args:
            sample_ids: integers [n].
            view_ids: integers [n], or one for all.
            tau: temperature of the distillation loss; `topk` must have recorded it.
            device: of the result. On CUDA the records are copied from pinned memory and decoded on
                the current stream, without waiting for the device.
            out: an earlier answer of as many samples that is not needed any more, to be written
                over. Saves the allocation, which at 256 samples is a third of the time.

        Returns:
            Dense logits [n, C], a TopK, or labels int64 [n].

        Raises:
            InputError: a sample id out of range, shapes that differ, an ``out`` of another form.
            CacheError: a view that is not there, is incomplete or damaged, naming file and block;
                a temperature that was not recorded.
        """
        if (device := torch.device(device)).type != "cpu":
            return self._gather_to(device, sample_ids, view_ids, tau)
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        layout = self._layouts.get(tau)
        if layout is None:
            layout = self._layouts.setdefault(tau, self.codec.layout(tau))
        if out is None:
            outputs = self._fresh(samples.size)
            self._gather(samples, views, layout, outputs)
            return self.codec.answer(outputs)
        self._gather(samples, views, layout, self._reused(out, samples.size))
        return out

    def _gather_to(
        self, device: torch.device, sample_ids: Any, view_ids: Any, tau: float
    ) -> Tensor | TopK:
        """Records cross the bus rather than decoded logits, which are up to four times as large."""
        shape = len(sample_ids), self.codec.record_bytes
        records = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.gather_records(sample_ids, view_ids, out=records)
        return decode_rows(self.codec, records.to(device, non_blocking=True), None, tau)

    def _fresh(self, count: int) -> tuple[Tensor, ...]:
        known, like = self._like
        if known != count:
            like = self.codec.empty(count, None)
            self._like = count, like
        return tuple(map(torch.empty_like, like))

    def _reused(self, out: Tensor | TopK, count: int) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = out[:3] if isinstance(out, TopK) else (out,)
        known, size = self._known_out  # one attribute: threads may share this cache
        if out is known and count == size:
            return outputs
        form, wanted = _form(outputs), _form(self.codec.empty(count, None))
        if form != wanted or not all(item.is_contiguous() for item in outputs):
            raise InputError(f"out must be contiguous {wanted} on the host, not {form}")
        self._known_out = out, count
        return outputs

    def gather_records(
        self, sample_ids: Any, view_ids: Any, *, out: Tensor | None = None
    ) -> Tensor:
        """The stored bytes, uint8 [n, record_bytes], that ``gather`` decodes. Raises as it does.

        ``out``: where to put them, uint8 [at least n, record_bytes], contiguous, on the host.
        """
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        size = self.codec.record_bytes
        if out is None:
            out = torch.empty((samples.size, size), dtype=torch.uint8)
        elif out.shape[0] < samples.size or out.shape[1] != size or not out.is_contiguous():
            raise InputError(f"out must be [{samples.size} or more, {size}], contiguous")
        self._gather(samples, views, self._raw, (out,))
        return out if len(out) == samples.size else out[: samples.size]

    def gather_true_class(self, sample_ids: Any, view_ids: Any, *, tau: float = 1.0) -> Tensor:
        """The teacher's log-probability of the samples' own class at ``tau``, float32 [n].

        Raises:
            CacheError: as ``gather``; the cache was not made with codec.true_class.
        """
        if not isinstance(self.codec, TopKCodec) or not self.codec.true_class:
            raise CacheError(f"cache {self.path} does not hold the true class (codec.true_class)")
        return self.codec.decode_true_class(self.gather_records(sample_ids, view_ids), tau)

    def prefetch(
        self, batches: Sequence, *, ahead: int = 16, start: int = 0, threads: int = 2
    ) -> ReadAhead:
        """Read and verify in background threads what the coming batches will ask for.

        Args:
            batches: [step] -> (sample ids, view ids), as ``views.TrainBatches``.
            ahead: batches to look ahead.
            start: the first step that is to come.

        Raises:
            InputError, CacheError: as ``gather``, for a batch that comes into sight.
        """
        return ReadAhead(self, batches, ahead=ahead, start=start, threads=threads)

    def _gather(
        self,
        samples: np.ndarray,
        views: np.ndarray,
        layout: _C.RecordLayout,
        outputs: tuple[Tensor, ...],
    ) -> None:
        addresses = [output.data_ptr() for output in outputs]
        try:
            self._table.gather(
                samples, views, self._num_samples, self._open, _OPEN_VIEWS, layout, addresses
            )
        except _C.IdError as error:
            raise InputError(str(error)) from None
        except _C.FormatError as error:
            raise CacheError(str(error)) from None

    def _ask(self, ahead: _C.ReadAhead, sample_ids: Any, view_ids: Any) -> None:
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        try:
            ahead.ask(self._table, samples, views, self._num_samples, self._open, _OPEN_VIEWS)
        except _C.IdError as error:
            raise InputError(str(error)) from None

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
            reader = self._open(view_id)  # maps it anew: its blocks are read and checked once here
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
        self._sorted_views = np.array(view_ids, np.int64)

    def gather(self, sample_ids: Any, view_ids: Any, *, tau: float = 1.0) -> Tensor | TopK:
        """As ``LogitCache.gather``, on the device. Ids on the host are copied there without
        waiting for the device; ids that are on the device have to be waited for.

        Raises:
            InputError: a sample id out of range, shapes that differ.
            CacheError: a view that was not put on the device; a temperature not recorded.
        """
        samples, views = host_ids(sample_ids, "sample"), host_ids(view_ids, "view")
        if samples.ndim != 1 or views.shape not in ((), samples.shape):
            raise InputError(
                "sample and view ids must be [n], and as many of the one as of the other"
            )
        outside = samples[(samples < 0) | (samples >= self._num_samples)]
        if len(outside):
            raise InputError(f"sample id {outside[0]} is not in [0, {self._num_samples})")
        places = np.minimum(np.searchsorted(self._sorted_views, views), len(self.views) - 1)
        unknown = np.atleast_1d(views[self._sorted_views[places] != views])
        if unknown.size:
            raise CacheError(f"view {unknown[0]} was not put on {self._records.device}")
        rows = torch.from_numpy(np.asarray(places * self._num_samples + samples))
        device = self._records.device
        return decode_rows(self.codec, self._records, rows.to(device, non_blocking=True), tau)


def _open_view(path: Path, spec: Any, view_id: int) -> _C.ViewReader:
    """A complete view, its header and size checked.

    Raises:
        CacheError: the view is not there, incomplete or damaged; names view and block.
    """
    name = view_path(path, view_id)
    try:
        with format_errors():
            reader = _C.ViewReader(str(name), spec(view_id))
            block = reader.first_incomplete()
    except FileNotFoundError:
        raise CacheError(f"view {view_id} is not in the cache: there is no {name}") from None
    if block is not None:
        raise CacheError(f"{name}: view {view_id} is incomplete: block {block} is not written yet")
    return reader


def _form(outputs: tuple[Tensor, ...]) -> str:
    return ", ".join(
        f"{item.device} {str(item.dtype).removeprefix('torch.')} {list(item.shape)}"
        for item in outputs
    )


def host_ids(ids: Any, name: str) -> np.ndarray:
    """Contiguous int64 in host memory."""
    if type(ids) is np.ndarray and ids.dtype is _INT64 and ids.flags.c_contiguous:
        return ids  # the usual array; the rest takes as long as thirty records
    values = ids.numpy(force=True) if isinstance(ids, Tensor) else np.asarray(ids)
    if values.dtype == np.int64 and values.flags.c_contiguous:
        return values
    if values.size and values.dtype.kind not in "iu":
        raise InputError(f"{name} ids must be integers, not {values.dtype}")
    return np.asarray(values, np.int64, order="C")
