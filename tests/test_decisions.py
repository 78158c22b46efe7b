"""The decisions about the held-out images: collected, counted, chosen, and left by a run."""

from __future__ import annotations

import base64
import io
from collections import Counter

import numpy as np
import torch
from PIL import Image

from deit_fast.decisions import Decisions, Rows, describe_decisions, join_rows
from deit_fast.runtime.files import read_json
from deit_fast.tools.analysis.runs import analyze
from deit_fast.training.loop import train
from helpers.runs import run_config


class Tiles:
    """A source of grey images; the last one cannot be read."""

    def __init__(self, classes: list[str], count: int, size: int = 200) -> None:
        self.classes, self.count, self.size = classes, count, size
        self.paths = [f"tiles/{index}.jpg" for index in range(count)]

    def load(self, index: int) -> np.ndarray:
        if index == self.count - 1:
            raise OSError("no such tile")
        return np.full((self.size, self.size // 2, 3), index, np.uint8)


def rows_of(labels: list[int], decisions: list[int], confidences: list[float]) -> Rows:
    ids = np.arange(len(labels))
    sure = np.array(confidences, np.float32)
    return Rows(ids, np.array(labels), np.array(decisions), sure, (1 - sure) / 2)


def test_batches_of_logits_become_rows_and_processes_are_joined() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    labels, ids = torch.tensor([0, 1, 1]), torch.tensor([4, 5, 6])
    parts = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 3)):
        collected = Decisions()
        if len(ids[part]):
            collected.add(ids[part], labels[part], logits[part].bfloat16())
        parts.append(collected.rows())
    rows = join_rows(parts)
    assert rows.ids.tolist() == [4, 5, 6] and rows.decisions.tolist() == [0, 2, 1]
    probabilities = logits.softmax(1)
    np.testing.assert_allclose(rows.confidences, probabilities.max(1).values, rtol=1e-6)
    np.testing.assert_allclose(rows.label_probabilities, probabilities[range(3), labels])


def test_the_surest_mistakes_come_first_and_no_class_fills_the_page() -> None:
    labels = [0] * 12 + [1, 2, 2]
    decisions = [1] * 8 + [2] * 4 + [0, 2, 1]
    sure = [0.99 - index / 100 for index in range(12)] + [0.5, 0.9, 0.3]
    found = describe_decisions(rows_of(labels, decisions, sure), Tiles(["a", "b", "c"], 15))
    assert found["confusion"] == ["1:8 2:4", "0:1", "1:1 2:1"]
    assert found["mistakes"] == ["0", "1", "2", "8", "9", "12", "14"]  # 3 of a pair, 5 of a class
    assert found["images"] == 15 and "agreed" not in found and len(found["grid"]) == 12
    first, last = found["examples"]["0"], found["examples"]["14"]
    assert first | {"picture": ""} == {
        "file": "tiles/0.jpg", "label": "a", "prediction": "b", "confidence": 0.99,
        "label_probability": 0.005, "picture": "",
    }  # fmt: skip
    with Image.open(io.BytesIO(base64.b64decode(first["picture"]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (48, 96))
    assert "picture" not in last  # it cannot be read


def test_the_teacher_may_agree_with_a_mistake() -> None:
    rows = rows_of([0, 0, 1, 1], [1, 1, 1, 0], [0.6, 0.7, 0.9, 0.8])
    teacher = np.array([1, 0, 1, 0]), np.array([0.9, 0.9, 0.9, 0.95], np.float32)
    found = describe_decisions(rows, Tiles(["a", "b"], 4), teacher)
    assert found["agreed"] == ["3", "0"] and found["mistakes"] == ["3", "1", "0"]
    assert found["examples"]["1"]["teacher"] == "a"
    assert found["examples"]["3"]["teacher_confidence"] == 0.95


def test_a_run_and_its_analysis_leave_the_decisions_that_evaluation_counts(world, tmp_path) -> None:
    teacher = f"deit_fast.models.convnet:small_convnet@{world}/teacher.safetensors"
    result = train(run_config(world, tmp_path, max_steps=3, loss={"kind": "soft"}))
    assert result["parameters"] > 20_000 and result["forward_flops"] > 40_000
    analyze([tmp_path], teacher=teacher, maps=0)
    digest = result["weights"]["model.safetensors"]
    for file in ("predictions.json", "analysis/predictions.json"):
        found = read_json(tmp_path / file)
        assert found["weights_digest"] == digest and found["images"] == result["samples"]
        cells = Counter[tuple[int, int]]()
        for label, row in enumerate(found["confusion"]):
            for cell in row.split():
                decision, count = map(int, cell.split(":"))
                cells[label, decision] += count
        assert sum(cells.values()) == result["samples"]
        right = sum(count for (label, decision), count in cells.items() if label == decision)
        assert abs(right / result["samples"] - result["top1"]) < 1e-6
        shown = [found["examples"][key] for key in found["mistakes"]]
        assert shown and all(row["label"] != row["prediction"] for row in shown)
        assert all(f"/val/{row['label']}/" in row["file"] for row in found["examples"].values())
        assert all("picture" in row for row in found["examples"].values())
    assert "agreed" in found and "teacher" in found["examples"][found["grid"][0]]
