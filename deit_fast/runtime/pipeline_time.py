"""How long a batch takes where loading and computing overlap."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Repeated(Sequence[T]):
    """The items over and over, as often as anyone asks."""

    def __init__(self, items: Sequence[T]) -> None:
        self._items = items

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> T:  # type: ignore[override]
        return self._items[index % len(self._items)]


def seconds_per_batch(finished: Iterable[object], *, workers: int, seconds: float) -> float:
    """Seconds between two batches of a running pipeline, measured for about ``seconds``.

    Workers that start together also finish together, so their batches come in rounds of ``workers``
    at first. Only whole rounds are counted. The first round and one batch more are not: they
    include the start of the workers. Where these take longer than ``seconds``, or all twice as
    long, one batch has to do.

    Args:
        finished: gives a value when the work of a batch is done; at least two rounds and a batch.
        workers: loading processes.
        seconds: after which no further round is begun.
    """
    a_round = max(1, workers)
    count = -a_round - 1
    begun = time.perf_counter()
    started = mean = 0.0
    for _ in finished:
        now = time.perf_counter()
        count += 1
        if count == 0 or (count < 0 and now - begun > seconds):
            count, started = 0, now
        is_late = now - begun > 2 * seconds
        if count > 0 and (count % a_round == 0 or is_late):
            mean = (now - started) / count
            if is_late or now - started >= seconds:
                break
    return mean


def images_to_time(per_image: float, *, workers: int, seconds: float, most: int) -> int:
    """Images of a batch, so that ``seconds_per_batch`` sees four batches or two rounds.

    Args:
        per_image: seconds to load an image in one process and to compute on it.
        workers, seconds: as of ``seconds_per_batch``.
        most: images of a batch of the real work.
    """
    return max(1, min(most, int(seconds / max(4, 2 * workers) / max(per_image, 1e-9))))


def pipeline_seconds(
    loading: float, computing: float, *, workers: int, threads: int, processes: int = 1
) -> float:
    """Seconds between two batches.

    Loading is spread over ``workers`` cores, and computing over ``threads``. Both overlap, unless
    they need more cores than there are: then their work is shared out over all cores.

    Args:
        loading: seconds of one batch in one process.
        computing: seconds of one batch on the device, or on ``threads`` cores.
        workers: loading processes; 0: the computing process loads.
        threads: cores that computing takes; 0: a GPU computes.
        processes: of the run, on this machine.

    Returns:
        On a CPU whose cores all compute this is the sum of both, on a GPU the larger.
    """
    cores = max(1, usable_cores() // processes)
    if not workers:
        return loading + computing
    work = loading + computing * min(threads, cores)
    return max(loading / min(workers, cores), computing, work / cores)


def loading_processes(workers: int | None) -> int:
    """Processes of a loader: as set, or up to four that leave a core for computing."""
    if workers is not None:
        return workers
    return max(1, min(4, usable_cores() // processes_here() - 1))


def processes_here() -> int:
    """Processes of the run on this machine, as torchrun says."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
