"""A proxy between a client of HTTP and its server that breaks some of the replies."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

FAULTS = ("503", "cut", "reset", "hang", "slow", "short", "flip", "etag")
SLOW_SECONDS = 0.3
BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 56\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message>x</Message></Error>"
)


class Proxy:
    """Breaks a share of the replies to requests of a method, or a number of them.

    503: the request is refused. cut: the connection ends in the middle of the content. reset: it
    ends before the reply. hang: no reply. slow: a late one. short: half the content, and a
    Content-Length that fits it. flip: one bit, at random, differs. etag: the ETag differs. lost:
    the server does what is asked, and its reply does not come. always: a request with a
    condition loses it.

    Attributes:
        port: to connect to.
        hits: replies that were broken.
        heads: first lines and headers of all requests.
    """

    def __init__(self, server: int) -> None:
        self.port = 0
        self.hits = 0
        self.heads: list[bytes] = []
        self._server = server
        self._random = random.Random(1)
        self._waiting: set[asyncio.Task] = set()
        self.stop()

    def start(
        self, fault: str, share: float = 1.0, times: int = 1 << 30, method: str = "GET"
    ) -> None:
        self.hits = 0
        self._share, self._times, self._method, self._fault = share, times, method, fault

    def stop(self) -> None:
        self._fault, self._share, self._times, self._method = "", 0.0, 0, ""

    def _breaks(self, head: bytes) -> str:
        hit = (
            self._fault and head.startswith(self._method.encode())
            and self.hits < self._times and self._random.random() < self._share
        )  # fmt: skip
        self.hits += bool(hit)
        return self._fault if hit else ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self._waiting.discard(task)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass one request on and its reply back; False: the connection is to end."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if _header(head, b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = _without(head, b"expect")
        body = await _body(reader, head)
        fault = self._breaks(head)
        if fault == "503":
            writer.write(BUSY)
            return True
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            return False
        if fault == "always":
            head = _without(head, b"if-none-match")
        head, content = await self._ask(head, body)
        if fault == "lost":
            return False
        if fault == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if fault == "etag":
            head = head.replace(b'"', b'"0', 1)
        if fault == "flip" and content:
            changed = bytearray(content)
            changed[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
            content = bytes(changed)
        if fault == "short":
            content = content[: len(content) // 2]
            head = _without(head, b"content-length")
            head = head[:-2] + b"Content-Length: %d\r\n\r\n" % len(content)
        if fault == "cut":
            writer.write(head + content[: len(content) // 2])
            await writer.drain()
            writer.close()
            return False
        writer.write(head + content)
        await writer.drain()
        return True

    async def _ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server)
        try:
            writer.write(head + body)
            while True:
                reply = await reader.readuntil(b"\r\n\r\n")
                if not reply.startswith(b"HTTP/1.1 100"):
                    break
            has_body = not head.startswith(b"HEAD") and reply.split()[1] not in (b"204", b"304")
            return reply, await _body(reader, reply) if has_body else b""
        finally:
            writer.close()


def _header(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip()
    return b""


def _without(head: bytes, name: bytes) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if line.partition(b":")[0].lower() != name)


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    if _header(head, b"transfer-encoding") == b"chunked":
        content = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            content += line + await reader.readexactly(size + 2)
            if size == 0:
                return content
    return await reader.readexactly(int(_header(head, b"content-length") or 0))


@contextmanager
def fault_proxy(server: int) -> Iterator[Proxy]:
    """A proxy before the server of this port, in a thread of this process."""
    proxy, loop = Proxy(server), asyncio.new_event_loop()

    async def listen() -> asyncio.AbstractServer:
        return await asyncio.start_server(proxy.handle, "127.0.0.1", 0, limit=1 << 20)

    listening = loop.run_until_complete(listen())
    proxy.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def end() -> None:
        listening.close()
        for task in list(proxy._waiting):
            task.cancel()
        await asyncio.gather(*proxy._waiting, return_exceptions=True)

    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
