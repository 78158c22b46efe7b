"""Predicted images/s on several GPUs: printed by ``python -m bench roofline --gpus 1,8,64``.

Each GPU has the batch of the one-GPU prediction. DDP adds a ring all-reduce of the gradients: each
GPU sends 2 (n - 1) / n of the gradients' bytes (Patarasu and Yuan 2009). Within a host they cross
NVLink; between hosts every ring leaves through another GPU's adapter, so all adapters of a host
share the bytes. The slower of the two links determines the time.

DDP sends a bucket as soon as its gradients exist, which overlaps with the backward pass. The
last bucket, and what the backward pass is too short to hide, are exposed. This holds for every
setting of ``compile``: compiled blocks are separate graphs, and torch splits the graph of a whole
model where a bucket ends (tests/test_compile_ddp.py). Not counted: multiprocessors and memory
bandwidth that the exchange takes from the backward pass, and waiting for a slower GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import cards, roofline
from .cards import Card
from .step_parts import parameters

GPUS_PER_HOST = 8
BUCKET = 25 << 20  # DDP's bucket_cap_mb, in bytes of float32 gradients
HOP_US = {"host": 2.0, "network": 5.0}  # latency of one step of an exchange


class Scaled(NamedTuple):
    """A step on several GPUs."""

    gpus: int
    megabytes: float  # that each GPU sends
    all_reduce_ms: float
    exposed_ms: float  # of it, not hidden by the backward
    step_ms: float
    images_per_s: float
    efficiency: float  # images/s of one of these GPUs for those of one alone
    loader_images_per_s: float  # that one host must load


def sent_bytes(size: float, gpus: int) -> float:
    """Bytes that each GPU sends to sum ``size`` bytes over all by rings."""
    return 2 * (gpus - 1) / gpus * size


def all_reduce_us(card: Card, size: float, gpus: int) -> float:
    """Time of one all-reduce of ``size`` bytes, microseconds.

    The latency is that of a tree, which NCCL takes where it is shorter than a ring's.
    """
    if gpus == 1:
        return 0.0
    rate = card.nvlink_gbps * 1e3 * cards.NVLINK_SHARE  # bytes in a microsecond
    hop = HOP_US["host"]
    if gpus > GPUS_PER_HOST:
        rate = min(rate, GPUS_PER_HOST * card.network_gbps * 1e3 * cards.NETWORK_SHARE)
        hop = HOP_US["network"]
    return sent_bytes(size, gpus) / rate + 2 * math.ceil(math.log2(gpus)) * hop


def buckets(size: float) -> list[float]:
    """Bytes of DDP's buckets in the order in which the backward fills them."""
    full, last = divmod(size, BUCKET)
    return [float(BUCKET)] * int(full) + ([last] if last else [])


def scale(one: roofline.Prediction, gpus: int) -> Scaled:
    """The step on this number of GPUs."""
    card, weights = one.step.card, parameters(one.step.model)
    times = [all_reduce_us(card, size, gpus) for size in buckets(4 * weights)]
    total = sum(times)
    backward = sum(part.us for part in one.device if part.phase == "backward")
    exposed = max(times[-1], total - backward)
    step_us = max(one.device_ms * 1e3 + exposed, one.host_ms * 1e3)
    rate = gpus * one.step.batch / step_us * 1e6
    return Scaled(
        gpus, sent_bytes(4 * weights, gpus) / 1e6, total / 1e3,
        exposed / 1e3, step_us / 1e3, rate, rate / gpus / one.images_per_s,
        rate / gpus * min(gpus, GPUS_PER_HOST),
    )  # fmt: skip


def predict(one: roofline.Prediction, counts: Sequence[int]) -> list[Scaled]:
    """
    Raises:
        SystemExit: more than a host's GPUs that do not fill hosts.
    """
    for gpus in counts:
        if gpus < 1 or (gpus > GPUS_PER_HOST and gpus % GPUS_PER_HOST):
            raise SystemExit(f"--gpus {gpus}: up to {GPUS_PER_HOST}, or whole hosts of as many")
    return [scale(one, gpus) for gpus in counts]


HEAD = ("GPUs", "sent by a GPU, MB", "all-reduce, ms", "not hidden",
        "step, ms", "images/s", "of linear", "images/s a host must load")  # fmt: skip


def cells(row: Scaled) -> tuple[str, ...]:
    return (
        str(row.gpus),
        f"{row.megabytes:.0f}", f"{row.all_reduce_ms:.2f}", f"{row.exposed_ms:.2f}",
        f"{row.step_ms:.2f}", f"{row.images_per_s:,.0f}", f"{row.efficiency:.1%}",
        f"{row.loader_images_per_s:,.0f}",
    )  # fmt: skip


def as_text(rows: Sequence[Scaled]) -> str:
    table = [HEAD, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["PREDICTED scaling, not measured; the same batch on every GPU"]
    for row in table:
        lines.append("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    return "\n".join(lines)


def as_markdown(prediction: roofline.Prediction, counts: Sequence[int]) -> Iterator[str]:
    """Lines of a table."""
    return iter(roofline.markdown_rows(HEAD, map(cells, predict(prediction, counts))))
