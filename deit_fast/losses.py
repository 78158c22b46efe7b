"""Drop-in for the DistillationLoss of facebookresearch/deit, over kernels.distillation_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.kernels.distillation_loss import KINDS, REDUCTIONS, distillation_loss


def _is_timms(criterion: Any) -> bool:
    """Whether a call computes the formula of one of timm's two cross-entropies and no more."""
    if type(criterion) not in (SoftTargetCrossEntropy, LabelSmoothingCrossEntropy):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(criterion) and not any(getattr(criterion, name) for name in hooks)


def _fusible_smoothing(criterion: Any) -> float | None:
    """Label smoothing of timm's cross-entropies, which the fused kernel can compute, or None.

    nn.CrossEntropyLoss is neither of them: it ignores rows with the label -100. Nor is a criterion
    whose ``smoothing`` was changed without its ``confidence``.
    """
    if type(criterion) is SoftTargetCrossEntropy:
        return 0.0
    smoothing = criterion.smoothing
    return smoothing if 0 <= smoothing < 1 and criterion.confidence == 1 - smoothing else None


def _require_labels(criterion: Any, labels: Any) -> None:
    """Refuse soft labels where timm's criterion takes class ids, and class ids for soft labels.

    timm fails with a message of PyTorch's about shapes or dtypes, or broadcasts where B is C or 1.

    Raises:
        InputError: names the criterion and the labels.
    """
    is_tensor = isinstance(labels, Tensor)
    kind = f"{labels.dtype} {list(labels.shape)}" if is_tensor else type(labels).__name__
    is_ids = is_tensor and labels.dim() == 1 and not labels.is_floating_point()
    if type(criterion) is SoftTargetCrossEntropy and (not is_tensor or is_ids):
        raise InputError(
            f"SoftTargetCrossEntropy takes soft labels, float [B, C], not {kind}: "
            "LabelSmoothingCrossEntropy takes class ids"
        )
    if type(criterion) is LabelSmoothingCrossEntropy and not is_ids:
        raise InputError(
            f"LabelSmoothingCrossEntropy takes class ids, int64 [B], not {kind}: "
            "SoftTargetCrossEntropy takes soft labels"
        )


class DistillationLoss(nn.Module):
    """(1 - alpha) * base_criterion + alpha * distillation (Touvron et al. 2021, eq. 2 and 3).

    Constructor and call are those of `losses.py` in facebookresearch/deit, with two additions.
    ``reduction`` chooses the divisor of the soft term: the default "numel" divides by B * C, as
    DeiT does; "batchmean" divides by B, as timm and most others do. And the teacher stays in eval
    mode when the criterion is put into train mode.

    All attributes, and those of the base criterion, may be changed between calls: each call reads
    and checks them. Labels that require a gradient get it from the base criterion.

    Args:
        base_criterion: called with the class logits [B, C] and the labels.
        teacher_model: called under no_grad with the inputs of the student. Returns logits [B, C],
            or cached logits as a ``kernels.TopK``, or for "hard" also int class ids [B].
        distillation_type: "none", "soft" or "hard".
        alpha: weight of the distillation, in [0, 1].
        tau: temperature of "soft".
        reduction: "numel" or "batchmean", see ``kernels.distillation_loss``.

    Raises:
        InputError: an option outside its range.
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        teacher_model: Callable[[Tensor], Tensor] | None,
        distillation_type: str,
        alpha: float,
        tau: float,
        reduction: str = "numel",
    ) -> None:
        super().__init__()
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau
        self.reduction = reduction
        self._check_options()
        self.train(self.training)

    def train(self, mode: bool = True) -> DistillationLoss:
        """Set the mode of the criterion but not of the teacher, whose statistics are frozen."""
        super().train(mode)
        if isinstance(self.teacher_model, nn.Module):
            self.teacher_model.eval()
        return self

    def _check_options(self) -> None:
        for name, options in (("distillation_type", KINDS), ("reduction", REDUCTIONS)):
            value = getattr(self, name)
            if value not in options:
                raise InputError(f"{name} must be one of {', '.join(options)}, not {value!r}")
        for name in ("alpha", "tau"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.requires_grad:
                raise InputError(f"{name} must be a number, not a tensor that requires a gradient")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must lie in [0, 1], not {self.alpha}")
        if not self.tau > 0:
            raise InputError(f"tau must be positive, not {self.tau}")
        if self.distillation_type != "none" and self.teacher_model is None:
            kind = self.distillation_type
            raise InputError(f"distillation_type {kind!r} needs a teacher_model")

    def forward(
        self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor
    ) -> Tensor:
        """Loss of one batch.

        Args:
            inputs: the student's input, handed to the teacher.
            outputs: (class logits, distillation logits), float [B, C] each; a single tensor of
                class logits for "none".
            labels: whatever the base criterion takes.

        Raises:
            InputError: a single tensor where distillation needs a second head's logits; an
                attribute outside its range; labels of the wrong kind for timm's criteria.
        """
        self._check_options()
        if isinstance(outputs, Tensor):
            class_logits, distill_logits = outputs, None
        else:
            class_logits, distill_logits = outputs
        criterion: Any = self.base_criterion
        is_timms = _is_timms(criterion)
        if is_timms:
            _require_labels(criterion, labels)
        if self.distillation_type == "none":
            return criterion(class_logits, labels)
        if distill_logits is None:
            raise InputError(
                f"distillation_type {self.distillation_type!r} needs the outputs of two heads, "
                "(class logits, distillation logits), but the model returned one tensor: use a "
                "distilled model in train mode (timm: model.set_distilled_training(True))"
            )
        teacher_model: Any = self.teacher_model
        if isinstance(teacher_model, nn.Module) and teacher_model.training:
            teacher_model.eval()  # it was set after this module was put into train mode
        with torch.no_grad():
            teacher = teacher_model(inputs)
        can_fuse = is_timms and _fits(labels, class_logits, distill_logits)
        smoothing = _fusible_smoothing(criterion) if can_fuse else None
        loss = distillation_loss(
            class_logits if smoothing is not None else None,
            distill_logits,
            labels,
            teacher,
            kind=self.distillation_type,
            alpha=self.alpha,
            tau=self.tau,
            smoothing=smoothing or 0.0,
            reduction=self.reduction,
        )
        assert isinstance(loss, Tensor)  # without return_parts
        if smoothing is not None:
            return loss
        return (1 - self.alpha) * criterion(class_logits, labels) + self.alpha * loss


def _fits(labels: Tensor, class_logits: Tensor, distill_logits: Tensor) -> bool:
    """Whether the kernel computes what timm's criterion would; it gives labels no gradient."""
    if class_logits.shape != distill_logits.shape or class_logits.dim() != 2:
        return False
    if labels.dtype in (torch.int64, torch.int32):
        return labels.shape == class_logits.shape[:1]
    is_soft = labels.is_floating_point() and labels.shape == class_logits.shape
    return is_soft and not labels.requires_grad
