"""What is fixed before the first run: teachers, caches, arms, seeds. README.md says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)
TUNING_SEED = 100
REUSE_IMAGES = 5120
EPOCHS = {"test": 12, "select": 12, "reuse": 48, "digits": 70}
VIEWS = {"test": 12, "select": 12, "reuse": 48, "digits": 70}  # of a cache; a run may use fewer
DIGITS_IMAGES = 602  # that train
BYTES = 240  # of an image, at which codecs are compared
SHARE = (0.5, 0.9)  # loss.alpha of logits, tried on `select`
WEIGHT = (1.0, 3.0)  # features.weights, tried on `select`

VIEW: dict[str, Any] = {
    "seed": 0, "image_size": 28, "crop_scale": [0.7, 1.0], "flip_prob": 0.5, "augment": "none",
    "erase_prob": 0.0, "repeats": 1, "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip
TEACHER: dict[str, Any] = {
    "epochs": 6, "batch_size": 256, "num_views": None,
    "view": VIEW | {"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
    "optim": {"lr": 8e-3, "warmup_epochs": 1.0},
}  # fmt: skip
TEACHERS = {"a": ("narrow", 10), "b": ("wide", 11)}  # factory in teacher.py, seed
STUDENT: dict[str, Any] = {
    "batch_size": 256, "view": VIEW,
    "model": {"args": ["patch_size=7", "embed_dim=64", "depth=4", "num_heads=4"]},
    "optim": {"lr": 2e-3, "warmup_epochs": 1.0},
}  # fmt: skip
# The second data set: the recipes of `deit-fast demo`, with views that do not depend on the seed.
DIGITS_TEACHER: dict[str, Any] = {"view": {"seed": 0}}
DIGITS_STUDENT: dict[str, Any] = {"view": {"seed": 0, "repeats": 1}}


@dataclass(frozen=True)
class Cache:
    """One target of one teacher, for the views of a data set.

    Args:
        folder: what `train` reads, inside the folder that `precompute` writes.
    """

    teacher: str
    settings: dict[str, Any]
    folder: str = ""


def _pooled(codec: str, **more: Any) -> dict[str, Any]:
    return {"targets": ["pooled"], "features": {"codec": codec, **more}}


CACHES = {
    "hard": Cache("a", {"codec": {"name": "hard"}}),
    "top2": Cache("a", {"codec": {"name": "topk", "k": 2}}),
    "soft": Cache("a", {"codec": {"name": "dense-fp16"}}),
    "soft-b": Cache("b", {"codec": {"name": "dense-fp16"}}),
    "sampled": Cache("a", {"codec": {"name": "sampled", "k": 1, "draws": 2}}),
    "fp8": Cache("a", _pooled("fp8"), "pooled"),
    "int8": Cache("a", _pooled("int8"), "pooled"),
    "pca16": Cache("a", _pooled("fp8", reduce="pca", dim=16), "pooled"),
}


@dataclass(frozen=True)
class Arm:
    """A student that is trained once for each seed.

    Args:
        caches: names of ``CACHES``; the first is `cache`, the others `more_caches`.
        chosen: settings whose value the tuning gives, each by the name of its tuning.
        tables: of the page that show it.
    """

    name: str
    data: str
    views: int
    caches: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return (TUNING_SEED,) if self.data == "select" else SEEDS


HARD: dict[str, Any] = {"loss": {"kind": "hard"}}
SOFT: dict[str, Any] = {"loss": {"kind": "soft"}}
LABELS: dict[str, Any] = {"loss": {"kind": "none"}}
FEATURE: dict[str, Any] = {"features": {"losses": ["mse"], "normalise": ["standard"]}}
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    # name of the arm: its settings, and what the tuning gives
    "hard": (HARD, {"loss.alpha": "hard"}),
    "soft": (SOFT, {"loss.alpha": "soft"}),
    "feature": (LABELS | FEATURE, {"features.weights": "feature"}),
    "soft + feature": (
        SOFT | FEATURE,
        {"loss.alpha": "soft", "features.weights": "feature"},
    ),
}
TUNINGS = {"hard": SHARE, "soft": SHARE, "feature": WEIGHT}
STORED = {"hard": "hard", "soft": "soft", "feature": "fp8"}  # cache of a kind


def _arm(
    name: str, kind: str, data: str, views: int, caches: tuple[str, ...], *tables: str
) -> Arm:  # fmt: skip
    settings, chosen = KINDS[kind]
    return Arm(name, data, views, caches, settings, chosen, tables)


def _tuning(kind: str, value: float) -> Arm:
    settings, chosen = KINDS[kind]
    group, _, name = next(iter(chosen)).partition(".")
    given = value if group == "loss" else [value]
    settings = settings | {group: settings[group] | {name: given}}
    return Arm(f"{kind} {value:g}", "select", 12, (STORED[kind],), settings, {}, ("tuning",))


def arms() -> list[Arm]:
    """All arms, the most important first."""
    main = [
        Arm("none", "test", 12, (), LABELS, {}, ("targets",)),
        _arm("hard", "hard", "test", 12, ("hard",), "targets"),
        _arm("soft", "soft", "test", 12, ("soft",), "targets", "teachers"),
        _arm("feature", "feature", "test", 12, ("fp8",), "targets"),
        _arm("soft + feature", "soft + feature", "test", 12, ("soft", "fp8"), "targets"),
    ]
    teachers = [
        _arm("soft, teacher B", "soft", "test", 12, ("soft-b",), "teachers"),
        _arm("soft, teachers A and B", "soft", "test", 12, ("soft", "soft-b"), "teachers"),
    ]
    equal = {("hard", 48), ("soft", 12), ("feature", 3)}
    reuse = [
        _arm(
            f"{kind}, {views} views", kind, "reuse", views, (STORED[kind],), "reuse",
            *(("bytes",) if (kind, views) in equal else ()),
        )
        for views in (48, 12, 3, 1)
        for kind in ("soft", "hard", "feature")
    ]  # fmt: skip
    codecs = [
        _arm("top-2, 15 views", "soft", "reuse", 15, ("top2",), "bytes"),
        _arm("int8 feature, 3 views", "feature", "reuse", 3, ("int8",), "bytes"),
        _arm("PCA 16 fp8 feature, 12 views", "feature", "reuse", 12, ("pca16",), "bytes"),
        _arm("sampled, 15 views", "soft", "reuse", 15, ("sampled",), "bytes"),
    ]
    digits = [
        Arm("digits: none", "digits", 70, (), LABELS, {}, ("digits",)),
        *(
            _arm(f"digits: {name}", kind, "digits", 70, caches, "digits")
            for name, kind, caches in (
                ("hard", "hard", ("hard",)),
                ("soft", "soft", ("soft",)),
                ("feature", "feature", ("fp8",)),
                ("soft + feature", "soft + feature", ("soft", "fp8")),
                ("soft, teacher B", "soft", ("soft-b",)),
                ("soft, teachers A and B", "soft", ("soft", "soft-b")),
            )
        ),
        *(
            _arm(f"digits: {kind}, {views} views", kind, "digits", views, (STORED[kind],), "digits")
            for views in (10, 3, 1)
            for kind in ("soft", "hard", "feature")
        ),
    ]
    tuning = [_tuning(kind, value) for kind, values in TUNINGS.items() for value in values]
    return [*tuning, *main, *teachers, *reuse, *codecs, *digits]


TABLES = {
    "tuning": "Weights tried on the 10,000 images for selection, seed 100",
    "targets": "What the student learns from: 50,000 images, 12 views of each",
    "teachers": "Two teachers against one, at equal total weight",
    "reuse": f"Views of each image at equal steps: {REUSE_IMAGES:,} images, 48 epochs",
    "bytes": f"Codecs at no more than {BYTES} bytes an image",
    "digits": f"Scikit-learn's digits: {DIGITS_IMAGES} images, 70 epochs; 70 views where not named",
}
