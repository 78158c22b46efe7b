"""Where a sample's record stands in a view's file.

A cache without an order has sample i's record at position i. With the order "pairs", a view's
records stand as training first visits them (`views.order.visiting_order`): it reads each file from
front to back, and the records of a step side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deit_fast.errors import CacheError, InputError
from deit_fast.views.order import READERS, visiting_order
from deit_fast.views.rng import Array, frozen

ORDERS = ("pairs",)
_INT64 = np.dtype(np.int64)


@dataclass(frozen=True)
class RecordOrder:
    """By sample id; the base of the other order.

    Args:
        num_samples: samples of the data set, which is records of a view.
    """

    num_samples: int

    def positions(self, samples: Array, views: Array) -> Array:
        """Position of each record in its view's file, int64.

        Args:
            samples: int64 [n].
            views: int64 [n], or one for all.

        Raises:
            InputError: an id out of range, or shapes that differ, where this matters here.
        """
        return samples

    def samples(self, view: int, start: int, stop: int) -> Array:
        """Sample ids of the records at positions [start, stop) of a view, int64."""
        return np.arange(start, stop)


@dataclass(frozen=True)
class PairOrder(RecordOrder):
    """As the cycle of training that first visits a view goes through its pairs.

    The tables of a group of `repeats` views take 15 MB for 1.28 million samples and 0.6 s, once;
    most of that time makes the pairs, which the loader needs as well.
    """

    seed: int
    repeats: int

    def positions(self, samples: Array, views: Array) -> Array:
        _require_below(self.num_samples, samples, "sample")
        _require_below(2**31, views, "view")
        groups = views // self.repeats
        if groups.size == 0:
            return samples
        first = int(groups.flat[0])
        if groups.ndim == 0 or (groups == first).all():
            return self._tables(first)[1][samples].astype(np.int64)
        if groups.shape != samples.shape:
            raise InputError("sample and view ids must be [n], of the same length n")
        positions = np.empty(samples.shape, np.int64)
        for group in np.unique(groups).tolist():
            rows = groups == group
            positions[rows] = self._tables(group)[1][samples[rows]]
        return positions

    def samples(self, view: int, start: int, stop: int) -> Array:
        return self._tables(view // self.repeats)[0][start:stop].copy()

    def _tables(self, group: int) -> tuple[Array, Array]:
        return _pair_tables(self.seed, self.num_samples, group)


def _require_below(limit: int, ids: Array, name: str) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        wrong = ids[(ids < 0) | (ids >= limit)].flat[0]
        raise InputError(f"{name} id {wrong} is not in [0, {limit})")


# All caches of one view set share them.
@functools.lru_cache(maxsize=READERS)
def _pair_tables(seed: int, num_samples: int, group: int) -> tuple[Array, Array]:
    """Sample ids int64 by position, and positions by sample id."""
    samples = visiting_order(seed, num_samples, cycle=group, group=group)
    positions = np.empty(num_samples, np.int64 if num_samples > 2**31 else np.int32)
    positions[samples] = np.arange(num_samples)
    return samples, frozen(positions)


def record_order(manifest: Mapping[str, Any], where: str = "manifest") -> RecordOrder:
    """The order of a cache's records, from its manifest.

    Raises:
        CacheError: an unknown order, or one without the seed and repeats of its views; the message
            starts with ``where``.
    """
    count = manifest["num_samples"]
    if "order" not in manifest:
        return RecordOrder(count)
    if manifest["order"] not in ORDERS:
        known = " or ".join(map(repr, ORDERS))
        raise CacheError(f"{where}: order must be {known}, not {manifest['order']!r}")
    found = {}
    for name, least in (("seed", 0), ("repeats", 1)):
        value = manifest["fingerprint"].get(f"view.{name}")
        if type(value) is not int or not least <= value < 2**63:
            raise CacheError(
                f"{where}: order {manifest['order']!r} needs view.{name} in the fingerprint, "
                f"a number of at least {least}, not {value!r}"
            )
        found[name] = value
    return PairOrder(count, **found)


def host_ids(ids: Any, name: str) -> np.ndarray:
    """Contiguous int64 in host memory."""
    if type(ids) is np.ndarray and ids.dtype is _INT64 and ids.flags.c_contiguous:
        return ids  # the usual case; the checks below take as long as thirty records
    is_tensor = not isinstance(ids, np.ndarray) and hasattr(ids, "numpy")
    values = ids.numpy(force=True) if is_tensor else np.asarray(ids)
    if values.dtype == np.int64 and values.flags.c_contiguous:
        return values
    if values.size and values.dtype.kind not in "iu":
        raise InputError(f"{name} ids must be integers, not {values.dtype}")
    return np.asarray(values, np.int64, order="C")
