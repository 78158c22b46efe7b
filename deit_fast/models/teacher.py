"""Teachers: any classifier, frozen, with its own input normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deit_fast.config import IMAGENET_MEAN, IMAGENET_STD
from deit_fast.errors import InputError, did_you_mean, first_line
from deit_fast.models.factory import build_from_factory
from deit_fast.models.fuse import default_kernels, fuse
from deit_fast.models.weights import digest_weights, fit_weights, load_weights


class Teacher(nn.Module):
    """A frozen classifier that takes the student's images and normalises them its own way.

    It stays in evaluation mode whatever the caller does, runs without gradients, and computes in
    bf16 on a GPU that has it, in its own dtype elsewhere.

    Attributes:
        spec: what it was made from, without the weights' path.
        num_classes: classes C of its answer.
        mean, std: channel statistics of its input, in units of 255.
        is_fused: whether it runs on this package's kernels.
    """

    scale: torch.Tensor
    shift: torch.Tensor

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
        # x_in * std_in + mean_in is the pixel; the teacher wants (pixel - mean) / std.
        own_std = torch.tensor(self.std, dtype=torch.float64)
        scale = torch.tensor(input_std, dtype=torch.float64) / own_std
        shift = (torch.tensor(input_mean, dtype=torch.float64) - torch.tensor(mean)) / own_std
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1), persistent=False)
        self.num_classes = self._count_classes()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher in train mode would answer from batch statistics."""
        return super().train(False)

    def place(self, device: torch.device, compiled: bool = False, fused: bool = False) -> Teacher:
        """Itself, on the device it will answer on.

        On CUDA channels go innermost in memory, the layout of tensor cores: a convnet in bf16
        would otherwise be transposed at every convolution.

        Args:
            device: where to.
            compiled: compile its network with torch.compile, on the first batch. Each batch size
                is compiled for itself, so logits do not depend on earlier batch sizes.
            fused: run a timm vision transformer on this package's kernels, on a GPU that has them.
                Logits then differ by rounding.
        """
        self.to(device)
        if fused and isinstance(self.model, VisionTransformer) and (names := kernels_on(device)):
            fuse(self.model, kernels=names)
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
        return logits[0] if isinstance(logits, tuple) else logits

    def fingerprint(self) -> dict[str, object]:
        """What its answers depend on, as flat JSON values for a cache's manifest."""
        return {
            "teacher.spec": self.spec,
            "teacher.weights_sha256": digest_weights(self.model),
            "teacher.num_classes": self.num_classes,
            "teacher.mean": list(self.mean),
            "teacher.std": list(self.std),
        }

    def _count_classes(self) -> int:
        declared = getattr(self.model, "num_classes", None)
        if isinstance(declared, int) and declared > 0:
            return declared
        with torch.no_grad():
            return int(self.model(torch.zeros(1, 3, 64, 64)).shape[-1])


def kernels_on(device: torch.device) -> tuple[str, ...]:
    """Kernels for a teacher's forward on a device."""
    return default_kernels() if device.type == "cuda" else ()


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively; emulation on older GPUs is slower than fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


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
            ``package.module:factory@FILE``. A factory's model may carry ``mean`` and ``std``
            (units of 255); without them it is given images normalised as the student's.
        num_classes: classes to build a factory's model for. A timm teacher's class count comes
            from its weights.
        input_mean, input_std: how the images that it will be given are normalised.

    Raises:
        InputError: unknown model, weights missing or of another shape.
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
    return Teacher(model, name, mean=mean, std=std, input_mean=input_mean, input_std=input_std)


def _timm_teacher(name: str, weights: str) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        hint = did_you_mean(name, timm.list_models(), prefix="timm:")
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
