"""The parts of a training step's predicted time: each is a count over a rate.

Counts come from the golden table of bench/traffic.py and from the model's shapes; rates and their
reasons stand in bench/cards.py and here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from . import cards
from .cards import Card
from .counts import Counts, product_bytes, weigh
from .traffic import BATCH, PASSES, TOKENS

DEPTH, CLASSES, PIXELS = 12, 1000, 224
WIDTHS = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
HEAD = 64  # channels of a head

# From the end of a kernel to full speed of the next one in the same stream, on the device.
LAUNCH_US = 1.2
# Kernels that one call of an operator of ours launches, where it is more than one.
LAUNCHES = {"add_layer_norm_backward": 2, "bias_gelu_backward": 2, "attention_backward": 2}

# One launch of a Triton kernel by the host, and what our operators take in units of it: measured
# with a driver that launches nothing (tests/test_host_cost.py); cuBLAS and others are assumptions.
HOST_LAUNCH_US = 3.9
HOST_LAUNCHES = {
    "attention_forward": 1.3, "attention_backward": 1.5, "add_layer_norm_forward": 1.9,
    "add_layer_norm_backward": 2.9, "bias_gelu_forward": 0.9, "bias_gelu_backward": 1.5,
}  # fmt: skip
HOST_OPERATOR = 3.0  # of an operator that is not in this list
HOST_GEMM_US = 6.0
HOST_BLOCK_US = 40.0  # guards, wrappers and autograd of one compiled block in one phase
HOST_REST_US = 700.0  # ingest, loss, norm, optimiser, guard: eager calls and lists of tensors

GATHERS_PER_CLOCK = 5  # of a multiprocessor: table look-ups of ingest, one for each byte read
LOSS_LAUNCHES, LOSS_LAUNCH_US = {"timm": 4}, 4.0  # ours: 2; with the barriers inside them


class Instructions(NamedTuple):
    """Of the programs of one head."""

    programs: int
    warps: int
    outside: int  # of loops, of one warp
    turn: int
    turns: int

    @property
    def of_a_head(self) -> int:
        return self.programs * self.warps * (self.outside + self.turn * self.turns)


# Instructions of one warp, counted in the SASS of sm_90 (triton 3.6.0) at 198 tokens of 64
# channels, which all DeiT have: outside of loops, and in one turn of the loop.
INSTRUCTIONS = {
    # One program a head; its loop goes over 4 blocks of 64 queries.
    "attention_forward": Instructions(1, 4, 430, 954, 4),
    # 4 pairs of programs a head, for queries (with the sums for their bias) and for keys; a pair's
    # loops, 150 and 265 instructions, go over 6 blocks of 32 rows.
    "attention_backward": Instructions(4, 4, 1745, 150 + 265, 6),
}


class Part(NamedTuple):
    """A line of the prediction: us = count / rate, where a line has no reason of its own."""

    group: str
    phase: str  # "forward", "backward", or "" outside of both
    name: str
    amount: str
    rate: str
    us: float


class Step(NamedTuple):
    """The step that is predicted."""

    card: Card
    model: str
    implementation: str
    batch: int

    @property
    def scale(self) -> float:
        """Samples of the batch for one of the golden table. Casts of weights scale along: < 2 %."""
        return self.batch / BATCH

    @property
    def width(self) -> int:
        return WIDTHS[self.model]

    @property
    def heads(self) -> int:
        return self.batch * self.width // HEAD


def layers(model: str) -> int:
    """Weights and biases of the linear layers of all blocks."""
    return DEPTH * (12 * WIDTHS[model] ** 2 + 9 * WIDTHS[model])


def parameters(model: str) -> int:
    """Weights of a distilled DeiT at 224 pixels: 22.4 million of DeiT-S (DeiT, table 1)."""
    width = WIDTHS[model]
    embedding = (3 * 16**2 + 1) * width + (2 + TOKENS) * width
    return layers(model) + DEPTH * 4 * width + embedding + 2 * width + 2 * CLASSES * (width + 1)


# ---------------------------------------------------------------------------------------------
# Device
# ---------------------------------------------------------------------------------------------


def moved(group: str, phase: str, name: str, size: float, card: Card) -> Part:
    """A part that is limited by memory bandwidth."""
    rate = cards.bytes_per_us(card)
    return Part(group, phase, name, f"{size / 1e9:.3f} GB", f"{rate / 1e6:.2f} TB/s", size / rate)


def at_batch(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a product at the step's batch: dimensions that are rows of the batch scale."""
    rows = {BATCH * tokens for tokens in (1, 2, TOKENS - 2, TOKENS)}
    return tuple(round(size * step.scale) if size in rows else size for size in shape)


def gemm_parts(
    step: Step, phase: str, gemms: Counter[tuple[str, tuple[int, ...]]]
) -> Iterator[Part]:
    """Each product by its FLOPs, or by its bytes (bfloat16) where they take longer."""
    for (call, golden_shape), calls in sorted(gemms.items()):
        shape = at_batch(step, golden_shape)
        m, n, k = shape[-3:]
        batch = math.prod(shape[:-3])
        flops = 2.0 * calls * batch * m * n * k
        tflops = cards.matrix_tflops(step.card, min(m, n, k))
        if call.startswith("convolution"):
            tflops = step.card.peak_tflops * cards.CONVOLUTION_SHARE
        size = calls * product_bytes(shape)
        rate = cards.bytes_per_us(step.card)
        name = f"{call} {'x'.join(map(str, shape))}, {calls} calls"
        if size / rate > flops / tflops / 1e6:
            yield moved("GEMM", phase, name, size, step.card)
            continue
        yield Part("GEMM", phase, name, f"{flops / 1e9:.1f} GFLOP", f"{tflops:.0f} TFLOP/s",
                   flops / tflops / 1e6)  # fmt: skip


def elementwise_parts(step: Step, phase: str, counts: Counts) -> Iterator[Part]:
    """What moves bytes and does little else: Inductor's kernels, and ours but attention."""
    size = weigh(counts.kernels) * step.scale
    name = f"Inductor, {counts.kernels.total()} launches"
    yield moved("elementwise", phase, name, size, step.card)
    for name, (calls, size) in by_name(counts.operators).items():
        if name not in INSTRUCTIONS:
            yield moved(
                "elementwise", phase, f"{name}, {calls} calls", size * step.scale, step.card
            )
    for name, (calls, size) in by_name(counts.other).items():
        if "scaled_dot_product" not in name and size:
            yield moved(
                "elementwise", phase, f"{name}, {calls} calls", size * step.scale, step.card
            )


def attention_parts(step: Step, phase: str, counts: Counts) -> Iterator[Part]:
    """Ours by bytes or by instructions, whichever takes longer; PyTorch's by its FLOPs."""
    for name, (calls, size) in by_name(counts.operators).items():
        if name not in INSTRUCTIONS:
            continue
        part = moved("attention", phase, f"{name}, {calls} calls", size * step.scale, step.card)
        issued = calls * step.heads * INSTRUCTIONS[name].of_a_head
        issue = cards.issue_us(step.card, issued)
        if issue > part.us:
            amount = f"{issued / 1e6:.0f} M instructions of warps"
            rate = f"{issued / issue / 1e3:.0f} G/s"
            part = Part("attention", phase, part.name, amount, rate, issue)
        yield part
    for name, (calls, size) in by_name(counts.other).items():
        if "scaled_dot_product" not in name:
            continue
        shape = name.rpartition(" ")[2]
        title = f"of PyTorch {shape}, {calls} calls"
        part = moved("attention", phase, title, size * step.scale, step.card)
        products = {"forward": 2, "backward": 5}[phase]
        flops = 2.0 * products * calls * math.prod(map(int, shape.split("x"))) * step.scale
        tflops = cards.flash_tflops(step.card, phase)
        if flops / tflops / 1e6 > part.us:
            amount, rate = f"{flops / 1e9:.1f} GFLOP", f"{tflops:.0f} TFLOP/s"
            part = Part("attention", phase, title, amount, rate, flops / tflops / 1e6)
        yield part


def by_name(calls: Counter[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Calls and bytes of each name."""
    found: dict[str, tuple[int, int]] = {}
    for (name, size), count in sorted(calls.items()):
        known = found.get(name, (0, 0))
        found[name] = known[0] + count, known[1] + size * count
    return found


def launches(counts: Counts) -> int:
    """Kernels on the device."""
    ours = sum(LAUNCHES.get(name, 1) * n for (name, _), n in counts.operators.items())
    return counts.kernels.total() + counts.gemms.total() + ours + counts.other.total()


def rest_parts(step: Step) -> Iterator[Part]:
    """Ingest, loss, gradient norm and optimiser: counts from the shapes."""
    card, ours = step.card, step.implementation != "timm"
    read = step.batch * 3 * PIXELS**2
    dtype, written = ("bfloat16", 2) if ours else ("float32", 4)
    yield moved("ingest", "", f"bytes in, {dtype} out", read * (1 + written), card)
    gathers = card.processors * GATHERS_PER_CLOCK * cards.clock_mhz(card)
    yield Part("ingest", "", "table look-ups", f"{read / 1e6:.1f} M", f"{gathers / 1e3:.0f} G/s",
               read / gathers)  # fmt: skip
    yield moved("loss", "", "two heads read, gradients written", 2 * 5 * step.batch * CLASSES, card)
    count = LOSS_LAUNCHES.get(step.implementation, 2)
    yield Part("loss", "", "launches", str(count), f"{LOSS_LAUNCH_US} us", count * LOSS_LAUNCH_US)
    weights = parameters(step.model)
    if ours:
        yield moved("optimiser", "", "gradient norm, 4 B a weight", 4 * weights, card)
        yield moved("optimiser", "", "weights' average (EMA), 12 B a weight", 12 * weights, card)
        rounded = layers(step.model)
        yield moved("optimiser", "", "rounded copies, 6 B a weight of a layer", 6 * rounded, card)
    yield moved("optimiser", "", "AdamW, 28 B a weight", 28 * weights, card)


def device_parts(step: Step, whole: dict[str, Counts]) -> list[Part]:
    """All parts of a step on the device.

    Args:
        whole: forward and backward of the model at the golden table's batch.
    """
    parts: list[Part] = []
    for phase in PASSES:
        counts = whole[phase]
        parts += gemm_parts(step, phase, counts.gemms)
        parts += elementwise_parts(step, phase, counts)
        parts += attention_parts(step, phase, counts)
    count = sum(launches(counts) for counts in whole.values())
    parts.append(Part("launches", "", "from one kernel to the next", str(count), f"{LAUNCH_US} us",
                      count * LAUNCH_US))  # fmt: skip
    parts += rest_parts(step)
    return sorted(parts, key=lambda part: GROUPS.index(part.group))


GROUPS = ("GEMM", "elementwise", "attention", "launches", "ingest", "loss", "optimiser")


# ---------------------------------------------------------------------------------------------
# Host
# ---------------------------------------------------------------------------------------------


def host_parts(whole: dict[str, Counts]) -> list[Part]:
    """Time of the host to enqueue a step; below the device's time it costs nothing."""
    triton = sum(counts.kernels.total() + counts.other.total() for counts in whole.values())
    gemms = sum(counts.gemms.total() for counts in whole.values())
    units = sum(
        HOST_LAUNCHES.get(name, HOST_OPERATOR) * calls
        for counts in whole.values()
        for (name, _), calls in counts.operators.items()
    )
    return [
        Part("host", "", name, f"{count:g}", f"{us} us", count * us)
        for name, count, us in (
            ("launches of Inductor", triton, HOST_LAUNCH_US),
            ("matrix products", gemms, HOST_GEMM_US),
            ("our operators, in launches", units, HOST_LAUNCH_US),
            ("compiled blocks, both directions", 2 * DEPTH, HOST_BLOCK_US),
            ("the rest", 1, HOST_REST_US),
        )
    ]
