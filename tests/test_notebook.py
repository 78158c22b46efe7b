"""The notebook of examples/ runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "own_images.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
def test_the_notebook_runs_and_names_the_classes_of_pictures(tmp_path, monkeypatch) -> None:
    """With the fewest images and one epoch: its own text says how."""
    text = NOTEBOOK.read_text()
    settings = {"EPOCHS": "1", "IMAGES": "16", "OUTPUT": str(tmp_path / "runs")}
    for name, value in settings.items():
        assert f"`{name}`" in text
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DATA", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    for start in ("teacher: ", "48 views in ", "student: ", "circle  ", "('circle', 'square', "):
        assert any(line.startswith(start) for line in printed.splitlines()), printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    result = json.loads((tmp_path / "runs" / "student" / "result.json").read_text())
    assert f"student: {100 * result['top1']:.1f} %" in printed
