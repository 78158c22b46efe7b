"""What the answers in a cache are like, from a sample of its records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deit_fast.cache.reader import LogitCache
from deit_fast.errors import CacheError
from deit_fast.kernels import TopK

BLOCKS, RECORDS_PER_BLOCK = 64, 128  # a block is read whole to be verified


@dataclass(frozen=True)
class Answers:
    """Records drawn from a cache: whose they are, and what the teacher said.

    Attributes:
        samples, views: int64 [n].
        top1: the teacher's class, int64 [n].
        entropy: of its answer, nats, float64 [n]; none for `hard`. What `topk` left out counts as
            spread evenly, so it is an upper bound there.
        tau: temperature of ``entropy``.
    """

    samples: np.ndarray
    views: np.ndarray
    top1: np.ndarray
    entropy: np.ndarray | None
    tau: float


def draw_answers(cache: LogitCache, seed: int = 0) -> Answers:
    """Records of up to 64 random blocks of the complete views.

    Raises:
        CacheError: no view is complete, or a block is damaged.
    """
    samples, views = _draw(cache, BLOCKS, RECORDS_PER_BLOCK, seed)
    tau = float((cache.manifest["codec"]["temperatures"] or [1.0])[0])
    answer = cache.gather(samples, views, tau=tau)
    if isinstance(answer, TopK):
        top1 = answer.ids[:, 0]
        entropy = _topk_entropy(answer, cache.codec.num_classes)
    elif answer.dim() == 1:
        return Answers(samples, views, answer.numpy(), None, tau)
    else:
        top1 = answer.argmax(1)
        logs = torch.log_softmax(answer.double() / tau, 1)
        entropy = -(logs.exp() * logs).sum(1)
    return Answers(samples, views, top1.long().numpy(), entropy.numpy(), tau)


def _draw(cache: LogitCache, blocks: int, records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample and view ids, int64 [n], of up to ``records`` records of each of up to ``blocks``
    blocks, drawn without replacement from the complete views.

    Raises:
        CacheError: no view is complete.
    """
    complete = cache.views
    if not complete:
        raise CacheError(f"cache {cache.path} has no complete view")
    count, size = cache.manifest["num_samples"], cache.manifest["block_records"]
    per_view = -(-count // size)
    draw = np.random.default_rng(seed)
    chosen = draw.choice(len(complete) * per_view, min(blocks, len(complete) * per_view), False)
    samples, views = [], []
    for place in np.sort(chosen).tolist():
        view, block = complete[place // per_view], place % per_view
        start, stop = block * size, min((block + 1) * size, count)
        ids = start + np.sort(draw.choice(stop - start, min(records, stop - start), False))
        samples.append(ids)
        views.append(np.full(len(ids), view))
    return np.concatenate(samples), np.concatenate(views)


def _topk_entropy(answer: TopK, num_classes: int) -> Tensor:
    logs, tail = answer.log_probs.double(), answer.log_tail.double()
    inside = -(logs.exp() * logs).sum(1)
    outside = num_classes - answer.ids.shape[1]
    if outside == 0:
        return inside
    return inside - tail.exp() * (tail - np.log(outside)).clamp(min=-1e30)
