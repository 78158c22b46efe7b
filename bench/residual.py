"""Does a bfloat16 residual stream cost accuracy? The same runs with either dtype, seed by seed.

    python -m bench.residual --out FILE [--work FOLDER] [--data digits fashion] [--seeds 0 1 2]

For each data set and seed: a small convnet is trained as the teacher, its logits for all views are
cached, and the same hard-distilled transformer is trained once for each dtype of the stream, with
the same views and draws. Everything but the stream is float32, so that the difference is the
stream's. The transformers are 12 blocks deep: rounding errors add up with depth.

`digits` are scikit-learn's (599 images to train on, 1,198 held out). `fashion` is a part of
Fashion-MNIST (Xiao et al. 2017; Debian package dataset-fashion-mnist): 3,000 and 10,000 images.
The result file is written after each run; a second call continues from the folder's runs.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.record import to_text
from deit_fast.config import RunConfig
from deit_fast.precomputation import precompute
from deit_fast.recipes import digits_student, digits_teacher
from deit_fast.runtime.environment import describe_environment
from deit_fast.runtime.metrics import read_metrics
from deit_fast.tools.demo import write_digits
from deit_fast.training.loop import train

RESIDUALS = ("float32", "bfloat16")
FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_IMAGES = 3000
SIZES = {"digits": 16, "fashion": 28}  # pixels; 4 x 4 patches
EPOCHS = {"digits": 60, "fashion": 12}
DEPTH, DROP_PATH = 12, 0.1
POINTS = 20  # of a loss curve


def write_fashion(root: Path) -> None:
    """Write Fashion-MNIST as an image folder: the first 3,000 training images, all test images.

    Raises:
        SystemExit: the files are not there.
    """
    from PIL import Image

    for split, prefix, count in (("train", "train", FASHION_IMAGES), ("val", "t10k", None)):
        try:
            images = gzip.decompress((FASHION / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((FASHION / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        except OSError as error:
            raise SystemExit(
                f"{error}: install Debian's package dataset-fashion-mnist, or pass --data digits"
            ) from None
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)[:count]
        for index, label in enumerate(labels[8:][:count]):
            path = root / split / str(label) / f"{index:05d}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[index]).save(path)


def config_of(recipe: RunConfig, data: str, root: Path, output: Path, seed: int) -> RunConfig:
    return recipe.replace(
        output=str(output), seed=seed, device="cpu", data={"root": str(root), "workers": 0},
        eval_every=100, save_every=100, log_every=1, epochs=EPOCHS[data],
        view={"image_size": SIZES[data], "seed": seed},
    )  # fmt: skip


def student_of(data: str, root: Path, folder: Path, seed: int) -> RunConfig:
    config = config_of(digits_student(), data, root, folder, seed)
    args = (*config.model.args, f"depth={DEPTH}", f"patch_size={SIZES[data] // 4}")
    return config.replace(
        num_views=min(30, EPOCHS[data]), model={"drop_path": DROP_PATH, "args": args}
    )


def run_seed(data: str, seed: int, work: Path) -> list[dict[str, Any]]:
    """One row for each dtype: accuracies in percent, and the loss by part of the run."""
    root, folder = work / data / "data", work / data / f"seed-{seed}"
    teacher = config_of(digits_teacher(), data, root, folder / "teacher", seed)
    teacher = teacher.replace(epochs=min(30, teacher.epochs))
    if not (folder / "teacher" / "model.safetensors").exists():
        train(teacher)
    spec = f"{teacher.model.name}@{folder}/teacher/model.safetensors"
    student = student_of(data, root, folder, seed)
    precompute(student.replace(teacher=spec, cache=str(folder / "cache")))
    rows = []
    for residual in RESIDUALS:
        run = student.replace(
            output=str(folder / residual), cache=str(folder / "cache"), model={"residual": residual}
        )
        result = train(run)
        losses = [row["loss"] for row in read_metrics(folder / residual / "metrics.jsonl")
                  if row["kind"] == "train"]  # fmt: skip
        parts = np.array_split(np.array(losses), POINTS)
        rows.append(
            {
                "data": data, "seed": seed, "residual": residual, "steps": len(losses),
                "accuracy": round(100 * result["top1"], 2),
                "loss": [round(float(part.mean()), 5) for part in parts],
            }
        )  # fmt: skip
    return rows


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per data set and dtype: means over the seeds, and the seeds' standard deviation."""
    result = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for residual in RESIDUALS:
            chosen = [x for x in rows if x["data"] == data and x["residual"] == residual]
            accuracies = [x["accuracy"] for x in chosen]
            spread = float(np.std(accuracies, ddof=1)) if len(chosen) > 1 else 0.0
            row = {"data": data, "residual": residual, "seeds": len(chosen)}
            row["accuracy"] = round(float(np.mean(accuracies)), 2)
            row["accuracy_std"] = round(spread, 2)
            row["last_loss"] = round(float(np.mean([x["loss"][-1] for x in chosen])), 4)
            result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/residual"))
    parser.add_argument("--data", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    meta = describe_environment(torch.device("cpu")) | {"date": time.strftime("%Y-%m-%d")}
    meta["command"] = " ".join(["python -m bench.residual", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    for data in options.data:
        write = write_digits if data == "digits" else write_fashion
        write(options.work / data / "data")
        for seed in options.seeds:
            rows += run_seed(data, seed, options.work)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"meta": meta, "means": means(rows), "rows": rows}
            options.out.write_text(to_text(result))
            for row in rows[-len(RESIDUALS) :]:
                print(f"{data} seed {seed} {row['residual']}: {row['accuracy']} %", flush=True)


if __name__ == "__main__":
    main()
