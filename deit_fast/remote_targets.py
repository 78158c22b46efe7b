"""The caches of a pass at a URL, and the folder of this process in which it works for them."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deit_fast.cache.format import FILE_NAME, matching_manifest, publish_manifest
from deit_fast.cache.remote import STATISTICS, Publisher, RemoteCache, publish_small, pull
from deit_fast.cache.remote import publish_manifest as publish_object
from deit_fast.config import RunConfig
from deit_fast.errors import CacheError
from deit_fast.runtime.files import cache_folder, read_file, require_writable
from deit_fast.storage.objects import Objects
from deit_fast.storage.urls import is_url, join
from deit_fast.target_caches import TargetCache, TargetCaches

_LOCK = ".lock"


class RemoteTargets:
    """Caches at a URL: the logits' at the URL itself, each feature target's below it.

    What decides about the work, manifests and statistics, is copied into a folder of this process
    first. The process writes its blocks there, into view files that have holes, and publishes each
    when it is complete. The folder is deleted at the end.

    Args:
        url: of the caches.
        targets: names of the feature targets.

    Attributes:
        folder: of this process.
        objects: below the URL.
    """

    def __init__(self, url: str, targets: list[str]) -> None:
        self.objects = Objects(url)
        self.objects.require_writable()
        self.folder = _new_folder()
        self._close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for name in ["", *targets]:
            pull(self._below(name), self.folder / name)

    def _below(self, name: str) -> Objects:
        return Objects(join(self.objects.url, name)) if name else self.objects

    @contextmanager
    def named(self) -> Iterator[None]:
        """Refusals name the URL in place of this process's folder."""
        try:
            yield
        except CacheError as error:
            raise type(error)(str(error).replace(str(self.folder), str(self.objects))) from None

    def share_fit(self, path: Path) -> None:
        """Publish a fit of statistics, or take the one that another process has published."""
        folder = path.parent.relative_to(self.folder)
        publish_small(self._below("" if folder == Path() else str(folder)), path.parent, path.name)

    def publish(self, caches: TargetCaches) -> None:
        """Publish manifests and statistics, or compare the manifests that are there.

        Raises:
            CacheMismatch: the URL has a cache made under other settings.
        """
        for cache in caches:
            objects = self._objects_of(cache)
            manifest = publish_manifest(cache.folder, cache.manifest)
            publish_object(objects, cache.folder, manifest)
            if cache.index is None:
                continue
            content = read_file(cache.folder / STATISTICS)
            if not publish_small(objects, cache.folder, STATISTICS):
                objects.put(STATISTICS, content)  # of a job that ended before it had a manifest

    def publisher(self, cache: TargetCache) -> Publisher:
        """What publishes the blocks of a cache."""
        return Publisher(RemoteCache(self._objects_of(cache), cache.manifest), cache.folder)

    def planned(
        self, caches: TargetCaches, views: Iterable[int]
    ) -> tuple[int, int, int, list[tuple[int, int]]]:
        """As ``TargetCaches.planned``: what is to be published at the URL.

        Raises:
            CacheMismatch: the URL has a cache made under other settings.
        """
        to_write = kept = new_bytes = 0
        units: set[tuple[int, int]] = set()
        for cache in caches:
            if (cache.folder / FILE_NAME).exists():
                matching_manifest(cache.folder, cache.manifest)
            remote = RemoteCache(self._objects_of(cache), cache.manifest)
            publisher = Publisher(remote, cache.folder)
            blocks = {
                (view, block): unit
                for view in views
                for unit in range(caches.units_per_view)
                for block in caches.blocks(cache, unit)
            }
            publisher.look_up(blocks)
            missing = [key for key in blocks if not publisher.is_there(*key)]
            to_write, kept = to_write + len(missing), kept + len(blocks) - len(missing)
            new_bytes += sum(remote.block_bytes(block) for _, block in missing)
            units |= {(key[0], blocks[key]) for key in missing}
        return to_write, kept, new_bytes, sorted(units)

    def _objects_of(self, cache: TargetCache) -> Objects:
        return self._below("" if cache.index is None else cache.folder.name)

    def forget_views(self) -> None:
        """Delete what was written here, once it is published."""
        for path in self.folder.rglob("view-*"):
            path.unlink(missing_ok=True)


def remote_targets(config: RunConfig) -> RemoteTargets | None:
    """The caches of a configuration whose cache is a URL; None for one in a folder."""
    if config.cache is None or not is_url(config.cache):
        return None
    return RemoteTargets(config.cache, [name for name in config.targets if name != "logits"])


def _new_folder() -> Path:
    """A new folder with a lock that this process holds; deletes those of processes that ended."""
    above = cache_folder() / "work"
    require_writable("XDG_CACHE_HOME", above)
    above.mkdir(parents=True, exist_ok=True)
    for path in above.iterdir():
        with suppress(OSError):
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
    folder = above / os.urandom(8).hex()
    folder.mkdir()
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # held until this process ends
    return folder
