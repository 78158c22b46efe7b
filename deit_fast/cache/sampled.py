"""The sampled part of a `sampled` record: its draws, the form that the loss takes, their check.

The arithmetic of the draws is in csrc/tail_draws.cpp. torch is imported where it is needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deit_fast import _C
from deit_fast.views.rng import Purpose, draw_words

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.kernels.distillation_loss import TopK

ABSENT = -65504.0  # log-probability of a class without a draw: its probability is 0 in float64 too


class ViewKeys(NamedTuple):
    """Which views records are of.

    seed: of the views, in [0, 2^64).
    samples, views: integers [n], below 2^32.
    """

    seed: int
    samples: np.ndarray
    views: np.ndarray

    def words(self, draws: int) -> np.ndarray:
        """The uniform words of each view's draws, uint32 [n, draws]."""
        return draw_words(self.seed, self.samples, self.views, draws, Purpose.TAIL)


def draw_tails(
    logits: Tensor, heads: Tensor, temperatures: tuple[float, ...], words: np.ndarray
) -> Tensor:
    """Classes outside each head, drawn with replacement by their probability at each temperature.

    Args:
        logits: finite float32 [n, C] on the host.
        heads: int32 [n, k], k < C; distinct ids.
        words: uint32 [n, draws].

    Returns:
        int32 [n, temperatures, draws], ascending in the last dimension.
    """
    import torch

    logits, heads, words = logits.contiguous(), heads.contiguous(), np.ascontiguousarray(words)
    (count, classes), draws = logits.shape, words.shape[1]
    ids = torch.empty((count, len(temperatures), draws), dtype=torch.int32)
    _C.draw_tails(
        classes, heads.shape[1], draws, [1.0 / tau for tau in temperatures],
        logits.data_ptr(), heads.data_ptr(), words.ctypes.data, count, ids.data_ptr(),
    )  # fmt: skip
    return ids


def sampled_form(head: TopK, draws: Tensor) -> TopK:
    """Head and draws as a TopK of distinct ids; its tail mode is "drop".

    A drawn class has the tail's mass times its share of the draws. The loss takes no id twice, so
    the place of a repeated draw goes to a class that is neither drawn nor in the head, at
    probability 0.

    Args:
        head: ids int32 [n, k], log_probs float32 [n, k], log_tail float32 [n].
        draws: int32 [n, draws], ascending, none in the head; k + draws <= C.
    """
    import torch

    width = head.ids.shape[1] + draws.shape[1]
    repeated = torch.zeros_like(draws, dtype=torch.bool)
    repeated[:, 1:] = draws[:, 1:] == draws[:, :-1]
    counts = torch.searchsorted(draws, draws, right=True) - torch.searchsorted(draws, draws)
    share = counts.float().log() - math.log(draws.shape[1])
    log_probs = torch.where(repeated, ABSENT, share + head.log_tail[:, None])

    # Of the classes below `width` at least as many are unused as draws are repeated.
    used = torch.zeros((len(draws), width + 1), dtype=torch.int8, device=draws.device)
    ids = torch.cat([head.ids, draws], 1)
    used.scatter_(1, ids.clamp(max=width).long(), 1)
    unused = used[:, :width].argsort(dim=1, stable=True)
    nth = (repeated.cumsum(1) - 1).clamp(min=0)
    draws = torch.where(repeated, unused.gather(1, nth).int(), draws)
    return head._replace(
        ids=torch.cat([head.ids, draws], 1),
        log_probs=torch.cat([head.log_probs, log_probs], 1),
        tail="drop",
    )


def draw_errors(form: TopK, k: int, exact: Tensor, words: np.ndarray) -> Tensor:
    """How far the teacher's distribution has moved, if these words chose the draws of a form; nats,
    float64 [n].

    A word u chooses the class whose share of the running sum of probabilities holds it. If no
    log-probability moves by more than e, no running sum moves by more than tanh(e / 2), as its log
    odds move by at most 2 e. So if u is now d outside of its class's share, some log-probability
    has moved by 2 artanh(d) or more.

    Args:
        form: of ``sampled_form``.
        exact: log-probabilities of all classes, float64 [n, C].
        words: uint32 [n, draws], that made the draws.
    """
    import torch

    ids, log_probs = form.ids[:, k:].long(), form.log_probs[:, k:].double()
    draws = words.shape[1]
    counts = (torch.exp(log_probs - form.log_tail.double()[:, None]) * draws).round().long()
    by_id = ids.argsort(1)
    ids, ends = ids.gather(1, by_id), counts.gather(1, by_id).cumsum(1)
    nth = torch.arange(draws).expand(len(ids), -1).contiguous()
    chosen = ids.gather(1, torch.searchsorted(ends, nth, right=True).clamp(max=draws - 1))
    outside = exact.scatter(1, form.ids[:, :k].long(), -torch.inf)
    upper = torch.softmax(outside, 1).cumsum(1)
    lower = torch.nn.functional.pad(upper, (1, -1))
    word = torch.from_numpy(np.sort(words, axis=1).astype(np.float64)) / 2**32
    distance = torch.maximum(lower.gather(1, chosen) - word, word - upper.gather(1, chosen))
    return 2 * torch.atanh(distance.clamp(min=0)).amax(1)
