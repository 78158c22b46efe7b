"""What `Objects` needs of a service's client, and what the clients share.

A client makes one request a call and never repeats one: `Objects` decides about that. Credentials
come from where the service's library looks for them, and nothing here holds or hands on any.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from deit_fast.errors import InputError

CONNECTIONS = 32  # of a process at once
CONNECT_SECONDS = 10.0


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


class ReadOnlyClient(Client):
    """Refuses to write."""

    def refusal(self, url: str) -> InputError:
        scheme = url.partition(":")[0]
        return InputError(f"{url} cannot be written: {scheme}:// is read only")

    def put(self, url: str, content: bytes, create: bool, seconds: float) -> Future[None]:
        raise self.refusal(url)

    def delete(self, url: str, seconds: float) -> Future[None]:
        raise self.refusal(url)


_pools: dict[str, ThreadPoolExecutor] = {}
_inherited: list[object] = []  # of the parents


def pool(name: str = "objects") -> ThreadPoolExecutor:
    """Threads of this process: those that wait for requests, or those of "calls", in which
    libraries without coroutines make them."""
    if name not in _pools:
        _pools.setdefault(name, ThreadPoolExecutor(CONNECTIONS, name))
    return _pools[name]


def _begin_child() -> None:
    global _pools
    _inherited.append(_pools)
    _pools = {}


os.register_at_fork(after_in_child=_begin_child)


def submit(call: Coroutine[Any, Any, Any], seconds: float) -> Future:
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, seconds), get_loop())


def in_thread(call: Callable[[], Any]) -> Future:
    return pool("calls").submit(call)


def plain_tag(value: object) -> str:
    return str(value or "").strip('"')


def require_part(asked: tuple[int, int], first: str, status: int, length: int | None) -> None:
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
