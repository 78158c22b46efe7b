"""Reading and writing files: all or nothing, never waiting, every bit checked."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast import cli
from deit_fast.config import RunConfig
from deit_fast.errors import InputError, printable
from deit_fast.models.weights import load_weights, read_metadata, save_weights
from deit_fast.runtime import files
from deit_fast.runtime.files import (
    SEAL,
    is_end_intact,
    open_regular,
    read_arrays,
    read_file,
    read_json,
    write_arrays,
    write_atomically,
    write_json,
)
from deit_fast.runtime.metrics import MetricsFile, read_metrics
from deit_fast.runtime.speed import WARM_UP, StepProfiler
from deit_fast.runtime.torch_files import load_torch, save_torch
from deit_fast.tools.report.page import write_report
from deit_fast.training.checkpoints import list_checkpoints, load_newest, save_checkpoint
from helpers.damage import NO_FILES, not_waiting


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Writing more than ``limit`` bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------------------------------------
# What is no file
# ---------------------------------------------------------------------------------------------

READ_OR_WRITE: dict[str, Callable[[Path], object]] = {
    "read_file": read_file,
    "read_json": read_json,
    "read_arrays": lambda path: read_arrays(path, {}),
    "read_metrics": read_metrics,
    "load_weights": load_weights,
    "read_metadata": read_metadata,
    "append": lambda path: open_regular(path, append=True),
    "write_atomically": lambda path: write_atomically(path, b"new"),
    "write_json": lambda path: write_json(path, {}),
    "write_arrays": lambda path: write_arrays(path, {}),
    "save_torch": lambda path: save_torch(path, {}),
    "save_weights": lambda path: save_weights(path, {}, {}),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", READ_OR_WRITE)
def test_what_is_no_file_is_refused_at_once(tmp_path, name, kind):
    path = tmp_path / "x.safetensors"
    NO_FILES[kind](path)
    with not_waiting(), pytest.raises(InputError, match=rf"x\.safetensors is a {kind}"):
        READ_OR_WRITE[name](path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_file_above_the_limit_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(bytes(11))
    assert read_file(tmp_path / "x", limit=11) == bytes(11)
    with pytest.raises(InputError, match="more than 10 bytes"):
        read_file(tmp_path / "x", limit=10)


# ---------------------------------------------------------------------------------------------
# Seals
# ---------------------------------------------------------------------------------------------


def test_json_is_what_was_written_and_every_bit_of_it_counts(tmp_path):
    path = tmp_path / "x.json"
    content = {"a": 1, "crc": "crc32c", "text": "\ud800\x1b é", "list": [1.5, None, math.inf]}
    write_json(path, content)
    assert read_json(path) == content
    assert list(json.loads(path.read_text()))[-1] == "crc32c"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(InputError):
            read_json(path)


def test_an_edited_json_file_says_how_to_use_it(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"lr": 1})
    path.write_text(path.read_text().replace('"lr": 1', '"lr": 2'))
    with pytest.raises(InputError, match="to use it as it is, remove its line crc32c"):
        read_json(path)
    lines = [line for line in path.read_text().splitlines() if "crc32c" not in line]
    path.write_text("\n".join(lines).replace("2,", "2"))
    assert read_json(path) == {"lr": 2}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1]", "{", '"\xff"', "[" * 10**5])
def test_json_that_is_not_one_object_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"x\.json is damaged: "):
        read_json(path)


def test_torch_loads_a_sealed_archive(tmp_path):
    path = tmp_path / "x.pt"
    value = {"weight": torch.randn(100, 3), "empty": torch.empty(0), "n": 1}
    save_torch(path, value)
    for found in (
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
    ):
        assert found["n"] == 1 and torch.equal(found["weight"], value["weight"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b'"crc32c": "')
    with open_regular(path) as file:
        assert load_torch(file)[1]
    whole = path.read_bytes()
    for bit in range(8 * len(SEAL)):
        changed = bytearray(whole)
        changed[bit // 8 - len(SEAL)] ^= 1 << bit % 8
        assert is_end_intact(io.BytesIO(changed)) is False


def test_equal_weights_are_equal_files(tmp_path):
    state = {name: torch.arange(7.0) for name in ("a", "é", "c")}
    texts = {f"key {n}": f'{n} "é\x1b\n' for n in range(12)}
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_weights(one, state, texts)
    save_weights(other, state, dict(reversed(texts.items())))
    assert one.read_bytes() == other.read_bytes()
    found = load_weights(one)
    assert read_metadata(one) == texts
    assert found.keys() == state.keys() and torch.equal(found["é"], state["é"])


def test_weights_without_a_checksum_are_read_and_metadata_is_kept(tmp_path):
    from safetensors.torch import save_file

    state = {"a": torch.randn(3), "crc32c": torch.zeros(2, 2).t()}
    save_file({"a": state["a"]}, tmp_path / "other.safetensors", {"made": "elsewhere"})
    assert torch.equal(load_weights(tmp_path / "other.safetensors")["a"], state["a"])
    assert read_metadata(tmp_path / "other.safetensors") == {"made": "elsewhere"}
    save_weights(tmp_path / "own.safetensors", state, {"note": '"crc32c":"00000000"'})
    assert read_metadata(tmp_path / "own.safetensors") == {"note": '"crc32c":"00000000"'}
    assert torch.equal(load_weights(tmp_path / "own.safetensors")["crc32c"], state["crc32c"])
    whole = (tmp_path / "own.safetensors").read_bytes()
    for place in (len(whole) - 1, whole.index(b'"crc32c":"') + 3):
        content = bytearray(whole)
        content[place] ^= 1
        (tmp_path / "own.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"own\.safetensors is damaged: its checksum differs"):
            load_weights(tmp_path / "own.safetensors")


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def test_only_files_of_steps_are_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 7, {"step": 7})
    for name in ("step-backup.pt", "step-000000009.pt.bak", "step-9.pt", "step-000000008"):
        (tmp_path / name).write_bytes((tmp_path / "step-000000007.pt").read_bytes())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000007.pt"]
    for step in (8, 9):
        save_checkpoint(tmp_path, step, {"step": step})
    save_checkpoint(tmp_path, 10**9, {"step": 10**9})
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-000000009.pt", "step-1000000000.pt"]
    assert (tmp_path / "step-backup.pt").exists()


def test_a_checkpoint_of_another_step_than_its_name_is_not_used_and_stays(tmp_path, caplog):
    """Else each new checkpoint would be the oldest one, which is deleted."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    foreign = [tmp_path / f"step-0000000{number}.pt" for number in (98, 99)]
    foreign[0].write_bytes(b"junk")
    foreign[1].write_bytes((tmp_path / "step-000000002.pt").read_bytes())
    path, state = load_newest(tmp_path)
    assert path.name == "step-000000002.pt" and state["step"] == 2
    assert "step-000000099.pt is not used: it is of step 2" in caplog.text
    for step in (3, 4):
        save_checkpoint(tmp_path, step, {"step": step})
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-000000003.pt", "step-000000004.pt", *(path.name for path in foreign)]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_of_checkpoints_that_is_not_there_is_no_empty_one(tmp_path, kind):
    folder = tmp_path / "checkpoints"
    assert list_checkpoints(folder) == []
    folder.symlink_to(tmp_path / "unmounted") if kind == "link" else folder.touch()
    with pytest.raises(InputError, match="checkpoints is no folder, or a link to one that is not"):
        list_checkpoints(folder)


def test_an_output_through_a_link_replaces_what_the_link_leads_to(tmp_path):
    target, link = tmp_path / "target" / "page.html", tmp_path / "link.html"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    files.write_atomically(link, b"new")
    assert link.is_symlink() and target.read_text() == "new"
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_an_output_does_not_replace_a_file_of_a_run(tmp_path):
    path = tmp_path / "result.json"
    files.require_writable("--output", path, is_folder=False)
    path.touch()
    with pytest.raises(InputError, match=r"--output: .*result\.json is of a run or a cache"):
        files.require_writable("--output", path, is_folder=False)


def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    save_checkpoint(tmp_path, 2, {"step": 2, "format": 99})
    with pytest.raises(
        InputError, match=r"step-000000002\.pt has format 99, this version reads 1 and 2"
    ):
        load_newest(tmp_path)


@pytest.mark.parametrize("value", [[1, 2], 7, {"step": 2}], ids=["list", "number", "no-format"])
def test_a_checkpoint_that_holds_something_else_is_not_used(tmp_path, caplog, value):
    save_checkpoint(tmp_path, 1, {"step": 1})
    save_torch(tmp_path / "step-000000002.pt", value)
    assert load_newest(tmp_path)[1]["step"] == 1
    assert "step-000000002.pt is broken (it holds a " in caplog.text


def test_checkpoints_of_earlier_versions_are_checked_by_their_members(tmp_path, caplog):
    """Those have no seal; a checkpoint of today without one has lost it."""
    weight = torch.arange(1000.0)
    save_checkpoint(tmp_path, 1, {"step": 1, "weight": weight})
    newest = tmp_path / "step-000000002.pt"
    torch.save({"format": 1, "step": 2, "weight": weight}, newest)
    assert load_newest(tmp_path)[0] == newest
    content = bytearray(newest.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1
    newest.write_bytes(content)
    assert load_newest(tmp_path)[0].name == "step-000000001.pt"
    torch.save({"format": 2, "step": 2, "weight": weight}, newest)
    assert load_newest(tmp_path)[0].name == "step-000000001.pt"
    assert "its checksum is missing" in caplog.text
    torch.load(newest, weights_only=True)


# ---------------------------------------------------------------------------------------------
# All or nothing
# ---------------------------------------------------------------------------------------------


def grow(count: int) -> list[dict]:
    return [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, count + 1)]


def write_rows(folder: Path, count: int) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grow(count)))


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: write_json(path, {"text": "x" * 2000}),
    "arrays": lambda path: write_arrays(path, {"a": np.zeros(2000)}),
    "checkpoint": lambda path: save_torch(path, {"a": torch.zeros(2000)}),
    "weights": lambda path: save_weights(path, {"a": torch.zeros(2000)}, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, name):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with small_files(1000), pytest.raises(OSError, match="File too large") as caught:
        WRITERS[name](path)
    assert caught.value.filename == str(path)
    assert [item.name for item in tmp_path.iterdir()] == ["x"] and path.read_bytes() == b"old"


def test_a_resume_on_a_full_disk_leaves_all_rows(tmp_path):
    write_rows(tmp_path, 200)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with small_files(1000), pytest.raises(OSError, match=r"File too large.*metrics\.jsonl"):
        MetricsFile(RunConfig(), tmp_path, step=150)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    file = MetricsFile(RunConfig(), tmp_path, step=150)
    with small_files(1000), pytest.raises(OSError, match=r"File too large.*metrics\.jsonl"):
        file.roll_back(100)
    assert read_metrics(tmp_path / "metrics.jsonl") == grow(150)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from deit_fast.tools.report import page

    out = tmp_path / "page.html"
    out.write_text("old")
    monkeypatch.setattr(page, "build_report", lambda runs, title, pictures: title * 2000)
    with small_files(1000), pytest.raises(OSError, match=r"File too large.*page\.html"):
        write_report([], out, "title")
    assert out.read_text() == "old"
    write_report([], out, "\ud800\x1b[1m")  # cannot be encoded, and would colour a terminal
    assert out.read_text().startswith(r"\ud800\x1b[1m")
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]


def test_a_bug_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    from deit_fast.tools import doctor

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda *_: [doctor.Finding("name", "x" * 2000)])
    path = tmp_path / "deit-fast-report.txt"
    path.write_text("old")
    with small_files(1000):
        assert cli.main(["doctor", "--report"]) == 2
    assert "deit-fast-report.txt: File too large" in capsys.readouterr().err
    assert path.read_text() == "old"
    path.unlink()
    os.mkfifo(path)
    with not_waiting():
        assert cli.main(["doctor", "--report"]) == 2
    assert "deit-fast-report.txt is a FIFO" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "failed"), [(200, "table.txt"), (20_000, "trace.json")])
def test_a_profile_that_cannot_be_written_leaves_the_old_one(tmp_path, limit, failed):
    (tmp_path / failed).write_text("old")
    profiler = StepProfiler(1, tmp_path, torch.device("cpu"))
    with small_files(limit), pytest.raises(OSError) as caught, profiler:
        for _ in range(WARM_UP + 1):
            for _ in range(100):
                torch.ones(2) @ torch.ones(2)
            profiler()
    assert caught.value.filename == str(tmp_path / failed)
    assert (tmp_path / failed).read_text() == "old"
    assert not list(tmp_path.glob(".tmp-*"))


def test_temporary_names_cannot_be_planted(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    names = iter([tmp_path / ".tmp-known", tmp_path / ".tmp-other"])
    monkeypatch.setattr(files, "temporary_path", lambda path: next(names))
    (tmp_path / ".tmp-known").symlink_to(victim)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "x", b"new")
    assert victim.read_text() == "mine" and not (tmp_path / "x").exists()
    monkeypatch.undo()
    assert len({files.temporary_path(tmp_path / "x") for _ in range(1000)}) == 1000


# ---------------------------------------------------------------------------------------------
# Rows of metrics
# ---------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.read_bytes().index(b"\n") + 5)


OTHERS: dict[str, tuple[Callable[[Path], object], int]] = {
    "deleted": (Path.unlink, 0),
    "replaced": (lambda path: write_atomically(path, b"other\n"), 0),
    "cut off": (cut, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_another_program_takes_are_written_again(tmp_path, caplog, name):
    change, lost = OTHERS[name]
    write_rows(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(RunConfig(), tmp_path, step=3)
    change(path)
    for step in (4, 5):
        file.write("train", {"step": step})
    file.sync()
    assert [row["step"] for row in read_metrics(path, strict=True)] == [
        *[1, 2, 3][: 3 - lost],
        4,
        5,
    ]
    assert (file.rows, file.lost) == (5 - lost, lost)
    assert caplog.text.count("was deleted, replaced or cut off") == 1
    assert f"{path} was" in caplog.text and f", {lost} are lost" in caplog.text
    file.close(finished=True)


def test_rows_are_not_written_into_another_folder(tmp_path, caplog):
    """And one warning, not one for each row, where they cannot be written."""
    run = tmp_path / "run"
    run.mkdir()
    file = MetricsFile(RunConfig(), run, step=0)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    file.write("train", {"step": 1})
    file.write("train", {"step": 2})
    assert caplog.text.count("is a folder") == 1
    (run / "metrics.jsonl").rmdir()
    file.write("train", {"step": 3})
    run.rename(tmp_path / "moved")
    run.mkdir()
    (run / "metrics.jsonl").write_text("of another run")
    file.write("train", {"step": 4})
    assert (run / "metrics.jsonl").read_text() == "of another run"
    rows = read_metrics(tmp_path / "moved/metrics.jsonl", strict=True)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_rows_of_earlier_versions_are_kept_and_a_torn_line_is_dropped(tmp_path, caplog):
    write_rows(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    MetricsFile(RunConfig(), tmp_path, step=3).close(finished=True)
    assert "metrics.jsonl line 4 is damaged" in caplog.text and "a torn line" in caplog.text
    assert read_metrics(path, strict=True) == grow(3)
    assert path.read_text().count('"crc32c"') == 3


@pytest.mark.parametrize("row", [
    "[1]", "7", '{"step": 1}', '{"step": [1], "kind": "eval"}',
    '{"step": 1, "kind": "eval", "crc32b": "00000000"}',
])  # fmt: skip
def test_a_row_that_is_none_is_named(tmp_path, caplog, row):
    write_rows(tmp_path, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is damaged"):
        read_metrics(path, strict=True)
    assert read_metrics(path) == grow(1) and "line 2 is damaged" in caplog.text


def test_text_for_a_terminal_is_escaped():
    assert printable("a\x1b[31m\n\ud800é") == r"a\x1b[31m\n\ud800é"
