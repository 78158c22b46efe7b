"""One training step: forward, loss, backward, update, moving average. Reads nothing back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_fast.config import RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.ingest import ingest_batch
from deit_fast.kernels import TopK, distillation_loss
from deit_fast.models.fuse import patch_side, set_batch_part
from deit_fast.models.shadow import Shadows
from deit_fast.models.teacher import has_bf16
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.train.compiling import compile_blocks, raise_recompile_limit, resolve_compile
from deit_fast.train.guard import Guard, gradient_norms
from deit_fast.train.optim import Average, clip_gradients, set_learning_rate, skips_on_device
from deit_fast.train.step_graph import Outcome, Part, StepGraph, require_capturable
from deit_fast.train.teacher import RunTeacher

NUMBERS = ("loss", "base_loss", "distill_loss")
PHASES = ("ingest", "teacher", "forward", "loss", "backward", "optimizer")


def phase(name: str) -> Any:
    """A named part of the step, for a profiler; costs a microsecond where none runs."""
    return torch.profiler.record_function(f"step: {name}")


class TrainStep:
    """Applies one batch to the model.

    A step has three parts. ``prepare`` is what the host knows before: position, learning rate,
    generator's seed. ``work`` is what the device computes; it reads nothing back, so a CUDA graph
    may hold all of it. ``finish`` launches what depends on the step's number and starts the copy of
    the guard's flags.

    The numbers it returns, zero-dimensional tensors, stay on the device, so a step waits for
    nothing; the loop reads them when it logs. The draws of stochastic depth follow from seed and
    step: a resumed run needs no generator's state. A fused model draws for the whole batch, so that
    neither the number of ranks nor of parts changes who is dropped; others draw by rank and part.
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
    ) -> None:
        self.config, self.model, self.teacher = config, model, teacher
        self.optimizer, self.device = optimizer, device
        self.group = group or ProcessGroup()
        self.bf16 = has_bf16(device)
        self.guard = Guard(self.group, device, model)
        self.average = Average(ema, model) if ema is not None else None
        self.parameters = list(model.parameters())
        self.stop = torch.zeros((), device=device)  # above 0: this process was told to leave
        self._was_told = False
        self.graph: StepGraph | None = None
        if config.cuda_graphs:
            require_capturable(device, self.group, optimizer)
            self.graph = StepGraph(optimizer, device, self.work)
        self.forward = parallel(config, model, device, self.group)
        # Autocast would round the images and the weights on their way into the products: ingest
        # writes rounded rows of patches, and the weights are rounded for all layers at once.
        rounds = self.bf16 and device.type == "cuda"
        self.patch = patch_side(model) if rounds and not teacher.is_online else None
        self.shadows = Shadows(model, torch.bfloat16) if rounds else None

    def __call__(
        self, batch: ViewBatch, step: int, lr: float, is_told_to_stop: Callable[[], bool] = bool
    ) -> dict[str, Tensor]:
        """Returns loss, base_loss and distill_loss, means over the ranks, and grad_norm.

        Args:
            batch: this rank's share of the step's views.
            step: position in the order.
            lr: learning rate of this step.
            is_told_to_stop: whether this process was told to leave.
        """
        parts = self.prepare(batch, step, lr, is_told_to_stop())
        outcome = self.work(parts) if self.graph is None else self.graph(parts, lr)
        return self.finish(step, outcome)

    def forget(self) -> None:
        """Model and optimiser went back to an earlier state: steps not yet judged do not count."""
        self.guard.forget()
        if self.graph is not None:
            self.graph.drop()

    # -- the three parts of a step ---------------------------------------------------------------

    def prepare(self, batch: ViewBatch, step: int, lr: float, stop: bool) -> list[Part]:
        """All that the host decides; the batch in ``accumulate`` parts."""
        count = self.config.accumulate
        size = len(batch) // count
        parts = []
        for place in range(count):
            piece = batch if count == 1 else batch.part(place * size, (place + 1) * size)
            answer = None
            if not self.teaching.reads_images:
                with phase("teacher"):
                    answer = self.teaching(piece, None)
            parts.append(Part(piece, answer, step, (self.group.rank * count + place) * size))
        set_learning_rate(self.optimizer, lr)
        if stop != self._was_told:
            self.stop.fill_(stop)
            self._was_told = stop
        self._seed(parts[0])
        return parts

    def work(self, parts: list[Part]) -> Outcome:
        """Forward, loss, backward and update, on the device alone. The host decides nothing here:
        it makes the same calls at every step, and reads no number (but for LAMB and apex)."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.shadows is not None:
            self.shadows.refresh()
        sums: list[Tensor] = []
        for place, part in enumerate(parts):
            if place > 0:
                self._seed(part)
            forward: Any = self.forward
            last = place == len(parts) - 1
            is_alone = last or not isinstance(forward, DistributedDataParallel)
            with nullcontext() if is_alone else forward.no_sync():
                losses = self._backward(part, share=1 / len(parts))
            sums = [a + b for a, b in zip(sums, losses, strict=True)] if sums else losses

        updated, norms = gradient_norms(self.parameters)
        total_norm = torch.linalg.vector_norm(norms)
        found_inf, flags, means = self.guard.judge(sums, total_norm, self.stop)
        with phase("optimizer"):
            if self.config.optim.clip_grad is not None:
                clip_gradients(self.optimizer, updated, total_norm, self.config.optim.clip_grad)
            self._update(found_inf)
        return Outcome(flags, means, norms, total_norm)

    def finish(self, step: int, outcome: Outcome) -> dict[str, Tensor]:
        """The moving average, whose weight depends on the step, and the copy of the flags."""
        if self.average is not None:
            self.average.update(step)
        self.guard.watch(step, outcome.flags, outcome.norms)
        numbers = dict(zip(NUMBERS, outcome.means.unbind(), strict=True))
        return numbers | {"grad_norm": outcome.total_norm}

    # -- pieces ----------------------------------------------------------------------------------

    def _update(self, found_inf: Tensor) -> None:
        """The optimiser's step, which a loss or gradient that is not finite must not reach."""
        optimizer: Any = self.optimizer
        if skips_on_device(optimizer):
            optimizer.found_inf = found_inf
            optimizer.step()
        elif found_inf.item() == 0:  # LAMB and apex know no such flag: one wait for the device
            optimizer.step()

    def _seed(self, part: Part) -> None:
        """Start the draws of the part's forward."""
        fused = set_batch_part(self.model, part.offset, self.config.batch_size)
        words = (
            (self.config.seed, part.step) if fused else (self.config.seed, part.step, part.offset)
        )
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def _backward(self, part: Part, share: float) -> list[Tensor]:
        """Gradients of one part, added up; its share of the losses, as NUMBERS."""
        batch, logits = part.batch, part.batch.teacher
        with phase("ingest"):
            dtype = torch.float32 if self.patch is None else torch.bfloat16
            images = ingest_batch(batch, self.config.view, dtype, self.patch)
        if self.teacher.is_online:
            with phase("teacher"):
                logits = self.teacher.forward(images)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        shadows = nullcontext() if self.shadows is None else self.shadows.current()
        with phase("forward"), autocast, shadows:
            outputs = self.forward(images)
        self.teacher.join()
        with phase("loss"):
            total, base, distill = self._loss(outputs, batch, logits)
        with phase("backward"):
            (total if share == 1 else total * share).backward()
        return [value.detach() * share for value in (total, base, distill)]

    def _loss(self, outputs: Any, batch: ViewBatch, logits: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to differentiate, and its two parts."""
        # A model with one head is distilled through it (DeiT, table 3: "hard, no token").
        class_logits, distill_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.config.loss
        if isinstance(logits, TopK):
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
            # A decision hides it: the largest of logits that are not finite is some class.
            total = torch.where(torch.isfinite(logits).all(), total, float("nan"))
        return total, base, distill


def parallel(
    config: RunConfig, model: nn.Module, device: torch.device, group: ProcessGroup
) -> nn.Module:
    """What a step calls: the model, compiled as configured, its gradients averaged over ranks.

    Raises:
        InputError: compile=blocks for a model without blocks.
    """
    forward: Any = model
    mode = resolve_compile(config, device, model)
    if mode != "none":
        # Gradients of a compiled graph come all at its end, so graphs have to be smaller than the
        # model for DDP to exchange some while others are computed. Blocks are graphs of their own;
        # a whole model's graph is cut by torch at the borders of DDP's buckets.
        torch._dynamo.config.optimize_ddp = mode == "model"
        if mode == "model":
            raise_recompile_limit()
            forward = torch.compile(model, dynamic=False)
        else:
            compile_blocks(model)
    if group.world_size == 1:
        return forward  # type: ignore[no-any-return]
    # Buffers follow the first rank's by default; transformers have none and send nothing.
    wrapped = DistributedDataParallel(
        forward,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Without a teacher the distillation head of a student that has one gets no gradient.
        find_unused_parameters=config.loss.kind == "none",
    )
    if config.compress_gradients:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped
