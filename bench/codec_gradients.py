"""How wrong is the gradient that a student gets from each codec's record? Synthetic teachers.

    python -m bench.codec_gradients --out FILE [--views 128] [--repeats 64]

Teacher's and student's logits are normal numbers; a larger scale is a surer teacher. For each view
the gradient of the KL is compared with that of all logits, relative to its norm:

    rms   of one record
    bias  of the mean over ``repeats`` records with other draws, less the variance that remains:
          an estimate within a tenth of rms or so; for codecs without draws it is rms

"importance" draws at one temperature and weights the draws by p(T) / p(drawn), with float16
log-probabilities stored beside the ids: what one set of draws for two temperatures would give, in
as many bytes as two sets.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.record import collect_meta, to_text
from deit_fast.cache import Codec, codec_from_config
from deit_fast.cache.sampled import ViewKeys, draw_tails
from deit_fast.cache.sparse_codecs import SampledCodec
from deit_fast.config import CodecConfig
from deit_fast.kernels.distillation_loss import TopK, distillation_loss

CLASSES, TEMPERATURES, SCALES = (1000, 21841), (1.0, 4.0), (4.0, 2.5, 1.5)
SIZES = {48: (10, (6, 8), 23), 104: (24, (10, 28), 51)}  # bytes: top-k, head and draws, draws alone
TAILS = ("bucket", "uniform", "renorm", "drop")


def gradient(student: Tensor, teacher: Any, tau: float) -> Tensor:
    """Of each view's loss, without factors: p - q, float64 [n, C]."""
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(
        None, leaf, None, teacher, kind="soft", alpha=1.0, tau=tau, reduction="batchmean"
    )
    (found,) = torch.autograd.grad(loss, leaf)
    return found.double() * len(student) / tau


def hard_gradient(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """p less one at the teacher's class: hard labels at a temperature, float64 [n, C]."""
    p = torch.softmax(student.double() / tau, 1)
    return p.scatter_add(1, teacher.argmax(1, keepdim=True), torch.full((len(p), 1), -1.0).double())


def importance(
    teacher: Tensor, k: int, draws: int, tau: float, drawn: float, keys: ViewKeys
) -> Tensor:
    """The target of head and weighted draws, float64 [n, C]."""
    probs = torch.softmax(teacher.double() / tau, 1)
    heads = teacher.topk(k, 1).indices
    (ids,) = draw_tails(teacher, heads.int(), (drawn,), keys.words(draws)).unbind(1)
    proposal = torch.softmax(teacher.double() / drawn, 1).scatter(1, heads, 0.0)
    proposal /= proposal.sum(1, keepdim=True)
    target = torch.zeros_like(probs).scatter(1, heads, probs.gather(1, heads))
    weights = probs.gather(1, ids.long()) / proposal.gather(1, ids.long()) / draws
    return target.scatter_add_(1, ids.long(), weights)


def measure(case: dict[str, Any], views: int, repeats: int) -> list[dict[str, Any]]:
    classes, tau, scale = case["classes"], case["temperature"], case["scale"]
    draw = torch.Generator().manual_seed(classes)
    teacher = scale * torch.randn(views, classes, generator=draw)
    student = 0.7 * teacher + 0.7 * scale * torch.randn(views, classes, generator=draw)
    log_probs = torch.log_softmax(teacher.double() / tau, 1)
    case = case | {
        "entropy": round(float(-(log_probs.exp() * log_probs).sum(1).mean()), 3),
        "top1": round(float(log_probs.amax(1).exp().mean()), 3),
    }
    dense = gradient(student, teacher, tau)
    norm = float(dense.square().sum(1).mean().sqrt())
    rows = []

    def add(codec: str, size: int, found: Any, counts: int = 1) -> None:
        square = mean = torch.zeros(())
        for repeat in range(counts):
            error = found(repeat) - dense
            square, mean = square + error.square().sum(1).mean() / counts, mean + error / counts
        rms = float(square.sqrt())
        left = float(mean.square().sum(1).mean())
        if counts > 1:
            left = max(0.0, (left - rms**2 / counts) / (1 - 1 / counts))
        shown = {"codec": codec, "bytes": size, "rms": rms / norm, "bias": left**0.5 / norm}
        rows.append(case | {name: float(f"{value:.3g}") if isinstance(value, float) else value
                            for name, value in shown.items()})  # fmt: skip

    def keys(repeat: int) -> ViewKeys:
        return ViewKeys(0, np.arange(views), np.full(views, repeat))

    def codec(name: str, **settings: Any) -> Codec:
        return codec_from_config(CodecConfig(name=name, **settings), classes, tau)  # type: ignore

    add("hard", 2, lambda _: hard_gradient(student, teacher, tau))
    for size, (k, (head, draws), alone) in SIZES.items():
        topk = codec("topk", k=k)
        form = topk.decode(topk.encode(teacher), tau)
        assert isinstance(form, TopK) and topk.record_bytes == size
        for tail in TAILS:
            cut = form._replace(tail=tail)
            add(
                f"topk {k} {tail}",
                size,
                lambda _, f=cut: gradient(student, f, tau),
            )
        for own_k, own_draws in ((head, draws), (0, alone)):
            sampled = codec("sampled", k=own_k, draws=own_draws)
            assert isinstance(sampled, SampledCodec) and sampled.record_bytes == size
            add(
                f"sampled {own_k} + {own_draws}", size,
                lambda n, c=sampled: gradient(
                    student, c.decode(c.encode(teacher, keys(n)), tau), tau
                ), repeats,
            )  # fmt: skip
    p = torch.softmax(student.double() / tau, 1)
    for drawn in TEMPERATURES:
        if drawn != tau:

            def weighted(n: int, drawn: float = drawn) -> Tensor:
                target = importance(teacher, 6, 8, tau, drawn, keys(n))
                return p * target.sum(1, keepdim=True) - target

            add(f"importance 6 + 8 drawn at {drawn:g}", 48, weighted, repeats)
    for name in ("dense-int8", "dense-fp8"):
        chosen = codec(name)
        add(
            name,
            chosen.record_bytes,
            lambda _, c=chosen: gradient(student, c.decode(c.encode(teacher), tau), tau),
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    meta = collect_meta("cpu", " ".join(["python -m bench.codec_gradients", *sys.argv[1:]]), None)
    rows: list[dict[str, Any]] = []
    for classes in CLASSES:
        views = options.views if classes < 5000 else max(2, options.views // 16)
        for tau in TEMPERATURES:
            for scale in SCALES:
                case = {"classes": classes, "temperature": tau, "scale": scale, "views": views}
                rows += measure(case | {"repeats": options.repeats}, views, options.repeats)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(to_text({"meta": meta, "rows": rows}))
                for row in rows:
                    if (
                        row["classes"] == classes
                        and row["temperature"] == tau
                        and row["scale"] == scale
                    ):
                        print(row, flush=True)


if __name__ == "__main__":
    main()
