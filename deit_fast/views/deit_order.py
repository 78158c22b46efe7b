"""`compat = "deit"`: order and mixing as in DeiT's own code, for an online teacher or none.

The order is that of RASampler (facebookresearch/deit samplers.py; timm's RepeatAugSampler gives the
same lists). Mixing is timm's `Mixup` in mode `batch`: one choice, lambda and box for each rank's
batch, which is mixed with its own reverse. A finished view therefore depends on batch size, rank
and world size, and no cache can hold it. Crop, flip, augmentation and erasing stay the engine's:
those of view ``epoch * repeats + repeat`` of the sample. Mixing is drawn by view.seed, step and
rank, not from numpy's stream, so a resumed run seeks here too.

Differences from DeiT: a single process takes this order as well (DeiT's own shuffles without
repeats then), and the CutMix box is that of ``CUTMIX_FORM``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from deit_fast.config import ViewConfig
from deit_fast.errors import InputError
from deit_fast.views.order import RankBatches
from deit_fast.views.plan import BatchMix
from deit_fast.views.rng import Array, Purpose, draw_mix, frozen
from deit_fast.views.steps import RunSteps

_ROUND = 256  # RASampler cuts an epoch to a multiple of this many views over all ranks


class DeitBatches(RankBatches):
    """Batches in RASampler's order: `[step]` is (sample ids int64, view ids int32, `BatchMix`).

    The order depends on the epoch alone, not on view.seed, as in DeiT.

    Raises:
        InputError: as `RankBatches`, a share of the batch that is odd, or a batch that an epoch
            cannot fill.
    """

    def __init__(
        self,
        view: ViewConfig,
        num_samples: int,
        batch_size: int,
        epochs: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, rank, world_size)
        share = batch_size // world_size
        if share % 2:
            raise InputError(
                f"compat=deit mixes each process's share of a batch with its own reverse, so it "
                f"must be even: batch_size={batch_size} gives {world_size} processes {share} each"
            )
        offered = _views_per_rank(num_samples, view.repeats, world_size)
        if offered < share:
            raise InputError(
                f"under compat=deit an epoch of {num_samples} samples offers each of {world_size} "
                f"processes {offered} views, fewer than its {share} of batch_size={batch_size}: "
                f"the largest is --batch-size {offered // 2 * 2 * world_size}"
            )
        self.view, self.num_samples = view, num_samples
        self.steps = RunSteps(offered * world_size, self.batch_sizes, epochs)

    def _batch(self, epoch: int, position: int, share: int) -> tuple[Array, Array, BatchMix]:
        # Rank r has entries r, r + world_size, ... of the list of all ranks, which begins again
        # at its end.
        entries = np.arange(position * share, (position + 1) * share)
        entries = self.rank + self.world_size * entries
        repeats = self.view.repeats
        indices, repeat = np.divmod(entries % (self.num_samples * repeats), repeats)
        samples = _shuffled(self.num_samples, epoch)[indices]
        views = (epoch * repeats + repeat).astype(np.int32)
        step = np.array([self.steps.first(epoch) + position])
        kind, box, lam = draw_mix(self.view, step, np.array([self.rank]), Purpose.BATCH_MIX)
        top, left, height, width = box[0].tolist()
        return samples, views, BatchMix(int(kind[0]), (top, left, height, width), int(lam[0]))


def _views_per_rank(num_samples: int, repeats: int, world_size: int) -> int:
    """Length of RASampler's list for a rank; below 256 samples timm's, since DeiT's is 0."""
    if num_samples < _ROUND:
        return min(-(-num_samples // world_size), -(-num_samples * repeats // world_size))
    return num_samples // _ROUND * _ROUND // world_size


@functools.lru_cache(maxsize=1)  # the loader is the only reader: there is no cache to read ahead
def _shuffled(num_samples: int, epoch: int) -> Array:
    generator = torch.Generator().manual_seed(epoch)
    return frozen(torch.randperm(num_samples, generator=generator).numpy())
