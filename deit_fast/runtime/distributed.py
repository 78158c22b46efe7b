"""The processes of one run: rank, world size, device, and collectives over small values.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE, which are read here and nowhere else. Without them a
run is one process and every collective returns its input. CPU processes communicate over Gloo,
processes with a GPU each over NCCL.

torch is imported late, because the command line asks for the rank before it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from deit_fast.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # of a collective; the first one may wait for a compilation


@dataclass(frozen=True)
class ProcessGroup:
    """This process and the number of processes of its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world_size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)

    def maximum(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its elementwise maximum over all processes."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process. All processes must call this together."""
        if self.world_size == 1:
            return flag
        import torch

        value = torch.tensor(float(flag), device=device)
        self.maximum(value)
        return bool(value)

    def gather(self, value: Any) -> list[Any]:
        """A small plain value of every process, ordered by rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, action: Callable[[], T]) -> T:
        """Call ``action`` in every process; return when it has succeeded in all of them.

        Raises:
            Exception: as ``action`` raised it in this process.
            InputError: it failed in another process; names the rank and the reason.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        reason = first_line(failure, 500, not isinstance(failure, InputError)) if failure else ""
        reasons = self.gather(reason)
        if failure is not None:
            raise failure
        if any(reasons):
            rank = next(rank for rank, reason in enumerate(reasons) if reason)
            raise InputError(f"rank {rank} failed: {reasons[rank]}")
        return result

    def require_equal(self, facts: Mapping[str, Any], remedy: str) -> None:
        """All processes must call this together, with the same values.

        Raises:
            InputError: in every process; names what differs, and the value of each rank.
        """
        gathered = self.gather(dict(facts))
        for name in facts:
            ranks: dict[Any, list[int]] = {}
            for rank, found in enumerate(gathered):
                ranks.setdefault(found[name], []).append(rank)
            if len(ranks) > 1:
                values = ", ".join(
                    f"{value} in rank {' '.join(map(str, where))}" for value, where in ranks.items()
                )
                raise InputError(f"the ranks differ in their {name} ({values}): {remedy}")

    def barrier(self) -> None:
        """Return when every process has called this."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()


def read_process_group() -> ProcessGroup:
    """The process group that torchrun's environment variables describe.

    Raises:
        InputError: a variable is no number or out of range; names it.
    """
    world_size = _variable("WORLD_SIZE", 1, 2**20, default="1")
    rank = _variable("RANK", 0, world_size - 1, default="0")
    return ProcessGroup(rank, world_size, _variable("LOCAL_RANK", 0, 2**20, default="0"))


_REMEDY = "start through torchrun, which sets it, or unset WORLD_SIZE for a single process"


def _variable(name: str, low: int, high: int, default: str = "") -> int:
    """A number in the environment."""
    text = os.environ.get(name, default)
    if not (text.isdecimal() and len(text) < 11 and low <= int(text) <= high):
        raise InputError(
            f"{name} in the environment must be a number from {low} to {high}, "
            f"not {text[:100]!r}; {_REMEDY}"
        )
    return int(text)


@contextmanager
def joined_process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Connect the processes of the run, and disconnect them when the block ends.

    Raises:
        InputError: as ``read_process_group``, also about the address where the processes meet; they
            cannot meet there.
    """
    group = read_process_group()
    if group.world_size == 1:
        yield group
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    port = _variable("MASTER_PORT", 0, 65535)
    attempt = _variable("TORCHELASTIC_RESTART_COUNT", 0, 2**31, default="0")
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise InputError(f"MASTER_ADDR is not set in the environment; {_REMEDY}")
    # torchrun keeps its store when it restarts the processes. Without a prefix for each attempt, a
    # restarted process would connect to the addresses of dead ones.
    try:
        store, _, _ = next(rendezvous("env://", group.rank, group.world_size))
    except (RuntimeError, OSError) as error:  # an unknown host, a port in use, a process missing
        raise InputError(
            f"the {group.world_size} processes cannot meet at MASTER_ADDR={host} "
            f"MASTER_PORT={port}: {first_line(error)}"
        ) from error
    options: dict[str, Any] = {
        "store": dist.PrefixStore(f"attempt-{attempt}", store),
        "rank": group.rank,
        "world_size": group.world_size,
        "timeout": TIMEOUT,
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    try:
        yield group
    except BaseException:
        if device.type == "cuda":
            # NCCL's orderly shutdown waits for every process, also for those that wait for this
            # one until their collective times out. An abort lets torchrun end them at once.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of this process. `auto` is CUDA where there is a GPU, otherwise the CPU.

    Under torchrun each process gets the GPU of its local rank. That GPU becomes the current one:
    otherwise pinned memory, and any call that names no GPU, would open a context of half a
    gigabyte on the first GPU for every process.

    Raises:
        InputError: `cuda` was requested and there is no GPU, or no GPU has this local rank.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA GPU (see deit-fast doctor)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local_rank, count = read_process_group().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(f"LOCAL_RANK={local_rank}, but torch sees {count} GPUs")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 natively; emulation on older GPUs is slower than fp32."""
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
