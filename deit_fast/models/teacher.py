"""Teachers: any classifier, frozen, with its own input normalisation."""

from __future__ import annotations

import hashlib
import json
import logging
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
from deit_fast.models.teacher_network import (
    build_factory_network,
    build_timm_network,
    in_float32,
    own_size,
    resample_positions,
)
from deit_fast.models.teacher_outputs import (
    Place,
    are_probabilities,
    check_logits,
    find_logits,
    take_logits,
)
from deit_fast.models.weights import digest_weights
from deit_fast.models.weights_facts import class_names, file_texts
from deit_fast.runtime.distributed import has_bf16
from deit_fast.runtime.weights_header import HEAD_KEY

log = logging.getLogger("deit_fast")

# Sides in pixels that are tried where the network's own is not known.
_COMMON_SIZES = (
    224, 32, 64, 48, 16, 28, 96, 128, 160, 192, 240, 256, 288, 320, 336, 384, 448, 512,
)  # fmt: skip
_CPU = torch.device("cpu")


class Teacher(nn.Module):
    """A frozen classifier that takes the student's images and normalises them for its network.

    It always stays in evaluation mode, runs without gradients, and computes in bf16 on a GPU with
    native bf16, elsewhere in float32. Weights of other dtypes are converted to float32. Its network
    is tried on noise when it is built.

    Args:
        model: the network.
        spec: what it was built from, for messages and fingerprints.
        mean, std: channel statistics that the network expects, for pixels in [0, 1].
        input_mean, input_std: those of the images that it will get.
        image_size: side of these images, pixels; None: a side that the network names or takes.
        num_classes: what the network was asked for; tells logits from other outputs.
        class_names: of its classes, in the order of its logits, where they are known.
        device: where it is tried, and runs until ``to_device``.

    Attributes:
        num_outputs: outputs of its network.
        num_classes: classes C of its logits: these outputs, or those selected.
        is_fused: whether it runs on this package's kernels.

    Raises:
        InputError: the network does not take such images, or returns no logits, see
            ``find_logits`` and ``check_logits``.
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
        self.mean, self.std = tuple(mean), tuple(std)
        self.renormalises = (self.mean, self.std) != (tuple(input_mean), tuple(input_std))
        # x_in * std_in + mean_in is the pixel; the network expects (pixel - mean) / std.
        own_std = torch.tensor(self.std, dtype=torch.float64)
        scale = torch.tensor(input_std, dtype=torch.float64) / own_std
        shift = (torch.tensor(input_mean, dtype=torch.float64) - torch.tensor(mean)) / own_std
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("columns", None, persistent=False)
        self.to(device)
        declared = getattr(self.model, "num_classes", None)
        asked = num_classes or (declared if isinstance(declared, int) else None)
        self.image_size = image_size or self._find_size()
        self._place: Place = None
        self.num_outputs = self.num_classes = self._try(asked)
        if self.class_names is not None and len(self.class_names) != self.num_outputs:
            raise InputError(
                f"teacher {spec} has {self.num_outputs} outputs, its weights file names "
                f"{len(self.class_names)} classes"
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
                Logits then differ by rounding.
        """
        self.to(device)
        kernels = default_kernels(device)
        if fused and kernels and isinstance(self.model, VisionTransformer):
            fuse(self.model, kernels=kernels)
            self.is_fused = True
        if device.type == "cuda":
            self.memory_format = torch.channels_last
            self.to(memory_format=self.memory_format)
        if compiled:
            self.model.compile(dynamic=False)
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] for images [B, 3, S, S] that are normalised as the student's."""
        if self.model.training:
            self.model.eval()
        if self.renormalises:
            images = images * self.scale + self.shift
        else:
            images = images.clone()  # the network may work in place, and these are the student's
        logits = take_logits(self._run(images), self._place)
        if logits.dtype not in (torch.float32, torch.bfloat16):
            logits = logits.float()
        return logits if self.columns is None else logits.index_select(1, self.columns)

    def _run(self, images: torch.Tensor) -> Any:
        """The network's output for images that are normalised as its own."""
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bf16(images.device)):
            return self.model(images)

    def fingerprint(self) -> dict[str, object]:
        """What its logits depend on, as flat JSON values for a cache's manifest."""
        found: dict[str, object] = {
            "teacher.spec": self.spec,
            "teacher.weights_sha256": digest_weights(self.model),
            "teacher.num_classes": self.num_outputs,
            "teacher.mean": list(self.mean),
            "teacher.std": list(self.std),
        }
        if (head := trained_head(self.model)) != "both":
            found["teacher.head"] = head
        if self.columns is not None:
            text = json.dumps(self.columns.tolist())
            found["teacher.columns"] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def expected_fields(self, stored: Mapping[str, Any]) -> dict[str, object]:
        """Its fingerprint as that of a cache of its logits must have it.

        Args:
            stored: the cache's. Where that alone names a head or a selection of classes, the result
                has a field that differs.
        """
        optional = ("teacher.head", "teacher.columns")
        return {name: "none" for name in optional if name in stored} | self.fingerprint()

    @torch.no_grad()
    def _try(self, asked: int | None) -> int:
        """Run the network on noise, find its logits and return the number of their classes.

        A batch of one image is tried too: a network that squeezes its output loses a dimension.
        """
        for rows in (2, 1):
            try:
                output = self._run(self._noise(rows, 3, self.image_size))
            except Exception as error:  # whatever such images do to a network of others
                if is_out_of_memory(error):
                    raise
                raise self._refusal(error) from error
            try:
                self._place = find_logits(output, rows, asked)
                logits = take_logits(output, self._place)
                check_logits(logits, rows)
            except InputError as error:
                raise InputError(f"teacher {self.spec}: {error}") from None
        if are_probabilities(logits):
            log.warning(
                "teacher %s returns probabilities, not logits: soft distillation would take the "
                "softmax of them; return their logarithm", self.spec,
            )  # fmt: skip
        return logits.shape[1]

    def _noise(self, rows: int, channels: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, channels, size, size, generator=generator).to(self.scale.device)

    def _refusal(self, error: Exception) -> InputError:
        """Why the network failed: its number of channels, its image size, or itself."""
        size = self.image_size
        if self._takes(1, size):
            return InputError(
                f"teacher {self.spec} takes images of 1 channel, the views have 3: name a factory "
                f"whose network makes them grey, such as images.mean(1, keepdim=True)"
            )
        other = self._find_size()
        if self._takes(3, other):
            return InputError(
                f"teacher {self.spec} takes images of {other} x {other} pixels, the views have "
                f"{size} x {size}: set view.image_size (load_teacher: image_size) to {other}, "
                f"or name a teacher for {size}"
            )
        return InputError(
            f"teacher {self.spec} does not take images [B, 3, {size}, {size}]: "
            f"{first_line(error, with_type=True)}"
        )

    def _find_size(self) -> int:
        """The first side that the network takes; the first tried where it takes none."""
        sizes = [size for size in (own_size(self.model), *_COMMON_SIZES) if size is not None]
        return next((size for size in sizes if self._takes(3, size)), sizes[0])

    @torch.no_grad()
    def _takes(self, channels: int, size: int) -> bool:
        try:
            self._run(self._noise(1, channels, size))
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise
            return False
        return True


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
        model, facts = build_timm_network(name.removeprefix("timm:"), weights)
        resample_positions(model, image_size, name)
    else:
        model, facts = build_factory_network(name, weights, num_classes)
    if weights:
        keep_trained_head(model, file_texts(weights).get(HEAD_KEY, "both"))
    views = Normalisation(tuple(input_mean), tuple(input_std))
    own, source = choose_normalisation(name, model, not weights, facts, given, views)
    log.info("teacher %s: %s %s", name, own, source)
    if facts is not None and image_size not in (None, facts.image_size):
        log.info(
            "teacher %s was trained on images of %d pixels, the views have %d",
            name, facts.image_size, image_size,
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
        num_classes=None if is_timm else asked,
        class_names=classes,
        device=device,
    )


def load_class_matched_teacher(
    config: RunConfig, classes: Sequence[str], device: torch.device = _CPU
) -> Teacher:
    """The teacher of a run's configuration, with one logit for each class of the data.

    Args:
        classes: names of the data's classes, by label.
        device: where it runs; it is tried there on the views' image size.

    Raises:
        InputError: as ``load_teacher``, ``read_class_file`` and ``choose_columns``.
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
        device=device,
    )
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
            teacher(torch.zeros(1, 3, size, size, device=teacher.scale.device))
        except Exception as error:  # whatever a model with one size does
            raise InputError(
                f"teacher {config.teacher} takes no images of {size} pixels, a size of "
                f"view.size_schedule ({first_line(error, with_type=True)}): choose a teacher that "
                f"takes every size, such as a convolutional network"
            ) from None
