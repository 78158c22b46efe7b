"""A cache's answers against the teacher's own, given anew: the difference and its bound."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast.cache.codecs import Codec
from deit_fast.kernels import TopK

THRESHOLD = 1e-3  # nats, for arithmetic: other batch sizes, another device


def compare_answers(
    stored: Tensor | TopK,
    logits: Tensor,
    labels: Tensor,
    *,
    codec: Codec,
    tau: float,
    threshold: float = THRESHOLD,
) -> tuple[Tensor, Tensor]:
    """Error of each record and how large it may be, nats, float64 [n] each; all on the host.

    An error may be as large as the codec's own rounding of the new answer, twice, two units in the
    last place of its largest logit, which in bfloat16 is the most, and ``threshold`` more.

    Args:
        stored: what the cache answers.
        logits: the teacher's new answer [n, C], in the dtype that it computed.
        labels: int64 [n], as they were given to the codec.
        tau: temperature.
    """
    exact = torch.log_softmax(logits.double() / tau, 1)
    again = codec.decode(codec.encode(logits, labels), tau)
    rounding = record_errors(again, exact, tau)
    ulp = torch.finfo(logits.dtype).eps * logits.double().abs().amax(1) / tau
    return record_errors(stored, exact, tau), 2 * rounding + 2 * ulp + threshold


def record_errors(answer: Tensor | TopK, exact: Tensor, tau: float) -> Tensor:
    """Largest difference to the exact log-probabilities [n, C] over what a record stores [n].

    Of the log of the mass outside them too, for `topk`; for `hard`, by how much the stored class
    is less probable than the best.
    """
    if isinstance(answer, TopK):
        ids = answer.ids.long()
        inside = (answer.log_probs.double() - exact.gather(1, ids)).abs().amax(1)
        if ids.shape[1] == exact.shape[1]:
            return inside  # nothing is outside
        tail = exact.scatter(1, ids, -torch.inf).logsumexp(1)
        return torch.maximum(inside, (answer.log_tail.double() - tail).abs())
    if answer.dim() == 1:
        return exact.amax(1) - exact.gather(1, answer[:, None])[:, 0]
    return (torch.log_softmax(answer.double() / tau, 1) - exact).abs().amax(1)
