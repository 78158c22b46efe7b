"""Drop-in for the DistillationLoss of facebookresearch/deit, over kernels.distillation_loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.kernels.distillation_loss import KINDS, REDUCTIONS, distillation_loss


def fusible_smoothing(criterion: Callable[[Tensor, Tensor], Tensor]) -> float | None:
    """Label smoothing of timm's two cross-entropies, which the fused kernel can compute.

    None for all others, also for nn.CrossEntropyLoss, which ignores rows with the label -100.
    """
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if type(criterion) is SoftTargetCrossEntropy:
        return 0.0
    return criterion.smoothing if type(criterion) is LabelSmoothingCrossEntropy else None


class DistillationLoss(nn.Module):
    """(1 - alpha) * base_criterion + alpha * distillation (Touvron et al. 2021, eq. 2 and 3).

    Constructor and call are those of `losses.py` in facebookresearch/deit, with two additions.
    ``reduction`` chooses the divisor of the soft term: the default "numel" divides by B * C, as
    DeiT does; "batchmean" divides by B, as timm and most others do. And the teacher stays in eval
    mode when the criterion is put into train mode.

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
        for name, value, options in (
            ("distillation_type", distillation_type, KINDS),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in options:
                raise InputError(f"{name} must be one of {', '.join(options)}, not {value!r}")
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha must lie in [0, 1], not {alpha}")
        if not tau > 0:
            raise InputError(f"tau must be positive, not {tau}")
        if distillation_type != "none" and teacher_model is None:
            raise InputError(f"distillation_type {distillation_type!r} needs a teacher_model")
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau
        self.reduction = reduction
        self.smoothing = fusible_smoothing(base_criterion)
        self.train(self.training)

    def train(self, mode: bool = True) -> DistillationLoss:
        """Set the mode of the criterion but not of the teacher, whose statistics are frozen."""
        super().train(mode)
        if isinstance(self.teacher_model, nn.Module):
            self.teacher_model.eval()
        return self

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
            InputError: a single tensor where distillation needs a second head's logits.
        """
        if isinstance(outputs, Tensor):
            class_logits, distill_logits = outputs, None
        else:
            class_logits, distill_logits = outputs
        if self.distillation_type == "none":
            return self.base_criterion(class_logits, labels)
        if distill_logits is None:
            raise InputError(
                f"distillation_type {self.distillation_type!r} needs the outputs of two heads, "
                "(class logits, distillation logits), but the model returned one tensor: use a "
                "distilled model in train mode (timm: model.set_distilled_training(True))"
            )
        assert self.teacher_model is not None
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        is_fusible = self.smoothing is not None
        loss = distillation_loss(
            class_logits if is_fusible else None,
            distill_logits,
            labels,
            teacher,
            kind=self.distillation_type,
            alpha=self.alpha,
            tau=self.tau,
            smoothing=self.smoothing or 0.0,
            reduction=self.reduction,
        )
        assert isinstance(loss, Tensor)  # without return_parts
        if is_fusible:
            return loss
        return (1 - self.alpha) * self.base_criterion(class_logits, labels) + self.alpha * loss
