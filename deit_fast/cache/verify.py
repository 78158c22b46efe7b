"""What a cache holds, and whether its bytes are still those that were written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from deit_fast import _C
from deit_fast.cache.errors import format_errors
from deit_fast.cache.format import (
    FILE_NAME,
    check_manifest,
    fields,
    read_manifest,
    require_equal,
    view_path,
    view_spec,
    views_on_disk,
)
from deit_fast.errors import CacheError


def info(path: str | Path) -> dict[str, Any]:
    """Codec, coverage and fingerprint from the manifest and the block tables; reads no data.

    Returns:
        `path`, `format`, `codec`, `record_bytes`, `block_records`, `num_samples`, `bytes` (of the
        view files), `complete_views` (ids), `views` (one dict a view: `view`, `file`, `blocks`,
        `complete`, `pending`, `broken`: counts; `error`: text where the file is damaged),
        `fingerprint`, `info`.

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
        "bytes": sum(view_path(folder, row["view"]).stat().st_size for row in views),
        "complete_views": [row["view"] for row in views if row.get("complete") == row["blocks"]],
        "views": views,
        "fingerprint": manifest["fingerprint"],
        "info": manifest.get("info", {}),
    }


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read every block of every view and compare its checksum.

    Args:
        path: folder of the cache.
        progress: called with (blocks done, blocks in all).

    Returns:
        `path`, `ok` (nothing is damaged; pending blocks are not damage), `blocks`, `complete`,
        `pending` (counts), `broken` (one dict each: `file`, `view`, `block`, `why`; block is none
        where the whole file is damaged), `views` (as ``info``, after reading).

    Raises:
        CacheError: no manifest, or a damaged one.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    ids = views_on_disk(folder)
    per_view = -(-manifest["num_samples"] // manifest["block_records"])
    views, broken = [], []
    for place, view_id in enumerate(ids):
        row, file = _open(folder, manifest, view_id)
        views.append(row)
        if file is None:
            broken.append(_damage(row, None, row["error"]))
            continue
        row.update(complete=0, pending=0, broken=0)
        for block in range(per_view):
            try:
                with format_errors():
                    state, why = file.check_block(block)
            except (CacheError, OSError) as error:
                state, why = _C.BlockState.broken, str(error)
            row[state.name] += 1
            if state == _C.BlockState.broken:
                broken.append(_damage(row, block, why))
            if progress is not None:
                progress(place * per_view + block + 1, len(ids) * per_view)
    return {
        "path": str(folder),
        "ok": not broken,
        "blocks": len(ids) * per_view,
        "complete": sum(row.get("complete", 0) for row in views),
        "pending": sum(row.get("pending", 0) for row in views),
        "broken": broken,
        "views": views,
    }


def planned(
    folder: Path, manifest: dict[str, Any], view_ids: Iterable[int]
) -> tuple[list[tuple[int, int]], int, int]:
    """What a writer of this manifest would still write there; by the block tables, reading no data.

    Returns:
        (view, block) of the blocks to write; the count of those that are there; bytes of the view
        files yet to be made.

    Raises:
        CacheMismatch: the folder holds a cache made under other settings.
        CacheError: a manifest or header there is damaged.
    """
    wanted = check_manifest(manifest, "manifest")
    if (folder / FILE_NAME).exists():
        found, given = fields(read_manifest(folder)), fields(wanted)
        require_equal(folder, found, given, names=found.keys() | given.keys())
    missing, kept, new_bytes = [], 0, 0
    for view_id in view_ids:
        spec = view_spec(wanted, view_id)
        states = [_C.BlockState.pending] * spec.blocks
        if view_path(folder, view_id).exists():
            with format_errors():
                states = _C.ViewFile(str(view_path(folder, view_id)), spec).table_states()
        else:
            new_bytes += spec.file_bytes
        blocks = [b for b, state in enumerate(states) if state != _C.BlockState.complete]
        missing += [(view_id, block) for block in blocks]
        kept += spec.blocks - len(blocks)
    return missing, kept, new_bytes


def _open(
    folder: Path, manifest: dict[str, Any], view_id: int
) -> tuple[dict[str, Any], _C.ViewFile | None]:
    name = view_path(folder, view_id)
    spec = view_spec(manifest, view_id)
    row: dict[str, Any] = {"view": view_id, "file": name.name, "blocks": spec.blocks}
    try:
        with format_errors():
            return row, _C.ViewFile(str(name), spec)
    except (CacheError, OSError) as error:
        return {**row, "error": str(error)}, None


def _damage(row: dict[str, Any], block: int | None, why: str) -> dict[str, Any]:
    return {"file": row["file"], "view": row["view"], "block": block, "why": why}
