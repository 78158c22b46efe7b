"""`compat = "deit"`: order and mixing as DeiT's own code has them, for online teachers or none.

The order is RASampler's (facebookresearch/deit samplers.py; timm's RepeatAugSampler gives the same
lists). Mixing is timm's `Mixup` in mode `batch`: one choice, lambda and box for each rank's batch,
which meets its own reverse. So a finished view depends on batch size, rank and world size, and no
cache can hold it. What stays the engine's own: crop, flip, augmentation and erasing are those of
view ``epoch * repeats + repeat`` of the sample, and mixing is drawn from a counter, by seed, step
and rank, not from numpy's stream; so a resume is a seek here too.

What differs from DeiT: a single process takes this order as well (DeiT's own then shuffles without
repeats), and a batch has the box of ``CUTMIX_FORM``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deit_fast.config import ViewRecipe
from deit_fast.errors import InputError
from deit_fast.views.plan import BatchMix
from deit_fast.views.rng import Purpose, draw_mix, frozen

_ROUND = 256  # RASampler cuts an epoch to a multiple of this many views over all ranks


class DeitBatches(Sequence[tuple[np.ndarray, np.ndarray, BatchMix]]):
    """The batches of a whole run for one rank, as `order.TrainBatches`; `[step]` seeks.

    An entry holds sample ids int64, view ids int32 and how the batch is mixed. The order depends on
    the epoch alone, not on the seed, as in DeiT.

    Args:
        batch_size: samples per step over all ranks.

    Raises:
        InputError: a batch that ``world`` does not divide or divides into odd shares, or that an
            epoch cannot fill.
    """

    def __init__(
        self,
        recipe: ViewRecipe,
        seed: int,
        num_samples: int,
        batch_size: int,
        epochs: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise InputError(f"batch_size={batch_size} is not divisible by {world} processes")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} is not one of {world} processes")
        share = batch_size // world
        if share % 2:
            raise InputError(
                f"compat=deit mixes each process's share of a batch with its own reverse, so it "
                f"must be even: batch_size={batch_size} gives {world} processes {share} each"
            )
        offered = _views_per_rank(num_samples, recipe.repeats, world)
        if offered < share:
            raise InputError(
                f"under compat=deit an epoch of {num_samples} samples offers each of {world} "
                f"processes {offered} views, fewer than its {share} of batch_size={batch_size}"
            )
        self.recipe, self.seed, self.num_samples = recipe, seed, num_samples
        self.share, self.epochs, self.rank, self.world = share, epochs, rank, world
        self.steps_per_epoch = offered // share

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[index] for index in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of a run of {len(self)} steps")
        step %= len(self)
        epoch, position = divmod(step, self.steps_per_epoch)
        places = np.arange(position * self.share, (position + 1) * self.share)
        samples, repeats = ra_sampler(
            self.num_samples, self.recipe.repeats, epoch, self.rank + self.world * places
        )
        views = (epoch * self.recipe.repeats + repeats).astype(np.int32)
        kind, box, lam = draw_mix(
            self.recipe, self.seed, np.array([step]), np.array([self.rank]), Purpose.BATCH_MIX
        )
        top, left, height, width = box[0].tolist()
        return samples, views, BatchMix(int(kind[0]), (top, left, height, width), int(lam[0]))


def ra_sampler(
    num_samples: int, repeats: int, epoch: int, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Entries of RASampler's list of all ranks, of which rank r has those at r, r + world, ...

    Args:
        places: integers [n], not negative; behind the list's end it begins again.

    Returns:
        Sample ids and which repeat of the sample an entry is, int64 [n] each.
    """
    units, which = np.divmod(places % (num_samples * repeats), repeats)
    return _shuffled(num_samples, epoch)[units], which


def _views_per_rank(num_samples: int, repeats: int, world: int) -> int:
    """Length of RASampler's list for a rank; for under 256 samples timm's, DeiT's being 0."""
    if num_samples < _ROUND:
        return min(-(-num_samples // world), -(-num_samples * repeats // world))
    return num_samples // _ROUND * _ROUND // world


@functools.lru_cache(maxsize=1)
def _shuffled(num_samples: int, epoch: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(epoch)
    return frozen(torch.randperm(num_samples, generator=generator).numpy())
