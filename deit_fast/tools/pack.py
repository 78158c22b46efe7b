"""`pack`: decode each image once and store it smaller, in the format of `data.packed_shards`."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from deit_fast import _C
from deit_fast.config import DataConfig
from deit_fast.data.open import open_source
from deit_fast.data.packed_shards import FORMAT, FORMS, read_index, shard_name
from deit_fast.data.resize import resize_shorter_side
from deit_fast.data.sources import Source, UnreadableImage, say_warnings
from deit_fast.errors import InputError
from deit_fast.runtime.files import open_atomically, remove_orphans, write_arrays, write_json
from deit_fast.runtime.locks import Lock, owned_folder
from deit_fast.runtime.pipeline_time import loading_processes
from deit_fast.runtime.progress import Progress
from deit_fast.tools.run_folder import read_object

log = logging.getLogger("deit_fast")

SHARD_SAMPLES = 4096  # about 1 GB of uint8 images
MAX_JPEG_SIDE = 65500  # pixels, libjpeg's limit


def pack(
    data: DataConfig,
    out: str,
    *,
    form: str = "uint8",
    short_side: int = 256,
    quality: int = 92,
    shard_samples: int = SHARD_SAMPLES,
) -> dict[str, Any]:
    """Write both splits of ``data`` as packed shards; the same call resumes after an interruption.

    Images whose shorter side is above ``short_side`` are reduced to it (Pillow's bicubic). An
    unreadable image keeps its index and its label; loaders treat it like an unreadable file.

    Args:
        out: folder; `data.source=packed data.root=OUT` reads it.
        form: "uint8": pixels, ready to be cropped; "jpeg": a fifth of the bytes, to be decoded.
        quality: of JPEG.

    Returns:
        `out`, `images`, `shards` written and `kept`, `bytes`, `seconds`, `unreadable` (paths).

    Raises:
        InputError: a wrong value; a folder that holds another pack, or a pack of other images,
            naming what differs; another process packs into the folder.
        OSError: the disk is full, or the machine cannot read an image; complete shards are kept.
        ChildProcessError: a worker process died.
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
        raise InputError(f"data.source={data.source} cannot be packed: use folder, tar or hf")
    with owned_folder(Path(out), ".lock-pack", "the pack") as lock:
        return _pack(data, out, form, short_side, quality, shard_samples, lock)


def _pack(
    data: DataConfig, out: str, form: str, short_side: int, quality: int, shard_samples: int,
    lock: Lock,
) -> dict[str, Any]:  # fmt: skip
    started = time.perf_counter()
    total: Counter[str] = Counter()
    unreadable: list[str] = []
    workers = loading_processes(data.workers)
    for split in ("train", "val"):
        source = open_source(data, split, image_size=1)
        manifest = FORMAT | {
            "form": form, "short_side": short_side, "quality": quality if form == "jpeg" else None,
            "pillow": PIL.__version__, "num_samples": source.num_samples,
            "shard_samples": shard_samples, "classes": source.classes,
            "source": source.fingerprint(), "packed_from": str(source.folder),
        }  # fmt: skip
        folder = Path(out) / split
        lock.require_held()
        _write_or_compare_manifest(folder, manifest)
        counts, lost = _pack_split(Packer(source, folder, manifest), workers, split)
        total.update(counts)
        unreadable += lost
    if unreadable:
        log.warning(
            "%d unreadable images were packed as such, the first is %s",
            len(unreadable), unreadable[0],
        )  # fmt: skip
    seconds = round(time.perf_counter() - started, 3)
    return {"out": out, **total, "seconds": seconds, "unreadable": unreadable}


def _write_or_compare_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, manifest)
        return
    existing, requested = read_object(path), json.loads(json.dumps(manifest))
    may_differ = ("pillow", "packed_from")
    differing = [k for k, v in requested.items() if k not in may_differ and existing.get(k) != v]
    if differing:
        key, shown = differing[0], ""
        if not isinstance(requested[key], (dict, list)):
            shown = f": {existing.get(key)!r}, not {requested[key]!r}"
        raise InputError(
            f"{folder} holds a pack of other {', '.join(differing)}{shown}; choose another folder"
        )


def _pack_split(packer: Packer, workers: int, split: str) -> tuple[dict[str, int], list[str]]:
    """Write the missing shards of a split. Returns counts and the paths of unreadable images."""
    remove_orphans(packer.folder)
    paths, lost, missing = packer.source.paths, [], []
    # Another Pillow may decode, reduce or encode the same image to other bytes.
    may_compare = read_object(packer.folder / "manifest.json").get("pillow") == PIL.__version__
    for number, samples in enumerate(packer.shards):
        try:
            index = read_index(packer.folder, number, len(samples), packer.manifest)
        except InputError:
            missing.append(number)
            continue
        if may_compare:
            packer.require_same_image(number, index)
        lost += [samples[row] for row in np.flatnonzero(index["sizes"][:, 0] == 0).tolist()]
    kept = len(packer.shards) - len(missing)
    images = sum(len(packer.shards[number]) for number in missing)
    log.info(
        "packing %s: %d shards to write, %d there, %d images", split, len(missing), kept, images
    )
    written = 0
    with Progress(f"pack {split}", images, unit="image") as progress:
        for number, (length, unreadable) in _write_shards(packer, missing, workers):
            written += length
            lost += unreadable
            progress.advance(len(packer.shards[number]))
    say_warnings()
    counts = {
        "images": packer.source.num_samples, "shards": len(missing), "kept": kept, "bytes": written
    }  # fmt: skip
    return counts, sorted(paths[index] for index in lost)


Written = tuple[int, list[int]]  # bytes of a shard, samples that could not be read


def _write_shards(
    packer: Packer, missing: list[int], workers: int
) -> Iterator[tuple[int, Written]]:
    """Write shards, in ``workers`` processes or in this one; yields each shard when it is done."""
    if workers == 0:
        for number in missing:
            yield number, packer.write(number)
        return
    context = multiprocessing.get_context("forkserver")
    processes = min(workers, max(len(missing), 1))
    with ProcessPoolExecutor(processes, context, _set_packer, (packer,)) as pool:
        futures = {pool.submit(_write, number): number for number in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that packs images died; the system kills one where memory runs out: see "
                "its log, and run the same command with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_packers: list[Packer] = []  # of a worker process: one, so that a task does not carry the source


def _set_packer(packer: Packer) -> None:
    _packers[:] = [packer]
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process with its parent; a pool's own processes wait for work for ever."""
    parent.join()
    os._exit(1)


def _write(number: int) -> Written:
    return _packers[0].write(number)


@dataclass(frozen=True)
class Packer:
    """Writes the shards of a split."""

    source: Source
    folder: Path
    manifest: dict[str, Any]

    @property
    def shards(self) -> list[range]:
        """The samples of each shard."""
        count, size = self.source.num_samples, self.manifest["shard_samples"]
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def write(self, number: int) -> Written:
        """Write a shard and its index."""
        samples = self.shards[number]
        path = self.folder / f"{shard_name(number)}.bin"
        offsets = np.zeros(len(samples) + 1, np.int64)
        sizes = np.zeros((len(samples), 2), np.int32)
        checksums = np.zeros(len(samples), np.uint32)
        unreadable = []
        with open_atomically(path) as file:
            for row, index in enumerate(samples):
                content = b""
                try:
                    sizes[row], content = self._packed(index)
                except UnreadableImage as error:
                    log.warning("%s", error)
                    unreadable.append(index)
                file.write(content)
                offsets[row + 1] = offsets[row] + len(content)
                checksums[row] = _C.crc32c(content)
        base, paths = self.manifest["packed_from"], self.source.paths
        names = b"".join(os.fsencode(os.path.relpath(paths[i], base)) + b"\0" for i in samples)
        labels = self.source.labels[samples.start : samples.stop].astype(np.int64)
        arrays: dict[str, np.ndarray] = {
            "offsets": offsets, "sizes": sizes, "crc32c": checksums, "labels": labels,
            "names": np.frombuffer(names, np.uint8),
        }  # fmt: skip
        write_arrays(path.with_suffix(".npz"), arrays)
        return int(offsets[-1]), unreadable

    def require_same_image(self, number: int, table: dict[str, np.ndarray]) -> None:
        """Compare a shard that is kept with the source, by its first readable image.

        Raises:
            InputError: the image has other pixels; its name and the size of its file may be equal.
        """
        samples = self.shards[number]
        for row in np.flatnonzero(table["sizes"][:, 0]).tolist():
            try:
                _, content = self._packed(samples[row])
            except UnreadableImage:
                continue
            if _C.crc32c(content) != table["crc32c"][row]:
                raise InputError(
                    f"{self.folder} holds a pack of other images: "
                    f"{self.source.paths[samples[row]]} is not the one in "
                    f"{shard_name(number)}.bin; choose another folder"
                )
            return

    def _packed(self, index: int) -> tuple[tuple[int, int], bytes]:
        """Width, height and bytes of an image as they are stored."""
        pixels = np.ascontiguousarray(self.source.load(index))
        pixels = self._reduced(pixels, self.source.paths[index])
        return (pixels.shape[1], pixels.shape[0]), self._encode(pixels)

    def _reduced(self, pixels: np.ndarray, path: str) -> np.ndarray:
        """The image at the size that is stored."""
        shorter, longer = sorted(pixels.shape[:2])
        side = min(shorter, self.manifest["short_side"])
        if self.manifest["form"] == "jpeg" and longer * side > MAX_JPEG_SIDE * shorter:
            side = MAX_JPEG_SIDE * shorter // longer
            if side == 0:
                raise InputError(
                    f"{path} has sides of {shorter} and {longer} pixels, but a JPEG file has at "
                    f"most {MAX_JPEG_SIDE}: pack with --form uint8"
                )
            log.warning(
                "%s has a side of %d pixels, a JPEG file at most %d: reduced to a shorter side of "
                "%d", path, longer, MAX_JPEG_SIDE, side,
            )  # fmt: skip
        return pixels if side == shorter else resize_shorter_side(pixels, side)

    def _encode(self, pixels: np.ndarray) -> bytes:
        if self.manifest["form"] == "uint8":
            return pixels.tobytes()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=self.manifest["quality"])
        return file.getvalue()
