"""What `cache info` and `cache export` do with the files of another project."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from deit_fast.arguments import size_text
from deit_fast.cache.export import require_format, require_memory, write_safetensors
from deit_fast.cache.foreign.records import Damage, Foreign, Records, kind_text
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.arrow import import_pyarrow
from deit_fast.runtime.files import open_atomically

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 5  # damaged members
_GROUP_BYTES = 1 << 25  # of a row group of Parquet
_MAX_HEADER = 100_000_000  # bytes that readers of safetensors accept


def describe(foreign: Foreign) -> list[tuple[str, str]]:
    """Name and text of each fact; reads all files."""
    samples, more = 0, 0
    damaged: list[Damage] = []
    views: Counter[int] = Counter()
    lengths: dict[str, Counter[int]] = {}
    kinds: dict[str, Tensor] = {}
    for item in foreign.records():
        if isinstance(item, Damage):
            more += len(damaged) == _SHOWN
            damaged += [item] if len(damaged) < _SHOWN else []
            continue
        samples += len(item.keys)
        views[item.views] += len(item.keys)
        for name, tensor in item.tensors.items():
            kinds[name] = tensor
            lengths.setdefault(name, Counter())[tensor.shape[1]] += len(item.keys)
    size = sum(file.stat().st_size for file in foreign.files)
    rows = [
        ("path", str(foreign.path)), ("format", foreign.name),
        ("files", f"{len(foreign.files)}, {size_text(size)}"), ("samples", str(samples)),
        ("views", f"{_range(views)} a sample"),
    ]  # fmt: skip
    rows += [(name, kind_text(kinds[name], _range(counts))) for name, counts in lengths.items()]
    rows += foreign.rows()
    rows += [("damaged", item.text) for item in damaged]
    if more:
        rows.append(("damaged", f"and {more} more"))
    return [*rows, ("no replay", f"{foreign.replay}; no run can use it")]


def export(foreign: Foreign, out: str | Path) -> dict[str, Any]:
    """Write what ``foreign`` holds into one file; whole or not at all.

    Parquet: a row a sample with `key`, lists [V, ...], and texts. Tensors: the same names, [N, V,
    ...] over samples; keys and texts are JSON lists in the metadata of .safetensors, lists in .pt.

    Returns:
        As ``deit_fast.cache.export.export``.

    Raises:
        InputError: another suffix, pyarrow missing, tensors larger than the memory, samples of
            different V for tensors.
        CacheError: a member is damaged, or there is no sample.
    """
    target = require_format(out)
    records = _undamaged(foreign)
    with open_atomically(target) as file:
        if target.suffix == ".parquet":
            count = _write_parquet(records, file)
        else:
            tensors, texts = _collect(records)
            count = len(texts["key"])
            if target.suffix == ".pt":
                from deit_fast.runtime.torch_files import write_torch

                write_torch(file, {**tensors, **texts})
            else:
                facts = {f"deit_fast.{name}": json.dumps(text) for name, text in texts.items()}
                if sum(map(len, facts.values())) > _MAX_HEADER // 2:  # quotes are escaped
                    raise InputError(
                        f"{count} keys are too many for a .safetensors file: export to .parquet"
                    )
                write_safetensors(tensors, {**facts, "deit_fast.format": foreign.name}, file)
        if count == 0:
            raise CacheError(f"{foreign.path} has no sample to export")
    return {
        "out": str(target),
        "format": target.suffix.removeprefix("."),
        "records": count,
        "bytes": target.stat().st_size,
    }


def _undamaged(foreign: Foreign) -> Iterator[Records]:
    for item in foreign.records():
        if isinstance(item, Damage):
            raise CacheError(
                f"{item.text}; `deit-fast cache info` lists what is damaged, and archives without "
                f"damage can be exported one by one"
            )
        yield item


def _range(counts: Counter[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _collect(records: Iterator[Records]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    import torch

    tensors: dict[str, list[Tensor]] = {}
    texts: dict[str, list[str]] = {"key": []}
    size = 0
    for item in records:
        for name, tensor in item.tensors.items():
            parts = tensors.setdefault(name, [])
            if parts and parts[0].shape[1] != tensor.shape[1]:
                raise InputError(
                    f"{item.keys[0]} has {tensor.shape[1]} of {name}, samples before it "
                    f"{parts[0].shape[1]}, which tensors cannot hold: export to .parquet"
                )
            parts.append(tensor)
            size += tensor.nbytes
        for name, text in {"key": item.keys, **item.texts}.items():
            texts.setdefault(name, []).extend(text)
        require_memory(2 * size, "export one of its archives, or to .parquet")
    return {name: torch.cat(parts) for name, parts in tensors.items()}, texts


def _write_parquet(records: Iterator[Records], file: BinaryIO) -> int:
    pa, pq = import_pyarrow()
    writer, count = None, 0
    try:
        for tables in _groups(records):
            table = pa.concat_tables(tables)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count


def _groups(records: Iterator[Records]) -> Iterator[list[Any]]:
    """Tables of a row group each."""
    pa, _ = import_pyarrow()
    tables: list[Any] = []
    size = 0
    for item in records:
        columns = {"key": pa.array(item.keys), **{n: pa.array(t) for n, t in item.texts.items()},
                   **{name: _lists(tensor) for name, tensor in item.tensors.items()}}  # fmt: skip
        tables.append(pa.table(columns))
        size += tables[-1].nbytes
        if size > _GROUP_BYTES:
            yield tables
            tables, size = [], 0
    if tables:
        yield tables


def _lists(tensor: Tensor) -> Any:
    """[n, V, ...] as a column of lists of V values, or of V lists; float32 for half precision."""
    import torch

    pa, _ = import_pyarrow()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    values = pa.array(tensor.reshape(-1).numpy())
    if tensor.dim() > 2:
        values = pa.FixedSizeListArray.from_arrays(values, tensor[0, 0].numel())
    offsets = [i * tensor.shape[1] for i in range(len(tensor) + 1)]
    return pa.ListArray.from_arrays(offsets, values)
