"""Which views an epoch visits, and in which order; numpy only.

The data set is divided into pairs, anew for every `repeats` views. The members of a pair are
adjacent in the order, so one decoded file serves its repeats and its partner. Order and pairs are
pure functions of the seed: a resumed run seeks, and neither depends on rank or world size.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deit_fast.errors import InputError
from deit_fast.views.rng import Array, Purpose, frozen, permutation
from deit_fast.views.steps import BatchSchedule, RunSteps

# Tables are kept for two readers, the loader and the reader of the teacher cache some steps ahead:
# near the end of an epoch each of them needs another epoch's tables. At 1.28 M samples an epoch's
# order has 15 MB and each other table at most 10 MB.
READERS = 2


@functools.lru_cache(maxsize=READERS)
def pairing(seed: int, num_samples: int, group: int) -> Array:
    """Pairs of a group of views: entries 2k and 2k + 1 are partners; an odd last one has none.

    Args:
        group: view // repeats.

    Returns:
        int64 [num_samples], a permutation, read-only.
    """
    return permutation(seed, num_samples, group, Purpose.PAIRING)


def visiting_order(seed: int, num_samples: int, cycle: int, group: int) -> Array:
    """Samples as cycle ``cycle`` visits them where it is at the views of ``group``.

    Returns:
        int64 [num_samples], a permutation, read-only: the members of a pair side by side.
    """
    pairs = _pair_order(seed, -(-num_samples // 2), cycle)
    members = (2 * pairs[:, None] + np.arange(2)).reshape(-1)  # indices into the pairing
    members = members[members < num_samples]  # an odd last sample has no partner
    return frozen(pairing(seed, num_samples, group)[members])


@dataclass(frozen=True)
class EpochOrder:
    """Which views an epoch visits, and in which order.

    `repeats` epochs form a cycle. Cycle c shuffles the pairs of group c mod (num_views / repeats).
    Epoch s of the cycle takes the s-th part of them and visits each pair at all `repeats` views of
    the group: (a, v), (b, v), (a, v + 1), (b, v + 1), ... So a cycle visits every sample exactly
    once at each of the group's views.

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
        """Fewest views of an epoch; the sample without a partner makes some epochs longer."""
        pairs = -(-self.num_samples // 2)
        return max(self.repeats * (2 * (pairs // self.repeats) - self.num_samples % 2), 0)

    def epoch(self, epoch: int) -> tuple[Array, Array]:
        """Sample ids int64 and view ids int32 of an epoch, in order; read-only."""
        return _epoch_tables(self, epoch)


@functools.lru_cache(maxsize=READERS)
def _epoch_tables(order: EpochOrder, epoch: int) -> tuple[Array, Array]:
    count, repeats = order.num_samples, order.repeats
    cycle, part = divmod(epoch, repeats)
    group = cycle % (order.num_views // repeats)
    pairs = _pair_order(order.seed, -(-count // 2), cycle)
    chosen = pairs[len(pairs) * part // repeats : len(pairs) * (part + 1) // repeats]
    members = 2 * chosen[:, None, None] + np.arange(2)  # [pairs, 1, 2]: indices into the pairing
    members = np.broadcast_to(members, (len(chosen), repeats, 2))
    views = np.broadcast_to(group * repeats + np.arange(repeats)[:, None], members.shape)
    exists = members < count  # an odd last sample has no partner
    samples = pairing(order.seed, count, group)[members[exists]]
    return frozen(samples), frozen(views[exists].astype(np.int32))


@functools.lru_cache(maxsize=READERS)
def _pair_order(seed: int, pairs: int, cycle: int) -> Array:
    return permutation(seed, pairs, cycle, Purpose.ORDER)


class RankBatches(Sequence[Any]):
    """The batches of a whole run for one rank; entries are computed, so `[step]` seeks.

    Args:
        batch_size: samples per step over all ranks.
        schedule: batch sizes of later epochs.

    Attributes:
        steps: epoch and batch size of each step; the subclass sets it.

    Raises:
        InputError: a batch that `world_size` does not divide, or a rank outside of it.
    """

    steps: RunSteps

    def __init__(
        self, batch_size: int, rank: int, world_size: int, schedule: BatchSchedule = ()
    ) -> None:
        self.batch_sizes = ((0, batch_size), *schedule)
        for name, size in self._named_sizes():
            if size % world_size:
                raise InputError(f"{name} is not divisible by {world_size} processes")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not one of {world_size} processes")
        self.rank, self.world_size = rank, world_size

    def _named_sizes(self) -> Iterator[tuple[str, int]]:
        """Each batch size, by its name in a message."""
        for index, (_, size) in enumerate(self.batch_sizes):
            yield f"batch_schedule's batch_size={size}" if index else f"batch_size={size}", size

    def require_parts(self, count: int) -> None:
        """
        Raises:
            InputError: the share of a rank cannot be divided into ``count`` equal parts.
        """
        for name, size in self._named_sizes():
            share = size // self.world_size
            if share % count:
                raise InputError(
                    f"accumulate={count} does not divide the {share} samples of each rank ({name})"
                )

    def __len__(self) -> int:
        return self.steps.total

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[index] for index in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of a run of {len(self)} steps")
        step %= len(self)
        epoch, position = self.steps.locate(step)
        return self._batch(epoch, position, self.steps.phase_of(step).batch_size // self.world_size)

    @abstractmethod
    def _batch(self, epoch: int, position: int, share: int) -> tuple[Any, ...]:
        """Sample ids int64, view ids int32 and perhaps a `BatchMix` of this rank's batch.

        Args:
            position: of the step in its epoch.
            share: samples of each rank.
        """


class TrainBatches(RankBatches):
    """Batches in the order of an `EpochOrder`: `[step]` is (sample ids int64, view ids int32).

    A rank takes a contiguous slice of the global batch, so pairs and repeats stay together, and
    the union over ranks is the same for any world size. Views that fill no batch at the end of an
    epoch are dropped.

    Raises:
        InputError: as `RankBatches`, or a batch that an epoch cannot fill.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, epochs: int, rank: int = 0, world_size: int = 1,
        schedule: BatchSchedule = (),
    ) -> None:  # fmt: skip
        super().__init__(batch_size, rank, world_size, schedule)
        for name, size in self._named_sizes():
            if order.length < size:
                raise InputError(
                    f"an epoch of {order.num_samples} samples with {order.repeats} repeats offers "
                    f"{order.length} views, fewer than one batch of {name}: the largest is "
                    f"--batch-size {order.length // world_size * world_size}"
                )
        self.order = order
        self.steps = RunSteps(order.length, self.batch_sizes, epochs)

    def _batch(self, epoch: int, position: int, share: int) -> tuple[Array, Array]:
        start = (position * self.world_size + self.rank) * share
        samples, views = self.order.epoch(epoch)
        return samples[start : start + share], views[start : start + share]
