"""Process group and device selection, as far as a machine without a GPU can check them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from deit_fast.errors import InputError
from deit_fast.runtime import distributed as room
from deit_fast.runtime.distributed import choose_device


@pytest.fixture
def eight_gpus(monkeypatch) -> list[torch.device]:
    """Environment of rank 3 on a machine with eight GPUs; returns the devices made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    return current


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_uses_the_gpu_of_its_local_rank(eight_gpus, name):
    """Pinned memory and events use the current GPU: eight processes must not share the first."""
    mine = torch.device("cuda", 3)
    assert choose_device(name) == mine and eight_gpus == [mine]
    assert choose_device("cpu") == torch.device("cpu") and eight_gpus == [mine]


def test_a_local_rank_without_a_gpu_is_refused(eight_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(InputError, match="LOCAL_RANK=8, but torch sees 8 GPUs"):
        choose_device("auto")
    assert eight_gpus == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device cuda: torch sees no CUDA GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_a_failing_process_does_not_wait_for_the_others(eight_gpus, monkeypatch, error):
    """NCCL's orderly shutdown is collective, so after an error the process group is aborted."""
    ends: list[str] = []
    stores = [(dist.HashStore(), 3, 8)]
    module = sys.modules["torch.distributed.rendezvous"]  # a function of this name hides it
    monkeypatch.setattr(module, "rendezvous", lambda *_: iter(stores))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("together"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: ends.append("alone"))
    if error is None:
        with room.joined_process_group(torch.device("cuda", 3)) as joined:
            assert (joined.rank, joined.world_size, joined.local_rank) == (3, 8, 3)
        assert ends == ["together"]
        return
    with pytest.raises(error), room.joined_process_group(torch.device("cuda", 3)):
        raise error
    assert ends == ["alone"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("RANK", "x", "RANK='x' .* is not a number"), ("RANK", "8", "RANK=8 .* WORLD_SIZE=8")],
)
def test_invalid_environment_variables_are_named(eight_gpus, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        room.read_process_group()
