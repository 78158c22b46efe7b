"""fuse() in timm's train.py: one line behind `create_model`, everything else as it is.

    model = create_model(args.model, ...)
    fuse(model)                                  # <- this one, before .to(device), EMA and DDP

This is the middle of that script in small: timm's model, optimiser, schedule and its own token
distillation task, with and without that line. Both train to the same losses, which is checked; on a
GPU the fused one runs our kernels.

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
    """Losses of a few steps on random images; equal seeds make equal weights and images."""
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
