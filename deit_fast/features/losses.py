"""Losses between features of student and teacher, one number for each image.

All of them compute in float32, or in float64 for float64 features, also under autocast: a cosine
near 1 has 8 bits in bfloat16. With s and t one token of student and teacher, D channels:

    cosine      1 - s't / (|s| |t|)
    mse         |s - t|^2 / D
    smooth_l1   mean over the channels of (s - t)^2 / 2 below |s - t| = 1, |s - t| - 1/2 beyond
    balanced    0.9 cosine + 0.1 smooth L1 with its bend at 2 (C-RADIO)
    dune        0.5 cosine + 0.5 smooth L1 with its bend at 1 (Sariyildiz et al. 2025, DUNE)
    similarity  KL divergence between rows of softmax(cosines of the tokens of an image / 0.07),
                teacher || student (LightlyTrain's distillation v3, its local loss)
    spectral    mean square of real and imaginary parts of the difference of the 2-D orthonormal
                rfft over the grid (Tian et al. 2024, SpectralKD, arXiv 2412.19055)

The loss of an image is the mean over its tokens, so grids of other sizes do not weigh more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.errors import InputError

EPS = 1e-6
"""A token of this length or less has no direction: its cosines are 0, without a gradient."""
TEMPERATURE = 0.07  # of `similarity`


def feature_loss(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """The loss of each image.

    `similarity` of features with one token compares the images of the batch with each other, so an
    image's loss depends on the batch; all other losses are functions of one image.

    Args:
        student, teacher: float [B, T, D], on one device. The teacher gets no gradient. A value that
            is not finite makes the image's loss NaN or infinite.
        kind: a name of the table above.

    Returns:
        float32 [B], or float64 for float64 features.

    Raises:
        InputError: an unknown name, other shapes, `spectral` of tokens that form no square grid, or
            `similarity` of a single token of a single image.
    """
    if kind not in LOSSES:
        raise InputError(f"features.losses must be of {', '.join(LOSSES)}, not {kind!r}")
    if student.shape != teacher.shape or student.dim() != 3:
        raise InputError(
            f"feature loss {kind}: the student's features are {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}: both must be [images, tokens, channels]"
        )
    with torch.autocast(student.device.type, enabled=False):
        wide = torch.promote_types(torch.float32, student.dtype)
        return LOSSES[kind](student.to(wide), teacher.detach().to(wide))


def _unit(x: Tensor) -> Tensor:
    """Tokens of length 1, and zeros for those of no length."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = length <= EPS  # not of NaN, which must reach the loss
    return torch.where(is_zero, 0.0, x) / torch.where(is_zero, 1.0, length)


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - (_unit(s) * _unit(t)).sum(-1).mean(1)


def _mse(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean((1, 2))


def _smooth_l1(s: Tensor, t: Tensor, beta: float = 1.0) -> Tensor:
    return F.smooth_l1_loss(s, t, reduction="none", beta=beta).mean((1, 2))


def _balanced(s: Tensor, t: Tensor) -> Tensor:
    return 0.9 * _cosine(s, t) + 0.1 * _smooth_l1(s, t, beta=2.0)


def _dune(s: Tensor, t: Tensor) -> Tensor:
    return 0.5 * _cosine(s, t) + 0.5 * _smooth_l1(s, t)


def _similarity(s: Tensor, t: Tensor) -> Tensor:
    if s.shape[1] == 1:
        if len(s) == 1:
            raise InputError(
                "feature loss similarity of a vector compares the images of a process's part of "
                "the batch, which is one image: raise batch_size, or lower accumulate"
            )
        return _row_divergence(s[:, 0], t[:, 0])
    return _row_divergence(s, t).mean(1)


def _row_divergence(s: Tensor, t: Tensor) -> Tensor:
    """KL of each token's similarities to all tokens, [..., T] of [..., T, D]."""
    s, t = _unit(s), _unit(t)
    log_s = (s @ s.mT / TEMPERATURE).log_softmax(-1)
    log_t = (t @ t.mT / TEMPERATURE).log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _spectral(s: Tensor, t: Tensor) -> Tensor:
    side = math.isqrt(s.shape[1])
    if side * side != s.shape[1]:
        raise InputError(f"feature loss spectral: {s.shape[1]} tokens form no square grid")
    parts = torch.fft.rfft2((s - t).unflatten(1, (side, side)), dim=(1, 2), norm="ortho")
    return torch.view_as_real(parts).square().flatten(1).mean(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine, "mse": _mse, "smooth_l1": _smooth_l1, "balanced": _balanced, "dune": _dune,
    "similarity": _similarity, "spectral": _spectral,
}  # fmt: skip
