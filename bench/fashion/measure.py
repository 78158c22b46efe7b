"""What a finished student does on its held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deit_fast.evaluation import build_eval_loader, load_run
from deit_fast.tools.analysis.measures import calibration


@torch.no_grad()
def measure(run: Path) -> dict[str, Any]:
    """`top1`, `nll` (nats) and `ece` of the output that is served, and `images`.

    ECE has 15 bins of equal width (Guo et al. 2017), by ``measures.calibration``.
    """
    config, source, model = load_run(run)
    model.eval()
    device = torch.device("cpu")
    outputs, labels = [], []
    for images, of_batch, _ in build_eval_loader(config, source, device):
        logits = model(images)
        outputs.append(logits.float())
        labels.append(of_batch)
    logits, truth = torch.cat(outputs), torch.cat(labels)
    confidence, decision = logits.double().softmax(1).max(1)
    right = decision == truth
    return {
        "images": len(truth),
        "top1": right.double().mean().item(),
        "nll": torch.nn.functional.cross_entropy(logits.double(), truth).item(),
        "ece": calibration(confidence, right)["ece"],
    }
