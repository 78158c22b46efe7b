"""The bench on Fashion-MNIST: its data, its queue and its page, on a data set of a few images."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from bench.fashion import data, protocol, run
from bench.fashion.page import interval, write_page
from bench.fashion.protocol import arms
from deit_fast.config import DataConfig
from deit_fast.data.open import open_source


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes(), 1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as those of the package, with 60 and 20 images."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28)) + 19 * labels[:, None, None]
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small():
    """A protocol of 40 training images, one epoch and two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAIN", 40)
        patch.setattr(protocol, "REUSE_IMAGES", 30)
        patch.setitem(protocol.STUDENT, "batch_size", 10)
        patch.setitem(protocol.TEACHER, "batch_size", 10)
        patch.setitem(protocol.TEACHER, "epochs", 1)
        for values in (protocol.EPOCHS, protocol.VIEWS):
            for name in values:
                patch.setitem(values, name, 2)
        yield


def test_the_splits_are_those_of_the_files(source, tmp_path) -> None:
    facts = data.write_data(tmp_path, 30, source)
    assert {name: fact["images"] for name, fact in facts.items()} == {
        "train": 40, "select": 20, "test": 20, "reuse": 30
    }  # fmt: skip
    images, labels = data.read_idx("train-images-idx3", source), data.read_idx(
        "train-labels-idx1", source
    )  # fmt: skip
    for name, held_out in (("select", images[40:]), ("test", data.splits(source)["test"][0])):
        config = DataConfig(source="packed", root=str(tmp_path / name))
        train, val = (open_source(config, split, 28) for split in ("train", "val"))
        assert (train.num_samples, val.num_samples) == (40, 20)
        found = sorted(np.asarray(val.load(i))[..., 0].tobytes() for i in range(20))
        assert found == sorted(image.tobytes() for image in held_out)
        assert np.bincount(train.labels).tolist() == np.bincount(labels[:40]).tolist()
    assert facts == data.write_data(tmp_path, 30, source)
    assert facts["select"]["sha256"] != facts["test"]["sha256"]


def test_a_missing_package_is_named_with_the_command_that_installs_it(source, tmp_path) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        data.read_idx("train-images-idx3", tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no")
    with pytest.raises(SystemExit, match=r"is damaged .*: install the package again"):
        data.read_idx("train-images-idx3", tmp_path)


def test_the_queue_goes_on_where_it_stopped_and_the_page_needs_every_run(
    source, tmp_path, monkeypatch, capsys
) -> None:
    """The two arms that need no features and no choice of a weight."""
    hard = next(arm for arm in arms() if arm.name == "hard 0.5")
    none = next(arm for arm in arms() if arm.name == "none")
    monkeypatch.setattr(run, "arms", lambda: [hard, none])
    monkeypatch.setattr("bench.fashion.page.arms", lambda: [hard, none])
    tables = ("tuning", "targets")
    monkeypatch.setattr(run, "write_data", lambda root, n: data.write_data(root, n, source))
    monkeypatch.setattr(protocol, "SEEDS", (0, 1))
    results = tmp_path / "results"
    words = ["fashion", "run", "--work", str(tmp_path / "work"), "--results", str(results)]
    run.main([*words, "--limit", "2"])
    assert len([*results.glob("*-seed-*.json")]) == 2
    with pytest.raises(SystemExit, match=r"1 runs are missing:\n.*test-none-seed-1\.json"):
        write_page(results, tmp_path / "page.md", tables=tables)
    before = {path: path.read_bytes() for path in results.iterdir()}
    run.main(words)
    assert all(path.read_bytes() == content for path, content in before.items())
    result = json.loads((results / "select-hard-0-5-seed-100.json").read_text())
    assert result["bytes_per_image"] == 2 * hard.views and result["steps"] == 8
    assert 0 <= result["top1"] <= 1 and result["nll"] > 0 and 0 <= result["ece"] <= 1
    write_page(results, tmp_path / "page.md", tables=tables)
    page = (tmp_path / "page.md").read_text()
    rows = json.loads((results / "summary.json").read_text())["means"]
    assert [row["impl"] for row in rows] == ["hard 0.5", "none"]
    assert rows[0]["accuracy"] == pytest.approx(100 * result["top1"])
    assert "| none |" in page and f"| {2 * hard.views} |" in page
    monkeypatch.setitem(protocol.STUDENT, "batch_size", 20)
    with pytest.raises(SystemExit, match="is of another protocol"):
        write_page(results, tmp_path / "page.md", tables=tables)


def test_the_protocol_is_whole() -> None:
    every = arms()
    assert len({arm.name for arm in every}) == len(every)
    assert {table for arm in every for table in arm.tables} == {*protocol.TABLES}
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=1e-3)  # 4.303 / sqrt(3)
    for arm in every:
        assert {*arm.caches} <= {*protocol.CACHES} and {*arm.chosen.values()} <= {*protocol.TUNINGS}
