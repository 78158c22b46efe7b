"""Kernels over plain tensors; they know nothing of the engine around them."""

from .add_layer_norm import add_layer_norm
from .attention import attention_qkvpacked
from .augment import augment
from .bias_gelu import bias_gelu
from .bias_gelu_linear import bias_gelu_linear
from .distillation_loss import TopK, distillation_loss
from .ingest import ingest

__all__ = [
    "TopK",
    "add_layer_norm",
    "attention_qkvpacked",
    "augment",
    "bias_gelu",
    "bias_gelu_linear",
    "distillation_loss",
    "ingest",
]
