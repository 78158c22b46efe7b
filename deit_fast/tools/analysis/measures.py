"""Figures over per-image values: spread, calibration, disagreement, softening."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BINS = 15  # of the reliability curve, as Guo et al. 2017 (arXiv 1706.04599)
TEMPERATURES = tuple(float(t) for t in range(1, 11))
TOP_K = (1, 5, 10, 16)  # 10 and 16: what published caches and ours keep


def spread(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation over all of them (not a sample's), minimum and maximum."""
    values = values.double()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error and the reliability curve behind it.

    ECE = sum over bins of (images in the bin / all) * |accuracy - mean confidence| there; bins are
    equally wide, (low, high] as in Guo et al. 2017.

    Args:
        confidence: probability of the decision, in [0, 1], [N].
        right: whether the decision is the label, bool [N].

    Returns:
        `ece`; `bins`: those with images, each `low`, `high`, `count`, `confidence`, `accuracy`.
    """
    confidence = confidence.double()
    place = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    confident = torch.bincount(place, weights=confidence, minlength=bins)
    hits = torch.bincount(place, weights=right.double(), minlength=bins)
    error = (hits - confident).abs().sum().item() / len(confidence)
    rows = [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "count": total,
            "confidence": confident[number].item() / total,
            "accuracy": hits[number].item() / total,
        }
        for number, total in enumerate(count.tolist())
        if total
    ]
    return {"ece": error, "bins": rows}


def disagreement(decisions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Share of images on which two classifiers decide differently, each with each.

    Returns:
        `names`, and `shares`: one row per name, symmetric (DeiT, table 4).
    """
    names = list(decisions)
    shares = [
        [(decisions[one] != decisions[two]).double().mean().item() for two in names]
        for one in names
    ]
    return {"names": names, "shares": shares}


def kept_classes(classes: int) -> tuple[int, ...]:
    """The k of TOP_K that leave a class out; k = C holds all mass at every temperature."""
    return tuple(k for k in TOP_K if k < classes)


def soften(logits: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> tuple[Tensor, Tensor]:
    """Entropy and top-k mass of softmax(logits / T).

    Args:
        logits: [B, C].

    Returns:
        Entropy in nats [B, T], at most log C; mass of the k likeliest classes [B, T, K] for the k
        of ``kept_classes(C)``.
    """
    ks = kept_classes(logits.shape[1])
    ordered = logits.float().sort(dim=1, descending=True).values
    entropies, masses = [], []
    for temperature in temperatures:
        logs = torch.log_softmax(ordered / temperature, dim=1)
        mass = logs.exp()
        entropies.append(-(mass * logs).sum(1))
        running = mass.cumsum(1)
        masses.append(running[:, [k - 1 for k in ks]])
    return torch.stack(entropies, 1), torch.stack(masses, 1)


def temperature_table(entropy: Tensor, mass: Tensor, classes: int) -> list[dict[str, Any]]:
    """Means over images of ``soften``'s answer, a row per temperature; `mass` by k."""
    ks = kept_classes(classes)
    return [
        {
            "temperature": temperature,
            "entropy": entropy[:, row].double().mean().item(),
            "uniform_share": entropy[:, row].double().mean().item() / math.log(classes)
            if classes > 1
            else 0.0,
            "mass": {str(k): mass[:, row, i].double().mean().item() for i, k in enumerate(ks)},
        }
        for row, temperature in enumerate(TEMPERATURES)
    ]
