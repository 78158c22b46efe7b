"""Every setting of a run, as frozen dataclasses; imports only the standard library.

One ``RunConfig`` serves `precompute` and `train`, so that teacher and student see views made from
the same fields, and each verb reads the config file that the other wrote. Wrong values raise
``InputError`` when a config is created, before anything is built.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from deit_fast.errors import InputError, did_you_mean

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RULES: dict[str, Callable[[Any], bool]] = {
    "be at least 1": lambda value: value >= 1,
    "be positive": lambda value: value > 0,
    "not be negative": lambda value: value >= 0,
    "lie in [0, 1]": lambda value: 0 <= value <= 1,
    "lie in [0, 1)": lambda value: 0 <= value < 1,
    "lie in (0, 1]": lambda value: 0 < value <= 1,
    "lie in [0, 0.9]": lambda value: 0 <= value <= 0.9,
    "lie in [0, 2^64)": lambda value: 0 <= value < 2**64,
    "have 0 < low <= high": lambda value: 0 < value[0] <= value[1],
    "hold positive numbers": lambda value: len(value) > 0 and min(value) > 0,
}


def _check(config: Any, group: str, rule: str, *names: str) -> None:
    """Raise InputError for the first of the named settings that breaks the rule; None passes."""
    for name in names:
        value = getattr(config, name)
        _require(value is None or _RULES[rule](value), f"{group}{name} must {rule}, not {value}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def constants(cls: type) -> dict[str, Any]:
    """The constants of a config class: values beside its settings that no user can change."""
    hints = typing.get_type_hints(cls).items()
    return {name: getattr(cls, name) for name, hint in hints if typing.get_origin(hint) is ClassVar}


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What the pixels of a view depend on, besides seed, sample ID and view ID.

    The fingerprint of every cache holds all of it: runs share teacher logits only if all fields and
    constants are equal.
    """

    image_size: int = 224
    """Side of the square view, in pixels."""
    crop: Literal["resized", "simple"] = "resized"
    """`resized`: a random box of the image, resized. `simple` (DeiT-III): resize the shorter side
    to image_size, pad 4 pixels by reflection, and cut out a random square."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: range of the crop's share of the image area."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    augment: Literal["randaugment", "three_augment", "none"] = "randaugment"
    """`randaugment`: two of fifteen operations (timm's `rand-m9-mstd0.5-inc1`). `three_augment`
    (DeiT-III): grayscale, solarize or Gaussian blur."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation, in random order, each by a random factor between
    1 - color_jitter and 1 + color_jitter. Not with `randaugment`."""
    erase_prob: float = 0.25
    """Random erasing: probability that a box of the view is replaced by N(0, 1) noise."""
    mixup_alpha: float = 0.8
    """Mixup: lambda ~ Beta(alpha, alpha). 0 turns Mixup off."""
    cutmix_alpha: float = 1.0
    """CutMix: lambda ~ Beta(alpha, alpha). 0 turns CutMix off. Where both kinds are on, half of the
    pairs get CutMix, the other half Mixup."""
    repeats: int = 3
    """Repeated augmentation: number of views of each sample that an epoch shows in succession."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means for normalisation; pixel values lie in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
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
        _check(self, "view.", "be at least 1", "image_size", "repeats")
        _check(self, "view.", "lie in [0, 1]", "flip_prob", "erase_prob")
        _check(self, "view.", "have 0 < low <= high", "crop_scale")
        _check(self, "view.", "not be negative", "mixup_alpha", "cutmix_alpha")
        _check(self, "view.", "hold positive numbers", "std")
        _check(self, "view.", "lie in [0, 0.9]", "color_jitter")
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and what decodes them."""

    root: str | None = None
    """Folder of images, `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`, or of shards."""
    source: Literal["folder", "tar", "packed", "synthetic"] = "folder"
    """`tar`: WebDataset shards, `root/train/*.tar`. `packed`: the output of `deit-fast pack`.
    `synthetic`: random images without reading or decoding, an upper bound of the speed."""
    loader: Literal["pillow", "dali-cpu", "dali-gpu"] = "pillow"
    """`pillow`: Pillow, in worker processes. `dali-cpu`: NVIDIA DALI decodes in threads, the kernel
    `augment` does the rest, to the pixels of `pillow`. `dali-gpu`: DALI decodes on the GPU, to
    slightly other pixels. A cache serves only loaders that make its pixels."""
    workers: int = 4
    """Decoding processes per rank, or threads with DALI. 0: the main process decodes."""
    on_error: Literal["substitute", "fail"] = "substitute"
    """On an unreadable image: use the next readable one and count it, or stop."""
    eval_crop: float = 0.875
    """Evaluation: side of the centre crop as a share of the resized shorter side."""
    synthetic_samples: int = 1024
    """Training samples of the synthetic source; it holds out a quarter as many."""

    synthetic_classes: ClassVar[int] = 10
    dali_hw_decoder_load: ClassVar[float] = 0.0  # an image's bits must not depend on its batch

    def __post_init__(self) -> None:
        _check(self, "data.", "not be negative", "workers")
        _check(self, "data.", "lie in (0, 1]", "eval_crop")
        _require(
            self.loader == "pillow" or self.source != "synthetic",
            f"data.loader={self.loader} decodes files, and data.source=synthetic has none",
        )
        _require(
            self.synthetic_samples >= 4,
            f"data.synthetic_samples must be at least 4, not {self.synthetic_samples}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train."""

    name: str = "deit_small_distilled_patch16_224"
    """A timm name, or `package.module:factory`, which is called with `num_classes=`."""
    drop_path: float = 0.1
    """Stochastic depth: drop rate of the last block; rates rise linearly from 0 at the first."""
    stochastic_depth: Literal["sample", "subset"] = "sample"
    """`sample`: drop the branch of each sample independently. `subset`: compute the branch only for
    a random part of the batch, whose size is fixed; this saves the dropped work."""
    residual: Literal["float32", "bfloat16"] = "float32"
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
    weights: str | None = None
    """Checkpoint to start from (.pth or .safetensors). none: random weights."""

    def __post_init__(self) -> None:
        _check(self, "model.", "lie in [0, 1)", "drop_path")
        _require(
            self.residual == "float32" or self.fused,
            f"model.residual={self.residual} needs model.fused",
        )
        _require(
            self.kernels is None or self.fused,
            f"model.kernels={','.join(self.kernels or ())} needs model.fused",
        )
        taken = {"num_classes", "img_size", *(item.name for item in dataclasses.fields(self))}
        for argument in self.args:
            name, _, number = argument.partition("=")
            _require(
                name.isidentifier() and number.isdecimal(),
                f"model.args takes NAME=NUMBER, such as depth=6, not {argument!r}",
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
    alpha: float = 0.5
    """Total loss = (1 - alpha) * base + alpha * distillation."""
    tau: float = 1.0
    """Temperature of soft distillation."""
    reduction: Literal["numel", "batchmean"] = "numel"
    """Soft distillation, B samples and C classes: tau^2 KL / (B C) as DeiT's code, or tau^2 KL / B
    as timm."""
    tail: Literal["bucket", "uniform", "renorm", "drop"] = "bucket"
    """How a top-k teacher's probability outside its k classes is treated; see docs/kernels.md."""
    base: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or binary cross-entropy (DeiT-III)."""
    smoothing: float = 0.1
    """Label smoothing of the base loss."""

    def __post_init__(self) -> None:
        _check(self, "loss.", "lie in [0, 1]", "alpha")
        _check(self, "loss.", "be positive", "tau")
        _check(self, "loss.", "lie in [0, 1)", "smoothing")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and moving average of the weights.

    The learning rate changes every step: linear warm-up, then cosine decay.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW, or LAMB (DeiT-III)."""
    impl: Literal["auto", "torch", "apex"] = "auto"
    """`torch`: torch's fused AdamW, timm's LAMB. `apex`: NVIDIA's FusedAdam and FusedLAMB, if
    NVIDIA's apex is installed. `auto`: apex for LAMB on a GPU if it is installed, else torch."""
    layer_decay: float | None = None
    """Fine-tuning: learning rate of a block relative to that of the next block."""
    lr: float = 5e-4
    """Peak learning rate for 512 samples per step; it is scaled linearly with batch_size."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine decay."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up, in epochs."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, norms, tokens and position embeddings have none."""
    clip_grad: float | None = None
    """Maximum norm of the gradient. none: no clipping, as in DeiT."""
    ema_decay: float = 0.99996
    """Decay of the moving average of the weights. 0 turns it off."""

    # Constants, with the values of DeiT's main.py.
    lr_batch: ClassVar[int] = 512  # samples of a step, for which `lr` holds
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # decay rates of the two moment estimates
    warmup_lr: ClassVar[float] = 1e-6  # learning rate of the first step
    eps: ClassVar[float] = 1e-8  # added to the root of the second moment

    def __post_init__(self) -> None:
        _check(self, "optim.", "be positive", "lr", "clip_grad")
        _check(self, "optim.", "not be negative", "warmup_epochs")
        _check(self, "optim.", "lie in [0, 1)", "ema_decay")
        _check(self, "optim.", "lie in (0, 1]", "layer_decay")


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How the teacher's logits of one view are stored; see docs/cache-format.md."""

    name: Literal[
        "hard", "topk", "dense-fp16", "dense-bf16", "dense-fp32", "dense-int8", "dense-fp8"
    ] = "topk"
    """`hard`: argmax. `topk`: k class IDs with fp16 log-probabilities. `dense-*`: every logit."""
    k: int | None = None
    """Number of classes that `topk` stores. none: 16, or all where there are fewer."""
    temperatures: tuple[float, ...] | None = None
    """Temperatures at which `topk` stores the exact probability of all other classes. none:
    loss.tau alone."""

    true_class: ClassVar[bool] = False  # the sample's own class in `topk`: read, no longer written
    block_records: ClassVar[int] = 4096  # a block has one checksum and is written as a whole

    def __post_init__(self) -> None:
        _check(self, "codec.", "be at least 1", "k")
        _check(self, "codec.", "hold positive numbers", "temperatures")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: data, views, model, loss, optimiser, teacher and cache."""

    recipe: str = "custom"
    """Name of the recipe that this configuration started from."""
    output: str = "runs/train"
    """Folder for checkpoints, metrics and results. A run whose folder has checkpoints resumes."""
    seed: int = 0
    """Seed of views, sample order and initial weights."""
    epochs: int = 300
    """Number of passes over the data; an epoch has about as many views as there are samples."""
    batch_size: int = 256
    """Samples per step over all ranks (global batch)."""
    compat: Literal["none", "deit"] = "none"
    """`deit`: as DeiT's code, use the order of its RASampler, mix each rank's batch with its
    reverse, update the learning rate once per epoch, one epoch late, and decay `dist_token`. Not
    with a cache. Such a run resumes exactly only with the same number of processes."""
    num_views: int | None = None
    """Distinct views per sample, a multiple of view.repeats. none: enough for all epochs."""
    accumulate: int = 1
    """Gradient accumulation: number of parts into which a rank's share of a batch is split."""
    max_steps: int | None = None
    """Stop after this many steps, for trials and benchmarks. none: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where available."""
    teacher: str | None = None
    """`timm:NAME` or `package.module:factory`, each optionally followed by `@WEIGHTS_FILE`."""
    teacher_batch: int = 256
    """Views per teacher call in `precompute`. All processes use it, so that the cache's bytes do
    not depend on their number."""
    cache: str | None = None
    """Folder of teacher logits: `precompute` writes it, `train` reads it instead of a teacher."""
    log_every: int = 50
    """Steps between log lines and between rows of metrics.jsonl."""
    track: tuple[str, ...] = ()
    """Also send the rows of metrics.jsonl to `tensorboard`, `wandb`, `mlflow` or `trackio`."""
    check_teacher_every: int | None = None
    """With both `cache` and `teacher`: run the teacher on every such step's batch, and stop if the
    cached logits differ. none: never."""
    profile_steps: int = 0
    """Profile this many steps on the first rank: profile/trace.json and profile/table.txt."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    save_every: int = 1
    """Epochs between checkpoints; the last epoch is always saved."""
    save_steps: int | None = None
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
    resume: bool = True
    """Resume from the newest checkpoint in `output`. --no-resume: fail if it has one."""
    view: ViewConfig = field(default_factory=ViewConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)

    max_rollbacks: ClassVar[int] = 3  # of one run; then it stops after all

    def __post_init__(self) -> None:
        _check(self, "", "be at least 1", "epochs", "batch_size", "teacher_batch", "accumulate",
               "log_every", "eval_every", "save_every")  # fmt: skip
        _check(self, "", "be positive", "save_steps", "check_teacher_every")
        _check(self, "", "not be negative", "profile_steps")
        _check(self, "", "lie in [0, 2^64)", "seed")
        for name in self.track:
            hint = "" if name in TRACKERS else did_you_mean(name, TRACKERS)
            _require(
                name in TRACKERS, f"track must be of {', '.join(TRACKERS)}, not {name!r}{hint}"
            )
        _require(len(set(self.track)) == len(self.track), f"track names one twice: {self.track}")
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
            views is None or (views >= 1 and views % repeats == 0),
            f"num_views must be a positive multiple of view.repeats={repeats}, not {views}",
        )

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

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with fields changed; a dict as the value of a group changes fields inside it."""
        nested = {
            key: dataclasses.replace(getattr(self, key), **value)
            if isinstance(value, dict)
            else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **nested)
