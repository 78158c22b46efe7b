"""The kernels without the engine: each compared with plain PyTorch, in value and in time.

On a GPU the Triton kernels run; on a CPU their PyTorch references, or with TRITON_INTERPRET=1 the
kernels in Triton's interpreter.

    python examples/kernels_alone.py
    python examples/kernels_alone.py --batch 256 --tokens 198
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import add_layer_norm, attention_qkvpacked, bias_gelu, distillation_loss


def milliseconds(function: Callable[[], object], calls: int = 5) -> float:
    """Time of the fastest call, including the work of the device."""
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def compare(name: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        difference = (ours() - plain()).abs().max().item()
        times = f"{milliseconds(ours):.3f} ms, plain PyTorch {milliseconds(plain):.3f} ms"
    print(f"{name:<20} largest difference {difference:.1e}  {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=33)
    args = parser.parse_args()
    batch, tokens, heads, width, classes = args.batch, args.tokens, 6, 64, 1000
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    channels = heads * width

    qkv = torch.randn(batch, tokens, 3, heads, width, device=device)

    def attention() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    compare("attention_qkvpacked", lambda: attention_qkvpacked(qkv), attention)

    residual, branch = torch.randn(2, batch, tokens, channels, device=device)
    weight, bias, gamma = torch.randn(3, channels, device=device)
    compare(
        "add_layer_norm",
        lambda: add_layer_norm(residual, branch, weight, bias, gamma=gamma, eps=1e-6)[1],
        lambda: F.layer_norm(residual + gamma * branch, (channels,), weight, bias, 1e-6),
    )
    compare("bias_gelu", lambda: bias_gelu(residual, bias), lambda: F.gelu(residual + bias))

    student, teacher = torch.randn(2, batch, classes, device=device)
    labels = torch.randint(classes, (batch,), device=device)

    def loss() -> Tensor:
        soft = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True,
                        reduction="batchmean")  # fmt: skip
        return 0.5 * F.cross_entropy(student, labels) + 0.5 * soft

    compare(
        "distillation_loss",
        lambda: distillation_loss(
            student, student, labels, teacher, kind="soft", alpha=0.5, tau=1.0,
            reduction="batchmean",
        ),
        loss,
    )  # fmt: skip


if __name__ == "__main__":
    main()
