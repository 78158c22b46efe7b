"""A damaged file of a run is refused, or an older checkpoint is used, or nothing differs.

The sweep reads each kind of file of one small run with damage at seeded places. DAMAGED_COPIES sets
the number of copies of each file.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.errors import InputError
from deit_fast.evaluation import read_run_config
from deit_fast.models.weights import load_weights, read_metadata, save_weights
from deit_fast.runtime.files import read_json, write_json
from deit_fast.runtime.metrics import MetricsFile, read_metrics
from deit_fast.runtime.trackers import read_tracked_runs
from deit_fast.runtime.weights_header import WEIGHTS_FILES
from deit_fast.tools.analysis.runs import analyze
from deit_fast.tools.run_folder import read_run
from deit_fast.training.checkpoints import load_newest
from deit_fast.training.loop import train
from helpers.damage import damaged, not_waiting
from helpers.runs import run_config, weights_equal

STEPS = 2
NEWEST = f"checkpoints/step-{STEPS:09d}.pt"
COPIES = int(os.environ.get("DAMAGED_COPIES", "24"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A run of two steps with all kinds of files."""
    folder = tmp_path_factory.mktemp("run") / "run"
    changes = {"teacher": None, "loss": {"kind": "none"}}
    train(run_config(world, folder, max_steps=STEPS, save_steps=1, **changes))
    analyze([folder], maps=1)
    entry = {"run": "tensorboard", "last": {"train": 4}, "config": "0123456789ab"}
    write_json(folder / "trackers.json", {"tensorboard": entry})
    return folder


# ---------------------------------------------------------------------------------------------
# Sweep: each file with many kinds of damage
# ---------------------------------------------------------------------------------------------


def equal(left: Any, right: Any) -> bool:
    """Whether all that ``right`` has is in ``left`` too; keys that nothing reads may be added."""
    if isinstance(right, dict):
        return isinstance(left, dict) and all(k in left and equal(left[k], right[k]) for k in right)
    if isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def newest_state(run: Path) -> Any:
    path, state = load_newest(run / "checkpoints")
    return {"path": path.name, **state}


def whole_run(run: Path) -> Any:
    return vars(read_run(run, "run", 0))


def resumed_rows(run: Path) -> Any:
    path = run / "metrics.jsonl"
    MetricsFile(RunConfig(), run, step=STEPS, least=STEPS + 1).close(finished=True)
    return read_metrics(path, strict=True)


def weights(name: str, run: Path) -> Any:
    path = next(run.glob(name))
    return load_weights(path), read_metadata(path) if path.suffix == ".safetensors" else None


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "resume": (NEWEST, newest_state),
    "weights of a checkpoint": (NEWEST, partial(weights, NEWEST)),
    "model": ("model.safetensors", partial(weights, "model.safetensors")),
    "average": ("ema.safetensors", partial(weights, "ema.safetensors")),
    "settings": ("config.json", read_run_config),
    "settings in a report": ("config.json", whole_run),
    "result": ("result.json", whole_run),
    "rows in a report": ("metrics.jsonl", whole_run),
    "rows on resume": ("metrics.jsonl", resumed_rows),
    "analysis": ("analysis/analysis.json", whole_run),
    "predictions": ("predictions.json", whole_run),
    "predictions of an analysis": ("analysis/predictions.json", whole_run),
    "views": ("samples.png", whole_run),
    "map": ("analysis/attention-0.png", whole_run),
    "trackers": ("trackers.json", lambda run: read_tracked_runs(run / "trackers.json")),
}


@pytest.mark.parametrize("name", READERS)
def test_no_damage_is_used_in_silence(run, tmp_path, caplog, name):
    file, read = READERS[name]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    right, content = read(copy), (copy / file).read_bytes()
    (copy / NEWEST).unlink()
    older = newest_state(copy)
    shutil.copy(run / NEWEST, copy / NEWEST)
    seen: Counter[str] = Counter()
    for damage, changed in damaged(content, COPIES):
        (copy / file).write_bytes(changed)
        caplog.clear()
        try:
            found = read(copy)
        except InputError as error:
            assert file.rpartition("/")[2] in str(error) and "\n" not in str(error)
            seen["refused"] += 1
            continue
        if equal(found, right):
            seen["harmless"] += 1
        elif file == NEWEST and equal(found, older):
            assert f"{Path(NEWEST).name} is broken" in caplog.text
            seen["older checkpoint"] += 1
        elif name == "rows on resume" and all(row in right for row in found):
            assert (
                f"metrics.jsonl lost {len(right) - len(found)} of its {len(right)} rows"
                in caplog.text
            )
            seen["rows left out"] += 1
        else:
            seen["wrong"] += 1
            print(f"{name}, {damage}: {found}")
    print(f"{name}: {dict(seen)}")
    assert seen["wrong"] == 0
    assert seen["harmless"] <= COPIES / 10


# ---------------------------------------------------------------------------------------------
# Each verb with each file
# ---------------------------------------------------------------------------------------------


def verb(name: str, run: Path, steps: int = STEPS) -> int:
    """Exit status of a verb that reads the run; ``steps``: of `train`."""
    arguments = {
        "train": ["--config", f"{run.parent}/config.json", "--output", run, "--max-steps", steps],
        "evaluate": [run],
        "analyze": [run, "--maps", "1"],
        "report": [run, "--output", run.parent / "page.html"],
    }[name.split()[0]]
    return cli.main([*name.split(), *map(str, arguments)])


FILES = {
    "train": f"{NEWEST} config.json metrics.jsonl model.safetensors ema.safetensors "
    "best.safetensors predictions.json result.json",
    "evaluate": "config.json model.safetensors",
    "evaluate --weights ema": "ema.safetensors",
    "evaluate --weights best": "best.safetensors",
    "analyze": "config.json model.safetensors result.json analysis/analysis.json",
    "report": "config.json result.json metrics.jsonl samples.png model.safetensors "
    "predictions.json "
    "analysis/analysis.json analysis/attention-0.png ../page.html",
}
CASES = [(name, file) for name, files in FILES.items() for file in files.split()]


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(run / "config.json", tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "file"), CASES)
def test_what_is_no_file_is_refused_at_once(copy, capsys, caplog, name, file):
    path = (copy / file).resolve()
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with not_waiting(), caplog.at_level(logging.INFO):
        assert verb(name, copy, STEPS + 1) == 2
    error = capsys.readouterr().err.splitlines()
    assert path.name in error[-1] and "FIFO" in error[-1] and "Traceback" not in error
    if file != NEWEST:  # the checkpoint before it is used, until the file would be replaced
        assert not [text for text in caplog.messages if text.startswith("step ")]


def test_training_goes_on_from_an_intact_checkpoint(run, copy, caplog):
    """One bit of a weight in the newest checkpoint: the run would end normally, with others."""
    path, state = load_newest(copy / "checkpoints")
    weight = state["model"]["head.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 1] ^= 1
    path.write_bytes(content)
    assert verb("train", copy) == 0
    assert f"{path.name} is broken (its checksum differs)" in caplog.text
    assert weights_equal(copy, run)
    assert equal(newest_state(copy)["optimizer"], newest_state(run)["optimizer"])


# ---------------------------------------------------------------------------------------------
# Files of another run
# ---------------------------------------------------------------------------------------------


def reported(run: Path, caplog: pytest.LogCaptureFixture) -> tuple[bool, str]:
    """Whether a report of the run has its analysis, and the warnings."""
    caplog.clear()
    analysis = read_run(run, "run", 0).analysis
    assert analysis or "analysis/analysis.json is left out: it is of other weights" in caplog.text
    return bool(analysis), caplog.text


def test_weights_result_and_analysis_of_different_runs_are_told_apart(run, copy, caplog):
    assert reported(copy, caplog) == (True, "")
    assert verb("train", copy) == 0  # a finished run, which writes the same weights again
    assert reported(copy, caplog) == (True, "")
    (copy / "model.safetensors").unlink()  # to save space
    assert reported(copy, caplog) == (True, "")
    assert verb("train", copy, STEPS + 1) == 0
    assert not reported(copy, caplog)[0] and "run `deit-fast analyze` again" in caplog.text
    assert verb("analyze", copy) == 0
    assert reported(copy, caplog) == (True, "")
    assert verb("analyze --weights ema", copy) == 0
    assert reported(copy, caplog) == (True, "")
    for choice, file in WEIGHTS_FILES.items():
        theirs = copy / file
        ours = theirs.read_bytes()
        shutil.copy(run / theirs.name, theirs)
        with pytest.raises(InputError, match=rf"{theirs} has other weights than .*result\.json"):
            read_run(copy, "run", 0)
        assert verb(f"evaluate --weights {choice}", copy) == 0
        assert f"{theirs} has other weights than the run that wrote" in caplog.text
        theirs.write_bytes(ours)


def test_predictions_of_other_weights_are_not_shown(copy):
    known = whole_run(copy)["predictions"]
    assert known == read_json(copy / "analysis/predictions.json")
    (copy / "analysis/predictions.json").unlink()
    assert whole_run(copy)["predictions"] == read_json(copy / "predictions.json")
    write_json(copy / "predictions.json", {**known, "weights_digest": "0" * 64})
    assert whole_run(copy)["predictions"] == {}
    write_json(copy / "analysis/predictions.json", {**known, "images": 1})  # analyze --max-images
    assert whole_run(copy)["predictions"]["images"] == 1
    write_json(copy / "predictions.json", known)
    assert whole_run(copy)["predictions"]["images"] == known["images"]


def test_runs_of_earlier_versions_do_not_say_which_weights_they_had(run, copy, caplog):
    result, path = read_json(copy / "result.json"), copy / "analysis/analysis.json"
    del result["weights"]
    write_json(copy / "result.json", result)
    save_weights(copy / "model.safetensors", load_weights(copy / "model.safetensors"), {})
    assert reported(copy, caplog) == (True, "")
    analysis = read_json(path)
    del analysis["weights_digest"]
    write_json(path, analysis)
    shutil.copy(run / "model.safetensors", copy)
    shutil.copy(run / "result.json", copy)
    assert reported(copy, caplog) == (True, "")


def test_a_report_says_how_many_rows_a_run_lost(copy, caplog):
    write_json(copy / "result.json", {"metrics": {"rows": 1, "lost": 2}})
    read_run(copy, "run", 0)
    assert f"{copy}/metrics.jsonl lost 2 rows while the run wrote it" in caplog.text
