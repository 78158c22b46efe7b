"""The main job, whole: `deit-fast demo` as a person runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from deit_fast.tools.demo import demo, write_digits


def test_digits_become_an_image_folder_without_loss(tmp_path):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    write_digits(tmp_path)
    paths = sorted(tmp_path.rglob("*.png"), key=lambda path: path.stem)
    assert len(paths) == len(digits.images) == 1797
    for path, image, label in zip(paths, digits.images, digits.target, strict=True):
        assert int(path.parent.name) == label
        assert np.array_equal(np.round(np.asarray(Image.open(path), float) * 16 / 255), image)
    share = {split: len(list((tmp_path / split).rglob("*.png"))) for split in ("train", "val")}
    assert share == {"train": 602, "val": 1195}


@pytest.mark.slow
def test_distilled_students_beat_their_undistilled_twin(tmp_path):
    """Measured gain over three seeds: bench/results/cpu/demo-*.json."""
    files = {"save": tmp_path / "result.json", "save_analysis": tmp_path / "analysis.json"}
    result = demo(tmp_path / "demo", **files)
    (row,) = result["rows"]
    assert row["teacher"] > 0.97
    assert result["gain"] >= 3, row
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["rows"] == result["rows"] and saved["meta"]["torch"]
    page = (tmp_path / "demo/report.html").read_text()
    for kind in ("none", "hard", "soft"):
        assert f"{100 * row[kind]:.2f}" in page
    assert "Teacher-student agreement" in page and "Attention maps" in page
    analysis = json.loads((tmp_path / "analysis.json").read_text())
    assert [found["distillation"] for found in analysis["rows"]] == ["none", "hard", "soft"]
    for found in analysis["rows"]:
        assert found["top1"] == pytest.approx(row[found["distillation"]], abs=1e-6)
        assert found["teacher_top1"] > 0.97
    better, _, alike = analysis["observations"]
    assert better["holds"] == alike["holds"] == 2, analysis["observations"]
    assert len(result["observed"]) == 3 and "in 2 of 2 runs" in result["observed"][0]
    logs = {path: path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    blocks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.dlc")}
    assert len(logs) == 4 and blocks
    assert demo(tmp_path / "demo", **files)["rows"] == result["rows"]
    assert all(path.read_text() == log for path, log in logs.items()), "a step was made again"
    assert all(path.stat().st_mtime_ns == time for path, time in blocks.items())
