"""Python's garbage collector, kept from pausing one rank while the others wait for it."""

from __future__ import annotations

import gc
import os

_held = 0  # open blocks of Collection that turned it off


def _enable_in_child() -> None:
    # A loader's process lives as long as the run and has nobody who collects for it.
    if _held:
        gc.enable()


os.register_at_fork(after_in_child=_enable_in_child)


class Collection:
    """Automatic collection is off inside the block; ``collect`` does it where a pause is due.

    What start-up made is frozen: looked at no more, which makes a collection short (1 ms instead of
    290), and left alone in the memory that loader processes share. In those, forked inside the
    block, automatic collection is on.
    """

    def __enter__(self) -> Collection:
        global _held
        self._was_on = gc.isenabled()
        self._may_freeze = gc.get_freeze_count() == 0  # else someone else's would be thawed too
        gc.disable()
        _held += self._was_on
        self.freeze()
        return self

    def freeze(self) -> None:
        """What is alive now stays; called at the start, and after the first step has compiled."""
        gc.collect()
        if self._may_freeze:
            gc.freeze()

    def collect(self) -> None:
        """Free the cycles made since."""
        gc.collect()

    def __exit__(self, *_: object) -> None:
        global _held
        _held -= self._was_on
        if self._may_freeze:
            gc.unfreeze()
        if self._was_on:
            gc.enable()
