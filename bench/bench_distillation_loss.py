"""Distillation loss of both heads, forward and backward, under mixed targets.

Bytes: the logits of both heads and of the teacher read once, two gradients written; at 21841
classes ours reads logits twice, but the bytes count one read. On a CPU ours is the reference in
plain PyTorch. All start from the mixed labels (y_a, y_b, lam), as every step of training does: the
peers build the dense target from them, by the operations of timm's Mixup, which torch.compile
may fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import TopK, distillation_loss

from .common import Case, training_step

ALPHA, TAU, SMOOTHING, K = 0.5, 3.0, 0.1, 16


Target = Tensor | tuple[Tensor, Tensor, Tensor]


def dense_target(target: Target, classes: int) -> Tensor:
    """timm's mixup_target, with a weight for each row."""
    if isinstance(target, Tensor):
        return target
    first, second, lam = target
    if torch.compiler.is_compiling():  # Inductor cannot fill with a size that it does not know
        one, other = (F.one_hot(y, classes) for y in (first, second))
        mixed = one * lam[:, None] + other * (1 - lam[:, None])
        return mixed * (1 - SMOOTHING) + SMOOTHING / classes
    off = SMOOTHING / classes
    empty = torch.full((len(lam), classes), off, device=lam.device)
    one, other = (empty.scatter(1, y[:, None], 1 - SMOOTHING + off) for y in (first, second))
    return one * lam[:, None] + other * (1 - lam[:, None])


def base(zc: Tensor, target: Target) -> Tensor:
    dense = dense_target(target, zc.shape[1])
    return torch.sum(-dense * F.log_softmax(zc.float(), dim=-1), dim=-1).mean()


def deit(zc: Tensor, zd: Tensor, target: Target, teacher: Tensor, kind: str) -> Tensor:
    """The formula of facebookresearch/deit, in its own operations."""
    if kind == "hard":
        distillation = F.cross_entropy(zd.float(), teacher.argmax(1))
    else:
        log_p, log_q = F.log_softmax(zd.float() / TAU, 1), F.log_softmax(teacher.float() / TAU, 1)
        kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        distillation = kl * TAU**2 / zd.numel()
    return (1 - ALPHA) * base(zc, target) + ALPHA * distillation


def timm(zc: Tensor, zd: Tensor, target: Target, teacher: Tensor, kind: str) -> Tensor:
    """timm's TokenDistillationTask: its soft term is a mean over the batch."""
    if kind == "hard":
        return deit(zc, zd, target, teacher, kind)
    log_p, log_q = F.log_softmax(zd.float() / TAU, -1), F.log_softmax(teacher.float() / TAU, -1)
    kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - ALPHA) * base(zc, target) + ALPHA * kl * TAU**2


def ours(zc: Tensor, zd: Tensor, target: Target, teacher: Tensor | TopK, kind: str) -> Tensor:
    return distillation_loss(
        zc, zd, target, teacher,
        kind=kind, alpha=ALPHA, tau=TAU, smoothing=SMOOTHING, reduction="numel",
    )  # fmt: skip


def liger() -> Callable[[Tensor, Tensor, Target, Tensor], Tensor]:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(zc: Tensor, zd: Tensor, target: Target, teacher: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(zd.float() / TAU, -1), F.log_softmax(teacher.float() / TAU, -1)
        return (1 - ALPHA) * base(zc, target) + ALPHA * TAU**2 * divergence(log_p, log_q)

    return loss


def top_k(logits: Tensor) -> TopK:
    log_q = torch.log_softmax(logits.float() / TAU, 1)
    values, ids = log_q.topk(K, 1)
    tail = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    return TopK(ids.int(), values, tail, "bucket")


def cases(device: str) -> list[Case]:
    batches = (64, 256, 1024) if device == "cpu" else (256, 1024, 4096)
    sizes = [(batch, classes, 0) for classes in (1000, 21841) for batch in batches]
    if device != "cpu":
        # A head with its weight padded to a multiple of 8 emits rows with 7 columns of padding.
        sizes += [(batch, 21841, 7) for batch in batches]
        first = ((256, 1000, 0), (4096, 21841, 7), (4096, 21841, 0))
        sizes.sort(key=lambda size: first.index(size) if size in first else len(first))
    # A CPU compiles for half a minute: there one graph serves all sizes.
    compiled = torch.compile(deit, dynamic=device == "cpu")
    kinds = ("soft", "soft top-16", "hard")
    # What no time is left for comes last.
    return [case(device, *size, kind, compiled) for kind in kinds for size in sizes]


def case(
    device: str, batch: int, classes: int, padding: int, kind: str, compiled: Callable[..., Tensor]
) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def build() -> dict[str, Callable[[], Any] | str]:
        draw = torch.Generator(device).manual_seed(0)
        shape = (3, batch, classes)
        zc, zd, dense = (
            F.pad(x, (0, padding))[:, :classes]
            for x in (torch.randn(shape, device=device, generator=draw) * 3).to(dtype)
        )
        zc, zd = zc.requires_grad_(), zd.requires_grad_()
        first, second = torch.randint(classes, (2, batch), device=device, generator=draw)
        lam = torch.rand(batch, device=device, generator=draw)
        target = first, second, lam
        teacher = top_k(dense) if kind == "soft top-16" else dense
        name = kind.split()[0]

        def step(loss: Callable[..., Tensor], *arguments: Any) -> Callable[[], Any]:
            return training_step(lambda: loss(zc, zd, *arguments), zc, zd)

        implementations: dict[str, Callable[[], Any] | str] = {
            "ours": step(ours, target, teacher, name),
            "deit torch.compile": step(compiled, target, dense, name),
            "deit eager": step(deit, target, dense, name),
            "timm eager": step(timm, target, dense, name),
        }
        if name == "soft":
            try:
                implementations["liger"] = step(liger(), target, dense)
            except ImportError as error:
                implementations["liger"] = str(error)
        return implementations

    cells = batch * classes * dtype.itemsize
    teacher_bytes = batch * (8 * K + 4) if kind == "soft top-16" else cells
    rows = f"C={classes} B={batch}{' padded rows' if padding else ''}"
    label = f"{rows} {kind} {str(dtype).removeprefix('torch.')}"
    return Case(label, build, bytes_moved=4 * cells + teacher_bytes, items=batch)
