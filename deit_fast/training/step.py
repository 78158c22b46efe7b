"""One training step: forward, loss, backward, finite check, update, moving average.

The step reads nothing back from the device. The loop learns one step later whether the numbers were
finite, from a copy that runs beside the next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.features.student import FeatureStudent
from deit_fast.kernels.distillation_loss import TopK, distillation_loss
from deit_fast.models.fuse import patch_side, set_batch_part
from deit_fast.models.shadow import Shadows
from deit_fast.runtime.distributed import ProcessGroup, has_bf16
from deit_fast.training.compiling import compile_blocks, raise_recompile_limit, resolve_compile
from deit_fast.training.feature_terms import FeatureTerms
from deit_fast.training.optim import Average, clip_gradients, set_learning_rate, skips_on_device
from deit_fast.training.step_graph import Part, StepGraph, StepOutput, require_capturable
from deit_fast.training.step_inputs import StepInputs

if TYPE_CHECKING:
    from deit_fast.features.student import FeatureHeads
    from deit_fast.training.teacher import RunTeacher

NUMBERS = ("loss", "base_loss", "distill_loss", "agreement")
PHASES = ("ingest", "teacher", "forward", "loss", "backward", "optimizer")
_NAMED = 3  # parameters in a message


def phase(name: str) -> Any:
    """A named part of the step for a profiler; costs a microsecond when none runs."""
    return torch.profiler.record_function(f"step: {name}")


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


class TrainStep:
    """Applies one batch to the model.

    A step has three parts. ``prepare`` runs on the host: position, learning rate, the generator's
    seed. ``work`` runs on the device and reads nothing back, so a CUDA graph can contain all of it.
    ``finish`` launches what depends on the step's number and starts the copy of the check's flags.

    The returned numbers, zero-dimensional tensors, stay on the device; the loop reads them when it
    logs. The draws of stochastic depth and patch dropout depend on seed and step, so a resumed run
    needs no state of a generator. A fused model draws for the whole batch, so neither the number of
    ranks nor of parts changes what is dropped; other models draw for each rank and part.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        teacher: RunTeacher,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
        device: torch.device,
        group: ProcessGroup | None = None,
        heads: FeatureHeads | None = None,
    ) -> None:
        self.config, self.model, self.teacher = config, model, teacher
        self.optimizer, self.device = optimizer, device
        self.group = group or ProcessGroup()
        self.inputs = StepInputs()
        self.bf16 = has_bf16(device)
        self.terms = FeatureTerms(config, teacher.terms, device)
        trained = model if heads is None else FeatureStudent(model, heads)
        self.numbers = (*NUMBERS, *teacher.logit_names, *self.terms.names)
        self.finite = FiniteCheck(self.group, device, trained)
        self.average = Average(ema, model) if ema is not None else None
        self.parameters = list(trained.parameters())
        self.stop = torch.zeros((), device=device)  # 1.0 where this process was signalled
        self._stop_on_host = False
        self.graph: StepGraph | None = None
        if config.cuda_graphs:
            require_capturable(device, self.group, optimizer)
            self.graph = StepGraph(optimizer, device, self.work)
        self.forward = parallel(config, model, device, self.group, trained)
        # Autocast would cast images and weights in each product. Instead ingest writes patches in
        # bf16, and the weights of all layers are cast at once.
        casts = self.bf16 and device.type == "cuda"
        self.patch = patch_side(model) if casts and not teacher.is_online else None
        self.shadows = Shadows(model, torch.bfloat16) if casts else None

    def __call__(
        self,
        batch: ViewBatch,
        step: int,
        lr: float,
        stop: bool = False,
        inputs: StepInputs | None = None,
    ) -> dict[str, Tensor]:
        """Returns the losses, means over the ranks, and grad_norm; with a teacher's logits also
        agreement, the share of the views to which student and teacher give the same class.

        Args:
            batch: this rank's share of the step's views.
            step: position in the order.
            lr: learning rate of this step.
            stop: whether this process was signalled to stop; all ranks learn it.
            inputs: of the batch, where other students take it too.
        """
        self.inputs = inputs or StepInputs()
        parts = self.prepare(batch, step, lr, stop)
        output = self.work(parts) if self.graph is None else self.graph(parts, lr)
        return self.finish(step, output)

    def reset(self) -> None:
        """Forget the steps not polled yet; call it when model and optimiser were restored."""
        self.finite.reset()
        if self.graph is not None:
            self.graph.reset()

    def prepare(self, batch: ViewBatch, step: int, lr: float, stop: bool) -> list[Part]:
        """Everything that the host decides; returns the batch in ``accumulate`` parts."""
        count = self.config.accumulate
        size = len(batch) // count
        parts = []
        for index in range(count):
            piece = batch if count == 1 else batch.part(index * size, (index + 1) * size)
            self.teacher.check(piece, step)
            parts.append(Part(piece, step, (self.group.rank * count + index) * size))
        set_learning_rate(self.optimizer, lr)
        if stop != self._stop_on_host:
            self.stop.fill_(stop)
            self._stop_on_host = stop
        self._seed(parts[0])
        return parts

    def work(self, parts: list[Part]) -> StepOutput:
        """Forward, loss, backward and update, on the device alone.

        The host makes the same calls at every step and reads no number, but for optimisers
        without ``found_inf``: LAMB, Muon and apex.
        """
        for parameter in self.parameters:
            parameter.grad = None
        if self.shadows is not None:
            self.shadows.refresh()
        sums: list[Tensor] = []
        for index, part in enumerate(parts):
            if index > 0:
                self._seed(part)
            forward: Any = self.forward
            is_last = index == len(parts) - 1
            exchanges = is_last or not isinstance(forward, DistributedDataParallel)
            with nullcontext() if exchanges else forward.no_sync():
                losses = self._backward(part, share=1 / len(parts))
            sums = [a + b for a, b in zip(sums, losses, strict=True)] if sums else losses

        updated, norms = gradient_norms(self.parameters)
        total_norm = torch.linalg.vector_norm(norms)
        found_inf, flags, means = self.finite.check(sums, total_norm, self.stop)
        with phase("optimizer"):
            if self.config.optim.clip_grad is not None:
                clip_gradients(self.optimizer, updated, total_norm, self.config.optim.clip_grad)
            self._update(found_inf)
        return StepOutput(flags, means, norms, total_norm)

    def finish(self, step: int, output: StepOutput) -> dict[str, Tensor]:
        """The moving average, whose weight depends on the step, and the copy of the flags."""
        if self.average is not None:
            self.average.update(step)
        self.finite.record(step, output.flags, output.norms)
        numbers = dict(zip(self.numbers, output.means.unbind(), strict=True))
        if self.config.loss.kind == "none":
            del numbers["agreement"]
        return numbers | {"grad_norm": output.total_norm}

    def _update(self, found_inf: Tensor) -> None:
        """The optimiser's step, skipped where a loss or gradient is not finite.

        LAMB, Muon and apex have no ``found_inf``: the host reads it.
        """
        optimizer: Any = self.optimizer
        if skips_on_device(optimizer):
            optimizer.found_inf = found_inf
            optimizer.step()
        elif found_inf.item() == 0:  # this waits for the device
            optimizer.step()

    def _seed(self, part: Part) -> None:
        """Seed the generator for the draws of the part's forward."""
        batch_size = len(part.batch) * self.config.accumulate * self.group.world_size
        fused = set_batch_part(self.model, part.offset, batch_size)
        words = (
            (self.config.seed, part.step) if fused else (self.config.seed, part.step, part.offset)
        )
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def _backward(self, part: Part, share: float) -> list[Tensor]:
        """Accumulate the gradients of one part; returns its share of the numbers."""
        batch = part.batch
        logits, features = batch.logits, batch.features
        with phase("ingest"):
            dtype = torch.float32 if self.patch is None else torch.bfloat16
            images = self.inputs.images(part, self.config.view, dtype, self.patch)
        if self.teacher.is_online:
            with phase("teacher"):
                logits, features = self.inputs.teacher_outputs(part, self.teacher, images)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        shadows = nullcontext() if self.shadows is None else self.shadows.current()
        with phase("forward"), autocast, shadows:
            outputs = self.forward(images)
        self.teacher.join()
        with phase("loss"):
            predictions: list[Tensor] = []
            if self.terms.terms:
                outputs, predictions = outputs
            numbers = self._logit_losses(outputs, batch, logits)
            if predictions:
                total, terms = self.terms(predictions, features, batch, part.step)
                numbers = [numbers[0] + total, *numbers[1:], *terms]
        with phase("backward"):
            (numbers[0] if share == 1 else numbers[0] * share).backward()
        return [value.detach() * share for value in numbers]

    def _logit_losses(self, outputs: Any, batch: ViewBatch, logits: Sequence[Any]) -> list[Tensor]:
        """The numbers without the terms of features; the first is the loss to differentiate.

        With several teachers the loss is the weighted mean of the losses with each of them; their
        distillation losses follow.
        """
        teachers = list(logits) if self.config.loss.kind != "none" else [None]
        each = [self._loss(outputs, batch, teacher) for teacher in teachers]
        if len(each) == 1:
            return list(each[0])
        shares = self.config.loss.shares(len(each))
        mean = [
            sum(share * numbers[index] for share, numbers in zip(shares, each, strict=True))
            for index in range(len(NUMBERS))
        ]
        return [*mean, *(numbers[2] for numbers in each)]  # type: ignore[list-item]

    def _loss(self, outputs: Any, batch: ViewBatch, logits: Any) -> tuple[Tensor, ...]:
        """The NUMBERS with one teacher, the first of which is the loss to differentiate."""
        # A model with one head is distilled through it (DeiT, table 3: "hard, no token").
        class_logits, distill_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.config.loss
        if isinstance(logits, TopK) and logits.tail != "drop":  # a sample stays without a tail
            logits = logits._replace(tail=loss.tail)
        total, base, distill = distillation_loss(
            class_logits,
            distill_logits,
            batch.target,
            logits,
            kind=loss.kind,
            alpha=loss.alpha,
            tau=loss.tau,
            smoothing=loss.smoothing,
            base=loss.base,
            reduction=loss.reduction,
            return_parts=True,
        )
        if isinstance(logits, Tensor) and logits.is_floating_point():
            # Hard distillation would hide them: the argmax of logits with NaN is some class.
            total = torch.where(torch.isfinite(logits).all(), total, float("nan"))
        heads = {"class": [class_logits], "distillation": [distill_logits]}
        scored = heads.get(loss.trained_head, [class_logits, distill_logits])
        return total, base, distill, _agreement(scored, logits)


@torch.no_grad()
def _agreement(heads: list[Tensor], teacher: Any) -> Tensor:
    """Share of the views to which the mean of the heads gives the teacher's class, float32 [].

    0 without a teacher.

    Args:
        heads: logits [B, C].
        teacher: as of ``distillation_loss``.
    """
    if teacher is None:
        return torch.zeros((), device=heads[0].device)
    if isinstance(teacher, TopK):
        first = teacher.log_probs.argmax(1, keepdim=True)
        theirs = teacher.ids.long().gather(1, first)[:, 0]
    else:
        theirs = teacher.argmax(1) if teacher.is_floating_point() else teacher
    total = heads[0] if len(heads) == 1 else heads[0] + heads[1]
    return (total.argmax(1) == theirs).float().mean()


def parallel(
    config: RunConfig,
    model: nn.Module,
    device: torch.device,
    group: ProcessGroup,
    trained: nn.Module | None = None,
) -> nn.Module:
    """The module that a step calls: the model, compiled as configured, wrapped for several ranks.

    Args:
        trained: the model with what is trained beside it; None: the model.

    Raises:
        InputError: compile=blocks for a model without blocks.
    """
    forward: Any = model if trained is None else trained
    mode = resolve_compile(config, device, model)
    if mode != "none":
        # A compiled graph produces all its gradients at its end. DDP overlaps communication with
        # the backward only between graphs: between blocks, or, for a whole model, where torch
        # splits its graph at the borders of DDP's buckets.
        torch._dynamo.config.optimize_ddp = mode == "model"
        if mode == "model":
            raise_recompile_limit()
            forward = torch.compile(forward, dynamic=False)
        else:
            compile_blocks(model)
    if group.world_size == 1:
        return forward  # type: ignore[no-any-return]
    # By default buffers are copied from the first rank; transformers have none.
    return DistributedDataParallel(
        forward,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Without a teacher the distillation head gets no gradient.
        find_unused_parameters=config.loss.kind == "none",
    )


# ---------------------------------------------------------------------------------------------
# The finite check
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckResult:
    """The result for one step, on the host; the same on every rank."""

    step: int
    bad_ranks: tuple[int, ...]  # whose loss was not finite
    bad_gradient: bool
    stop: bool  # some rank was signalled
    norms: Tensor = field(repr=False, compare=False)  # on the device, as of ``gradient_norms``

    @property
    def is_finite(self) -> bool:
        return not (self.bad_ranks or self.bad_gradient)


class _Pending(NamedTuple):
    step: int
    flags: Tensor  # on the host, complete when `ready` is
    ready: torch.cuda.Event | None
    norms: Tensor


class FiniteCheck:
    """Finds steps whose loss or gradient is not finite, and agrees on stop requests of any rank.

    ``check`` runs on the device before the update, so a CUDA graph can contain it. The optimiser
    takes its ``found_inf``: a step that is not finite changes no weight. ``record`` starts a copy
    of the flags that nothing waits for, and ``poll`` reads it one step later.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, model: nn.Module) -> None:
        self.group, self.device, self.model = group, device, model
        self._pending: deque[_Pending] = deque()

    def check(self, losses: list[Tensor], total_norm: Tensor, stop: Tensor) -> tuple[Tensor, ...]:
        """Check this step and average the losses, in one all-reduce.

        Args:
            losses: this rank's, float []; the first one must be finite.
            total_norm: of all gradients after their all-reduce, [].
            stop: float32 [], above 0 where this rank was signalled.

        Returns:
            found_inf: float32 [], 1.0 where the update must be skipped, else 0.0.
            flags: float32 [ranks + 2]: loss not finite, for each rank; gradient not finite; stop.
            means: float32 [losses], over the ranks.
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
        return (flags[: size + 1] > 0).any().float(), flags, means

    def record(self, step: int, flags: Tensor, norms: Tensor) -> None:
        """Start the copy of a step's flags to the host.

        Args:
            step: position in the order.
            flags: of ``check``.
            norms: of ``gradient_norms``.
        """
        host = torch.empty_like(flags, device="cpu", pin_memory=flags.is_cuda)
        host.copy_(flags, non_blocking=True)
        ready = None
        if flags.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(step, host, ready, norms))

    def poll(self, keep: int = 1) -> CheckResult | None:
        """The oldest result, without the ``keep`` newest steps, which may still be running."""
        if len(self._pending) <= keep:
            return None
        step, flags, ready, norms = self._pending.popleft()
        if ready is not None:
            ready.synchronize()
        *ranks, gradient, stop = (value > 0 for value in flags.tolist())
        bad = tuple(rank for rank, is_bad in enumerate(ranks) if is_bad)
        return CheckResult(step, bad, gradient, stop, norms)

    def reset(self) -> None:
        """Drop the results not polled yet, of steps that will be repeated."""
        self._pending.clear()

    def describe(self, result: CheckResult) -> str:
        """One line about a result that is not finite: step, ranks, parameters."""
        ranks = ", ".join(map(str, result.bad_ranks))
        reasons = [f"the loss of rank {ranks} is not finite"] if result.bad_ranks else []
        # A later step may have replaced the gradients, but for the same parameters.
        names = [name for name, p in self.model.named_parameters() if p.grad is not None]
        bad = [name for name, norm in zip(names, result.norms.tolist(), strict=True)
               if not abs(norm) < float("inf")]  # fmt: skip
        if bad:
            more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            reasons.append(
                f"the gradients of {len(bad)} of {len(names)} parameters are not finite: "
                f"{', '.join(bad[:_NAMED])}{more}"
            )
        text = "; ".join(reasons) or "the norm of all gradients is not finite"
        return f"step {result.step + 1}: {text}"


def gradient_norms(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], Tensor]:
    """Parameters that have a gradient, and the norms of their gradients, float32 [P]."""
    found = [p for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([p.grad for p in found if p.grad is not None])
    return found, torch.stack([norm.float() for norm in norms])
