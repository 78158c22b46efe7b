"""What do the checks of a fused model cost? Training steps with and without them, in pairs.

    python -m bench.checks --out FILE [--pairs 300]

A fused model asks at each forward which of its modules are plain (deit_fast/models/plain.py). In
half of the steps these functions look up their earlier results. Both halves belong to
one model in one process: two processes of the same code differ by up to 3 % here. Each pair runs in
random order, and the clock is the CPU time of the thread.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from bench.record import collect_meta, to_text
from deit_fast.models import fused, plain, stream
from deit_fast.models.fuse import KERNELS, fuse

CHECKS = (
    "is_plain", "is_plain_norm", "is_idle", "drops_attention", "has_global_hooks", "called_parts",
    "why_not_attention", "why_not_mlp",
)  # fmt: skip
CASES = ((32, 8), (224, 4))  # pixels, batch

Functions = dict[tuple[Any, str], Callable[..., Any]]


def checks() -> Functions:
    return {
        (module, name): getattr(module, name)
        for module in (plain, fused, stream)
        for name in CHECKS
        if hasattr(module, name)
    }


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    results: dict[tuple[int, ...], Any] = {}

    def look_up(*arguments: Any) -> Any:
        key = tuple(map(id, arguments))
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return look_up


def use(functions: Functions) -> None:
    for (module, name), function in functions.items():
        setattr(module, name, function)


def training_step(pixels: int, batch: int, kernels: tuple[str, ...]) -> Callable[[], float]:
    """A step of DeiT-Ti that returns its CPU time in seconds."""
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224"
    model = timm.create_model(name, img_size=pixels, drop_path_rate=0.1)
    model = fuse(model, kernels=kernels).train()
    optimiser = torch.optim.AdamW(model.parameters())
    images = torch.randn(batch, 3, pixels, pixels)
    labels = torch.randint(0, 1000, (batch,))

    def step() -> float:
        start = time.thread_time()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        return time.thread_time() - start

    return step


def compare(step: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians over the pairs; the interval holds the ratio's median with a probability of 95 %."""
    checked = checks()
    memory = {key: remembered(function) for key, function in checked.items()}
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        for pair in range(-2, pairs):
            for is_checked in random.sample((True, False), 2):
                use(checked if is_checked else memory)
                seconds = step()
                if pair >= 0:
                    times[is_checked].append(seconds)
    finally:
        use(checked)
    ratios = sorted(a / b for a, b in zip(times[True], times[False], strict=True))
    reach = 0.98 * pairs**0.5
    low, high = (ratios[min(max(int(pairs / 2 + x), 0), pairs - 1)] for x in (-reach, reach))
    return {
        "ms": round(1e3 * statistics.median(times[True]), 2),
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    meta = collect_meta("cpu", " ".join(["python -m bench.checks", *sys.argv[1:]]), None)
    rows = []
    for pixels, batch in CASES:
        for kernels in ((), KERNELS):
            case = {"pixels": pixels, "batch": batch, "kernels": list(kernels)}
            found = compare(training_step(pixels, batch, kernels), options.pairs)
            rows.append(case | {"pairs": options.pairs} | found)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(to_text({"meta": meta, "rows": rows}))
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
