"""An exported student gives, in the program that it is for, the logits that `evaluate` measured."""

from __future__ import annotations

import json
import logging
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

import deit_fast
from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict
from deit_fast.errors import CheckFailed, InputError
from deit_fast.evaluation import build_eval_loader, load_run
from deit_fast.models.student import build_model, forward_heads, mean_logits
from deit_fast.models.weights import save_weights
from deit_fast.models.weights_facts import FACTS_KEY, facts_text
from deit_fast.runtime.weights_header import HEAD_KEY
from deit_fast.tools.export import formats, parity
from deit_fast.training.loop import train
from helpers.digits import write_few_digits
from helpers.images import picture
from helpers.runs import run_config

MEAN, STD, CROP, SIZE = (0.3, 0.4, 0.6), (0.2, 0.3, 0.7), 0.8, 16
FORMATS = ("timm", "onnx", "torch", "hf")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    write_few_digits(root / "data")
    train(settings(root).replace(optim={"ema_decay": 0.5}))
    return root


def settings(root: Path, **changes: Any) -> RunConfig:
    config = run_config(root, root / "run").replace(
        teacher="deit_fast.models.convnet:small_convnet", teacher_floor=0.0, epochs=1,
        data={"eval_crop": CROP}, view={"mean": MEAN, "std": STD}, loss={"kind": "hard"},
    )  # fmt: skip
    return config.replace(**changes)


@pytest.fixture(scope="module")
def evaluated(root: Path) -> tuple[Tensor, Tensor]:
    """The held-out images and the logits that `evaluate` computes."""
    config, source, model = load_run(root / "run")
    loader = build_eval_loader(config, source, torch.device("cpu"))
    images = torch.cat([images for images, _, _ in loader])
    with torch.no_grad():
        return images, mean_logits(*forward_heads(model.eval(), images))


@pytest.fixture(scope="module")
def exported(root: Path) -> dict[str, deit_fast.tools.export.exporting.ExportResult]:
    return {name: deit_fast.export(root / "run", format=name) for name in FORMATS}


def close(logits: Any, expected: Tensor) -> bool:
    return bool((torch.as_tensor(logits) - expected).abs().max() < 2e-6 * expected.abs().max())


# ---------------------------------------------------------------------------------------- formats


def test_timm_builds_the_student_from_the_line_that_export_prints(exported, evaluated, root):
    result = exported["timm"]
    assert result.path == root / "run" / "export" / "student.safetensors"
    images, expected = evaluated
    with torch.no_grad():
        model = eval(result.load, {"timm": timm}).eval()
        assert close(model(images), expected)
    again = deit_fast.load_student(result.path)  # ours too, from the same file
    assert again.classes == tuple("0123456789") and again.mean == MEAN
    assert torch.equal(again.logits(images), expected)
    with safe_open(result.path, "pt") as file:
        texts = file.metadata()
    assert texts["format"] == "pt"
    assert not any(".png" in text for text in texts.values()), "names of the run's images"


def test_onnxruntime_gives_the_logits_of_evaluate(exported, evaluated):
    path = exported["onnx"].path
    images, expected = evaluated
    session = onnxruntime.InferenceSession(str(path))
    assert [(x.name, x.shape) for x in session.get_inputs()] == [
        ("images", ["batch", 3, SIZE, SIZE])
    ]
    assert [(x.name, x.shape) for x in session.get_outputs()] == [("logits", ["batch", 10])]
    for size in (1, 7, len(images)):
        [logits] = session.run(None, {"images": images[:size].numpy()})
        assert close(logits, expected[:size])
        assert (logits.argmax(1) == expected[:size].argmax(1).numpy()).all()
    facts = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert json.loads(facts["classes"]) == list("0123456789")
    assert json.loads(facts["mean"]) == [*MEAN] and facts["image_size"] == str(SIZE)
    assert facts["crop_pct"] == str(CROP)
    assert not [*path.parent.glob("*.data")], "weights beside the file"


def test_the_guides_program_without_torch_gives_what_predict_gives(exported, root, monkeypatch):
    """Its steps from file to probabilities, on a picture that is resized and cropped."""
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    [program] = re.findall("```python\n(.*?)```", page, re.S)
    assert "import torch" not in program
    monkeypatch.chdir(root)
    picture(3, 61, 43).save("photo.jpg")
    names: dict[str, Any] = {}
    exec(program.replace("runs/mine", "run"), names)
    pixels = deit_fast.load_student("run").transform(Image.open("photo.jpg"))
    assert np.allclose(names["pixels"].transpose(2, 0, 1), pixels, atol=1e-5)
    [predicted] = deit_fast.predict("run", "photo.jpg", top=10)
    logits = names["logits"][0]
    found = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = found.argsort()[::-1]
    assert [str(index) for index in order] == [*predicted.names]
    assert np.allclose(found[order], predicted.probabilities, atol=1e-4)


def test_a_program_of_torch_export_takes_any_batch(exported, evaluated):
    images, expected = evaluated
    extra = {"deit_fast.json": ""}
    program = torch.export.load(exported["torch"].path, extra_files=extra).module()
    for size in (1, 7, len(images)):
        assert close(program(images[:size]).detach(), expected[:size])
    assert json.loads(extra["deit_fast.json"])["torch"] == torch.__version__


@pytest.mark.parametrize("name", FORMATS)
def test_no_path_of_this_machine_is_in_an_export(exported, name):
    result = exported[name]
    files = [*result.path.iterdir()] if name == "hf" else [result.path, result.figures]
    private = [str(Path(timm.__file__).parent.parent), str(result.path.parent)]
    for file in files:
        parts = [file.read_bytes()]
        if name == "torch" and file == result.path:
            with zipfile.ZipFile(file) as archive:
                parts = [archive.read(item) for item in archive.namelist()]
        for path in private:
            assert not any(path.encode() in part for part in parts), file


def test_timm_reads_the_folder_with_its_pixels(exported, evaluated, root):
    folder = exported["hf"].path
    images, expected = evaluated
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(images)
        same = eval(exported["timm"].load, {"timm": timm}).eval()(images)
    assert close(logits, expected) and torch.equal(logits, same)
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, SIZE, SIZE) and config["crop_pct"] == CROP
    assert tuple(config["mean"]) == MEAN and tuple(config["std"]) == STD
    assert model.pretrained_cfg["label_names"] == list("0123456789")
    assert model.pretrained_cfg["tag"] == "deit_fast" and not model.pretrained_cfg.get("license")
    ours = deit_fast.load_student(folder / "model.safetensors").transform
    image = picture(1, 61, 43)
    assert torch.allclose(create_transform(**config)(image), ours(image), atol=1e-6)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert other.head.out_features == other.head_dist.out_features == 5


def test_the_model_card_says_what_is_known_and_marks_what_is_not(exported, root, monkeypatch):
    text = (exported["hf"].path / "README.md").read_text()
    result = json.loads((root / "run" / "result.json").read_text())
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "timm" and "license" not in card and "Not given." in body
    metrics = card["model-index"][0]["results"][0]["metrics"]
    keys = ("top1", "top1_class", "top1_distill")
    assert [metric["value"] for metric in metrics] == [result[key] for key in keys]
    for key in keys:
        assert f"{100 * result[key]:.2f} %" in body
    assert "on 100 held-out images" in body and "pretrained=True" in body
    assert body.count("**To be filled in:**") == 2
    assert "deit_fast.models.convnet:small_convnet" in body
    with_timm, with_ours = re.findall("```python\n(.*?)```", body, re.S)
    assert not re.search("deit_fast", with_timm)
    monkeypatch.chdir(root)
    picture(3, 61, 43).save("photo.jpg")
    names: dict[str, Any] = {}
    exec((with_timm + with_ours).replace("FOLDER", str(exported["hf"].path)), names)
    probabilities = names["student"]("photo.jpg")
    assert torch.allclose(names["logits"].softmax(1), probabilities, atol=1e-5)
    ema = deit_fast.export(root / "run", format="hf", weights="ema", license="mit")
    assert ema.path.name == "student-ema-hf"
    _, front, body = (ema.path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert f"{100 * result['ema_top1']:.2f} %" in body and "class head" not in body
    best = deit_fast.export(root / "run", format="hf", weights="best")
    text = (best.path / "README.md").read_text()
    assert f"{100 * result['best_top1']:.2f} %" in text
    assert "those of the run's best evaluation on the same images" in text


def test_figures_of_the_comparison_stand_beside_the_file(exported):
    for name in FORMATS:
        figures = json.loads(exported[name].figures.read_text())
        assert figures["parity"]["pixels"] == "64 held-out images"
        assert figures["parity"]["batch_sizes"] == [7, 1]
        assert 0 <= figures["parity"]["max_difference"] < 1e-5
        assert figures["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert "onnxruntime" in json.loads(exported["onnx"].figures.read_text())["environment"]


# --------------------------------------------------------------------------------------- students


TEN = [str(digit) for digit in range(10)]
PLAIN = {"name": "deit_tiny_patch16_224"}
STUDENTS: dict[str, dict[str, Any]] = {
    "class head alone": {"loss": {"kind": "none"}},
    "distillation head alone": {"loss": {"kind": "soft", "alpha": 1.0}},
    "no distillation token": {"model": PLAIN},
    "not fused": {"model": {"fused": False}},
    "padded heads": {"model": {"pad_head": True}},
    "bfloat16 residual": {"model": {"residual": "bfloat16"}},
    "other sizes": {"epochs": 6, "num_views": None, "view": {"size_schedule": ((0, 8), (3, 16))}},
    "convolutions": {"model": {"name": "test_resnet", "args": ()}},
    "of a factory": {"model": {"name": "deit_fast.models.convnet:small_convnet", "args": (),
                               "fused": False}},
}  # fmt: skip


def write_student(root: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A weights file as a run writes it, of a student whose weights are all drawn."""
    config = settings(root).replace(model={"drop_path": 0.0}).replace(**changes)
    torch.manual_seed(1)
    model = build_model(config, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    texts = {FACTS_KEY: facts_text(config, TEN)}
    if config.loss.trained_head != "both":
        texts[HEAD_KEY] = config.loss.trained_head
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    save_weights(folder / "model.safetensors", model.state_dict(), texts)
    return folder


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_kind_of_student_is_exported(root, tmp_path, kind, caplog):
    run = write_student(root, tmp_path / "run", STUDENTS[kind])
    student = deit_fast.load_student(run)
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = mean_logits(*forward_heads(student.model, images))
    if kind == "of a factory":
        for name in ("timm", "hf"):
            with pytest.raises(InputError, match="small_convnet: choose --format onnx or torch"):
                deit_fast.export(run, format=name)
        assert not (run / "export").exists()
        program = torch.export.load(deit_fast.export(run, format="torch").path).module()
        assert close(program(images).detach(), expected)
        return
    with caplog.at_level(logging.INFO, "deit_fast"):
        folder = deit_fast.export(run, format="hf").path
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(images)
    if kind == "bfloat16 residual":
        assert torch.allclose(logits, expected, rtol=0, atol=0.02 * expected.abs().max().item())
        assert "rounds its residual stream to bfloat16, the export does not" in caplog.text
        return
    assert close(logits, expected)
    with torch.no_grad():
        again = deit_fast.load_student(folder / "model.safetensors").logits(images)
    assert close(again, expected)
    if "alone" in kind:
        card = (folder / "README.md").read_text()
        assert f"only the {kind.split()[0]} head was trained" in " ".join(card.split())


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["timm", "hf"])
def test_a_student_that_differs_is_not_written(root, tmp_path, monkeypatch, name):
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    output = tmp_path / "new" / "out.safetensors"
    with pytest.raises(CheckFailed, match=r"differs from the run's model: logits by \d.*e-0\d "):
        deit_fast.export(root / "run", format=name, output=output)
    assert not [*tmp_path.iterdir()]


def test_the_comparison_refuses_other_logits_classes_and_not_a_number():
    images = torch.randn(10, 3, 4, 4)
    expected = images.flatten(1)[:, :5]

    def exported(batch: Tensor) -> Tensor:
        return batch.flatten(1)[:, :5]

    same = parity.compare("it", expected, exported, images, "noise")
    assert same.max_difference == 0 and same.same_top1 == same.images == 10
    for wrong in (
        lambda batch: exported(batch) + 0.01,
        lambda batch: exported(batch).flip(1),
        lambda batch: exported(batch) * torch.nan,
        lambda batch: exported(batch)[:, :4],
        lambda batch: exported(batch) + 0.01 * (len(batch) == 1),  # at a batch of 1 alone
    ):
        with pytest.raises(CheckFailed, match="nothing is written"):
            parity.compare("it", expected, wrong, images, "noise")


def test_an_output_that_is_there_is_not_replaced(exported, root, tmp_path):
    for name in FORMATS:
        before = exported[name].figures.read_bytes()
        with pytest.raises(InputError, match="is there already: remove it, or choose another"):
            deit_fast.export(root / "run", format=name)
        assert exported[name].figures.read_bytes() == before
    (tmp_path / "a.pt2.json").write_text("mine")
    with pytest.raises(InputError, match=r"a\.pt2\.json is there already"):
        deit_fast.export(root / "run", format="torch", output=tmp_path / "a.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2.json"]


def test_wrong_requests_name_the_remedy(root, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--license is for the model card of --format hf"):
        deit_fast.export(root / "run", format="timm", license="mit")
    with pytest.raises(InputError, match="format must be one of timm, onnx, torch, hf"):
        deit_fast.export(root / "run", format="pickle")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime: pip install 'deit-fast\[onnx\]'"):
        deit_fast.export(root / "run", format="onnx", output=tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"a file of --format torch ends in \.pt2"):
        deit_fast.export(root / "run", format="torch", output=tmp_path / "a.pt")
    assert not [*tmp_path.iterdir()]


def test_weights_that_an_onnx_file_cannot_hold_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ONNX_BYTES", 50_000)
    with pytest.raises(InputError, match=r"an ONNX file holds 2 GB.*choose --format torch"):
        deit_fast.export(root / "run", format="onnx", output=tmp_path / "new" / "a.onnx")
    assert not [*tmp_path.iterdir()]


def test_without_the_images_the_command_compares_noise_and_says_so(root, tmp_path, capsys, caplog):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((root / "run" / "model.safetensors").read_bytes())
    assert cli.main(["export", str(file), "--format", "timm"]) == 0
    out = capsys.readouterr().out
    assert "compared on noise, not on held-out images" in caplog.text
    assert "images of noise" in out and "export/student-weights.safetensors" in out
