"""Every setting of a run, as frozen dataclasses; imports only the standard library.

One ``RunConfig`` serves `precompute` and `train`: what the teacher saw and what the student sees
then come from the same fields, and a config file written by one verb is read by the other.
Wrong values raise ``InputError`` here, before anything is built.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deit_fast.errors import InputError, did_you_mean

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What the pixels of a view depend on, beside seed, sample id and view id.

    Part of every cache's fingerprint: two runs share teacher logits only if all fields are equal.
    """

    image_size: int = 224
    """Side of the square view, pixels."""
    crop: Literal["resized", "simple"] = "resized"
    """`resized`: a random box of the image, resized. `simple` (DeiT-III): the whole image with its
    shorter side resized to image_size, 4 pixels reflected around it, a random square of that."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: range of the crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: range of the crop's width / height, log-uniform."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    augment: Literal["randaugment", "three_augment", "none"] = "randaugment"
    """RandAugment of two operations out of fifteen (timm's `rand-mM-mstdS-inc1`), ThreeAugment of
    grayscale, solarize or Gaussian blur (DeiT-III), or none."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation, in random order, each by a factor of 1 +- this much at
    most, after ThreeAugment or none; RandAugment goes without it."""
    randaugment_magnitude: float = 9.0
    """RandAugment: mean strength, 0 to 10."""
    randaugment_std: float = 0.5
    """RandAugment: standard deviation of the strength, drawn anew for each operation."""
    randaugment_prob: float = 0.5
    """RandAugment: probability that each of the two operations is applied."""
    erase_prob: float = 0.25
    """Random erasing (pixel mode): probability that a box is replaced by N(0, 1) noise."""
    erase_scale: tuple[float, float] = (0.02, 1 / 3)
    """Random erasing: range of the box's share of the view's area."""
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Random erasing: range of the box's height / width, log-uniform."""
    mixup_alpha: float = 0.8
    """Mixup: lambda ~ Beta(alpha, alpha). 0 turns Mixup off."""
    cutmix_alpha: float = 1.0
    """CutMix: lambda ~ Beta(alpha, alpha). 0 turns CutMix off."""
    mix_prob: float = 1.0
    """Probability that a pair of samples is mixed at all."""
    switch_prob: float = 0.5
    """Probability of CutMix rather than Mixup where both are on."""
    repeats: int = 3
    """Repeated augmentation: views of one sample that stand side by side in an epoch."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of the normalised view, in units of 255."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations of the normalised view, in units of 255."""

    def __post_init__(self) -> None:
        _require(self.image_size >= 1, f"view.image_size must be at least 1, not {self.image_size}")
        _require(self.repeats >= 1, f"view.repeats must be at least 1, not {self.repeats}")
        for name in ("flip_prob", "erase_prob", "mix_prob", "switch_prob", "randaugment_prob"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"view.{name} must lie in [0, 1], not {value}")
        for name in ("crop_scale", "crop_ratio", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            _require(0 < low <= high, f"view.{name} needs 0 < low <= high, not ({low}, {high})")
        magnitude = self.randaugment_magnitude
        _require(
            0 <= magnitude <= 10, f"view.randaugment_magnitude must lie in [0, 10], not {magnitude}"
        )
        for name in ("mixup_alpha", "cutmix_alpha", "randaugment_std"):
            value = getattr(self, name)
            _require(value >= 0, f"view.{name} must not be negative, not {value}")
        _require(min(self.std) > 0, f"view.std must be positive, not {self.std}")
        jitter = self.color_jitter
        _require(0 <= jitter <= 0.9, f"view.color_jitter must lie in [0, 0.9], not {jitter}")
        _require(
            jitter == 0 or self.augment != "randaugment",
            f"view.color_jitter={jitter} does not go with view.augment=randaugment, which changes "
            f"colours itself (timm and DeiT ignore it there): set it to 0, or choose three_augment "
            f"or none",
        )
        _require(
            self.crop == "resized" or self.image_size >= 5,
            f"view.crop=simple reflects 4 pixels, so view.image_size must be at least 5, "
            f"not {self.image_size}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and who decodes them."""

    root: str | None = None
    """Image folder: `root/<train>/<class>/*.jpg` and `root/<val>/<class>/*.jpg`; or of shards."""
    source: Literal["folder", "tar", "packed", "synthetic"] = "folder"
    """`tar`: shards in WebDataset's naming, `root/<train>/*.tar`. `packed`: what `deit-fast pack`
    wrote. `synthetic`: drawn from the sample id, without disk or decoding: an upper speed bound."""
    train: str = "train"
    """Name of the training split's folder."""
    val: str = "val"
    """Name of the held-out split's folder."""
    loader: Literal["pillow", "dali", "dali-triton"] = "pillow"
    """Who makes views of files; a cache serves loaders of the same pixels only. `pillow`: Pillow,
    in processes. `dali`: NVIDIA DALI, with pixels of its own. `dali-triton`: DALI decodes, our
    kernel crops, resizes and augments; with dali_decoder=cpu to the pixels of `pillow`."""
    dali_decoder: Literal["cpu", "gpu"] = "cpu"
    """Where DALI decodes, and crops, resizes and augments if it does. Their pixels differ a bit."""
    dali_hw_decoder_load: float = 0.0
    """With dali_decoder=gpu: share of the images that the GPU's JPEG engine takes off its cores.
    Above 0 an image's last bits depend on which of the two decoded it, and so on its batch: for an
    online teacher, as `train` refuses a cache whose pixels it does not find again."""
    workers: int = 4
    """Decoding processes of this rank, 0: the main process decodes; threads where DALI loads."""
    on_error: Literal["substitute", "fail"] = "substitute"
    """An unreadable image: take its next readable neighbour and count it, or stop."""
    eval_crop: float = 0.875
    """Evaluation: centre crop's side as a share of the resized shorter side."""
    synthetic_samples: int = 1024
    """Training samples of the synthetic source; a quarter as many are held out."""
    synthetic_classes: int = 10
    """Classes of the synthetic source."""

    def __post_init__(self) -> None:
        _require(
            self.loader == "pillow" or self.source != "synthetic",
            f"data.loader={self.loader} decodes files, which data.source=synthetic has not",
        )
        _require(
            self.loader != "pillow" or self.dali_decoder == "cpu",
            f"data.dali_decoder={self.dali_decoder} goes with data.loader=dali or dali-triton",
        )
        load = self.dali_hw_decoder_load
        _require(0 <= load <= 1, f"data.dali_hw_decoder_load must lie in [0, 1], not {load}")
        _require(
            load == 0 or self.dali_decoder == "gpu",
            f"data.dali_hw_decoder_load={load} goes with data.dali_decoder=gpu",
        )
        _require(self.workers >= 0, f"data.workers must not be negative, not {self.workers}")
        _require(
            0 < self.eval_crop <= 1, f"data.eval_crop must lie in (0, 1], not {self.eval_crop}"
        )
        _require(self.synthetic_samples >= 4, "data.synthetic_samples must be at least 4")
        _require(self.synthetic_classes >= 1, "data.synthetic_classes must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train: a timm name, or `package.module:factory`."""

    name: str = "deit_small_distilled_patch16_224"
    """timm name, or `package.module:factory` called with `num_classes=`."""
    drop_path: float = 0.1
    """Stochastic depth: drop rate of the last block, linear from 0 at the first."""
    stochastic_depth: str = "sample"
    """`sample`: drop each sample's branch by itself. `subset`: compute it for a random part of
    fixed size of the batch, which saves the dropped work; the number kept no longer varies."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Dtype of a fused transformer's residual stream. `bfloat16` halves what the norms read and
    write, and rounds the sum behind each half of a block; see docs/performance.md."""
    pad_head: bool = False
    """Write logits in rows that start on 16 bytes, which the loss kernel reads 16 bytes at a time:
    for class counts like 21841, which are no multiple of 8 (in bf16)."""
    fused: bool = True
    """Run timm transformers on this package's kernels, where they win on this machine. An online
    teacher too, on a GPU; that of `precompute` with `compile` of `blocks` or `model` alone."""
    kernels: tuple[str, ...] | None = None
    """Kernels of a fused transformer, of `attention`, `add_layer_norm`, `bias_gelu` and
    `mlp_backward`; none: those chosen for this GPU, see docs/kernels.md."""
    patch_size: int | None = None
    """Override of the patch side, pixels."""
    embed_dim: int | None = None
    """Override of the width."""
    depth: int | None = None
    """Override of the number of blocks."""
    num_heads: int | None = None
    """Override of the number of attention heads."""
    weights: str | None = None
    """Start from this checkpoint (.pth or .safetensors) instead of random weights."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.drop_path < 1, f"model.drop_path must lie in [0, 1), not {self.drop_path}"
        )
        _require(
            self.stochastic_depth in ("sample", "subset"),
            f"model.stochastic_depth must be sample or subset, not {self.stochastic_depth!r}",
        )
        _require(
            self.residual == "float32" or self.fused,
            f"model.residual={self.residual} needs model.fused",
        )
        _require(
            self.kernels is None or self.fused,
            f"model.kernels={','.join(self.kernels or ())} needs model.fused",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Base loss on the class head and distillation loss on the distillation head."""

    kind: Literal["none", "soft", "hard"] = "hard"
    """Distillation against softmax(teacher / tau), against argmax(teacher), or none."""
    alpha: float = 0.5
    """Total = (1 - alpha) * base + alpha * distillation."""
    tau: float = 1.0
    """Temperature of soft distillation."""
    reduction: Literal["numel", "batchmean", "hinton"] = "numel"
    """Soft distillation: tau^2 KL / (B C) as DeiT's code, tau^2 KL / B as timm, 2 tau^2 KL / B."""
    tail: Literal["bucket", "uniform", "renorm", "drop"] = "bucket"
    """What a top-k teacher says about the classes it did not store."""
    base: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or binary cross-entropy (DeiT-III)."""
    smoothing: float = 0.1
    """Label smoothing of the base loss."""

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, f"loss.alpha must lie in [0, 1], not {self.alpha}")
        _require(self.tau > 0, f"loss.tau must be positive, not {self.tau}")
        _require(
            0 <= self.smoothing < 1, f"loss.smoothing must lie in [0, 1), not {self.smoothing}"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, linear warm-up and cosine decay per step, and the weights' moving average."""

    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW, or LAMB (DeiT-III)."""
    impl: Literal["auto", "torch", "apex"] = "auto"
    """`torch`: torch's fused AdamW, timm's LAMB. `apex`: NVIDIA's FusedAdam and FusedLAMB, if
    NVIDIA's apex is there. `auto`: apex for LAMB on a GPU if it is there, else torch."""
    layer_decay: float | None = None
    """Fine-tuning: a block's learning rate is this factor times that of the block above it."""
    lr: float = 5e-4
    """Peak learning rate at `lr_batch` samples per step; scaled linearly with the global batch."""
    lr_batch: int = 512
    """Global batch size that `lr` is meant for."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up, epochs."""
    weight_decay: float = 0.05
    """Decoupled decay; none on biases, norms, tokens and position embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float | None = None
    """Largest gradient norm; none: no clipping, as DeiT."""
    ema_decay: float = 0.99996
    """Moving average of the weights; 0 turns it off."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr must be positive, not {self.lr}")
        _require(
            self.warmup_epochs >= 0,
            f"optim.warmup_epochs must not be negative, not {self.warmup_epochs}",
        )
        _require(
            0 <= self.ema_decay < 1, f"optim.ema_decay must lie in [0, 1), not {self.ema_decay}"
        )
        _require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"optim.layer_decay must lie in (0, 1], not {self.layer_decay}",
        )
        _require(
            self.clip_grad is None or self.clip_grad > 0,
            f"optim.clip_grad must be positive, not {self.clip_grad}",
        )


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How a teacher's answer about one view is stored; see docs/cache-format.md."""

    name: Literal[
        "hard", "topk", "dense-fp16", "dense-bf16", "dense-fp32", "dense-int8", "dense-fp8"
    ] = "topk"
    """`hard`: argmax. `topk`: k class ids and fp16 log-probabilities. `dense-*`: every logit."""
    k: int | None = None
    """Entries of `topk`; none: 16, or the class count where that is smaller."""
    temperatures: tuple[float, ...] | None = None
    """`topk` records the exact tail mass at these temperatures; none: at loss.tau."""
    true_class: bool = False
    """`topk` keeps the log-probability of the sample's own class too."""
    block_records: int = 4096
    """Records per checksummed block, the unit of writing and of recovery."""

    def __post_init__(self) -> None:
        _require(self.k is None or self.k >= 1, f"codec.k must be at least 1, not {self.k}")
        _require(
            not self.true_class or self.name == "topk",
            f"codec.true_class goes with topk; {self.name} does not keep it",
        )
        _require(
            self.block_records >= 1,
            f"codec.block_records must be at least 1, not {self.block_records}",
        )
        _require(
            self.temperatures is None
            or (len(self.temperatures) > 0 and min(self.temperatures) > 0),
            f"codec.temperatures must be positive, not {self.temperatures}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: data, views, model, loss, optimiser, teacher and cache."""

    recipe: str = "custom"
    """Name of the recipe that this configuration started from."""
    output: str = "runs/train"
    """Folder of the run's checkpoints, metrics and result; the same command resumes from it."""
    seed: int = 0
    """Seed of views, order and initial weights."""
    epochs: int = 300
    """Passes over the data; an epoch offers about as many views as there are samples."""
    batch_size: int = 256
    """Samples per step over all ranks (global batch)."""
    compat: Literal["none", "deit"] = "none"
    """`deit`: the order of DeiT's RASampler, Mixup/CutMix of each rank's whole batch with its
    reverse, a learning rate that moves once an epoch, one late, and decay of `dist_token`, as in
    DeiT's code; for online teachers or none. A checkpoint then goes on with the views it would have
    seen only under as many processes."""
    num_views: int | None = None
    """Distinct views per sample, a multiple of view.repeats; none: enough for all epochs."""
    accumulate: int = 1
    """Parts that each rank's share of a step is computed in, one after another, to save memory."""
    max_steps: int | None = None
    """Stop after this many steps, for trials and benches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""
    teacher: str | None = None
    """`timm:NAME` or `package.module:factory`, each with or without `@weights`."""
    teacher_batch: int = 256
    """Views per teacher call in `precompute`; fixed: bytes must not depend on the process count."""
    cache: str | None = None
    """Folder of teacher logits: `precompute` writes it, `train` reads it instead of a teacher."""
    cache_on_device: bool = False
    """Keep the logits of all views of the run in the device's memory, rather than stream each
    batch's from the host: bytes of the cache's record times samples times views."""
    log_every: int = 50
    """Steps between lines of the log and rows of metrics.jsonl."""
    track: tuple[str, ...] = ()
    """Send the rows of metrics.jsonl also to `tensorboard`, `wandb`, `mlflow`, `trackio`."""
    check_teacher_every: int | None = None
    """With both `cache` and `teacher`: every so many steps the teacher answers the batch too, and
    the run ends where the cache holds another answer. Costs that step a forward of the teacher."""
    profile_steps: int = 0
    """Profile so many steady steps of the first process: profile/trace.json, profile/table.txt."""
    memory_snapshot: bool = False
    """Record the GPU's allocations: memory.pickle at the end, and when memory runs out."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    save_every: int = 1
    """Epochs between checkpoints; the last epoch is always saved."""
    save_steps: int | None = None
    """Also save every so many steps."""
    save_minutes: float | None = None
    """Also save when the last checkpoint is so many minutes old."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """A loss or gradient that is not finite never reaches the weights. `stop`: end with an error.
    `rollback`: go back to the newest checkpoint and leave that step's views out."""
    max_rollbacks: int = 3
    """Rollbacks in one run before it stops after all."""
    compile: Literal["auto", "none", "blocks", "model"] = "auto"
    """torch.compile of the student: each of its `blocks` by itself, or the whole `model`, which
    takes longer; the first steps are slow. `auto`: `blocks` on CUDA, `none` on a CPU. Evaluation is
    compiled as training is, and an online teacher, as a whole; that of `precompute` by `blocks` or
    `model` alone."""
    cuda_graphs: bool = False
    """On CUDA: capture a whole step, teacher and optimiser included, as one CUDA graph and replay
    it, for small models and batches, whose time is that of their launches. With AdamW, in one
    process, without `accumulate` and `profile_steps`."""
    compress_gradients: bool = False
    """Send gradients between ranks as bfloat16: half the bytes, rounded sums."""
    resume: bool = True
    """Go on from the newest checkpoint in `output`; --no-resume refuses a folder that has one."""
    view: ViewRecipe = field(default_factory=ViewRecipe)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "teacher_batch",
            "accumulate",
            "log_every",
            "eval_every",
            "save_every",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, not {value}")
        for name in ("save_steps", "save_minutes", "check_teacher_every"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be positive, not {value}")
        _require(
            not self.cuda_graphs or self.accumulate == 1,
            f"cuda_graphs with accumulate={self.accumulate}: each part needs the generator's seed "
            f"anew, which a graph cannot set; choose accumulate=1 or --no-cuda-graphs",
        )
        _require(
            not self.cuda_graphs or self.profile_steps == 0,
            "cuda_graphs with profile_steps: the operators of a graph have no names; profile with "
            "--no-cuda-graphs",
        )
        _require(
            self.max_rollbacks >= 0, f"max_rollbacks must not be negative, not {self.max_rollbacks}"
        )
        _require(
            self.profile_steps >= 0, f"profile_steps must not be negative, not {self.profile_steps}"
        )
        for name in self.track:
            hint = did_you_mean(name, TRACKERS)
            _require(
                name in TRACKERS, f"track must be of {', '.join(TRACKERS)}, not {name!r}{hint}"
            )
        _require(len(set(self.track)) == len(self.track), f"track names one twice: {self.track}")
        _require(0 <= self.seed < 2**64, f"seed must lie in [0, 2^64), not {self.seed}")
        if self.compat == "deit":
            _require(
                self.cache is None,
                f"compat=deit mixes a view with what its batch happens to hold, so no cache can "
                f"hold it (cache={self.cache}): take --teacher alone, or --compat none",
            )
            _require(
                self.num_views is None,
                f"compat=deit draws new views every epoch; num_views={self.num_views} goes with "
                f"--compat none",
            )
        if self.num_views is not None:
            _require(
                self.num_views >= 1 and self.num_views % self.view.repeats == 0,
                f"num_views must be a positive multiple of view.repeats={self.view.repeats}, "
                f"not {self.num_views}",
            )

    @property
    def view_count(self) -> int:
        """Distinct views per sample, V of the design: min(epochs, V) of them are used."""
        if self.num_views is not None:
            return self.num_views
        repeats = self.view.repeats
        return -(-self.epochs // repeats) * repeats

    @property
    def views_used(self) -> int:
        """Views per sample that the run really shows: ids 0 .. views_used - 1."""
        repeats = self.view.repeats
        return min(-(-self.epochs // repeats) * repeats, self.view_count)

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with fields changed; a dict as the value of a group changes fields inside it."""
        nested = {
            key: dataclasses.replace(getattr(self, key), **value)
            if isinstance(value, dict)
            else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **nested)


# ---------------------------------------------------------------------------------------------
# Dictionaries, JSON and dotted keys
# ---------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a config, ready for JSON (tuples become lists there)."""
    return dataclasses.asdict(config)


def dotted_keys(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """All keys of a config class in dotted form, e.g. `view.image_size`."""
    keys = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            keys += dotted_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            keys.append(prefix + item.name)
    return keys


def from_dict(cls: type, values: dict[str, Any], prefix: str = "", base: Any = None) -> Any:
    """Build a config from a nested dictionary, on top of ``base`` where given.

    Raises:
        InputError: an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    changes = {}
    for key, value in values.items():
        if key not in names:
            beside = [prefix + name for name in names]
            elsewhere = dotted_keys(RunConfig) if cls is RunConfig else []
            hint = did_you_mean(prefix + key, dict.fromkeys([*beside, *elsewhere]))
            raise InputError(f"unknown config key {prefix + key!r}{hint}")
        current = getattr(base, key) if base is not None else None
        changes[key] = _convert(hints[key], value, prefix + key, current)
    return dataclasses.replace(base, **changes) if base is not None else cls(**changes)


def load_config(path: str, base: RunConfig) -> RunConfig:
    """Read a JSON config file over ``base``; the file that every run writes is one."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold a JSON object")
    return from_dict(RunConfig, values, base=base)


def _convert(hint: Any, value: Any, key: str, current: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"config key {key!r} is a group, not {value!r}")
        return from_dict(hint, value, prefix=f"{key}.", base=current)  # type: ignore[arg-type]
    if not _fits(hint, value):
        raise InputError(f"config key {key!r} needs {_type_name(hint)}, not {value!r}")
    if isinstance(value, list):
        return tuple(value)
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        items = typing.get_args(hint)
        if items[-1] is Ellipsis:
            return all(_fits(items[0], item) for item in value)
        return len(items) == len(value) and all(map(_fits, items, value))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
