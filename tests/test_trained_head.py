"""A head that the loss does not train is in no figure: evaluation uses the other one alone."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_INCEPTION_MEAN as HALF
from timm.models.deit import VisionTransformerDistilled
from timm.utils import ModelEmaV3
from torch import Tensor

from deit_fast.config import LossConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, evaluate, load_run
from deit_fast.models import create_student, forward_heads, fuse, load_teacher, unfuse
from deit_fast.models.student import build_model, keep_trained_head, trained_head
from deit_fast.models.weights import read_metadata
from deit_fast.tools.analysis.runs import analyze
from deit_fast.tools.report.page import build_report
from deit_fast.training.compiling import compile_evaluation
from deit_fast.training.loop import train
from helpers.digits import write_few_digits
from helpers.runs import run_config

LOSSES: dict[str, dict[str, Any]] = {
    "class": {"kind": "none"},
    "class, alpha 0": {"kind": "hard", "alpha": 0.0},
    "distillation": {"kind": "soft", "alpha": 1.0},
}
SHAPE = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def student(head: str, **options: Any) -> Any:
    name = "deit_tiny_distilled_patch16_224"
    model: Any = create_student(name, 7, 0.0, 8, trained_head=head, **options, **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def heads_of(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Both heads' logits by timm's own modules."""
    with torch.no_grad():
        tokens = unfuse(copy.deepcopy(model)).eval().forward_features(images)
    return {"class": model.head(tokens[:, 0]), "distillation": model.head_dist(tokens[:, 1])}


# ----------------------------------------------------------------------------------------- models


def test_the_loss_says_which_heads_it_trains() -> None:
    assert LossConfig().trained_head == LossConfig(kind="soft", alpha=0.1).trained_head == "both"
    for name, loss in LOSSES.items():
        assert LossConfig(**loss).trained_head == name.split(",")[0]
    assert LossConfig(kind="none", alpha=1.0).trained_head == "class"  # alpha has no effect there


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("head", ["class", "distillation"])
def test_a_model_with_one_trained_head_returns_its_logits(head: str, fused: bool) -> None:
    model, images = student(head, fused=fused, pad_head=fused), torch.randn(3, 3, 8, 8)
    expected = heads_of(model, images)[head]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)
        found, second = forward_heads(model, images)
        torch.testing.assert_close(found, expected)
        assert second is None and trained_head(model) == head
        average = ModelEmaV3(model, decay=0.9).module
        assert torch.equal(average(images), model(images))
        assert torch.equal(compile_evaluation("none", average)(average, images)[0], found)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        token = 0 if head == "class" else 1
        assert torch.equal(pooled, model.forward_features(images)[:, token])
        model.train()
        outputs = model(images)  # as timm: the loss decides
        assert isinstance(outputs, tuple) and len(outputs) == 2
    assert set(model.state_dict()) == set(student("both").state_dict())


def test_a_fused_model_keeps_its_head_through_unfuse_and_fuse() -> None:
    model, images = student("class"), torch.randn(2, 3, 8, 8)
    expected = heads_of(model, images)["class"]
    with torch.no_grad():
        for other in (unfuse(model), fuse(model), copy.deepcopy(model)):
            torch.testing.assert_close(other(images), expected)


def test_other_models_have_no_head_to_choose(caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig(loss=LossConfig(kind="none")).replace(
        model={"name": "deit_tiny_patch16_224", "args": ("depth=1",)}
    )
    with caplog.at_level(logging.INFO, "deit_fast"):
        assert trained_head(build_model(config, 3)) == "both"
        build_model(config.replace(loss={"kind": "hard"}), 3)
    assert "head alone" not in caplog.text
    with pytest.raises(InputError, match="not 'left'"):
        keep_trained_head(student("both", fused=False), "left")


class OwnForward(VisionTransformerDistilled):
    """A subclass, which decides itself what it returns."""


def test_a_subclass_is_evaluated_by_the_trained_head_and_keeps_its_class() -> None:
    model = OwnForward(img_size=8, num_classes=7, **SHAPE).eval()
    keep_trained_head(model, "distillation")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found, second = forward_heads(model, images)
        torch.testing.assert_close(found, heads_of(model, images)["distillation"])
    assert type(model) is OwnForward and second is None


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, and a run of three steps for each loss that leaves a head untrained."""
    root = tmp_path_factory.mktemp("one_head")
    write_few_digits(root / "data", train=3, val=3)
    for name, loss in LOSSES.items():
        teacher = None if loss["kind"] == "none" else "deit_fast.models.convnet:small_convnet"
        config = run_config(
            root, root / name, max_steps=3, batch_size=10, loss=loss, teacher=teacher,
            num_views=None,
        )  # fmt: skip
        train(config)
    return root


@pytest.mark.parametrize("name", LOSSES)
def test_no_figure_of_a_run_has_the_untrained_head(name: str, world: Path, caplog) -> None:
    run, head = world / name, name.split(",")[0]
    result = json.loads((run / "result.json").read_text())
    assert "top1_distill" not in result and "top1_class" not in result
    with caplog.at_level(logging.INFO, "deit_fast"):
        found = evaluate(str(run), weights="ema")
        measured = evaluate(str(run))
    said = [record.getMessage() for record in caplog.records if "head alone" in record.getMessage()]
    assert len(said) == 2 and f"trains the {head} head alone" in said[0]  # once for each call
    assert "top1_distill" not in measured | found and found["top1"] == result["ema_top1"]
    assert {key: result[key] for key in measured} == measured
    (analysis,) = analyze([run], maps=1)
    assert set(analysis["accuracy"]) == {head} == {analysis["main"]}
    assert analysis["accuracy"][head] == pytest.approx(measured["top1"])
    assert "heads" not in analysis and "tokens" in analysis
    assert analysis["left_out"]["heads"] == f"training used the {head} head alone"
    assert "student" in analysis["disagreement"]["names"]
    page = build_report([run], "runs")
    assert f"{head} head, top-1" in page and "mean of logits, top-1" not in page


def test_the_head_is_that_of_timm_modules(world: Path) -> None:
    """The loss of the run's weights, counted with timm's own forward."""
    config, source, _ = load_run(str(world / "class"))
    batches = list(build_eval_loader(config, source, torch.device("cpu")))
    plain = factory(10).eval()
    plain.load_state_dict(load_file(world / "class/model.safetensors"))
    with torch.no_grad():
        logits = torch.cat([heads_of(plain, images)["class"] for images, _, _ in batches])
    labels = torch.cat([labels for _, labels, _ in batches])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert evaluate(str(world / "class"))["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_that_is_tuned_without_distillation_evaluates_what_it_trained(
    world: Path, tmp_path: Path
) -> None:
    """Whatever the initial weights were: the backbone moves on below the other head."""
    config = run_config(world, tmp_path, max_steps=1, batch_size=10, loss={"kind": "none"},
                        teacher=None, num_views=None)  # fmt: skip
    weights = str(world / "distillation" / "model.safetensors")
    result = train(config.replace(model={"weights": weights}))
    assert "top1_distill" not in result
    assert read_metadata(tmp_path / "model.safetensors")["trained_head"] == "class"


def test_weights_that_are_handed_on_say_which_head_is_trained(world: Path) -> None:
    """As a teacher such a student gives the logits of that head."""
    images = torch.randn(2, 3, 16, 16)
    for name, head in (("class", "class"), ("distillation", "distillation")):
        file = world / name / "model.safetensors"
        assert read_metadata(file)["trained_head"] == head
    spec = f"test_trained_head:factory@{world / 'class' / 'model.safetensors'}"
    teacher = load_teacher(spec, num_classes=10, input_mean=HALF, input_std=HALF)
    assert teacher.fingerprint()["teacher.head"] == "class"
    torch.testing.assert_close(teacher(images), heads_of(teacher.model, images)["class"])


def factory(num_classes: int) -> VisionTransformerDistilled:
    return VisionTransformerDistilled(img_size=16, num_classes=num_classes, **SHAPE)
