"""`pack`: decode each image once and store it smaller, in the format of `data.packed_shards`."""

from __future__ import annotations

import io
import itertools
import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from deit_fast import _C
from deit_fast.arguments import size_text
from deit_fast.config import DataConfig
from deit_fast.data.open import open_source
from deit_fast.data.packed_shards import FORMAT, FORMS, read_index, shard_name
from deit_fast.data.resize import resize_shorter_side
from deit_fast.data.sources import Source, UnreadableImage
from deit_fast.errors import InputError
from deit_fast.runtime.files import write_atomically, write_json
from deit_fast.runtime.metrics import Progress

log = logging.getLogger("deit_fast")

SHARD_SAMPLES = 4096  # about 1 GB of uint8 images


def pack(
    data: DataConfig,
    out: str,
    *,
    form: str = "uint8",
    short_side: int = 256,
    quality: int = 92,
    shard_samples: int = SHARD_SAMPLES,
) -> dict[str, Any]:
    """Write both splits of ``data`` as packed shards; the same call goes on after an interruption.

    Images whose shorter side is above ``short_side`` are reduced to it (Pillow's bicubic), smaller
    ones stay. An unreadable image keeps its place and its label, and loaders treat it as they treat
    an unreadable file.

    Args:
        out: folder; `data.source=packed data.root=OUT` reads it.
        form: "uint8": pixels, ready to be cropped; "jpeg": a fifth of the bytes, to be decoded.
        quality: of JPEG.

    Returns:
        `out`, `images`, `shards` written and `kept`, `bytes`, `seconds`, `unreadable` (paths).

    Raises:
        InputError: a wrong value; a folder that holds another pack, naming what differs.
        OSError: the disk is full; whole shards stay.
    """
    if form not in FORMS:
        raise InputError(f"form must be uint8 or jpeg, not {form!r}")
    for name, value, low, high in (
        ("short_side", short_side, 1, 65535),
        ("quality", quality, 1, 100),
        ("shard_samples", shard_samples, 1, 2**20),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} must lie in [{low}, {high}], not {value}")
    if data.source in ("packed", "synthetic"):
        raise InputError(f"data.source={data.source} is not a thing to pack: take folder or tar")
    started = time.perf_counter()
    total: dict[str, Any] = {"images": 0, "shards": 0, "kept": 0, "bytes": 0}
    unreadable: list[str] = []
    for split, name in (("train", data.train), ("val", data.val)):
        source = open_source(data, split, image_size=1)
        manifest = FORMAT | {
            "form": form, "short_side": short_side, "quality": quality if form == "jpeg" else None,
            "pillow": PIL.__version__, "num_samples": source.num_samples,
            "shard_samples": shard_samples, "classes": source.classes,
            "source": source.fingerprint(), "packed_from": os.path.join(str(data.root), name),
        }  # fmt: skip
        folder = Path(out) / name
        _agree(folder, manifest)
        done, missing = _pack_split(source, folder, manifest, data.workers, split)
        unreadable += missing
        for key, value in done.items():
            total[key] += value
    if unreadable:
        log.warning(
            "%d unreadable images were packed as such, the first is %s",
            len(unreadable), unreadable[0],
        )  # fmt: skip
    seconds = round(time.perf_counter() - started, 3)
    return {"out": out, **total, "seconds": seconds, "unreadable": unreadable}


def _agree(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or compare with the one that is there."""
    path = folder / "manifest.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, manifest)
        return
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(there, dict):
        raise InputError(f"{path} must hold a JSON object")
    wanted = json.loads(json.dumps(manifest))
    differing = [
        key
        for key in wanted
        if key not in ("pillow", "packed_from") and there.get(key) != wanted[key]
    ]
    if differing:
        key = differing[0]
        shown = "" if isinstance(wanted[key], (dict, list)) else (
            f": {there.get(key)!r}, not {wanted[key]!r}"
        )  # fmt: skip
        raise InputError(
            f"{folder} holds a pack of other {', '.join(differing)}{shown}; choose another folder"
        )


def _pack_split(
    source: Source, folder: Path, manifest: dict[str, Any], workers: int, split: str
) -> tuple[dict[str, int], list[str]]:
    count, per_shard = source.num_samples, manifest["shard_samples"]
    shards = {
        number: range(number * per_shard, min((number + 1) * per_shard, count))
        for number in range(-(-count // per_shard))
    }
    unreadable: list[str] = []
    kept = []
    for number, samples in shards.items():
        try:
            index = read_index(folder, number, len(samples), manifest)
        except InputError:
            continue
        kept.append(number)
        lost = np.flatnonzero(index["sizes"][:, 0] == 0)
        unreadable += [source.paths[samples[place]] for place in lost.tolist()]
    open_shards = [number for number in shards if number not in kept]
    left = sum(len(shards[number]) for number in open_shards)
    log.info(
        "packing %s: %d shards to write, %d there, %d images",
        split, len(open_shards), len(kept), left,
    )  # fmt: skip
    written = done = 0
    with Progress(f"pack {split}", left, unit="image") as progress:
        for number, (length, lost) in _shards(source, folder, manifest, shards, open_shards,
                                              workers):  # fmt: skip
            written += length
            unreadable += [source.paths[index] for index in lost]
            done += len(shards[number])
            progress.advance(len(shards[number]), f"{done} of {left} packed, {size_text(written)}")
    numbers = {"images": count, "shards": len(open_shards), "kept": len(kept), "bytes": written}
    return numbers, sorted(unreadable)


def _shards(
    source: Source, folder: Path, manifest: dict[str, Any], shards: dict[int, range],
    open_shards: list[int], workers: int,
) -> Any:  # fmt: skip
    """Makes the shards, in processes where there are workers, and yields them as they are done."""
    if workers == 0:
        for number in open_shards:
            yield number, write_shard(source, folder, manifest, number, shards[number])
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(
        min(workers, max(len(open_shards), 1)), context, _set_source, (source, folder, manifest)
    ) as pool:
        numbers = iter(open_shards)
        pending = {
            pool.submit(_write_here, number, shards[number]): number
            for number in itertools.islice(numbers, 2 * workers)
        }
        try:
            while pending:
                done = next(as_completed(pending))
                number = pending.pop(done)
                if (following := next(numbers, None)) is not None:
                    pending[pool.submit(_write_here, following, shards[following])] = following
                yield number, done.result()
        finally:
            pool.shutdown(cancel_futures=True)


_here: list[Any] = []  # of a worker process: source, folder, manifest


def _set_source(source: Source, folder: Path, manifest: dict[str, Any]) -> None:
    _here[:] = source, folder, manifest


def _write_here(number: int, samples: range) -> tuple[int, list[int]]:
    source, folder, manifest = _here
    return write_shard(source, folder, manifest, number, samples)


def write_shard(
    source: Source, folder: Path, manifest: dict[str, Any], number: int, samples: range
) -> tuple[int, list[int]]:
    """One shard and its table. Returns its bytes and the samples that could not be read."""
    path = folder / f"{shard_name(number)}.bin"
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    offsets = np.zeros(len(samples) + 1, np.int64)
    sizes = np.zeros((len(samples), 2), np.int32)
    checksums = np.zeros(len(samples), np.uint32)
    unreadable = []
    try:
        with open(temporary, "wb") as file:
            for place, index in enumerate(samples):
                content = b""
                try:
                    pixels = shrink(source.load(index), manifest["short_side"])
                except UnreadableImage as error:
                    log.warning("%s", error)
                    unreadable.append(index)
                else:
                    sizes[place] = pixels.shape[1], pixels.shape[0]
                    content = _encode(pixels, manifest)
                file.write(content)
                offsets[place + 1] = offsets[place] + len(content)
                checksums[place] = _C.crc32c(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    base = manifest["packed_from"]
    names = b"".join(
        os.fsencode(os.path.relpath(source.paths[index], base)) + b"\0" for index in samples
    )
    table = io.BytesIO()
    np.savez(
        table, offsets=offsets, sizes=sizes, crc32c=checksums,
        labels=source.labels[samples.start : samples.stop].astype(np.int64),
        names=np.frombuffer(names, np.uint8),
    )  # fmt: skip
    write_atomically(path.with_suffix(".npz"), table.getbuffer())
    return int(offsets[-1]), unreadable


def shrink(image: Image.Image | np.ndarray, short_side: int) -> np.ndarray:
    """Shorter side to `short_side` where it is longer."""
    pixels = np.ascontiguousarray(image)
    if min(pixels.shape[:2]) <= short_side:
        return pixels
    return resize_shorter_side(pixels, short_side)


def _encode(pixels: np.ndarray, manifest: dict[str, Any]) -> bytes:
    if manifest["form"] == "uint8":
        return pixels.tobytes()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=manifest["quality"])
    return file.getvalue()
