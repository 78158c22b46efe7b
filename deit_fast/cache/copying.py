"""Caches between disks and object storage: copies of whole caches, and what lies at a URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deit_fast import _C
from deit_fast.cache.format import (
    FILE_NAME,
    codec_of,
    format_errors,
    nested_caches,
    publish_manifest,
    read_manifest,
    view_files,
    view_path,
)
from deit_fast.cache.remote import (
    COPY_AGAIN,
    STATISTICS,
    Listing,
    RemoteCache,
    block_parts,
    check_statistics,
    damage_errors,
    damage_text,
    has_statistics,
    pixel_parts,
    pull_small,
    require_listed,
)
from deit_fast.cache.remote import publish_manifest as publish_object
from deit_fast.cache.remote import read_manifest as read_object
from deit_fast.cache.verify import info, parse_pixels
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.files import open_regular, read_file, temporary_path, write_atomically
from deit_fast.storage.failures import ObjectDamaged
from deit_fast.storage.objects import Objects
from deit_fast.storage.urls import is_url, join

_TOGETHER_BYTES = 64 << 20  # of blocks in memory at once

Advance = Callable[[int], None]
"""Called with the number of blocks that are done since the last call."""


def caches_at(url: str) -> list[str]:
    """URLs of the cache at a URL, and of those one level below it.

    Raises:
        CacheError: there is none.
        InputError: the URL is of a web server.
    """
    objects = Objects(url)
    require_listed(objects)
    found = [
        name.removesuffix(FILE_NAME).rstrip("/")
        for name in objects.list()
        if name == FILE_NAME or (name.count("/") == 1 and name.endswith(f"/{FILE_NAME}"))
    ]
    if not found:
        raise CacheError(f"{objects} holds no cache: it has no {FILE_NAME}")
    return [join(objects.url, name) if name else objects.url for name in sorted(found)]


def download(url: str, folder: Path, advance: Advance) -> int:
    """Copy the complete blocks of a cache at a URL into a folder; returns their number.

    Blocks that are in the folder stay, so the same call continues an interrupted one.

    Raises:
        CacheMismatch: the folder holds another cache.
        CacheError, StorageError, OSError: a block is damaged, or cannot be read or written.
    """
    objects = Objects(url)
    manifest, content = read_object(objects)
    if not (folder / FILE_NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE_NAME, content)
    publish_manifest(folder, manifest)
    listing, remote = Listing.of(objects), RemoteCache(objects, manifest)
    pull_small(objects, listing, manifest, folder)
    count = 0
    for view_id in sorted(listing.blocks.keys() | listing.files.keys()):
        name = view_path(folder, view_id)
        with format_errors():
            writer = _C.ViewWriter(str(name), str(temporary_path(name)), remote.spec(view_id))
        blocks = []
        for block in remote.published_blocks(listing, view_id):
            with format_errors():
                is_here = writer.check_block(block)[0] == _C.BlockState.complete
            if is_here:
                advance(1)
            else:
                blocks.append(block)
            count += 1
        parts = block_parts(remote, listing, view_id, blocks)
        together = max(1, _TOGETHER_BYTES // remote.block_bytes(0))
        for first in range(0, len(parts), together):
            with damage_errors():
                contents = objects.read_parts(parts[first : first + together])
            for block, content in zip(blocks[first:], contents, strict=False):
                records = np.frombuffer(content, np.uint8, remote.block_bytes(block))
                with format_errors():
                    writer.commit(block, records.ctypes.data, records.nbytes)
                advance(1)
        for block in remote.cut_blocks(listing, view_id):
            raise remote.damaged(view_id, block)
    return count


def upload(folder: Path, url: str, advance: Advance) -> int:
    """Publish the complete blocks of a cache in a folder at a URL; returns their number.

    Blocks that are there stay, so the same call continues an interrupted one.

    Raises:
        CacheMismatch: the URL has another cache.
        CacheError, StorageError, OSError: a block is damaged, or cannot be read or written.
    """
    objects, manifest = Objects(url), read_manifest(folder)
    objects.require_writable()
    publish_object(objects, folder, manifest)
    remote = RemoteCache(objects, manifest)
    if (folder / STATISTICS).exists():
        content = read_file(folder / STATISTICS)
        objects.create(STATISTICS, content)
    for view_id in view_files(folder, ".pixels.json")[0]:
        path = view_path(folder, view_id, ".pixels.json")
        objects.create(path.name, read_file(path), lambda there: True)
    listing = Listing.of(objects)
    count = 0
    for view_id in view_files(folder, ".dlc")[0]:
        name = view_path(folder, view_id)
        with format_errors():
            spec = remote.spec(view_id)
            file = _C.ViewFile(str(name), spec)
        with open_regular(name) as data:
            for block, state in enumerate(file.table_states()):
                if state == _C.BlockState.pending:
                    continue
                if not remote.is_published(listing, view_id, block):
                    with format_errors():
                        found, why = file.check_block(block)
                    if found != _C.BlockState.complete:
                        raise CacheError(f"{why}; repair the cache first, with `precompute`")
                    data.seek(spec.block_offset(block))
                    remote.publish_block(view_id, block, data.read(remote.block_bytes(block)))
                count += 1
                advance(1)
    return count


def _folders(source: str) -> list[Path]:
    """The cache in a folder, and those one level below it."""
    own = [Path(source)] if Path(source, FILE_NAME).exists() else []
    folders = own + nested_caches(Path(source))
    if not folders:
        read_manifest(Path(source))  # says what is there instead
    return folders


def count_blocks(source: str) -> int:
    """Number of blocks that ``copy`` will go through."""
    if is_url(source):
        return sum(describe(url)["blocks"] for url in caches_at(source))
    return sum(view.get("complete", 0) for path in _folders(source) for view in info(path)["views"])


def copy(source: str, target: str, advance: Advance) -> dict[str, int]:
    """Copy a cache, and those one level below it, from a folder to a URL or back.

    Returns:
        The number of blocks by cache.

    Raises:
        InputError: both are folders, or both URLs.
        others: as ``download`` and ``upload``.
    """
    if is_url(source) == is_url(target):
        kind = "URLs" if is_url(source) else "folders"
        raise InputError(
            f"{source} and {target} are both {kind}: name a folder and a URL; between folders "
            f"copy with `cp -r`, between URLs with the tools of the service"
        )
    if is_url(source):
        base = Objects(source).url
        pairs = [(url, Path(target, url.removeprefix(base).lstrip("/"))) for url in caches_at(base)]
        return {url: download(url, folder, advance) for url, folder in pairs}
    base = Objects(target).url
    counts = {}
    for folder in _folders(source):
        below = str(folder.relative_to(source))
        counts[str(folder)] = upload(folder, base if below == "." else join(base, below), advance)
    return counts


def describe(url: str) -> dict[str, Any]:
    """What is published at a URL; reads no block.

    Returns:
        `path`, `manifest`, `codec` (its name), `record_bytes`, `views` and `complete_views`
        (counts), `blocks` and `expected` (counts), `bytes`.
    """
    objects = Objects(url)
    manifest, _ = read_object(objects)
    listing, remote = Listing.of(objects), RemoteCache(objects, manifest)
    views = listing.blocks.keys() | listing.files.keys()
    return {
        "path": str(objects),
        "manifest": manifest,
        "codec": codec_of(manifest).name,
        "record_bytes": manifest["record_bytes"],
        "views": len(views),
        "complete_views": len(remote.complete_views(listing)),
        "blocks": sum(len(remote.published_blocks(listing, view)) for view in views),
        "expected": len(views) * remote.num_blocks,
        "bytes": sum(stamp.size for stamp in listing.files.values())
        + sum(sum(blocks.values()) for blocks in listing.blocks.values()),
    }


def verify(url: str, advance: Advance) -> dict[str, Any]:
    """Read every published block at a URL and compare its checksum; check statistics and pixel
    digests as in a folder. Nothing is stored.

    Returns:
        As ``cache.verify``.
    """
    objects = Objects(url)
    manifest, _ = read_object(objects)
    listing, remote = Listing.of(objects), RemoteCache(objects, manifest)
    broken = _faults_of_small(objects, listing, manifest)
    complete = pending = 0
    views = sorted(listing.blocks.keys() | listing.files.keys())
    for view_id in views:
        blocks = remote.published_blocks(listing, view_id)
        cut = remote.cut_blocks(listing, view_id)
        for block in cut:
            why = str(remote.damaged(view_id, block))
            broken.append({"file": f"view {view_id}", "view": view_id, "block": block, "why": why})
        pending += remote.num_blocks - len(blocks) - len(cut)
        parts = block_parts(remote, listing, view_id, blocks)
        together = max(1, _TOGETHER_BYTES // remote.block_bytes(0))
        for first in range(0, len(parts), together):
            contents = objects.try_parts(parts[first : first + together])
            for block, content in zip(blocks[first:], contents, strict=False):
                advance(1)
                if isinstance(content, bytes):
                    complete += 1
                    continue
                if not isinstance(content, ObjectDamaged):
                    raise content
                row = {"file": f"view {view_id}", "view": view_id, "block": block}
                broken.append(row | {"why": damage_text(content)})
    return {
        "path": str(objects),
        "ok": not broken and bool(views),
        "blocks": len(views) * remote.num_blocks,
        "complete": complete,
        "pending": pending,
        "broken": broken,
        "unproved": "",
    }


def _faults_of_small(
    objects: Objects, listing: Listing, manifest: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of ``verify``: statistics that are damaged or missing, damaged pixel digests."""
    found: list[tuple[str, int | None, str]] = []
    if has_statistics(manifest):
        try:
            check_statistics(objects, manifest)
        except CacheError as error:
            found.append((STATISTICS, None, str(error)))
    parts = pixel_parts(listing)
    contents = objects.try_parts([*parts.values()])
    for (view_id, part), content in zip(parts.items(), contents, strict=True):
        if isinstance(content, ObjectDamaged):
            found.append((part.name, view_id, damage_text(content)))
            continue
        if not isinstance(content, bytes):
            raise content
        where = objects.url_of(part.name)
        try:
            parse_pixels(content, where, manifest, view_id, COPY_AGAIN)
        except CacheError as error:
            found.append((part.name, view_id, str(error)))
    return [{"file": name, "view": view, "block": None, "why": text} for name, view, text in found]
