"""fuse() in timm's train.py: one line after `create_model`, nothing else changes.

    model = create_model(args.model, ...)
    fuse(model)                                  # <- this line, before .to(device), EMA and DDP

This script repeats the core of train.py: timm's model, optimiser, schedule and token distillation
task, with and without that line, and prints the difference of the losses. On a GPU the fused model
runs our kernels.

    python examples/timm_train.py
    python examples/timm_train.py --model deit_small_distilled_patch16_224 --size 224 --batch 64
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import TokenDistillationTask

from deit_fast import fuse

CLASSES = 4


def run(args: argparse.Namespace, fused: bool) -> list[float]:
    """Losses of a few steps on random images; both runs start from the same seed."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(args.model, img_size=args.size, num_classes=CLASSES)
    if fused:
        fuse(model)
    model = model.to(device)
    teacher = timm.create_model("resnet10t", num_classes=CLASSES).to(device)
    task = TokenDistillationTask(
        model, teacher, LabelSmoothingCrossEntropy(0.1), distill_type="hard",
        task_loss_weight=0.5, device=device, verbose=False,
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=args.steps, warmup_t=2, t_in_epochs=False)
    task.train()
    losses = []
    for step in range(args.steps):
        images = torch.randn(args.batch, 3, args.size, args.size, device=device)
        labels = torch.randint(CLASSES, (args.batch,), device=device)
        loss = task(images, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step + 1)
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    plain, fused = run(args, fused=False), run(args, fused=True)
    for step, pair in enumerate(zip(plain, fused, strict=True)):
        print(f"step {step}  timm {pair[0]:.5f}  fused {pair[1]:.5f}")
    difference = max(abs(a - b) for a, b in zip(plain, fused, strict=True))
    print(f"largest difference of the losses {difference:.1e}")


if __name__ == "__main__":
    main()
