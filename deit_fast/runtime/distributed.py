"""The processes of one run: who this one is, and what they tell one another.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without them a run is one process, which sends
nothing. Gloo connects CPU processes, NCCL those with a GPU each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from deit_fast.errors import InputError

TIMEOUT = timedelta(minutes=10)  # of a collective; the first waits for another rank's compilation


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def maximum(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by its maximum over all processes, element by element."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it holds in any process; all must ask together."""
        if self.size == 1:
            return here
        flag = torch.tensor(float(here), device=device)
        self.maximum(flag)
        return bool(flag)

    def gather(self, value: Any) -> list[Any]:
        """Small plain values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()


def read_world() -> World:
    """What torchrun's environment says.

    Raises:
        InputError: a variable is not a number, or rank and size do not fit.
    """
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise InputError(f"{name}={text!r} in the environment is not a number")
        values.append(int(text))
    rank, size, local_rank = values
    if rank >= size:
        raise InputError(f"RANK={rank} is not one of WORLD_SIZE={size} processes")
    return World(rank, size, local_rank)


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Connect the processes of the run; leaves them when the block ends."""
    world = read_world()
    if world.size == 1:
        yield world
        return
    # torchrun's store outlives a restart: without a prefix of its own a restarted process would
    # look for its peers at the addresses of the dead.
    store, _, _ = next(rendezvous("env://", world.rank, world.size))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    options: dict[str, Any] = {
        "store": dist.PrefixStore(f"attempt-{attempt}", store),
        "rank": world.rank,
        "world_size": world.size,
        "timeout": TIMEOUT,
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    try:
        yield world
    except BaseException:
        _leave(device)
        raise
    dist.destroy_process_group()


def _leave(device: torch.device) -> None:
    """Leave the others where they are.

    NCCL's orderly end waits for all processes of the machine, those too that wait for this one:
    ten minutes, until a collective of theirs gives up, instead of torchrun's ending them at once.
    """
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
