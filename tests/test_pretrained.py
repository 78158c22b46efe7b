"""Training starts from timm's pretrained weights; a convnet becomes a teacher of own classes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from deit_fast.config import ModelConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.models.weights import load_weights
from deit_fast.recipes import RECIPES, finetune_teacher
from deit_fast.training.loop import train
from deit_fast.training.state import create_state
from helpers.digits import write_few_digits
from helpers.hub import use_hub, write_pretrained

CPU = torch.device("cpu")
NAMES = [f"class {label}" for label in range(10)]
NET = "resnet10t.c3_in1k"


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[Path, dict]:
    cache = tmp_path_factory.mktemp("hub")
    return cache, write_pretrained(cache, NET)[NET]


@pytest.fixture
def offline(hub, monkeypatch) -> dict:
    """The hub's cache without a network; the state dict of NET."""
    use_hub(hub[0], monkeypatch)
    return hub[1]


def test_timms_weights_start_a_run_and_its_head_starts_afresh(offline, caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    config = RunConfig(model=ModelConfig(name="resnet10t", drop_path=0.0, weights=f"timm:{NET}"))
    state = create_state(config, 10, CPU, NAMES)
    for name, value in state.model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, offline[name]), name
    assert state.model.fc.weight.shape == (10, 512)
    assert f"weights file timm:{NET}: fc has 1000 classes there, 10 here" in caplog.text
    assert state.identity["model.weights"] is not None
    # resnet10t was trained with ImageNet's statistics
    assert "trained on images of" not in caplog.text
    other = config.replace(view={"mean": (0.5, 0.5, 0.5)})
    create_state(other, 10, CPU, NAMES)
    assert "trained on images of mean 0.485 0.456 0.406" in caplog.text


def test_as_many_classes_keep_the_head(offline):
    config = RunConfig(model=ModelConfig(name="resnet10t", drop_path=0.0, weights=f"timm:{NET}"))
    state = create_state(config, 1000, CPU, [f"class {label}" for label in range(1000)])
    assert torch.equal(state.model.fc.weight, offline["fc.weight"])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("timm:resnet10", "unknown weights 'timm:resnet10' (did you mean timm:resnet10t?)"),
        ("timm:resnet18.a1_in1k", "no pretrained weights (.*); give --model.weights FILE, or none"),
        (
            f"timm:{NET}",
            "they are of resnet10t.c3_in1k, model.name is resnet18: give --model.we",
        ),
    ],
    ids=["unknown", "absent", "other-model"],
)
def test_weights_that_timm_does_not_have_or_that_do_not_fit(offline, weights, words):
    model = ModelConfig(name="resnet18", drop_path=0.0, weights=weights)
    pattern = words if "(.*)" in words else re.escape(words)
    pattern = pattern.replace("weights (.*)", r"weights \(.*\)")
    with pytest.raises(InputError, match=pattern) as caught:
        create_state(RunConfig(model=model), 10, CPU, NAMES)
    assert "\n" not in str(caught.value)


def test_the_recipe_fine_tunes_a_convnet_of_other_classes(offline, tmp_path):
    """On 160 digits of 32 pixels; the weights that it starts from are random."""
    write_few_digits(tmp_path / "data", train=16, val=5)
    base = finetune_teacher()
    config = base.replace(
        output=str(tmp_path / "run"),
        epochs=7,
        device="cpu",
        view={"image_size": 32, "flip_prob": 0.0},
        data={"root": str(tmp_path / "data"), "workers": 0},
        model={"name": "resnet10t", "weights": f"timm:{NET}"},
    )
    result = train(config)
    assert result["top1"] > 0.4  # chance: 0.1
    weights = load_weights(tmp_path / "run/model.safetensors")
    assert weights["fc.weight"].shape == (10, 512)


@pytest.mark.parametrize("name", RECIPES)
def test_weights_of_recipes_are_timms(name):
    """A recipe names no file, and weights that timm knows as those of the model."""
    import timm

    model = RECIPES[name]().model
    if model.weights is None:
        return
    entry = model.weights.removeprefix("timm:")
    assert timm.get_pretrained_cfg(entry, allow_unregistered=False).has_weights
    assert entry.partition(".")[0] == model.name
