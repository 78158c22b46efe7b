"""Vision transformer teachers on this package's kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from deit_fast.data.open import open_source
from deit_fast.models import Teacher
from deit_fast.models.convnet import small_convnet
from deit_fast.models.fuse import KERNELS, FusedBlock
from deit_fast.precomputation import precompute
from deit_fast.training.teacher import open_teacher
from helpers.runs import run_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def transformer(num_classes: int = 10) -> nn.Module:
    """A teacher by its factory: deterministic weights, any number of classes."""
    torch.manual_seed(3)
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=48,
        num_heads=3, num_classes=num_classes,
    )  # fmt: skip


@pytest.fixture
def kernels_here(monkeypatch) -> None:
    """Use a GPU's default kernels; on a CPU their references run."""
    monkeypatch.setattr("deit_fast.models.teacher.default_kernels", lambda device: KERNELS)


def blocks_of(teacher: Teacher) -> list[type]:
    return [type(block) for block in teacher.model.blocks]


def test_a_fused_teacher_gives_the_same_logits(kernels_here):
    plain = Teacher(transformer(), "t").to_device(CPU)
    fused = Teacher(transformer(), "t").to_device(CPU, fused=True)
    assert fused.is_fused and blocks_of(fused) == [FusedBlock] * 2
    assert not plain.is_fused and FusedBlock not in blocks_of(plain)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-5, atol=1e-5)
    assert fused.fingerprint() == plain.fingerprint()


def test_other_teachers_and_devices_are_not_fused(monkeypatch):
    assert not Teacher(transformer(), "t").to_device(CPU, fused=True).is_fused
    monkeypatch.setattr("deit_fast.models.teacher.default_kernels", lambda device: KERNELS)
    assert not Teacher(small_convnet(10), "t").to_device(CPU, fused=True).is_fused


def test_where_a_teacher_is_fused(world, tmp_path, kernels_here):
    """Online unless model.fused is off; for a cache only if compiled, as its manifest says."""
    online = run_config(world, tmp_path / "run", teacher="test_fused_teacher:transformer")
    source = open_source(online.data, "train", online.view.image_size)
    for fused in (True, False):
        config = online.replace(model={"fused": fused})
        assert open_teacher(config, source, CPU).network.is_fused is fused
    for compiled, fused in (("auto", True), ("model", False)):
        cache = tmp_path / f"{compiled}-{fused}"
        config = online.replace(cache=str(cache), compile=compiled, model={"fused": fused})
        if compiled == "model":
            with torch.compiler.set_stance("force_eager"):
                precompute(config, range(1))
        else:
            precompute(config, range(1))
        assert "teacher.fused" not in fingerprint(cache)


def test_the_cache_of_a_fused_teacher_names_it(world, tmp_path, kernels_here):
    config = run_config(
        world, tmp_path / "run", teacher="test_fused_teacher:transformer", compile="model",
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        precompute(config, range(1))
        assert fingerprint(tmp_path / "cache")["teacher.fused"] is True
        assert precompute(config)["kept"] > 0
        with pytest.raises(Exception, match=r"teacher\.fused"):
            precompute(config.replace(model={"fused": False}))


def fingerprint(cache: Path) -> dict[str, object]:
    return json.loads((cache / "manifest.json").read_text())["fingerprint"]


@pytest.mark.gpu
def test_a_fused_teacher_on_a_gpu():
    network = transformer()
    plain = Teacher(copy.deepcopy(network), "t").to_device(CUDA)
    fused = Teacher(network, "t").to_device(CUDA, fused=True)
    assert fused.is_fused
    images = torch.randn(8, 3, 16, 16, device="cuda")
    torch.testing.assert_close(fused(images), plain(images), rtol=3e-2, atol=3e-2)
