"""One training step: forward, loss, backward, update, moving average. Reads nothing back."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import nn

from deit_fast.config import RunConfig
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewBatch
from deit_fast.kernels import distillation_loss
from deit_fast.models.teachers import has_bf16
from deit_fast.train.teaching import Teaching


class TrainStep:
    """Applies one batch to the model.

    The numbers it returns stay on the device, so a step waits for nothing; the loop reads them
    when it logs.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        teaching: Teaching,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.teaching = config, model, teaching
        self.optimizer, self.ema, self.device = optimizer, ema, device
        self.bf16 = has_bf16(device)

    def __call__(self, batch: ViewBatch, step: int, lr: float) -> dict[str, torch.Tensor]:
        """Returns loss, base_loss, distill_loss and grad_norm as zero-dimensional tensors."""
        images = ingest_batch(batch, self.config.view, torch.float32)
        answer = self.teaching(batch, images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.model(images)
        # A model with one head is distilled through it (DeiT, table 3: "hard, no token").
        class_logits, distill_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.config.loss
        total, base, distill = distillation_loss(
            class_logits,
            distill_logits,
            batch.target,
            answer,
            kind=loss.kind,
            alpha=loss.alpha,
            tau=loss.tau,
            smoothing=loss.smoothing,
            base=loss.base,
            reduction=loss.reduction,
            return_parts=True,
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        numbers = {"loss": total, "base_loss": base, "distill_loss": distill}
        limit = self.config.optim.clip_grad or float("inf")
        numbers["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        return {name: value.detach() for name, value in numbers.items()}
