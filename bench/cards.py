"""GPUs whose step ``python -m bench roofline`` predicts: public figures, and the share reached.

Sources, all NVIDIA's: "A100 Tensor Core GPU" datasheet (80 GB SXM), "H100 Tensor Core GPU"
datasheet (SXM), "H200 Tensor Core GPU" datasheet (SXM), "HGX B200" and "DGX B200" datasheets, and
the architecture white papers for multiprocessors and boost clocks. TFLOP/s are dense bfloat16 with
float32 sums. NVLink is one direction; the network is one adapter a GPU as in DGX systems:
200 Gbit/s beside an A100, 400 Gbit/s beside the others.

Shares reached are assumptions until a GPU has measured them. Each was set for the H100, from known
copy and matrix benchmarks; for the other cards the share is kept and the public figure scales.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Public figures of a GPU."""

    name: str  # as part of what torch.cuda.get_device_name says
    memory_tbps: float  # bandwidth of the memory, TB/s
    peak_tflops: float  # dense bfloat16
    processors: int  # multiprocessors (SM)
    boost_ghz: float
    nvlink_gbps: float  # to the other GPUs of a host, one direction, GB/s
    network_gbps: float  # to other hosts, GB/s of one GPU


CARDS = {
    card.name: card
    for card in (
        Card("A100", 2.039, 312, 108, 1.410, 300, 25),
        Card("H100", 3.35, 989, 132, 1.980, 450, 50),
        Card("H200", 4.8, 989, 132, 1.980, 450, 50),
        Card("B200", 8.0, 2250, 148, 1.965, 900, 50),
    )
}

# Copies on an H100 reach 2.6 of 3.35 TB/s where a kernel reads several tensors and writes others.
COPY_SHARE = 2.6 / 3.35
# An H100 under matrix load runs at about 1.755 GHz of its 1.98.
CLOCK_SHARE = 1.755 / 1.980
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp in a clock

# Matrix products reach peak * MATRIX_SHARE * k / (k + ramp), k the smallest of their three
# dimensions: a small one means few multiplications for each byte that is loaded, stored or waited
# for. 0.75 is what cuBLAS reaches on an H100 for large products, which its power limits; the ramp
# of the H100 is set so that k = 384 gives 580 TFLOP/s, as benches of such shapes show 500 to 600.
# Other cards' ramps scale with their FLOPs for a byte of memory bandwidth.
MATRIX_SHARE = 0.75
MATRIX_RAMP = 107
# cuDNN's convolution with 3 input channels and 16 x 16 patches: far below a product of rows.
CONVOLUTION_SHARE = 0.10
# PyTorch's choice for attention is FlashAttention-2. TFLOP/s on an H100: at 198 tokens 110 to
# 125 us forward and about 240 us backward for DeiT-S, by published rates at 512 tokens and tiles of
# 128 tokens. It uses matrix instructions that all these cards have in common, so it scales with
# multiprocessors and clock, not with the peak.
FLASH_TFLOPS = {"forward": 130.0, "backward": 160.0}
# Share of the issue slots that a kernel with matrix instructions and exponentials fills.
ISSUE_SHARE = 0.70

NVLINK_SHARE = 0.67  # of one direction, for messages of tens of megabytes
NETWORK_SHARE = 0.80


def find_card(name: str) -> Card:
    """
    Raises:
        SystemExit: no such card; the message lists the known ones.
    """
    if name not in CARDS:
        raise SystemExit(f"unknown card {name!r}: choose from {', '.join(CARDS)}")
    return CARDS[name]


def bytes_per_us(card: Card) -> float:
    """Bytes that kernels move in a microsecond."""
    return card.memory_tbps * 1e6 * COPY_SHARE


def clock_mhz(card: Card) -> float:
    """Clocks in a microsecond under load."""
    return card.boost_ghz * 1e3 * CLOCK_SHARE


def matrix_tflops(card: Card, smallest: int) -> float:
    """Rate of a matrix product by the smallest of its three dimensions, TFLOP/s."""
    h100 = CARDS["H100"]
    balance = (card.peak_tflops / card.memory_tbps) / (h100.peak_tflops / h100.memory_tbps)
    return card.peak_tflops * MATRIX_SHARE * smallest / (smallest + MATRIX_RAMP * balance)


def flash_tflops(card: Card, half: str) -> float:
    """Rate of PyTorch's attention in the forward or the backward, TFLOP/s."""
    h100 = CARDS["H100"]
    speed = card.processors * card.boost_ghz / (h100.processors * h100.boost_ghz)
    return FLASH_TFLOPS[half] * speed


def issue_us(card: Card, instructions: float) -> float:
    """Time to issue this number of warp instructions, spread over all schedulers, microseconds."""
    slots = card.processors * SCHEDULERS * clock_mhz(card)
    return instructions / (slots * ISSUE_SHARE)
