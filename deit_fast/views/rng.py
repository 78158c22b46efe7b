"""Counter-based random draws and the tables of their distributions; numpy only.

Philox4x32-10 with key = seed and counter = (sample, view, slot, purpose). Every choice has a fixed
slot, so no choice depends on how many draws another one needed. Distributions are tabulated once,
with exp and log made of + - * / alone. Everything after the tables is integers, + - * / and sqrt,
which IEEE 754 rounds correctly. So draws are equal on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from deit_fast.config import ViewConfig

LAM_ONE = 65536  # lambda = 1 in the plan's integers
NO_MIX, MIXUP, CUTMIX = 0, 1, 2
LEVEL_ONE = 1024  # an operation's level 1 in the plan's integers

Array: TypeAlias = np.ndarray

_MASK = np.uint64(0xFFFFFFFF)
_PART = 1 << 16  # samples
_SHIFT = np.uint64(32)
_TABLE = 65536


class Purpose(IntEnum):
    """Last counter word: separates the uses of one (sample, view, slot)."""

    VIEW = 0  # slot 0: flip, erase or not, noise key low, noise key high
    CROP = 1  # slot = attempt: area, aspect ratio, left, top
    ERASE = 2  # slot = attempt: area, aspect ratio, top, left
    MIX = 3  # counter of the pair's smaller sample; slot 0: mixed, kind, lambda; 1: centre y, x
    PAIRING = 4  # counter (sample, group)
    ORDER = 5  # counter (pair, cycle)
    AUGMENT = 6  # slot = layer: operation, applied or not, level, sign
    COLOR = 7  # slot 0: order of the three, strength of the first, second, third
    BATCH_MIX = 8  # counter (step, rank); slots as in MIX
    TAIL = 9  # of the codec `sampled`; slot = draw // 4: four draws
    TEACHER = 10  # counter (sample, view, step), key of the run's seed: teachers kept, one of them


def philox(
    c0: npt.ArrayLike, c1: npt.ArrayLike, c2: npt.ArrayLike, c3: npt.ArrayLike, key: tuple[int, int]
) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10 (Salmon et al., SC 2011), the generator of Triton's `tl.randint4x`.

    Args:
        c0, c1, c2, c3: counter words, integers below 2^32 of shapes that broadcast.
        key: two integers below 2^32.

    Returns:
        Four uint32 arrays of the broadcast shape.
    """
    x0, x1, x2, x3 = (np.asarray(word).astype(np.uint64) for word in (c0, c1, c2, c3))
    k0, k1 = key
    for _ in range(10):
        product0 = x0 * np.uint64(0xD2511F53)
        product1 = x2 * np.uint64(0xCD9E8D57)
        x0 = (product1 >> _SHIFT) ^ x1 ^ np.uint64(k0)
        x2 = (product0 >> _SHIFT) ^ x3 ^ np.uint64(k1)
        x1 = product1 & _MASK
        x3 = product0 & _MASK
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.broadcast_arrays(x0, x1, x2, x3)
    return tuple(word.astype(np.uint32) for word in words)  # type: ignore[return-value]


def draw_words(
    seed: int, first: npt.ArrayLike, second: npt.ArrayLike, count: int, purpose: Purpose
) -> Array:
    """The first ``count`` words of slots 0, 1, ... of each counter, uint32 [n, count].

    Args:
        first, second: integers [n] below 2^32, the first two counter words.
    """
    slots = np.arange(-(-count // 4))
    rows, columns = np.asarray(first)[:, None], np.asarray(second)[:, None]
    words = np.stack(philox(rows, columns, slots, purpose, key(seed)), axis=-1)
    return words.reshape(len(words), 4 * len(slots))[:, :count]


def permutation(seed: int, count: int, index: int, purpose: Purpose) -> Array:
    """Permutation ``index`` of [0, count) for a purpose, int64 [count], read-only."""
    keys = np.empty(count, np.uint64)
    for start in range(0, count, _PART):  # its temporaries stay in a core's cache
        part = slice(start, min(start + _PART, count))
        low, high, _, _ = philox(np.arange(part.start, part.stop), index, 0, purpose, key(seed))
        keys[part] = low | (high.astype(np.uint64) << _SHIFT)
    return frozen(stable_order(keys))


def stable_order(keys: Array) -> Array:
    """`np.argsort(keys, kind="stable")`, int64, in a tenth of its time for large arrays.

    Sorted are words of a key's upper bits and its position. The few keys that share their upper
    bits are sorted among themselves afterwards.

    Args:
        keys: uint64 [n], random.
    """
    bits = np.uint64(max(len(keys) - 1, 1).bit_length())
    below = (np.uint64(1) << bits) - np.uint64(1)
    words = (keys & ~below) | np.arange(len(keys), dtype=np.uint64)
    words.sort()
    order = (words & below).astype(np.int64)
    words >>= bits
    equal = np.flatnonzero(words[1:] == words[:-1])
    if len(equal):
        spots = np.union1d(equal, equal + 1)
        members = order[spots]
        order[spots] = members[np.lexsort((members, keys[members]))]
    return order


def frozen(array: Array) -> Array:
    """Make a table read-only: it is cached, and a write would change later epochs."""
    array.flags.writeable = False
    return array


def key(seed: int) -> tuple[int, int]:
    """Philox key of a seed in [0, 2^64): low word, high word."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def happens(words: Array, probability: float) -> Array:
    """Which of these uniform 32-bit words fall below the probability."""
    return words < np.uint64(round(probability * 2**32))


def below(words: Array, bounds: Array) -> Array:
    """Uniform integers in [0, bound): the high half of word * bound (bias below bound / 2^32)."""
    return ((words.astype(np.uint64) * bounds.astype(np.uint64)) >> _SHIFT).astype(np.int64)


def draw_beta(words: Array, alpha: float) -> Array:
    """round(lambda * 65536), lambda ~ Beta(alpha, alpha), by inverting the distribution."""
    return np.searchsorted(beta_table(alpha), words, side="right") if len(words) else words


def draw_level(words: Array, mean: float, std: float) -> Array:
    """round(1024 level), level ~ N(mean, std) clipped to [0, 10], by inverting the distribution."""
    return np.searchsorted(level_table(mean, std), words, side="right")


def draw_mix(
    view: ViewConfig,
    first: Array,
    second: Array,
    purpose: Purpose,
    mixable: Array | bool = True,
    sizes: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Choose Mixup, CutMix or neither, and its parameters, from slots 0 and 1 of the counters.

    Args:
        first, second: integers [n] below 2^32, the first two counter words.
        mixable: bool [n], whether there is a partner.
        sizes: integers [n], side of the views, pixels; None: `view.image_size`.

    Returns:
        Fields `mix_kind` [n], `box` [n, 4] and `lam` [n] of the plan.
    """
    mixed, kind, lam, _ = philox(first, second, 0, purpose, key(view.seed))
    cutmix_share = view.switch_prob if view.cutmix_alpha > 0 else 0.0
    if view.mixup_alpha == 0:
        cutmix_share = 1.0
    is_mixed = happens(mixed, view.mix_prob) & mixable
    if view.mixup_alpha == 0 and view.cutmix_alpha == 0:
        is_mixed[:] = False
    is_cutmix = is_mixed & happens(kind, cutmix_share)
    is_mixup = is_mixed & ~is_cutmix

    kinds = np.where(is_cutmix, CUTMIX, np.where(is_mixup, MIXUP, NO_MIX))
    lams = np.full(len(first), LAM_ONE)
    lams[is_mixup] = draw_beta(lam[is_mixup], view.mixup_alpha)
    boxes = np.zeros((len(first), 4), np.int64)
    cut = np.flatnonzero(is_cutmix)
    centres = philox(first[cut], second[cut], 1, purpose, key(view.seed))[:2]
    sides = np.full(len(cut), view.image_size) if sizes is None else sizes[cut]
    boxes[cut] = _cutmix_boxes(draw_beta(lam[cut], view.cutmix_alpha), centres, sides)
    return kinds, boxes, lams


def _cutmix_boxes(lam: Array, centres: Sequence[Array], size: Array) -> Array:
    """DeiT's boxes: sides int(size * sqrt(1 - lambda)), edges centre -+ side // 2, clipped."""
    half = np.floor(size * np.sqrt(1.0 - lam / LAM_ONE)).astype(np.int64) // 2
    edges = []
    for words in centres:
        centre = below(words, size)
        low = np.maximum(centre - half, 0)
        edges.append((low, np.minimum(centre + half, size) - low))
    (top, height), (left, width) = edges
    return np.stack([top, left, height, width], axis=1)


@functools.lru_cache(maxsize=8)
def ratio_table(low: float, high: float) -> Array:
    """Log-uniform aspect ratios, float64 [65536]: exp of the cell centres of a linear grid."""
    ends = _log(np.array([low, high]))
    grid = (np.arange(_TABLE) + 0.5) / _TABLE
    return frozen(_exp(ends[0] + (ends[1] - ends[0]) * grid))


@functools.lru_cache(maxsize=8)
def beta_table(alpha: float) -> Array:
    """Distribution of round(65536 lambda), lambda ~ Beta(alpha, alpha), as integer thresholds.

    Entry k is round(2^32 P(lambda < (k + 1/2) / 65536)), uint64 [65536]. The draw is the number of
    entries that a uniform 32-bit word reaches: exact inversion. For x <= 1/2 the distribution is
    F(x) = (4 x (1 - x))^alpha T(x) / (2 T(1/2)) with T(x) = 2F1(2 alpha, 1; alpha + 1; x)
    (DLMF 8.17.8, normalised by F(1/2) = 1/2). All terms are positive, so nothing cancels.
    """
    ratios: list[float] = []
    term = 1.0
    while term > 1e-18:  # T converges slowest at x = 1/2
        ratios.append((2 * alpha + len(ratios)) / (alpha + 1 + len(ratios)))
        term *= ratios[-1] / 2

    def series(x: Array) -> Array:
        total = np.ones_like(x)
        for ratio in reversed(ratios):
            total = 1.0 + total * x * ratio
        return total

    x = (np.arange(_TABLE // 2) + 0.5) / _TABLE
    cdf = _exp(alpha * _log(4.0 * x * (1.0 - x))) * series(x) / (2.0 * series(np.array([0.5])))
    lower = np.rint(cdf * 2.0**32).astype(np.int64)
    thresholds = np.concatenate([lower, 2**32 - lower[::-1]])
    return frozen(thresholds.astype(np.uint64))


@functools.lru_cache(maxsize=8)
def level_table(mean: float, std: float) -> Array:
    """Distribution of round(1024 clip(N(mean, std), 0, 10)), thresholds as in ``beta_table``.

    uint64 [10240]. The normal distribution is 1/2 + phi(x) (x + x^3/3 + x^5/(3 5) + ...), all terms
    of one sign.
    """
    edges = (np.arange(10 * LEVEL_ONE) + 0.5) / LEVEL_ONE - mean
    if std == 0:
        return frozen(np.where(edges <= 0, 0, 2**32).astype(np.uint64))
    x = np.clip(edges / std, -7.0, 7.0)
    total = np.ones_like(x)
    for n in range(301, 1, -2):
        total = 1.0 + total * (x * x) / n
    cdf = 0.5 + 0.3989422804014327 * _exp(-0.5 * (x * x)) * x * total
    cdf = np.where(x <= -7.0, 0.0, np.where(x >= 7.0, 1.0, cdf))
    return frozen(np.rint(cdf * 2.0**32).astype(np.uint64))


_LN2 = 0.6931471805599453


def _exp(x: Array) -> Array:
    """exp from + - * / alone, because libm's last bit differs between machines."""
    power = np.rint(x / _LN2)
    rest = x - power * _LN2
    total = np.ones_like(x)
    for n in range(20, 0, -1):
        total = 1.0 + total * rest / n
    return np.ldexp(total, power.astype(np.int32))


def _log(x: Array) -> Array:
    """log from + - * / alone: ln m = 2 artanh((m - 1) / (m + 1)), |.| <= 0.172."""
    mantissa, power = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa, power = np.where(small, 2.0 * mantissa, mantissa), np.where(small, power - 1, power)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    total = np.zeros_like(s)
    for n in range(31, 0, -2):
        total = total * (s * s) + 1.0 / n
    return 2.0 * s * total + power * _LN2
