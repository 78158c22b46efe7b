"""Kernels over plain tensors; they know nothing of the engine around them."""

from .distillation_loss import TopK, distillation_loss
from .ingest import ingest

__all__ = ["TopK", "distillation_loss", "ingest"]
