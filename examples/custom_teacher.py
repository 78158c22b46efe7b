"""Your own teacher: define it, train it, cache its logits, train a student. Runs on a CPU.

A teacher is named by module and function, `custom_teacher:edges`; the function is called with
`num_classes`. The teacher sees the views of the student, in the normalisation that it was trained
in: the weights that `train` writes say it. A teacher of features returns them by name: `described`.

    python examples/custom_teacher.py DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from own_data import small_run, write_images

from deit_fast import load_teacher
from deit_fast.precomputation import precompute
from deit_fast.training.loop import train


def edges(num_classes: int) -> torch.nn.Module:
    """Images [B, 3, S, S] to logits [B, num_classes]."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 7, padding=3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, num_classes),
    )


class Described(torch.nn.Module):
    """Images [B, 3, S, S] to logits and features of the network that ``edges`` makes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = edges(num_classes)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = self.network[:2](images)
        pooled = self.network[2:4](grid)
        patches = torch.nn.functional.avg_pool2d(grid, 8)  # [B, D, S / 8, S / 8]
        return {"logits": self.network[4](pooled), "pooled": pooled, "patches": patches}


def described(num_classes: int) -> torch.nn.Module:
    return Described(num_classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_images(folder / "images")
    base = small_run(folder / "images", folder / "student").replace(view={"repeats": 2})

    factory = "custom_teacher:edges"
    teacher = base.replace(
        output=str(folder / "teacher"),
        model={"name": factory, "fused": False, "args": ()},
        # another normalisation than the student's
        view={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "mixup_alpha": 0, "cutmix_alpha": 0},
        optim={"lr": 0.1},
        epochs=10,
    )
    print(f"teacher top-1 {100 * train(teacher)['top1']:.1f} %")

    student = base.replace(
        cache=str(folder / "cache"),
        teacher=f"{factory}@{folder / 'teacher' / 'model.safetensors'}",
        model={"name": "deit_tiny_distilled_patch16_224"},
        # alpha 1: labels are not used, the student learns from the teacher only
        loss={"kind": "soft", "alpha": 1.0, "tau": 2.0, "reduction": "batchmean"},
    )
    written = precompute(student)
    print(f"{written['images']} rows of logits cached, {written['views']} views of each image")
    result = train(student.replace(teacher=None))
    print(f"student top-1 {100 * result['top1']:.1f} %, trained from the cache alone")

    both = load_teacher("custom_teacher:described", num_classes=10, targets=["logits", "patches"])
    logits, (patches,) = both.outputs(torch.rand(4, 3, 32, 32))
    print(f"logits {tuple(logits.shape)} and patches {tuple(patches.shape)} from one pass")


if __name__ == "__main__":
    main()
