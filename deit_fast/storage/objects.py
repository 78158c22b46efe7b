"""Objects below a URL: every read is checked, every object is published whole or not at all.

Clients of object storage return short or altered bytes without an error, mix two versions of an
object, and publish torn ones. Here a read has the length that was asked for, the ETag of the object
that was indexed and, if the caller gives one, the right checksum; what fails is tried again with
growing pauses, until a deadline. What is written is one request, or parts that show together.
"""

from __future__ import annotations

import builtins
import concurrent.futures
import errno
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deit_fast.errors import printable
from deit_fast.runtime.files import crc32c, open_regular
from deit_fast.storage.clients import Body, Changed, Client, ReadOnlyClient, Stamp, pool
from deit_fast.storage.etags import vouches
from deit_fast.storage.failures import (
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StorageError,
    WrongBytes,
    cause,
    permanent_error,
)
from deit_fast.storage.s3 import S3Client
from deit_fast.storage.services import client_of
from deit_fast.storage.urls import join, require_plain, shown

log = logging.getLogger("deit_fast")
T = TypeVar("T")

MOST_BYTES = 8 << 20  # of a request that serves several ranges
_GAP = 64 << 10  # bytes between two ranges that are cheaper to read than another request
_PART_BYTES = 64 << 20  # of a file that is sent in parts: 10,000 of them are allowed
_LONGEST_PAUSE = 20.0
_SLOWEST = 1e6  # bytes a second of a connection that is given time


@dataclass(frozen=True)
class Patience:
    """How long a service is asked.

    Attributes:
        tries: of each request.
        request_seconds: of one try.
        seconds: of all tries and the pauses between them.
        pause: seconds before the second try; doubled before each further one, and a random part
            of up to a half is taken off, so that processes do not ask at once.
    """

    tries: int = 5
    request_seconds: float = 60.0
    seconds: float = 300.0
    pause: float = 0.5


class Part(NamedTuple):
    """A range of an object.

    Attributes:
        name: of the object.
        start, stop: bytes.
        stamp: that the object must have, if any.
        check: whether the bytes are right; none: any are.
    """

    name: str
    start: int
    stop: int
    stamp: Stamp | None = None
    check: Callable[[bytes], bool] | None = None


@dataclass(frozen=True)
class Objects:
    """The objects below a URL.

    Holds no connection and no credentials, so it can be pickled, and threads and processes may
    share it. Names are relative to the URL and may have slashes.

    Attributes:
        url: such as `s3://bucket/folder`, without a slash at its end.
        patience: with the service.

    Raises:
        InputError: an unknown scheme, or the URL holds credentials.
        All methods: InputError, a package is missing or the service is read only; StorageError,
        after all tries, or at once where another try cannot help.
    """

    url: str
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", require_plain(self.url))

    def __str__(self) -> str:
        return shown(self.url)

    def url_of(self, name: str) -> str:
        """For messages."""
        return "/".join([shown(self.url), *([printable(name)] if name else [])])

    # -----------------------------------------------------------------------------------------
    # Reading
    # -----------------------------------------------------------------------------------------

    def stat(self, name: str) -> Stamp:
        """Size and ETag of an object.

        Raises:
            ObjectMissing (a FileNotFoundError): there is none.
        """
        url = join(self.url, name)
        return self._repeat(name, "cannot be looked up", partial(client_of(url).stat, url))

    def stat_many(self, names: Sequence[str]) -> dict[str, Stamp]:
        """As ``stat``, of many objects at once; in the order of the names."""
        return dict(zip(names, pool().map(self.stat, names), strict=True))

    def list(self, prefix: str = "") -> dict[str, Stamp]:
        """All objects whose names begin with ``prefix``, sorted by name.

        Raises:
            ObjectMissing: there is no such bucket.
        """
        client, token = client_of(self.url), None
        found: dict[str, Stamp] = {}
        while True:
            page, token = self._repeat(
                prefix, "cannot be listed", partial(client.page, self.url, prefix, token)
            )
            found |= page
            if token is None:
                return dict(sorted(found.items()))

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        stamp: Stamp | None = None,
        check: Callable[[bytes], bool] | None = None,
    ) -> bytes:
        """Bytes [start, stop) of an object, or those from ``start`` to its end.

        Args:
            stamp: the object must still have it.
            check: whether the bytes are right, such as their checksum; False: they are read again.

        Raises:
            ObjectMissing, ObjectChanged, ObjectDamaged.
            ValueError: the range is not one of an object of this stamp.
        """
        if stop is None:
            stamp = stamp or self.stat(name)
            stop = stamp.size
        if not 0 <= start <= stop or (stamp is not None and stop > stamp.size):
            raise ValueError(f"{self.url_of(name)}: no range: bytes {start} to {stop} of {stamp}")
        if start == stop:
            return b""
        etag = "" if stamp is None else stamp.etag
        url, length = join(self.url, name), stop - start
        get = client_of(url).get

        def judge(body: Body) -> BaseException | None:
            if etag and body.etag != etag:
                return Changed()
            if len(body.content) != length:
                return EOFError(f"{len(body.content)} of {length} bytes came")
            if check is not None and not check(body.content):
                return WrongBytes()
            return None

        what = f"bytes {start} to {stop - 1} cannot be read"
        ask = partial(get, url, start, stop, etag)
        return self._repeat(name, what, ask, judge, length).content

    def read_whole(self, name: str) -> bytes:
        """A small object that has no checksum of its own: its ETag is the digest of what came, or
        two reads agree.

        Raises:
            ObjectMissing, ObjectChanged; ObjectDamaged: no two reads agree.
        """
        stamp = self.stat(name)
        last: bytes | None = None
        for _ in range(max(2, self.patience.tries)):
            content = self.read(name, stamp=stamp)
            if content == last or vouches(stamp.etag, len(content), partial(_slice, content)):
                return content
            last = content
        raise ObjectDamaged(errno.EIO, "has other bytes at each read", self.url_of(name))

    def read_many(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        *,
        stamp: Stamp | None = None,
        checks: Sequence[Callable[[bytes], bool]] | None = None,
    ) -> builtins.list[bytes]:
        """Several ranges (start, stop) of one object at once; as ``read``."""
        all_checks = [None] * len(ranges) if checks is None else checks
        pairs = zip(ranges, all_checks, strict=True)
        return self.read_parts([Part(name, *span, stamp, check) for span, check in pairs])

    def read_parts(self, parts: Sequence[Part]) -> builtins.list[bytes]:
        """Ranges of several objects, at once; near ones by one request. As ``read``."""
        contents = []
        for content in self.try_parts(parts):
            if isinstance(content, StorageError):
                raise content
            contents.append(content)
        return contents

    def try_parts(self, parts: Sequence[Part]) -> builtins.list[bytes | StorageError]:
        """As ``read_parts``, with the error in place of each part that cannot be read."""
        found: builtins.list[Any] = [b""] * len(parts)
        groups = list(_merged(parts))
        futures = [pool().submit(self._read_group, [parts[i] for i in group]) for group in groups]
        try:
            for group, future in zip(groups, futures, strict=True):
                for index, content in zip(group, future.result(), strict=True):
                    found[index] = content
        finally:
            for future in futures:
                future.cancel()
        return found

    def _read_group(self, parts: Sequence[Part]) -> builtins.list[bytes | StorageError]:
        """Parts of one object by one request; those whose check fails each by one of their own."""
        name, start, _, stamp, _ = parts[0]
        whole = b""
        if len(parts) > 1:
            with suppress(StorageError):
                whole = self.read(name, start, max(part.stop for part in parts), stamp=stamp)
        found: builtins.list[bytes | StorageError] = []
        for part in parts:
            content = whole[part.start - start : part.stop - start]
            if not whole or not (part.check is None or part.check(content)):
                try:
                    content = self.read(*part[:3], stamp=stamp, check=part.check)
                except StorageError as error:
                    found.append(error.with_traceback(None))
                    continue
            found.append(content)
        return found

    # -----------------------------------------------------------------------------------------
    # Writing
    # -----------------------------------------------------------------------------------------

    def require_writable(self) -> None:
        """
        Raises:
            InputError: the service is read only.
            ObjectMissing: there is no such bucket, as far as the service says so.
        """
        _writer(self.url)
        self.list("manifest.json")  # of any name

    def create(
        self, name: str, content: bytes, same: Callable[[bytes], bool] | None = None
    ) -> bool:
        """Publish an object unless there is one; of several processes that do so, one wins.

        Args:
            content: at most 5 GB; it may be empty.
            same: whether the content of an object that is there will do; default: equal bytes.

        Returns:
            Whether this call created it. False also where an earlier try did, whose reply was lost.

        Raises:
            ObjectExists: one with other content is there.
        """
        url = join(self.url, name)
        ask = partial(_writer(url).put, url, content, True)
        for _ in range(self.patience.tries):
            try:
                self._repeat(name, "cannot be created", ask, size=len(content))
                return True
            except ObjectExists:
                with suppress(ObjectMissing):  # deleted meanwhile: created again
                    there = self.read_whole(name)
                    break
        else:
            raise ObjectMissing(errno.ENOENT, "is created and deleted again", self.url_of(name))
        if not (there == content if same is None else same(there)):
            raise ObjectExists(errno.EEXIST, "is there with other content", self.url_of(name))
        return False

    def require_creation(self, name: str, content: bytes) -> None:
        """Try to create an object that is there, since some services ignore the condition.

        Args:
            content: of the object.

        Raises:
            StorageError: the service has replaced it.
        """
        url = join(self.url, name)
        ask = partial(_writer(url).put, url, content, True)
        try:
            self._repeat(name, "cannot be created", ask, size=len(content))
        except ObjectExists:
            return
        raise StorageError(
            errno.ENOTSUP,
            "was replaced by a request to create it only where there is none: the service ignores "
            "If-None-Match, without which several processes cannot write to one URL; use another "
            "service or a folder",
            self.url_of(name),
        )

    def put(self, name: str, content: bytes | Path) -> Stamp:
        """Publish an object, in place of one that is there, and verify what the service holds.

        Args:
            content: bytes, or a file, which is read piece by piece.

        Raises:
            ObjectDamaged: the object has other bytes; OSError: the file cannot be read.
        """
        url = join(self.url, name)
        client = _writer(url)
        if isinstance(content, Path) and content.stat().st_size > _PART_BYTES:
            etag, crc = self._put_in_parts(name, url, client, content)
        else:
            if isinstance(content, Path):
                with open_regular(content) as file:
                    content = file.read()
            ask = partial(client.put, url, content, False)
            self._repeat(name, "cannot be written", ask, size=len(content))
            etag, crc = _md5(content).hexdigest(), (len(content), crc32c(content))
        stamp = self.stat(name)
        if (stamp.etag != etag or stamp.size != crc[0]) and self._crc(name, stamp) != crc:
            raise ObjectDamaged(
                errno.EIO, "holds other bytes than were written: write it again", self.url_of(name)
            )
        return stamp

    def _put_in_parts(
        self, name: str, url: str, client: Any, path: Path
    ) -> tuple[str, tuple[int, int]]:
        """The ETag that S3 and Google Cloud Storage give it, and its size and CRC32C."""
        if not isinstance(client, S3Client):
            size, crc, md5 = _digests_of(path)
            self._repeat(name, "cannot be written", partial(client.put_file, url, path), size=size)
            return md5, (size, crc)
        what, digests, size, value = "cannot be written", [], 0, 0
        upload = self._repeat(name, what, partial(client.begin_parts, url))["UploadId"]
        try:
            etags: builtins.list[str] = []
            with open_regular(path) as file:
                while content := file.read(_PART_BYTES):
                    put = partial(client.put_part, url, upload, len(etags) + 1, content)
                    reply = self._repeat(name, what, put, size=len(content))
                    etags.append(reply["ETag"])
                    digests.append(_md5(content).digest())
                    size, value = size + len(content), crc32c(content, value)
            self._repeat(name, what, partial(client.end_parts, url, upload, etags))
        except BaseException:
            with suppress(StorageError):
                self._repeat(name, what, partial(client.drop_parts, url, upload))
            raise
        return f"{_md5(b''.join(digests)).hexdigest()}-{len(digests)}", (size, value)

    def _crc(self, name: str, stamp: Stamp) -> tuple[int, int]:
        crc = 0
        for start in range(0, stamp.size, MOST_BYTES):
            stop = min(start + MOST_BYTES, stamp.size)
            crc = crc32c(self.read(name, start, stop, stamp=stamp), crc)
        return stamp.size, crc

    def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        url = join(self.url, name)
        with suppress(ObjectMissing):
            self._repeat(name, "cannot be deleted", partial(_writer(url).delete, url))

    # -----------------------------------------------------------------------------------------
    # Tries
    # -----------------------------------------------------------------------------------------

    def _repeat(
        self,
        name: str,
        what: str,
        ask: Callable[[float], concurrent.futures.Future[T]],
        judge: Callable[[T], BaseException | None] | None = None,
        size: int = 0,
    ) -> T:
        """The result of a request, which is made again while it may help.

        What fails in the client is the exception of its future, whatever its class: exceptions that
        a signal raises in this thread pass.

        Args:
            what: "cannot ...", for the message.
            ask: called with the seconds that the request may take; makes it.
            judge: what is wrong with the result, None where nothing is.
            size: bytes that are sent or read, which add to the time that a try may take.
        """
        patience = self.patience
        extra, pause = size / _SLOWEST, patience.pause
        end = time.monotonic() + patience.seconds + extra
        tried = 0
        while True:
            tried += 1
            seconds = max(0.01, min(patience.request_seconds + extra, end - time.monotonic()))
            result, error = _result(ask, seconds)
            if error is None and (error := judge(result) if judge else None) is None:
                return result
            assert error is not None
            final = permanent_error(self.url_of(name), what, error)
            wait = min(pause, _LONGEST_PAUSE) * random.uniform(0.5, 1)
            if final is None and (
                tried == patience.tries or time.monotonic() + wait > end
            ):  # as many tries as there will be
                kind = ObjectDamaged if isinstance(error, WrongBytes) else StorageError
                tries = f"{tried} {'try' if tried == 1 else 'tries'}"
                why = f"{what}, in {tries}: {cause(error, seconds)}"
                final = kind(errno.EIO, why, self.url_of(name))
            if final is not None:
                break
            log.debug("%s: %s: %s; again", self.url_of(name), what, cause(error, seconds))
            time.sleep(wait)
            pause *= 2
        del error  # it may hold a signed URL, and would be the context of this one
        raise final


def digest_stamps(stamps: dict[str, Stamp]) -> str:
    """16 hex digits that differ for other shards: over names, sizes and ETags."""
    lines = (f"{name}\0{stamp.size}\0{stamp.etag}\n" for name, stamp in stamps.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _writer(url: str) -> Client:
    client = client_of(url)
    if isinstance(client, ReadOnlyClient):
        raise client.refusal(url)
    return client


def _slice(content: bytes, start: int, length: int) -> memoryview:
    return memoryview(content)[start : start + length]


def _result(
    ask: Callable[[float], concurrent.futures.Future[T]], seconds: float
) -> tuple[Any, BaseException | None]:
    """Result and error of a request. The second time-out is for libraries that ignore the first."""
    future = ask(seconds)
    try:
        error = future.exception(seconds + 1)
        return (None, error) if error is not None else (future.result(), None)
    except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
        return None, TimeoutError()
    finally:
        future.cancel()


def _merged(parts: Sequence[Part]) -> Iterator[list[int]]:
    """Indices of parts that one request serves, each group in the order of its ranges."""
    order = sorted(
        range(len(parts)), key=lambda i: (parts[i].name, parts[i].stamp or (), parts[i].start)
    )
    group: list[int] = []
    first = last = 0
    for index in order:
        part = parts[index]
        near = (
            group
            and (part.name, part.stamp) == parts[group[0]][0:4:3]
            and part.start - last <= _GAP
            and max(last, part.stop) - first <= MOST_BYTES
        )
        if not near:
            if group:
                yield group
            group, first, last = [], part.start, part.stop
        group.append(index)
        last = max(last, part.stop)
    if group:
        yield group


def _md5(content: bytes) -> Any:
    """As the ETags of S3; it protects from no attacker."""
    return hashlib.md5(content, usedforsecurity=False)


def _digests_of(path: Path) -> tuple[int, int, str]:
    """Size, CRC32C, and MD5 in hex."""
    size, crc, md5 = 0, 0, _md5(b"")
    with open_regular(path) as file:
        while content := file.read(MOST_BYTES):
            size, crc = size + len(content), crc32c(content, crc)
            md5.update(content)
    return size, crc, md5.hexdigest()
