"""Codecs and numbers of views that fit a budget of bytes for each image; arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from deit_fast.cache.codecs import codec_from_config
from deit_fast.cache.feature_codecs import feature_codec
from deit_fast.config import CodecConfig
from deit_fast.errors import InputError

_LOGITS: tuple[tuple[str, dict[str, int]], ...] = (
    ("dense-fp16", {}),
    ("dense-int8", {}),
    ("topk", {"k": 64}),
    ("topk", {"k": 16}),
    ("topk", {"k": 8}),
    ("sampled", {"k": 6, "draws": 8}),
    ("hard", {}),
)
_FEATURES = ("fp16", "fp8", "int8")


@dataclass(frozen=True)
class Option:
    """One codec in a budget.

    Attributes:
        name: the codec with its settings, as flags give them.
        kind: "logits" or "features".
        bytes_per_view: of a record.
        views: that fit, at most as many as the run uses.
        total: bytes of the records of all images.
        seconds: of the teacher; None where its speed is not known.
    """

    name: str
    kind: str
    bytes_per_view: int
    views: int
    total: int
    seconds: float | None


def options(
    budget: int,
    *,
    samples: int,
    views: int,
    classes: int | None,
    repeats: int = 1,
    width: int | None = None,
    tokens: int = 1,
    images_per_s: float | None = None,
) -> list[Option]:
    """What a budget of ``budget`` bytes an image buys, of logits with ``classes``, of features with
    ``width``.

    Args:
        samples: images of the data set.
        views: distinct views of an image that the run shows.
        classes: of the teacher.
        repeats: views come in groups of so many, as ``view.repeats``.
        width, tokens: of its features: D channels of T tokens.
        images_per_s: rate of the teacher, as `precompute --dry-run` measures it.
    """
    records: dict[tuple[str, str], int] = {}
    for name, settings in _LOGITS if classes is not None else ():
        assert classes is not None
        if sum(settings.values()) > classes:
            continue
        codec = codec_from_config(CodecConfig(name=name, **settings), classes, 1.0)  # type: ignore[arg-type]
        words = "".join(f" --codec.{key} {value}" for key, value in settings.items())
        records["logits", f"--codec.name {name}{words}"] = codec.record_bytes
    for name in _FEATURES if width is not None else ():
        assert width is not None
        found = feature_codec(name, tokens, width)
        records["features", f"--features.codec {name}"] = found.record_bytes
    rows = []
    for (kind, name), size in records.items():
        fit = min(views, budget // size) // repeats * repeats
        made = samples * fit
        seconds = None if images_per_s is None else made / images_per_s
        rows.append(Option(name, kind, size, fit, made * size, seconds))
    return rows


def recommend(rows: list[Option], views: int) -> dict[str, tuple[Option, str]]:
    """For each kind the option to take, and why: the first, which keeps most, with all views; else
    the one with most views.

    Raises:
        InputError: no view fits.
    """
    chosen = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        mine = [row for row in rows if row.kind == kind]
        whole = next((row for row in mine if row.views == views), None)
        if whole is not None:
            chosen[kind] = whole, f"keeps most of the codecs with which all {views} views fit"
            continue
        most = max(mine, key=lambda row: row.views)
        if most.views:
            why = (
                f"most views: {most.views} of {views}, each is shown {views / most.views:.3g} times"
            )
            chosen[kind] = most, why
    if not chosen:
        least = min(row.bytes_per_view for row in rows)
        raise InputError(
            f"--bytes-per-image is too small: a record has at least {least} bytes, and views come "
            f"in groups of --repeats"
        )
    return chosen
