"""Statistics of what a cache stores, in numpy: `cache info` needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deit_fast.cache.codec_base import id_bytes
from deit_fast.cache.reader import LogitCache
from deit_fast.cache.sparse_codecs import SampledCodec, TopKCodec
from deit_fast.errors import CacheError

DRAWN_BLOCKS, DRAWN_RECORDS = 64, 128  # a block is read whole to be verified
_DRAWN_BYTES = 1 << 26  # of features at most, read and decoded


@dataclass(frozen=True)
class RecordSample:
    """Records drawn from a cache.

    Attributes:
        samples, views: int64 [n].
        top1: the teacher's class, int64 [n].
        entropy: of the teacher's distribution, nats, float64 [n]; None for `hard` and `sampled`.
            For `topk` an upper bound: the tail mass counts as spread evenly.
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
    if isinstance(cache.codec, SampledCodec):  # whose first id is the teacher's class
        size = id_bytes(cache.codec.num_classes)
        top1 = np.ascontiguousarray(first[:, :size]).view(f"<u{size}")[:, 0]
        return RecordSample(samples, views, top1.astype(np.int64), None, tau)
    if isinstance(cache.codec, TopKCodec):
        top1, entropy = first[:, 0], _topk_entropy(outputs[1], outputs[2], cache.codec.num_classes)
    else:
        top1, entropy = first.argmax(1), _entropy(first / np.float64(tau))
    return RecordSample(samples, views, top1.astype(np.int64), entropy, tau)


@dataclass(frozen=True)
class FeatureSample:
    """Statistics of features drawn from a cache.

    Attributes:
        records, tokens: how many.
        rms: root of the mean square of all values.
        largest: the largest magnitude.
        mean_peak, largest_peak: mean and maximum over tokens of the token's largest magnitude
            divided by its own rms. Where it is above about 10, `int8` loses the other channels.
        zeroed: share of zeros among the values of tokens that are not all zero: what lay below the
            codec's smallest step, and zeros of the teacher itself.
    """

    records: int
    tokens: int
    rms: float
    largest: float
    mean_peak: float
    largest_peak: float
    zeroed: float


def draw_features(cache: LogitCache) -> FeatureSample:
    """Statistics of some records of up to 64 random blocks, the same at every call.

    Raises:
        CacheError: no view is complete, or a block is damaged.
    """
    block_bytes = cache.manifest["block_records"] * cache.codec.record_bytes
    [(shape, _)] = cache.codec.outputs(1)
    blocks = min(DRAWN_BLOCKS, max(1, _DRAWN_BYTES // block_bytes))
    records = min(DRAWN_RECORDS, max(1, _DRAWN_BYTES // (blocks * 4 * int(np.prod(shape)))))
    peaks, zeros, values, squares, largest, count = [], 0, 0, 0.0, 0.0, 0
    for view, positions in _draw_positions(cache, blocks, records):
        [features] = cache.arrays_at(positions, np.full(len(positions), view), 1.0)
        size = np.abs(features, dtype=np.float64)
        amax, rms = size.max(2), np.sqrt(np.square(size).mean(2))
        is_zero = amax == 0
        peaks.append((amax / np.where(is_zero, 1.0, rms))[~is_zero])
        zeros += int((size[~is_zero] == 0).sum())
        values += size[~is_zero].size
        squares += float(np.square(rms).sum())
        largest = max(largest, float(amax.max()))
        count += len(positions)
    peak = np.concatenate(peaks)
    tokens = count * shape[1]
    return FeatureSample(
        records=count,
        tokens=tokens,
        rms=float(np.sqrt(squares / tokens)),
        largest=largest,
        mean_peak=float(peak.mean()) if peak.size else 0.0,
        largest_peak=float(peak.max()) if peak.size else 0.0,
        zeroed=zeros / values if values else 0.0,
    )


def _draw_ids(cache: LogitCache) -> tuple[np.ndarray, np.ndarray]:
    """Sample and view ids, int64 [n], of ``_draw_positions``."""
    drawn = list(_draw_positions(cache, DRAWN_BLOCKS, DRAWN_RECORDS))
    samples = [
        cache.order.samples(view, rows[0], rows[-1] + 1)[rows - rows[0]] for view, rows in drawn
    ]
    views = [np.full(len(positions), view) for view, positions in drawn]
    return np.concatenate(samples), np.concatenate(views)


def _draw_positions(
    cache: LogitCache, most_blocks: int, most_records: int
) -> Iterator[tuple[int, np.ndarray]]:
    """View and positions in its file, int64 [n], of some records of each of some blocks, drawn
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
    chosen = draw.choice(blocks, min(most_blocks, blocks), False)
    for index in np.sort(chosen).tolist():
        view, block = complete[index // per_view], index % per_view
        start, stop = block * size, min((block + 1) * size, count)
        drawn = draw.choice(stop - start, min(most_records, stop - start), False)
        yield view, start + np.sort(drawn)


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
