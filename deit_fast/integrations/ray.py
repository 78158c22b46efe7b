"""A teacher's pass on Ray: rows are numbers of units, an actor on each GPU holds the teacher.

    python -m deit_fast.integrations.ray --workers 16 --price-per-hour 2.5 FLAGS OF precompute

Ray chooses who computes which unit, and starts actors again that die. What decides about the cache
is `deit_fast.units`: a unit that is published is kept, so the same call resumes after anything, and
one that fails three times is in quarantine and reported. Machines may join and leave at any time.

The paths of images, teacher and cache must be the same on all nodes, or URLs. Credentials are
those of each node: nothing of them passes through Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deit_fast.config import RunConfig
from deit_fast.errors import InputError, first_line
from deit_fast.runtime.progress import Progress, duration
from deit_fast.runtime.signals import SIGNALS, Preempted

log = logging.getLogger("deit_fast")

PASSES = 3  # over the units that failures of machines have left
_FAILURES = 8  # for each worker, without a unit that succeeds between them: all machines fail
_KEPT = "published units stay, the same call computes the others"
_LONGEST_PAUSE = 30.0  # seconds, of a worker whose machine fails
_OBJECT_STORE_BYTES = 200 << 20  # rows are small


def precompute(
    config: RunConfig,
    *,
    blocks: range | None = None,
    workers: int,
    num_gpus: float = 1,
    num_cpus: float = 1,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """Compute units of a configuration on a Ray cluster: that of `ray.init`, or of RAY_ADDRESS,
    else one on this machine that ends with the call.

    Args:
        config: of `precompute`; paths are those of the nodes.
        blocks: numbers of units; None: all.
        workers: actors. Those for which no GPU is free wait until a node joins.
        num_gpus, num_cpus: of each actor.
        price_per_hour: of an actor, in any currency.

    Returns:
        `units`, `computed` and `kept` (counts), `images`, `bytes`, `seconds`, `images_per_s`,
        `worker_hours` (each from the start of its teacher's loading to its last unit), `gpu_hours`,
        `cost` (of the worker hours; None without a price), `quarantined` (as ``Units.compute``),
        `substituted` (paths of unreadable images).

    Raises:
        InputError: wrong settings, a relative path, Ray is not installed, or the cluster of this
            machine has no room for a worker.
        ChildProcessError: units are left after ``PASSES`` passes, or machines only fail; names a
            reason.
        Preempted: SIGTERM, SIGUSR1 or Ctrl-C; published units stay.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    _require_absolute_paths(config)
    ray = _ray()
    from deit_fast.precompute_job import say_substituted

    started = time.perf_counter()
    with (
        restored_handler(),
        _cluster(ray, num_gpus, num_cpus),
        _interruptible(),
        _one_line(ray),
    ):
        total = ray.get(ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_total).remote(config))
        chosen = range(total) if blocks is None else range(blocks.start, min(blocks.stop, total))
        found = _Results(list(chosen))
        with Progress("precompute", len(chosen), unit="unit") as progress:
            for number in range(PASSES):
                if number:
                    log.warning("%s; they are sent again", found.what_is_left())
                for row in _pass(ray, config, found.left(), workers, num_gpus, num_cpus):
                    found.add(row)
                    rate = f"{found.images_per_second():.0f} images/s"
                    progress.advance(not row["error"], figures={"found": rate})
                if not found.left():
                    break
    if found.left():
        raise ChildProcessError(
            f"{found.what_is_left()} after {PASSES} passes over {len(chosen)}; {_KEPT}"
        )
    summary = found.summary(time.perf_counter() - started, num_gpus, price_per_hour)
    say_substituted(summary["substituted"])
    return summary


class _Results:
    """What the rows of workers say of the units asked for.

    Args:
        units: their numbers.
    """

    def __init__(self, units: list[int]) -> None:
        self._units = units
        self._rows: dict[int, dict[str, Any]] = {}
        self._lifetimes: dict[str, float] = {}  # by worker
        self._failures = 0  # since a row without an error
        self._images = 0
        self._substituted: set[str] = set()
        self._started = time.perf_counter()

    def add(self, row: dict[str, Any]) -> None:
        """
        Raises:
            InputError: that of a worker, which each of them would meet.
            ChildProcessError: machines do nothing but fail.
        """
        if row["is_input"]:
            raise InputError(row["error"])
        self._rows[row["unit"]] = row
        worker, lifetime = row["worker"], row["lifetime"]
        self._lifetimes[worker] = max(lifetime, self._lifetimes.get(worker, 0.0))
        self._images += row["images"]
        self._substituted.update(row["substituted"])
        self._failures = self._failures + 1 if row["error"] else 0
        if self._failures >= _FAILURES * len(self._lifetimes):
            raise ChildProcessError(
                f"the last {self._failures} units failed, such as {row['unit']}: {row['error']}; "
                f"{_KEPT}"
            )

    def left(self) -> list[int]:
        """Units that failed on a machine, or that gave no row."""
        rows = self._rows
        return [unit for unit in self._units if unit not in rows or rows[unit]["error"]]

    def what_is_left(self) -> str:
        """How many units, and why one of them is."""
        left = self.left()
        failed = next((unit for unit in left if unit in self._rows), left[0])
        reason = self._rows[failed]["error"] if failed in self._rows else "Ray gave no row of it"
        return f"{len(left)} units are left, such as {failed}: {reason}"

    def images_per_second(self) -> float:
        return self._images / max(time.perf_counter() - self._started, 1e-9)

    def summary(self, seconds: float, gpus: float, price: float | None) -> dict[str, Any]:
        rows, hours = self._rows.values(), sum(self._lifetimes.values()) / 3600
        return {
            "units": len(rows),
            "computed": sum(row["images"] > 0 for row in rows),
            "kept": sum(row["images"] == 0 and not row["quarantined"] for row in rows),
            "images": self._images,
            "bytes": sum(row["bytes"] for row in rows),
            "seconds": round(seconds, 1),
            "images_per_s": round(self._images / seconds, 2),
            "worker_hours": round(hours, 4),
            "gpu_hours": round(hours * gpus, 4),
            "cost": None if price is None else round(hours * price, 4),
            "quarantined": [found for row in rows for found in row["quarantined"]],
            "substituted": sorted(self._substituted),
        }


class _Worker:
    """An actor: the teacher on its device. A failure becomes a row, which Ray does not retry."""

    def __init__(self, config: RunConfig) -> None:
        self._started = time.perf_counter()
        self._name = uuid.uuid4().hex
        self._failures = 0  # since the last unit that did not fail
        from deit_fast.units import Units

        self._units = Units(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = int(row["unit"])
        found: dict[str, Any] = {"images": 0, "bytes": 0, "quarantined": [], "substituted": []}
        error, is_input = "", False
        try:
            found = self._units.compute([unit])
            self._failures = 0
        except InputError as failure:
            error, is_input = str(failure), True
        except Exception as failure:  # of this machine: disk, memory, network
            error = first_line(failure, 300, with_type=True)
            self._failures += 1
            # A failure takes less time than a unit: without a pause this machine would take
            # most of the units from those that work.
            time.sleep(min(2.0**self._failures, _LONGEST_PAUSE))
        return {
            "unit": unit,
            "images": found["images"],
            "bytes": found["bytes"],
            "quarantined": found["quarantined"],
            "substituted": found["substituted"],
            "error": error,
            "is_input": is_input,
            "worker": self._name,
            "lifetime": time.perf_counter() - self._started,
        }


def _pass(
    ray: Any, config: RunConfig, units: list[int], workers: int, gpus: float, cpus: float
) -> Iterator[dict[str, Any]]:
    """The rows of units, in the order in which they end. One row a block of Ray, so that an actor's
    death costs one unit. Ray Data starts actors again and retries their rows without a bound."""
    if not units:
        return
    data = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    rows = data.map(
        _Worker,
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
        num_gpus=gpus,
        num_cpus=cpus,
    )
    yield from rows.iter_rows()


def _total(config: RunConfig) -> int:
    from deit_fast.units import Units

    return Units(config).total


def _require_absolute_paths(config: RunConfig) -> None:
    """
    Raises:
        InputError: a path that other nodes would look for in another folder.
    """
    from deit_fast.storage.urls import is_url

    weights = (config.teacher or "").partition("@")[2]
    for name, path in (
        ("cache", config.cache),
        ("data.root", config.data.root),
        ("teacher", weights),
        ("teacher_classes", config.teacher_classes),
    ):
        if path and not is_url(path) and not os.path.isabs(path):
            raise InputError(
                f"{name}: the path {path} is relative, and each node has a folder of its own: "
                f"give an absolute path that all nodes see, or a URL"
            )


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("Ray is not installed: pip install 'deit-fast[ray]'") from None
    return ray


@contextmanager
def _one_line(ray: Any) -> Iterator[None]:
    """Errors of Ray, which hold the traceback of another process, as what was raised there."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        raise ChildProcessError(f"Ray: {first_line(cause, 300, with_type=True)}") from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGUSR1 interrupt Ray as Ctrl-C does, the only signal that its calls pass on.

    Raises:
        Preempted: one of them came.
    """
    received = signal.SIGINT

    def interrupt(number: int, frame: object) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise Preempted(SIGNALS[received], _KEPT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def restored_handler() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM, and `ray.shutdown` does not give it back. Where
    another block restores Ray's, a process that is forked later loses a SIGTERM that comes while it
    begins: ending a `multiprocessing.Pool` may then wait for ever."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and before is not None:  # None: not installed by Python
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _cluster(ray: Any, gpus: float, cpus: float) -> Iterator[None]:
    """A cluster that is there, or one of this process.

    Raises:
        InputError: that of this process has no room for a worker, which would wait without an end.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if ray.is_initialized():
        _require_room(ray, gpus, cpus, joins=True)
        yield
        return
    joins = bool(os.environ.get("RAY_ADDRESS"))
    if joins:
        ray.init(log_to_driver=False)
    else:  # sends no statistics, serves no page, and writes no token
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        log.info("Ray starts on this machine alone; RAY_ADDRESS names a cluster, auto one of here")
        ray.init(
            address="local",  # else Ray would join any cluster that it finds on this machine
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    try:
        _require_room(ray, gpus, cpus, joins)
        yield
    finally:
        ray.shutdown()


def _require_room(ray: Any, gpus: float, cpus: float, joins: bool) -> None:
    """
    Args:
        joins: whether nodes may join, so that a worker without room may wait.
    """
    there = ray.cluster_resources()
    found_gpus, found_cpus = there.get("GPU", 0), there.get("CPU", 0)
    if found_gpus >= gpus and found_cpus >= cpus:
        return
    text = (
        f"a worker needs {gpus:g} GPUs and {cpus:g} CPU cores, and Ray finds {found_gpus:g} and "
        f"{found_cpus:g}"
    )
    if not joins:
        raise InputError(
            f"{text} on this machine: set RAY_ADDRESS to a cluster that has them, or "
            f"--gpus-per-worker (num_gpus) to 0 for a teacher on the CPU"
        )
    log.warning("%s in the cluster: the work waits until a node joins", text)


def command(words: list[str]) -> str:
    """The command of this module's docstring; returns the text for stdout."""
    from deit_fast.arguments import PrecomputeArguments, columns, number_range, read_settings
    from deit_fast.errors import Quarantined
    from deit_fast.units import quarantine_text

    given = list(words)
    own = {"--workers": "1", "--price-per-hour": "", "--gpus-per-worker": "1"}
    for flag in own:
        if flag in given:
            at = given.index(flag)
            if at + 1 == len(given):
                raise InputError(f"{flag} needs a number")
            own[flag] = given[at + 1]
            del given[at : at + 2]
    numbers = {flag: _number(flag, text) for flag, text in own.items() if text}
    arguments, config = read_settings(PrecomputeArguments, "precompute", given)
    found = precompute(
        config,
        blocks=number_range("--blocks", arguments.blocks),
        workers=int(numbers["--workers"]),
        num_gpus=numbers["--gpus-per-worker"],
        price_per_hour=numbers.get("--price-per-hour"),
    )
    quarantined = found.pop("quarantined")
    found["substituted"] = len(found["substituted"])
    rows = [(name.replace("_", " "), str(value)) for name, value in found.items()]
    text = columns([*rows, ("time", duration(found["seconds"]))])
    if quarantined:
        raise Quarantined(f"{text}\n{quarantine_text(quarantined, str(config.cache))}")
    return text


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9 or (flag == "--workers" and (value < 1 or value % 1)):
        raise InputError(f"{flag} needs a number, not {text[:80]!r}")
    return value


if __name__ == "__main__":
    from deit_fast.cli import main

    sys.exit(main(run=command))
