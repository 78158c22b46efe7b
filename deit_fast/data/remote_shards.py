"""Samples of shards in object storage, with a copy of what was fetched on the local disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from deit_fast.data.sample_copy import SampleCopy
from deit_fast.data.sources import UnreadableImage
from deit_fast.errors import InputError
from deit_fast.runtime.files import crc32c
from deit_fast.storage.clients import Stamp
from deit_fast.storage.failures import ObjectDamaged, StorageError
from deit_fast.storage.objects import Objects, Part, digest_stamps


@dataclass(frozen=True)
class Extents:
    """Where each sample's bytes are.

    Attributes:
        shard: integer [n], index of its shard.
        offset, size: int64 [n], bytes.
        crc32c: uint32 [n], of its bytes.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32c: np.ndarray


class RemoteShards:
    """Reads samples of shards that are objects. Every sample has the checksum of the index.

    Args:
        objects: the folder of the shards.
        stamps: of the shards by name, in the order of their indices.
        extents: of the samples.
        copy: where samples are kept; none: nowhere.
    """

    def __init__(
        self, objects: Objects, stamps: dict[str, Stamp], extents: Extents, copy: SampleCopy | None
    ) -> None:
        self._objects, self._names, self._stamps = objects, [*stamps], [*stamps.values()]
        self._extents, self._copy = extents, copy
        sizes = np.array([stamp.size for stamp in self._stamps], np.int64)
        self._base = np.cumsum(sizes) - sizes
        self._fetched: dict[int, bytes] = {}  # by the last call of `fetch`, until they are read

    def read(self, sample: int, path: str) -> bytes:
        """A sample's bytes.

        Args:
            path: of the sample, for messages.

        Raises:
            UnreadableImage: the shard is the one that was indexed, and its bytes are not.
            InputError: the bytes are not those that were indexed.
            StorageError: the shard was replaced, or cannot be read.
        """
        content = self._fetched.pop(sample, None)
        if content is None:
            content = self._copied(sample)
        if content is not None:
            return content
        part = self._part(sample)
        try:
            content = self._objects.read(*part[:3], stamp=part.stamp, check=part.check)
        except ObjectDamaged:
            # A web server's ETag is a time and a size: it does not vouch for the bytes.
            if part.stamp is not None and part.stamp.etag and not self._objects.url[:4] == "http":
                raise UnreadableImage(path, "its checksum is wrong at every try") from None
            raise InputError(
                f"{path}: its bytes are not those that were indexed: {part.name} was replaced or "
                f"is damaged; put back what it was, or give the new shards another name"
            ) from None
        self._keep(sample, content)
        return content

    def fetch(self, samples: Iterable[int]) -> None:
        """Request all these samples at once, so that each `read` that follows need not wait.

        One that cannot be fetched is left to its own `read`, which says why.
        """
        self._fetched.clear()
        missing: list[int] = []
        for sample in samples:
            copied = self._copied(sample)
            if copied is None:
                missing.append(sample)
            else:
                self._fetched[sample] = copied
        contents = self._objects.try_parts([self._part(sample) for sample in missing])
        for sample, content in zip(missing, contents, strict=True):
            if not isinstance(content, StorageError):
                self._fetched[sample] = content
                self._keep(sample, content)

    def _part(self, sample: int) -> Part:
        extents = self._extents
        number, start = int(extents.shard[sample]), int(extents.offset[sample])
        stop, crc = start + int(extents.size[sample]), int(extents.crc32c[sample])
        check = partial(_has_crc, crc)
        return Part(self._names[number], start, stop, self._stamps[number], check)

    def _position(self, sample: int) -> int:
        return int(self._base[self._extents.shard[sample]] + self._extents.offset[sample])

    def _copied(self, sample: int) -> bytes | None:
        if self._copy is None:
            return None
        length = int(self._extents.size[sample])
        content = self._copy.read(sample, self._position(sample), length)
        right = content is not None and crc32c(content) == self._extents.crc32c[sample]
        return content if right else None

    def _keep(self, sample: int, content: bytes) -> None:
        if self._copy is not None:
            self._copy.add(sample, self._position(sample), content)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetched": {}}


def _has_crc(crc: int, content: bytes) -> bool:
    return crc32c(content) == crc


def open_copy(root: str, split: str, stamps: dict[str, Stamp], limit: int) -> SampleCopy | None:
    """The local copy of a split; None: nothing is kept, as without ETags it could be of others."""
    if limit == 0 or not all(stamp.etag for stamp in stamps.values()):
        return None
    return SampleCopy(root, split, digest_stamps(stamps), limit)


def without_etags(objects: Objects) -> str:
    """A warning."""
    return (
        f"{objects}: the server gives no ETags: that a shard was replaced by one of the same size "
        f"is seen by the checksums of its samples alone, and no sample is kept on this machine"
    )
