"""Several students from one pass against each alone: CPU time of a step.

    python -m bench.students --out FILE [--rounds 9] [--steps 16]

Three small transformers are trained with one loader, in the main process, so that nothing overlaps
and times add up. Each round trains each student alone and all together, in an order that rotates.
Times are those of the log: its rows say how long a step took, and what share of that was waiting
for the batch. The clock is the process's CPU time, to which other processes add little. ``BOUND``
is the sum of the students' own steps and one loader, ``ALONE`` the sum of the single runs. Ratios
are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.record import collect_meta, write
from deit_fast.config import RunConfig
from deit_fast.models.convnet import small_convnet
from deit_fast.precomputation import precompute
from deit_fast.runtime import speed
from deit_fast.runtime.metrics import read_metrics
from deit_fast.training.loop import train_together

CLASSES, IMAGES, SIDE, VIEW = 4, 64, 128, 64  # images of a class; sides in pixels
WIDTHS = (64, 96, 128)
BATCH, WARM_UP = 32, 4
TOGETHER, BOUND, ALONE = "ours, together", "bound: steps and one loader", "one after another"

PEERS = {TOGETHER: ALONE, BOUND: TOGETHER}  # a row's speed is given relative to its peer's


def write_images(root: Path) -> None:
    """JPEG files of smooth noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 2)):
        for label in range(CLASSES):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                coarse = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{number}.jpg")


def students(work: Path, teacher: str | None, cache: str | None, steps: int) -> list[RunConfig]:
    base = RunConfig(
        device="cpu", teacher=teacher, cache=cache, teacher_floor=0.0, batch_size=BATCH,
        epochs=steps * BATCH // (CLASSES * IMAGES) + 1, num_views=3, max_steps=steps, log_every=1,
        eval_every=10**6, save_every=10**6,
    )  # fmt: skip
    base = base.replace(
        data={"root": str(work / "data"), "workers": 0}, view={"image_size": VIEW},
        loss={"kind": "soft"}, optim={"ema_decay": 0.5},
    )  # fmt: skip
    return [
        base.replace(
            output=str(work / f"width-{width}"),
            model={"args": (f"embed_dim={width}", "depth=4", f"num_heads={width // 32}")},
        )
        for width in WIDTHS
    ]


def step_times(configs: list[RunConfig]) -> tuple[float, float]:
    """Median time of a step, and of its waiting for the batch, in ms."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [c.replace(output=str(Path(folder, Path(c.output).name))) for c in configs]
        train_together(runs)
        rows = [row for row in read_metrics(Path(runs[-1].output, "metrics.jsonl"))
                if row["kind"] == "train"][WARM_UP:]  # fmt: skip
    waits = [row["data_wait"] * row["step_ms"] for row in rows]
    return statistics.median(row["step_ms"] for row in rows), statistics.median(waits)


def measure(case: str, configs: list[RunConfig], rounds: int) -> list[dict[str, Any]]:
    """Rows of a case."""
    groups = [[config] for config in configs] + [configs]
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        found: dict[int, tuple[float, float]] = {}
        for place in range(len(groups)):
            index = (place + number) % len(groups)
            found[index] = step_times(groups[index])
        alone = [found[index] for index in range(len(configs))]
        loader = statistics.mean(wait for _, wait in alone)
        here = {
            TOGETHER: found[len(configs)][0],
            BOUND: sum(step - wait for step, wait in alone) + loader,
            ALONE: sum(step for step, _ in alone),
            "loader": loader,
        }
        here |= {f"width {width}, its step": step - wait
                 for width, (step, wait) in zip(WIDTHS, alone, strict=True)}  # fmt: skip
        for name, value in here.items():
            times.setdefault(name, []).append(value)
        print(case, {name: round(value, 2) for name, value in here.items()}, flush=True)
    rows = []
    for name, values in times.items():
        low, middle, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
        row = {"bench": "students", "case": case, "impl": name,
               "ms": middle, "ms_p20": low, "ms_p80": high}  # fmt: skip
        if peer := PEERS.get(name):
            pairs = zip(times[peer], values, strict=True)
            row |= {"ratio": statistics.median(a / b for a, b in pairs), "ratio_to": peer}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed: Any = speed
    timed.time = SimpleNamespace(perf_counter=time.process_time)  # the clock of the log's rows
    command = " ".join(["python -m bench.students", *sys.argv[1:]])
    content: dict[str, Any] = {"meta": collect_meta("cpu", command, None), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_images(work / "data")
        torch.manual_seed(0)
        weights = work / "teacher.safetensors"
        save_file(small_convnet(CLASSES).state_dict(), weights)
        teacher = f"deit_fast.models.convnet:small_convnet@{weights}"
        online = students(work, teacher, None, options.steps)
        cache = str(work / "cache")
        precompute(online[0].replace(cache=cache))
        cached = students(work, None, cache, options.steps)
        for case, configs in (("online teacher", online), ("cache", cached)):
            name = f"{len(configs)} students, {case}, {VIEW}px B={BATCH}"
            content["rows"] += measure(name, configs, options.rounds)
            write(options.out, content)


if __name__ == "__main__":
    main()
