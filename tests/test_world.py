"""Processes and their GPUs, as far as a machine without one can tell."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deit_fast.errors import InputError
from deit_fast.evaluate import choose_device
from deit_fast.runtime import distributed as room


@pytest.fixture
def eight_gpus(monkeypatch) -> list[torch.device]:
    """The fourth process on a machine with eight GPUs; which of them was made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    return current


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_process_works_on_its_own_gpu(eight_gpus, name):
    """Pinned memory and events go to the current GPU: eight processes must not share the first."""
    mine = torch.device("cuda", 3)
    assert choose_device(name) == mine and eight_gpus == [mine]
    assert choose_device("cpu") == torch.device("cpu") and eight_gpus == [mine]


def test_a_process_without_a_gpu_of_its_own_is_refused(eight_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(InputError, match="LOCAL_RANK=8, but torch sees 8 GPUs"):
        choose_device("auto")
    assert eight_gpus == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device cuda: torch sees no CUDA GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_a_process_that_fails_waits_for_no_other(eight_gpus, monkeypatch, error):
    """The orderly end of NCCL is one that all processes make together."""
    ends: list[str] = []
    monkeypatch.setattr(room, "rendezvous", lambda *address: iter([(dist.HashStore(), 3, 8)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("together"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: ends.append("alone"))
    if error is None:
        with room.joined_world(torch.device("cuda", 3)) as joined:
            assert (joined.rank, joined.size, joined.local_rank) == (3, 8, 3)
        assert ends == ["together"]
        return
    with pytest.raises(error), room.joined_world(torch.device("cuda", 3)):
        raise error
    assert ends == ["alone"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("RANK", "x", "RANK='x' .* is not a number"), ("RANK", "8", "RANK=8 .* WORLD_SIZE=8")],
)
def test_an_environment_that_cannot_be_is_named(eight_gpus, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        room.read_world()
