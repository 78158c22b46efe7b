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
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deit_fast.config import RunConfig
from deit_fast.errors import InputError, first_line
from deit_fast.runtime.progress import Progress, duration

log = logging.getLogger("deit_fast")

PASSES = 3  # over the units that failures of machines have left
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
        `worker_hours` (of computing), `cost` (None without a price), `quarantined` (as
        ``Units.compute``).

    Raises:
        InputError: wrong settings, a relative path, or Ray is not installed.
        ChildProcessError: units are left after ``PASSES`` passes; names a reason.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    _require_absolute_paths(config)
    ray = _ray()
    started = time.perf_counter()
    rows: dict[int, dict[str, Any]] = {}
    with _cluster(ray):
        count = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_total)
        with _one_line(ray):
            total = ray.get(count.remote(config))
        chosen = range(total) if blocks is None else range(blocks.start, min(blocks.stop, total))
        left = list(chosen)
        with Progress("precompute", len(left), unit="unit") as progress:
            for number in range(PASSES):
                if number:
                    reason = next(row["error"] for row in rows.values() if row["error"])
                    log.warning("%d units are left (%s); they are sent again", len(left), reason)
                with _one_line(ray):
                    for row in _pass(ray, config, left, workers, num_gpus, num_cpus):
                        progress.advance(not row["error"])
                        rows[row["unit"]] = row
                left = [unit for unit in chosen if unit not in rows or rows[unit]["error"]]
                if not left:
                    break
    if left:
        reason = rows[left[0]]["error"] if left[0] in rows else "its row was lost"
        raise ChildProcessError(
            f"{len(left)} of {len(chosen)} units are left after {PASSES} passes, such as "
            f"{left[0]}: {reason}; published units stay, the same call computes the others"
        )
    return _summary(rows, time.perf_counter() - started, price_per_hour)


def _summary(
    rows: dict[int, dict[str, Any]], seconds: float, price: float | None
) -> dict[str, Any]:
    images = sum(row["images"] for row in rows.values())
    hours = sum(row["seconds"] for row in rows.values()) / 3600
    return {
        "units": len(rows),
        "computed": sum(row["images"] > 0 for row in rows.values()),
        "kept": sum(row["images"] == 0 and not row["quarantined"] for row in rows.values()),
        "images": images,
        "bytes": sum(row["bytes"] for row in rows.values()),
        "seconds": round(seconds, 1),
        "images_per_s": round(images / seconds, 2),
        "worker_hours": round(hours, 4),
        "cost": None if price is None else round(hours * price, 4),
        "quarantined": [found for row in rows.values() for found in row["quarantined"]],
    }


class _Worker:
    """An actor: the teacher on its device. A failure becomes a row; Ray retries none of them."""

    def __init__(self, config: RunConfig) -> None:
        from deit_fast.units import Units

        self._units = Units(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit, started = int(row["unit"]), time.perf_counter()
        found: dict[str, Any] = {"images": 0, "bytes": 0, "quarantined": []}
        error = ""
        try:
            found = self._units.compute([unit])
        except Exception as failure:  # of this machine: disk, memory, network
            error = first_line(failure, 300, with_type=True)
        return {
            "unit": unit,
            "images": found["images"],
            "bytes": found["bytes"],
            "seconds": time.perf_counter() - started,
            "quarantined": found["quarantined"],
            "error": error,
        }


def _pass(
    ray: Any, config: RunConfig, units: list[int], workers: int, gpus: float, cpus: float
) -> Iterator[dict[str, Any]]:
    """The rows of units, in the order in which they end. One row a block of Ray, so that an actor's
    death costs one unit."""
    if not units:
        return
    data = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    rows = data.map(
        _Worker,
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
        num_gpus=gpus,
        num_cpus=cpus,
        max_restarts=-1,
        max_task_retries=-1,
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
def _cluster(ray: Any) -> Iterator[None]:
    """A cluster that is there, or one of this process."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:  # sends no statistics, serves no page, and writes no token
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            include_dashboard=False, log_to_driver=False, object_store_memory=_OBJECT_STORE_BYTES
        )
    try:
        yield
    finally:
        ray.shutdown()


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
