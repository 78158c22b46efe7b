"""A student in use gives the logits that `evaluate` measured, from its weights file alone."""

from __future__ import annotations

import csv
import json
import re
import shutil
from functools import partial
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
from deit_fast.cli import main
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import build_eval_loader, evaluate, load_run
from deit_fast.models.student import forward_heads, mean_logits, top_classes
from deit_fast.models.weights_facts import FACTS_KEY
from deit_fast.recipes import digits_student
from deit_fast.runtime.weights_header import WEIGHTS_FILES, WeightsChoice
from deit_fast.training.loop import train
from helpers.images import odd_files, write_split

# Bits are compared, which depend on the device.
load_student = partial(deit_fast.load_student, device="cpu")
predict = partial(deit_fast.predict, device="cpu")
MEAN, STD = (0.3, 0.4, 0.6), (0.2, 0.3, 0.7)
ARGS = ("patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")
RUNS: dict[str, dict[str, Any]] = {
    "both": {"loss": {"kind": "soft", "alpha": 0.1}, "teacher_floor": 0.0,
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
    torch.manual_seed(5)  # of the teacher
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
    student = load_student(file)
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
    student = load_student(root / "both")
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
    student = load_student(root / "both", weights="ema")
    assert student.path == root / "both" / WEIGHTS_FILES["ema"]
    torch.testing.assert_close(student(paths), expected.softmax(1))
    last = load_student(root / "both")
    assert not torch.equal(last(paths), student(paths))
    (checkpoint,) = (root / "both" / "checkpoints").glob("*.pt")
    assert torch.equal(load_student(f"{checkpoint}#model")(paths), last(paths))


def test_a_run_without_the_chosen_weights_is_one_clear_line(root, tmp_path):
    def message(run: Path, **options: Any) -> str:
        with pytest.raises(InputError) as error:
            load_student(run, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    run = tmp_path / "run"
    run.mkdir()
    assert "is no run folder" in message(run)
    shutil.copy(root / "both" / "config.json", run)
    assert "has not finished: run its train command again, or name one of its" in message(run)
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
    student = load_student(old)
    assert student.transform.crop == 0.875
    images = torch.randn(2, 3, 32, 32)
    expected = load_student(path).logits(images)
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
        load_student(path)
    images = torch.randn(2, 3, 32, 32)
    expected = load_student(root / "convnet").logits(images)
    assert torch.equal(load_student(path, model=mine).logits(images), expected)


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
        load_student(path)(Image.new("RGB", (40, 40)))


# ---------------------------------------------------------------------------------------------
# predict
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_predictions_are_those_that_evaluate_counts(root, workers):
    """Bit for bit, in the order of the held-out images."""
    run, val = root / "both", root / "data" / "val"
    expected, paths = evaluated(run)
    found = predict(run, val, top=2, batch_size=20, workers=workers)
    assert [item.path for item in found] == paths
    best = expected.softmax(1).topk(2)
    assert [item.probabilities for item in found] == [*map(tuple, best.values.tolist())]
    classes = load_student(run).classes
    assert [item.names for item in found] == [
        tuple(classes[label] for label in row) for row in best.indices.tolist()
    ]
    right = [item.names[0] == Path(item.path).parent.name for item in found]
    assert sum(right) / len(right) == pytest.approx(evaluate(str(run), device="cpu")["top1"])
    assert 0 < sum(right) < len(right)


def test_of_equal_logits_the_class_is_that_of_evaluate(root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(root / "both", run)
    weights = load_file(run / "model.safetensors")
    with safe_open(run / "model.safetensors", "pt") as file:
        texts = {key: text for key, text in file.metadata().items() if key == FACTS_KEY}
    for name in ("head", "head_dist"):
        weights[f"{name}.weight"].zero_()
        weights[f"{name}.bias"].zero_()
    save_file(weights, run / "model.safetensors", metadata=texts)
    student = load_student(run)
    found = predict(student, root / "data" / "val", top=3)
    assert {item.names for item in found} == {student.classes[:3]}
    assert top_classes(torch.zeros(2, 40), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_folders_are_searched_and_files_keep_their_order(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = root / "data" / "val" / "class0" / "000.jpg"
    for name in ("b/z.jpg", "b/deep/a.PNG", "b/.hidden.jpg", "b/.git/x.jpg", "b/notes.txt", "last"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, name)
    Path("b/deep/again").symlink_to(tmp_path / "b")
    student = load_student(root / "class")
    found = predict(student, ["last", Path("b"), "last"])
    assert [item.path for item in found] == ["last", "b/z.jpg", "b/deep/a.PNG", "last"]
    (single,) = predict(student, "last", top=1)
    assert len(found[0].names) == 3 and single.names == found[0].names[:1]
    assert sum(found[0].probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    ("images", "message"),
    [(["nowhere.jpg"], "image nowhere.jpg does not exist"), (["empty"], "no image in empty; "),
     ([], "no image was given")],
    ids=["missing", "empty", "none"],
)  # fmt: skip
def test_no_image_is_one_clear_line(root, tmp_path, monkeypatch, images, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        predict(root / "class", images)


@pytest.fixture
def pictures(root, tmp_path, monkeypatch) -> list[str]:
    """Five files, the second and the last two of which are no images; one has an odd name."""
    monkeypatch.chdir(tmp_path)
    names = ["in/a.jpg", "in/b.jpg", "in/c\n\udcff.jpg", "in/d.jpg", "in/e.jpg"]
    Path("in").mkdir()
    for name in names:
        shutil.copy(root / "data" / "val" / "class0" / "000.jpg", name)
    for name in (names[1], *names[3:]):
        Path(name).write_bytes(b"no image")
    return names


def test_unreadable_images_are_left_out_with_a_warning(root, pictures, caplog):
    found = predict(root / "both", "in", batch_size=3)  # the last batch has none
    assert [item.path for item in found] == [pictures[0], pictures[2]]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"cannot read image {pictures[index]}" for index in (1, 3, 4)
    ]


def test_the_verb_prints_lines_that_a_person_reads(root, pictures, capsys, caplog):
    assert main(["predict", str(root / "both"), "in", "--top", "2", "--device", "cpu"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert (first[:18], second[:18]) == ("in/a.jpg          ", r"in/c\n\udcff.jpg  ")
    assert first[18:] == second[18:]
    assert re.fullmatch(r"class\d +\d+\.\d %  class\d +\d+\.\d %", first[18:])
    lines = [line for line in caplog.messages if "cannot" in line]
    assert lines[0].startswith("cannot read image in/b.jpg: ")
    assert lines[-1] == "3 of 5 images cannot be read" and len(lines) == 4


def test_the_verb_writes_exact_names_for_programs(root, pictures, capsys):
    run = str(root / "both")
    expected = predict(run, [pictures[0], pictures[2]], batch_size=64)
    capsys.readouterr()
    assert main(["predict", run, pictures[0], pictures[2], "--json", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [pictures[0], pictures[2]]
    assert [(row["names"], row["probabilities"]) for row in rows] == [
        ([*item.names], [*item.probabilities]) for item in expected
    ]
    assert main(["predict", run, pictures[0], "--csv", "--top", "2", "--device", "cpu"]) == 0
    rows = [*csv.reader(capsys.readouterr().out.splitlines())]
    assert rows[0] == ["path", "rank", "name", "probability"]
    pairs = zip("12", expected[0].names, map(str, expected[0].probabilities), strict=False)
    assert rows[1:] == [[pictures[0], *pair] for pair in pairs]


@pytest.mark.parametrize(
    ("words", "message"),
    [("RUN", "needs an image or a folder"), ("RUN in --json --csv", "choose one"),
     ("nowhere in", "weights file nowhere does not exist"),
     ("RUN nowhere", "image nowhere does not exist")],
    ids=["no-image", "two-forms", "no-run", "no-such-image"],
)  # fmt: skip
def test_wrong_words_are_one_line(root, pictures, capsys, words, message):
    assert main(["predict", *words.replace("RUN", str(root / "both")).split()]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
