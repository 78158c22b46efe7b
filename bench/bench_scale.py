"""Cost of growth: what a start, an index, an order and a cache cost as samples and views grow.

Every case does one thing at one size, with synthetic indices and sparse files, so that 10 million
samples need no images. `ms` is the time of a call with nothing kept from the call before;
`private_mb` what a fresh process holds more after it, without pages of files. `exponents` gives the
growth between two sizes of a family: 0 where nothing grows, 1 where the cost is linear.

order          the tables of an epoch: sample and view of each position, three views of a sample
plan           the first 256 rows of a plan: partners of all samples, then the rows
plan rows      256 rows of a plan whose partners are known
tar open       10 shards with a stored index, 9 bytes for the name of an image
packed open    shards of 4096 images
arrow open     10 Arrow files of a Hugging Face dataset, of 1,000 rows in a batch
... digest     the fingerprint of the opened source
train start    data, views and order of a run on synthetic images, and its first batch of 64
cache open     codec `hard`, one view, and the list of complete views
cache gather   256 random records of it, verified before; "first": with opening and verification
views open, views gather    the same of 100,000 samples, by the number of views; a gather takes its
               records from all of them
loader         private memory of the loader's two workers in an epoch of synthetic images, after a
               tenth of the batches, `mb_begin`, and at the end, `mb_end`; `ms` is the epoch

The peer is `previous size`: there is none that does the same.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deit_fast import _C
from deit_fast.cache import LogitCache
from deit_fast.cache.format import (
    build_manifest,
    manifest_sha256,
    publish_manifest,
    view_path,
    view_specs,
)
from deit_fast.config import CodecConfig, DataConfig, RunConfig, ViewConfig
from deit_fast.data import open_loader, open_source, tar_shards
from deit_fast.data.packed_shards import FORMAT, shard_name
from deit_fast.data.shard_files import stamps_of
from deit_fast.data.sources import Source
from deit_fast.data.tar_index import join_names
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.runtime.files import temporary_path, write_arrays, write_json
from deit_fast.training.run_data import RunData
from deit_fast.views import order, plan

from .common import Case
from .record import Row

SAMPLES = (10**4, 10**5, 10**6, 10**7)
VIEWS = (1, 8, 64, 512)
OF_VIEWS = 100_000  # samples of the caches whose views are counted
BATCH = 256
CLASSES = 1000
SHARDS = 10
RUN = RunConfig(view=ViewConfig(image_size=32), data=DataConfig(source="synthetic", workers=0))

# ---------------------------------------------------------------------------------------------
# Synthetic stores
# ---------------------------------------------------------------------------------------------


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Of all stores; it lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="deit-fast-bench-")


@cache
def tar_store(samples: int) -> str:
    """Shards that are holes, with an index of images of 1000 bytes."""
    root = Path(folder().name, f"tar-{samples}")
    (root / "train").mkdir(parents=True)
    names = [f"{number:05d}.tar" for number in range(SHARDS)]
    per_shard = -(-samples // SHARDS)
    for name in names:
        (root / "train" / name).touch()
        os.truncate(root / "train" / name, 512 * 4 * per_shard + 1024)
    rows = np.arange(samples)
    digits = (rows[:, None] // 10 ** np.arange(4, -1, -1) % 10 + ord("0")).astype(np.uint8)
    ending = np.broadcast_to(np.frombuffer(b".jpg", np.uint8), (samples, 4))
    index: dict[str, np.ndarray] = {
        "format": np.array(tar_shards._FORMAT),
        "shards": join_names(names),
        "stamps": stamps_of([str(root / "train" / name) for name in names]),
        "shard": (rows // per_shard).astype(np.int32),
        "offset": rows % per_shard * 2048 + 512,
        "size": np.full(samples, 1000, np.int64),
        "label": rows % CLASSES,
        "name_end": 9 * (rows + 1),
        "names": np.concatenate([digits, ending], axis=1).reshape(-1),
        "left_out": np.zeros(0, np.uint8),
    }
    write_arrays(root / "train" / tar_shards._INDEX, index)
    return str(root)


@cache
def packed_store(samples: int, per_shard: int = 4096) -> str:
    """Shards that are holes, of images of 8 x 8 pixels."""
    root = Path(folder().name, f"packed-{samples}")
    (root / "train").mkdir(parents=True)
    manifest = FORMAT | {
        "form": "uint8", "short_side": 8, "num_samples": samples, "shard_samples": per_shard,
        "classes": [str(label) for label in range(CLASSES)],
    }  # fmt: skip
    write_json(root / "train/manifest.json", manifest)
    for number, first in enumerate(range(0, samples, per_shard)):
        count = min(per_shard, samples - first)
        path = root / "train" / f"{shard_name(number)}.bin"
        path.touch()
        os.truncate(path, 192 * count)
        names = b"".join(b"0/%08d.png\0" % row for row in range(first, first + count))
        table: dict[str, np.ndarray] = {
            "offsets": 192 * np.arange(count + 1), "sizes": np.full((count, 2), 8, np.int32),
            "labels": np.arange(first, first + count) % CLASSES,
            "crc32c": np.zeros(count, np.uint32), "names": np.frombuffer(names, np.uint8),
        }  # fmt: skip
        write_arrays(path.with_suffix(".npz"), table)
    return str(root)


@cache
def arrow_store(samples: int) -> str:
    """Arrow files with images of four bytes."""
    import pyarrow as pa

    root = Path(folder().name, f"arrow-{samples}")
    (root / "train").mkdir(parents=True)
    per_file = -(-samples // SHARDS)
    for number in range(SHARDS):
        count = min(per_file, samples - number * per_file)
        ends = pa.py_buffer(np.arange(0, 4 * count + 1, 4, dtype=np.int32))
        images = pa.Array.from_buffers(
            pa.binary(), count, [None, ends, pa.py_buffer(bytes(4 * count))]
        )
        table = pa.table({"image": images, "label": pa.array(np.arange(count) % CLASSES)})
        path = root / "train" / f"data-{number:05d}-of-{SHARDS:05d}.arrow"
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, 1000)
    return str(root)


@cache
def cache_store(samples: int, views: int) -> str:
    """A complete cache of codec `hard` whose records are holes: the class 0 for every sample."""
    path = Path(folder().name, f"cache-{samples}-{views}")
    manifest = publish_manifest(path, build_manifest(
        CodecConfig(name="hard"), num_classes=CLASSES, num_samples=samples, tau=1.0,
        fingerprint={"view.seed": 0, "view.repeats": 1},
    ))  # fmt: skip
    block = manifest["block_records"]
    for view in range(views):
        name, spec = view_path(path, view), view_specs(manifest)(view_id=view)
        _C.ViewWriter(str(name), str(temporary_path(name)), spec, reserve=False)
        record = (os.stat(name).st_size - spec.data_offset) // samples
        start = _C.crc32c(manifest_sha256(manifest))
        entries = []
        for number, first in enumerate(range(0, samples, block)):
            zeros = bytes(record * min(block, samples - first))
            crc = _C.crc32c(zeros, _C.crc32c(struct.pack("<QQ", view, number), start))
            entries.append(struct.pack("<I4s", crc, b"DONE"))
        with open(name, "r+b") as file:
            file.seek(4096)
            file.write(b"".join(entries))
    return str(path)


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def forget() -> None:
    """Drop the tables of the views that this process keeps."""
    for table in (order.pairing, order._epoch_tables, order._pair_order, plan.partner_table):
        table.cache_clear()


def make_order(samples: int) -> Any:
    forget()
    return order.EpochOrder(0, samples, 3, 3).epoch(0)


def make_plan(samples: int) -> Any:
    forget()
    return plan_rows(samples)


def plan_rows(samples: int) -> Any:
    ids = np.random.default_rng(0).integers(0, samples, BATCH)
    made = plan.ViewPlan(ViewConfig(repeats=1), samples)
    return made, made.rows(ids, np.zeros_like(ids))


def open_train(source: str, root: str) -> Source:
    data = DataConfig(source=source, root=root)  # type: ignore[arg-type]
    return open_source(data, "train", 8)


def digest(source: Source) -> dict[str, Any]:
    source.__dict__.pop("_digest", None)
    return source.fingerprint()


def start_run(samples: int) -> Any:
    forget()
    config = RUN.replace(data={"synthetic_samples": samples}, batch_size=64)
    device = torch.device("cpu")
    data = RunData(config, device, ProcessGroup())
    batches = open_loader(config.data, data.source, data.plan, data.batches, device=device)
    return data, next(iter(batches))


def open_cache(path: str) -> LogitCache:
    opened = LogitCache.open(path)
    if not opened.views:
        raise RuntimeError("the view is not complete")
    return opened


def gather(opened: LogitCache, views: int = 1) -> Any:
    ids = np.random.default_rng(0).integers(0, opened.manifest["num_samples"], BATCH)
    return opened.gather(ids, np.arange(BATCH) % views, tau=1.0)


def first_gather(path: str, views: int) -> Any:
    opened = open_cache(path)
    return opened, gather(opened, views)


def prepared(name: str, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and its arguments, which a pickle can hold: the work of a case.

    Args:
        name: of the family.
        size: samples or views.
    """
    kind, _, what = name.partition(" ")
    if kind in ("tar", "packed", "arrow"):
        store = {"tar": tar_store, "packed": packed_store, "arrow": arrow_store}[kind](size)
        source = "hf" if kind == "arrow" else kind
        return open_train, (source, store)
    if kind == "cache":
        store = cache_store(size, 1)
        return (open_cache, (store,)) if what == "open" else (first_gather, (store, 1))
    if kind == "views":
        store = cache_store(OF_VIEWS, size)
        return (open_cache, (store,)) if what == "open" else (first_gather, (store, size))
    works = {"order": make_order, "plan": make_plan, "train start": start_run}
    return works[name], (size,)


def private_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is its own and holds no page of a file."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line for line in lines[1:]}
    return 1024 * int(fields["Private_Dirty"].split()[1])


def _probe(work: Callable[..., Any], arguments: tuple[Any, ...], result: Any) -> None:
    before = private_bytes()
    kept = work(*arguments)
    result.send(private_bytes() - before)
    del kept


def private_growth(work: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Bytes by which a fresh process grows that does the work and keeps its result."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(work, arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def loader_memory(samples: int, workers: int = 2, batch: int = 64) -> tuple[float, float]:
    """Private MB of the loader's workers after a tenth of an epoch and at its end."""
    config = RUN.replace(
        data={"synthetic_samples": samples, "workers": workers}, batch_size=batch,
        view={"augment": "none", "repeats": 1}, num_views=1,
    )  # fmt: skip
    device = torch.device("cpu")
    data = RunData(config, device, ProcessGroup())
    steps = data.steps.per_epoch if hasattr(data.steps, "per_epoch") else samples // batch
    loader = open_loader(
        config.data, data.source, data.plan, data.batches, device=device, stop=steps
    )
    found = [0.0, 0.0]
    for step, _ in enumerate(loader, 1):
        if step in (max(1, steps // 10), steps - 2 * workers):
            children = [child.pid for child in multiprocessing.active_children()]
            total = sum(private_bytes(pid) for pid in children if pid is not None) / 1e6
            found[step > steps // 10] = total
    return found[0], found[1]


# ---------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------

FAMILIES = (
    "order", "plan", "tar open", "packed open", "arrow open", "train start", "cache open",
    "cache gather first",
)  # fmt: skip


def cases(device: str) -> list[Case]:
    made = [case(name, "N", size) for name in FAMILIES for size in SAMPLES]
    made += [steady("plan rows", size) for size in SAMPLES]
    made += [steady("cache gather", size) for size in SAMPLES]
    made += [steady(f"{kind} digest", size) for kind in ("tar", "packed", "arrow")
             for size in SAMPLES]  # fmt: skip
    made += [case(f"views {what}", "V", views) for what in ("open", "gather") for views in VIEWS]
    return [*made, *[loader_case(size) for size in (10**4, 5 * 10**4)]]


def case(name: str, letter: str, size: int) -> Case:
    def build() -> dict[str, Callable[[], Any]]:
        work, arguments = prepared(name, size)
        return {"ours": partial(work, *arguments)}

    def facts(implementation: str) -> Row:
        grown = private_growth(*prepared(name, size))
        return {"private_mb": round(grown / 1e6, 2)}

    # Few rounds, which leave time for the facts.
    return Case(f"{name} {letter}={size}", build, on_host=True, facts=facts, repeats=2)


def steady(name: str, size: int) -> Case:
    """A case that is timed with all that a call before has left."""

    def build() -> dict[str, Callable[[], Any]]:
        kind = name.split()[0]
        if name == "plan rows":
            forget()
            return {"ours": partial(plan_rows, size)}
        if name == "cache gather":
            opened = open_cache(cache_store(size, 1))
            return {"ours": partial(gather, opened)}
        work, arguments = prepared(f"{kind} open", size)
        return {"ours": partial(digest, work(*arguments))}

    return Case(f"{name} N={size}", build, on_host=True)


def loader_case(samples: int) -> Case:
    found: list[tuple[float, float]] = []

    def facts(implementation: str) -> Row:
        begin, end = found[-1]
        return {"mb_begin": round(begin, 2), "mb_end": round(end, 2)}

    def build() -> dict[str, Callable[[], Any]]:
        return {"ours": lambda: found.append(loader_memory(samples))}

    return Case(f"loader N={samples}", build, on_host=True, facts=facts, repeats=2)


# ---------------------------------------------------------------------------------------------
# Growth
# ---------------------------------------------------------------------------------------------


def exponents(rows: Iterable[Row], field: str = "ms") -> dict[str, float]:
    """By family: e where a field grows as size ** e between its two largest sizes.

    Args:
        rows: of a result file of this bench.
        field: "ms" or "private_mb".
    """
    families: dict[str, dict[int, float]] = {}
    for row in rows:
        name, _, size = row["case"].rpartition("=")
        if row.get(field, 0) > 0:
            families.setdefault(name[:-2], {})[int(size)] = row[field]
    found = {}
    for name, values in families.items():
        if len(values) > 1:
            small, large = sorted(values)[-2:]
            found[name] = math.log(values[large] / values[small]) / math.log(large / small)
    return found


def table(content: Row) -> str:
    """Markdown: time and private memory by size, and the exponents of both."""
    rows = content["rows"]
    times, memory = exponents(rows), exponents(rows, "private_mb")
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["case"].rpartition("=")[0][:-2], []).append(row)
    lines = [
        "| what | sizes | ms | grows as | private MB | grows as |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in families.items():
        sizes = ", ".join(row["case"].rpartition("=")[2] for row in found)
        ms = ", ".join(f"{row['ms']:.3g}" if "ms" in row else "-" for row in found)
        mb = ", ".join(f"{row['private_mb']:.3g}" for row in found if "private_mb" in row)
        by_time, by_memory = (
            f"^{values[name]:.2f}" if name in values else "" for values in (times, memory)
        )
        lines.append(f"| {name} | {sizes} | {ms} | {by_time} | {mb} | {by_memory} |")
    return "\n".join(lines)


if __name__ == "__main__":  # python -m bench.bench_scale FILE
    import sys

    print(table(json.loads(Path(sys.argv[1]).read_text())))
