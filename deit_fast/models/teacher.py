"""Teachers: any classifier, frozen, with its own input normalisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deit_fast.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig
from deit_fast.errors import InputError, did_you_mean, first_line
from deit_fast.models.fuse import default_kernels, fuse
from deit_fast.models.student import build_from_factory, keep_trained_head, trained_head
from deit_fast.models.teacher_classes import choose_columns, imagenet_synsets, read_class_file
from deit_fast.models.weights import digest_weights, fit_weights, load_weights, read_metadata
from deit_fast.runtime.distributed import has_bf16
from deit_fast.runtime.weights_header import HEAD_KEY


class Teacher(nn.Module):
    """A frozen classifier that takes the student's images and normalises them for its network.

    It always stays in evaluation mode, runs without gradients, and computes in bf16 on a GPU with
    native bf16, elsewhere in its own dtype.

    Attributes:
        spec: the spec it was built from, without the path of the weights.
        class_names: of its network's outputs, where its weights say them.
        num_classes: classes C of its logits: the outputs of its network, or those selected.
        mean, std: channel statistics that its network expects, in units of 255.
        is_fused: whether it runs on this package's kernels.
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
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.spec = spec
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
        self.class_names: list[str] | None = None
        self.register_buffer("columns", None, persistent=False)
        self.num_outputs = self.num_classes = self._count_classes()

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
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bf16(images.device)):
            logits = self.model(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits if self.columns is None else logits.index_select(1, self.columns)

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

    def _count_classes(self) -> int:
        declared = getattr(self.model, "num_classes", None)
        if isinstance(declared, int) and declared > 0:
            return declared
        with torch.no_grad():
            return int(self.model(torch.zeros(1, 3, 64, 64)).shape[-1])


def load_teacher(
    spec: str,
    *,
    num_classes: int | None = None,
    input_mean: Sequence[float] = IMAGENET_MEAN,
    input_std: Sequence[float] = IMAGENET_STD,
) -> Teacher:
    """Build a teacher from its spec.

    Args:
        spec: ``timm:NAME`` (pretrained weights from timm's hub), ``timm:NAME@FILE`` (weights from
            a .safetensors or .pth file), ``package.module:factory`` or
            ``package.module:factory@FILE``. A factory's model may have attributes ``mean`` and
            ``std`` (units of 255); without them it gets images normalised as the student's.
        num_classes: passed to a factory. A timm teacher's class count comes from its weights.
        input_mean, input_std: normalisation of the images that the teacher will get.

    Raises:
        InputError: unknown model, or weights that are missing or have another shape.
    """
    name, _, weights = spec.partition("@")
    if ":" not in name:
        raise InputError(
            f"teacher {spec!r} is neither timm:NAME[@FILE] nor package.module:factory[@FILE]"
        )
    if name.startswith("timm:"):
        model = _timm_teacher(name.removeprefix("timm:"), weights)
        data = timm.data.resolve_model_data_config(model)
        mean, std = data["mean"], data["std"]
    else:
        model = build_from_factory(name, num_classes)
        if weights:
            fit_weights(model, load_weights(weights), weights)
        mean, std = getattr(model, "mean", input_mean), getattr(model, "std", input_std)
    if weights.endswith(".safetensors"):
        keep_trained_head(model, read_metadata(weights).get(HEAD_KEY, "both"))
    return Teacher(model, name, mean=mean, std=std, input_mean=input_mean, input_std=input_std)


def _timm_teacher(name: str, weights: str) -> nn.Module:
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        hint = did_you_mean(name, timm.list_models(), "timm:")
        raise InputError(f"unknown teacher 'timm:{name}'{hint}")
    if not weights:
        try:
            return timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(
                f"teacher 'timm:{name}': no pretrained weights ({reason}); "
                f"pass a file as timm:{name}@FILE"
            ) from None
    state = load_weights(weights)
    head = timm.get_pretrained_cfg_value(name, "classifier") or "head"
    head = head[0] if isinstance(head, (tuple, list)) else head
    if f"{head}.weight" not in state:
        raise InputError(f"weights file {weights} lacks {head}.weight, the classifier of {name}")
    model = timm.create_model(name, num_classes=state[f"{head}.weight"].shape[0])
    fit_weights(model, state, weights)
    return model


def load_class_matched_teacher(config: RunConfig, classes: Sequence[str]) -> Teacher:
    """The teacher of a run's configuration, with one logit for each class of the data.

    Args:
        classes: names of the data's classes, by label.

    Raises:
        InputError: as ``load_teacher``, ``read_class_file`` and ``choose_columns``.
    """
    assert config.teacher is not None
    path = config.teacher_classes
    lines = None if path is None else read_class_file(path)
    teacher = load_teacher(
        config.teacher,
        num_classes=len(lines or classes),
        input_mean=config.view.mean,
        input_std=config.view.std,
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
            teacher(torch.zeros(1, 3, size, size))
        except Exception as error:  # whatever a model with one size does
            raise InputError(
                f"teacher {config.teacher} takes no images of {size} pixels, a size of "
                f"view.size_schedule ({first_line(error, with_type=True)}): choose a teacher that "
                f"takes every size, such as a convolutional network"
            ) from None
