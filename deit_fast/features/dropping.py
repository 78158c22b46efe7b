"""Which teachers an image learns from in a step, where some are left out.

The draws are a function of run seed, sample, view, step and teacher alone: batches may be split in
any way over ranks and parts, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deit_fast.views.rng import Purpose, below, key, philox

MAX_TEACHERS = 32


def draw_kept(
    seed: int,
    sample_ids: Tensor,
    view_ids: Tensor,
    step: int,
    teachers: int,
    at_least_one: bool = False,
) -> Tensor:
    """Keep each teacher with probability 1/2, independently for each image.

    Args:
        seed: of the run.
        sample_ids, view_ids: int [B], on the host.
        step: position in the order.
        teachers: number K of teachers, at most 32.
        at_least_one: an image that would keep none keeps one that is drawn uniformly.

    Returns:
        float32 [B, K] on the host: 1 for a kept teacher, 0 for one that is left out.
    """
    assert 1 <= teachers <= MAX_TEACHERS
    samples, views = sample_ids.numpy(), view_ids.numpy()
    coins, choice, _, _ = philox(samples, views, step, Purpose.TEACHER, key(seed))
    numbers = torch.arange(teachers)
    kept = (torch.from_numpy(coins.astype("int64"))[:, None] >> numbers) & 1 > 0
    if at_least_one:
        chosen = torch.from_numpy(below(choice, np.asarray(teachers)))
        kept |= ~kept.any(1, keepdim=True) & (numbers == chosen[:, None])
    return kept.float()


def keep_highest(kept: Tensor, losses: Tensor) -> Tensor:
    """Keep the teacher of highest loss too (DUNE, Sariyildiz et al. 2025).

    Args:
        kept: float [B, K], 1 or 0.
        losses: of each image with each teacher, float [B, K]; of equal losses the first counts.

    Returns:
        As ``kept``, on the device of the losses. No gradient flows through it.
    """
    kept = kept.to(losses.device)
    return kept.scatter(1, losses.detach().argmax(1, keepdim=True), 1.0)
