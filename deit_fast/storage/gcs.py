"""Google Cloud Storage: the JSON API, with the connections and credentials of gcsfs.

gcsfs's own calls repeat a request by themselves, and lose the headers that say of which object a
reply is. The requests are described at https://cloud.google.com/storage/docs/json_api/v1.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deit_fast.runtime.files import open_regular
from deit_fast.storage.clients import CONNECT_SECONDS, Body, Client, Stamp, require_part, submit

_FIELDS = "name,size,md5Hash,generation"
_MD5 = re.compile(r"md5=([A-Za-z0-9+/]{22}==)")


class GcsClient(Client):
    """The ETag of an object is its MD5 in hex, or its generation where it was composed of parts."""

    def __init__(self) -> None:
        from gcsfs.core import GCSFileSystem  # the outer class asks what kind a bucket is

        self._fs = GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)

    @asynccontextmanager
    async def _ask(
        self, method: str, kind: str, where: tuple[str, str],
        params: dict[str, str], headers: dict[str, str] | None = None, **more: Any,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """The reply of a request for an object, or without its name for those of a bucket.

        Args:
            kind: what its URL starts with: "", "download/" or "upload/".
        """
        from aiohttp import ClientTimeout

        bucket, name = (quote(part, safe="") for part in where)
        url = f"{self._fs._location}/{kind}storage/v1/b/{bucket}/o{'/' if name else ''}{name}"
        session = await self._fs._set_session()
        async with session.request(
            method, url, params=self._fs._get_params(params),
            headers=self._fs._get_headers(headers),
            timeout=ClientTimeout(total=None, sock_connect=CONNECT_SECONDS), **more,
        ) as reply:  # fmt: skip
            reply.raise_for_status()
            yield reply

    def stat(self, url: str, seconds: float) -> Future[Stamp]:
        return submit(self._stat(url), seconds)

    async def _stat(self, url: str) -> Stamp:
        async with self._ask("GET", "", _bucket_and_name(url), {"fields": _FIELDS}) as said:
            return _stamp_of(await said.json())

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        return submit(self._page(url, prefix, token), seconds)

    async def _page(self, url: str, prefix: str, token: Any) -> tuple[dict[str, Stamp], Any]:
        bucket, name = _bucket_and_name(url)
        folder = f"{name}/" if name else ""
        params = {"prefix": folder + prefix, "fields": f"items({_FIELDS}),nextPageToken"}
        if token:
            params["pageToken"] = token
        async with self._ask("GET", "", (bucket, ""), params) as said:
            found = await said.json()
        items = found.get("items", ())
        names = {item["name"].removeprefix(folder): _stamp_of(item) for item in items}
        return names, found.get("nextPageToken")

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return submit(self._get(url, start, stop), seconds)

    async def _get(self, url: str, start: int, stop: int) -> Body:
        # Without Accept-Encoding the service would decode a compressed object.
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "gzip"}
        where = _bucket_and_name(url)
        async with self._ask("GET", "download/", where, {"alt": "media"}, headers) as said:
            part, length = said.headers.get("Content-Range", ""), said.content_length
            require_part((start, stop), part, said.status, length)
            tag = _tag(said.headers.getall("X-Goog-Hash", ()), said.headers)
            return Body(await said.read(), tag)

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        return submit(self._put(url, content, create), seconds)

    async def _put(self, url: str, content: bytes, create: bool) -> None:
        """One request with the name and the MD5, which the service compares, and the content."""
        from aiohttp import MultipartWriter

        bucket, name = _bucket_and_name(url)
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        params = {"uploadType": "multipart"} | ({"ifGenerationMatch": "0"} if create else {})
        with MultipartWriter("related") as parts:
            parts.append_json({"name": name, "md5Hash": base64.b64encode(digest).decode()})
            parts.append(io.BytesIO(content))
        kind = {"Content-Type": parts.content_type}
        async with self._ask("POST", "upload/", (bucket, ""), params, kind, data=parts):
            pass

    def put_file(self, url: str, path: Path, seconds: float) -> Future[None]:
        """One request that reads the file piece by piece."""
        return submit(self._put_file(url, path), seconds)

    async def _put_file(self, url: str, path: Path) -> None:
        bucket, name = _bucket_and_name(url)
        params = {"uploadType": "media", "name": name}
        kind = {"Content-Type": "application/octet-stream"}
        with open_regular(path) as file:
            async with self._ask("POST", "upload/", (bucket, ""), params, kind, data=file):
                pass

    def delete(self, url: str, seconds: float) -> Future[None]:
        return submit(self._delete(url), seconds)

    async def _delete(self, url: str) -> None:
        async with self._ask("DELETE", "", _bucket_and_name(url), {}):
            pass


def _bucket_and_name(url: str) -> tuple[str, str]:
    bucket, _, name = url.partition("://")[2].partition("/")
    return bucket, name


def _stamp_of(item: dict[str, Any]) -> Stamp:
    hashes = [f"md5={item['md5Hash']}"] if "md5Hash" in item else []
    return Stamp(int(item.get("size", 0)), _tag(hashes, {"X-Goog-Generation": item["generation"]}))


def _tag(hashes: Iterable[str], headers: Any) -> str:
    match = _MD5.search(",".join(hashes))
    if match:
        return base64.b64decode(match[1]).hex()
    return str(headers.get("X-Goog-Generation", ""))
