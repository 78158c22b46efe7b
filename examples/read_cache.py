"""Teacher logits from plain Python: what a cache holds, some answers, and a loss of them.

CACHE is what `deit-fast precompute` wrote; with --make a small one with made-up logits is written
there first.

    python examples/read_cache.py CACHE
    python examples/read_cache.py --make CACHE
"""

from __future__ import annotations

import argparse

import torch

from deit_fast import LogitCache, LogitCacheWriter
from deit_fast.cache import build_manifest
from deit_fast.config import CodecConfig
from deit_fast.kernels import TopK, distillation_loss


def make_cache(path: str, samples: int = 100, views: int = 3, classes: int = 50) -> None:
    """A cache of made-up logits; the fingerprint names what its answers depend on."""
    manifest = build_manifest(
        CodecConfig(name="topk", k=8, block_records=64),
        num_classes=classes,
        num_samples=samples,
        tau=1.0,
        fingerprint={"teacher.spec": "made up", "view.seed": 0},
    )
    generator = torch.Generator().manual_seed(0)
    with LogitCacheWriter(path, manifest) as writer:
        for view in range(views):
            logits = 3 * torch.randn(samples, classes, generator=generator)
            writer.write(torch.arange(samples), view, logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("--make", action="store_true")
    args = parser.parse_args()
    if args.make:
        make_cache(args.cache)

    cache = LogitCache.open(args.cache)
    samples, codec = cache.manifest["num_samples"], cache.manifest["codec"]
    views = cache.views
    print(f"{samples} samples, {len(views)} views, {cache.codec.record_bytes} bytes per answer")
    print(f"codec {codec}")
    for name, value in cache.manifest["fingerprint"].items():
        print(f"  {name} = {value}")
    if not views:
        raise SystemExit("no view is complete yet")

    # Any mixture of samples and views; a missing or damaged one raises, nothing is filled in.
    sample_ids = torch.arange(min(4, samples))
    view_ids = torch.tensor([views[i % len(views)] for i in range(len(sample_ids))])
    # topk answers at the temperatures that it recorded, the others at any.
    tau = next(iter(codec["temperatures"]), 1.0)
    answers = cache.gather(sample_ids, view_ids, tau=tau)
    for row, (sample, view) in enumerate(zip(sample_ids.tolist(), view_ids.tolist(), strict=True)):
        if isinstance(answers, TopK):
            best = answers.log_probs[row].float().argmax()
            label = answers.ids[row, best].item()
            chance = f", probability {answers.log_probs[row, best].float().exp():.3f} at tau {tau}"
        else:
            label = (answers[row].argmax() if answers.dim() == 2 else answers[row]).item()
            chance = ""
        print(f"sample {sample}, view {view}: class {label}{chance}")

    # The loss takes such an answer as it is.
    classes = cache.codec.num_classes
    logits = torch.zeros(len(sample_ids), classes, requires_grad=True)
    kind = "hard" if codec["name"] == "hard" else "soft"
    labels = torch.zeros(len(sample_ids), dtype=torch.int64)
    loss = distillation_loss(
        logits, logits, labels, answers, kind=kind, alpha=1.0, tau=tau, reduction="batchmean"
    )
    loss.backward()
    print(f"{kind} distillation loss of an untrained student: {loss.item():.3f}")


if __name__ == "__main__":
    main()
