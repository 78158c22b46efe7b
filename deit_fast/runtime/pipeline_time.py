"""How long a batch takes where loading and computing overlap."""

from __future__ import annotations

import os


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
