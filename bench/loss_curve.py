"""Losses of fifty training steps per recipe family, to full precision, to detect changes.

    python -m bench.loss_curve --out FILE
    python -m bench.loss_curve --compare OLD NEW

The whole engine runs: views, mixing, repeats, teacher, loss, stochastic depth, optimiser, average.
The models are small, the images synthetic; a family takes seconds on one CPU thread. The last
digits of sums differ between CPUs, so a curve records where it was made. `make compare
BASE=<commit>` makes the curves of another commit and of this one on the same machine, where all
digits must be equal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from deit_fast.config import RunConfig
from deit_fast.recipes import digits_student

STEPS = 50
TEACHER = "deit_fast.models.convnet:small_convnet"

FAMILIES: dict[str, dict[str, Any]] = {
    "undistilled": {"loss": {"kind": "none"}, "teacher": None},
    "hard": {"loss": {"kind": "hard"}},
    "soft": {"loss": {"kind": "soft", "tau": 3.0}},
    "bce": {"loss": {"kind": "hard", "base": "bce", "smoothing": 0.1}},
    "fine-tune": {"loss": {"kind": "soft"}, "optim": {"lr": 8e-5, "warmup_epochs": 0.0}},
    "cached": {
        "loss": {"kind": "soft", "tau": 3.0, "tail": "uniform"},
        "codec": {"name": "topk", "k": 4},
        "teacher_batch": 64,
        "accumulate": 2,
    },
}
CACHED = ("cached",)  # teacher logits from a cache; interrupted after half of the steps, resumed


def config_of(family: str, folder: Path) -> RunConfig:
    """The demo's student with mixing, repeats, erasing, stochastic depth and average on."""
    config = digits_student().replace(
        output=str(folder), epochs=6, max_steps=STEPS, batch_size=16, num_views=6, teacher=TEACHER,
        log_every=1, eval_every=100, save_every=100, device="cpu",
        data={"source": "synthetic", "synthetic_samples": 160, "workers": 0},
        model={
            "drop_path": 0.2,
            "args": ("patch_size=4", "depth=2", "embed_dim=32", "num_heads=2"),
        },
        optim={"ema_decay": 0.99, "warmup_epochs": 1.0, "clip_grad": 1.0},
        view={"erase_prob": 0.25, "repeats": 3},
    )  # fmt: skip
    return config.replace(**FAMILIES[family])


def curve(family: str) -> list[float]:
    """The loss of each of the first STEPS steps."""
    from deit_fast.precomputation import precompute
    from deit_fast.runtime.metrics import read_metrics
    from deit_fast.training.loop import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(family, Path(folder))
        torch.manual_seed(0)  # a teacher without weights is drawn
        if family in CACHED:
            config = config.replace(cache=str(Path(folder) / "cache"))
            precompute(config)
            config = config.replace(teacher=None)
            train(config.replace(max_steps=STEPS // 2))
        train(config)
        rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"][:STEPS]


def where() -> dict[str, str]:
    """What the last digits depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def write(path: Path) -> None:
    curves = {family: curve(family) for family in FAMILIES}
    lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in curves.items()]
    made = json.dumps(where())
    path.write_text(f'{{\n  "made": {made},\n' + ",\n".join(lines) + "\n}\n")


def compare(old: Path, new: Path) -> int:
    """Print the largest relative difference of each family; 1 where one is not 0."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    moved = False
    for family in FAMILIES:
        if family not in before or family not in after:
            print(f"{family:<12} only in one of the two")
            continue
        pairs = list(zip(before[family], after[family], strict=True))
        first = next((step for step, (a, b) in enumerate(pairs, 1) if a != b), None)
        if first is None:
            print(f"{family:<12} the same, {len(pairs)} steps")
            continue
        moved = True
        largest = max(abs(a - b) / abs(a) if a else math.inf for a, b in pairs)
        print(f"{family:<12} differs from step {first} on, by at most {largest:.1e} of the loss")
    return int(moved)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loss_curve", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the curves of this tree")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if options.out is None:
        parser.error("--out FILE or --compare OLD NEW")
    write(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
