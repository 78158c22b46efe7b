"""Process group and device selection, as far as a machine without a GPU can check them."""

from __future__ import annotations

import sys
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from deit_fast.errors import InputError
from deit_fast.runtime import distributed as room
from deit_fast.runtime.distributed import ProcessGroup, choose_device


@pytest.fixture
def eight_gpus(monkeypatch) -> list[torch.device]:
    """Environment of rank 3 on a machine with eight GPUs; returns the devices made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3",
                 "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip
    for name, value in variables.items():
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


class OneOf(ProcessGroup):
    """A rank of three; ``gather`` returns what the others would send."""

    others: ClassVar[list] = []

    def gather(self, value):
        return [*self.others[: self.rank], value, *self.others[self.rank :]]


def test_an_action_that_fails_in_one_rank_fails_in_all():
    def fail():
        raise InputError("image folder /data has no split train")

    group = OneOf(1, 3)
    group.others[:] = ["", ""]
    assert group.agree(lambda: 5) == 5
    with pytest.raises(InputError, match=r"^image folder /data has no split train$"):
        group.agree(fail)
    group.others[:] = ["", "image folder /data has no split train"]
    with pytest.raises(InputError, match=r"^rank 2 failed: image folder /data has no split"):
        group.agree(lambda: 5)
    assert ProcessGroup().agree(lambda: 5) == 5


def test_what_differs_between_ranks_is_named_in_all_of_them():
    group = OneOf(0, 3)
    mine = {"step": 7, "checkpoint": "step-000000007.pt"}
    group.others[:] = [mine, mine]
    group.require_equal(mine, "")
    group.others[:] = [{"step": 0, "checkpoint": "none"}, mine]
    for rank in range(3):
        one, values = OneOf(rank, 3), [mine, {"step": 0, "checkpoint": "none"}, mine]
        group.others[:] = values[:rank] + values[rank + 1 :]
        with pytest.raises(InputError) as error:
            one.require_equal(values[rank], "share the folder")
        assert str(error.value) == (
            "the ranks differ in their step (7 in rank 0 2, 0 in rank 1): share the folder"
        )
    ProcessGroup().require_equal(mine, "")


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("RANK", "8", 0, 7),
        ("WORLD_SIZE", "0", 1, 2**20),
        ("LOCAL_RANK", "-1", 0, 2**20),
        ("MASTER_PORT", "65536", 0, 65535),
        ("TORCHELASTIC_RESTART_COUNT", "-1", 0, 2**31),
    ],
)
def test_invalid_environment_variables_are_named(eight_gpus, monkeypatch, name, value, low, high):
    for wrong in (value, "x", "", " 1", "1.0", "9" * 5000, str(2**70), "\udcff"):
        monkeypatch.setenv(name, wrong)
        with (
            pytest.raises(InputError, match=f"{name} in .* from {low} to {high}, not .* torchrun"),
            room.joined_process_group(torch.device("cpu")),
        ):
            pass


def test_processes_without_an_address_to_meet_are_refused(eight_gpus, monkeypatch):
    def unreachable(*_):
        raise dist.DistNetworkError("port in use")

    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous", unreachable)
    refusals = [
        "cannot meet at MASTER_ADDR=localhost MASTER_PORT=29500: port in use",
        "MASTER_ADDR is not set in the environment; start through torchrun",
    ]
    for words in refusals:
        with (
            pytest.raises(InputError, match=words),
            room.joined_process_group(torch.device("cpu")),
        ):
            pass
        monkeypatch.delenv("MASTER_ADDR", raising=False)
