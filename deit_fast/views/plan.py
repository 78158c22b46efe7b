"""What a view is: every random choice as a pure function of view settings, sample and view.

No choice depends on the batch, the rank or the worker, and plans are equal on every machine
(`views.rng`); `fingerprint` holds a digest of the tables behind them.

Mixing partners belong to the view as well. The data set is divided into pairs, anew for every
`repeats` views, and both members of a pair share Mixup or CutMix, lambda and box. That is timm's
mode `pair` with the pairs fixed by the plan. DeiT instead draws one lambda per batch and mixes the
batch with its reverse (`views.deit_order`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deit_fast.config import ViewConfig, constants
from deit_fast.errors import InputError
from deit_fast.views.order import READERS, pairing
from deit_fast.views.rng import (
    CUTMIX,
    LAM_ONE,
    LEVEL_ONE,
    NO_MIX,
    Array,
    Purpose,
    below,
    beta_table,
    draw_level,
    draw_mix,
    frozen,
    happens,
    key,
    level_table,
    philox,
    ratio_table,
)

PLAN_VERSION = 2  # raise it with any change of what `rows` or `crop_boxes` return
CUTMIX_FORM = "deit"  # edges centre -+ cut // 2; timm after 1.0.28 adds (cut + 1) // 2

# timm's increasing set, in its order; drawn uniformly with replacement
RANDAUGMENT_OPERATIONS = (
    "none",
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
OPERATIONS = (*RANDAUGMENT_OPERATIONS, "grayscale", "gaussian_blur")  # a blur's level is its radius


def plan_dtype(layers: int) -> np.dtype:
    """One row of a plan with this many operations, applied in turn."""
    return np.dtype(
        [
            ("sample", "i8"),
            ("view", "i4"),
            ("flip", "u1"),
            ("operations", "u1", (layers,)),  # indices into OPERATIONS; 0: none
            ("levels", "i2", (layers,)),  # strength of each in 1 / 1024; the sign is the direction
            ("erase", "i4", (4,)),  # top, left, height, width in pixels of the view; height 0: none
            ("noise_key", "u8"),  # Philox key of the erasing noise: low word, high word
            ("partner", "i8"),
            ("mix_kind", "u1"),
            ("box", "i4", (4,)),  # CutMix: top, left, height, width
            ("lam", "i4"),  # Mixup: weight of the own sample, in 1 / 65536
        ]
    )


PLAN_DTYPE = plan_dtype(2)  # of RandAugment, or of no augmentation

_SHIFT = np.uint64(32)
_ATTEMPTS = 10  # of the random resized crop and of random erasing (torchvision, timm)
_PAD = 4  # pixels reflected around the image of a simple crop (DeiT-III)

# DeiT-III's three operations in the order of its code, all equally likely.
_THREE = np.array([OPERATIONS.index(n) for n in ("grayscale", "solarize", "gaussian_blur")])
_THREE_LEVELS = np.array([0, 5 * LEVEL_ONE, 0])  # solarize at 128, Pillow's default
_BLUR_LEVELS = (round(0.1 * LEVEL_ONE), 2 * LEVEL_ONE)  # radius in pixels, uniform
# torchvision's ColorJitter: a permutation of three operations, each with a factor. A level is 0.09
# of a factor, as in RandAugment.
_JITTERED = np.array([OPERATIONS.index(n) for n in ("brightness", "contrast", "color")])
_JITTER_ORDERS = np.array(list(itertools.permutations(range(3))))


@dataclass(frozen=True)
class BatchMix:
    """One choice for a whole batch, which is mixed with its own reverse.

    Attributes:
        kind: NO_MIX, MIXUP or CUTMIX.
        box: CutMix: top, left, height, width.
        lam: Mixup: weight of the own sample, in 1 / 65536.
    """

    kind: int
    box: tuple[int, int, int, int]
    lam: int


@dataclass(frozen=True)
class ViewPlan:
    """The plan of every view of a data set. It computes rows on demand, so it is cheap to pickle.

    Args:
        view: the settings that pixels depend on.
        num_samples: size of the data set; the pairs depend on it.
    """

    view: ViewConfig
    num_samples: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= 2**32:
            raise InputError(f"a view plan needs 1 to 2^32 samples, not {self.num_samples}")

    def rows(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike) -> Array:
        """The plan without the crop, which needs the size of the decoded image.

        Args:
            sample_ids: integers [n] in [0, num_samples).
            view_ids: integers [n], not negative.

        Returns:
            `plan_dtype` [n]: PLAN_DTYPE for RandAugment.

        Raises:
            IndexError: an id out of range.
        """
        rows = self.unmixed_rows(sample_ids, view_ids)
        samples, views = rows["sample"], rows["view"]
        rows["partner"] = partner = self._partners(samples, views)
        first = np.minimum(samples, partner)
        mix = draw_mix(self.view, first, views, Purpose.MIX, partner != samples, self.sizes(views))
        rows["mix_kind"], rows["box"], rows["lam"] = mix
        return rows

    def unmixed_rows(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike) -> Array:
        """`rows` without mixing: every view is its own partner."""
        samples, views = self._ids(sample_ids, view_ids)
        rows = np.zeros(len(samples), plan_dtype(self.layers))
        rows["sample"] = rows["partner"] = samples
        rows["view"], rows["lam"] = views, LAM_ONE

        flip, erase, low, high = philox(samples, views, 0, Purpose.VIEW, self._key)
        rows["flip"] = happens(flip, self.view.flip_prob)
        rows["noise_key"] = low | (high.astype(np.uint64) << _SHIFT)
        erased = np.flatnonzero(happens(erase, self.view.erase_prob))
        rows["erase"][erased] = self._erase_boxes(samples[erased], views[erased])

        if self.view.augment == "randaugment":
            self._draw_randaugment(rows)
        if self.view.augment == "three_augment":
            self._draw_three(rows)
        if self.view.color_jitter > 0:
            self._draw_jitter(rows)
        return rows

    def mix_operands(
        self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike, mix: BatchMix | None = None
    ) -> tuple[Array, Array]:
        """The plan of a batch's views, and that of the view which each is mixed with.

        Args:
            sample_ids, view_ids: as for `rows`.
            mix: mixes the batch with its reverse; none: pairs belong to the views.

        Returns:
            Own and partner rows, `plan_dtype` [n] each. An unmixed view is its own partner.
        """
        if mix is None:
            own = self.rows(sample_ids, view_ids)
            partner = np.where(own["mix_kind"] != NO_MIX, own["partner"], own["sample"])
            return own, self.unmixed_rows(partner, own["view"])
        own = self.unmixed_rows(sample_ids, view_ids)
        if mix.kind == NO_MIX:
            return own, own
        own["partner"] = own["sample"][::-1].copy()
        own["mix_kind"], own["box"], own["lam"] = mix.kind, mix.box, mix.lam
        return own, own[::-1]

    def crop_boxes(
        self,
        sample_ids: npt.ArrayLike,
        view_ids: npt.ArrayLike,
        widths: npt.ArrayLike,
        heights: npt.ArrayLike,
    ) -> Array:
        """Random resized crop, distributed as torchvision's `RandomResizedCrop.get_params`.

        Ten attempts at an area share and an aspect ratio, then the largest centred crop of an
        allowed ratio. A crop of zero width or height, possible in tiny images, is rejected.

        view.crop=simple: a square, uniform in the image after `shorter_side_to`, padded by 4 pixels
        (torchvision's `RandomCrop`); so left and top may be -4.

        Args:
            sample_ids, view_ids: as for `rows`.
            widths, heights: integers [n], size of the image in pixels.

        Returns:
            int32 [n, 4]: left, top, width, height in the image; simple: in the resized image.
        """
        samples, views = self._ids(sample_ids, view_ids)
        width = np.asarray(widths, np.int64)
        height = np.asarray(heights, np.int64)
        if self.view.crop == "simple":
            return self._simple_boxes(samples, views, width, height)

        low, high = self.view.crop_ratio
        ratio = width / height
        tall, wide = ratio < low, ratio > high
        crop_w = np.where(wide, np.rint(height * high), width).astype(np.int64)
        crop_h = np.where(tall, np.rint(width / low), height).astype(np.int64)
        crop_w, crop_h = np.maximum(crop_w, 1), np.maximum(crop_h, 1)
        boxes = np.stack([(width - crop_w) // 2, (height - crop_h) // 2, crop_w, crop_h], axis=1)

        def accept(w: Array, h: Array, w_max: Array, h_max: Array) -> Array:
            return (w > 0) & (h > 0) & (w <= w_max) & (h <= h_max)

        found, left, top, w, h = self._first_accepted(
            Purpose.CROP, samples, views, (width, height),
            self.view.crop_scale, self.view.crop_ratio, accept,
        )  # fmt: skip
        boxes[found] = np.stack([left, top, w, h], axis=1)
        return boxes.astype(np.int32)

    def sizes(self, views: Array) -> Array:
        """Side of views in pixels, int64 [n]."""
        schedule = self.view.size_schedule or ((0, self.view.image_size),)
        firsts, sides = np.array(schedule, np.int64).T
        return sides[np.searchsorted(firsts, views, side="right") - 1]

    def size_of_all(self, view_ids: npt.ArrayLike) -> int:
        """The side of all views of a batch, in pixels.

        Raises:
            ValueError: the batch has views of several sizes.
        """
        sizes = set(self.sizes(np.asarray(view_ids, np.int64)).tolist()) or {self.view.image_size}
        if len(sizes) > 1:
            raise ValueError(f"a batch has views of one size, not of {sorted(sizes)} pixels")
        return int(sizes.pop())

    def batches_of(self, view_ids: npt.ArrayLike, count: int) -> list[slice]:
        """Consecutive views in parts of one size, each of at most ``count``."""
        sizes = self.sizes(np.asarray(view_ids, np.int64))
        borders = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
        return [
            slice(first, min(first + count, stop))
            for start, stop in itertools.pairwise(borders)
            for first in range(start, stop, count)
        ]

    def _simple_boxes(self, samples: Array, views: Array, width: Array, height: Array) -> Array:
        size = self.sizes(views)
        _, _, left, top = philox(samples, views, 0, Purpose.CROP, self._key)
        resized = shorter_side_to(size, width, height)
        starts = [
            below(words, side + (2 * _PAD - size + 1)) - _PAD
            for words, side in zip((left, top), resized, strict=True)
        ]
        return np.stack([*starts, size, size], axis=1).astype(np.int32)

    @property
    def layers(self) -> int:
        """Operations of a view: at least two, so that most settings share RandAugment's dtype."""
        jitter = len(_JITTERED) if self.view.color_jitter > 0 else 0
        return max(2, jitter + (self.view.augment == "three_augment"))

    def _draw_three(self, rows: Array) -> None:
        """DeiT-III's ThreeAugment: one of three operations, always applied."""
        which, _, radius, _ = philox(rows["sample"], rows["view"], 0, Purpose.AUGMENT, self._key)
        chosen = below(which, np.array(len(_THREE)))
        low, high = _BLUR_LEVELS
        radius = low + below(radius, np.array(high - low + 1))
        rows["operations"][:, 0] = _THREE[chosen]
        rows["levels"][:, 0] = np.where(chosen == 2, radius, _THREE_LEVELS[chosen])

    def _draw_jitter(self, rows: Array) -> None:
        """torchvision's ColorJitter(j, j, j), in the last three layers."""
        order, *strengths = philox(rows["sample"], rows["view"], 0, Purpose.COLOR, self._key)
        reach = round(self.view.color_jitter / 0.09 * LEVEL_ONE)
        levels = below(np.stack(strengths, axis=1), np.array(2 * reach + 1)) - reach
        orders = _JITTER_ORDERS[below(order, np.array(len(_JITTER_ORDERS)))]
        rows["operations"][:, -3:] = _JITTERED[orders]
        rows["levels"][:, -3:] = levels

    def _draw_randaugment(self, rows: Array) -> None:
        """RandAugment: per layer an operation, whether it is applied, its level and direction."""
        layers = np.arange(rows["operations"].shape[1])
        which, applied, level, sign = philox(
            rows["sample"][:, None], rows["view"][:, None], layers, Purpose.AUGMENT, self._key
        )
        chosen = below(which, np.array(len(RANDAUGMENT_OPERATIONS) - 1)) + 1
        applied = happens(applied, self.view.randaugment_prob)
        levels = draw_level(level, self.view.randaugment_magnitude, self.view.randaugment_std)
        rows["operations"] = np.where(applied, chosen, 0)
        rows["levels"] = np.where(happens(sign, 0.5), -levels, levels) * applied

    def _erase_boxes(self, samples: Array, views: Array) -> Array:
        """timm's RandomErasing: unlike a crop, height comes first, and a full side is rejected."""
        side = self.sizes(views)

        def accept(h: Array, w: Array, h_max: Array, w_max: Array) -> Array:
            return (w < w_max) & (h < h_max)

        found, top, left, h, w = self._first_accepted(
            Purpose.ERASE, samples, views, (side, side),
            self.view.erase_scale, self.view.erase_ratio, accept,
        )  # fmt: skip
        boxes = np.zeros((len(samples), 4), np.int64)
        boxes[found] = np.stack([top, left, h, w], axis=1)
        boxes[(boxes[:, 2] == 0) | (boxes[:, 3] == 0)] = 0
        return boxes

    def _first_accepted(
        self,
        purpose: Purpose,
        samples: Array,
        views: Array,
        sides: tuple[Array, Array],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        accept: Callable[[Array, Array, Array, Array], Array],
    ) -> tuple[Array, ...]:
        """First accepted box of ten, along axes a and b: sqrt(area * ratio), sqrt(area / ratio).

        Attempt 0 is made for all rows, then 1 to 9 together for the rows without a box, so two
        Philox calls serve a batch of any size. Returns the rows found and their start a, start b,
        side a, side b.
        """
        ratios = ratio_table(*ratio)
        remaining = np.arange(len(samples))
        parts: list[tuple[Array, ...]] = []
        for attempts in (np.arange(1), np.arange(1, _ATTEMPTS)):
            max_a, max_b = (side[remaining] for side in sides)
            area, aspect, start_a, start_b = philox(
                samples[remaining], views[remaining], attempts[:, None], purpose, self._key
            )
            target = (scale[0] + (scale[1] - scale[0]) * (area / 2.0**32)) * (max_a * max_b)
            aspect = ratios[aspect >> np.uint32(16)]
            side_a = np.rint(np.sqrt(target * aspect)).astype(np.int64)  # half to even, as round()
            side_b = np.rint(np.sqrt(target / aspect)).astype(np.int64)
            accepted = accept(side_a, side_b, max_a, max_b)
            is_done = accepted.any(axis=0)
            done = np.flatnonzero(is_done)
            first = (accepted.argmax(axis=0)[done], done)
            side_a, side_b = side_a[first], side_b[first]
            start_a = below(start_a[first], max_a[done] - side_a + 1)
            start_b = below(start_b[first], max_b[done] - side_b + 1)
            parts.append((remaining[done], start_a, start_b, side_a, side_b))
            remaining = remaining[~is_done]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    @property
    def _key(self) -> tuple[int, int]:
        return key(self.view.seed)

    def _partners(self, samples: Array, views: Array) -> Array:
        groups = views // self.view.repeats
        partner = np.empty_like(samples)
        for group in np.unique(groups).tolist():
            members = groups == group
            table = partner_table(self.view.seed, self.num_samples, group)
            partner[members] = table[samples[members]]
        return partner

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


@functools.lru_cache(maxsize=READERS)
def partner_table(seed: int, num_samples: int, group: int) -> Array:
    """Partner of every sample, int64 [num_samples]: an involution with at most one fixed point."""
    order = pairing(seed, num_samples, group)
    partner = np.arange(num_samples)
    even = num_samples // 2 * 2
    partner[order[0:even:2]] = order[1:even:2]
    partner[order[1:even:2]] = order[0:even:2]
    return frozen(partner)


def shorter_side_to(size: int | Array, width: Array, height: Array) -> tuple[Array, Array]:
    """Width and height of images with their shorter side resized (torchvision's `Resize`)."""
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    long_side = (size * longer / shorter).astype(np.int64)
    return np.where(width <= height, size, long_side), np.where(width <= height, long_side, size)


def lam_of(rows: Array, sizes: int | Array) -> Array:
    """Weight of the own sample in the mixed target, float32 [n].

    1 without mixing, lambda for Mixup, 1 - box area / image area for CutMix (timm's `correct_lam`:
    the box is clipped at the edge first).

    Args:
        sizes: side of the views, pixels; one for all, or [n].
    """
    area = rows["box"][:, 2].astype(np.int64) * rows["box"][:, 3]
    cutmix = 1.0 - area / np.square(np.asarray(sizes, np.float64))
    return np.where(rows["mix_kind"] == CUTMIX, cutmix, rows["lam"] / LAM_ONE).astype(np.float32)


def fingerprint(view: ViewConfig) -> dict[str, Any]:
    """What two users of a cache must agree on about views: JSON values under dotted keys.

    A size schedule is part of it where there is one: caches of earlier versions know none.
    """
    entries = {
        f"view.{name}": list(value) if isinstance(value, tuple) else value
        for name, value in (dataclasses.asdict(view) | constants(type(view))).items()
        if name != "seed" and (name != "size_schedule" or value)
    }
    tables = [ratio_table(*view.crop_ratio), ratio_table(*view.erase_ratio)]
    tables += [beta_table(alpha) for alpha in (view.mixup_alpha, view.cutmix_alpha) if alpha > 0]
    if view.augment == "randaugment":
        tables.append(level_table(view.randaugment_magnitude, view.randaugment_std))
    digest = hashlib.sha256()
    for table in tables:
        digest.update(table.astype(table.dtype.newbyteorder("<")).tobytes())
    return entries | {
        "view.seed": view.seed,  # here also in caches of versions that had no such setting
        "view.tables_sha256": digest.hexdigest(),
        "view.cutmix_form": CUTMIX_FORM,
        "view.plan": PLAN_VERSION,
    }
