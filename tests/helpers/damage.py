"""Damage to files, and things in place of files that are none."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096


def damaged(content: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """At most ``count`` damaged copies, the same in each call: a flipped bit, a page of zeros, a
    cut. A page that was zero is left out.
    """
    chosen = random.Random(len(content))
    size = len(content)
    for number in range(count):
        kind, at = number % 4, chosen.randrange(size)
        page = at // PAGE * PAGE
        if kind < 2:
            changed = bytearray(content)
            changed[at] ^= 1 << (bit := chosen.randrange(8))
            yield f"bit {bit} of byte {at}", bytes(changed)
        elif kind == 2:
            zeros = bytes(len(content[page : page + PAGE]))
            if content[page : page + PAGE] != zeros:
                yield f"page at {page}", content[:page] + zeros + content[page + PAGE :]
        else:
            line = content.rfind(b"\n", 0, at) + 1
            cut = [0, size - 1, size - 2, size - 22, line, page, at][number // 4 % 7]
            yield f"cut to {cut} of {size} bytes", content[:cut]


def _link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


NO_FILES: dict[str, Callable[[Path], None]] = {
    "FIFO": lambda path: os.mkfifo(path),
    "link": _link_to_nothing,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
}
"""What puts each of them at a path where nothing is."""


@contextmanager
def not_waiting(seconds: int = 60) -> Iterator[None]:
    """Raise TimeoutError where the block waits for a FIFO or reads a device for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
