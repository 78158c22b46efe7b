"""What a data set holds beside its samples."""

from __future__ import annotations


class LeftOut:
    """Counts what a split holds beside its samples, by kind, and names the first of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        count, first = self._found.get(kind, (0, name))
        self._found[kind] = count + 1, first

    def merge(self, other: LeftOut) -> None:
        """Add what another one has counted."""
        for kind, (count, first) in other._found.items():
            known, name = self._found.get(kind, (0, first))
            self._found[kind] = known + count, name

    def first(self, kind: str) -> str:
        """Name of the first of a kind; empty if there is none."""
        return self._found.get(kind, (0, ""))[1]

    def __str__(self) -> str:
        """`3 links (first: 'a.tar/1.jpg'); ...`, empty if there is nothing."""
        return "; ".join(
            f"{count} {kind} (first: {first!r})" for kind, (count, first) in self._found.items()
        )
