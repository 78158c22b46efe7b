"""Units of work give the same bytes wherever, however often and in whatever order they run."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import deit_fast
from deit_fast import _C, units
from deit_fast.cache import LogitCacheWriter, build_manifest
from deit_fast.cache.format import view_path, view_specs
from deit_fast.cli import main
from deit_fast.config import CodecConfig, RunConfig
from deit_fast.errors import InputError
from deit_fast.precomputation import precompute
from deit_fast.runtime.files import temporary_path
from deit_fast.units import Units
from helpers import small_blocks
from helpers.digits import write_few_digits
from helpers.feature_runs import config_of
from helpers.processes import start_forked
from helpers.small_blocks import BLOCK
from helpers.units import command, contents

FRAGILE = "helpers.fragile_teacher:fragile"
TOTAL = 6  # 70 images in blocks of 36, 3 views


@pytest.fixture(autouse=True)
def blocks_are_small(monkeypatch):
    monkeypatch.setattr(CodecConfig, "block_records", BLOCK)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("units")
    write_few_digits(root / "data", train=7, val=3)
    return root


def settings(root: Path, cache: Path, **changes) -> RunConfig:
    base = config_of(root, targets=("logits",), cache=str(cache), codec={"name": "topk", "k": 4})
    return base.replace(**{"num_views": 3, "data": {"workers": 0}} | changes)


@pytest.fixture(scope="module")
def reference(root) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodecConfig, "block_records", BLOCK)
        precompute(settings(root, root / "reference"))
    return contents(root / "reference")


def test_units_in_any_order_and_twice_give_the_bytes_of_one_process(root, reference, tmp_path):
    config = settings(root, tmp_path / "cache")
    numbers = [*range(TOTAL), *random.Random(0).sample(range(TOTAL), 4)]
    random.Random(1).shuffle(numbers)
    worker = Units(config)
    assert worker.total == TOTAL
    counts = [worker.compute([number]) for number in numbers]
    assert sum(found["blocks"] for found in counts) == TOTAL
    assert sum(found["kept"] for found in counts) == 4
    assert contents(tmp_path / "cache") == reference


def test_units_of_features_too(root, tmp_path):
    made = [
        settings(root, tmp_path / name, targets=("logits", "cls", "patches"))
        for name in ("whole", "units")
    ]
    precompute(made[0])
    for numbers in ([2], [0, 1], [1, 2]):
        Units(made[1]).compute(numbers)  # 70 images are one unit of a view
    assert contents(tmp_path / "units") == contents(tmp_path / "whole")


def test_units_beyond_the_last_are_none(root, reference, tmp_path):
    shutil.copytree(root / "reference", tmp_path / "cache")
    config = settings(root, tmp_path / "cache")
    found = deit_fast.precompute(config, blocks=range(TOTAL, 2**62)).details
    assert (found["units"], found["total"], found["images"]) == (0, TOTAL, 0)
    assert contents(tmp_path / "cache") == reference


def run_of(config: RunConfig, blocks: str, **variables: str):
    return start_forked(small_blocks.run, command(config, blocks), **variables)


@pytest.mark.dist
def test_processes_that_compute_the_same_units_at_once_and_are_killed(root, reference, tmp_path):
    config = settings(root, tmp_path / "cache", output=str(tmp_path / "run"))
    ranges = ["0:4", "0:6", "2:6"]
    first = [run_of(config, blocks) for blocks in ranges]
    first[1].join(0.3)
    first[1].kill()
    for process in first:
        process.join(120)
    again = run_of(config, "0:6")
    again.join(120)
    assert [first[0].exitcode, first[2].exitcode, again.exitcode] == [0, 0, 0]
    assert first[1].exitcode in (0, -signal.SIGKILL)
    assert contents(tmp_path / "cache") == reference


def test_torchrun_divides_units_between_processes(root, reference, tmp_path, monkeypatch):
    config = settings(root, tmp_path / "cache")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert Units(config).compute(range(TOTAL))["units"] == TOTAL // 3
    assert contents(tmp_path / "cache") == reference


# ---------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------


def fragile(root: Path, tmp_path: Path, **changes) -> RunConfig:
    return settings(
        root, tmp_path / "cache", teacher=FRAGILE, output=str(tmp_path / "run"), **changes
    )


def test_a_unit_that_fails_three_times_names_its_image_and_the_others_are_made(
    root, tmp_path, capsys
):
    shutil.copytree(root / "data", tmp_path / "data")
    images = sorted((tmp_path / "data" / "train").rglob("*.png"))
    good = images[40].read_bytes()
    images[40].write_bytes(b"?" * len(good))  # another size would be another data set
    data = {"root": str(tmp_path / "data"), "on_error": "fail", "workers": 0}
    config = settings(root, tmp_path / "cache", output=str(tmp_path / "run"), data=data)
    words = command(config, f"0:{TOTAL}")
    assert main(words) == 3
    text = capsys.readouterr().out
    assert "units are in quarantine: look at the images, then remove" in text
    failed = text.count("failed 3 times")
    assert text.count(images[40].name) == failed >= 3
    assert f"blocks {TOTAL - failed}" in " ".join(text.split())
    assert main(words) == 3  # it stays there, and is named again
    assert images[40].name in capsys.readouterr().out
    images[40].write_bytes(good)
    shutil.rmtree(tmp_path / "cache" / units.TRIES_FOLDER)
    assert main(words) == 0
    precompute(config.replace(cache=str(tmp_path / "whole")))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_try_whose_process_died_after_it_had_published_is_forgotten(root, reference, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(root / "reference", cache)
    tries = units.Tries(units._FolderNotes(cache / units.TRIES_FOLDER))
    tries.begin(1)
    Units(settings(root, cache)).compute([0])  # its own units alone
    assert tries.counts() == {1: 1}
    Units(settings(root, cache)).compute([1, 2])
    assert not (cache / units.TRIES_FOLDER).exists()


def test_what_is_no_note_does_not_stop_a_unit(root, tmp_path):
    folder = tmp_path / "cache" / units.TRIES_FOLDER
    (folder / "unit-000000003-1.why.json").mkdir(parents=True)
    (folder / "unit-abc.json").write_text("?")
    Units(settings(root, tmp_path / "cache")).compute([3])
    file = tmp_path / "other" / units.TRIES_FOLDER
    file.parent.mkdir()
    file.write_text("")
    with pytest.raises(InputError, match=r"other/tries is no folder: remove it$"):
        Units(settings(root, tmp_path / "other")).compute([3])


def test_one_unit_is_named_in_the_singular():
    row = {"unit": 1, "view": 0, "samples": [0, 36], "why": "?"}
    assert units.quarantine_text([row], "c").startswith("1 unit is in quarantine: look at")
    assert units.quarantine_text([row] * 2, "c").startswith("2 units are in quarantine: ")


def test_a_failure_that_passes_leaves_no_trace(root, tmp_path, monkeypatch):
    monkeypatch.setenv("FRAGILE", "raise:2")
    found = Units(fragile(root, tmp_path)).compute(range(TOTAL))
    assert found["quarantined"] == []
    assert not (tmp_path / "cache" / units.TRIES_FOLDER).exists()
    monkeypatch.delenv("FRAGILE")
    precompute(fragile(root, tmp_path).replace(cache=str(tmp_path / "whole")))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["memory", "disk", "cuda"])
def test_a_failure_of_the_machine_is_not_the_units(root, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FRAGILE", f"{kind}:1")
    with pytest.raises((MemoryError, OSError, RuntimeError)):
        Units(fragile(root, tmp_path)).compute(range(TOTAL))
    tries = list((tmp_path / "cache").glob(f"{units.TRIES_FOLDER}/*"))
    assert bool(tries) == (kind == "cuda")  # a later process tells whether a unit did it


@pytest.mark.dist
def test_a_unit_that_kills_its_process_is_found_and_left_out(root, tmp_path):
    config = fragile(root, tmp_path)
    statuses = []
    for _ in range(4):
        process = run_of(config, "0:2", FRAGILE="kill-rows:34")  # those of the second unit
        process.join(120)
        statuses.append(process.exitcode)
    assert statuses == [-signal.SIGKILL] * 3 + [3]
    found = Units(config).compute(range(2))
    assert found["kept"] == 1
    assert found["quarantined"] == [
        {"unit": 1, "view": 0, "samples": [36, 70], "why": "its process died"}
    ]


@pytest.mark.dist
def test_sigterm_ends_units_with_status_75_and_without_a_try(root, tmp_path):
    config = fragile(root, tmp_path)
    process = run_of(config, f"0:{TOTAL}", FRAGILE="term:3")
    process.join(120)
    assert process.exitcode == 75
    assert not list((tmp_path / "cache").glob(f"{units.TRIES_FOLDER}/unit-*"))


def test_blocks_and_views_exclude_each_other(root, tmp_path, capsys):
    words = command(settings(root, tmp_path / "cache", output=str(tmp_path)), "0:3")
    assert main([*words, "--views", "0:1"]) == 2
    assert "leave out --views 0:1" in capsys.readouterr().err
    assert main([*words[:-1], "3:3"]) == 2
    assert "--blocks needs A:B" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"leave out views"):
        deit_fast.precompute(settings(root, tmp_path / "cache"), views=range(1), blocks=range(1))


# ---------------------------------------------------------------------------------------------
# Committing
# ---------------------------------------------------------------------------------------------


def test_a_complete_block_stays_whoever_commits_it_again(tmp_path, caplog):
    manifest = build_manifest(CodecConfig(name="dense-fp32"), num_classes=3, num_samples=40,
                              tau=1.0, fingerprint={})  # fmt: skip
    first, second = (LogitCacheWriter(tmp_path, manifest, locked=False) for _ in range(2))
    logits = torch.randn(40, 3)
    first.write(np.arange(35), 0, logits[:35])  # both have begun the same block
    second.write(np.arange(35), 0, logits[:35] + 1)
    first.write(np.arange(35, 40), 0, logits[35:])
    name = view_path(tmp_path, 0)
    before = name.read_bytes()
    second.write(np.arange(35, 40), 0, logits[35:])
    first.close()
    second.close()
    assert name.read_bytes() == before
    assert "other writers had stored 1 blocks meanwhile" in caplog.text


def test_a_damaged_block_is_committed_again(tmp_path):
    manifest = build_manifest(CodecConfig(name="dense-fp32"), num_classes=3, num_samples=40,
                              tau=1.0, fingerprint={})  # fmt: skip
    spec = view_specs(manifest)(view_id=0)
    path = tmp_path / "view"
    writer = _C.ViewWriter(str(path), str(temporary_path(path)), spec, reserve=False)
    rows = np.arange(36 * 12, dtype=np.uint8)
    assert writer.commit(0, rows.ctypes.data, rows.nbytes) == _C.Committed.written
    assert writer.commit(0, rows.ctypes.data, rows.nbytes) == _C.Committed.kept
    with path.open("r+b") as file:
        file.seek(spec.data_offset)
        file.write(b"\xff")
    assert writer.commit(0, rows.ctypes.data, rows.nbytes) == _C.Committed.written
    assert writer.check_block(0)[0] == _C.BlockState.complete
