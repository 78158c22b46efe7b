"""Runs of Lift and WideLast students, and all that comes after a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import deit_fast
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, evaluate, load_run
from deit_fast.models import forward_heads, load_teacher
from deit_fast.models.student import mean_logits
from deit_fast.models.weights_facts import read_facts
from deit_fast.runtime.metrics import read_metrics
from deit_fast.tools.analysis.runs import analyze
from deit_fast.tools.report.page import build_report
from deit_fast.training.loop import train
from helpers.runs import TWO_BLOCKS, assert_stops_change_nothing, run_config

MODELS: dict[str, dict[str, Any]] = {
    "lift": {"name": "deit_tiny_patch16_224", "head": "lift", "wide": 48},
    "wide_last": {"name": "deit_tiny_distilled_patch16_224", "head": "wide_last", "wide": 64},
}
BOTH = pytest.mark.parametrize("kind", MODELS)


def settings(world: Path, output: Path, kind: str, **changes: Any) -> RunConfig:
    model = MODELS[kind] | {"args": TWO_BLOCKS, "drop_path": 0.2}
    return run_config(world, output, model=model, epochs=1, **changes)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    for kind in MODELS:
        train(settings(world, root / kind, kind))
    return root


@pytest.fixture(scope="module")
def evaluated(runs) -> dict[str, tuple[Tensor, Tensor]]:
    """Held-out images and the logits that `evaluate` computes."""
    found = {}
    for kind in MODELS:
        config, source, model = load_run(runs / kind)
        images = torch.cat(
            [x for x, _, _ in build_eval_loader(config, source, torch.device("cpu"))]
        )
        with torch.no_grad():
            found[kind] = images, mean_logits(*forward_heads(model.eval(), images))
    return found


@BOTH
def test_an_interrupted_run_is_bit_equal(kind, world, runs, tmp_path):
    assert_stops_change_nothing(settings(world, tmp_path / "parts", kind), (3,), runs / kind)


@BOTH
def test_a_run_is_evaluated_and_its_average_too(kind, runs):
    result = json.loads((runs / kind / "result.json").read_text())
    assert evaluate(str(runs / kind))["top1"] == result["top1"]
    assert evaluate(str(runs / kind), weights="ema")["top1"] == result["ema_top1"]
    assert ("top1_distill" in result) == (kind == "wide_last")
    assert result["forward_flops"] > 0 and result["parameters"] > 0
    rows = [row for row in read_metrics(runs / kind / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 6 and all(row["loss"] > 0 for row in rows)


@BOTH
def test_weights_alone_build_the_student(kind, world, runs, evaluated):
    path = runs / kind / "model.safetensors"
    facts = read_facts(path)
    assert facts is not None
    assert (facts.head, facts.wide) == (MODELS[kind]["head"], MODELS[kind]["wide"])
    images, expected = evaluated[kind]
    (checkpoint,) = sorted((runs / kind / "checkpoints").glob("*.pt"))[-1:]
    for file in (path, f"{checkpoint}#model"):
        assert torch.equal(deit_fast.load_student(file).logits(images), expected)
    pictures = sorted((world / "data" / "val" / "3").iterdir())[:2]
    assert len(deit_fast.predict(runs / kind, pictures, workers=0)) == 2


@BOTH
def test_another_program_runs_the_exported_student(kind, runs, evaluated):
    images, expected = evaluated[kind]
    for format in ("timm", "hf"):
        with pytest.raises(InputError, match=f"with model.head={kind}: choose --format onnx or"):
            deit_fast.export(runs / kind, format=format)
    if kind == "lift":  # one format each: the exporters take seconds
        path = deit_fast.export(runs / kind, format="torch").path
        with torch.no_grad():
            logits = torch.export.load(path).module()(images[:7])
    else:
        path = deit_fast.export(runs / kind, format="onnx").path
        session = onnxruntime.InferenceSession(str(path))
        logits = torch.as_tensor(session.run(None, {"images": images[:7].numpy()})[0])
        assert session.get_modelmeta().custom_metadata_map["head"] == "wide_last"
    torch.testing.assert_close(logits, expected[:7], rtol=1e-5, atol=1e-6)


def test_runs_are_analysed_and_reported(runs):
    paths = [runs / kind for kind in MODELS]
    lift, last = analyze(paths, maps=1)
    assert lift["left_out"]["attention"].startswith("the student's head reads the mean of")
    assert "attention" in last and "attention" not in last["left_out"] and "tokens" in last
    page = build_report(paths, "wide")
    assert "deit_tiny_patch16_224, lift 48" in page and "patch16_224, wide_last 64" in page


@BOTH
def test_a_student_is_a_teacher_by_its_file(kind, runs, evaluated):
    images, _ = evaluated[kind]
    mean = std = (0.5, 0.5, 0.5)
    spec = f"timm:{MODELS[kind]['name']}@{runs / kind / 'model.safetensors'}"
    teacher = load_teacher(spec, num_classes=10, input_mean=mean, input_std=std)
    expected = deit_fast.load_student(runs / kind).logits(images)
    torch.testing.assert_close(teacher(images), expected)


def test_a_run_goes_on_with_its_own_architecture_alone(world, runs):
    config = settings(world, runs / "lift", "lift")
    message = r"model.head 'lift' there, 'standard' here; model.wide 48 there, None here"
    with pytest.raises(InputError, match=message):
        train(config.replace(model={"head": "standard", "wide": None}))
    with pytest.raises(InputError, match=r"model.wide 48 there, 64 here"):
        train(config.replace(model={"wide": 64}))
