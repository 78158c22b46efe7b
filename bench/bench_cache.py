"""Teacher-logit cache: gather from a whole ImageNet view, encoding, and what codecs cost and lose.

"On the device": encode, decode and gather beside the same work in PyTorch's operations, with a GPU.

Gather: warm top-16 records (72 bytes) of one view of 1,281,167 samples in an epoch's order, so that
each comes once and the 92 MB of a view pass through the CPU's caches. "records" is the bytes alone;
"logits" decodes them to a TopK at T=2, ours against numpy's raw copy, undecoded, of the same
records from a memory map, and against the stores of cache_stores.py, decoded. Ours also finds the
views, checks ids and file size, and has compared every block's checksum. Bytes: each record read
once, written once.

Cold: the same after the files were dropped from the page cache. The first record of a block costs
the whole block (4096 records, read to verify its checksum). This pays in an epoch but not in a
single batch, so both are measured. The epoch's order is random and known in advance; its peer reads
the file from end to end. The first batch already needs records of nearly every block, so all blocks
must be read before anything can be gathered: "ours, read and checked" ends there, "ours" when all
batches are decoded.

Encode: logits to top-16 records with the tail mass at T=2, compared with numpy in float64. With
writing: 16,384 samples into a new cache (checksums, each block synced before its table entry),
compared with numpy's records appended to a plain file that is synced at its end.

Codecs: bytes per view and Kullback-Leibler divergence of the decoded logits, for a teacher trained
here on scikit-learn's digits.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deit_fast import _C
from deit_fast.cache import (
    LogitCache,
    LogitCacheWriter,
    build_manifest,
    codec_from_config,
)
from deit_fast.cache.format import view_path, view_specs
from deit_fast.config import CodecConfig
from deit_fast.kernels import TopK
from deit_fast.runtime.files import temporary_path

from .cache_stores import STORES, TINYVIT, Store, drop_from_memory, write_stores
from .common import Case, Row

SAMPLES, CLASSES, K, TAU = 1_281_167, 1000, 16, 2.0
RECORD = np.dtype(
    [("ids", "<u2", K), ("log_probs", "<f2", K), ("log_tail", "<f4"), ("log_norm", "<f4")]
)


def random_records(rng: np.random.Generator, count: int) -> np.ndarray:
    records = np.zeros(count, RECORD)
    records["ids"] = rng.integers(0, CLASSES, (count, K))
    records["log_probs"] = -np.sort(rng.exponential(4, (count, K)))
    records["log_tail"] = -rng.exponential(1, count)
    return records


@cache
def imagenet_view() -> tuple[tempfile.TemporaryDirectory[str], LogitCache]:
    """A view of random records; the folder lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="deit-fast-bench-")
    path = Path(folder.name)
    codec = CodecConfig(k=K, temperatures=(TAU,))
    manifest = build_manifest(
        codec, num_classes=CLASSES, num_samples=SAMPLES, tau=TAU, fingerprint={"bench.seed": 0}
    )
    rng = np.random.default_rng(0)
    with LogitCacheWriter(path, manifest) as writer:  # publishes the manifest
        name = view_path(path, 0)
        file = _C.ViewWriter(str(name), str(temporary_path(name)), view_specs(manifest)(view_id=0))
        for block in range(writer.num_blocks):
            start, stop = writer.block_range(block)
            records = random_records(rng, stop - start)
            file.commit(block, records.ctypes.data, records.nbytes)
    opened = LogitCache.open(path)
    offset = view_specs(manifest)(view_id=0).data_offset
    mapped = np.memmap(name, np.uint8, "r", offset, (SAMPLES, RECORD.itemsize))
    write_stores(path, np.array(mapped), offset)
    for start in range(0, SAMPLES, 4096):  # warm: checksums compared, pages in memory
        opened.gather(np.arange(start, min(start + 4096, SAMPLES)), 0, tau=TAU)
    return folder, opened


def cases(device: str) -> list[Case]:
    batches = (256, 4096)
    fast, slow = ("numpy take",), ("LMDB", "HDF5", "TinyViT layout")
    found = [
        gather_case(batch, kind, peers)
        for peers in (fast, slow)
        for batch in batches
        for kind in ("records", "logits")
    ]
    found += [open_case(256), cold_batch_case(256), cold_epoch_case(4096)]
    found = [*found, encode_case(256), encode_and_write_case(16384, 256), codec_case(256)]
    if device == "cpu":
        return found
    return [device_encode_case(256), device_decode_case(256),
            device_encode_case(4096), *found]  # fmt: skip


@cache
def store(name: str) -> Store | str:
    """An open store with its pages in memory, or why there is none."""
    folder, _ = imagenet_view()
    kind, module, files = STORES[name]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    opened = kind(Path(folder.name))
    for file in files:
        (Path(folder.name) / file).read_bytes()
    for start in range(0, SAMPLES, 65536):
        opened.read(np.arange(start, min(start + 65536, SAMPLES)))
    return opened


def gather_case(batch: int, kind: str, names: tuple[str, ...]) -> Case:
    """A slow implementation leaves cold CPU caches to the next one, which is always the same one:
    each implementation therefore reads another batch, not timed, before its timed batch."""
    ready: dict[str, Callable[[], Any] | str] = {}

    def before(name: str) -> None:
        call = ready[name]
        if callable(call):
            call()

    def build() -> dict[str, Callable[[], Any] | str]:
        ready.update(make())
        return ready

    def make() -> dict[str, Callable[[], Any] | str]:
        _, opened = imagenet_view()
        order = np.random.default_rng(1).permutation(SAMPLES)
        views = np.zeros(batch, np.int64)
        # Each store starts elsewhere in the order, so that no other has just read the same records.
        starts = {name: position * 150_000 for position, name in enumerate(("ours", *names))}

        def next_ids(name: str) -> np.ndarray:
            start = starts[name]
            starts[name] = start + batch if start + 2 * batch <= SAMPLES else 0
            return order[start : start + batch]

        def peer(name: str) -> Callable[[], Any] | str:
            found = store(name)
            if isinstance(found, str):
                return found
            if (
                kind == "records" or name == "numpy take"
            ):  # both sides return undecoded bytes, the least work
                return lambda: found.read(next_ids(name))
            decode = decode_tinyvit if name == "TinyViT layout" else decode_ours
            return lambda: decode(found.read(next_ids(name)))

        def decode_ours(raw: np.ndarray) -> Any:
            return opened.codec.decode(torch.frombuffer(bytearray(raw), dtype=torch.uint8)
                                       .view(raw.shape), TAU)  # fmt: skip

        peers = {
            f"{name}, raw" if name == "numpy take" and kind == "logits" else name: peer(name)
            for name in names
        }
        if kind == "records":
            return {"ours": lambda: opened.gather_records(next_ids("ours"), views), **peers}
        return {"ours": lambda: opened.gather(next_ids("ours"), views, tau=TAU), **peers}

    moved = 2 * batch * RECORD.itemsize
    title = f"{kind}, stores" if len(names) > 1 else kind
    name = f"gather top-16 {title} B={batch}"
    return Case(name, build, moved, batch, on_host=True, before=before)


def decode_tinyvit(raw: np.ndarray) -> TopK:
    """At T=1, the only temperature that probabilities serve."""
    records = raw.view(TINYVIT)[:, 0]
    probs = np.maximum(records["probs"].astype(np.float32), 2.0**-25)
    tail = np.log(np.maximum(1 - probs.sum(1), 2.0**-25))
    ids = records["ids"].astype(np.int32)
    return TopK(*map(torch.from_numpy, (ids, np.log(probs), tail)))


class Ours:
    """The cache as one more store."""

    def __init__(self, folder: Path) -> None:
        self.cache = LogitCache.open(folder)

    def read(self, ids: np.ndarray) -> Any:
        return self.cache.gather_records(ids, np.zeros(len(ids), np.int64))

    def close(self) -> None:
        del self.cache


def open_store(name: str, folder: Path) -> Store:
    return Ours(folder) if name == "ours" else STORES[name][0](folder)


def close_stores() -> None:
    """LMDB cannot be opened twice, and a mapped file stays in the page cache."""
    _, opened = imagenet_view()
    opened._open_views = LogitCache.open(opened.path)._open_views
    for name in STORES:
        found = store(name)
        if not isinstance(found, str):
            found.close()
    store.cache_clear()


def open_and_read(ids: np.ndarray) -> Mapping[str, Callable[[], Any] | str]:
    """For each store, by name: a function that opens it, reads these samples and closes it."""
    folder, _ = imagenet_view()

    def call(name: str) -> None:
        opened = open_store(name, Path(folder.name))
        opened.read(ids)
        opened.close()

    reasons = {name: store(name) for name in STORES}
    close_stores()
    return {"ours": partial(call, "ours")} | {
        name: reason if isinstance(reason, str) else partial(call, name)
        for name, reason in reasons.items()
    }


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from bench.bench_cache import SAMPLES, open_store
from bench.cache_stores import own_megabytes
name, folder = sys.argv[1], Path(sys.argv[2])
for each in ("ours", name):  # imports
    opened = open_store(each, folder)
    opened.read(np.arange(3))
    opened.close()
before = own_megabytes()
opened, rng = open_store(name, folder), np.random.default_rng(0)
for _ in range(100):
    opened.read(np.unique(rng.integers(0, SAMPLES, 256)))
print(own_megabytes() - before)
"""


def open_case(batch: int) -> Case:
    """Open a warm store and read one batch; also the process's anonymous memory afterwards."""

    def facts(name: str) -> Row:
        folder, _ = imagenet_view()
        command = [sys.executable, "-c", MEMORY, name, folder.name]
        done = subprocess.run(command, capture_output=True, text=True)
        return {"own_mb": float(done.stdout)} if done.returncode == 0 else {}

    return Case(f"open and gather B={batch}", lambda: open_and_read(np.arange(batch)),
                on_host=True, facts=facts)  # fmt: skip


def forget(name: str) -> None:
    """Drop a store's files from the page cache."""
    folder, _ = imagenet_view()
    files = STORES[name][2] if name in STORES else ("view-00000.dlc",)
    drop_from_memory([Path(folder.name) / file for file in files])


def cold_batch_case(batch: int) -> Case:
    ids = np.random.default_rng(3).choice(SAMPLES, batch, replace=False)
    return Case(f"cold: open, one gather B={batch}", lambda: open_and_read(ids), before=forget,
                items=batch, on_host=True)  # fmt: skip


def cold_epoch_case(batch: int) -> Case:
    """Every sample once in random order, known ahead; the files not in memory."""

    def build() -> dict[str, Callable[[], Any] | str]:
        folder, _ = imagenet_view()
        path = Path(folder.name)
        order = np.random.default_rng(4).permutation(SAMPLES)
        batches = [(part, 0) for part in np.array_split(order, SAMPLES // batch)]
        close_stores()

        def ours() -> None:
            opened = LogitCache.open(path)
            with opened.prefetch(batches) as ahead:
                for samples, views in ahead:
                    opened.gather(samples, views, tau=TAU)

        def read_and_checked() -> None:
            with LogitCache.open(path).prefetch(batches) as ahead:
                ahead.wait()

        def end_to_end() -> None:
            with open(path / "view-00000.dlc", "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass

        return {"ours": ours, "ours, read and checked": read_and_checked, "end to end": end_to_end}

    return Case(f"cold: epoch, known order B={batch}", build, before=forget, items=SAMPLES,
                bytes_moved=SAMPLES * RECORD.itemsize, on_host=True)  # fmt: skip


def device_decode_case(batch: int) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        codec = codec_from_config(CodecConfig(k=K, temperatures=(TAU,)), CLASSES, TAU)
        raw = random_records(np.random.default_rng(0), batch).view(np.uint8)
        records = torch.from_numpy(raw.reshape(batch, RECORD.itemsize)).cuda()
        return {
            "ours": lambda: codec.decode(records, TAU),
            "torch operations": lambda: torch_decode(records),
        }

    moved = batch * (RECORD.itemsize + 8 * K + 4)
    return Case(f"on the device: decode top-16 B={batch}", build, bytes_moved=moved, items=batch)


def device_encode_case(batch: int) -> Case:
    def build() -> dict[str, Callable[[], Any] | str]:
        codec = codec_from_config(CodecConfig(k=K, temperatures=(TAU,)), CLASSES, TAU)
        logits = torch.randn(batch, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
        logits = logits.cuda()
        return {
            "ours": lambda: codec.encode(logits),
            "torch operations": lambda: torch_encode(logits),
        }

    moved = batch * (4 * CLASSES + RECORD.itemsize)
    name = f"on the device: encode top-16 C={CLASSES} B={batch} fp32"
    return Case(name, build, bytes_moved=moved, items=batch)


def torch_decode(raw: torch.Tensor) -> TopK:
    """Decode records [n, 72] to the same values as ours."""
    ids = raw[:, : 2 * K].contiguous().view(torch.int16).int() & 0xFFFF
    stored = raw[:, 2 * K : 4 * K].contiguous().view(torch.float16).float()
    tail, norm = raw[:, 4 * K :].contiguous().view(torch.float32).unbind(1)
    return TopK(ids, stored / TAU - norm[:, None], tail, "bucket")


def torch_encode(logits: torch.Tensor) -> torch.Tensor:
    """Records like ours, but with float32 sums and with ties in any order.

    Raises:
        ValueError: a logit is not finite, which ours refuses too; the check waits for the device.
    """
    if not torch.isfinite(logits).all():
        raise ValueError("not finite")
    values, ids = logits.topk(K, 1)
    stored = (values - logits.logsumexp(1, keepdim=True)).half()
    scaled = logits / TAU
    outside = scaled.scatter(1, ids, -torch.inf).logsumexp(1)
    whole = scaled.logsumexp(1)
    inside = (values / TAU).logsumexp(1)
    norm = (stored.float() / TAU).logsumexp(1) - inside + whole
    floats = torch.stack((outside - whole, norm), 1)
    return torch.cat([part.view(torch.uint8) for part in (ids.short(), stored, floats)], 1)


def encode_case(batch: int) -> Case:
    """On the host."""

    def build() -> dict[str, Callable[[], Any] | str]:
        codec = codec_from_config(CodecConfig(k=K, temperatures=(TAU,)), CLASSES, TAU)
        logits = torch.randn(batch, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
        values = logits.numpy()
        return {"ours": lambda: codec.encode(logits), "numpy": lambda: numpy_encode(values)}

    name = f"encode top-16 C={CLASSES} B={batch} fp32"
    return Case(name, build, items=batch, on_host=True)


def encode_and_write_case(samples: int, batch: int) -> Case:
    """Ours through the writer that `precompute` has; each call into a folder or file of its own."""

    def build() -> dict[str, Callable[[], Any] | str]:
        config = CodecConfig(k=K, temperatures=(TAU,))
        manifest = build_manifest(
            config, num_classes=CLASSES, num_samples=samples, tau=TAU, fingerprint={"bench.seed": 0}
        )
        logits = torch.randn(samples, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
        ids = torch.arange(samples)

        def ours() -> None:
            with (
                tempfile.TemporaryDirectory(prefix="deit-fast-bench-") as folder,
                LogitCacheWriter(Path(folder) / "cache", manifest) as writer,
            ):
                for part in ids.split(batch):
                    writer.write(part, 0, logits[part[0] : part[-1] + 1])

        def peer() -> None:
            with tempfile.TemporaryFile(prefix="deit-fast-bench-") as file:
                for part in logits.split(batch):
                    numpy_encode(part.numpy()).tofile(file)
                os.fsync(file.fileno())

        return {"ours": ours, "numpy, fsync": peer}

    return Case(f"encode and write top-16 C={CLASSES} N={samples}", build, items=samples,
                on_host=True)  # fmt: skip


def numpy_encode(logits: np.ndarray) -> np.ndarray:
    """The same records, by a stable sort and float64 sums."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    z = logits.astype(np.float64)
    inside = np.take_along_axis(z, ids, 1)
    outside = z.copy()
    np.put_along_axis(outside, ids, -np.inf, 1)
    records = np.zeros(len(logits), RECORD)
    records["ids"] = ids
    records["log_probs"] = inside - log_sum_exp(z)[:, None]
    records["log_tail"] = log_sum_exp(outside / TAU) - log_sum_exp(z / TAU)
    stored = records["log_probs"].astype(np.float64)
    records["log_norm"] = (
        log_sum_exp(stored / TAU) - log_sum_exp(inside / TAU) + log_sum_exp(z / TAU)
    )
    return records


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    largest = x.max(1)
    return np.log(np.exp(x - largest[:, None]).sum(1)) + largest


# ---------------------------------------------------------------------------------------------
# Codecs on a real teacher
# ---------------------------------------------------------------------------------------------


@cache
def digits_logits() -> torch.Tensor:
    """Logits [898, 10] about images that the teacher, trained here on the others, has not seen."""
    from sklearn.datasets import load_digits

    from deit_fast.models.convnet import small_convnet

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    targets = torch.from_numpy(labels)
    torch.manual_seed(0)
    model = small_convnet(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        for rows in torch.randperm(899).split(64):
            loss = torch.nn.functional.cross_entropy(model(pixels[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return model.eval()(pixels[899:])


def codec_case(batch: int) -> Case:
    settings = {f"ours, topk {k}": CodecConfig(k=k, temperatures=(1.0,)) for k in (1, 2, 3, 5, 8)}
    for name in ("dense-int8", "dense-fp8", "dense-fp16", "dense-bf16", "dense-fp32"):
        settings[f"ours, {name}"] = CodecConfig(name=name)  # type: ignore[arg-type]
    codecs = {name: codec_from_config(config, 10, 1.0) for name, config in settings.items()}

    def build() -> dict[str, Callable[[], Any] | str]:
        raw = {name: codec.encode(digits_logits()[:batch]) for name, codec in codecs.items()}
        return {name: partial(codec.decode, raw[name], 1.0) for name, codec in codecs.items()}

    def facts(name: str) -> Row:
        codec, logits = codecs[name], digits_logits()
        error = kl_error(codec.decode(codec.encode(logits), 1.0), logits)
        return {"bytes_per_view": codec.record_bytes, "kl_error": error}

    name = f"decode, digits teacher C=10 B={batch}"
    return Case(name, build, items=batch, on_host=True, facts=facts)


def kl_error(decoded: Any, logits: torch.Tensor) -> float:
    """Mean KL(teacher || decoded) at T=1, nats; topk's tail is spread evenly over its classes."""
    exact = torch.log_softmax(logits.double(), 1)
    if isinstance(decoded, TopK):
        outside = logits.shape[1] - decoded.ids.shape[1]
        even = decoded.log_tail.double() - np.log(max(outside, 1))
        spread = even[:, None].expand_as(exact)
        found = spread.scatter(1, decoded.ids.long(), decoded.log_probs.double())
    else:
        found = torch.log_softmax(decoded.double(), 1)
    return float((exact.exp() * (exact - found)).sum(1).mean())
