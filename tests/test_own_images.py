"""README and the page about own images, word by word: from JPEGs to a student in use.

Every command runs as it is printed. Ours are the folders that it names, ten classes of small JPEGs,
and the weights that timm would download: random ones with 1000 classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast import cli
from deit_fast.models.weights import load_weights
from helpers.hub import use_hub, write_pretrained
from helpers.images import write_photographs
from helpers.pages import OWN_IMAGES, PAGES, Shell, run_page

pytestmark = pytest.mark.slow
PRETRAINED = ("regnety_016.tv2_in1k", "deit_tiny_distilled_patch16_224.fb_in1k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """The working folder of a person who follows README and then the page."""
    folder = tmp_path_factory.mktemp("own")
    write_photographs(folder / "IMAGES/train", classes=10, each=4)
    write_photographs(folder / "IMAGES/val", classes=10, each=2, seed=1)
    write_photographs(folder / "NEW_IMAGES", classes=2, each=2, seed=2)
    write_photographs(folder / "ALL_IMAGES", classes=2, each=6, seed=3)
    write_pretrained(folder / "hub", *PRETRAINED)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def done(folder) -> Path:
    """``folder`` after all commands of both pages."""
    with pytest.MonkeyPatch.context() as patch:
        use_hub(folder / "hub", patch)
        for name in OWN_IMAGES:
            (page,) = (page for page in PAGES if page.name == name)
            run_page(page, Shell(patch, literal=True))
    return folder


def test_the_teacher_has_the_classes_of_the_images(done):
    weights = load_weights(done / "runs/teacher/model.safetensors")
    assert weights["head.fc.weight"].shape[0] == 10
    result = json.loads((done / "runs/teacher/result.json").read_text())
    assert result["classes"] == [f"class_{label}" for label in range(10)]


def test_the_student_learned_from_the_cache(done):
    result = json.loads((done / "runs/student/result.json").read_text())
    assert result["distill"] == "hard" and result["steps"] == 4
    assert (done / "runs/student/report.html").stat().st_size > 10_000


def test_the_images_without_a_split_got_one(done):
    counts = {split: len(list((done / "SPLIT_IMAGES" / split).rglob("*.jpg")))
              for split in ("train", "val")}  # fmt: skip
    assert counts == {"train": 8, "val": 4}


def test_the_exported_file_gives_the_answers_of_predict(done, capsys):
    """ONNX Runtime on the file, the engine on the run: names and probabilities."""
    onnxruntime = pytest.importorskip("onnxruntime")
    import deit_fast

    assert cli.main(["predict", "runs/student", "NEW_IMAGES", "--top", "3", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (path,) = (done / "runs/student/export").glob("*.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    student = deit_fast.load_student("runs/student", device="cpu")
    from PIL import Image

    images = torch.stack([student.transform(Image.open(row["path"])) for row in answers]).numpy()
    (logits,) = session.run(["logits"], {"images": images})
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    assert len(answers) == 4
    for row, found in zip(answers, probabilities, strict=True):
        order = np.argsort(-found)[:3]
        assert [student.classes[label] for label in order] == row["names"]
        assert np.allclose(found[order], row["probabilities"], atol=1e-4)
