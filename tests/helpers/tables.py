"""Files of Hugging Face datasets as `datasets` 5.2 writes them, made by pyarrow alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table_of(
    images: Sequence[bytes | None], labels: Sequence[Any], names: Sequence[str] | None = None,
    label_type: Any = None, **more: Any,
) -> Any:  # fmt: skip
    """A table with the columns `image` and `label`.

    Args:
        names: of the ClassLabel; None: the description of the features is missing.
        more: further columns by name, as pyarrow arrays.
    """
    rows = [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(images)]
    columns = {"image": pa.array(rows, IMAGE), "label": pa.array(labels, label_type), **more}
    table = pa.table(columns)
    return table if names is None else featured(table, image="Image", label=list(names))


def featured(table: Any, **features: Any) -> Any:
    """The table with features: "Image", or the names of a ClassLabel, by column."""
    described = {
        name: {"_type": "Image"} if kind == "Image" else {"names": kind, "_type": "ClassLabel"}
        for name, kind in features.items()
    }
    text = json.dumps({"info": {"features": described}})
    return table.replace_schema_metadata({"huggingface": text})


def write_parquet(
    table: Any, folder: Path, split: str, shards: int = 1, rows: int = 100, **options: Any
) -> None:
    """`FOLDER/SPLIT-00000-of-00001.parquet`, as the Hub names them.

    Args:
        rows: of a row group.
        options: of `pyarrow.parquet.write_table`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts(table, shards)):
        path = folder / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(part, path, row_group_size=rows, write_page_index=True, **options)


def save_to_disk(
    table: Any, folder: Path, shards: int = 1, rows: int = 1000, **options: Any
) -> None:
    """A split as `Dataset.save_to_disk` writes it: Arrow streams and their description.

    Args:
        rows: of a record batch.
        options: of `pyarrow.ipc.IpcWriteOptions`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for name, part in zip(files, parts(table, shards), strict=True):
        write = pa.ipc.new_stream(
            str(folder / name), part.schema, options=pa.ipc.IpcWriteOptions(**options)
        )
        with write as writer:
            writer.write_table(part, rows)
    state = {"_data_files": [{"filename": name} for name in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def parts(table: Any, shards: int) -> list[Any]:
    """As `Dataset.shard(..., contiguous=True)`: the first ones are longer by one."""
    size, more = divmod(len(table), shards)
    starts = [number * size + min(number, more) for number in range(shards + 1)]
    return [table.slice(start, end - start) for start, end in pairwise(starts)]
