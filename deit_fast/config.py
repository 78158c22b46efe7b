"""Every setting of a run, as frozen dataclasses; imports only the standard library.

One ``RunConfig`` serves `precompute` and `train`, so that teacher and student see views made from
the same fields, and each verb reads the config file that the other wrote. Wrong values raise
``InputError`` when a config is created, before anything is built.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from deit_fast.errors import InputError

Fact = Literal[
    "data.images", "data.classes", "data.pixels", "val.images", "val.pixels",
    "teacher.model", "teacher.weights", "cache.manifest", "model.weights",
]  # fmt: skip
"""What a run is made of, by the names in its checkpoints; see docs/operations.md."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Within:
    """The numbers from ``low`` to ``high``; ``above`` and ``below`` leave an end itself out."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        least = self.low < value if self.above else self.low <= value
        return least and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        return f"{'[('[self.above]}{self.low}, {self.high}{'])'[self.below]}"


# Ranges. Their ends are far beyond sensible values, and no number between them overflows.
Count = Annotated[int, Within(1, 2**31 - 1)]
CountOrZero = Annotated[int, Within(0, 2**31 - 1)]
Passes = Annotated[int, Within(1, 10**6)]
Epoch = Annotated[int, Within(0, 10**6)]
Pixels = Annotated[int, Within(1, 8192)]
Seed = Annotated[int, Within(0, 2**64 - 1)]
Workers = Annotated[int, Within(0, 512)]
Share = Annotated[float, Within(0, 1)]
PositiveShare = Annotated[float, Within(0, 1, above=True)]
ShareBelowOne = Annotated[float, Within(0, 1, below=True)]
Rate = Annotated[float, Within(0, 100)]
Deviation = Annotated[float, Within(0.001, 10)]
EvalCrop = Annotated[float, Within(0.1, 1)]
Temperature = Annotated[float, Within(0.01, 1000)]
Residual = Literal["float32", "bfloat16"]
Head = Literal["standard", "lift", "wide_last"]
Width = Annotated[int, Within(1, 65536)]
Target = Literal["logits", "cls", "mean", "pooled", "patches"]
"""What a teacher gives; all but the logits are features."""
FeatureLoss = Literal["cosine", "mse", "smooth_l1", "balanced", "dune", "similarity", "spectral"]
Normaliser = Literal["none", "standard", "phi_s", "layer_norm"]
TEACHER_SETTINGS = (
    "teacher_mean", "teacher_std", "teacher_size", "teacher_classes", "teacher_floor",
)  # fmt: skip
"""Settings of RunConfig that hold for one teacher."""
MOST_INITIAL_SHARE = 0.1  # of a moving average in its initial weights; above it the log says so
LONGEST_TEXT = 4096  # characters; the longest path that Linux takes


def check(name: str, hint: Any, value: Any) -> Any:
    """``value`` as type ``hint`` and within its range; lists become tuples, whole numbers floats.

    Raises:
        InputError: names what ``name`` must be.
    """
    try:
        return _fit(hint, value)
    except (TypeError, OverflowError):
        what = f"{name} must be {describe(hint)}, not {shown(value)}"
        raise InputError(what) from None


def _fit(hint: Any, value: Any) -> Any:
    """As ``check``. Raises TypeError or OverflowError where the value does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitted = _fit(arguments[0], value)
        if fitted in arguments[1]:
            return fitted
    elif origin in (typing.Union, types.UnionType):  # `X | None`
        return None if value is None else _fit(arguments[0], value)
    elif origin is Literal and value in arguments:
        return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(map(_fit, hints, value))
    elif hint in (str, Path) and isinstance(value, hint):
        if 0 < len(str(value)) <= LONGEST_TEXT and "\0" not in str(value):
            return value
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def describe(hint: Any) -> str:
    """What a value of a type is, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{describe(arguments[0])} in {arguments[1]}"
    if origin in (typing.Union, types.UnionType):
        return f"{describe(arguments[0])}, or none"
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple and typing.get_origin(arguments[0]) is tuple:  # any number of pairs
        return "pairs of " + " and ".join(map(describe, typing.get_args(arguments[0])))
    if origin is tuple:
        count = "any number of" if arguments[-1] is Ellipsis else len(arguments)
        kinds = dict.fromkeys(describe(kind) for kind in arguments if kind is not Ellipsis)
        return f"{count} values, each {' or '.join(kinds)}"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    if hint in (str, Path):
        return f"a text of 1 to {LONGEST_TEXT} characters without NUL"
    return names.get(hint) or f"a {hint.__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


def shown(value: Any, levels: int = 2) -> str:
    """A value in a message, cut where it is long; lists in up to ``levels`` lists are opened."""
    if type(value) is int and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)) and levels > 0:
        return " ".join(shown(item, levels - 1) for item in value[:8]) or "nothing"
    return _SHORT.repr(str(value) if isinstance(value, Path) else value)


def check_all(config: Any, group: str) -> None:
    """Check all fields of a config, whose names in messages begin with ``group``."""
    for name, hint in _hints(config.__class__).items():
        object.__setattr__(config, name, check(group + name, hint, getattr(config, name)))


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def constants(cls: type) -> dict[str, Any]:
    """The constants of a config class: values beside its settings that no user can change."""
    hints = typing.get_type_hints(cls).items()
    return {name: getattr(cls, name) for name, hint in hints if typing.get_origin(hint) is ClassVar}


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What the pixels of a view depend on, besides sample ID and view ID.

    The fingerprint of every cache holds all of it: runs share teacher logits only if all fields and
    constants are equal.
    """

    seed: Seed = 0
    """Seed of the views, of the pairs that are mixed and of the order of samples. All runs that use
    a cache have its view.seed; their `seed` may differ."""
    image_size: Pixels = 224
    """Side of the square view, in pixels."""
    size_schedule: tuple[tuple[Epoch, Pixels], ...] = ()
    """Progressive sizes: pairs of a first epoch and the side of the views from then on, such as
    `0 128 99 176 201 224`. The first epoch is 0, each is a multiple of repeats, and the last side
    is image_size, at which the run is evaluated. Empty: image_size in every epoch."""
    crop: Literal["resized", "simple"] = "resized"
    """`resized`: a random box of the image, resized. `simple` (DeiT-III): resize the shorter side
    to image_size, pad 4 pixels by reflection, and cut out a random square."""
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0)
    """Random resized crop: range of the crop's share of the image area."""
    flip_prob: Share = 0.5
    """Probability of a horizontal flip."""
    augment: Literal["randaugment", "three_augment", "none"] = "randaugment"
    """`randaugment`: two of fifteen operations (timm's `rand-m9-mstd0.5-inc1`). `three_augment`
    (DeiT-III): grayscale, solarize or Gaussian blur."""
    color_jitter: Annotated[float, Within(0, 0.9)] = 0.0
    """Change brightness, contrast and saturation, in random order, each by a random factor between
    1 - color_jitter and 1 + color_jitter. Not with `randaugment`."""
    erase_prob: Share = 0.25
    """Random erasing: probability that a box of the view is replaced by N(0, 1) noise."""
    mixup_alpha: Rate = 0.8
    """Mixup: lambda ~ Beta(alpha, alpha). 0 turns Mixup off."""
    cutmix_alpha: Rate = 1.0
    """CutMix: lambda ~ Beta(alpha, alpha). 0 turns CutMix off. Where both kinds are on, half of the
    pairs get CutMix, the other half Mixup."""
    repeats: Annotated[int, Within(1, 1000)] = 3
    """Repeated augmentation: number of views of each sample that an epoch shows in succession."""
    mean: tuple[Share, Share, Share] = IMAGENET_MEAN
    """Channel means for normalisation; pixel values lie in [0, 1]."""
    std: tuple[Deviation, Deviation, Deviation] = IMAGENET_STD
    """Channel standard deviations for normalisation; pixel values lie in [0, 1]."""

    # Constants, with the values of timm and of DeiT's main.py.
    crop_ratio: ClassVar[tuple[float, float]] = (3 / 4, 4 / 3)  # width / height, log-uniform
    randaugment_magnitude: ClassVar[float] = 9.0  # mean strength of an operation, 0 to 10
    randaugment_std: ClassVar[float] = 0.5  # standard deviation of an operation's strength
    randaugment_prob: ClassVar[float] = 0.5  # that each of the two operations is applied
    erase_scale: ClassVar[tuple[float, float]] = (0.02, 1 / 3)  # share of the view's area
    erase_ratio: ClassVar[tuple[float, float]] = (0.3, 1 / 0.3)  # height / width, log-uniform
    mix_prob: ClassVar[float] = 1.0  # that a pair of samples is mixed
    switch_prob: ClassVar[float] = 0.5  # of CutMix rather than Mixup where both are on

    def __post_init__(self) -> None:
        check_all(self, "view.")
        low, high = self.crop_scale
        _require(low <= high, f"view.crop_scale must not fall, as {low} {high} does")
        _require(
            self.color_jitter == 0 or self.augment != "randaugment",
            f"view.color_jitter={self.color_jitter} has no effect with view.augment=randaugment, "
            f"in timm and DeiT too: set it to 0, or choose three_augment or none",
        )
        _require(
            self.crop == "resized" or self.image_size >= 5,
            f"view.crop=simple reflects 4 pixels, so view.image_size must be at least 5, "
            f"not {self.image_size}",
        )
        if self.size_schedule:
            self._check_sizes()

    def _check_sizes(self) -> None:
        firsts, sides = zip(*self.size_schedule, strict=True)
        given = f"view.size_schedule={shown(self.size_schedule)}"
        _require(
            firsts[0] == 0 and list(firsts) == sorted(set(firsts)),
            f"{given}: its epochs must start at 0 and rise",
        )
        wrong = next((first for first in firsts if first % self.repeats), 0)
        near = wrong // self.repeats * self.repeats
        _require(
            wrong == 0,
            f"{given}: epoch {wrong} is inside a cycle of view.repeats={self.repeats} epochs, "
            f"whose views have one size: change it to {near} or {near + self.repeats}",
        )
        _require(
            sides[-1] == self.image_size,
            f"{given} ends at {sides[-1]} pixels, but view.image_size={self.image_size} is the "
            f"size of evaluation: make them equal",
        )
        _require(
            self.crop == "resized" or min(sides) >= 5,
            f"{given}: view.crop=simple reflects 4 pixels, so a side must be at least 5",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The distinct sides of views, in the order in which a run shows them first."""
        return tuple(dict.fromkeys(side for _, side in self.size_schedule)) or (self.image_size,)

    def size_of(self, view_id: int) -> int:
        """Side of a view in pixels. Epoch e shows views of the size of view e."""
        sides = (side for first, side in reversed(self.size_schedule) if first <= view_id)
        return next(sides, self.image_size)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what decodes them."""

    root: str | None = None
    """Folder of images, `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`, or of shards.
    Shards may also be at a URL, such as `s3://bucket/imagenet`."""
    source: Literal["folder", "tar", "packed", "hf", "synthetic"] = "folder"
    """`tar`: WebDataset shards, `root/train/*.tar`. `packed`: the output of `deit-fast pack`. `hf`:
    Parquet or Arrow files of a Hugging Face dataset.
    `synthetic`: random images without reading or decoding, an upper bound of the speed."""
    image_column: str | None = None
    """Of `hf`: the column of images. none: the only one."""
    label_column: str | None = None
    """Of `hf`: the column of labels. none: the `ClassLabel`, else `label`, else the only one."""
    loader: Literal["pillow", "dali-cpu", "dali-gpu"] = "pillow"
    """`pillow`: Pillow, in worker processes. `dali-cpu`: NVIDIA DALI decodes in threads, the kernel
    `augment` does the rest, to the pixels of `pillow`. `dali-gpu`: DALI decodes on the GPU, to
    slightly other pixels. A cache serves only loaders that make its pixels."""
    workers: Workers | None = None
    """Decoding processes per rank, or threads with DALI. 0: the main process decodes. none: one
    less than a rank has cores, between 1 and 4."""
    local_copy_gb: Annotated[float, Within(0, 1e6)] = 50.0
    """GB of samples from a URL that this machine keeps in the user's cache folder, for all
    processes and later runs, and as many of caches at a URL. 0: no samples, and no such cache."""
    on_error: Literal["substitute", "fail"] = "substitute"
    """On an unreadable image: use the next readable one and count it, or stop."""
    verify: Literal["names", "sizes"] = "names"
    """What a start proves of a large folder that was indexed before: that it holds the same files,
    by the times of its folders, or also that each file has the same size, which asks for them
    all."""
    eval_crop: EvalCrop = 0.875
    """Evaluation: side of the centre crop as a share of the resized shorter side."""
    synthetic_samples: Annotated[int, Within(4, 2**31 - 1)] = 1024
    """Training samples of the synthetic source; it holds out a quarter as many."""

    synthetic_classes: ClassVar[int] = 10
    dali_hw_decoder_load: ClassVar[float] = 0.0  # an image's bits must not depend on its batch

    @property
    def copy_bytes(self) -> int:
        """``local_copy_gb`` in bytes."""
        return int(self.local_copy_gb * 1e9)

    def __post_init__(self) -> None:
        check_all(self, "data.")
        for name in ("image_column", "label_column"):
            value = getattr(self, name)
            _require(
                value is None or self.source == "hf",
                f"data.{name}={value} has no effect with data.source={self.source}: it is for hf",
            )
        _require(
            self.loader == "pillow" or self.source != "synthetic",
            f"data.loader={self.loader} decodes files, and data.source=synthetic has none",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train."""

    name: str = "deit_small_distilled_patch16_224"
    """A timm name, or `package.module:factory`, which is called with `num_classes=`."""
    drop_path: Annotated[float, Within(0, 0.99)] = 0.1
    """Stochastic depth: drop rate of the last block; rates rise linearly from 0 at the first."""
    stochastic_depth: Literal["sample", "subset"] = "sample"
    """`sample`: drop the branch of each sample independently. `subset`: compute the branch only for
    a random part of the batch, whose size is fixed; this saves the dropped work."""
    patch_drop: Annotated[float, Within(0, 0.95)] = 0.0
    """Patch dropout: share of the patches that training leaves out after the embedding, others for
    each sample. For timm's vision transformers."""
    residual: Residual = "float32"
    """Dtype of a fused transformer's residual stream. `bfloat16` halves the norms' memory traffic
    and rounds each sum; see docs/performance.md."""
    pad_head: bool = False
    """Align each row of logits to 16 bytes, so that the loss kernel can use wide loads. For class
    counts that are not a multiple of 8, such as 21841."""
    fused: bool = True
    """Run timm transformers on this package's kernels. On a GPU this includes an online teacher,
    and the teacher of `precompute` if `compile` is `blocks` or `model`."""
    kernels: tuple[str, ...] | None = None
    """Kernels of a fused transformer: any of `attention`, `add_layer_norm`, `bias_gelu` and
    `mlp_backward`. none: those chosen for this GPU, see docs/kernels.md."""
    args: tuple[str, ...] = ()
    """Whole-number arguments of timm's transformer, in place of the named model's, such as
    `patch_size=4 depth=6`."""
    head: Head = "standard"
    """What gives a narrow transformer features of `wide` channels (arXiv 2511.15572). `lift`: a
    linear layer and a LayerNorm after the last block; the classifier reads their mean over the
    patches. `wide_last`: the last block and the classifier are wide."""
    wide: Width | None = None
    """Channels of the features with `lift` and `wide_last`: those of the teacher's features."""
    weights: str | None = None
    """Weights to start from: a file (.pth or .safetensors); FILE#KEY for the state dict under a
    key, where an average of the weights is preferred; `timm:NAME` for timm's pretrained weights.
    none: random weights."""

    head_width: ClassVar[int] = 64  # channels of an attention head in the block of wide_last

    def __post_init__(self) -> None:
        check_all(self, "model.")
        _require(
            (self.wide is None) == (self.head == "standard"),
            f"model.head={self.head} needs model.wide, the channels of the teacher's features"
            if self.wide is None
            else f"model.wide={self.wide} needs model.head, lift or wide_last",
        )
        _require(
            self.head != "wide_last" or (self.wide or 0) % self.head_width == 0,
            f"model.head=wide_last has attention heads of {self.head_width} channels, and "
            f"model.wide={self.wide} is no multiple of that",
        )
        _require(
            self.residual == "float32" or self.fused,
            f"model.residual={self.residual} needs model.fused",
        )
        _require(
            self.kernels is None or self.fused,
            f"model.kernels={','.join(self.kernels or ())} needs model.fused",
        )
        taken = {"num_classes", "img_size", "drop_path_rate", "patch_drop_rate"}
        taken |= {*(item.name for item in dataclasses.fields(self))}
        for argument in self.args:
            name, _, number = argument.partition("=")
            _require(
                name.isidentifier() and number.isdecimal() and len(number) < 10,
                f"model.args takes NAME=NUMBER, such as depth=6, not {shown(argument)}",
            )
            _require(name not in taken, f"model.args {argument}: another setting decides {name}")

    def timm_arguments(self) -> dict[str, int]:
        """``args`` by name; of two with one name the last counts."""
        pairs = (argument.split("=") for argument in self.args)
        return {name: int(number) for name, number in pairs}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Base loss on the class head and distillation loss on the distillation head."""

    kind: Literal["none", "soft", "hard"] = "hard"
    """`soft`: match softmax(teacher / tau). `hard`: match argmax(teacher)."""
    alpha: Share = 0.5
    """Total loss = (1 - alpha) * base + alpha * distillation."""
    tau: Temperature = 1.0
    """Temperature of soft distillation."""
    reduction: Literal["numel", "batchmean"] = "numel"
    """Soft distillation, B samples and C classes: tau^2 KL / (B C) as DeiT's code, or tau^2 KL / B
    as timm."""
    tail: Literal["bucket", "uniform", "renorm", "drop"] = "bucket"
    """How a top-k teacher's probability outside its k classes is treated; see docs/kernels.md."""
    teachers: tuple[Rate, ...] | None = None
    """With the logits of several teachers, the weight of each in the mean of their losses, in the
    order of the caches. none: equal weights."""
    base: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or binary cross-entropy (DeiT-III)."""
    smoothing: ShareBelowOne = 0.1
    """Label smoothing of the base loss."""

    def __post_init__(self) -> None:
        check_all(self, "loss.")
        _require(
            self.teachers is None or sum(self.teachers) > 0,
            f"loss.teachers={shown(self.teachers)} must have a weight above 0",
        )

    def shares(self, count: int) -> tuple[float, ...]:
        """Weights of ``count`` teachers' logits, which sum to 1.

        Raises:
            InputError: ``teachers`` has another number of weights.
        """
        weights = self.teachers or (1.0,) * count
        _require(
            len(weights) == count,
            f"loss.teachers={' '.join(map(str, weights))} must be {count} "
            f"weight{'s' * (count != 1)}, one for each teacher of logits",
        )
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def trained_head(self) -> str:
        """Which of two heads this loss trains, both, class or distillation: a part of weight 0
        trains none."""
        if self.kind == "none" or self.alpha == 0:
            return "class"
        return "distillation" if self.alpha == 1 else "both"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and moving average of the weights.

    The learning rate changes every step: linear warm-up, then as ``schedule``.
    """

    name: Literal["adamw", "lamb", "muon", "nmuon", "adamuon", "nadamuon"] = "adamw"
    """AdamW, LAMB (DeiT-III), or timm's Muon, which orthogonalises the updates of weight matrices:
    `nmuon` with Nesterov momentum, `adamuon` with second moments, `nadamuon` with both."""
    impl: Literal["auto", "torch", "apex"] = "auto"
    """`torch`: torch's fused AdamW, timm's LAMB. `apex`: NVIDIA's FusedAdam and FusedLAMB, if
    NVIDIA's apex is installed. `auto`: apex for LAMB on a GPU if it is installed, else torch."""
    layer_decay: PositiveShare | None = None
    """Fine-tuning: learning rate of a block relative to that of the next block."""
    lr: Annotated[float, Within(0, 100, above=True)] = 5e-4
    """Peak learning rate for 512 samples per step; it is scaled linearly with the step's batch."""
    min_lr: Rate = 1e-5
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine`: decay over the whole run. `wsd` (warm-up, stable, decay): stay at the peak, then
    fall as 1 - sqrt(share) over the last decay_epochs."""
    decay_epochs: Annotated[float, Within(0, 10**6, above=True)] | None = None
    """Length of the decay of `wsd`, at the end of the run, in epochs."""
    warmup_epochs: Annotated[float, Within(0, 10**6)] = 5.0
    """Length of the linear warm-up, in epochs."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay; biases, norms, tokens and position embeddings have none."""
    clip_grad: Annotated[float, Within(1e-6, 1e6)] | None = None
    """Maximum norm of the gradient. none: no clipping, as in DeiT."""
    ema_decay: ShareBelowOne = 0.99996
    """Decay of the moving average of the weights, the same at every step. 0 turns it off."""
    ema_warmup: bool = False
    """Let the decay of the moving average rise from 0 as 1 - (1 + step)^(-2/3), up to ema_decay."""

    # Constants, with the values of DeiT's main.py.
    lr_batch: ClassVar[int] = 512  # samples of a step, for which `lr` holds
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # decay rates of the two moment estimates
    warmup_lr: ClassVar[float] = 1e-6  # learning rate of the first step
    eps: ClassVar[float] = 1e-8  # added to the root of the second moment

    def __post_init__(self) -> None:
        check_all(self, "optim.")
        _require(
            self.impl != "apex" or self.name in ("adamw", "lamb"),
            f"optim.impl=apex has no {self.name}: choose auto or torch",
        )

    def initial_share(self, steps: int) -> float:
        """The share that the weights after the first step (with warm-up the second) have in the
        moving average after ``steps`` steps: the product of the decays since then."""
        since = max(0, steps - (2 if self.ema_warmup else 1))
        if not self.ema_warmup:
            return self.ema_decay**since
        decays = (1 - (1 + step) ** (-2 / 3) for step in range(1, min(since, 1000) + 1))
        return math.prod(min(decay, self.ema_decay) for decay in decays)  # 1e-12 after 1000


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How the teacher's logits of one view are stored; see docs/cache-format.md."""

    name: Literal[
        "hard", "topk", "sampled", "dense-fp16", "dense-bf16", "dense-fp32", "dense-int8",
        "dense-fp8"
    ] = "topk"  # fmt: skip
    """`hard`: argmax. `topk`: k class IDs with fp16 log-probabilities. `sampled`: the same and a
    sample of the other classes. `dense-*`: every logit."""
    k: CountOrZero | None = None
    """Number of classes that `topk` and `sampled` store. none: 16 and 8, or fewer where there are
    few classes. `sampled` with 0 draws from all classes."""
    draws: Count | None = None
    """Number of classes that `sampled` draws from those beyond k, with replacement, for each
    temperature. none: 8, or fewer where there are few classes."""
    temperatures: tuple[Temperature, ...] | None = None
    """Temperatures at which `topk` and `sampled` store the exact probability of all other classes.
    none: loss.tau alone."""

    true_class: ClassVar[bool] = False  # the sample's own class in `topk`: read, no longer written
    block_records: ClassVar[int] = 4096  # a block has one checksum and is written as a whole

    def __post_init__(self) -> None:
        check_all(self, "codec.")
        _require(self.temperatures != (), "codec.temperatures must hold a number, or be none")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """A teacher's features: which are taken, how they are stored, and how a student learns them.

    A *term* of the loss belongs to each feature target of an online teacher, in the order of
    ``targets``, or to each feature cache, in the order of ``cache`` and ``more_caches``. Settings
    that are lists have one entry for each term, or one entry for all.
    """

    block: Annotated[int, Within(-(10**4), 10**4)] | None = None
    """Take features from the output of this block of the teacher, counted from 0, a negative one
    from the last. none: from the end of the network, after its final norm."""
    norm: bool = True
    """Apply the teacher's final norm to the output of `block`."""
    grid: Pixels | None = None
    """Side of the grid of `patches` after average pooling by a whole factor. none: the teacher's
    own grid."""
    codec: Literal["fp8", "int8", "int8-standard", "fp16", "bf16", "fp32"] = "fp8"
    """How features are stored; see docs/cache-format.md. `fp8` and `int8` have a scale for each
    token; `int8-standard` divides by each channel's standard deviation before."""
    reduce: Literal["none", "pca", "random"] = "none"
    """Store a projection of the channels: on their principal components, or on random axes."""
    dim: Count | None = None
    """Number of channels after `reduce`."""
    fit_views: Count = 4096
    """Views of which the statistics of a new cache are measured: means, deviations, axes."""
    weights: tuple[Rate, ...] = (1.0,)
    """Weight of each term in the total loss."""
    losses: tuple[FeatureLoss, ...] = ("cosine",)
    """Loss of each term. `balanced`: 0.9 cosine + 0.1 smooth L1, `dune`: half of each.
    `similarity`: the similarities among tokens. `spectral`: the frequencies of the grid."""
    normalise: tuple[Normaliser, ...] = ("none",)
    """Of the teacher's features, by the statistics of its cache: `standard`: each channel to mean 0
    and deviation 1. `phi_s`: rotated, so that all channels have one deviation. `layer_norm`: each
    token by its own mean and deviation."""
    projectors: tuple[Literal["linear", "mlp", "none"], ...] = ("linear",)
    """Maps the student's tokens to the teacher's width; it is trained and left out of the weights
    of the student. `none`: the widths are equal."""
    hidden: Count = 2048
    """Width inside a projector `mlp`."""
    token: Literal["auto", "class", "distillation", "mean"] = "auto"
    """The student's token that learns `cls`, `mean` and `pooled`; `mean` is that of its patches.
    `auto`: the distillation token, else the class token, else the mean, as the student has them."""
    student_block: Annotated[int, Within(-(10**4), 10**4)] | None = None
    """Block of the student whose output learns, counted as `block`. none: the output of its final
    norm."""
    drop: Literal["none", "random", "dune"] = "none"
    """With several teachers, leave some out for each view: `random`: each with probability 1/2, but
    not all. `dune`: the one of largest loss stays, each other with probability 1/2."""

    def __post_init__(self) -> None:
        check_all(self, "features.")
        for name in ("weights", "losses", "normalise", "projectors"):
            _require(len(getattr(self, name)) > 0, f"features.{name} must hold an entry")

    def of_terms(self, name: str, count: int) -> tuple[Any, ...]:
        """A setting's values for ``count`` terms.

        Raises:
            InputError: the setting has another number of values than one or ``count``.
        """
        values: tuple[Any, ...] = getattr(self, name)
        if len(values) == 1:
            return values * count
        given = f"features.{name}={' '.join(map(str, values))} has {len(values)} values"
        _require(
            count > 0,
            f"{given}, and the run learns no features: add a feature cache or target, or leave the "
            f"setting out",
        )
        _require(
            len(values) == count,
            f"{given} for {count} feature terms: give one for each term, or one for all",
        )
        return values


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: data, views, model, loss, optimiser, teacher and cache."""

    recipe: str = "custom"
    """Name of the recipe that this configuration started from."""
    output: str = "runs/train"
    """Folder for checkpoints, metrics and results. A run whose folder has checkpoints resumes. A
    URL: a folder in the user's cache folder, with the URL as mirror."""
    mirror: str | None = None
    """URL to which checkpoints and results are copied too, such as s3://bucket/run. A run whose
    folder lacks the newest checkpoint there resumes from it."""
    seed: Seed = 0
    """Seed of the initial weights, stochastic depth and patch dropout; views have view.seed."""
    epochs: Passes = 300
    """Number of passes over the data; an epoch has about as many views as there are samples."""
    batch_size: Count = 256
    """Samples per step over all ranks (global batch)."""
    batch_schedule: tuple[tuple[Passes, Count], ...] = ()
    """Batch sizes of later epochs: pairs of a first epoch, 1 or later, and the samples per step
    from then on, such as `30 2048 60 4096`. Empty: batch_size in every epoch."""
    compat: Literal["none", "deit"] = "none"
    """`deit`: as DeiT's code, use the order of its RASampler, mix each rank's batch with its
    reverse, update the learning rate once per epoch, one epoch late, and decay `dist_token`. Not
    with a cache. Such a run resumes exactly only with the same number of processes."""
    num_views: Passes | None = None
    """Distinct views per sample, a multiple of view.repeats. none: enough for all epochs."""
    accumulate: Count = 1
    """Gradient accumulation: number of parts into which a rank's share of a batch is split."""
    max_steps: Count | None = None
    """Stop after this many steps, for trials and benchmarks. none: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where available."""
    teacher: str | None = None
    """`timm:NAME` or `package.module:factory`, each optionally followed by `@WEIGHTS_FILE`."""
    teacher_mean: tuple[Share, Share, Share] | None = None
    """Channel means that the teacher expects, of pixels in [0, 1], for weights that do not say
    theirs (those that `train` writes do); with teacher_std. none: timm's or the factory's."""
    teacher_std: tuple[Deviation, Deviation, Deviation] | None = None
    """Channel standard deviations that the teacher expects; with teacher_mean."""
    teacher_size: Pixels | None = None
    """Side of the images that the teacher gets, to which the finished views are resized (bicubic,
    with antialiasing). none: the views as they are."""
    teacher_batch: Count = 256
    """Views per teacher call in `precompute`. All processes use it, so that the cache's bytes do
    not depend on their number."""
    teacher_classes: str | None = None
    """File with a line for each output of the teacher: the name of the data's class that it stands
    for, or any other text. none: the names in the teacher's weights, or ImageNet's synsets."""
    teacher_floor: Share | None = None
    """Refuse a teacher with a lower top-1 accuracy on 512 held-out images, before anything is
    written or trained. none: only log it, with a warning where it is low. 0: do not measure it."""
    targets: tuple[Target, ...] = ("logits",)
    """What the teacher gives: `logits`, or features: `cls`, its class token; `mean`, the mean of
    its patches; `pooled`, what its own head reads; `patches`, a token for each place of a grid.
    `precompute` stores each in a cache of its own."""
    cache: str | None = None
    """Folder of teacher logits: `precompute` writes it, `train` reads it instead of a teacher.
    Features are in folders inside it, named as their target; `train` takes such a folder too."""
    more_caches: tuple[str, ...] = ()
    """`train`: further caches of the same views, logits or features, of this or other teachers."""
    log_every: Count = 50
    """Steps between log lines and between rows of metrics.jsonl."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Also send the rows of metrics.jsonl to `tensorboard`, `wandb`, `mlflow` or `trackio`."""
    check_teacher_every: Count | None = None
    """With both `cache` and `teacher`: run the teacher on every such step's batch, and stop if the
    cached logits differ. none: never."""
    profile_steps: CountOrZero = 0
    """Profile this many steps on the first rank: profile/trace.json and profile/table.txt."""
    eval_every: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    save_every: Count = 1
    """Epochs between checkpoints; the last epoch is always saved."""
    save_steps: Count | None = None
    """Also save whenever this many steps have passed. none: do not."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """On a loss or gradient that is not finite, which never reaches the weights: stop with an
    error, or roll back to the newest checkpoint and skip that step's views."""
    compile: Literal["auto", "none", "blocks", "model"] = "auto"
    """torch.compile each of the student's `blocks`, or the whole `model`, which takes longer.
    `auto`: `blocks` on CUDA, `none` on a CPU. Includes evaluation and an online teacher; the
    teacher of `precompute` only with `blocks` or `model`."""
    cuda_graphs: bool = False
    """Capture a whole step as one CUDA graph and replay it; for small models and batches, which are
    bound by kernel launches. Needs AdamW, one process, and neither accumulate nor profile_steps."""
    keep_every: Count | None = None
    """Epochs between checkpoints that stay, to branch from. Of all others the newest two stay."""
    resume_from: str | None = None
    """Branch: a checkpoint of another run with `wsd`, before its decay. The run starts from it and
    decays; `epochs` follows from the checkpoint and optim.decay_epochs."""
    resume: bool = True
    """Resume from the newest checkpoint in `output`. --no-resume: fail if it has one."""
    accept_change: tuple[Fact, ...] = ()
    """Resume although these have changed since the checkpoint. For this start: the run then goes on
    with what it has now."""
    view: ViewConfig = field(default_factory=ViewConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)

    max_rollbacks: ClassVar[int] = 3  # of one run; then it stops after all

    def __post_init__(self) -> None:
        check_all(self, "")
        for name in ("track", "targets", "more_caches"):
            names = getattr(self, name)
            _require(len({*names}) == len(names), f"{name} names one twice: {shown(names)}")
        _require(self.targets != (), f"targets must name one of {describe(Target)[7:]}")
        _require(
            not self.cuda_graphs or self.accumulate == 1,
            f"cuda_graphs with accumulate={self.accumulate}: each part needs its own seed of the "
            f"generator, which a graph cannot set; choose accumulate=1 or --no-cuda-graphs",
        )
        _require(
            not self.cuda_graphs or self.profile_steps == 0,
            "cuda_graphs with profile_steps: the operators of a graph have no names; profile with "
            "--no-cuda-graphs",
        )
        _require(
            self.compat == "none" or self.cache is None,
            f"compat=deit mixes a view with the other samples of its batch, so no cache can hold "
            f"it (cache={self.cache}): use --teacher alone, or --compat none",
        )
        _require(
            self.compat == "none" or self.num_views is None,
            f"compat=deit draws new views every epoch; num_views={self.num_views} needs "
            f"--compat none",
        )
        views, repeats = self.num_views, self.view.repeats
        _require(
            views is None or (views % repeats == 0),
            f"num_views must be a positive multiple of view.repeats={repeats}, not {views}",
        )
        if self.view.size_schedule:
            self._check_size_schedule()
        if self.batch_schedule:
            self._check_batch_schedule()

    def _check_batch_schedule(self) -> None:
        firsts = [first for first, _ in self.batch_schedule]
        _require(
            firsts == sorted(set(firsts)),
            f"batch_schedule={shown(self.batch_schedule)}: its epochs must rise",
        )
        for setting, is_set, remedy in (
            ("compat=deit", self.compat == "deit", "DeiT's code has one batch size"),
            ("cuda_graphs", self.cuda_graphs, "a graph has one size; choose --no-cuda-graphs"),
        ):
            _require(not is_set, f"batch_schedule does not go with {setting}: {remedy}")

    def _check_size_schedule(self) -> None:
        views = self._views_of_all_epochs
        _require(
            self.view_count >= views,
            f"view.size_schedule with num_views={self.num_views}: a run of {self.epochs} epochs "
            f"would come back to the views of its small sizes; set num_views to none or {views}",
        )
        for setting, is_set, remedy in (
            ("compat=deit", self.compat == "deit", "DeiT's code has one size"),
            ("cuda_graphs", self.cuda_graphs, "a graph has one size; choose --no-cuda-graphs"),
            ("data.source=synthetic", self.data.source == "synthetic", "its images have one size"),
        ):
            _require(not is_set, f"view.size_schedule does not go with {setting}: {remedy}")

    @property
    def caches(self) -> tuple[str, ...]:
        """All folders of teacher targets that `train` reads."""
        return () if self.cache is None else (self.cache, *self.more_caches)

    @property
    def feature_targets(self) -> tuple[Target, ...]:
        """``targets`` without the logits."""
        return tuple(target for target in self.targets if target != "logits")

    @property
    def view_count(self) -> int:
        """Distinct views per sample, V of the design."""
        return self._views_of_all_epochs if self.num_views is None else self.num_views

    @property
    def views_used(self) -> int:
        """Views per sample that the run shows: IDs 0 .. views_used - 1."""
        return min(self._views_of_all_epochs, self.view_count)

    @property
    def _views_of_all_epochs(self) -> int:
        """Number of epochs, rounded up to a multiple of view.repeats."""
        return -(-self.epochs // self.view.repeats) * self.view.repeats

    def with_teacher(self, spec: str) -> RunConfig:
        """A copy with this teacher. Another one does not get ``TEACHER_SETTINGS`` of the one
        before."""
        if spec == self.teacher:
            return self
        return self.replace(teacher=spec, **dict.fromkeys(TEACHER_SETTINGS))

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with fields changed; a dict as the value of a group changes fields inside it."""
        nested = {
            key: dataclasses.replace(getattr(self, key), **value)
            if isinstance(value, dict) and dataclasses.is_dataclass(getattr(self, key, None))
            else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **nested)
