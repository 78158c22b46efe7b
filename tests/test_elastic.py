"""A run resumed with more or fewer processes sees the same samples in the same order.

Pixels are compared, not ids: a witness digests every image that student and teacher get.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deit_fast.config import RunConfig
from deit_fast.training.loop import train
from helpers.runs import STEPS, assert_close_runs, comparable_rows, last_state, run_config, torchrun

CHANGE = 5  # in the middle of the first epoch of six steps


def witnessed(world: Path, output: Path, **changes) -> RunConfig:
    teacher = f"helpers.witness_teacher:convnet@{world}/teacher.safetensors"
    base = {"teacher": teacher, "loss": {"kind": "soft"}, "teacher_floor": 0.0}
    return run_config(world, output, **(base | changes))


def sequence(folder: Path) -> list[list[str]]:
    """Digests of the images of each step, concatenated over the ranks."""
    ranks = [path.read_text().splitlines() for path in sorted(folder.glob("*.txt"))]
    assert len({len(lines) for lines in ranks}) == 1
    return [" ".join(lines).split() for lines in zip(*ranks, strict=True)]


def run_in(processes: int, config: RunConfig, seen: Path, monkeypatch) -> list[list[str]]:
    """Train; returns the digests of the images."""
    seen.mkdir()
    monkeypatch.setenv("WITNESS", str(seen))
    if processes == 1:
        train(config)
    else:
        status, stderr = torchrun(config, WITNESS=str(seen), processes=processes)
        assert status == 0, stderr[-3000:]
        assert len(list(seen.glob("*.txt"))) == processes
    return sequence(seen)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """Folder and sequence of an uninterrupted run of one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        return root / "run", run_in(1, witnessed(world, root / "run"), root / "seen", patch)


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_keeps_the_sequence(
    world, undisturbed, tmp_path, monkeypatch, before, after
):  # fmt: skip
    whole, expected = undisturbed
    assert len(expected) == STEPS and {len(step) for step in expected} == {32}
    config = witnessed(world, tmp_path / "run", save_steps=1)
    seen = run_in(before, config.replace(max_steps=CHANGE), tmp_path / "first", monkeypatch)
    assert last_state(tmp_path / "run")["step"] == CHANGE
    seen += run_in(after, config, tmp_path / "second", monkeypatch)
    assert seen == expected
    assert_close_runs(tmp_path / "run", whole)
    mine, theirs = (
        {row["step"]: row["samples"] for row in comparable_rows(run) if row["kind"] == "eval"}
        for run in (tmp_path / "run", whole)
    )
    assert mine.pop(CHANGE) == theirs[6] == mine[6]  # the end at max_steps evaluates too
    assert mine == theirs


@pytest.mark.dist
def test_four_then_two_then_three_processes_keep_the_sequence(world, tmp_path, monkeypatch):
    """Each change is in the middle of an epoch of eight steps; each world divides the batch."""
    config = witnessed(world, tmp_path / "whole", batch_size=24, eval_every=2)
    expected = run_in(1, config, tmp_path / "seen", monkeypatch)
    assert len(expected) == 16 and {len(step) for step in expected} == {24}
    config, seen = config.replace(output=str(tmp_path / "run")), []
    for processes, stop in ((4, 3), (2, 11), (3, None)):
        folder = tmp_path / f"seen-{processes}"
        seen += run_in(processes, config.replace(max_steps=stop), folder, monkeypatch)
        assert last_state(tmp_path / "run")["step"] == (stop or 16)
    assert seen == expected
    assert_close_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.dist
def test_a_batch_that_the_processes_do_not_divide_ends_all_of_them(world, tmp_path):
    config = witnessed(world, tmp_path / "run")  # batch_size=32
    status, stderr = torchrun(config, processes=3, WITNESS=str(tmp_path))
    assert (
        status != 0
        and "32" in stderr
        and "Traceback (most recent call last):\n  File" not in stderr
    )
    assert sum("deit-fast: error" in line for line in stderr.splitlines()) >= 1, stderr
