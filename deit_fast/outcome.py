"""What a verb of the command line hands back, and how its text is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deit_fast.errors import InputError


@dataclass(frozen=True)
class Outcome:
    """What a verb leaves: text for stdout and the exit status."""

    text: str
    status: int = 0


def columns(rows: list[tuple[str, str]], indent: str = "") -> str:
    """Names and values, one pair a line, the values aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{indent}{name:<{width}}  {text}".rstrip() for name, text in rows)


def plain(value: Any) -> str:
    """A value without brackets."""
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def size_text(count: float) -> str:
    """`17 bytes`, `1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def view_range(text: str | None) -> range | None:
    """The value of `--views A:B`.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise InputError(f"--views needs A:B, two whole numbers with A < B, not {text!r}")
    return range(int(start), int(stop))
