"""A teacher's normalisation, size and classes are what its weights file says, else what is said
for it, and the log names what is assumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deit_fast.config import IMAGENET_MEAN, IMAGENET_STD, RunConfig
from deit_fast.data.eval import EvalLoader
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, load_run
from deit_fast.models import forward_heads, load_teacher
from deit_fast.models.convnet import small_convnet
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.models.weights import save_weights
from deit_fast.models.weights_facts import (
    FACTS_KEY,
    ModelFacts,
    class_names,
    facts_text,
    read_facts,
)
from deit_fast.recipes import digits_student
from deit_fast.training.loop import train
from helpers.digits import write_patterns

MEAN, STD = (0.3, 0.4, 0.6), (0.2, 0.3, 0.7)  # neither ImageNet's nor timm's for test_resnet
FACTORY = "deit_fast.models.convnet:small_convnet"
NAME = "deit_tiny_distilled_patch16_224"
CLASSES = [str(digit) for digit in range(10)]
ARGS = ("patch_size=8", "embed_dim=32", "depth=1", "num_heads=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Patterns as images, and short runs on them: a convnet, a transformer of a few channels."""
    root = tmp_path_factory.mktemp("facts")
    write_patterns(root / "data", train=12, val=10)
    base = digits_student().replace(
        epochs=4, eval_every=9, save_every=9, batch_size=20,
        data={"root": str(root / "data"), "workers": 0},
        loss={"kind": "none"}, optim={"ema_decay": 0.0, "lr": 0.06, "warmup_epochs": 0.0},
        view={"mean": MEAN, "std": STD, "image_size": 32, "mixup_alpha": 0, "cutmix_alpha": 0,
              "augment": "none", "erase_prob": 0.0, "repeats": 1},
    )  # fmt: skip
    train(base.replace(output=str(root / "convnet"), model={"name": "test_resnet", "args": ()}))
    train(base.replace(output=str(root / "factory"), model={"name": FACTORY, "args": ()}))
    train(base.replace(output=str(root / "transformer"), model={"name": NAME, "args": ARGS}))
    return root


def weights(root: Path, run: str) -> Path:
    return root / run / "model.safetensors"


def student(root: Path, **changes) -> RunConfig:
    """A student of ImageNet's statistics, as most recipes."""
    return digits_student().replace(
        data={"root": str(root / "data"), "workers": 0}, epochs=1, num_views=1, batch_size=20,
        view={"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": 32, "repeats": 1},
        **changes,
    )  # fmt: skip


@torch.no_grad()
def logits_of(loader: EvalLoader, network) -> torch.Tensor:
    return torch.cat([network(images) for images, _, _ in loader])


@pytest.mark.parametrize(
    ("run", "name"),
    [("convnet", "timm:test_resnet"), ("transformer", f"timm:{NAME}"), ("factory", FACTORY)],
    ids=["convnet", "transformer", "factory"],
)
def test_a_run_as_a_teacher_decides_as_in_evaluate(root, run, name):
    """On every held-out image, for a student whose images are normalised otherwise."""
    config, source, model = load_run(root / run)
    loader = build_eval_loader(config, source, torch.device("cpu"))
    expected = logits_of(loader, lambda x: _mean(forward_heads(model.eval(), x)))
    chosen = student(root, teacher=f"{name}@{weights(root, run)}")
    teacher = load_class_matched_teacher(chosen, CLASSES)
    assert (teacher.mean, teacher.std) == (MEAN, STD) and teacher.renormalises
    assert teacher.class_names == CLASSES
    loader = build_eval_loader(chosen, source, torch.device("cpu"))
    logits = logits_of(loader, teacher)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert run != "convnet" or len(expected.argmax(1).unique()) > 1  # not constant


def _mean(heads) -> torch.Tensor:
    first, second = heads
    return first if second is None else (first + second) / 2


def _without_facts(path: Path, copy: Path) -> Path:
    save_file(load_file(path), copy)
    return copy


def test_weights_say_what_their_model_is(root):
    facts = read_facts(weights(root, "transformer"))
    assert facts == ModelFacts(
        name=NAME, args=ARGS, image_size=32, mean=MEAN, std=STD,
        classes=tuple(CLASSES),
    )  # fmt: skip
    torch.save(load_file(weights(root, "convnet")), root / "plain.pth")
    assert read_facts(root / "plain.pth") is None  # has no such texts


@pytest.mark.parametrize("run", ["convnet", "transformer", "factory"])
@pytest.mark.parametrize("key", ["", "#model"])
def test_a_checkpoint_and_a_key_say_what_the_weights_say(root, run, key):
    name = {"convnet": "timm:test_resnet", "transformer": f"timm:{NAME}", "factory": FACTORY}[run]
    (checkpoint,) = (root / run / "checkpoints").glob("*.pt")
    assert read_facts(f"{checkpoint}{key}") == read_facts(weights(root, run))
    assert class_names(f"{checkpoint}{key}") == CLASSES
    images = torch.randn(4, 3, 32, 32)
    expected = load_teacher(f"{name}@{weights(root, run)}", num_classes=10)
    teacher = load_teacher(f"{name}@{checkpoint}{key}", num_classes=10)
    assert (teacher.mean, teacher.class_names) == (MEAN, CLASSES)
    assert type(teacher.model) is type(expected.model)  # the head that was trained
    assert torch.equal(teacher(images), expected(images))


def test_a_prefix_in_a_safetensors_file_keeps_its_facts(root, tmp_path):
    path = tmp_path / "w.safetensors"
    with safe_open(weights(root, "convnet"), "pt") as file:
        texts = file.metadata()
    state = load_file(weights(root, "convnet"))
    texts = {key: texts[key] for key in (FACTS_KEY, "identity")}
    save_file({f"net.{key}": value for key, value in state.items()}, path, texts)
    assert load_teacher(f"timm:test_resnet@{path}#net").mean == MEAN
    assert class_names(f"{path}#net") == CLASSES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "test_resnet"}', "facts about the model lack args"),
        ('{"name"', "facts about the model is damaged"),
        ('{"name": 1, "args": [], "image_size": 32, "mean": [], "std": [], "classes": []}', "name"),
    ],
)
def test_damaged_facts_are_refused(root, tmp_path, text, message):
    save_file(load_file(weights(root, "convnet")), tmp_path / "w.safetensors", {FACTS_KEY: text})
    with pytest.raises(InputError, match=message) as error:
        load_teacher(f"timm:test_resnet@{tmp_path}/w.safetensors")
    assert "\n" not in str(error.value)


def test_another_programs_text_under_the_same_key_is_no_fact(root, tmp_path):
    save_file(load_file(weights(root, "convnet")), tmp_path / "w.safetensors", {FACTS_KEY: "mine"})
    assert read_facts(tmp_path / "w.safetensors") is None


def test_another_architecture_than_the_files_is_refused(root, caplog):
    path = weights(root, "transformer")
    with pytest.raises(InputError, match=f"is of the model {NAME}, the teacher names vit_tiny"):
        load_teacher(f"timm:vit_tiny_patch16_224@{path}")
    caplog.set_level(logging.INFO, "deit_fast")
    factory = f"test_teacher_facts:ten_classes@{weights(root, 'convnet')}"
    teacher = load_teacher(factory, num_classes=10, image_size=32)
    assert "its weights file is of the model test_resnet" in caplog.text
    assert (teacher.mean, teacher.std) == (MEAN, STD)  # the file is believed, not the views


def ten_classes(num_classes: int) -> torch.nn.Module:
    return timm.create_model("test_resnet", num_classes=num_classes)


def test_flags_say_what_a_file_does_not_and_may_not_contradict_it(root, tmp_path, caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    path = _without_facts(weights(root, "convnet"), tmp_path / "w.safetensors")
    spec = f"timm:test_resnet@{path}"
    assert load_teacher(spec).mean == (0.5, 0.5, 0.5)
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5 of timm's entry are assumed" in caplog.text
    assert "its file does not say; --teacher-mean R G B" in caplog.text
    given = student(root, teacher=spec, teacher_mean=MEAN, teacher_std=STD)
    assert load_class_matched_teacher(given, CLASSES).mean == MEAN
    said = given.replace(teacher=f"timm:test_resnet@{weights(root, 'convnet')}")
    assert load_class_matched_teacher(said, CLASSES).mean == MEAN  # they agree
    with pytest.raises(InputError, match=r"file says mean 0\.3 .* say mean 0\.4 .*: omit them"):
        load_class_matched_teacher(said.replace(teacher_mean=(0.4, 0.5, 0.5)), CLASSES)
    with pytest.raises(InputError, match="teacher_mean and teacher_std go together"):
        load_class_matched_teacher(given.replace(teacher_std=None), CLASSES)


class WithEmbedding(torch.nn.Module):
    """Logits, and an embedding that is as wide as a subset of the classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = small_convnet(num_classes, 4)

    def forward(self, images):
        embedding = images.mean((2, 3)).repeat(1, 2)[:, :4]
        return embedding, self.net(images)


def test_the_classes_of_the_file_say_which_output_is_the_logits(tmp_path):
    config = digits_student().replace(
        model={"name": f"{__name__}:WithEmbedding", "args": ()}, view={"image_size": 32}
    )
    texts = {
        "identity": json.dumps({"data.classes": CLASSES}),
        FACTS_KEY: facts_text(config, CLASSES),
    }
    path = tmp_path / "w.safetensors"
    save_weights(path, WithEmbedding(10).state_dict(), texts)
    teacher = load_teacher(f"{__name__}:WithEmbedding@{path}", num_classes=4, image_size=32)
    assert teacher(torch.rand(2, 3, 32, 32)).shape == (2, 10)


# ---------------------------------------------------------------------------------------------
# Weights of earlier versions
# ---------------------------------------------------------------------------------------------


def _of_the_first_version(root: Path, copy: Path, classes: list[str]) -> Path:
    """A run whose weights say nothing of themselves; its result has the names of the classes."""
    copy.mkdir()
    (copy / "result.json").write_text(json.dumps({"top1": 0.5, "classes": classes}))
    return _without_facts(weights(root, "factory"), copy / "model.safetensors")


@pytest.mark.parametrize("kind", ["identity", "result", "checkpoint"])
def test_a_factory_gets_the_classes_that_the_file_or_its_run_names(root, tmp_path, kind):
    """Three of the file's ten classes, in another order."""
    run = tmp_path / "run"
    path = _of_the_first_version(root, run, CLASSES)
    state = load_file(path)
    if kind == "identity":
        (run / "result.json").unlink()
        save_weights(path, state, {"identity": json.dumps({"data.classes": CLASSES})})
    if kind == "checkpoint":
        (run / "checkpoints").mkdir()
        path = run / "checkpoints/step-000000001.pt"
        torch.save({"format": 1, "model": state}, path)
    teacher = load_class_matched_teacher(student(root, teacher=f"{FACTORY}@{path}"), ["7", "2"])
    assert teacher.class_names == CLASSES and teacher.columns.tolist() == [7, 2]


def test_names_beside_a_file_count_only_where_the_run_wrote_both(root, tmp_path):
    path = _of_the_first_version(root, tmp_path / "run", CLASSES)
    assert class_names(path) == CLASSES
    other = path.with_name("teacher.safetensors")
    path.rename(other)
    assert class_names(other) is None
    other.rename(path)
    result = {"classes": CLASSES, "weights": {"model.safetensors": "0" * 64}}
    path.with_name("result.json").write_text(json.dumps(result))
    assert class_names(path) is None  # the weights of that version name their classes themselves


def test_another_number_of_classes_names_the_flag(root, tmp_path):
    path = _without_facts(weights(root, "factory"), tmp_path / "w.safetensors")
    chosen = student(root, teacher=f"{FACTORY}@{path}")
    with pytest.raises(InputError, match=r"is \(10, 64\) there, \(2, 64\) in .*--teacher-classes"):
        load_class_matched_teacher(chosen, ["7", "2"])
    lines = tmp_path / "classes.txt"
    lines.write_text("\n".join(CLASSES))
    teacher = load_class_matched_teacher(chosen.replace(teacher_classes=str(lines)), ["7", "2"])
    assert teacher.columns.tolist() == [7, 2]
    state = load_file(path)
    name = next(name for name, value in state.items() if value.dim() == 4)
    save_file(state | {name: state[name][:, :1].contiguous()}, path)
    with pytest.raises(InputError) as caught:  # another tensor than a head
        load_class_matched_teacher(chosen, CLASSES)
    assert "--teacher-classes" not in str(caught.value)
