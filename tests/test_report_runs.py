"""The report about several runs: seeds, data sets, losses, cost; and about their mistakes."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deit_fast.errors import InputError
from deit_fast.tools.report.page import build_report, default_page
from deit_fast.tools.report.parts import wilson
from deit_fast.tools.run_folder import read_run
from helpers.reports import check, make_run, shown_settings, words


def test_runs_that_differ_by_their_seed_share_a_row_and_a_headline(tmp_path: Path) -> None:
    """The best of three seeds is 95 %, but the headline is a mean, and so is the gain."""
    scores = {"none": (0.70, 0.74, 0.78), "soft": (0.80, 0.95, 0.86)}
    runs = [
        make_run(tmp_path / f"seed-{seed}" / kind, kind, score, seed=seed, samples=1000)
        for kind, of_kind in scores.items()
        for seed, score in enumerate(of_kind)
    ]
    runs.append(make_run(tmp_path / "lucky", "hard", 0.99, seed=1, samples=1000))
    page = build_report(runs, "t")
    text = words(page)
    for part in (
        "Runs 7 3 settings",
        "Highest top-1 accuracy 87.00 \u00b1 7.55 % soft: mean \u00b1 standard deviation of 3 runs "
        "(seeds 0, 1, 2), n = 1 000 images",
        "Gain by distillation, points +13.00 \u00b1 7.00 soft against none, the same 3 seeds",
        "74.00 \u00b1 4.00 %", "99.00 %",  # one run, not ranked above three
        "84.8 \u2013 88.9 %", "Each run", "seed-1/soft",
    ):  # fmt: skip
        assert part in text, part
    summary = page.split("<tbody>")[1].split("</tbody>")[0]
    assert summary.count("<tr>") == 3 and "<b>87.00 \u00b1 7.55 %</b>" in summary
    assert "opacity: 0.16" in page  # rows, bands
    assert "soft: 87 % at epoch 3" in page and "seed-1/soft: 95 %" not in page
    assert shown_settings(page) == ["seed", "loss.kind"] and "<td>0; 1; 2</td>" in page


def test_runs_may_have_seeds_of_their_views_as_well(tmp_path: Path) -> None:
    """Those of the demo have one with each seed; runs of before had one for both."""
    runs = [make_run(tmp_path / f"seed-{n}", top1=0.8 + n / 50, seed=n) for n in range(3)]
    for views, run in enumerate(runs):
        config = json.loads((run / "config.json").read_text())
        config["view"]["seed"] = views
        if views == 2:
            del config["view"]["seed"]
        (run / "config.json").write_text(json.dumps(config))
    runs.append(make_run(tmp_path / "seed-1-again", top1=0.84, seed=1))
    text = words(build_report(runs[:3], "t"))
    assert "82.00 \u00b1 2.00 % seed-0 and others: mean" in text and "(seeds 0, 1, 2)" in text, text
    text = words(build_report(runs, "t"))
    assert "3 runs" not in text and "(seeds 0/0, 1/1, 2/2, 1/0)" in text


def test_two_runs_of_one_seed_are_two_settings(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, top1=top1) for name, top1 in (("a", 0.5), ("b", 0.7))]
    assert "Highest top-1 accuracy 70.00 % b" in words(build_report(runs, "t"))


def test_runs_on_different_data_are_not_ranked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "easy", "soft", 0.9, root="easy", samples=500)]
    runs += [make_run(tmp_path / kind, kind, top1, root="hard", samples=800)
             for kind, top1 in (("soft", 0.6), ("none", 0.5))]  # fmt: skip
    page = build_report(runs, "t")
    text = words(page)
    assert "<b>90.00 %</b>" not in page and "<b>60.00 %</b>" in page
    assert "Top-1 accuracy 90.00 % easy" in text and "Highest top-1 accuracy 60.00 % soft" in text
    assert "points +10.00 soft against none" in text and "are not compared" in text
    assert "easy, 500 held-out images" in text and text.count("fingerprint") == 4


def test_the_fingerprint_in_the_weights_tells_data_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, top1=0.5) for name in "abcd"]
    for run, digest, pixel in zip(runs, "1121", "xxxy", strict=True):
        images, pixels = {"dataset.sha256": digest}, {"class/0.bmp": pixel}
        identity = json.dumps({
            "data.images": images, "val.images": images, "data.pixels": pixels, "val.pixels": pixels
        })  # fmt: skip
        header = json.dumps({"__metadata__": {"identity": identity}}).encode()
        (run / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    ids = [read_run(run, "r", 0).data_id for run in runs]
    assert ids[0] == ids[1] and len({*ids}) == 3, "names and sizes, and pixels"


def test_wilson_interval_equals_published_values() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998


def test_losses_of_different_formulas_have_charts_of_their_own(tmp_path: Path) -> None:
    runs = []
    for kind in ("none", "hard", "soft"):
        run = make_run(tmp_path / kind, kind)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        extra = {"base_loss": 1.5, "distill_loss": 2.5, "lr": 1e-3, "grad_norm": 4.0}
        if kind != "none":
            extra["agreement"] = 0.625
        rows = [row | extra if row["kind"] == "train" else row for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(run)
    titles = re.findall(
        r"<svg viewBox[^>]*aria-label=\"([^\"]*)\".*?</svg>", build_report(runs, "t")
    )
    assert titles[:8] == [
        "Top-1 accuracy, held-out images",
        "Cross-entropy, held-out images",
        "Training loss against labels (cross-entropy, smoothing 0.1)",
        "Distillation loss (hard: cross-entropy with the teacher's class)",
        "Distillation loss (soft: KL divergence, tau 1, numel)",
        "Teacher-student agreement, training views",
        "Learning rate",
        "Gradient norm",
    ]


def add_predictions(run: Path, classes: int, name: str = "class {}") -> dict[str, Any]:
    """Ten images of each class; three of each are taken for the next class."""
    names = [name.format(index) for index in range(classes)]
    content = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(content, format="jpeg")
    example = {
        "file": f"/data/val/{names[0]}/7.jpg", "label": names[0], "prediction": names[1],
        "confidence": 0.875, "label_probability": 0.0625, "teacher": names[1],
        "teacher_confidence": 0.75, "picture": base64.b64encode(content.getvalue()).decode(),
    }  # fmt: skip
    found = {
        "format": 1, "images": 10 * classes, "classes": names,
        "confusion": [f"{i}:7 {(i + 1) % classes}:3" for i in range(classes)],
        "mistakes": ["7"], "agreed": ["7"], "grid": ["7", "8"],
        "examples": {"7": example, "8": example | {"prediction": names[0]}},
    }  # fmt: skip
    (run / "predictions.json").write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("classes", [3, 20, 40, 101])
def test_confusion_is_a_table_a_picture_or_lists(classes: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    add_predictions(run, classes)
    page = build_report([run], "t")
    text = words(page)
    assert f"images, {3 * classes} mistakes" in text
    assert ("numbers shades confusion" in page) == (classes <= 20)
    assert ("data:image/png" in page) == (20 < classes <= 100)
    assert ("Most confused pairs" in text) == (classes > 20)
    if classes <= 20:
        assert page.count('class="diagonal" style="--w:38.5%') == classes  # 55 % of 7 / 10
        assert "precision 70.0 %" in text
    else:
        assert "class 0 class 1 3 30.0 % 0" in text and "class 0 10 10 70.0 % 70.0 % 70.0 %" in text


def test_mistakes_show_picture_file_and_both_opinions(tmp_path: Path) -> None:
    evil = "<script>alert('{}')</script>"
    run = make_run(tmp_path / "a")
    found = add_predictions(run, 3, evil)
    page = build_report([run], "t")
    checker, text = check(page), words(page)
    assert "script" not in checker.tags and evil.format(2) in text
    assert page.count("data:image/jpeg;base64,") == 4 and page.count('class="tiny"') == 4
    for part in ("7.jpg", f"predicted {evil.format(1)}: 87.5 %", f"label {evil.format(0)}: 6.2 %",
                 f"teacher {evil.format(1)}: 75.0 %", "Teacher and student agree against the label",
                 "of 30 held-out images"):  # fmt: skip
        assert part in text, part
    assert page.count('<li class="right">') == 1
    private = build_report([run], "t", pictures=False)
    assert "data:image" not in private and "7.jpg" in private
    found["examples"]["7"]["picture"] = base64.b64encode(b"<svg onload=alert(1)>").decode()
    (run / "predictions.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"7\.jpg in predictions\.json of a is no JPEG picture"):
        build_report([run], "t")


def test_costs_have_units_and_a_method(tmp_path: Path) -> None:
    facts = {"parameters": 22436432, "forward_flops": 9.2e9, "train_seconds": 28800.0}
    text = words(build_report([make_run(tmp_path / "a", **facts)], "t"))
    for part in ("22.4 M", "9.2 G", "8.0 h", "10.00 %", "FlopCounterMode"):
        assert part in text, part
    assert "Peak memory" not in text  # not measured


def test_a_single_run_gets_its_page_and_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    add_predictions(run, 3)
    program = (
        "import sys; from deit_fast.cli import main; "
        f"sys.exit(main(['report', {str(run)!r}, '--no-pictures']) or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {run / 'report.html'}\n"
    assert "data:image" not in (run / "report.html").read_text(encoding="utf-8")
    assert default_page([run, run]) == Path("report.html")
