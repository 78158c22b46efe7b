"""Teachers: any network, frozen, with its own input normalisation: its logits and features."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deit_fast.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig
from deit_fast.errors import InputError, first_line, is_out_of_memory
from deit_fast.inputs import require_teacher
from deit_fast.models.fuse import default_kernels, fuse
from deit_fast.models.normalisation import Normalisation, choose_normalisation, read_normalisation
from deit_fast.models.pretrained import pretrained_name, require_timm_name
from deit_fast.models.student import keep_trained_head, trained_head
from deit_fast.models.teacher_classes import choose_columns, imagenet_synsets, read_class_file
from deit_fast.models.teacher_features import (
    FeatureTarget,
    Parts,
    TeacherOutputs,
    check_feature,
    check_parts,
    make_feature,
    side_of,
    targets_of,
)
from deit_fast.models.teacher_images import RESIZE, ImageTrial, resample_positions, resize
from deit_fast.models.teacher_network import (
    build_factory_network,
    build_timm_network,
    in_float32,
)
from deit_fast.models.teacher_outputs import (
    Place,
    are_probabilities,
    check_logits,
    find_logits,
    require_equal_logits,
    take_logits,
)
from deit_fast.models.teacher_passes import NetworkPass, TimmPass, choose_pass, require_part
from deit_fast.models.weights import digest_weights
from deit_fast.models.weights_facts import class_names, file_texts
from deit_fast.runtime.distributed import has_bf16
from deit_fast.runtime.weights_header import HEAD_KEY

log = logging.getLogger("deit_fast")

_CPU = torch.device("cpu")


class Teacher(nn.Module):
    """A frozen network that takes the student's images and normalises them as its own.

    It always stays in evaluation mode, runs without gradients, and computes in bf16 on a GPU with
    native bf16, elsewhere in float32. Weights of other dtypes are converted to float32. Its network
    is tried on noise when it is built.

    Args:
        model: the network.
        spec: what it was built from, for messages and fingerprints.
        mean, std: channel statistics that the network expects, for pixels in [0, 1].
        input_mean, input_std: those of the images that it will get.
        image_size: side of these images, pixels; None: a side that the network names or takes.
        size: side to which it resizes them for the network, see ``resize``; None: it does not.
        targets: what it gives: "logits", features by their names or as ``FeatureTarget``.
        num_classes: what the network was asked for; tells logits from other outputs.
        class_names: of its classes, in the order of its logits, where they are known.
        device: where it is tried, and runs until ``to_device``.

    Attributes:
        image_size: side of the images that its network gets, pixels.
        gives_logits: whether logits are among its targets.
        features: the others in their order, with blocks from 0.
        shapes: (T, D) of each feature: number of tokens, and of channels.
        num_outputs: outputs of its network, 0 without logits.
        num_classes: classes C of its logits: these outputs, or those selected.
        is_fused: whether it runs on this package's kernels.

    Raises:
        InputError: the network does not take such images, or does not give the targets, see
            ``find_logits``, ``check_logits`` and ``choose_pass``.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    columns: torch.Tensor | None

    def __init__(
        self,
        model: nn.Module,
        spec: str,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        input_mean: Sequence[float] = IMAGENET_MEAN,
        input_std: Sequence[float] = IMAGENET_STD,
        image_size: int | None = None,
        size: int | None = None,
        targets: Sequence[str | FeatureTarget] = ("logits",),
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        device: torch.device = _CPU,
    ) -> None:
        super().__init__()
        self.model = in_float32(model, spec).eval().requires_grad_(False)
        self.spec = spec
        self.class_names = None if class_names is None else list(class_names)
        self.memory_format = torch.contiguous_format
        self.is_fused = False
        self.mean, self.std, self.size = tuple(mean), tuple(std), size
        self.renormalises = (self.mean, self.std) != (tuple(input_mean), tuple(input_std))
        # x_in * std_in + mean_in is the pixel; the network expects (pixel - mean) / std.
        own_std = torch.tensor(self.std, dtype=torch.float64)
        scale = torch.tensor(input_std, dtype=torch.float64) / own_std
        shift = (torch.tensor(input_mean, dtype=torch.float64) - torch.tensor(mean)) / own_std
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("columns", None, persistent=False)
        self.to(device)
        self.gives_logits = "logits" in targets
        self.features = tuple(
            FeatureTarget(target) if isinstance(target, str) else target
            for target in targets
            if target != "logits"
        )
        declared = getattr(self.model, "num_classes", None)
        asked = num_classes or (declared if isinstance(declared, int) else None)
        self._place: Place = None
        self._pass = NetworkPass(self.model)
        trial = ImageTrial(self._run, device)
        self.image_size = size or image_size or trial.find_size(self.model)
        self.shapes: list[tuple[int, int]] = []
        self.num_outputs = self.num_classes = self._try(trial, asked)
        names = self.class_names if self.gives_logits else None
        if names is not None and len(names) != self.num_outputs:
            raise InputError(
                f"teacher {spec} has {self.num_outputs} outputs, its weights file names "
                f"{len(names)} classes"
            )

    def select(self, columns: Sequence[int]) -> None:
        """From now on take these outputs of the network, in this order, as the logits."""
        self.columns = torch.tensor(columns, dtype=torch.int64, device=self.scale.device)
        self.num_classes = len(columns)

    def train(self, mode: bool = True) -> Teacher:
        """Keep evaluation mode: in training mode batch norms would use batch statistics."""
        return super().train(False)

    def to_device(
        self, device: torch.device, compiled: bool = False, fused: bool = False
    ) -> Teacher:
        """Move it to a device and prepare its network; returns itself.

        On CUDA it uses the channels-last layout of tensor cores: a convnet in bf16 would otherwise
        transpose the input of every convolution.

        Args:
            device: where it runs from now on.
            compiled: compile the network with torch.compile, on the first batch. Each batch size is
                compiled separately, so logits do not depend on earlier batch sizes.
            fused: run a timm vision transformer on this package's kernels, on a GPU that has them.
                Logits then differ by rounding. One that gives features is never fused.
        """
        self.to(device)
        kernels = default_kernels(device)
        is_transformer = isinstance(self.model, VisionTransformer)
        if fused and kernels and is_transformer and not self.features:
            fuse(self.model, kernels=kernels)
            self.is_fused = True
        if device.type == "cuda":
            self.memory_format = torch.channels_last
            self.to(memory_format=self.memory_format)
        if compiled:
            self._pass.compile()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] for images [B, 3, S, S] that are normalised as the student's.

        Raises:
            InputError: logits are not among its targets.
        """
        logits = self.outputs(images).logits
        if logits is None:
            raise InputError(f"teacher {self.spec} was asked for features alone, not for logits")
        return logits

    @torch.no_grad()
    def outputs(self, images: torch.Tensor) -> TeacherOutputs:
        """Its targets for images [B, 3, S, S] that are normalised as the student's, by one pass of
        the network. The logits are those that it gives without features, bit for bit."""
        if self.model.training:
            self.model.eval()
        if self.size is not None:
            images = resize(images, self.size)
        if self.renormalises:
            images = images * self.scale + self.shift
        else:
            images = images.clone()  # the network may work in place, and these are the student's
        output, parts = self._run(images)
        features = tuple(make_feature(target, parts[target.block]) for target in self.features)
        if not self.gives_logits:
            return TeacherOutputs(None, features)
        logits = take_logits(output, self._place)
        if logits.dtype not in (torch.float32, torch.bfloat16):
            logits = logits.float()
        if self.columns is not None:
            logits = logits.index_select(1, self.columns)
        return TeacherOutputs(logits, features)

    def _run(self, images: torch.Tensor) -> tuple[Any, dict[int | None, Parts]]:
        """A pass of the network for images that are normalised as its own."""
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bf16(images.device)):
            return self._pass(images)

    def fingerprint(self) -> dict[str, object]:
        """What its logits depend on, as flat JSON values for a cache's manifest."""
        found = self._fingerprint({"teacher.num_classes": self.num_outputs})
        if (head := trained_head(self.model)) != "both":
            found["teacher.head"] = head
        if self.columns is not None:
            text = json.dumps(self.columns.tolist())
            found["teacher.columns"] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def target_fingerprint(self, index: int) -> dict[str, object]:
        """What the feature ``features[index]`` depends on, in place of ``fingerprint``."""
        found = self._fingerprint({})
        head = trained_head(self.model)
        if self.features[index].name == "pooled" and head != "both":
            found["teacher.head"] = head
        return found | self.target_fields(index)

    def target_fields(self, index: int) -> dict[str, object]:
        """Which feature ``features[index]`` is, as flat JSON values."""
        target, (tokens, width) = self.features[index], self.shapes[index]
        return {
            "target.name": target.name,
            "target.block": target.block,
            "target.norm": target.norm,
            "target.grid": math.isqrt(tokens) if target.name == "patches" else None,
            "target.width": width,
        }

    def _fingerprint(self, of_logits: dict[str, object]) -> dict[str, object]:
        found: dict[str, object] = {
            "teacher.spec": self.spec,
            "teacher.weights_sha256": digest_weights(self.model),
            **of_logits,
            "teacher.mean": list(self.mean),
            "teacher.std": list(self.std),
        }
        if self.size is not None:
            found |= {"teacher.size": self.size, "teacher.resize": RESIZE}
        return found

    def expected_fields(
        self, stored: Mapping[str, Any], index: int | None = None
    ) -> dict[str, object]:
        """Its fingerprint as that of a cache of its logits must have it.

        Args:
            stored: the cache's. Where that alone names a head, a selection of classes or a size,
                the result has a field that differs.
            index: of a feature, for a cache of it.
        """
        optional = ("teacher.head", "teacher.columns", "teacher.size", "teacher.resize")
        own = self.fingerprint() if index is None else self.target_fingerprint(index)
        return {name: "none" for name in optional if name in stored} | own

    @torch.no_grad()
    def _try(self, trial: ImageTrial, asked: int | None) -> int:
        """Run the network on noise, and find how it gives its targets; returns the number of its
        outputs.

        A batch of one image is tried too: a network that squeezes its output loses a dimension.
        """
        try:
            output, parts = self._attempt(trial, 2)
            self._require_head(output)
            self._pass, self.features = choose_pass(
                self.model, self.features, self.gives_logits, output, asked
            )
            plain = output
            if self.features:
                output, parts = self._attempt(trial, 2)
            logits = self._examine(output, parts, 2, asked)
            self._examine(*self._attempt(trial, 1), 1, asked)
            if logits is None:
                return 0
            if isinstance(self._pass, TimmPass):
                expected = take_logits(plain, find_logits(plain, 2, asked))
                require_equal_logits(logits, expected)
        except InputError as error:
            raise InputError(f"teacher {self.spec}: {error}") from error.__cause__
        if are_probabilities(logits):
            log.warning(
                "teacher %s returns probabilities, not logits: soft distillation would take the "
                "softmax of them; return their logarithm", self.spec,
            )  # fmt: skip
        return logits.shape[1]

    def _attempt(self, trial: ImageTrial, rows: int) -> tuple[Any, dict[int | None, Parts]]:
        """A pass over noise; refusals are the ends of sentences."""
        try:
            return self._run(trial.noise(rows, 3, self.image_size))
        except InputError:
            raise
        except Exception as error:  # whatever such images do to a network of others
            if is_out_of_memory(error):
                raise
            if self._pass.gives_features:
                reason = first_line(error, with_type=True)
                raise InputError(f"its features cannot be taken: {reason}") from error
            raise trial.refusal(self.model, self.image_size, error) from error

    def _require_head(self, output: Any) -> None:
        """Refuse logits of a network without classes, whose output would pass for them."""
        if not self.gives_logits or getattr(self.model, "num_classes", None) != 0:
            return
        if isinstance(output, torch.Tensor):
            raise InputError(
                "it is a feature extractor, without classes (num_classes=0), so it has no "
                "logits: take features, such as --targets pooled"
            )

    def _examine(
        self, output: Any, parts: Mapping[int | None, Parts], rows: int, asked: int | None
    ) -> torch.Tensor | None:
        """Check what a pass over ``rows`` images gave, and note its shapes; returns the logits.

        Raises:
            InputError: a target is missing or not as it must be; the message is the end of a
                sentence.
        """
        for found in parts.values():
            check_parts(found, rows)
        shapes = []
        for target in self.features:
            own = parts[target.block]
            require_part(target, own, self._pass.gives(own, target.block))
            feature = make_feature(target, own)
            check_feature(target, feature)
            if target.name == "patches":
                side_of(feature)
            shapes.append((feature.shape[1], feature.shape[2]))
        if self.shapes and shapes != self.shapes:
            raise InputError(f"its features have other shapes, {shapes}, in a batch of {rows}")
        self.shapes = shapes
        if not self.gives_logits:
            return None
        self._place = find_logits(output, rows, asked)
        logits = take_logits(output, self._place)
        check_logits(logits, rows)
        return logits


# ---------------------------------------------------------------------------------------------
# From a spec
# ---------------------------------------------------------------------------------------------


def load_teacher(
    spec: str,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_mean: Sequence[float] = IMAGENET_MEAN,
    input_std: Sequence[float] = IMAGENET_STD,
    image_size: int | None = None,
    teacher_size: int | None = None,
    targets: Sequence[str | FeatureTarget] = ("logits",),
    device: torch.device = _CPU,
) -> Teacher:
    """Build a teacher from its spec.

    The normalisation of its images is what the weights file says (files of `train` do), or else
    ``mean`` and ``std``, or else that of timm's entry or of a factory's model in its attributes
    `mean` and `std`, or else that of the images that it gets. A line of the log says which.

    Args:
        spec: ``timm:NAME`` (pretrained weights from timm's hub), ``timm:NAME@FILE`` (weights from
            a .safetensors or .pth file), ``package.module:factory`` or
            ``package.module:factory@FILE``.
        num_classes: passed to a factory. A timm teacher's class count comes from its weights.
        mean, std: channel statistics that its network expects, for pixels in [0, 1]; both or none.
        input_mean, input_std: normalisation of the images that the teacher will get.
        image_size: side of these images, pixels; None: a side that the network names or takes.
            Position embeddings of a timm transformer of another size are resampled.
        teacher_size: side to which they are resized for the network, see ``resize``; None: they are
            not.
        targets: as of ``Teacher``. For features alone the weights need no head.
        device: where it runs.

    Raises:
        InputError: unknown model, weights that are missing or of another model, a normalisation
            that contradicts the file's, or as ``Teacher``.
    """
    name, _, weights = spec.partition("@")
    if (timm_name := pretrained_name(name)) is not None:
        require_timm_name(timm_name, "teacher")
    require_teacher(spec)
    if (mean is None) != (std is None):
        raise InputError(f"teacher {name}: teacher_mean and teacher_std go together: give both")
    given = None
    if mean is not None:
        given = read_normalisation(mean, std, "teacher_mean and teacher_std")
    is_timm = name.startswith("timm:")
    if is_timm:
        needs_head = "logits" in targets
        model, facts = build_timm_network(name.removeprefix("timm:"), weights, needs_head)
        resample_positions(model, teacher_size or image_size, name)
    else:
        model, facts = build_factory_network(name, weights, num_classes)
    if weights:
        keep_trained_head(model, file_texts(weights).get(HEAD_KEY, "both"))
    views = Normalisation(tuple(input_mean), tuple(input_std))
    own, source = choose_normalisation(name, model, not weights, facts, given, views)
    log.info("teacher %s: %s %s", name, own, source)
    side = teacher_size or image_size
    if facts is not None and side not in (None, facts.image_size):
        log.info(
            "teacher %s was trained on images of %d pixels, it gets %d",
            name, facts.image_size, side,
        )  # fmt: skip
    classes: Sequence[str] | None = None if facts is None else facts.classes
    if facts is None and weights:
        classes = class_names(weights)
    asked = num_classes if classes is None else len(classes)  # as the network was built
    return Teacher(
        model,
        name,
        mean=own.mean,
        std=own.std,
        input_mean=input_mean,
        input_std=input_std,
        image_size=image_size,
        size=teacher_size,
        targets=targets,
        num_classes=None if is_timm else asked,
        class_names=classes,
        device=device,
    )


def load_class_matched_teacher(
    config: RunConfig,
    classes: Sequence[str],
    device: torch.device = _CPU,
    targets: Sequence[str | FeatureTarget] | None = None,
) -> Teacher:
    """The teacher of a run's configuration, with one logit for each class of the data.

    Args:
        classes: names of the data's classes, by label.
        device: where it runs; it is tried there on the views' image size.
        targets: None: those of the configuration.

    Raises:
        InputError: as ``load_teacher``, ``targets_of``, ``read_class_file`` and ``choose_columns``.
    """
    assert config.teacher is not None
    path = config.teacher_classes
    lines = None if path is None else read_class_file(path)
    teacher = load_teacher(
        config.teacher,
        num_classes=len(lines or classes),
        mean=config.teacher_mean,
        std=config.teacher_std,
        input_mean=config.view.mean,
        input_std=config.view.std,
        image_size=config.view.image_size,
        teacher_size=config.teacher_size,
        targets=targets_of(config) if targets is None else targets,
        device=device,
    )
    if teacher.gives_logits:
        own: Sequence[str] | None = teacher.class_names
        count = teacher.num_outputs
        if own is None and hasattr(teacher.model, "pretrained_cfg"):
            own = imagenet_synsets(count, classes)
        columns = choose_columns(config, classes, count, lines=lines, own=own)
        if columns is not None:
            teacher.select(columns)
    if config.view.size_schedule:
        _require_sizes(teacher, config)
    return teacher


def _require_sizes(teacher: Teacher, config: RunConfig) -> None:
    """
    Raises:
        InputError: the teacher does not take images of every size of the views.
    """
    for size in config.view.sizes:
        try:
            teacher.outputs(torch.zeros(1, 3, size, size, device=teacher.scale.device))
        except Exception as error:  # whatever a model with one size does
            raise InputError(
                f"teacher {config.teacher} takes no images of {size} pixels, a size of "
                f"view.size_schedule ({first_line(error, with_type=True)}): give --teacher-size "
                f"{teacher.image_size}, to which all views are then resized, or a teacher that "
                f"takes every size"
            ) from None
