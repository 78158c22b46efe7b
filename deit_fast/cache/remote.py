"""A cache in object storage: each block is an object of its own, published whole or not at all.

    URL/manifest.json, statistics.safetensors, view-00000.pixels.json   as in a folder
    URL/view-00000/0000012.block    the records of a block, and their checksum as in a view's table
    URL/view-00000.dlc              or a whole view file, copied there from a folder

The checksum starts with that of manifest, view and block, so an object is right under its own name
alone. Objects are created and never replaced: writers of one block do not need each other.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from deit_fast import _C
from deit_fast.cache.format import (
    FILE_NAME,
    VIEW_LIMIT,
    check_manifest,
    require_equal,
    view_path,
    view_specs,
)
from deit_fast.errors import CacheError, InputError
from deit_fast.runtime.files import parse_json, read_file, write_atomically
from deit_fast.storage.clients import Stamp
from deit_fast.storage.failures import ObjectDamaged, ObjectExists, ObjectMissing
from deit_fast.storage.objects import Objects, Part

log = logging.getLogger("deit_fast")

STATISTICS = "statistics.safetensors"
_CRC = struct.Struct("<I")
_ASKED_SINGLY = 8  # blocks of a view
_PAGE, _ENTRY_BYTES = 4096, 8  # of a view file: its header, and an entry of the table after it
_COMPLETE = int.from_bytes(b"DONE", "little")  # the state of a block in an entry, after its CRC32C
_DAMAGED = (
    "is damaged: delete it; then `precompute` makes a block anew, and a view file has to be copied "
    "there again"
)
COPY_AGAIN = (
    "delete it; then `cache copy` puts it there again from a folder that holds this cache, or "
    "write the cache again"
)
_BLOCK = re.compile(r"view-(\d{5,})/(\d{7,})\.block")
_FILE = re.compile(r"view-(\d{5,})\.dlc")
_PIXELS = re.compile(r"view-(\d{5,})\.pixels\.json")


def block_name(view_id: int, block: int) -> str:
    return f"view-{view_id:05d}/{block:07d}.block"


def require_listed(objects: Objects) -> None:
    """
    Raises:
        InputError: the URL is of a web server: a cache is read by the list of its objects.
    """
    if objects.url.startswith(("http://", "https://")):
        raise InputError(
            f"cache {objects} cannot be listed: a web server has no list of its files; copy it to "
            f"a folder or a bucket"
        )


def read_manifest(objects: Objects) -> tuple[dict[str, Any], bytes]:
    """The manifest of the cache at a URL, and its bytes.

    Raises:
        CacheError: there is none, or it is damaged.
        InputError: the URL is of a web server.
        StorageError: it cannot be read.
    """
    require_listed(objects)
    try:
        content = objects.read_whole(FILE_NAME)
    except ObjectMissing:
        raise CacheError(
            f"{objects} is no cache: it has no {FILE_NAME}; check the URL, or make it by "
            f"`precompute`"
        ) from None
    return _parse_manifest(objects, content), content


def _parse_manifest(objects: Objects, content: bytes) -> dict[str, Any]:
    where = objects.url_of(FILE_NAME)
    try:
        return check_manifest(parse_json(content, where), where)
    except InputError as error:
        raise CacheError(str(error)) from None


@dataclass
class Listing:
    """What is published of a cache.

    Attributes:
        blocks: by view, the size in bytes of each block's object.
        files: whole view files, by view.
        pixels: ids of the views whose pixel digests are there.
        has_statistics: whether statistics of features are there.
    """

    blocks: dict[int, dict[int, int]] = field(default_factory=dict)
    files: dict[int, Stamp] = field(default_factory=dict)
    pixels: dict[int, Stamp] = field(default_factory=dict)
    has_statistics: bool = False

    @classmethod
    def of(cls, objects: Objects, prefix: str = "") -> Listing:
        """What is published under names that begin with ``prefix``."""
        found = cls()
        for name, stamp in objects.list(prefix).items():
            found._take(name, stamp)
        return found

    def add(self, objects: Objects, name: str) -> None:
        """Look one object up."""
        with suppress(ObjectMissing):
            self._take(name, objects.stat(name))

    def _take(self, name: str, stamp: Stamp) -> None:
        if match := _BLOCK.fullmatch(name):
            self.blocks.setdefault(int(match[1]), {})[int(match[2])] = stamp.size
        elif match := _FILE.fullmatch(name):
            self.files[int(match[1])] = stamp
        elif match := _PIXELS.fullmatch(name):
            self.pixels[int(match[1])] = stamp
        self.has_statistics |= name == STATISTICS


class RemoteCache:
    """The objects of one cache.

    Args:
        objects: below its URL.
        manifest: of the cache.
    """

    def __init__(self, objects: Objects, manifest: dict[str, Any]) -> None:
        self.objects, self.manifest = objects, manifest
        self._spec_of = cache(view_specs(manifest))  # by `view_id`
        self.num_blocks: int = self.spec(0).blocks
        self._tables: dict[int, np.ndarray] = {}  # by view, of whole view files

    def spec(self, view_id: int) -> _C.ViewSpec:
        """The layout of a view's file."""
        return self._spec_of(view_id=view_id)

    def block_bytes(self, block: int) -> int:
        """Of the records of a block."""
        return self.spec(0).block_bytes(block)

    def part(self, view_id: int, block: int) -> Part:
        """What to read for a block that is an object; its last 4 bytes are the checksum."""
        check = partial(_is_block, self.spec(view_id).place_crc(block))
        name, size = block_name(view_id, block), self.block_bytes(block) + _CRC.size
        return Part(name, 0, size, None, check)

    def table(self, view_id: int, stamp: Stamp) -> np.ndarray:
        """CRC32C and state of each block of a whole view file, uint32 [blocks, 2]; read once.

        Raises:
            CacheError: the file is of another cache, or damaged.
        """
        if view_id not in self._tables:
            name, spec = view_path(Path(), view_id).name, self.spec(view_id)
            if stamp.size != spec.file_bytes:
                raise CacheError(
                    f"{self.objects.url_of(name)} has {stamp.size} bytes, expected "
                    f"{spec.file_bytes}: delete it, or copy it there again"
                )
            ranges = [(0, _PAGE), (_PAGE, _PAGE + spec.blocks * _ENTRY_BYTES)]
            header, table = self.objects.read_many(name, ranges, stamp=stamp)
            if header != spec.header:
                raise CacheError(
                    f"{self.objects.url_of(name)} is damaged or of another cache (its header): "
                    f"delete it, or copy it there again"
                )
            self._tables[view_id] = np.frombuffer(table, "<u4").reshape(-1, 2)
        return self._tables[view_id]

    def object_of(self, view_id: int, block: int, records: bytes | memoryview) -> bytes:
        """The object that ``part`` reads."""
        crc = _C.crc32c(records, self.spec(view_id).place_crc(block))
        return bytes(records) + _CRC.pack(crc)

    def is_in_file(self, listing: Listing, view_id: int, block: int) -> bool:
        """Whether a block is complete in a whole view file."""
        stamp = listing.files.get(view_id)
        return stamp is not None and self.table(view_id, stamp)[block, 1] == _COMPLETE

    def is_published(self, listing: Listing, view_id: int, block: int) -> bool:
        """Whether a block is there, whole by its size."""
        size = listing.blocks.get(view_id, {}).get(block)
        is_object = size == self.block_bytes(block) + _CRC.size
        return is_object or self.is_in_file(listing, view_id, block)

    def published_blocks(self, listing: Listing, view_id: int) -> list[int]:
        """The blocks of a view that are there, whole by their sizes."""
        return [b for b in range(self.num_blocks) if self.is_published(listing, view_id, b)]

    def cut_blocks(self, listing: Listing, view_id: int) -> list[int]:
        """The blocks of a view whose objects have a wrong length."""
        there = listing.blocks.get(view_id, {})
        return [block for block in there if not self.is_published(listing, view_id, block)]

    def damaged(self, view_id: int, block: int) -> CacheError:
        """A block that has to be made anew."""
        name = block_name(view_id, block)
        return CacheError(f"{self.objects.url_of(name)} {_DAMAGED}")

    def complete_views(self, listing: Listing) -> list[int]:
        """Ids of the views whose every block is there."""
        whole = [
            view_id
            for view_id in listing.blocks.keys() | listing.files.keys()
            if view_id < VIEW_LIMIT
            and len(self.published_blocks(listing, view_id)) == self.num_blocks
        ]
        return sorted(whole)

    def publish_block(self, view_id: int, block: int, records: bytes | memoryview) -> bool:
        """Publish a block, unless it is there. The first one stays, also where this device computes
        other last bits.

        Returns:
            Whether what is there has these bytes.

        Raises:
            CacheError: a damaged object has its name.
            StorageError: it cannot be published.
        """
        content, part = self.object_of(view_id, block, records), self.part(view_id, block)
        found = [content]

        def is_valid(there: bytes) -> bool:
            found[0] = there
            assert part.check is not None
            return len(there) == part.stop and part.check(there)

        try:
            self.objects.create(part.name, content, is_valid)
        except ObjectExists:
            raise self.damaged(view_id, block) from None
        return found[0] == content


def block_parts(
    remote: RemoteCache, listing: Listing, view_id: int, blocks: Sequence[int]
) -> list[Part]:
    """What to read for blocks of a view; records first, and a block's object has more after them.

    Raises:
        CacheError: a block is not published, or cut off; a whole view file is of another cache.
    """
    name, spec = view_path(Path(), view_id).name, remote.spec(view_id)
    parts = []
    for block in blocks:
        if not remote.is_published(listing, view_id, block):
            if block in listing.blocks.get(view_id, {}):
                raise remote.damaged(view_id, block)
            raise CacheError(
                f"cache {remote.objects}: view {view_id} block {block} is not published yet"
            )
        if not remote.is_in_file(listing, view_id, block):
            parts.append(remote.part(view_id, block))
            continue
        stamp, start = listing.files[view_id], spec.block_offset(block)
        crc = int(remote.table(view_id, stamp)[block, 0])
        check = partial(_has_crc, crc, spec.place_crc(block))
        parts.append(Part(name, start, start + spec.block_bytes(block), stamp, check))
    return parts


@contextmanager
def damage_errors() -> Iterator[None]:
    """A damaged object is named with the remedy.

    Raises:
        CacheError: in place of ObjectDamaged.
    """
    try:
        yield
    except ObjectDamaged as error:
        raise CacheError(damage_text(error)) from None


def damage_text(error: ObjectDamaged) -> str:
    """Names the object and the remedy."""
    is_small = str(error.filename).endswith(".json")
    remedy = f"is damaged: {COPY_AGAIN}" if is_small else _DAMAGED
    return f"{error.filename} {remedy} ({error.strerror})"


def _has_crc(expected: int, place: int, content: bytes) -> bool:
    return _C.crc32c(content, place) == expected


def _is_block(place: int, content: bytes) -> bool:
    records = memoryview(content)[: -_CRC.size]
    return _CRC.unpack(content[-_CRC.size :])[0] == _C.crc32c(records, place)


def pull(objects: Objects, folder: Path) -> None:
    """Copy manifest and statistics of a cache into a folder, as far as they are there.

    Raises:
        CacheError: one of them is damaged; it is not stored.
    """
    try:
        content = objects.read_whole(FILE_NAME)
    except ObjectMissing:
        return  # statistics without a manifest are of a job that ended before it had one
    manifest = _parse_manifest(objects, content)
    statistics = None
    if has_statistics(manifest):
        with suppress(ObjectMissing):
            statistics = _read_statistics(objects, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE_NAME, content)
    if statistics is not None:
        write_atomically(folder / STATISTICS, statistics)


def pull_small(objects: Objects, listing: Listing, manifest: dict[str, Any], folder: Path) -> None:
    """Copy what a cache has beside its views, pixel digests and statistics, into a folder that may
    have some of it; what is damaged there is copied again.

    Raises:
        CacheError: an object is damaged; it is not stored.
    """
    parts = [part for part in pixel_parts(listing).values() if not _is_here(folder / part.name)]
    with damage_errors():
        contents = objects.read_parts(parts)
    for part, content in zip(parts, contents, strict=True):
        write_atomically(folder / part.name, content)
    if not has_statistics(manifest) or not listing.has_statistics:
        return
    from deit_fast.features.statistics import read_statistics  # needs torch

    try:
        read_statistics(folder, manifest)
    except CacheError:
        if (folder / STATISTICS).exists():
            log.warning("%s is damaged; it is fetched again", folder / STATISTICS)
        write_atomically(folder / STATISTICS, _read_statistics(objects, manifest))


def pixel_parts(listing: Listing) -> dict[int, Part]:
    """What to read for pixel digests, by view."""
    name = partial(view_path, Path(), suffix=".pixels.json")
    return {
        view: Part(name(view).name, 0, stamp.size, stamp, _is_sealed)
        for view, stamp in sorted(listing.pixels.items())
    }


def has_statistics(manifest: dict[str, Any]) -> bool:
    """Whether a cache is one of features, which has statistics beside them."""
    return "statistics.sha256" in manifest["fingerprint"]


def check_statistics(objects: Objects, manifest: dict[str, Any]) -> None:
    """
    Raises:
        CacheError: the statistics at a URL are missing, damaged or of another cache.
    """
    try:
        _read_statistics(objects, manifest)
    except ObjectMissing:
        where = objects.url_of(STATISTICS)
        raise CacheError(
            f"{where} is missing: `cache copy` puts it there again from a folder that holds this "
            f"cache, or write the cache again"
        ) from None


def _read_statistics(objects: Objects, manifest: dict[str, Any]) -> bytes:
    """The statistics at a URL, checked as those in a folder.

    Raises:
        ObjectMissing, CacheError: they are damaged, or of another cache.
    """
    from deit_fast.features.statistics import check_statistics as check  # needs torch

    content = objects.read_whole(STATISTICS)
    check(content, objects.url_of(STATISTICS), manifest, COPY_AGAIN)
    return content


def _is_here(path: Path) -> bool:
    """Whether sealed JSON is in a file, undamaged."""
    try:
        return _is_sealed(read_file(path))
    except (FileNotFoundError, InputError):
        return False


def _is_sealed(content: bytes) -> bool:
    try:
        parse_json(content, "")
    except InputError:
        return False
    return True


def publish_small(objects: Objects, folder: Path, name: str) -> bool:
    """Publish a small file of a folder, or take what is there in its place.

    Returns:
        Whether the object has the file's bytes. Where not, the file has become the object's.
    """
    content = read_file(folder / name)
    there = [content]

    def take(found: bytes) -> bool:
        there[0] = found
        return True

    objects.create(name, content, take)
    if there[0] == content:
        return True
    write_atomically(folder / name, there[0])
    return False


class Publisher:
    """Publishes what writers commit in a folder; see ``LogitCacheWriter``.

    Args:
        remote: the cache that takes it.
        folder: of the writers.
    """

    def __init__(self, remote: RemoteCache, folder: Path) -> None:
        self._remote, self._folder = remote, folder
        self._there: set[tuple[int, int]] = set()
        self._with_pixels: set[int] = set()

    def look_up(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Ask which of these (view, block) are published.

        A few blocks of a view are asked for one by one, so that a unit costs the same in a view of
        any size; of more, all of the view are listed.
        """
        asked: dict[int, list[int]] = {}
        for view_id, block in blocks:
            if (view_id, block) not in self._there:
                asked.setdefault(view_id, []).append(block)
        remote = self._remote
        for view_id, requested in asked.items():
            listing = Listing()
            if len(requested) > _ASKED_SINGLY:
                listing = Listing.of(remote.objects, f"view-{view_id:05d}")
            else:
                listing.add(remote.objects, view_path(Path(), view_id).name)
                for block in requested:
                    listing.add(remote.objects, block_name(view_id, block))
            self._there |= {
                (view_id, block)
                for block in requested
                if remote.is_published(listing, view_id, block)
            }

    def is_there(self, view_id: int, block: int) -> bool:
        """Whether ``look_up`` has found the block."""
        return (view_id, block) in self._there

    def publish(self, view_id: int, block: int, records: np.ndarray) -> bool:
        """Publish the view's pixel digests, where this process has them, then the block; as
        ``RemoteCache.publish_block``."""
        pixels = view_path(self._folder, view_id, ".pixels.json")
        if view_id not in self._with_pixels and pixels.exists():
            publish_small(self._remote.objects, self._folder, pixels.name)
            self._with_pixels.add(view_id)
        is_same = self._remote.publish_block(view_id, block, records.tobytes())
        self._there.add((view_id, block))
        return is_same


def publish_manifest(objects: Objects, folder: Path, manifest: dict[str, Any]) -> None:
    """Publish the manifest that lies in a folder, or compare it with the one that is there.

    Raises:
        CacheMismatch: the URL has a cache made under other settings.
        StorageError: among others, the service replaces objects that are to be created.
    """
    if FILE_NAME not in objects.list(FILE_NAME):
        objects.create(FILE_NAME, read_file(folder / FILE_NAME), lambda there: True)
    there, content = read_manifest(objects)
    require_equal(str(objects), there, {**manifest, "format": there["format"]}, only=False)
    objects.require_creation(FILE_NAME, content)


def blocks_in(positions: np.ndarray, views: np.ndarray, per_block: int) -> dict[int, Sequence[int]]:
    """The blocks of records, by view."""
    found: dict[int, Sequence[int]] = {}
    views = np.broadcast_to(views, positions.shape)
    for view_id in np.unique(views).tolist():
        found[view_id] = np.unique(positions[views == view_id] // per_block).tolist()
    return found
