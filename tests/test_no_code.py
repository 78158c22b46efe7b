"""No verb imports a module because a file names it: only what the user gives by a flag is code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deit_fast.cli import main
from deit_fast.config_file import to_dict
from deit_fast.errors import InputError
from deit_fast.evaluation import evaluate
from deit_fast.models.convnet import small_convnet
from deit_fast.runtime.files import read_json, write_json
from deit_fast.runtime.weights_header import WEIGHTS_FILES
from deit_fast.tools.analysis.runs import analyze
from helpers.runs import run_config


@pytest.fixture
def planted(world, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A run whose files name a module, and the file that the module leaves when it is imported."""
    marker, run = tmp_path / "imported", tmp_path / "run"
    (tmp_path / "planted.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from deit_fast.models.convnet import small_convnet as model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    run.mkdir()
    spec = "planted:model@weights.pth"
    config = run_config(world, run, teacher=spec, model={"name": "planted:model", "args": ()})
    write_json(run / "config.json", to_dict(config))
    teacher = {"teacher.spec": "planted:model", "teacher.weights_sha256": "0"}
    write_json(run / "result.json", {"top1": 0.1, "teacher": teacher})
    (run / "metrics.jsonl").write_text("")
    torch.manual_seed(0)
    for name in WEIGHTS_FILES.values():
        save_file(small_convnet(10).state_dict(), run / name)
    return run, marker


def set_model(run: Path, name: str, **changes: object) -> None:
    values = read_json(run / "config.json")
    values["model"]["name"] = name
    write_json(run / "config.json", values | changes)


VERBS = ["evaluate RUN", "evaluate RUN --weights best", "analyze RUN", "analyze RUN RUN --maps 0",
         "report RUN --output RUN/page.html", "doctor --report --output RUN"]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_what_a_run_names(planted, capsys, monkeypatch, verb):
    run, marker = planted
    monkeypatch.chdir(run.parent)
    status = main(verb.replace("RUN", str(run)).split())
    text = capsys.readouterr().err
    assert not marker.exists()
    if verb.startswith(("evaluate", "analyze")):
        assert status == 2 and text.count("\n") == 1
        assert "config.json names the model 'planted:model'" in text
        assert "give --model planted:model" in text


@pytest.mark.parametrize("teacher", ["planted:model@weights.pth", None])
def test_a_teacher_that_a_run_or_its_result_names_is_not_imported(planted, teacher):
    run, marker = planted
    set_model(run, "deit_fast.models.convnet:small_convnet", teacher=teacher)
    (found,) = analyze([run], maps=0)
    assert "names the model 'planted:model'" in found["left_out"]["teacher"]
    assert not marker.exists()


def test_a_model_that_the_user_names_is_imported(planted):
    run, marker = planted
    assert main(["evaluate", str(run), "--model", "os:abort"]) == 2
    assert not marker.exists()
    assert main(["evaluate", str(run), "--model", "planted:model"]) == 0
    assert marker.exists()
    assert main(["analyze", str(run), "--model", "planted:model", "--maps", "0"]) == 0


@pytest.mark.parametrize("name", ["os:abort", "timm:list_models", "hf-hub:a/b", ":", "os:"])
def test_a_name_that_is_no_timm_model_is_refused(planted, name):
    set_model(planted[0], name)
    with pytest.raises(InputError, match="a file may not decide which code is run"):
        evaluate(str(planted[0]))


def test_a_teacher_of_timm_is_a_name_and_no_address(planted):
    run, _ = planted
    set_model(run, "deit_fast.models.convnet:small_convnet", teacher="timm:resnet18.a:b")
    (found,) = analyze([run], maps=0, download=True)
    assert "unknown teacher" in found["left_out"]["teacher"]
