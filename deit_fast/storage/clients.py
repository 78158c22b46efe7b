"""The calls that `Objects` needs of a service, on fsspec's clients.

A client makes one request a call and never repeats one: `Objects` decides about that. Each process
opens its own: a forked one must not touch the connections of its parent. Credentials come from
where the service's library looks for them, and nothing here holds or hands on any.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import importlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deit_fast.errors import InputError
from deit_fast.storage.urls import shown

CONNECTIONS = 32  # of a process at once
_CONNECT_SECONDS = 10.0
_EXTRAS = {  # the package that must be there, and what installs it
    "s3": ("s3fs", "'deit-fast[s3]'"),
    "gs": ("gcsfs", "'deit-fast[gcs]'"),
    "gcs": ("gcsfs", "'deit-fast[gcs]'"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
    "http": ("aiohttp", "'deit-fast[http]'"),
    "https": ("aiohttp", "'deit-fast[http]'"),
}


class Stamp(NamedTuple):
    """What tells an object from another one of its name.

    Attributes:
        size: bytes.
        etag: changes with the content; '' where the service gives none, and then nothing shows
            that an object was replaced by one of the same size.
    """

    size: int
    etag: str


class Body(NamedTuple):
    """The reply to a request for a range.

    Attributes:
        content: as received.
        etag: of the object, '' if the reply names none.
    """

    content: bytes
    etag: str


class Changed(Exception):
    """The object no longer has the ETag that was asked for."""


class Exists(Exception):
    """An object of this name is there, and one was to be created."""


class Refused(Exception):
    """The service does not do what is needed, and will not at the next try."""


class Client(ABC):
    """One request each. Every method gives a future; what fails inside is its exception.

    Paths are URLs without credentials. ``seconds`` bounds a request where the library lets us.
    """

    @abstractmethod
    def stat(self, url: str, seconds: float) -> Future[Stamp]: ...

    @abstractmethod
    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        """Some objects below ``url``, by name, and what asks for the next ones, None at the end."""

    @abstractmethod
    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        """Bytes [start, stop), not empty; ``etag``: what the object must have, or ''."""

    @abstractmethod
    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        """One request with the whole content; ``create``: only where there is no object."""

    @abstractmethod
    def delete(self, url: str, seconds: float) -> Future[None]: ...


def client_of(url: str) -> Client:
    """This process's client for a URL's service.

    Raises:
        InputError: the package that it needs is not installed; names what installs it.
    """
    return _state.client(url.partition("://")[0])


def pool() -> ThreadPoolExecutor:
    """This process's threads that wait for requests."""
    return _state.pool


class _State:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(CONNECTIONS, "objects")

    @functools.cached_property
    def calls(self) -> ThreadPoolExecutor:
        """Threads of libraries without coroutines."""
        return ThreadPoolExecutor(CONNECTIONS, "calls")

    def client(self, scheme: str) -> Client:
        with self._lock:
            if scheme not in self._clients:
                package, install = _EXTRAS[scheme]
                try:
                    importlib.import_module(package)
                except ImportError:
                    raise InputError(
                        f"{scheme}:// needs the package {package}: pip install {install}"
                    ) from None
                kinds: dict[str, Callable[[], Client]] = {
                    "s3": S3Client, "hf": HubClient, "http": WebClient, "https": WebClient
                }  # fmt: skip
                self._clients[scheme] = kinds.get(scheme, functools.partial(OtherClient, scheme))()
            return self._clients[scheme]


_state = _State()
_inherited: list[_State] = []  # of the parents: kept, because closing a client closes its sockets


def _begin_child() -> None:
    global _state
    _inherited.append(_state)
    _state = _State()


os.register_at_fork(after_in_child=_begin_child)


def _submit(call: Coroutine[Any, Any, Any], seconds: float) -> Future:
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, seconds), get_loop())


def _in_thread(call: Callable[[], Any]) -> Future:
    return _state.calls.submit(call)


def _tag(value: object) -> str:
    return str(value or "").strip('"')


def _only_part(asked: tuple[int, int], first: str, status: int, length: int | None) -> None:
    """Refuse a reply to a request for a range before its content is read.

    Args:
        first: the header Content-Range, or ''.
        length: the header Content-Length.

    Raises:
        Refused: it is the whole object.
        ValueError: it is another range, or of another length: an error of this try.
    """
    start, stop = asked
    if status == 200 and (start > 0 or length != stop - start):
        raise Refused("the server ignores ranges and sends whole files")
    if status != 200 and not first.startswith(f"bytes {start}-{stop - 1}/"):
        raise ValueError(f"the server sent the range {first[:60]!r}")
    if length is not None and length != stop - start:
        raise ValueError(f"the server sent {length} bytes")


# ---------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------


class S3Client(Client):
    """s3fs. The library finds credentials, region and endpoint (AWS_ENDPOINT_URL) itself."""

    def __init__(self) -> None:
        import s3fs

        config = {
            "retries": {"max_attempts": 0}, "max_pool_connections": CONNECTIONS,
            "connect_timeout": _CONNECT_SECONDS,
        }  # fmt: skip
        self._fs = s3fs.S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, config_kwargs=config
        )
        self._fs.retries = 1

    def stat(self, url: str, seconds: float) -> Future[Stamp]:
        return _submit(self._stat(url), seconds)

    async def _stat(self, url: str) -> Stamp:
        said = await self._fs._call_s3("head_object", **_bucket_and_key(url))
        return Stamp(int(said["ContentLength"]), _tag(said.get("ETag")))

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        return _submit(self._page(url, prefix, token), seconds)

    async def _page(self, url: str, prefix: str, token: Any) -> tuple[dict[str, Stamp], Any]:
        where = _bucket_and_key(url)
        folder = f"{where['Key']}/" if where["Key"] else ""
        more = {"ContinuationToken": token} if token else {}
        said = await self._fs._call_s3(
            "list_objects_v2", Bucket=where["Bucket"], Prefix=folder + prefix, **more
        )
        found = {
            item["Key"].removeprefix(folder): Stamp(int(item["Size"]), _tag(item.get("ETag")))
            for item in said.get("Contents", ())
        }
        token = said.get("NextContinuationToken")
        if said.get("IsTruncated") and not token:
            raise ValueError("the server's list ends without its end")
        return found, token if said.get("IsTruncated") else None

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return _submit(self._get(url, start, stop, etag), seconds)

    async def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        match = {"IfMatch": f'"{etag}"'} if etag else {}
        where = _bucket_and_key(url)
        said = await self._fs._call_s3(
            "get_object", **where, Range=f"bytes={start}-{stop - 1}", **match
        )
        body = said["Body"]
        try:
            status = said["ResponseMetadata"]["HTTPStatusCode"]
            _only_part((start, stop), said.get("ContentRange") or "", status, said["ContentLength"])
            return Body(await body.read(), _tag(said.get("ETag")))
        finally:
            body.close()

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        return _submit(self._put(url, content, create), seconds)

    async def _put(self, url: str, content: bytes, create: bool) -> None:
        absent = {"IfNoneMatch": "*"} if create else {}
        await self._fs._call_s3(
            "put_object", **_bucket_and_key(url), Body=content, ContentMD5=_md5(content), **absent
        )

    def delete(self, url: str, seconds: float) -> Future[None]:
        return _submit(self._fs._call_s3("delete_object", **_bucket_and_key(url)), seconds)

    # A large file in parts. Nothing is visible before `end_parts`.

    def begin_parts(self, url: str, seconds: float) -> Future[dict[str, Any]]:
        where = _bucket_and_key(url)
        return _submit(self._fs._call_s3("create_multipart_upload", **where), seconds)

    def put_part(
        self, url: str, upload: str, number: int, content: bytes, seconds: float
    ) -> Future[dict[str, Any]]:
        call = self._fs._call_s3(
            "upload_part", **_bucket_and_key(url), UploadId=upload, PartNumber=number,
            Body=content, ContentMD5=_md5(content),
        )  # fmt: skip
        return _submit(call, seconds)

    def end_parts(self, url: str, upload: str, etags: list[str], seconds: float) -> Future:
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(etags, 1)]
        call = self._fs._call_s3(
            "complete_multipart_upload", **_bucket_and_key(url), UploadId=upload,
            MultipartUpload={"Parts": parts},
        )  # fmt: skip
        return _submit(call, seconds)

    def drop_parts(self, url: str, upload: str, seconds: float) -> Future:
        call = self._fs._call_s3("abort_multipart_upload", **_bucket_and_key(url), UploadId=upload)
        return _submit(call, seconds)


def _md5(content: bytes) -> str:
    """What the service compares with the bytes that reach it; it protects from no attacker."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _bucket_and_key(url: str) -> dict[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    return {"Bucket": bucket, "Key": key}


# ---------------------------------------------------------------------------------------------
# The web
# ---------------------------------------------------------------------------------------------


class WebClient(Client):
    """A web server, read only: names come from a list, since pages of links are no listing."""

    def __init__(self) -> None:
        from fsspec.implementations.http import HTTPFileSystem

        # trust_env: proxies, and passwords in ~/.netrc
        self._fs = HTTPFileSystem(skip_instance_cache=True, client_kwargs={"trust_env": True})

    async def _ask(self, method: str, url: str, headers: dict[str, str]) -> Any:
        session = await self._fs.set_session()
        # Compressed content would have another length.
        headers = {"Accept-Encoding": "identity", **headers}
        return await session.request(method, self._fs.encode_url(url), headers=headers)

    def stat(self, url: str, seconds: float) -> Future[Stamp]:
        return _submit(self._stat(url), seconds)

    async def _stat(self, url: str) -> Stamp:
        async with await self._ask("HEAD", url, {}) as said:
            said.raise_for_status()
            if "Content-Length" not in said.headers:
                raise Refused("the server does not say how long the file is")
            return Stamp(int(said.headers["Content-Length"]), _tag(said.headers.get("ETag")))

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        raise InputError(f"{shown(url)} cannot be listed: a web server has no list of its files")

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return _submit(self._get(url, start, stop, etag), seconds)

    async def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if etag and not etag.startswith("W/"):  # If-Match never holds for a weak one
            headers["If-Match"] = f'"{etag}"'
        async with await self._ask("GET", url, headers) as said:
            said.raise_for_status()
            length = said.headers.get("Content-Length")
            part = said.headers.get("Content-Range", "")
            _only_part((start, stop), part, said.status, int(length) if length else None)
            return Body(await said.read(), _tag(said.headers.get("ETag")))

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        raise InputError(f"{shown(url)} cannot be written: {urlsplit(url).scheme}:// is read only")

    def delete(self, url: str, seconds: float) -> Future[None]:
        raise InputError(f"{shown(url)} cannot be deleted: {urlsplit(url).scheme}:// is read only")


# ---------------------------------------------------------------------------------------------
# Other services
# ---------------------------------------------------------------------------------------------


class OtherClient(Client):
    """Google Cloud Storage and Azure. A read is followed by a stat where an ETag is asked for."""

    def __init__(self, scheme: str) -> None:
        import fsspec

        self._fs: Any = fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False
        )

    def stat(self, url: str, seconds: float) -> Future[Stamp]:
        return _in_thread(lambda: self._stat(url))

    def _stat(self, url: str) -> Stamp:
        return _stamp_of(self._fs.info(url), url)

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        return _in_thread(lambda: self._page(url, prefix))

    def _page(self, url: str, prefix: str) -> tuple[dict[str, Stamp], Any]:
        root = self._fs._strip_protocol(url)
        self._fs.invalidate_cache()
        folder = f"{root}/{prefix}".rpartition("/")[0]  # prefix may end within a name
        found = self._fs.find(folder, detail=True)
        names = ((name.removeprefix(f"{root}/"), info) for name, info in found.items())
        return {n: _stamp_of(info, n) for n, info in names if n.startswith(prefix)}, None

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return _in_thread(lambda: self._get(url, start, stop, etag))

    def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        content = self._read(url, start, stop)
        return Body(content, self._stat(url).etag if etag else "")

    def _read(self, url: str, start: int, stop: int) -> bytes:
        return self._fs.cat_file(url, start=start, end=stop)

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        return _in_thread(lambda: self._put(url, content, create))

    def _put(self, url: str, content: bytes, create: bool) -> None:
        whole = {"chunksize": len(content) + 1} if "gs" in self._fs.protocol else {}
        mode = {"mode": "create"} if create else {}
        self._fs.pipe_file(url, content, **mode, **whole)

    def put_file(self, url: str, path: Path, seconds: float) -> Future[None]:
        return _in_thread(lambda: self._fs.put_file(str(path), url))

    def delete(self, url: str, seconds: float) -> Future[None]:
        return _in_thread(lambda: self._fs.rm_file(url))


class HubClient(OtherClient):
    """The Hugging Face Hub, read only. A branch is looked up once in a process: its commit then
    is what is read."""

    def __init__(self) -> None:
        super().__init__("hf")
        self._pinned: dict[str, str] = {}

    def _pin(self, url: str) -> str:
        place = self._fs.resolve_path(url)
        repository = getattr(place, "repo_id", None)
        if repository is None:  # a bucket of the Hub has no commits
            return url
        name = f"{place.repo_type}/{repository}@{place.revision}"
        if name not in self._pinned:
            self._pinned[name] = self._fs._api.repo_info(
                repository, repo_type=place.repo_type, revision=place.revision
            ).sha
        kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
        return f"hf://{kind}{repository}@{self._pinned[name]}/{place.path_in_repo}"

    def _stat(self, url: str) -> Stamp:
        return _stamp_of(self._fs.info(self._pin(url)), url)

    def _page(self, url: str, prefix: str) -> tuple[dict[str, Stamp], Any]:
        return super()._page(self._pin(url).rstrip("/"), prefix)

    def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        with self._fs.open(self._pin(url), "rb", cache_type="none") as file:
            file.seek(start)
            return Body(file.read(stop - start), _stamp_of(file.details, url).etag)

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        raise InputError(f"{shown(url)} cannot be written: hf:// is read only")

    def delete(self, url: str, seconds: float) -> Future[None]:
        raise InputError(f"{shown(url)} cannot be deleted: hf:// is read only")


def _stamp_of(info: dict[str, Any], url: str) -> Stamp:
    """From the description of a file, whose keys differ between services."""
    if info.get("type") != "file":
        raise FileNotFoundError(url)
    large = info.get("lfs") or {}
    digest = large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", "")
    tags = [digest, *(info.get(key) for key in ("blob_id", "xet_hash", "etag", "ETag"))]
    return Stamp(int(info["size"]), next((_tag(tag) for tag in tags if tag), ""))
