"""Web servers, through fsspec; read only."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from deit_fast.errors import InputError
from deit_fast.storage.clients import (
    Body,
    ReadOnlyClient,
    Refused,
    Stamp,
    plain_tag,
    require_part,
    submit,
)
from deit_fast.storage.urls import shown


class WebClient(ReadOnlyClient):
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
        return submit(self._stat(url), seconds)

    async def _stat(self, url: str) -> Stamp:
        async with await self._ask("HEAD", url, {}) as said:
            said.raise_for_status()
            if "Content-Length" not in said.headers:
                raise Refused("the server does not say how long the file is")
            return Stamp(int(said.headers["Content-Length"]), plain_tag(said.headers.get("ETag")))

    def page(
        self, url: str, prefix: str, token: Any, seconds: float
    ) -> Future[tuple[dict[str, Stamp], Any]]:
        raise InputError(f"{shown(url)} cannot be listed: a web server has no list of its files")

    def get(self, url: str, start: int, stop: int, etag: str, seconds: float) -> Future[Body]:
        return submit(self._get(url, start, stop, etag), seconds)

    async def _get(self, url: str, start: int, stop: int, etag: str) -> Body:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if etag and not etag.startswith("W/"):  # If-Match never holds for a weak one
            headers["If-Match"] = f'"{etag}"'
        async with await self._ask("GET", url, headers) as said:
            said.raise_for_status()
            length = said.headers.get("Content-Length")
            part = said.headers.get("Content-Range", "")
            require_part((start, stop), part, said.status, int(length) if length else None)
            return Body(await said.read(), plain_tag(said.headers.get("ETag")))
