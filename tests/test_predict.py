"""A student in use gives the logits that `evaluate` measured, from its weights file alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import deit_fast
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, load_run
from deit_fast.models.student import forward_heads, mean_logits
from deit_fast.models.weights_facts import FACTS_KEY
from deit_fast.recipes import digits_student
from deit_fast.runtime.weights_header import WEIGHTS_FILES, WeightsChoice
from deit_fast.training.loop import train
from helpers.images import odd_files, write_split

MEAN, STD = (0.3, 0.4, 0.6), (0.2, 0.3, 0.7)
ARGS = ("patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")
RUNS: dict[str, dict[str, Any]] = {
    "both": {"loss": {"kind": "hard"}, "teacher_floor": 0.0,
             "teacher": "deit_fast.models.convnet:small_convnet"},
    "class": {"loss": {"kind": "none"}, "model": {"fused": False}},
    "convnet": {"loss": {"kind": "none"}, "model": {"name": "test_resnet", "args": ()}},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of many sizes and modes, and a run of each kind of student on them."""
    root = tmp_path_factory.mktemp("predict")
    for split, per_class in (("train", 20), ("val", 5)):
        write_split(root / "data" / split, classes=3, per_class=per_class)
        for path in (root / "data" / split).rglob("*.jpg"):
            _tint(path)
    for name, content in odd_files().items():
        (root / "data" / "val" / "class1" / name).write_bytes(content)
    for name, changes in RUNS.items():
        train(settings(root, name).replace(**changes))
    return root


def _tint(path: Path) -> None:
    """A colour for each class, so that a few steps tell them apart."""
    pixels = np.asarray(Image.open(path)).copy()
    pixels[..., int(path.parent.name[-1])] //= 4
    Image.fromarray(pixels).save(path)


def settings(root: Path, name: str) -> RunConfig:
    return digits_student().replace(
        output=str(root / name), epochs=3, batch_size=20, eval_every=3, save_every=3,
        data={"root": str(root / "data"), "workers": 0, "eval_crop": 0.8},
        model={"args": ARGS}, optim={"ema_decay": 0.5, "lr": 0.02, "warmup_epochs": 0.0},
        view={"mean": MEAN, "std": STD, "image_size": 32, "repeats": 1},
    )  # fmt: skip


@torch.no_grad()
def evaluated(run: Path, weights: WeightsChoice = "last") -> tuple[Tensor, list[str]]:
    """The logits that `evaluate` computes, and the paths of their images."""
    config, source, model = load_run(run, weights=weights)
    loader = build_eval_loader(config, source, torch.device("cpu"))
    parts = [mean_logits(*forward_heads(model.eval(), images)) for images, _, _ in loader]
    return torch.cat(parts), list(source.paths)


# ---------------------------------------------------------------------------------------------
# load_student
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_lone_weights_file_gives_the_logits_of_evaluate(root, tmp_path, name):
    """Bit for bit where the batches agree; also through the transform, image by image."""
    file = shutil.copy(root / name / "model.safetensors", tmp_path / "lone.safetensors")
    student = deit_fast.load_student(file)
    expected, paths = evaluated(root / name)
    assert len(expected.argmax(1).unique()) > 1  # not constant
    images = torch.stack([student.transform(Image.open(path)) for path in paths])
    found = torch.cat([student.logits(part) for part in images.split(20)])
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(student.model(images[:20]), expected[:20])
    assert student.classes == ("class0", "class1", "class2")
    assert (student.mean, student.std, student.image_size) == (MEAN, STD, 32)


def test_a_student_called_with_images_gives_probabilities(root):
    student = deit_fast.load_student(root / "both")
    expected, paths = evaluated(root / "both")
    pictures = [Image.open(path) for path in paths]
    for images in (paths, pictures, [Path(paths[0]), *pictures[1:]]):
        found = student(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.softmax(1))
    torch.testing.assert_close(student(paths[1]), expected[1:2].softmax(1))
    with pytest.raises(InputError, match="at least one image"):
        student([])
    with pytest.raises(InputError, match="cannot read image /nowhere"):
        student("/nowhere.png")


def test_weights_of_a_run_are_chosen_by_name(root, tmp_path):
    expected, paths = evaluated(root / "both", weights="ema")
    student = deit_fast.load_student(root / "both", weights="ema")
    assert student.path == root / "both" / WEIGHTS_FILES["ema"]
    torch.testing.assert_close(student(paths), expected.softmax(1))
    last = deit_fast.load_student(root / "both")
    assert not torch.equal(last(paths), student(paths))
    (checkpoint,) = (root / "both" / "checkpoints").glob("*.pt")
    assert torch.equal(deit_fast.load_student(f"{checkpoint}#model")(paths), last(paths))


def test_a_run_without_the_chosen_weights_is_one_clear_line(root, tmp_path):
    def message(run: Path, **options: Any) -> str:
        with pytest.raises(InputError) as error:
            deit_fast.load_student(run, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    run = tmp_path / "run"
    run.mkdir()
    assert "is no run folder" in message(run)
    shutil.copy(root / "both" / "config.json", run)
    assert "has not finished; name one of its checkpoints" in message(run)
    file = shutil.copy(root / "both" / "ema.safetensors", run)
    assert "does not exist; the run has the weights ema" in message(run)
    assert "must be one of last, ema, best, not 'first'" in message(run, weights="first")
    assert "weights=ema chooses a file of a run's folder" in message(Path(file), weights="ema")
    assert "nothing.safetensors does not exist" in message(run / "nothing.safetensors")
    save_file(load_file(file), run / "model.safetensors")
    assert "does not say which model it holds" in message(run)


def test_weights_of_an_earlier_version_have_its_defaults(root, tmp_path):
    path = root / "class" / "model.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[FACTS_KEY])
    for name in ("eval_crop", "fused", "kernels", "residual", "pad_head"):
        del facts[name]
    old = tmp_path / "old.safetensors"
    save_file(load_file(path), old, {FACTS_KEY: json.dumps(facts), "trained_head": "class"})
    student = deit_fast.load_student(old)
    assert student.transform.crop == 0.875
    images = torch.randn(2, 3, 32, 32)
    expected = deit_fast.load_student(path).logits(images)
    torch.testing.assert_close(student.logits(images), expected)


def test_a_file_does_not_decide_which_code_is_run(root, tmp_path):
    path, mine = tmp_path / "w.safetensors", f"{__name__}:my_resnet"
    with safe_open(root / "convnet" / "model.safetensors", "pt") as file:
        texts = file.metadata()
    facts = json.loads(texts[FACTS_KEY]) | {"name": mine}
    save_file(
        load_file(root / "convnet" / "model.safetensors"), path, {FACTS_KEY: json.dumps(facts)}
    )
    with pytest.raises(InputError, match="a file may not decide which code is run"):
        deit_fast.load_student(path)
    images = torch.randn(2, 3, 32, 32)
    expected = deit_fast.load_student(root / "convnet").logits(images)
    assert torch.equal(deit_fast.load_student(path, model=mine).logits(images), expected)


def my_resnet(num_classes: int) -> torch.nn.Module:
    import timm

    return timm.create_model("test_resnet", num_classes=num_classes)


def test_logits_that_are_not_finite_are_refused(root, tmp_path):
    path = tmp_path / "w.safetensors"
    with safe_open(root / "class" / "model.safetensors", "pt") as file:
        texts = {FACTS_KEY: file.metadata()[FACTS_KEY]}
    state = load_file(root / "class" / "model.safetensors")
    save_file(state | {"head.bias": state["head.bias"] * float("nan")}, path, texts)
    with pytest.raises(InputError, match="logits are not finite"):
        deit_fast.load_student(path)(Image.new("RGB", (40, 40)))
