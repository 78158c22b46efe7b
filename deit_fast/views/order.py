"""Which views an epoch visits, in which order, and who is mixed with whom; numpy only.

The data set falls into pairs, anew for every `repeats` views. Both members of a pair stand side by
side in the order, so one decoded file serves its repeats and its partner. Order and pairs are pure
functions of the seed: resume is a seek, and neither depends on rank or world size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deit_fast.errors import InputError
from deit_fast.views.rng import Array, Purpose, frozen, permutation


@functools.lru_cache(maxsize=4)
def pairing(seed: int, num_samples: int, group: int) -> Array:
    """Pairs of a group of views: entries 2k and 2k + 1 are partners; an odd last one is alone.

    Args:
        group: view // repeats.

    Returns:
        int64 [num_samples], a permutation, read-only. The last four are kept (1 s each at 1.28 M).
    """
    return permutation(seed, num_samples, group, Purpose.PAIRING)


@dataclass(frozen=True)
class EpochOrder:
    """Which views an epoch visits, and in which order.

    `repeats` epochs form a cycle. Cycle c takes the pairs of group c mod (num_views / repeats) in
    an order of its own; epoch s of the cycle takes the s-th part of them, each pair at all
    `repeats` views of the group: (a, v), (b, v), (a, v + 1), (b, v + 1), ... So a cycle visits
    every sample exactly once at each of its views, and one decoded file serves its repeats and its
    partner.

    Args:
        num_views: distinct views per sample, a multiple of `repeats`.
    """

    seed: int
    num_samples: int
    num_views: int
    repeats: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.repeats < 1:
            raise InputError(
                f"an order needs samples and repeats, not {self.num_samples} and {self.repeats}"
            )
        if self.num_views < 1 or self.num_views % self.repeats:
            raise InputError(
                f"num_views must be a positive multiple of view.repeats={self.repeats}, "
                f"not {self.num_views}"
            )

    @property
    def length(self) -> int:
        """Views that every epoch offers at least (an odd sample out may be missing from a part)."""
        units = -(-self.num_samples // 2)
        return max(self.repeats * (2 * (units // self.repeats) - self.num_samples % 2), 0)

    def epoch(self, epoch: int) -> tuple[Array, Array]:
        """Sample ids int64 and view ids int32 of an epoch, in order; read-only, last one kept."""
        return _epoch(self, epoch)


class TrainBatches(Sequence[tuple[Array, Array]]):
    """The batches of a whole run for one rank: `[step]` gives (sample ids int64, view ids int32).

    A rank takes a contiguous slice of the global batch, so pairs and repeats stay together, and
    the union over ranks is the same for any `world`. What fills no batch at an epoch's end is
    dropped.

    Args:
        batch_size: samples per step over all ranks.

    Raises:
        InputError: a batch that `world` does not divide or that an epoch cannot fill.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, epochs: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise InputError(f"batch_size={batch_size} is not divisible by {world} processes")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} is not one of {world} processes")
        if order.length < batch_size:
            raise InputError(
                f"an epoch of {order.num_samples} samples with {order.repeats} repeats offers "
                f"{order.length} views, fewer than one batch of batch_size={batch_size}"
            )
        self.order, self.batch_size, self.epochs = order, batch_size, epochs
        self.rank, self.world = rank, world
        self.steps_per_epoch = order.length // batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[index] for index in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of a run of {len(self)} steps")
        epoch, position = divmod(step % len(self), self.steps_per_epoch)
        share = self.batch_size // self.world
        start = position * self.batch_size + self.rank * share
        samples, views = self.order.epoch(epoch)
        return samples[start : start + share], views[start : start + share]


@functools.lru_cache(maxsize=1)
def _epoch(order: EpochOrder, epoch: int) -> tuple[Array, Array]:
    count, repeats = order.num_samples, order.repeats
    cycle, part = divmod(epoch, repeats)
    group = cycle % (order.num_views // repeats)
    units = _unit_order(order.seed, -(-count // 2), cycle)
    chosen = units[len(units) * part // repeats : len(units) * (part + 1) // repeats]
    members = 2 * chosen[:, None, None] + np.arange(2)  # [pairs, 1, 2]: places in the pairing
    members = np.broadcast_to(members, (len(chosen), repeats, 2))
    views = np.broadcast_to(group * repeats + np.arange(repeats)[:, None], members.shape)
    real = members < count  # the odd sample out has no partner
    samples = pairing(order.seed, count, group)[members[real]]
    return frozen(samples), frozen(views[real].astype(np.int32))


@functools.lru_cache(maxsize=1)
def _unit_order(seed: int, units: int, cycle: int) -> Array:
    return permutation(seed, units, cycle, Purpose.ORDER)


@functools.lru_cache(maxsize=4)
def partner_table(seed: int, num_samples: int, group: int) -> Array:
    """Partner of every sample, int64 [num_samples]: an involution with at most one fixed point."""
    order = pairing(seed, num_samples, group)
    partner = np.arange(num_samples)
    even = num_samples // 2 * 2
    partner[order[0:even:2]] = order[1:even:2]
    partner[order[1:even:2]] = order[0:even:2]
    return frozen(partner)
