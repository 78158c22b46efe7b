"""A training loop like facebookresearch/deit's with the loss of deit_fast. Seconds on a CPU.

In DeiT's `main.py` one line changes: `from losses import DistillationLoss` becomes
`from deit_fast import DistillationLoss`. The images here are random stripes.

    python examples/drop_in_loss.py
    python examples/drop_in_loss.py --kind soft --steps 100
"""

from __future__ import annotations

import argparse

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

from deit_fast import DistillationLoss

CLASSES, SIZE, BATCH = 4, 32, 32


def draw_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, S, S] of noisy stripes whose spacing is their class, and labels [B]."""
    labels = torch.randint(CLASSES, (BATCH,))
    phase = 6.3 * torch.rand(BATCH, 1)
    wave = torch.sin(torch.arange(SIZE) * (labels + 1)[:, None] * 0.35 + phase)
    images = wave[:, None, None, :].expand(BATCH, 3, SIZE, SIZE)
    return images + 0.5 * torch.randn(BATCH, 3, SIZE, SIZE), labels


def make_teacher() -> torch.nn.Module:
    """A small convolutional network trained on the stripes."""
    teacher = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 9, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, CLASSES),
    )
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(60):
        images, labels = draw_batch()
        loss = torch.nn.functional.cross_entropy(teacher(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    model.eval()
    batches = [draw_batch() for _ in range(8)]
    hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    return hits / (8 * BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("none", "soft", "hard"), default="hard")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (timm's Mixup draws from it)

    teacher = make_teacher()
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=CLASSES, img_size=SIZE, patch_size=8, embed_dim=64, depth=2, num_heads=2,
    )  # fmt: skip
    student.set_distilled_training(True)  # train mode returns the logits of both heads
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    criterion = DistillationLoss(SoftTargetCrossEntropy(), teacher, args.kind, alpha=0.5, tau=3.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.05)

    student.train()
    for step in range(args.steps):
        images, targets = mixup(*draw_batch())
        loss = criterion(images, student(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    print(f"teacher {accuracy(teacher):.1%}  student {accuracy(student):.1%}  chance 25.0%")


if __name__ == "__main__":
    main()
