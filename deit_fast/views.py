"""What a view is: every random choice as a pure function of recipe, seed, sample and view.

Randomness is a counter, not a stream: Philox4x32-10 with key = seed and counter = (sample, view,
slot, purpose). Every choice has its fixed slot, so no choice depends on how many draws another one
needed, on the batch, the rank or the worker. exp, log and the Beta law are tabulated once, from
+ - * / alone; everything after the tables is integers, + - * / and sqrt, all correctly rounded by
IEEE 754. So plans are equal on every machine; `fingerprint` holds a digest of the tables.

Mixing partners belong to the view as well: the data set falls into pairs, anew for every `repeats`
views, and both members of a pair share Mixup or CutMix, lambda and box. That is timm's mode `pair`,
with the pairs fixed by the plan; DeiT draws one lambda per batch and flips the batch instead.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from deit_fast.config import InputError, ViewRecipe

PLAN_VERSION = 1  # raise it with any change of what `rows`, `crop_boxes` or `pairing` return
CUTMIX_FORM = "deit"  # edges centre -+ cut // 2; timm after 1.0.28 adds (cut + 1) // 2
LAM_ONE = 65536  # lambda = 1 in the plan's integers
NO_MIX, MIXUP, CUTMIX = 0, 1, 2

PLAN_DTYPE = np.dtype(
    [
        ("sample", "i8"),
        ("view", "i4"),
        ("flip", "u1"),
        ("erase", "i4", (4,)),  # top, left, height, width in pixels of the view; height 0: none
        ("noise_key", "u8"),  # Philox key of the erasing noise: low word, high word
        ("partner", "i8"),
        ("mix_kind", "u1"),
        ("box", "i4", (4,)),  # CutMix: top, left, height, width
        ("lam", "i4"),  # Mixup: weight of the own half, in 1 / 65536
    ]
)

Array: TypeAlias = np.ndarray

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ATTEMPTS = 10  # of the random resized crop and of random erasing (torchvision, timm)
_TABLE = 65536


class Purpose(IntEnum):
    """Last counter word: keeps the uses of one (sample, view, slot) apart."""

    VIEW = 0  # slot 0: flip, erase or not, noise key low, noise key high
    CROP = 1  # slot = attempt: area, aspect ratio, left, top
    ERASE = 2  # slot = attempt: area, aspect ratio, top, left
    MIX = 3  # of the pair's smaller sample; slot 0: mixed, kind, lambda; slot 1: centre y, x
    PAIRING = 4  # counter (sample, group)
    ORDER = 5  # counter (pair, cycle)


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


@dataclass(frozen=True)
class ViewPlan:
    """The plan of every view of a data set. Three fields, so cheap to send to a worker process.

    Args:
        recipe: what the pixels depend on.
        seed: in [0, 2^64).
        num_samples: size of the data set; the pairs depend on it.
    """

    recipe: ViewRecipe
    seed: int
    num_samples: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= 2**32:
            raise InputError(f"a view plan needs 1 to 2^32 samples, not {self.num_samples}")

    def rows(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike) -> Array:
        """All of the plan but the crop, which needs the size of the file's image.

        Args:
            sample_ids: integers [n] in [0, num_samples).
            view_ids: integers [n], not negative.

        Returns:
            PLAN_DTYPE [n].

        Raises:
            IndexError: an id out of range.
        """
        samples, views = self._ids(sample_ids, view_ids)
        recipe, size = self.recipe, self.recipe.image_size
        rows = np.zeros(len(samples), PLAN_DTYPE)
        rows["sample"], rows["view"] = samples, views

        flip, erase, low, high = philox(samples, views, 0, Purpose.VIEW, _key(self.seed))
        rows["flip"] = _happens(flip, recipe.flip_prob)
        rows["noise_key"] = low | (high.astype(np.uint64) << _SHIFT)
        erased = np.flatnonzero(_happens(erase, recipe.erase_prob))
        rows["erase"][erased] = self._erase_boxes(samples[erased], views[erased])

        rows["partner"] = partner = self._partners(samples, views)
        first = np.minimum(samples, partner)
        mixed, kind, lam, _ = philox(first, views, 0, Purpose.MIX, _key(self.seed))
        is_mixed = _happens(mixed, recipe.mix_prob) & (partner != samples)
        is_cutmix = is_mixed & _happens(kind, self._cutmix_share())
        if recipe.mixup_alpha == 0 and recipe.cutmix_alpha == 0:
            is_mixed[:] = is_cutmix[:] = False
        is_mixup = is_mixed & ~is_cutmix
        rows["mix_kind"] = np.where(is_cutmix, CUTMIX, np.where(is_mixup, MIXUP, NO_MIX))
        rows["lam"] = LAM_ONE
        rows["lam"][is_mixup] = _draw_beta(lam[is_mixup], recipe.mixup_alpha)
        where = np.flatnonzero(is_cutmix)
        centres = philox(first[where], views[where], 1, Purpose.MIX, _key(self.seed))[:2]
        rows["box"][where] = _cutmix_box(_draw_beta(lam[where], recipe.cutmix_alpha), centres, size)
        return rows

    def crop_boxes(
        self,
        sample_ids: npt.ArrayLike,
        view_ids: npt.ArrayLike,
        widths: npt.ArrayLike,
        heights: npt.ArrayLike,
    ) -> Array:
        """Random resized crop (torchvision's `RandomResizedCrop.get_params`, its law exactly).

        Ten attempts at an area share and an aspect ratio, else the largest centred crop whose ratio
        is allowed. A crop of zero width or height, possible in images of a few pixels, is refused.

        Args:
            sample_ids, view_ids: as for `rows`.
            widths, heights: integers [n], size of the image in pixels.

        Returns:
            int32 [n, 4]: left, top, width, height, within the image.
        """
        samples, views = self._ids(sample_ids, view_ids)
        width = np.asarray(widths, np.int64)
        height = np.asarray(heights, np.int64)
        low, high = self.recipe.crop_ratio

        ratio = width / height
        tall, wide = ratio < low, ratio > high
        crop_w = np.where(wide, np.rint(height * high), width).astype(np.int64)
        crop_h = np.where(tall, np.rint(width / low), height).astype(np.int64)
        crop_w, crop_h = np.maximum(crop_w, 1), np.maximum(crop_h, 1)
        boxes = np.stack([(width - crop_w) // 2, (height - crop_h) // 2, crop_w, crop_h], axis=1)

        def accept(w: Array, h: Array, w_max: Array, h_max: Array) -> Array:
            return (w > 0) & (h > 0) & (w <= w_max) & (h <= h_max)

        found, left, top, w, h = self._first_accepted(
            Purpose.CROP, samples, views, width, height, self.recipe.crop_scale, low, high, accept
        )
        boxes[found] = np.stack([left, top, w, h], axis=1)
        return boxes.astype(np.int32)

    def _erase_boxes(self, samples: Array, views: Array) -> Array:
        """timm's RandomErasing: against the crop, height and width change places; strict."""
        side = np.full(len(samples), self.recipe.image_size, np.int64)
        low, high = self.recipe.erase_ratio

        def accept(h: Array, w: Array, h_max: Array, w_max: Array) -> Array:
            return (w < w_max) & (h < h_max)

        found, top, left, h, w = self._first_accepted(
            Purpose.ERASE, samples, views, side, side, self.recipe.erase_scale, low, high, accept
        )
        boxes = np.zeros((len(samples), 4), np.int64)
        boxes[found] = np.stack([top, left, h, w], axis=1)
        boxes[(boxes[:, 2] == 0) | (boxes[:, 3] == 0)] = 0
        return boxes

    def _first_accepted(
        self,
        purpose: Purpose,
        samples: Array,
        views: Array,
        size_a: Array,
        size_b: Array,
        scale: tuple[float, float],
        ratio_low: float,
        ratio_high: float,
        accept: Callable[[Array, Array, Array, Array], Array],
    ) -> tuple[Array, ...]:
        """First accepted box of ten; axis a has the side sqrt(area * ratio), b sqrt(area / ratio).

        Attempt 0 is made for all rows, 1 to 9 together for those it left: two Philox calls serve a
        batch of any size. Returns the rows found and their start a, start b, side a, side b.
        """
        ratios = ratio_table(ratio_low, ratio_high)
        open_rows = np.arange(len(samples))
        parts: list[tuple[Array, ...]] = []
        for attempts in (np.arange(1), np.arange(1, _ATTEMPTS)):
            max_a, max_b = size_a[open_rows], size_b[open_rows]
            area, ratio, start_a, start_b = philox(
                samples[open_rows], views[open_rows], attempts[:, None], purpose, _key(self.seed)
            )
            target = (scale[0] + (scale[1] - scale[0]) * (area / 2.0**32)) * (max_a * max_b)
            aspect = ratios[ratio >> np.uint32(16)]
            side_a = np.rint(np.sqrt(target * aspect)).astype(np.int64)  # half to even, as round()
            side_b = np.rint(np.sqrt(target / aspect)).astype(np.int64)
            good = accept(side_a, side_b, max_a, max_b)
            done = np.flatnonzero(good.any(axis=0))
            pick = (good.argmax(axis=0)[done], done)
            side_a, side_b = side_a[pick], side_b[pick]
            parts.append(
                (
                    open_rows[done],
                    _below(start_a[pick], max_a[done] - side_a + 1),
                    _below(start_b[pick], max_b[done] - side_b + 1),
                    side_a,
                    side_b,
                )
            )
            open_rows = open_rows[~good.any(axis=0)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _partners(self, samples: Array, views: Array) -> Array:
        groups = views // self.recipe.repeats
        partner = np.empty_like(samples)
        for group in np.unique(groups).tolist():
            here = groups == group
            partner[here] = _partner_table(self.seed, self.num_samples, group)[samples[here]]
        return partner

    def _cutmix_share(self) -> float:
        if self.recipe.mixup_alpha == 0:
            return 1.0
        return self.recipe.switch_prob if self.recipe.cutmix_alpha > 0 else 0.0

    def _ids(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike) -> tuple[Array, Array]:
        samples = np.atleast_1d(np.asarray(sample_ids, np.int64))
        views = np.broadcast_to(np.asarray(view_ids, np.int64), samples.shape)
        if len(samples) and not (samples.min() >= 0 and samples.max() < self.num_samples):
            raise IndexError(
                f"sample ids {samples.min()}..{samples.max()} leave [0, {self.num_samples})"
            )
        if len(views) and not (views.min() >= 0 and views.max() < 2**31):
            raise IndexError(f"view ids {views.min()}..{views.max()} leave [0, 2^31)")
        return samples, views


def lam_of(rows: Array, image_size: int) -> Array:
    """Weight of the own sample in the mixed target, float32 [n].

    1 where nothing is mixed, lambda of Mixup, 1 - box area / image area of CutMix (timm's
    `correct_lam`, so clipping at the edge counts).
    """
    area = rows["box"][:, 2].astype(np.int64) * rows["box"][:, 3]
    cutmix = 1.0 - area / float(image_size * image_size)
    return np.where(rows["mix_kind"] == CUTMIX, cutmix, rows["lam"] / LAM_ONE).astype(np.float32)


def fingerprint(recipe: ViewRecipe, seed: int) -> dict[str, Any]:
    """What a cache of answers about views must agree on: JSON values under dotted keys."""
    fields = dataclasses.asdict(recipe)
    entries = {
        f"view.{name}": list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }
    tables = [ratio_table(*recipe.crop_ratio), ratio_table(*recipe.erase_ratio)]
    alphas = (recipe.mixup_alpha, recipe.cutmix_alpha)
    tables += [beta_table(alpha) for alpha in alphas if alpha > 0]
    digest = hashlib.sha256()
    for table in tables:
        digest.update(table.astype(table.dtype.newbyteorder("<")).tobytes())
    return entries | {
        "view.seed": seed,
        "view.tables_sha256": digest.hexdigest(),
        "view.cutmix_form": CUTMIX_FORM,
        "view.plan": PLAN_VERSION,
    }


# ---------------------------------------------------------------------------------------------
# Order: pairs, epochs, batches
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def pairing(seed: int, num_samples: int, group: int) -> Array:
    """Pairs of a group of views: entries 2k and 2k + 1 are partners; an odd last one is alone.

    Args:
        group: view // repeats.

    Returns:
        int64 [num_samples], a permutation, read-only. The last four are kept (1 s each at 1.28 M).
    """
    return _permutation(seed, num_samples, group, Purpose.PAIRING)


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
    return _frozen(samples), _frozen(views[real].astype(np.int32))


@functools.lru_cache(maxsize=1)
def _unit_order(seed: int, units: int, cycle: int) -> Array:
    return _permutation(seed, units, cycle, Purpose.ORDER)


@functools.lru_cache(maxsize=4)
def _partner_table(seed: int, num_samples: int, group: int) -> Array:
    """Partner of every sample, int64 [num_samples]: an involution with at most one fixed point."""
    order = pairing(seed, num_samples, group)
    partner = np.arange(num_samples)
    even = num_samples // 2 * 2
    partner[order[0:even:2]] = order[1:even:2]
    partner[order[1:even:2]] = order[0:even:2]
    return _frozen(partner)


def _permutation(seed: int, count: int, index: int, purpose: Purpose) -> Array:
    low, high, _, _ = philox(np.arange(count), index, 0, purpose, _key(seed))
    keys = low | (high.astype(np.uint64) << _SHIFT)
    return _frozen(np.argsort(keys, kind="stable"))


def _frozen(array: Array) -> Array:
    array.flags.writeable = False  # cached: a caller that wrote into it would change later epochs
    return array


# ---------------------------------------------------------------------------------------------
# Draws from 32-bit words, and the tables behind them
# ---------------------------------------------------------------------------------------------


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def _happens(words: Array, probability: float) -> Array:
    return words < np.uint64(round(probability * 2**32))


def _below(words: Array, bounds: Array) -> Array:
    """Uniform integers in [0, bound): the high half of word * bound (bias below bound / 2^32)."""
    return ((words.astype(np.uint64) * bounds.astype(np.uint64)) >> _SHIFT).astype(np.int64)


def _draw_beta(words: Array, alpha: float) -> Array:
    """round(lambda * 65536), lambda ~ Beta(alpha, alpha), by inversion of the law."""
    return np.searchsorted(beta_table(alpha), words, side="right") if len(words) else words


def _cutmix_box(lam: Array, centres: Sequence[Array], size: int) -> Array:
    """DeiT's box: sides int(size * sqrt(1 - lambda)), edges centre -+ side // 2, clipped."""
    half = np.floor(size * np.sqrt(1.0 - lam / LAM_ONE)).astype(np.int64) // 2
    side = np.full(len(half), size, np.int64)
    edges = []
    for words in centres:
        centre = _below(words, side)
        low = np.maximum(centre - half, 0)
        edges.append((low, np.minimum(centre + half, size) - low))
    (top, height), (left, width) = edges
    return np.stack([top, left, height, width], axis=1)


@functools.lru_cache(maxsize=8)
def ratio_table(low: float, high: float) -> Array:
    """Log-uniform aspect ratios: float64 [65536], exp of a linear grid's cell centres."""
    ends = _log(np.array([low, high]))
    grid = (np.arange(_TABLE) + 0.5) / _TABLE
    return _frozen(_exp(ends[0] + (ends[1] - ends[0]) * grid))


@functools.lru_cache(maxsize=8)
def beta_table(alpha: float) -> Array:
    """Law of round(65536 lambda), lambda ~ Beta(alpha, alpha), as integer thresholds.

    Entry k is round(2^32 P(lambda < (k + 1/2) / 65536)), uint64 [65536]; the number of entries that
    a uniform 32-bit word reaches is the draw, exactly inverted. For x <= 1/2 the law is
    F(x) = (4 x (1 - x))^alpha T(x) / (2 T(1/2)) with T(x) = 2F1(2 alpha, 1; alpha + 1; x)
    (DLMF 8.17.8, normalised by F(1/2) = 1/2): all terms positive, so nothing cancels.
    """
    ratios: list[float] = []
    term = 1.0
    while term > 1e-18:  # of T at its slowest point, 1/2
        ratios.append((2 * alpha + len(ratios)) / (alpha + 1 + len(ratios)))
        term *= ratios[-1] / 2

    def series(x: Array) -> Array:
        total = np.ones_like(x)
        for ratio in reversed(ratios):
            total = 1.0 + total * x * ratio
        return total

    x = (np.arange(_TABLE // 2) + 0.5) / _TABLE
    law = _exp(alpha * _log(4.0 * x * (1.0 - x))) * series(x) / (2.0 * series(np.array([0.5])))
    lower = np.rint(law * 2.0**32).astype(np.int64)
    both = np.concatenate([lower, 2**32 - lower[::-1]])
    return _frozen(both.astype(np.uint64))


_LN2 = 0.6931471805599453


def _exp(x: Array) -> Array:
    """exp from + - * / alone: libm's differs between machines in the last bit."""
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
