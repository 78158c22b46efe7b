"""Statistics of per-image values: spread, calibration, disagreement, effect of temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.errors import InputError

BINS = 15  # of the reliability curve, as in Guo et al. 2017 (arXiv 1706.04599)
TEMPERATURES = tuple(float(t) for t in range(1, 11))
TOP_K = (1, 5, 10, 16)  # 10 and 16: what published caches and ours keep
SAMPLE_CLASSES = 5  # most probable classes of a single image


def spread(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (of the population), minimum and maximum."""
    values = values.double()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }


def calibration(confidence: Tensor, right: Tensor) -> dict[str, Any]:
    """Expected calibration error and the reliability curve behind it.

    ECE = sum over bins of (images in the bin / all) * |accuracy - mean confidence| in the bin; bins
    are equally wide, (low, high] as in Guo et al. 2017.

    Args:
        confidence: probability of the decision, in [0, 1], [N].
        right: whether the decision is the label, bool [N].

    Returns:
        `ece`; `bins`: those with images, each `low`, `high`, `count`, `confidence`, `accuracy`.
    """
    confidence = confidence.double()
    index = (torch.ceil(confidence * BINS).long() - 1).clamp(0, BINS - 1)
    count = torch.bincount(index, minlength=BINS)
    confident = torch.bincount(index, weights=confidence, minlength=BINS)
    hits = torch.bincount(index, weights=right.double(), minlength=BINS)
    error = (hits - confident).abs().sum().item() / len(confidence)
    rows = [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "count": total,
            "confidence": confident[number].item() / total,
            "accuracy": hits[number].item() / total,
        }
        for number, total in enumerate(count.tolist())
        if total
    ]
    return {"ece": error, "bins": rows}


def disagreement(decisions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Share of images on which two classifiers decide differently, for each pair.

    Returns:
        `names`, and `shares`: one row per name, symmetric (DeiT, table 4).
    """
    rows = decisions.values()
    shares = [[(one != two).double().mean().item() for two in rows] for one in rows]
    return {"names": list(decisions), "shares": shares}


def kept_classes(classes: int) -> tuple[int, ...]:
    """The k of TOP_K below the number of classes; the mass of all classes is always 1."""
    return tuple(k for k in TOP_K if k < classes)


def soften(logits: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> Tensor:
    """softmax(logits / T) for each temperature: the distributions that distillation matches.

    Args:
        logits: [..., C].
        temperatures: positive numbers.

    Returns:
        float64 [T, ..., C]; the last axis sums to 1.

    Raises:
        InputError: a temperature is not positive, or not finite.
    """
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise InputError(f"a temperature must be positive and finite, not {temperature}")
    scaled = torch.stack([logits.double() / temperature for temperature in temperatures])
    return scaled.softmax(-1)


def softening(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and top-k mass of softmax(logits / T) for the TEMPERATURES.

    Args:
        logits: [B, C].

    Returns:
        Entropy in nats [B, T], at most log C; total probability of the k most probable classes
        [B, T, K] for the k of ``kept_classes(C)``.
    """
    last = [k - 1 for k in kept_classes(logits.shape[1])]
    ordered = logits.float().sort(dim=1, descending=True).values
    entropies, masses = [], []
    for temperature in TEMPERATURES:
        logs = torch.log_softmax(ordered / temperature, dim=1)
        probs = logs.exp()
        entropies.append(-(probs * logs).sum(1))
        masses.append(probs.cumsum(1)[:, last])
    return torch.stack(entropies, 1), torch.stack(masses, 1)


def temperature_table(entropy: Tensor, mass: Tensor, classes: int) -> list[dict[str, Any]]:
    """Means over images of the results of ``softening``, a row per temperature; `mass` by k."""
    entropies, masses = entropy.double().mean(0).tolist(), mass.double().mean(0).tolist()
    names = [str(k) for k in kept_classes(classes)]
    return [
        {
            "temperature": temperature,
            "entropy": mean,
            "uniform_share": mean / math.log(classes) if classes > 1 else 0.0,
            "mass": dict(zip(names, row, strict=True)),
        }
        for temperature, mean, row in zip(TEMPERATURES, entropies, masses, strict=True)
    ]


def soften_sample(logits: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """Probabilities of one image, logits [C], at each temperature.

    Returns:
        Rows of `temperature`, `entropy` (nats), `classes`: the most probable ones with `name` and
        `probability`.
    """
    entropy, _ = softening(logits[None])
    best = logits.argsort(descending=True, stable=True)[:SAMPLE_CLASSES].tolist()
    rows = []
    each = zip(TEMPERATURES, entropy[0].tolist(), soften(logits), strict=True)
    for temperature, value, probs in each:
        shown = [{"name": classes[label], "probability": probs[label].item()} for label in best]
        rows.append({"temperature": temperature, "entropy": value, "classes": shown})
    return rows
