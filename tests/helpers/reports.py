"""Run folders as `train` and `analyze` leave them, and what a page shows."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from deit_fast.config import RunConfig
from deit_fast.config_file import to_dict

VOID = {"meta", "img", "br"}


def make_run(folder: Path, kind: str = "soft", top1: float | None = 0.9, **result: Any) -> Path:
    """A finished run of three epochs with four steps each."""
    folder.mkdir(parents=True)
    config = RunConfig(epochs=3, output=str(folder), seed=result.get("seed", 0))
    config = config.replace(loss={"kind": kind}, data={"root": result.get("root")})
    rows: list[dict[str, Any]] = []
    for epoch in (1, 2, 3):
        for step in (4 * epoch - 2, 4 * epoch):
            rows.append(
                {"kind": "train", "step": step, "epoch": epoch, "loss": 3 / step,
                 "images_per_s": 100 + step, "data_wait": 0.1, "time": 1.0}
            )  # fmt: skip
        accuracy = (top1 or 0.0) * epoch / 3
        rows.append(
            {"kind": "eval", "step": 4 * epoch, "epoch": epoch, "top1": accuracy, "loss": 1.0}
        )
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "top1": top1,
        "best_top1": top1,
        "best_epoch": 3,
        "per_class": {"cat": 0.75, "dog": 0.5},
        "steps": 12,
        "epochs": 3,
        "images_per_s": 1234.0,
        "substituted": ["a.jpg"],
        "distill": kind,
        "teacher": {"from": "cache", "teacher.spec": "timm:regnet"} if kind != "none" else None,
        "environment": {"torch": "2.14.1", "device": "CPU"},
        "command": f"deit-fast train --output {folder.name}",
        **result,
    }
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def add_analysis(run: Path, **changes: Any) -> Path:
    """What `deit-fast analyze` leaves in the folder of a distilled run."""
    curve = {
        "ece": 0.0725,
        "bins": [
            {"low": 0.2, "high": 0.3, "count": 40, "confidence": 0.25, "accuracy": 0.5},
            {"low": 0.5, "high": 0.6, "count": 9, "confidence": 0.55, "accuracy": 0.125},
            {"low": 0.9, "high": 1.0, "count": 60, "confidence": 0.95, "accuracy": 1.0},
        ],
    }
    spread = {"mean": 0.75, "std": 0.125, "min": 0.5, "max": 1.0}
    layers = [("input", 0.0625), ("block 1", 0.5), ("block 2", 0.9375), ("final norm", 0.875)]
    temperatures = [
        {"temperature": t, "entropy": t / 2, "uniform_share": t / 4, "mass": {"1": 1 / t, "5": 1.0}}
        for t in (1.0, 2.0)
    ]
    own = [
        {"temperature": t, "entropy": 1.0, "classes": [{"name": "cat", "probability": 0.625 / t}]}
        for t in (1.0, 2.0)
    ]
    content = {
        "format": 1,
        "accuracy": {"class": 0.8125, "distillation": 0.8375, "sum_logits": 0.8625},
        "calibration": {"class": curve, "distillation": curve, "sum_logits": curve},
        "tokens": {
            "learned": 0.03125,
            "layers": [{"name": n, "mean": m, "std": 0.25} for n, m in layers],
        },
        "heads": {"weight_cosine": spread, "agreement": 0.955, "probability_cosine": spread},
        "disagreement": {
            "names": ["truth", "teacher", "both"],
            "shares": [[0.0, 0.171, 0.166], [0.171, 0.0, 0.102], [0.166, 0.102, 0.0]],
        },
        "teacher": {
            "spec": "timm:regnet",
            "top1": 0.829,
            "calibration": curve,
            "temperatures": temperatures,
            "sample": {"id": 17, "path": "x.jpg", "label": "dog", "temperatures": own},
        },
        "attention": {
            "tiles": ["image", "class token", "distillation token"],
            "samples": [{"id": 17, "label": "dog", "picture": "attention-17.png"}],
        },
        "left_out": {"undistilled": "no run with loss.kind none was given"},
        **changes,
    }
    (run / "analysis").mkdir()
    (run / "analysis/analysis.json").write_text(json.dumps(content))
    Image.new("RGB", (480, 160), "teal").save(run / "analysis/attention-17.png")
    return run


class Checker(HTMLParser):
    """Balanced tags, and the text and attributes that were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def words(page: str) -> str:
    return " ".join(" ".join(check(page).text).split())


def shown_settings(page: str) -> list[str]:
    table = page.split('<table class="text code">')[1].split("</table>")[0]
    return re.findall(r'<th scope="row">(.*?)</th>', table)
