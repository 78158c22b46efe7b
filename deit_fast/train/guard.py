"""What ends a run, agreed between the ranks on the device: numbers that are not finite, signals.

``judge`` finds out before the update whether the step is healthy, as a tensor that the optimiser
takes as ``found_inf``: a step that is not healthy changes no weight. It runs on the device alone,
so that a CUDA graph may hold it. The host learns the result one step later, from a copy that
``watch`` starts and that waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deit_fast.runtime.distributed import ProcessGroup

_NAMED = 3  # parameters in a message


@dataclass(frozen=True)
class Verdict:
    """About one step; the same on every rank."""

    step: int
    bad_ranks: tuple[int, ...]  # whose loss was not finite
    bad_gradient: bool
    stop: bool  # some rank has been signalled

    @property
    def healthy(self) -> bool:
        return not (self.bad_ranks or self.bad_gradient)


class Judgement(NamedTuple):
    """What ``judge`` found, on the device."""

    found_inf: Tensor  # float32 []: 1.0 where the update must not happen, else 0.0
    flags: Tensor  # float32 [ranks + 2]: a loss not finite, by rank; the gradient; stop
    means: Tensor  # float32 [numbers]: over the ranks


@dataclass
class _Pending:
    step: int
    flags: Tensor  # on the host, filled by the time that `ready` is
    ready: torch.cuda.Event | None
    norms: Tensor = field(repr=False)  # on the device, a gradient's norm for each parameter


class Guard:
    """Judges the steps of a model."""

    def __init__(self, group: ProcessGroup, device: torch.device, model: nn.Module) -> None:
        self.group, self.device, self.model = group, device, model
        self._pending: deque[_Pending] = deque()
        self._last_norms: Tensor | None = None

    def judge(self, losses: list[Tensor], total_norm: Tensor, stop: Tensor) -> Judgement:
        """Judge this step, and average the losses, in one all-reduce. The host waits for nothing.

        Args:
            losses: this rank's, float []; the first one decides.
            total_norm: of all gradients after their all-reduce, [].
            stop: float32 [], above 0 where this rank has been signalled.
        """
        size = self.group.world_size
        values = torch.stack([value.float() for value in losses])
        message = torch.zeros(size + 2 + len(values), device=self.device)
        message[self.group.rank] = ~torch.isfinite(values[0])
        message[size] = ~torch.isfinite(total_norm)
        message[size + 1] = stop
        message[size + 2 :] = values / size
        self.group.sum(message)
        flags, means = message[: size + 2], message[size + 2 :]
        return Judgement((flags[: size + 1] > 0).any().float(), flags, means)

    def watch(self, step: int, flags: Tensor, norms: Tensor) -> None:
        """Start the copy of a step's flags to the host.

        Args:
            step: position in the order.
            flags: of ``judge``.
            norms: of ``gradient_norms``; kept until the verdict after this one is read.
        """
        host = torch.empty_like(flags, device="cpu", pin_memory=flags.is_cuda)
        host.copy_(flags, non_blocking=True)
        ready = None
        if flags.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(step, host, ready, norms))

    def read(self, keep: int = 1) -> Verdict | None:
        """The oldest verdict beyond the ``keep`` newest steps, which may be under way."""
        if len(self._pending) <= keep:
            return None
        oldest = self._pending.popleft()
        if oldest.ready is not None:
            oldest.ready.synchronize()
        *ranks, gradient, stop = (value > 0 for value in oldest.flags.tolist())
        self._last_norms = oldest.norms
        bad = tuple(rank for rank, is_bad in enumerate(ranks) if is_bad)
        return Verdict(oldest.step, bad, gradient, stop)

    def forget(self) -> None:
        """Drop the verdicts not yet read, of steps that will be made again."""
        self._pending.clear()

    def explain(self, verdict: Verdict) -> str:
        """One line about the verdict read last: rank, step, parameters."""
        where = ", ".join(map(str, verdict.bad_ranks))
        loss = f"the loss of rank {where} is not finite" if verdict.bad_ranks else ""
        norms = self._last_norms
        assert norms is not None
        # The step after the bad one left gradients of the same parameters.
        names = [name for name, p in self.model.named_parameters() if p.grad is not None]
        bad = [name for name, norm in zip(names, norms.tolist(), strict=True)
               if not abs(norm) < float("inf")]  # fmt: skip
        gradients = ""
        if bad:
            more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            gradients = (
                f"the gradients of {len(bad)} of {len(names)} parameters are not finite: "
                f"{', '.join(bad[:_NAMED])}{more}"
            )
        reasons = "; ".join(part for part in (loss, gradients) if part)
        return f"step {verdict.step + 1}: {reasons or 'the norm of all gradients is not finite'}"


def gradient_norms(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], Tensor]:
    """Parameters that have a gradient, and the norms of those gradients, float32 [P]."""
    found = [p for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([p.grad for p in found if p.grad is not None])
    return found, torch.stack([norm.float() for norm in norms])
