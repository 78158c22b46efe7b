"""Read a teacher cache in plain Python: its content, some logits, and a loss from them.

`deit-fast precompute` writes such a cache; --make first writes a small one with random logits.

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
    """Write a cache of random logits; the fingerprint names everything that they depend on."""
    manifest = build_manifest(
        CodecConfig(name="topk", k=8),
        num_classes=classes,
        num_samples=samples,
        tau=1.0,
        fingerprint={"teacher.spec": "random", "view.seed": 0},
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
    print(f"{samples} samples, {len(views)} views, {cache.codec.record_bytes} bytes per view")
    print(f"codec {codec}")
    for name, value in cache.manifest["fingerprint"].items():
        print(f"  {name} = {value}")
    if not views:
        raise SystemExit("no view is complete yet")

    # Any combination of samples and views. A missing or damaged record raises an error.
    sample_ids = torch.arange(min(4, samples))
    view_ids = torch.tensor([views[i % len(views)] for i in range(len(sample_ids))])
    # The codec topk returns logits at the temperatures that it recorded, the others at any.
    tau = next(iter(codec["temperatures"]), 1.0)
    records = cache.gather(sample_ids, view_ids, tau=tau)
    for row, (sample, view) in enumerate(zip(sample_ids.tolist(), view_ids.tolist(), strict=True)):
        if isinstance(records, TopK):
            best = records.log_probs[row].float().argmax()
            label = records.ids[row, best].item()
            chance = f", probability {records.log_probs[row, best].float().exp():.3f} at tau {tau}"
        else:
            label = (records[row].argmax() if records.dim() == 2 else records[row]).item()
            chance = ""
        print(f"sample {sample}, view {view}: class {label}{chance}")

    # The loss accepts these records directly.
    classes = cache.codec.num_classes
    logits = torch.zeros(len(sample_ids), classes, requires_grad=True)
    kind = "hard" if codec["name"] == "hard" else "soft"
    labels = torch.zeros(len(sample_ids), dtype=torch.int64)
    loss = distillation_loss(
        logits, logits, labels, records, kind=kind, alpha=1.0, tau=tau, reduction="batchmean"
    )
    loss.backward()
    print(f"{kind} distillation loss of an untrained student: {loss.item():.3f}")


if __name__ == "__main__":
    main()
