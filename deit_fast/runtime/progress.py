"""How far the work is: a bar on a terminal, elsewhere a line of the log now and then.

The bar's name, bar, share and time left are always there. Figures follow as far as the terminal is
wide enough.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

log = logging.getLogger("deit_fast")

FIGURES = ("found", "speed", "loss", "top1", "lr", "wait")  # the last ones need the widest terminal
_BAR, _NAME = 24, 30  # columns of the bar, and of a name at most
_FIXED = 1 + _BAR + 1 + len("100 %") + 1 + len("00:00:00")  # beside the name


class Progress:
    """Counts the units of a work.

    A terminal that can move its cursor shows the bar of the first rank. Without one, lines go to
    the log.

    Args:
        label: names the work.
        total, done: number of units, and how many an earlier process did.
        unit: name of a unit.
        paced: show the rate beside the bar, and log it with the time left every 30 s, every 5 %
            that took a second, and at the end. Otherwise the caller gives lines and figures.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, unit: str = "step", paced: bool = True
    ) -> None:
        self._label, self._total, self._units, self._paced = label, total, f"{unit}s", paced
        self._done = self._earlier = self._logged = done
        self._started = self._logged_at = time.perf_counter()
        self._figures = ""
        self._bar = None
        if (console := _terminal()) is not None:
            self._bar = _create_bar(console)
            fields: dict[str, Any] = dict.fromkeys(FIGURES, "")
            self._task = self._bar.add_task(_short(label), total=total, completed=done, **fields)
            self._part = self._bar.add_task("", total=1, visible=False, **fields)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._paced and self._done > self._logged and self._age() >= 1:
            log.info("%s", self._pace_text())

    def advance(
        self, count: int = 1, line: str = "", figures: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Count ``count`` units more.

        Args:
            line: logged where there is no bar.
            figures: texts beside the bar, or in the lines of a paced work, by the names of
                ``FIGURES``; others stay.
        """
        self._done += count
        if figures:
            self._figures = "".join(f"{text}, " for text in figures.values())
        if self._bar is None:
            if line := self._due_text() if self._paced else line:
                log.info("%s", line)
            return
        texts: dict[str, Any] = dict(figures)
        if self._paced:
            texts["speed"] = f"{_short_rate(self._rate())} {self._units}/s"
        self._bar.update(self._task, advance=count, **texts)

    def show(self, figures: Mapping[str, str]) -> None:
        """Change texts beside the bar."""
        self.advance(0, figures=figures)

    def go_back(self, done: int) -> None:
        """Count from ``done`` again."""
        self._done = self._earlier = self._logged = done
        self._started = self._logged_at = time.perf_counter()
        if self._bar is not None:
            self._bar.reset(self._task, completed=done, total=self._total)

    def counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """``batches`` of (images, labels, ...); counts the labels of each after its use."""
        for batch in batches:
            yield batch
            self.advance(len(batch[1]))

    @contextmanager
    def part(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a second bar below the first; yields what counts one of its ``total`` units."""
        if (bar := self._bar) is None:
            yield lambda: None
            return
        bar.reset(self._part, total=total, visible=True, description=label)
        try:
            yield lambda: bar.advance(self._part)
        finally:
            bar.update(self._part, visible=False)

    def _age(self) -> float:
        return time.perf_counter() - self._started

    def _rate(self) -> float:
        """Units a second of this process."""
        return (self._done - self._earlier) / max(self._age(), 1e-9)

    def _due_text(self) -> str:
        """A line for the log, empty where none is due."""
        since, new = time.perf_counter() - self._logged_at, self._done - self._logged
        share = new / self._total
        return "" if since < 1 or (since < 30 and share < 0.05) else self._pace_text()

    def _pace_text(self) -> str:
        self._logged_at, self._logged = time.perf_counter(), self._done
        rate = self._rate()
        text = (
            f"{self._label}: {self._done} of {self._total} {self._units} "
            f"({100 * self._done / self._total:.0f} %), {_short_rate(rate)} {self._units}/s, "
            f"{self._figures}"
        )
        if self._done == self._total:
            return f"{text}{duration(self._age())} in all"
        if not rate:
            return f"{text}{duration(self._age())} so far"
        return f"{text}{duration((self._total - self._done) / rate)} left"


def _short_rate(rate: float) -> str:
    """Whole from 10 on, below with two digits that count."""
    return f"{rate:.0f}" if rate >= 9.95 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 5 s`, `6 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _terminal() -> Console | None:
    """stderr of the first rank, where it is a terminal that can draw a bar again.

    rich alone would take a pipe for a terminal where FORCE_COLOR is set.
    """
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _short(label: str) -> str:
    return label if len(label) <= _NAME else f"…{label[1 - _NAME :]}"


def _create_bar(console: Console) -> RichProgress:
    """A bar that leaves out the figures for which the terminal is too narrow."""
    from rich import progress

    fixed = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(_BAR),
        progress.TextColumn("{task.percentage:>3.0f} %"),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    figures = {
        name: progress.TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in FIGURES
    }

    class Bar(progress.Progress):
        def get_renderables(self) -> Iterable[Any]:
            tasks = [task for task in self.tasks if task.visible]
            room = (
                console.width - _FIXED - max((len(task.description) for task in tasks), default=0)
            )
            columns: list[progress.ProgressColumn] = [*fixed]
            for name, column in figures.items():
                width = max((len(task.fields[name]) for task in tasks), default=0)
                room -= width + 1 if width else 0
                if room < 0:
                    break
                if width:
                    columns.append(column)
            self.columns = tuple(columns)
            return super().get_renderables()

    # Steps may take many seconds: with few of them in its period, the time left would jump.
    return Bar(*fixed, console=console, speed_estimate_period=120)


def _leave_terminal() -> None:
    """In a forked child, whose copy of the bar nobody draws: write past it."""
    with suppress(AttributeError):
        sys.stdout = sys.stdout.rich_proxied_file  # type: ignore[union-attr]
    with suppress(AttributeError):
        sys.stderr = sys.stderr.rich_proxied_file  # type: ignore[union-attr]


os.register_at_fork(after_in_child=_leave_terminal)
