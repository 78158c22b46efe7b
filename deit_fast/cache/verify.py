"""What a cache holds, and whether it is right: its bytes, its pixels, its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deit_fast import _C
from deit_fast.cache.codec_base import Codec
from deit_fast.cache.format import (
    FILE_NAME,
    VIEW_LIMIT,
    check_manifest,
    codec_of,
    format_errors,
    manifest_sha256,
    matching_manifest,
    read_manifest,
    unproved,
    view_files,
    view_path,
    view_specs,
    views_on_disk,
)
from deit_fast.cache.reader import LogitCache
from deit_fast.cache.record_order import record_order
from deit_fast.cache.remote import has_statistics
from deit_fast.cache.remote import read_manifest as read_object
from deit_fast.cache.sampled import ViewKeys, draw_errors
from deit_fast.cache.sparse_codecs import SampledCodec
from deit_fast.cache.view_copy import COPY_BYTES
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.files import parse_json, read_file, write_json
from deit_fast.storage.objects import Objects
from deit_fast.storage.urls import is_url

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.kernels.distillation_loss import TopK

PIXELS_SUFFIX = ".pixels.json"
PIXEL_SAMPLES = 64  # samples a view whose pixels are recorded
THRESHOLD = 1e-3  # nats, or a share of a record's length: other batch sizes, another device
_DIGEST_HEX = 32
_MAX_FILE_BYTES = 1 << 20


def open_for_run(path: str | Path, tau: float, copy_bytes: int = COPY_BYTES) -> LogitCache:
    """The cache that a run of this temperature reads.

    Args:
        copy_bytes: as of ``LogitCache.open``.

    Raises:
        CacheError: it is damaged, or records nothing for the temperature.
        StorageError: a URL cannot be read.
    """
    cache = LogitCache.open(path, copy_bytes)
    require_tau(cache.codec, tau, cache.where)
    return cache


def require_for_run(path: str | Path, tau: float) -> None:
    """As ``open_for_run``, from the manifest alone.

    Raises:
        CacheError, StorageError: as it.
    """
    where = str(path)
    manifest = read_object(Objects(where))[0] if is_url(where) else read_manifest(Path(path))
    require_tau(codec_of(manifest, where), tau, where)


def require_tau(codec: Codec, tau: float, where: str) -> None:
    """
    Raises:
        CacheError: the cache at ``where`` records nothing for the temperature.
    """
    try:
        codec.layout(tau)
    except CacheError as error:
        remedy = "set loss.tau to one of these, or precompute a cache with codec.temperatures"
        raise CacheError(f"cache {where}: {error}; {remedy}") from None


def info(path: str | Path) -> dict[str, Any]:
    """Codec, coverage and fingerprint from the manifest and the block tables; reads no data.

    Returns:
        `path`, `format`, `codec`, `record_bytes`, `block_records`, `num_samples`, `bytes` (of the
        view files), `complete_views` (ids), `views` (one dict a view: `view`, `file`, `blocks`,
        `complete`, `pending`, `broken`: counts; `error`: text where the file is damaged),
        `fingerprint`, `info`, `unproved` (text: what a cache of an older format cannot show).

    Raises:
        CacheError: no manifest, or a damaged one.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    views = []
    for view_id in views_on_disk(folder):
        row, file = _open(folder, manifest, view_id)
        if file is not None:
            states = file.table_states()
            for state in _C.BlockState.__members__.values():
                row[state.name] = states.count(state)
        views.append(row)
    return {
        "path": str(folder),
        **{name: value for name, value in manifest.items() if name not in ("fingerprint", "info")},
        "bytes": sum(_size(view_path(folder, row["view"])) for row in views),
        "complete_views": [row["view"] for row in views if row.get("complete") == row["blocks"]],
        "views": views,
        "fingerprint": manifest["fingerprint"],
        "info": manifest.get("info", {}),
        "unproved": unproved(manifest),
    }


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read every block of every view and compare its checksum.

    Args:
        path: folder of the cache.
        progress: called with (blocks done, blocks in all).

    Returns:
        `path`, `ok` (nothing is damaged or gone; pending blocks are not damage), `blocks`,
        `complete`, `pending` (counts), `broken` (one dict each: `file`, `view`, `block`, `why`;
        `block` is None where the whole file is damaged or gone, `view` where it is of none),
        `unproved` (text: what a cache of an older format cannot show).

    Raises:
        CacheError: no manifest, or a damaged one.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    ids = views_on_disk(folder)
    per_view = -(-manifest["num_samples"] // manifest["block_records"])
    counts: Counter[str] = Counter()
    broken = _faults_of_files(folder, manifest, ids)
    for index, view_id in enumerate(ids):
        row, file = _open(folder, manifest, view_id)
        where = {"file": row["file"], "view": view_id}
        if file is None:
            broken.append({**where, "block": None, "why": row["error"]})
            continue
        for block in range(per_view):
            try:
                with format_errors():
                    state, why = file.check_block(block)
            except (CacheError, OSError) as error:
                state, why = _C.BlockState.broken, str(error)
            counts[state.name] += 1
            if state == _C.BlockState.broken:
                broken.append({**where, "block": block, "why": why})
            if progress is not None:
                progress(index * per_view + block + 1, len(ids) * per_view)
    return {
        "path": str(folder),
        "ok": not broken,
        "blocks": len(ids) * per_view,
        "complete": counts["complete"],
        "pending": counts["pending"],
        "broken": broken,
        "unproved": unproved(manifest),
    }


def _faults_of_files(
    folder: Path, manifest: dict[str, Any], ids: list[int]
) -> list[dict[str, Any]]:
    """Rows of ``verify``: view files that are gone, names of no view, damaged pixel digests or
    statistics."""
    pixel_ids, strays = view_files(folder, PIXELS_SUFFIX)
    strays += view_files(folder, ".dlc")[1]
    why = f"no view has this name: ids lie in [0, {VIEW_LIMIT}), in at least five digits"
    found: list[tuple[str, int | None, str]] = [(name, None, why) for name in strays]
    if not ids:
        found.append(("view-*.dlc", None, "there is no view file"))
    if has_statistics(manifest):
        from deit_fast.features.statistics import FILE, read_statistics  # needs torch

        try:
            read_statistics(folder, manifest)
        except (CacheError, OSError) as error:
            found.append((FILE, None, str(error)))
    for view_id in pixel_ids:
        name = view_path(folder, view_id).name
        if view_id not in ids:
            found.append((name, view_id, "is gone; its pixel digests are there"))
            continue
        try:
            read_pixels(folder, manifest, view_id)
        except (CacheError, OSError) as error:
            found.append((pixels_path(folder, view_id).name, view_id, str(error)))
    return [{"file": name, "view": view, "block": None, "why": text} for name, view, text in found]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def planned(
    folder: Path, manifest: dict[str, Any], view_ids: Iterable[int]
) -> tuple[list[tuple[int, int]], int, int]:
    """What a writer of this manifest would still write; from the block tables, reading no data.

    Returns:
        (view, block) of the blocks to write; the count of complete blocks; bytes of the view files
        that do not exist yet.

    Raises:
        CacheMismatch: the folder holds a cache made under other settings.
        CacheError: a manifest or header there is damaged.
    """
    checked = check_manifest(manifest, "manifest")
    if (folder / FILE_NAME).exists():
        checked = matching_manifest(folder, checked)
    missing, kept, new_bytes = [], 0, 0
    specs = view_specs(checked)
    for view_id in view_ids:
        spec, path = specs(view_id=view_id), view_path(folder, view_id)
        blocks = list(range(spec.blocks))
        if path.exists():
            with format_errors():
                states = _C.ViewFile(str(path), spec).table_states()
            blocks = [block for block in blocks if states[block] != _C.BlockState.complete]
        else:
            new_bytes += spec.file_bytes
        missing += [(view_id, block) for block in blocks]
        kept += spec.blocks - len(blocks)
    return missing, kept, new_bytes


def _open(
    folder: Path, manifest: dict[str, Any], view_id: int
) -> tuple[dict[str, Any], _C.ViewFile | None]:
    name = view_path(folder, view_id)
    spec = view_specs(manifest)(view_id=view_id)
    row: dict[str, Any] = {"view": view_id, "file": name.name, "blocks": spec.blocks}
    try:
        with format_errors():
            return row, _C.ViewFile(str(name), spec)
    except (CacheError, OSError) as error:
        return {**row, "error": str(error)}, None


# ---------------------------------------------------------------------------------------------
# Pixels: digests of some views as the teacher saw them
# ---------------------------------------------------------------------------------------------


def pixels_path(folder: Path, view_id: int) -> Path:
    return view_path(folder, view_id, PIXELS_SUFFIX)


def sampled_ids(manifest: Mapping[str, Any], view_id: int) -> np.ndarray:
    """Samples whose pixels are recorded, int64 [at most 64], ascending: their records are evenly
    spaced in the block ``view_id`` mod the number of blocks."""
    start, stop = _sampled_block(manifest, view_id)
    chosen = min(PIXEL_SAMPLES, stop - start)
    samples = record_order(manifest).samples(view_id, start, stop)
    return np.sort(samples[np.arange(chosen) * (stop - start) // chosen])


def _sampled_block(manifest: Mapping[str, Any], view_id: int) -> tuple[int, int]:
    records, count = manifest["block_records"], manifest["num_samples"]
    start = view_id % -(-count // records) * records
    return start, min(start + records, count)


def _are_sampled(manifest: Mapping[str, Any], view_id: int, samples: Any) -> bool:
    """Whether they may be ``sampled_ids``. With an order only their number and range are compared:
    its tables would take 0.6 s for each group of views of 1.28 million samples."""
    if "order" not in manifest:
        return bool(samples == sampled_ids(manifest, view_id).tolist())
    start, stop = _sampled_block(manifest, view_id)
    return (
        isinstance(samples, list)
        and len(samples) == min(PIXEL_SAMPLES, stop - start)
        and all(type(i) is int and 0 <= i < manifest["num_samples"] for i in samples)
        and samples == sorted(set(samples))
    )


def write_pixels(
    folder: Path, manifest: Mapping[str, Any], view_id: int, digests: Mapping[int, str]
) -> None:
    """Write a view's digests, by sample id, as one small JSON file; whole or not at all.

    They are on the disk before the block of these samples is committed, and whoever writes that
    block writes them: they do not depend on process count or interruptions.
    """
    content = {
        "view": view_id,
        "manifest_sha256": manifest_sha256(manifest).hex(),
        "samples": sorted(digests),
        "digests": [digests[sample] for sample in sorted(digests)],
    }
    write_json(pixels_path(folder, view_id), content)


def read_pixels(folder: Path, manifest: Mapping[str, Any], view_id: int) -> dict[int, str]:
    """A view's digests by sample id.

    Raises:
        CacheError: they are missing, damaged or of another cache.
    """
    path = pixels_path(folder, view_id)
    remedy = "delete it and the view's .dlc file, and precompute again"
    try:
        content = read_file(path, _MAX_FILE_BYTES)
    except FileNotFoundError:
        raise CacheError(
            f"{path} is missing, so it is unknown whether view {view_id} can be made again: "
            f"delete its .dlc file and precompute it again"
        ) from None
    except InputError as error:
        raise CacheError(f"{error}; {remedy}") from None
    return parse_pixels(content, str(path), manifest, view_id, f"or {remedy}")


def parse_pixels(
    found: bytes, where: str, manifest: Mapping[str, Any], view_id: int, remedy: str
) -> dict[int, str]:
    """As ``read_pixels`` of a file with this content.

    Args:
        where: names it in messages.
        remedy: at the end of those of damage.
    """
    try:
        content = parse_json(found, where)
    except InputError as error:
        raise CacheError(f"{error}; {remedy}") from None
    samples: Any = content.get("samples")
    digests: Any = content.get("digests")
    right = (
        content.get("view") == view_id
        and _are_sampled(manifest, view_id, samples)
        and isinstance(digests, list)
        and len(digests) == len(samples)
        and all(isinstance(digest, str) and len(digest) == _DIGEST_HEX for digest in digests)
    )
    if not right:
        raise CacheError(f"{where}: damaged: these are not the pixel digests of view {view_id}")
    if content.get("manifest_sha256") != manifest_sha256(manifest).hex():
        raise CacheError(f"{where}: was written under another manifest (SHA-256 differs)")
    return dict(zip(samples, digests, strict=True))


def pick_pixels(
    folder: Path, manifest: Mapping[str, Any], view_ids: Iterable[int], count: int
) -> list[tuple[int, int, str]]:
    """About ``count`` of the recorded (view, sample, digest), spread over views and samples.

    Raises:
        CacheError: as ``read_pixels``.
    """
    views = list(view_ids)
    views = views[:: -(-len(views) // count)] if len(views) > count else views
    share = -(-count // max(1, len(views)))
    picked = []
    for index, view_id in enumerate(views):
        rows = list(read_pixels(folder, manifest, view_id).items())
        step = max(1, len(rows) // share)
        picked += [(view_id, *row) for row in rows[index % step :: step][:share]]
    return picked


# ---------------------------------------------------------------------------------------------
# Logits: stored ones against the teacher's
# ---------------------------------------------------------------------------------------------


def is_bf16(cache: LogitCache) -> bool:
    """Whether the teacher computed in bfloat16 when the cache was made."""
    return bool(cache.manifest["fingerprint"].get("teacher.dtype") == "bfloat16")


def compare_logits(
    stored: Tensor | TopK,
    logits: Tensor,
    *,
    codec: Codec,
    tau: float,
    keys: ViewKeys | None = None,
    threshold: float = THRESHOLD,
    wrote_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Error of each record and the largest allowed error, nats, float64 [n] each; on the host.

    Allowed are twice the codec's own rounding of the new logits, two units in the last place of the
    largest new logit (most of it in bfloat16), and ``threshold``.

    Args:
        stored: logits from the cache, at ``tau``.
        logits: computed anew [n, C], in the dtype of the teacher.
        tau: temperature.
        keys: as ``codec.encode`` takes them.
        wrote_bf16: whether the teacher computed in bfloat16 when the cache was made (``is_bf16``).
    """
    import torch

    from deit_fast.kernels.distillation_loss import TopK

    exact = torch.log_softmax(logits.double() / tau, 1)

    def errors(form: Tensor | TopK) -> Tensor:
        if not isinstance(codec, SampledCodec) or not isinstance(form, TopK):
            return record_errors(form, exact, tau)
        assert keys is not None  # `encode` refuses it
        found = draw_errors(form, codec.k, exact, keys.words(codec.draws))
        if codec.k == 0:
            return found
        head = TopK(form.ids[:, : codec.k], form.log_probs[:, : codec.k], form.log_tail)
        return torch.maximum(found, record_errors(head, exact, tau))

    rounding = errors(codec.decode(codec.encode(logits, keys), tau))
    coarser = torch.bfloat16 if wrote_bf16 else logits.dtype
    ulp = torch.finfo(coarser).eps * logits.double().abs().amax(1) / tau
    return errors(stored), 2 * rounding + 2 * ulp + threshold


def compare_features(
    stored: Tensor, exact: Tensor, again: Tensor, threshold: float = THRESHOLD
) -> tuple[Tensor, Tensor]:
    """Relative L2 error of each record and the largest allowed one, float64 [n] each; on the host.

    Allowed are twice the codec's own error of the new features, and ``threshold``.

    Args:
        stored: features from the cache [n, T, D].
        exact: computed anew.
        again: ``exact`` encoded and decoded.
    """
    import torch

    exact = exact.double().flatten(1)
    size = exact.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    rounding = (again.double().flatten(1) - exact).norm(dim=1) / size
    error = (stored.double().flatten(1) - exact).norm(dim=1) / size
    return error, 2 * rounding + threshold


def record_errors(logits: Tensor | TopK, exact: Tensor, tau: float) -> Tensor:
    """Largest difference [n] between what a record stores and the exact log-probabilities [n, C].

    For `topk` the log tail mass counts too. For `hard` it is the log-probability by which the
    stored class is below the best.
    """
    import torch

    from deit_fast.kernels.distillation_loss import TopK

    if isinstance(logits, TopK):
        ids = logits.ids.long()
        inside = (logits.log_probs.double() - exact.gather(1, ids)).abs().amax(1)
        if ids.shape[1] == exact.shape[1]:
            return inside  # nothing is outside
        tail = exact.scatter(1, ids, -torch.inf).logsumexp(1)
        return torch.maximum(inside, (logits.log_tail.double() - tail).abs())
    if logits.dim() == 1:
        return exact.amax(1) - exact.gather(1, logits[:, None])[:, 0]
    return (torch.log_softmax(logits.double() / tau, 1) - exact).abs().amax(1)
