"""Hugging Face datasets on the disk: the images of the files they were made from, or one line."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import deit_fast
from deit_fast.cli import main
from deit_fast.config import DataConfig, ViewConfig
from deit_fast.data import UnreadableImage, ViewLoader, hub_rows, open_loader, open_source
from deit_fast.errors import InputError
from deit_fast.hub_files import split_files
from deit_fast.models.convnet import small_convnet
from deit_fast.precomputation import precompute
from deit_fast.tools.pack import pack
from deit_fast.training.loop import train
from deit_fast.views.plan import ViewPlan
from helpers.digits import write_few_digits
from helpers.images import encode, picture, write_split
from helpers.runs import run_config, weights_equal

pa = pytest.importorskip("pyarrow")

from helpers.tables import IMAGE, featured, save_to_disk, table_of, write_parquet  # noqa: E402

RECIPE = ViewConfig(seed=3, image_size=24, repeats=1)
FORMS = ["parquet", "arrow", "folders"]
JPEGS = [encode(picture(seed, 30, 20), "JPEG") for seed in range(7)]
SPLITS = {"train": "train", "val": "test"}


def hub(root: Path | str, **columns: str) -> DataConfig:
    return DataConfig(root=str(root), source="hf", workers=0, **columns)


def convert(
    folder: Path, root: Path, form: str, shards: int = 3, rows: int = 3, **options: str
) -> None:
    """The images of a folder as a data set of the Hub, in the folder's order."""
    for split, name in SPLITS.items():
        source = open_source(DataConfig(root=str(folder)), split, 24)
        images = [source.read(index) for index in range(source.num_samples)]
        table = table_of(images, source.labels.tolist(), source.classes)
        if form == "parquet":
            write_parquet(table, root / "data", name, shards, rows, **options)
        elif form == "arrow":
            save_to_disk(table, root / name, shards, rows)
        else:
            write_parquet(table, root / name, "part", shards, rows)


def opened(root: Path, table, form: str = "arrow", **columns: str):
    """The training split of one table."""
    if form == "arrow":
        save_to_disk(table, root / "train")
    else:
        write_parquet(table, root / "data", "train")
    return open_source(hub(root, **columns), "train", 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    write_split(root / "train", 3, 7)
    write_split(root / "val", 3, 2, seed=50)
    return root


@pytest.fixture(scope="module")
def sets(folder, tmp_path_factory) -> dict[str, Path]:
    roots = {form: tmp_path_factory.mktemp("sets") / form for form in FORMS}
    for form, root in roots.items():
        convert(folder, root, form)
    return roots


def views(source, workers: int = 0) -> bytes:
    """All views 0 and 1 of a source, as bytes."""
    plan = ViewPlan(RECIPE, source.num_samples)
    ids = np.arange(source.num_samples)
    batches = [(ids, np.zeros_like(ids)), (ids[::-1].copy(), np.ones_like(ids))]
    loader = ViewLoader(source, plan, batches, workers=workers, on_error="fail")
    return b"".join(
        batch.images.numpy().tobytes() + batch.plan.numpy().tobytes()
        + batch.labels.numpy().tobytes() for batch in loader
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The same images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_give_the_views_of_the_files_in_them(folder, sets, form, workers):
    for split in SPLITS:
        files = open_source(DataConfig(root=str(folder)), split, 24)
        rows = open_source(hub(sets[form]), split, 24)
        assert rows.classes == files.classes and rows.labels.dtype == np.int64
        assert rows.labels.tolist() == files.labels.tolist()
        assert views(rows, workers) == views(files)


def read_all(source) -> list[bytes]:
    return [source.read(index) for index in range(source.num_samples)]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_bytes(sets, form, method):
    source = open_source(hub(sets[form]), "train", 24)
    expected = read_all(source)  # a forked process inherits the groups that are open here
    assert len(pickle.dumps(source)) < 20_000, "a pickle names the files and holds no image"
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [source] * 2) == [expected] * 2


def test_a_run_and_its_cache_are_those_of_the_folder(tmp_path):
    write_few_digits(tmp_path / "folder", train=6, val=2)
    convert(tmp_path / "folder", tmp_path / "hub", "parquet")
    torch.manual_seed(0)
    save_file(small_convnet(10).state_dict(), tmp_path / "teacher.safetensors")
    teacher = f"deit_fast.models.convnet:small_convnet@{tmp_path}/teacher.safetensors"
    results = {}
    for name in ("folder", "hub"):
        data = {"root": str(tmp_path / name), "source": "hf" if name == "hub" else "folder"}
        config = run_config(tmp_path, tmp_path / f"run-{name}", max_steps=2, batch_size=12,
                            cache=str(tmp_path / f"cache-{name}"), teacher_floor=0.0,
                            num_views=3, data=data)  # fmt: skip
        precompute(config.replace(teacher=teacher))
        results[name] = train(config.replace(teacher=None))
    assert weights_equal(tmp_path / "run-folder", tmp_path / "run-hub")
    assert results["folder"]["top1"] == results["hub"]["top1"]
    for run, root in itertools.product(("folder", "hub"), repeat=2):  # whatever the run read
        found = deit_fast.evaluate(tmp_path / f"run-{run}", data_root=tmp_path / root).details
        assert found["top1"] == results["folder"]["top1"]
    words = ["cache", "info", str(tmp_path / "cache-hub"), "--data-root"]
    assert main([*words, str(tmp_path / "hub")]) == 0
    assert main([*words, str(tmp_path / "folder")]) == 2  # other images


def test_columns_are_found_in_each_split_by_itself(tmp_path):
    """A split may name its columns otherwise: the accuracy is that of equal names."""
    write_few_digits(tmp_path / "folder", train=3, val=2)
    convert(tmp_path / "folder", tmp_path / "same", "parquet")
    convert(tmp_path / "folder", tmp_path / "other", "parquet")
    source = open_source(DataConfig(root=str(tmp_path / "folder")), "val", 24)
    table = table_of(read_all(source), source.labels.tolist())
    table = featured(table.rename_columns(["img", "cls"]), img="Image", cls=source.classes)
    write_parquet(table, tmp_path / "other/data", "test", 3)
    results = {}
    for name in ("other", "same"):
        config = run_config(tmp_path, tmp_path / name / "run", max_steps=2, batch_size=6,
                            cache=str(tmp_path / "cache"), teacher_floor=0.0, num_views=3,
                            teacher="deit_fast.models.convnet:small_convnet",
                            data={"root": str(tmp_path / name), "source": "hf"})  # fmt: skip
        if name == "other":
            precompute(config)  # the cache follows the training split alone
        results[name] = train(config.replace(teacher=None))
    assert results["same"]["top1"] == results["other"]["top1"]
    assert results["same"]["loss"] == results["other"]["loss"]
    named = {"root": str(tmp_path / "other"), "image_column": "image"}
    with pytest.raises(InputError, match=r"test-\d.* has no column 'image' of encoded images"):
        train(config.replace(teacher=None, output=str(tmp_path / "named"), data=named))


def test_a_cache_of_the_folder_is_refused(tmp_path):
    write_few_digits(tmp_path / "folder", train=3, val=2)
    convert(tmp_path / "folder", tmp_path / "hub", "parquet")
    write_few_digits(tmp_path / "other", train=4, val=2)
    convert(tmp_path / "other", tmp_path / "changed", "parquet")
    config = run_config(tmp_path, tmp_path / "run", batch_size=6, teacher_floor=0.0, num_views=3,
                        teacher="deit_fast.models.convnet:small_convnet",
                        cache=str(tmp_path / "cache"),
                        data={"root": str(tmp_path / "hub"), "source": "hf"})  # fmt: skip
    precompute(config)
    with pytest.raises(InputError, match=r"dataset\.num_samples"):
        train(config.replace(teacher=None, data={"root": str(tmp_path / "changed")}))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_pack_of_them_gives_the_same_views(folder, sets, tmp_path, form):
    pack(hub(sets[form]), str(tmp_path / "pack"), short_side=1000)
    assert main(["pack", str(sets[form]), str(tmp_path / "verb"), "--source", "hf",
                 "--short-side", "1000", "--workers", "0"]) == 0  # fmt: skip
    for name in ("pack", "verb"):
        packed = open_source(DataConfig(root=str(tmp_path / name), source="packed"), "train", 24)
        assert views(packed) == views(open_source(DataConfig(root=str(folder)), "train", 24))
        assert packed.paths[20].endswith("00002-of-00003." + form + ":6")


@pytest.mark.dali
@pytest.mark.parametrize("form", FORMS)
def test_dali_decodes_them_to_the_same_views(sets, form):
    pytest.importorskip("nvidia.dali")
    source = open_source(hub(sets[form]), "train", 24)
    plan = ViewPlan(RECIPE, source.num_samples)
    ids = np.arange(source.num_samples)
    loaders = [
        open_loader(dataclasses.replace(hub(sets[form]), loader=name), source, plan,
                    [(ids, np.zeros_like(ids))], device="cpu")
        for name in ("pillow", "dali-cpu")
    ]  # fmt: skip
    for ours, dalis in zip(*loaders, strict=True):
        assert ours.images.equal(dalis.images) and ours.labels.equal(dalis.labels)


# ---------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_the_fingerprint_follows_names_sizes_and_classes(tmp_path, form):
    longer = [*JPEGS[:-1], JPEGS[-1] + b"\0"]
    tables = {
        "base": table_of(JPEGS, [0, 1, 0, 1, 0, 1, 0], ["ant", "bee"]),
        "label": table_of(JPEGS, [1, 1, 0, 1, 0, 1, 0], ["ant", "bee"]),
        "names": table_of(JPEGS, [0, 1, 0, 1, 0, 1, 0], ["ant", "cat"]),
        "size": table_of(longer, [0, 1, 0, 1, 0, 1, 0], ["ant", "bee"]),
    }
    sums = {name: opened(tmp_path / name, table, form).fingerprint()["dataset.sha256"]
            for name, table in tables.items()}  # fmt: skip
    assert len(set(sums.values())) == 4
    again = open_source(hub(tmp_path / "base"), "train", 24)
    again.follow(["bee", "new", "ant"], "the run")
    assert again.labels.tolist() == [2, 0, 2, 0, 2, 0, 2]
    assert again.fingerprint()["dataset.sha256"] == sums["base"], "the files are the same"


# ---------------------------------------------------------------------------------------------
# Columns and labels
# ---------------------------------------------------------------------------------------------


def test_labels_without_names_are_numbers_or_lines_or_texts(tmp_path):
    numbers = table_of(JPEGS, [3, 1, 3, 1, 0, 1, 0])
    source = opened(tmp_path / "numbers", numbers)
    assert source.classes == ["0", "1", "2", "3"] and source.labels[0] == 3
    (tmp_path / "numbers/classes.txt").write_text("ant\nbee\ncat\ndog\n")
    source = open_source(hub(tmp_path / "numbers"), "train", 24)
    assert source.classes == ["ant", "bee", "cat", "dog"]
    texts = ["cat", "ant", "bee", "cat", "ant", "bee", "bee"]
    for form in ("arrow", "parquet"):
        for kind in (None, pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
            table = table_of(JPEGS, texts, label_type=kind)
            source = opened(tmp_path / f"{form}-{kind}"[:20].replace("<", "-"), table, form)
            assert source.classes == ["ant", "bee", "cat"]
            assert [source.classes[label] for label in source.labels] == texts


def test_texts_are_numbered_over_all_files(tmp_path):
    table = table_of(JPEGS, ["d", "d", "a", "c", "c", "b", "b"])
    save_to_disk(table, tmp_path / "train", shards=3, rows=2)
    source = open_source(hub(tmp_path), "train", 24)
    assert source.classes == ["a", "b", "c", "d"] and source.labels.tolist() == [
        3,
        3,
        0,
        2,
        2,
        1,
        1,
    ]
    assert read_all(source) == JPEGS


def test_images_are_found_by_their_structure(tmp_path):
    plain = pa.table({"jpg": pa.array(JPEGS), "cls": pa.array([0, 1, 0, 1, 0, 1, 0])})
    large = pa.table({"jpg": pa.array(JPEGS, pa.large_binary()), "cls": plain["cls"]})
    thumbs = plain.append_column("image", table_of(JPEGS[::-1], [0] * 7)["image"])
    for form in ("arrow", "parquet"):
        assert read_all(opened(tmp_path / f"plain-{form}", plain, form)) == JPEGS
        assert read_all(opened(tmp_path / f"large-{form}", large, form)) == JPEGS
        assert read_all(opened(tmp_path / f"both-{form}", thumbs, form)) == JPEGS[::-1]
        source = open_source(hub(tmp_path / f"both-{form}", image_column="jpg"), "train", 24)
        assert read_all(source) == JPEGS


LABELS = [0, 1, 0, 1, 0, 1, 0]
FINE = {"fine": pa.array(LABELS), "coarse": pa.array(LABELS)}
WRONG = {
    "two columns of encoded images": (
        table_of(JPEGS, LABELS, thumb=table_of(JPEGS, LABELS)["image"]), {},
        "has 2 columns of encoded images, image, thumb: choose one by data.image_column",
    ),
    "two columns of labels": (
        featured(table_of(JPEGS, LABELS, **FINE), fine=["a", "b"], coarse=["c", "d"]), {},
        "has 2 columns of whole numbers or texts, fine, coarse: choose one by data.label_column",
    ),
    "an unknown column": (
        table_of(JPEGS, LABELS, **FINE), {"label_column": "corse"},
        "has no column 'corse' of whole numbers or texts (did you mean coarse?)",
    ),
    "a column of another kind": (
        table_of(JPEGS, LABELS), {"image_column": "label"},
        "has no column 'label' of encoded images: data.image_column may be image",
    ),
    "no images": (pa.table({"label": pa.array([0, 1])}), {}, "has no column of encoded images"),
    "no labels": (table_of(JPEGS, LABELS).drop(["label"]), {}, "has no column of whole numbers"),
    "a missing label": (
        table_of(JPEGS, [0, 1, None, 1, 0, 1, 0]), {},
        "1 rows have no label in column 'label': a split without labels cannot be used; remove its",
    ),
    "labels of minus one": (
        table_of(JPEGS, [0, 1, 0, -1, 0, 1, 0], ["a", "b"]), {},
        "data-00000-of-00001.arrow:3 has label -1, and classes count from 0: a split without "
        "labels cannot be used; remove its files, or choose another column by data.label_column",
    ),
    "minus one without names": (
        table_of(JPEGS, [0, 1, 0, -1, 0, 1, 0]), {}, ":3 has label -1, and classes count from 0: a",
    ),
    "a label too high": (
        table_of(JPEGS, [0, 1, 0, 1, 0, 1, 2], ["a", "b"]), {},
        ":6 has label 2, and its ClassLabel names 2 classes: correct either, or choose another col",
    ),
    "an id for a label": (
        table_of(JPEGS, [0, 1, 2**40, 1, 0, 1, 0]), {},
        ":2 has label 1099511627776, and a data set has at most 1048576 classes: choose another",
    ),
    "equal names": (table_of(JPEGS, LABELS, ["a", "a"]), {}, "'label' are both named 'a'"),
    "one class": (table_of(JPEGS, [0] * 7, ["a"]), {}, "has one class, 'a'"),
    "no rows": (table_of([], [], ["a", "b"], pa.int64()), {}, "have no rows"),
    "names of files alone": (table_of([None] * 7, LABELS), {}, "name files and hold no image"),
}  # fmt: skip


@pytest.mark.parametrize("name", [key.replace(" ", "-") for key in WRONG])
def test_wrong_columns_and_labels_are_one_line(tmp_path, name):
    table, columns, message = WRONG[name.replace("-", " ")]
    with pytest.raises(InputError) as caught:
        opened(tmp_path, table, **columns)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_label_without_a_line_of_classes_txt_names_that_file(tmp_path):
    save_to_disk(table_of(JPEGS, LABELS), tmp_path / "train")
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(
        InputError, match=r":1 has label 1, and .*/classes\.txt names 1 classes: co"
    ):
        open_source(hub(tmp_path), "train", 24)


def test_files_of_other_classes_are_named(tmp_path):
    write_parquet(table_of(JPEGS, LABELS, ["a", "b"]), tmp_path / "train", "x")
    write_parquet(table_of(JPEGS, LABELS, ["b", "a"]), tmp_path / "train", "y")
    with pytest.raises(
        InputError, match=r"/y-00000-of-00001\.parquet has other columns or classes"
    ):
        open_source(hub(tmp_path), "train", 24)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_row_without_an_image_is_unreadable(tmp_path, form):
    rows = [{"bytes": content, "path": "x"} for content in JPEGS]
    rows[2], rows[4] = None, {"bytes": None, "path": "4.jpg"}
    table = pa.table({"image": pa.array(rows, IMAGE), "label": pa.array(LABELS)})
    source = opened(tmp_path, table, form)
    for row in (2, 4):
        with pytest.raises(UnreadableImage, match=f"{form}:{row}: the row holds no image"):
            source.read(row)
    assert source.read(5) == JPEGS[5] and source.read(3) == JPEGS[3]
    if form == "arrow":
        assert source.left_out.startswith("2 rows without an image, which count as unreadable")


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_the_files_of_a_split_are_found_in_the_layouts_of_the_hub(tmp_path):
    touch(
        tmp_path / "a/data",
        "train-00001-of-00002.parquet",
        "train-00000-of-00002.parquet",
        "test-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
        "README.md",
    )
    assert split_files(str(tmp_path / "a"), "train")[1] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert split_files(str(tmp_path / "a"), "val")[1] == ["validation-00000-of-00001.parquet"]
    touch(tmp_path / "b", "train.parquet", "trainer.parquet", "test.parquet")
    assert split_files(str(tmp_path / "b"), "train") == (str(tmp_path / "b"), ["train.parquet"])
    assert split_files(str(tmp_path / "b"), "val") == (str(tmp_path / "b"), ["test.parquet"])
    touch(tmp_path / "c/train", "data-00000-of-00001.arrow", "cache-1234.arrow", "tmpx.arrow")
    assert split_files(str(tmp_path / "c"), "train")[1] == ["data-00000-of-00001.arrow"]


def test_a_split_that_is_missing_or_not_complete_is_one_line(tmp_path, capsys):
    train = [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    touch(tmp_path / "lost/data", train[0], train[2])
    with pytest.raises(InputError, match=r"train-00001-of-00003\.parquet|train-00001-of-00003 is"):
        split_files(str(tmp_path / "lost"), "train")
    touch(tmp_path / "end/data", *train[:2])
    with pytest.raises(InputError, match=r"not complete: train-00002-of-00003 is missing"):
        split_files(str(tmp_path / "end"), "train")
    touch(tmp_path / "two/data", *train, "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"of two data sets, train-\*-of-00001 and train-\*-of-0"):
        split_files(str(tmp_path / "two"), "train")
    touch(tmp_path / "both/train", "a.parquet", "a.arrow")
    with pytest.raises(InputError, match=r"holds \.parquet and \.arrow files of one split"):
        split_files(str(tmp_path / "both"), "train")
    touch(tmp_path / "some/train", "dataset.arrow", "indices.arrow")
    with pytest.raises(InputError, match=r"train/indices\.arrow selects rows .* `save_to_disk`"):
        split_files(str(tmp_path / "some"), "train")
    touch(tmp_path / "config/plain_text", "train-00000-of-00001.parquet")
    with pytest.raises(
        InputError, match=r"its folder 'plain_text' has it; did you mean .*plain_te"
    ):
        split_files(str(tmp_path / "config"), "train")
    with pytest.raises(InputError, match=r"has no split 'val': expected val-\*\.parquet or valid"):
        split_files(str(tmp_path / "two"), "val")
    assert main(["train", "--data.root", str(tmp_path / "end"), "--data.source", "hf"]) == 2
    assert "is not complete" in capsys.readouterr().err
    for root in ("two", "both"):
        assert main(["train", "--data.root", str(tmp_path / root)]) == 2
        assert "a Hugging Face dataset, which --data.source hf reads" in capsys.readouterr().err


def test_two_names_of_one_file_are_refused(tmp_path):
    write_parquet(table_of(JPEGS, LABELS), tmp_path / "train", "x")
    os.link(tmp_path / "train/x-00000-of-00001.parquet", tmp_path / "train/y.parquet")
    with pytest.raises(InputError, match="are one file, through a link"):
        open_source(hub(tmp_path), "train", 24)


def test_a_link_to_nothing_names_itself(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.parquet").symlink_to(tmp_path / "blobs/gone")
    with pytest.raises(InputError, match=r"train/a\.parquet is a link to .*gone, which does not"):
        open_source(hub(tmp_path), "train", 24)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_file_that_changes_while_in_use_is_refused(tmp_path, form):
    def write(images):
        table = table_of(images, LABELS)
        if form == "arrow":
            save_to_disk(table, tmp_path / "train", rows=2)
        else:
            write_parquet(table, tmp_path / "data", "train", rows=2)

    write(JPEGS)
    source = open_source(hub(tmp_path), "train", 24)
    source.read(0)
    write(JPEGS[::-1])
    path = next(tmp_path.rglob(f"*.{form}"))
    for change in (lambda: None, lambda: os.truncate(path, 300), path.unlink):
        change()
        with pytest.raises((InputError, OSError)) as caught:
            source.read(6)
        assert str(path) in str(caught.value)
        if path.exists():
            assert "was changed while it was in use: start the command" in str(caught.value)


def test_a_group_of_rows_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = opened(tmp_path, table_of(JPEGS, LABELS), "parquet")
    path, original = next(tmp_path.rglob("*.parquet")), hub_rows.image_bytes

    def change(images):
        os.utime(path, ns=(0, 0))
        return original(images)

    monkeypatch.setattr(hub_rows, "image_bytes", change)
    with pytest.raises(InputError, match="was changed while it was in use"):
        source.read(0)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_file_that_is_cut_off_is_named(tmp_path, form):
    opened(tmp_path, table_of(JPEGS, LABELS), form)
    path = next(tmp_path.rglob(f"*.{form}"))
    content = path.read_bytes()
    lengths = [0, 1, 7, 8, 100, len(content) // 2, *range(len(content) - 9, len(content))]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"\.{form} is (damaged|cut off)") as caught:
            open_source(hub(tmp_path), "train", 24)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_damaged_bytes_are_one_line_or_an_image(tmp_path, form):
    """Any flipped byte: a line that names the file, other bytes of an image, or a null row."""
    opened(tmp_path, table_of(JPEGS, ["a", "b", "a", "b", "a", "b", "a"]), form)
    path = next(tmp_path.rglob(f"*.{form}"))
    content = path.read_bytes()
    body = content.find(JPEGS[0]), content.rfind(JPEGS[-1])
    outside = [i for i in range(len(content)) if not body[0] + 20 < i < body[1]]
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.choice(outside, int(os.environ.get("DEIT_FAST_DAMAGES", "140"))).tolist():
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            source = open_source(hub(tmp_path), "train", 24)
            for index in range(source.num_samples):
                try:
                    source.read(index)
                except UnreadableImage:
                    continue
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_flipped_bit_is_seen_by_page_checksums_alone(tmp_path, column, has_checksums):
    """Without them another label is another cache, and another byte of an image passes."""
    write_parquet(
        table_of(JPEGS, LABELS), tmp_path / "train", "x", compression="none",
        use_dictionary=False, write_page_checksum=has_checksums,
    )  # fmt: skip
    before = open_source(hub(tmp_path), "train", 24).fingerprint()["dataset.sha256"]
    path = next(tmp_path.rglob("*.parquet"))
    content = bytearray(path.read_bytes())
    labels = content.find(np.array(LABELS, "<i8").tobytes())
    content[content.find(JPEGS[3]) + 200 if column == "image" else labels + 8] ^= 1
    path.write_bytes(content)
    if has_checksums:
        with pytest.raises(InputError, match=r"x-00000-of-00001\.parquet is damaged: .*checksum"):
            read_all(open_source(hub(tmp_path), "train", 24))
        return
    source = open_source(hub(tmp_path), "train", 24)
    changed = [old != new for old, new in zip(JPEGS, read_all(source), strict=True)]
    assert changed == [column == "image" and row == 3 for row in range(7)]
    assert (source.fingerprint()["dataset.sha256"] == before) == (column == "image")


def test_compressed_arrow_is_refused(tmp_path):
    save_to_disk(table_of(JPEGS, LABELS), tmp_path / "train", compression="zstd")
    with pytest.raises(
        InputError, match=r"arrow is compressed, so that no image can be read by it"
    ):
        open_source(hub(tmp_path), "train", 24)


def test_the_other_form_of_arrow_files_is_read(tmp_path):
    (tmp_path / "train").mkdir()
    with pa.ipc.new_file(str(tmp_path / "train/a.arrow"), table_of(JPEGS, LABELS).schema) as writer:
        writer.write_table(table_of(JPEGS, LABELS), 3)
    assert read_all(open_source(hub(tmp_path), "train", 24)) == JPEGS


def test_precompute_says_that_a_cache_of_substitutes_outlives_their_mending(tmp_path, caplog):
    """The fingerprint is the same before and after; `train` says nothing of making a cache."""
    write_few_digits(tmp_path / "folder", train=3, val=2)
    convert(tmp_path / "folder", tmp_path / "hub", "parquet", compression="none")
    config = run_config(tmp_path, tmp_path / "run", batch_size=6, epochs=3, teacher_floor=0.0,
                        teacher="deit_fast.models.convnet:small_convnet", num_views=3,
                        cache=str(tmp_path / "cache"),
                        data={"root": str(tmp_path / "hub"), "source": "hf"})  # fmt: skip
    source = open_source(config.data, "train", 24)
    path = tmp_path / "hub/data/train-00000-of-00003.parquet"
    content, image = path.read_bytes(), source.read(4)
    path.write_bytes(content.replace(image, b"\0" + image[1:], 1))  # later ones are statistics
    assert len(precompute(config)["substituted"]) == 1
    (line,) = [text for text in caplog.messages if "substituted" in text]
    assert line == (
        f"1 unreadable images were substituted, the first is {path}:4: the cache holds the targets "
        f"of their substitutes; once the images are mended, delete the cache and make it anew"
    )
    caplog.clear()
    train(config.replace(teacher=None))
    (line,) = [text for text in caplog.messages if "substituted" in text]
    assert line == f"1 unreadable images were substituted, the first is {path}:4"
    damaged = open_source(config.data, "train", 24).fingerprint()
    path.write_bytes(content)
    assert open_source(config.data, "train", 24).fingerprint() == damaged == source.fingerprint()


# ---------------------------------------------------------------------------------------------
# Groups of rows in memory
# ---------------------------------------------------------------------------------------------


def test_groups_of_rows_stay_in_bounded_memory(tmp_path, monkeypatch):
    images = [bytes([number]) * 1000 for number in range(40)]
    write_parquet(table_of(images, [n % 2 for n in range(40)]), tmp_path / "train", "x", 2, rows=5)
    monkeypatch.setattr(hub_rows, "GROUP_BYTES", 3 * 6000)
    source = open_source(hub(tmp_path), "train", 24)
    groups = source._rows._group
    for index in range(40):
        assert source.read(index) == images[index]
    assert groups.cache_info().misses == 8, "a pass in order reads each group once"
    assert groups.cache_info().currsize == 3
    for index in (39, 31, 27, 38):
        source.read(index)
    assert groups.cache_info().misses == 8, "the last groups are there"


def test_large_groups_of_rows_are_warned_of_once(tmp_path, monkeypatch, caplog):
    images = [np.random.default_rng(n).bytes(1000) for n in range(300)]
    table = table_of(images, [n % 2 for n in range(300)])
    write_parquet(table, tmp_path / "large" / "train", "x", rows=150)
    write_parquet(table, tmp_path / "small" / "train", "x", rows=100)
    open_source(hub(tmp_path / "large"), "train", 24)
    assert not caplog.messages, "all groups stay in memory"
    monkeypatch.setattr(hub_rows, "GROUP_BYTES", 200_000)
    open_source(hub(tmp_path / "large"), "train", 24)
    assert len(caplog.messages) == 1 and "hold up to 150 images in a group" in caplog.text
    open_source(hub(tmp_path / "small"), "train", 24)
    assert len(caplog.messages) == 1


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def test_without_pyarrow_the_error_names_the_extra(sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"hf needs pyarrow: pip install 'deit-fast\[parquet\]'"):
        open_source(hub(sets["arrow"]), "train", 24)


def test_columns_of_other_sources_are_refused():
    with pytest.raises(
        InputError, match=r"data\.image_column=jpg has no effect with data\.source=f"
    ):
        DataConfig(root="x", image_column="jpg")
