"""One training step: forward, loss, backward, update, moving average. Reads nothing back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deit_fast.config import InputError, RunConfig
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewBatch
from deit_fast.kernels import distillation_loss
from deit_fast.models.fuse import patch_side, set_batch_part
from deit_fast.models.shadow import Shadows
from deit_fast.models.teachers import has_bf16
from deit_fast.train.compiling import compile_blocks, raise_recompile_limit, resolve_compile
from deit_fast.train.guard import Guard, gradient_norms
from deit_fast.train.optim import set_learning_rate, skips_on_device
from deit_fast.train.teaching import Teaching
from deit_fast.world import World

PHASES = ("ingest", "teacher", "forward", "loss", "backward", "optimizer")


def phase(name: str) -> Any:
    """A named part of the step, for a profiler; costs a microsecond where none runs."""
    return torch.profiler.record_function(f"step: {name}")


class TrainStep:
    """Applies one batch to the model.

    The numbers it returns, zero-dimensional tensors, stay on the device, so a step waits for
    nothing; the loop reads them when it logs. The draws of stochastic depth follow from seed and
    step: a resumed run needs no generator's state. A fused model draws for the whole batch, so that
    neither the number of ranks nor of parts changes who is dropped; others draw by rank and part.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        teaching: Teaching,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.config, self.model, self.teaching = config, model, teaching
        self.optimizer, self.ema, self.device = optimizer, ema, device
        self.world = world or World()
        self.bf16 = has_bf16(device)
        self.guard = Guard(self.world, device, model)
        self.forward = parallel(config, model, device, self.world)
        # Autocast would round the images and the weights on their way into the products: ingest
        # writes rounded rows of patches, and the weights are rounded for all layers at once.
        rounds = self.bf16 and device.type == "cuda"
        self.patch = patch_side(model) if rounds and not teaching.reads_images else None
        self.shadows = Shadows(model, torch.bfloat16) if rounds else None

    def __call__(
        self, batch: ViewBatch, step: int, lr: float, is_told_to_stop: Callable[[], bool] = bool
    ) -> dict[str, torch.Tensor]:
        """Returns loss, base_loss and distill_loss, means over the ranks, and grad_norm.

        Args:
            batch: this rank's share of the step's views.
            step: position in the order.
            lr: learning rate of this step.
            is_told_to_stop: whether this process was told to leave; asked as late as can be.
        """
        self.model.zero_grad(set_to_none=True)
        self.teaching.at(step)
        if self.shadows is not None:
            self.shadows.refresh()
        numbers: dict[str, torch.Tensor] = {}
        parts = self.config.accumulate
        size = len(batch) // parts
        for part in range(parts):
            piece = batch if parts == 1 else batch.part(part * size, (part + 1) * size)
            self._seed(step, (self.world.rank * parts + part) * size)
            forward: Any = self.forward
            last = part == parts - 1
            is_alone = last or not isinstance(forward, DistributedDataParallel)
            with nullcontext() if is_alone else forward.no_sync():
                for name, value in self._backward(piece).items():
                    numbers[name] = numbers[name] + value if part else value

        parameters, norms = gradient_norms(self.model)
        total_norm = torch.linalg.vector_norm(norms)
        stop = is_told_to_stop()
        found_inf, numbers = self.guard.judge(step, numbers, norms, total_norm, stop)
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_grad, total_norm)
        set_learning_rate(self.optimizer, lr)
        with phase("optimizer"):
            self._update(found_inf)
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        return numbers | {"grad_norm": total_norm}

    def _update(self, found_inf: torch.Tensor) -> None:
        """The optimiser's step, which a loss or gradient that is not finite must not reach."""
        optimizer: Any = self.optimizer
        if skips_on_device(optimizer):
            optimizer.found_inf = found_inf
            optimizer.step()
        elif found_inf.item() == 0:  # LAMB and apex know no such flag: one wait for the device
            optimizer.step()

    def _seed(self, step: int, offset: int) -> None:
        """Draws of the forward whose first sample stands at ``offset`` of the whole batch."""
        fused = set_batch_part(self.model, offset, self.config.batch_size)
        words = (self.config.seed, step) if fused else (self.config.seed, step, offset)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def _backward(self, batch: ViewBatch) -> dict[str, torch.Tensor]:
        """Gradients of one part, added up; its share of the losses."""
        with phase("ingest"):
            dtype = torch.float32 if self.patch is None else torch.bfloat16
            images = ingest_batch(batch, self.config.view, dtype, self.patch)
        with phase("teacher"):
            answer = self.teaching(batch, images)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        shadows = nullcontext() if self.shadows is None else self.shadows.current()
        with phase("forward"), autocast, shadows:
            outputs = self.forward(images)
        self.teaching.join()
        with phase("loss"):
            total, numbers = self._loss(outputs, batch, answer)
        share = 1 / self.config.accumulate
        with phase("backward"):
            (total if share == 1 else total * share).backward()
        return {name: value.detach() * share for name, value in numbers.items()}

    def _loss(
        self, outputs: Any, batch: ViewBatch, answer: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss to differentiate, and all three numbers for the log."""
        # A model with one head is distilled through it (DeiT, table 3: "hard, no token").
        class_logits, distill_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.config.loss
        total, base, distill = distillation_loss(
            class_logits,
            distill_logits,
            batch.target,
            answer,
            kind=loss.kind,
            alpha=loss.alpha,
            tau=loss.tau,
            smoothing=loss.smoothing,
            base=loss.base,
            reduction=loss.reduction,
            return_parts=True,
        )
        if isinstance(answer, torch.Tensor) and answer.is_floating_point():
            # A decision hides it: the largest of logits that are not finite is some class.
            total = torch.where(torch.isfinite(answer).all(), total, float("nan"))
        return total, {"loss": total, "base_loss": base, "distill_loss": distill}


def parallel(config: RunConfig, model: nn.Module, device: torch.device, world: World) -> nn.Module:
    """What a step calls: the model, compiled as configured, its gradients averaged over ranks.

    Raises:
        InputError: compile=blocks for a model without blocks; cuda_graphs without a CUDA device, or
            where `auto` compiles nothing.
    """
    forward: Any = model
    mode = resolve_compile(config, device, model)
    if config.cuda_graphs and device.type != "cuda":
        raise InputError(f"cuda_graphs needs a CUDA device, and the run is on {device.type}")
    if config.cuda_graphs and mode == "none":
        raise InputError(
            f"cuda_graphs needs a compiled model, and compile=auto does not compile "
            f"{type(model).__name__} here: choose --compile model"
        )
    if mode != "none":
        # DDP's own splitting would cut each graph at its buckets. Blocks are graphs of their own,
        # and the exchange of one block's gradients overlaps the backward of those below it; of a
        # whole model (compile=model) all gradients come at the end, and nothing overlaps.
        torch._dynamo.config.optimize_ddp = False
        options: dict[str, Any] = {"mode": "reduce-overhead" if config.cuda_graphs else None}
        if mode == "model":
            raise_recompile_limit()
            forward = torch.compile(model, dynamic=False, **options)
        else:
            compile_blocks(model, **options)
    if world.size == 1:
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
