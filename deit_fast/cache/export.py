"""A cache as Parquet, or as plain tensors in a .safetensors or .pt file."""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from deit_fast.cache.reader import LogitCache
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.arrow import import_pyarrow
from deit_fast.runtime.files import open_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.cache.feature_cache import StoredForm

FORMATS = (".parquet", ".safetensors", ".pt")
_SAFETENSORS = {
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float64": "F64", "torch.int64": "I64", "torch.int32": "I32", "torch.bool": "BOOL",
}  # fmt: skip


def export(path: str | Path, out: str | Path, views: range | None = None) -> dict[str, Any]:
    """Write complete views of a cache into one file; whole or not at all.

    Parquet: a row a record with `sample`, `view` and what the codec stored: `label` (hard), `ids`,
    `log_probs` and `log_tail` (topk), `logits`, or `features` (tokens times channels); one row
    group a block, rows in the file's order. Tensors: the same names, [N, V, ...] over samples and
    views, and `views` [V], as DeiT-style code that keeps a teacher's dense outputs reads them;
    features are [N, V, tokens, channels], of `int8-standard` in the teacher's own scale. `topk` is
    at the first temperature that the cache records; it and the manifest are in the file's metadata
    (a .pt file holds tensors alone).

    Args:
        views: none: all complete ones.

    Returns:
        `out`, `format`, `records`, `bytes`.

    Raises:
        InputError: another suffix, pyarrow missing, tensors larger than the memory.
        CacheError: a view that is not there, incomplete or damaged.
    """
    target = require_format(out)
    cache = LogitCache.open(path)
    complete = cache.views
    requested = complete if views is None else views
    missing = next((view for view in requested if view not in complete), None)
    if missing is not None or not requested:
        what = "any view" if missing is None else f"view {missing}"
        raise CacheError(f"cache {path} does not have {what} complete")
    ids = list(requested)
    with open_atomically(target) as file:
        if target.suffix == ".parquet":
            _write_parquet(cache, ids, file)
        elif target.suffix == ".pt":
            from deit_fast.runtime.torch_files import write_torch

            write_torch(file, _tensors(cache, ids))
        else:
            write_safetensors(_tensors(cache, ids), _metadata(cache), file)
    return {
        "out": str(target),
        "format": target.suffix.removeprefix("."),
        "records": len(ids) * cache.manifest["num_samples"],
        "bytes": target.stat().st_size,
    }


def require_format(out: str | Path) -> Path:
    """The path of the file to write; InputError where its suffix is none of FORMATS."""
    target = Path(out)
    if target.suffix not in FORMATS:
        raise InputError(f"--output needs a name that ends in {', '.join(FORMATS)}, not {out}")
    return target


def require_memory(needed: int, remedy: str) -> None:
    """Raise InputError where tensors of ``needed`` bytes do not fit half of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory // 2:
        raise InputError(
            f"{needed / 2**30:.1f} GiB of tensors do not fit half of this machine's memory "
            f"({memory / 2**30:.1f} GiB): {remedy}"
        )


def _decode(cache: LogitCache, samples: np.ndarray, view: int) -> dict[str, Tensor]:
    from deit_fast.kernels.distillation_loss import TopK

    logits = cache.gather(samples, view, tau=cache.codec.first_temperature)
    if isinstance(logits, TopK):
        return {"ids": logits.ids, "log_probs": logits.log_probs, "log_tail": logits.log_tail}
    if cache.codec.name == "int8-standard":
        logits = _stored_form(cache).finish(logits)
    return {{1: "label", 2: "logits", 3: "features"}[logits.dim()]: logits}


@functools.lru_cache(maxsize=1)
def _stored_form(cache: LogitCache) -> StoredForm:
    from deit_fast.cache.feature_cache import FeatureCache

    return FeatureCache(cache).form


def _blocks(
    cache: LogitCache, views: list[int]
) -> Iterator[tuple[int, np.ndarray, dict[str, Tensor]]]:
    """Index of the view in ``views``, sample ids and columns of one block after another."""
    count, size = cache.manifest["num_samples"], cache.manifest["block_records"]
    for index, view in enumerate(views):
        for start in range(0, count, size):
            samples = cache.order.samples(view, start, min(start + size, count))
            yield index, samples, _decode(cache, samples, view)


def _metadata(cache: LogitCache) -> dict[str, str]:
    return {
        "deit_fast.manifest": json.dumps(cache.manifest, sort_keys=True),
        "deit_fast.tau": repr(cache.codec.first_temperature),
    }


def write_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], file: BinaryIO) -> None:
    """As safetensors.torch.save_file, whose files only their owner may read, or with twice the
    memory as safetensors.torch.save."""
    import torch

    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        kind = _SAFETENSORS[str(tensor.dtype)]
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_parquet(cache: LogitCache, views: list[int], file: BinaryIO) -> None:
    import torch

    pa, pq = import_pyarrow()

    def column(values: Tensor) -> Any:
        if values.dtype == torch.bfloat16:  # Arrow has no such type
            values = values.float()
        array = values.numpy()
        if array.ndim == 1:
            return pa.array(array)
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array[0].size)

    writer = None
    try:
        for index, samples, values in _blocks(cache, views):
            columns = {
                "sample": pa.array(samples),
                "view": pa.array(np.full(len(samples), views[index], np.int32)),
            } | {name: column(value) for name, value in values.items()}
            table = pa.table(columns).replace_schema_metadata(_metadata(cache))
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _tensors(cache: LogitCache, views: list[int]) -> dict[str, Tensor]:
    """All records as tensors [N, V, ...].

    Raises:
        InputError: they do not fit half of the memory.
    """
    import torch

    count = cache.manifest["num_samples"]
    needed = len(views) * sum(
        value.nbytes for value in _decode(cache, np.arange(1), views[0]).values()
    )
    require_memory(needed * count, "export fewer --views, or to .parquet")
    tensors: dict[str, Tensor] = {}
    for index, samples, values in _blocks(cache, views):
        for name, value in values.items():
            if name not in tensors:
                shape = (count, len(views), *value.shape[1:])
                tensors[name] = torch.empty(shape, dtype=value.dtype)
            tensors[name][torch.from_numpy(samples), index] = value
    tensors["views"] = torch.tensor(views)
    return tensors
