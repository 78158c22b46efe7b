"""Tar and packed shards: the samples of the files they were made from, or a one-line error."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit_fast.cli import main
from deit_fast.config import DataConfig, ViewConfig
from deit_fast.data import EvalLoader, UnreadableImage, ViewLoader, open_loader, open_source
from deit_fast.data.packed_shards import PackedImages
from deit_fast.data.tar_shards import TarShards
from deit_fast.errors import InputError
from deit_fast.runtime.files import read_json, write_json
from deit_fast.runtime.locks import owned_folder
from deit_fast.tools.pack import pack
from deit_fast.views.plan import ViewPlan
from helpers.tars import add, write_tars

RECIPE = ViewConfig(seed=3, image_size=24, repeats=1)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def jpeg(seed: int, width: int, height: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=92)
    return file.getvalue()


def size_of(seed: int) -> tuple[int, int]:
    return 40 + 7 * (seed % 5), 36 + 11 * (seed % 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """11 training and 4 held-out images of three classes, by ImageFolder's layout."""
    root = tmp_path / "set"
    for split, first, count in (("train", 0, 11), ("val", 100, 4)):
        for seed in range(first, first + count):
            path = root / split / CLASSES[seed % 3] / f"{seed:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed, *size_of(seed)))
    return root


def views(source, workers: int = 0) -> bytes:
    """All views 0 and 1 of a source, as bytes."""
    plan = ViewPlan(RECIPE, source.num_samples)
    ids = np.arange(source.num_samples)
    batches = [(ids, np.zeros_like(ids)), (ids[::-1].copy(), np.ones_like(ids))]
    loader = ViewLoader(source, plan, batches, workers=workers, on_error="fail")
    content = b""
    for batch in loader:
        content += batch.images.numpy().tobytes() + batch.plan.numpy().tobytes()
        content += batch.labels.numpy().tobytes() + batch.lam.numpy().tobytes()
    return content


def evaluation(source) -> bytes:
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    loader = EvalLoader(source, 24, 0.875, mean, std, batch_size=3, workers=0)
    return b"".join(images.numpy().tobytes() for images, _, _ in loader)


# ---------------------------------------------------------------------------------------------
# Tar shards
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tar_shards_give_the_views_of_the_files_in_them(
    folder: Path, tmp_path: Path, label: str, workers: int
) -> None:
    write_tars(folder, tmp_path / "tars", label=label)
    data = DataConfig(root=str(tmp_path / "tars"), source="tar")
    for split in ("train", "val"):
        files = open_source(DataConfig(root=str(folder)), split, 24)
        shards = open_source(data, split, 24)
        assert shards.classes == list(CLASSES)
        assert shards.labels.tolist() == files.labels.tolist()
        assert views(shards, workers) == views(files)
        assert evaluation(shards) == evaluation(files)


def test_labels_of_shards_follow_the_names_in_classes_txt(folder: Path, tmp_path: Path) -> None:
    write_tars(folder, tmp_path / "tars")
    pack(DataConfig(root=str(tmp_path / "tars"), source="tar", workers=0), str(tmp_path / "pack"))
    run = ["cat", "ant", "new", "bee"]
    for data in (packed(tmp_path / "pack"), DataConfig(root=str(tmp_path / "tars"), source="tar")):
        plain, mapped = open_source(data, "val", 24), open_source(data, "val", 24, run)
        assert [run[label] for label in mapped.labels] == [CLASSES[label] for label in plain.labels]
        sums = {source.fingerprint()["dataset.sha256"] for source in (plain, mapped)}
        assert len(sums) == 1
    (tmp_path / "tars/classes.txt").unlink()
    with pytest.raises(InputError, match="has class '0' and 2 more, which the run lacks"):
        open_source(data, "val", 24, run)


def test_the_index_is_kept_and_notices_a_changed_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "tars"
    write_tars(folder, root)
    first = TarShards(str(root), "train")
    assert (root / "train" / ".deit-fast-index.npz").exists()
    scans = []
    import deit_fast.data.tar_shards as module

    original = module._scan
    monkeypatch.setattr(module, "_scan", lambda *a: scans.append(a) or original(*a))
    again = TarShards(str(root), "train")
    assert not scans
    assert again.fingerprint() == first.fingerprint()
    assert again.paths[10] == first.paths[10] == str(root / "train/train-000002.tar/000010.jpg")

    with tarfile.open(root / "train" / "train-000002.tar", "a") as archive:
        add(archive, "zzz.jpg", jpeg(55, 40, 40))
        add(archive, "zzz.cls", b"1")
    grown = TarShards(str(root), "train")
    assert scans and grown.num_samples == 12 and grown.labels[-1] == 1
    assert grown.fingerprint() != first.fingerprint()
    assert np.asarray(grown.load(11)).shape == (40, 40, 3)


def test_a_damaged_index_is_made_again(folder: Path, tmp_path: Path, caplog) -> None:
    root = tmp_path / "tars"
    write_tars(folder, root)
    first = TarShards(str(root), "train")
    path = root / "train" / ".deit-fast-index.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    assert TarShards(str(root), "train").fingerprint() == first.fingerprint()

    arrays = dict(np.load(path))
    arrays["offset"] = arrays["offset"] + (1 << 40)  # right checksums, wrong content
    np.savez(path, **arrays)
    assert TarShards(str(root), "train").fingerprint() == first.fingerprint()
    assert "does not fit the shards" in caplog.text


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([("a.jpg", b"x")], "'a.jpg' has no label"),
        ([("a.jpg", b"x"), ("a.cls", b"seven")], "'a.cls' must hold a class number, not b'seven'"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "must hold a class number"),
        ([("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"1")], "'a' has two images"),
        ([("a.txt", b"x"), ("a.cls", b"1")], "hold no images"),
        ([("a.jpg", b"x"), ("a.cls", b"9")], "is of class 9, but there are 3"),
    ],
)
def test_wrong_members_are_named(tmp_path: Path, members: list, named: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    with tarfile.open(tmp_path / "train" / "s.tar", "w") as archive:
        for name, content in members:
            add(archive, name, content)
    with pytest.raises(InputError, match=named):
        TarShards(str(tmp_path), "train")


def test_a_truncated_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "tars"
    write_tars(folder, root)
    path = root / "train" / "train-000001.tar"
    content = path.read_bytes()
    for length in (700, len(content) // 2, 100):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"train-000001\.tar is not a complete, plain tar"):
            TarShards(str(root), "train")


def test_a_shard_that_shrinks_later_is_an_error(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "tars"
    write_tars(folder, root)
    source = TarShards(str(root), "train")
    os.truncate(root / "train" / "train-000002.tar", 600)
    source.load(0)
    with pytest.raises(InputError, match=r"train-000002\.tar was changed while it was in use"):
        source.load(10)


def test_no_shards_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no folder 'train'"):
        TarShards(str(tmp_path), "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=r"holds no \.tar files"):
        TarShards(str(tmp_path), "train")


# ---------------------------------------------------------------------------------------------
# Packed shards
# ---------------------------------------------------------------------------------------------


def packed(root: Path | str) -> DataConfig:
    return DataConfig(root=str(root), source="packed")


@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_that_reduces_nothing_gives_the_same_views(
    folder: Path, tmp_path: Path, source: str, workers: int
) -> None:
    root = folder
    if source == "tar":
        root = tmp_path / "tars"
        write_tars(folder, root)
    data = DataConfig(root=str(root), source=source, workers=workers)
    result = pack(data, str(tmp_path / "pack"), short_side=1000, shard_samples=4)
    assert (result["images"], result["shards"], result["kept"]) == (15, 4, 0)
    for split in ("train", "val"):
        files = open_source(data, split, 24)
        ours = open_source(packed(tmp_path / "pack"), split, 24)
        assert ours.classes == files.classes and ours.labels.tolist() == files.labels.tolist()
        assert os.path.basename(ours.paths[3]) == os.path.basename(files.paths[3])
        assert views(ours, workers) == views(files)
        assert evaluation(ours) == evaluation(files)
        assert ours.fingerprint() != files.fingerprint()


def test_the_shorter_side_is_reduced_by_pillows_bicubic(folder: Path, tmp_path: Path) -> None:
    pack(DataConfig(root=str(folder), workers=0), str(tmp_path / "pack"), short_side=40)
    ours = PackedImages(str(tmp_path / "pack"), "train")
    files = open_source(DataConfig(root=str(folder)), "train", 24)
    reduced = 0
    for index in range(files.num_samples):
        image = Image.open(files.paths[index])
        width, height = image.size
        if min(width, height) > 40:
            reduced += 1
            size = 40, int(40 * height / width)
            if width > height:
                size = int(40 * width / height), 40
            image = image.resize(size, Image.Resampling.BICUBIC)
        assert np.array_equal(ours.load(index), np.asarray(image)), index
    assert 0 < reduced < files.num_samples


def test_jpeg_packs_hold_files_of_the_reduced_images(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(root=str(folder), workers=0)
    pack(data, str(tmp_path / "jpeg"), form="jpeg", short_side=40, quality=90)
    pack(data, str(tmp_path / "uint8"), short_side=40)
    files = PackedImages(str(tmp_path / "jpeg"), "train")
    pixels = PackedImages(str(tmp_path / "uint8"), "train")
    for index in range(files.num_samples):
        again = io.BytesIO()
        Image.fromarray(np.array(pixels.load(index))).save(again, "JPEG", quality=90)
        assert files.read(index) == again.getvalue()
        assert np.array_equal(
            np.asarray(files.load(index)), np.asarray(Image.open(io.BytesIO(files.read(index))))
        )
    with pytest.raises(InputError, match="holds decoded pixels"):
        pixels.read(0)
    assert files.fingerprint() != pixels.fingerprint()


@pytest.mark.dist
def test_a_killed_pack_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split, count in (("train", 60), ("val", 4)):
        for seed in range(count):
            path = root / split / CLASSES[seed % 3] / f"{seed:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed, 640, 480))
    data = DataConfig(root=str(root), workers=0)
    pack(data, str(tmp_path / "whole"), shard_samples=3)

    out = tmp_path / "pieces"
    code = (
        "from deit_fast.config import DataConfig; from deit_fast.tools.pack import pack\n"
        f"pack(DataConfig(root={str(root)!r}, workers=0), {str(out)!r}, shard_samples=3)"
    )
    killed = 0
    for shards_there in (1, 5, 11):
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None and len(list(out.glob("train/*.npz"))) < shards_there:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    result = pack(data, str(out), shard_samples=3)
    assert result["kept"] >= 5 and result["shards"] >= 1
    for path in sorted((tmp_path / "whole").rglob("*.*")):
        there = out / path.relative_to(tmp_path / "whole")
        if path.suffix == ".npz":  # a zip file has a time in it
            ours, theirs = np.load(path), np.load(there)
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)
        else:
            assert there.read_bytes() == path.read_bytes(), path


def test_a_pack_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(root=str(folder), workers=0)
    out = str(tmp_path / "pack")
    pack(data, out)
    with pytest.raises(InputError, match="a pack of other short_side: 256, not 128"):
        pack(data, out, short_side=128)
    with pytest.raises(InputError, match="a pack of other form"):
        pack(data, out, form="jpeg")
    (folder / "train" / "ant" / "000.jpg").write_bytes(jpeg(77, 50, 50))
    with pytest.raises(InputError, match="a pack of other source"):
        pack(data, out)


def test_a_second_pack_into_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    with owned_folder(out, ".lock-pack", "the pack"):
        with pytest.raises(InputError, match=r"\.lock-pack: the pack is being written by pid"):
            pack(DataConfig(root=str(folder), workers=0), str(out))
        assert [path.name for path in out.iterdir()] == [".lock-pack"]
    pack(DataConfig(root=str(folder), workers=0), str(out))
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]


def test_unreadable_images_keep_their_number(folder: Path, tmp_path: Path, caplog) -> None:
    """The loaders treat them like the broken file: same substitute, same count."""
    broken = folder / "train" / "bee" / "001.jpg"
    broken.write_bytes(b"no image")
    data = DataConfig(root=str(folder), workers=0)
    result = pack(data, str(tmp_path / "pack"), short_side=1000)
    assert result["unreadable"] == [str(broken)]
    assert "1 unreadable images were packed as such" in caplog.text
    again = pack(data, str(tmp_path / "pack"), short_side=1000)
    assert again["unreadable"] == [str(broken)] and again["shards"] == 0

    files, ours = (open_source(d, "train", 24) for d in (data, packed(tmp_path / "pack")))
    index = files.paths[:].index(str(broken))
    with pytest.raises(UnreadableImage, match="unreadable when it was packed"):
        ours.load(index)
    plan = ViewPlan(RECIPE, files.num_samples)
    ids = np.arange(files.num_samples)
    batches = [(ids, np.zeros_like(ids))]
    first, second = (
        next(iter(ViewLoader(s, plan, batches, workers=0, on_error="substitute")))
        for s in (files, ours)
    )
    assert first.images.equal(second.images) and first.labels.equal(second.labels)
    assert len(second.substituted) == 1 and second.substituted[0].endswith("bee/001.jpg")


def test_a_flipped_byte_is_an_unreadable_image(folder: Path, tmp_path: Path) -> None:
    pack(DataConfig(root=str(folder), workers=0), str(tmp_path / "pack"))
    path = tmp_path / "pack" / "train" / "shard-00000.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    source = PackedImages(str(tmp_path / "pack"), "train")
    wrong = 0
    for index in range(source.num_samples):
        try:
            source.load(index)
        except UnreadableImage as error:
            assert "checksum in shard-00000.bin is wrong" in str(error)
            wrong += 1
    assert wrong == 1


def change_table(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "shard-00000.npz"
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | change(arrays)))


def change_manifest(folder: Path, **changes: int) -> None:
    path = folder / "manifest.json"
    write_json(path, read_json(path) | changes)


def shorten(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-manifest": (lambda f: (f / "manifest.json").unlink(), "holds no packed images"),
    "other-version": (lambda f: change_manifest(f, version=2), "version must be 1, not 2"),
    "negative-count": (
        lambda f: change_manifest(f, num_samples=-1),
        r"num_samples must be a whole number in \[1, 2\^31\), not -1",
    ),
    "no-table": (
        lambda f: (f / "shard-00000.npz").unlink(),
        r"shard-00000\.npz is missing; run the same `deit-fast pack` command again",
    ),
    "torn-table": (
        lambda f: shorten(f / "shard-00000.npz", 200), r"shard-00000\.npz is damaged",
    ),
    "short-data": (
        lambda f: shorten(f / "shard-00000.bin", -1), r"does not fit shard-00000\.bin",
    ),
    "offsets": (
        lambda f: change_table(f, lambda t: {"offsets": t["offsets"][::-1].copy()}),
        "does not fit",
    ),
    "sizes": (lambda f: change_table(f, lambda t: {"sizes": t["sizes"] + 1}), "does not fit"),
    "labels": (
        lambda f: change_table(f, lambda t: {"labels": t["labels"] + 3}), r"labels leave \[0, 3\)",
    ),
    "dtype": (
        lambda f: change_table(f, lambda t: {"crc32c": t["crc32c"].astype(np.int64)}),
        "crc32c must be uint32, not int64",
    ),
    "shape": (
        lambda f: change_table(f, lambda t: {"labels": t["labels"][:-1]}),
        r"labels must have shape \(11,\), not \(10,\)",
    ),
    "names": (
        lambda f: change_table(f, lambda t: {"names": t["names"][:-1]}),
        "names must hold 11 names",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    pack(DataConfig(root=str(folder), workers=0), str(tmp_path / "pack"))
    damage(tmp_path / "pack" / "train")
    with pytest.raises(InputError, match=named):
        PackedImages(str(tmp_path / "pack"), "train")


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "pack")
    assert main(["pack", str(folder), out, "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "images      15" in text and "unreadable  0" in text
    assert open_source(packed(out), "train", 24).num_samples == 11
    assert main(["pack", str(folder), out, "--short-side", "0"]) == 2
    assert "short_side must lie in [1, 65535], not 0" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "nowhere"), out]) == 2
    assert "does not exist" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# DALI reads them too
# ---------------------------------------------------------------------------------------------


@pytest.mark.dali
@pytest.mark.parametrize("kind", ["tar", "jpeg pack"])
def test_dali_decodes_shards_to_the_same_views(folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("nvidia.dali")
    if kind == "tar":
        write_tars(folder, tmp_path / "shards")
        data = DataConfig(root=str(tmp_path / "shards"), source="tar", workers=2)
    else:
        pack(DataConfig(root=str(folder), workers=0), str(tmp_path / "shards"), form="jpeg")
        data = dataclasses.replace(packed(tmp_path / "shards"), workers=2)
    source = open_source(data, "train", 24)
    plan = ViewPlan(RECIPE, source.num_samples)
    ids = np.arange(source.num_samples)
    batches = [(ids, np.zeros_like(ids)), (ids[::-1].copy(), np.ones_like(ids))]
    loaders = (
        open_loader(dataclasses.replace(data, loader=name), source, plan, batches, device="cpu")
        for name in ("pillow", "dali-cpu")
    )
    steps = 0
    for ours, dalis in zip(*loaders, strict=True):
        assert ours.images.equal(dalis.images) and ours.labels.equal(dalis.labels)
        steps += 1
    assert steps == 2


@pytest.mark.dali
def test_dali_refuses_a_pack_of_pixels(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    pack(DataConfig(root=str(folder), workers=0), str(tmp_path / "pack"))
    data = dataclasses.replace(packed(tmp_path / "pack"), loader="dali-cpu")
    source = open_source(data, "train", 24)
    plan = ViewPlan(RECIPE, source.num_samples)
    with pytest.raises(InputError, match="holds decoded pixels, but DALI reads encoded images"):
        open_loader(data, source, plan, [([0], [0])], device="cpu")
