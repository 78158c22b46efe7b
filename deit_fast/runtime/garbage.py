"""Python's garbage collector, paused so that no rank makes the others wait for a collection."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_paused = 0  # open gc_paused blocks that turned automatic collection off


def _enable_in_child() -> None:
    # A loader process lives as long as the run, and nothing in it collects explicitly.
    if _paused:
        gc.enable()


os.register_at_fork(after_in_child=_enable_in_child)


@contextmanager
def gc_paused() -> Iterator[Callable[[], None]]:
    """Turn automatic garbage collection off inside the block; call ``gc.collect`` between steps.

    Yields a function that excludes every object alive now from later collections. It is called
    once at the start; call it again after the first step has compiled. A collection then takes
    1 ms instead of 290 ms, and leaves untouched the memory that forked loader processes share.
    Processes forked inside the block collect automatically.
    """
    global _paused
    was_enabled = gc.isenabled()
    may_freeze = gc.get_freeze_count() == 0  # gc.unfreeze would release objects of other owners

    def freeze() -> None:
        gc.collect()
        if may_freeze:
            gc.freeze()

    gc.disable()
    _paused += was_enabled
    freeze()
    try:
        yield freeze
    finally:
        _paused -= was_enabled
        if may_freeze:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
