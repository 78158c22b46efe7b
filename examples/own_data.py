"""Your own images: write them as a folder, train on them, evaluate. Under a minute on a CPU.

The images here are stripes whose spacing is the class. If your images are files already, sort them
into DIR/train/<class>/ and DIR/val/<class>/.

    python examples/own_data.py DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from deit_fast.config import LossConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from deit_fast.evaluation import evaluate
from deit_fast.training.loop import train

CLASSES = ("wide", "medium", "narrow")
SIZE = 16


def draw(count: int, seed: int) -> Iterator[tuple[np.ndarray, str]]:
    """Images uint8 [S, S, 3] and the names of their classes."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        label = index % len(CLASSES)
        x = np.arange(SIZE) * 0.5 * (label + 1) + generator.uniform(0, 6.3)
        noise = generator.normal(0, 0.2, (SIZE, SIZE, 3))
        image = np.sin(x)[None, :, None] * 0.5 + noise
        yield np.uint8(np.clip(image * 100 + 128, 0, 255)), CLASSES[label]


def write_images(root: Path) -> None:
    """PNG files in `train` and `val`, a folder per class: the layout that `--data.root` expects."""
    for split, count, seed in (("train", 144, 0), ("val", 90, 1)):
        for index, (image, name) in enumerate(draw(count, seed)):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:04d}.png")


def small_run(root: Path, output: Path) -> RunConfig:
    """Settings for small images and a small student; each is also a flag of `deit-fast train`."""
    return RunConfig(
        output=str(output),
        epochs=20,
        batch_size=48,
        # mirrored and cropped stripes keep their class: check that yours do too
        view=ViewConfig(image_size=SIZE, crop_scale=(0.7, 1.0), augment="none", erase_prob=0.0),
        model=ModelConfig(
            name="deit_tiny_patch16_224", drop_path=0.0,
            args=("patch_size=4", "embed_dim=48", "depth=2", "num_heads=2"),
        ),
        loss=LossConfig(kind="none"),
        optim=OptimConfig(lr=0.02, warmup_epochs=2.0, ema_decay=0.0),
        eval_every=20,
        save_every=20,
    ).replace(data={"root": str(root), "workers": 0})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_images(args.folder / "images")
    train(small_run(args.folder / "images", args.folder / "run"))
    result = evaluate(str(args.folder / "run"))
    print(f"{result['samples']} held-out images, top-1 {100 * result['top1']:.1f} %")


if __name__ == "__main__":
    main()
