"""Late fusion against scikit-learn and direct counting; the softened distribution by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import deit_fast
from deit_fast.cli import main
from deit_fast.config_file import to_dict
from deit_fast.data.eval import spaced_ids
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, evaluate, load_run
from deit_fast.models.fuse import unfuse
from deit_fast.models.late_fusion import fit_classifier
from deit_fast.models.student import build_model
from deit_fast.recipes import digits_student
from deit_fast.tools.analysis.runs import analyze
from deit_fast.tools.report.sections import table
from helpers.digits import write_few_digits
from helpers.runs import TWO_BLOCKS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled run and one without distillation, with random weights."""
    root = tmp_path_factory.mktemp("fusion")
    write_few_digits(root / "data", train=7, val=4)
    for kind in ("soft", "none"):
        config = digits_student().replace(
            output=str(root / kind), batch_size=16, loss={"kind": kind},
            data={"root": str(root / "data"), "workers": 0}, model={"args": TWO_BLOCKS},
        )  # fmt: skip
        (root / kind).mkdir()
        torch.manual_seed(4)
        model = build_model(config, 10)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        save_file(model.state_dict(), root / kind / "model.safetensors")
        (root / kind / "config.json").write_text(json.dumps(to_dict(config)))
    return root


def test_the_classifier_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = torch.randn(90, 6), torch.arange(90) % 4
    features[:, 0] += labels
    ours = fit_classifier(features, labels, 4)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(features, labels)
    weight, bias = torch.tensor(theirs.coef_), torch.tensor(theirs.intercept_)
    torch.testing.assert_close(ours.weight.double(), weight, rtol=1e-3, atol=1e-3)
    centred = ours.bias.double() - ours.bias.double().mean()  # a constant changes nothing
    torch.testing.assert_close(centred, bias - bias.mean(), rtol=1e-3, atol=1e-3)
    torch.manual_seed(99)
    again = fit_classifier(features, labels, 4)
    assert torch.equal(again.weight, ours.weight) and not again.weight.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_one_line(value: float) -> None:
    features = torch.zeros(20, 8)
    features[3:5, 1] = value
    with pytest.raises(InputError, match="the embeddings of 2 of 20 images are not finite"):
        fit_classifier(features, torch.arange(20) % 5, 5)


def test_a_classifier_without_convergence_is_named(monkeypatch, caplog) -> None:
    features, labels = torch.randn(90, 6), torch.arange(90) % 4
    fit_classifier(features, labels, 4)
    assert not caplog.text
    monkeypatch.setattr("deit_fast.models.late_fusion.ITERATIONS", 3)
    fit_classifier(features, labels, 4)
    assert "L-BFGS stopped after 3 iterations without convergence" in caplog.text


def tokens_of(world: Path, split: str, ids: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both embeddings of images, by timm's own forward, [N, 2, D]; labels."""
    from deit_fast.data.open import open_source

    config, source, model = load_run(str(world / "soft"))
    if split == "train":
        source = open_source(config.data, "train", config.view.image_size)
    plain: Any = unfuse(model).eval()
    found, labels = [], []
    with torch.no_grad():
        for images, of_batch, _ in build_eval_loader(config, source, CPU):
            found.append(plain.forward_features(images)[:, :2])
            labels.append(of_batch)
    chosen = slice(None) if ids is None else torch.from_numpy(ids)
    return torch.cat(found)[chosen], torch.cat(labels)[chosen]


@pytest.mark.parametrize("images", [1000, 33])
def test_rows_are_those_of_a_classifier_on_frozen_embeddings(images: int, world: Path) -> None:
    run = world / "soft"
    before = evaluate(str(run))
    found = evaluate(str(run), late_fusion=images)
    rows = found.pop("late_fusion")
    assert found == before and list(rows) == ["mean_softmax", "fusion_sum", "fusion_concatenation"]
    train, labels = tokens_of(world, "train", spaced_ids(70, images))
    tokens, truth = tokens_of(world, "val")
    for name, features, held_out in (
        ("fusion_sum", train.sum(1), tokens.sum(1)),
        ("fusion_concatenation", train.flatten(1), tokens.flatten(1)),
    ):
        logits = fit_classifier(features, labels, 10)(held_out)
        right = (logits.argmax(1) == truth).float().mean().item()
        loss = torch.nn.functional.cross_entropy(logits, truth).item()
        assert rows[name]["top1"] == pytest.approx(right, abs=1e-6)
        assert rows[name]["loss"] == pytest.approx(loss, rel=1e-3)
    (analysis,) = analyze([run], maps=0, late_fusion=images)
    for name in rows:
        assert analysis["accuracy"][name] == pytest.approx(rows[name]["top1"], abs=1e-6)
        assert 0 <= analysis["calibration"][name]["ece"] <= 1
    assert analysis["main"] == "mean_logits" and analysis["heads"]
    assert analysis["accuracy"]["mean_logits"] == pytest.approx(before["top1"], abs=1e-6)
    (plain,) = analyze([run], maps=0)
    assert analysis["tokens"] == plain["tokens"]  # both read one forward
    assert "fusion_sum" not in plain["accuracy"]


def test_names_of_the_rows_say_what_they_are(world: Path, capsys) -> None:
    assert main(["analyze", str(world / "soft"), "--maps", "0", "--late-fusion", "50"]) == 0
    shown = capsys.readouterr().out
    names = (
        "mean of logits",
        "mean of softmaxes",
        "late fusion, sum",
        "late fusion, concatenation",
    )
    assert all(f"{name}, top-1" in shown and f"{name}, ECE" in shown for name in names)
    assert not [name for name in table.CLASSIFIERS.values() if name.startswith("sum")]
    assert main(["evaluate", str(world / "soft"), "--late-fusion", "50"]) == 0
    shown = capsys.readouterr().out
    for name in ("mean softmax", "fusion sum", "fusion concatenation"):
        assert f"{name} top1" in shown and f"{name} loss" in shown


def test_a_student_with_one_trained_head_has_no_late_fusion(world: Path) -> None:
    with pytest.raises(InputError, match="--late-fusion: training used the class head alone in"):
        evaluate(str(world / "none"), late_fusion=10)
    (found,) = analyze([world / "none"], maps=0, late_fusion=10)
    assert found["left_out"]["late fusion"] == "training used the class head alone"


def test_a_temperature_softens_a_distribution() -> None:
    logits = torch.tensor([30.0, 5.0, 2.0, 2.0])
    found = deit_fast.soften(logits, [1, 10])
    for temperature, probs in zip((1, 10), found.tolist(), strict=True):
        parts = [math.exp(z / temperature) for z in logits.tolist()]
        assert probs == pytest.approx([part / sum(parts) for part in parts], rel=1e-12)
    assert found.dtype == torch.float64 and deit_fast.soften(torch.zeros(2, 3)).shape == (10, 2, 3)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="a temperature must be positive and finite"):
            deit_fast.soften(logits, [1.0, wrong])
