"""Names of runs in messages, where one process has several."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("deit_fast")


def short_names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish the runs."""
    parts = [path.absolute().parts for path in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in runs]


@contextmanager
def log_prefix(name: str) -> Iterator[None]:
    """What this thread logs inside the block begins with ``name``; an empty one adds nothing."""
    if not name:
        yield
        return
    thread = threading.get_ident()

    def add(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            shown = name.replace("%", "%%") if record.args else name
            record.msg = f"{shown}: {record.msg}"
        return True

    log.addFilter(add)
    try:
        yield
    finally:
        log.removeFilter(add)
