"""The committed results on Fashion-MNIST and digits: page, summary and chart are made from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.fashion.page import write_page
from helpers.bench import chart_texts

ROOT = Path(__file__).parents[1]


def test_page_summary_and_chart_are_those_of_the_committed_results(tmp_path: Path) -> None:
    """`python -m bench fashion page --plots docs/plots` was run after the last commit of one."""
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    shutil.copytree(ROOT / "bench/results/fashion", results)
    (results / "summary.json").unlink()
    write_page(results, tmp_path / "RESULTS.md", tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "bench/fashion/RESULTS.md").read_text()
    means = [
        json.loads((folder / "summary.json").read_text())["means"]
        for folder in (results, ROOT / "bench/results/fashion")
    ]
    assert means[0] == means[1]
    texts = chart_texts(tmp_path / "fashion-reuse.svg")
    assert texts and texts == chart_texts(ROOT / "docs/plots/fashion-reuse.svg")
