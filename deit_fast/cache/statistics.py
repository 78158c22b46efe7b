"""Statistics of the teacher's logits in a cache, in numpy: `cache info` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deit_fast.cache.codecs import TopKCodec
from deit_fast.cache.reader import LogitCache
from deit_fast.errors import CacheError

DRAWN_BLOCKS, DRAWN_RECORDS = 64, 128  # a block is read whole to be verified


@dataclass(frozen=True)
class RecordSample:
    """Records drawn from a cache.

    Attributes:
        samples, views: int64 [n].
        top1: the teacher's class, int64 [n].
        entropy: of the teacher's distribution, nats, float64 [n]; None for `hard`. For `topk` an
            upper bound: the tail mass counts as spread evenly.
        tau: temperature of ``entropy``.
    """

    samples: np.ndarray
    views: np.ndarray
    top1: np.ndarray
    entropy: np.ndarray | None
    tau: float


def draw_records(cache: LogitCache) -> RecordSample:
    """Records of up to 64 random blocks of the complete views, the same at every call.

    Raises:
        CacheError: no view is complete, or a block is damaged.
    """
    samples, views = _draw_ids(cache)
    tau = cache.codec.first_temperature
    outputs = cache.gather_arrays(samples, views, tau)
    first = outputs[0]
    if cache.codec.name == "hard":
        return RecordSample(samples, views, first, None, tau)
    if isinstance(cache.codec, TopKCodec):
        top1, entropy = first[:, 0], _topk_entropy(outputs[1], outputs[2], cache.codec.num_classes)
    else:
        top1, entropy = first.argmax(1), _entropy(first / np.float64(tau))
    return RecordSample(samples, views, top1.astype(np.int64), entropy, tau)


def _draw_ids(cache: LogitCache) -> tuple[np.ndarray, np.ndarray]:
    """Sample and view ids, int64 [n], of up to 128 records of each of up to 64 blocks, drawn
    without replacement from the complete views.

    Raises:
        CacheError: no view is complete.
    """
    complete = cache.views
    if not complete:
        raise CacheError(f"cache {cache.path} has no complete view")
    count, size = cache.manifest["num_samples"], cache.manifest["block_records"]
    per_view = -(-count // size)
    blocks = len(complete) * per_view
    draw = np.random.default_rng(0)
    chosen = draw.choice(blocks, min(DRAWN_BLOCKS, blocks), False)
    samples, views = [], []
    for index in np.sort(chosen).tolist():
        view, block = complete[index // per_view], index % per_view
        start, stop = block * size, min((block + 1) * size, count)
        ids = start + np.sort(draw.choice(stop - start, min(DRAWN_RECORDS, stop - start), False))
        samples.append(ids)
        views.append(np.full(len(ids), view))
    return np.concatenate(samples), np.concatenate(views)


def _entropy(logits: np.ndarray) -> np.ndarray:
    """Of the softmax of float64 [n, C]."""
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -(np.exp(logs) * logs).sum(1)


def _topk_entropy(log_probs: np.ndarray, log_tail: np.ndarray, num_classes: int) -> np.ndarray:
    logs, tail = log_probs.astype(np.float64), log_tail.astype(np.float64)
    inside = -(np.exp(logs) * logs).sum(1)
    outside = num_classes - logs.shape[1]
    if outside == 0:
        return inside
    return inside - np.exp(tail) * np.maximum(tail - np.log(outside), -1e30)
