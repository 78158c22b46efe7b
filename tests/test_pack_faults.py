"""Packs that are damaged, cut off, replaced or planted, and `pack` when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit_fast.cli import main
from deit_fast.config import DataConfig
from deit_fast.data.packed_shards import PackedImages
from deit_fast.data.sources import UnreadableImage
from deit_fast.errors import InputError
from deit_fast.runtime.files import read_json, write_json
from deit_fast.tools.pack import MAX_JPEG_SIDE, pack
from helpers.images import write_split

DAMAGES = int(os.environ.get("DEIT_FAST_DAMAGES", "140"))  # of each form


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        write_split(root / split, 2, 5)
    return root


@pytest.fixture(scope="module")
def packs(images) -> dict[str, Path]:
    """Packs in each form; the files of a test are in a copy."""
    for form in ("uint8", "jpeg"):
        data = DataConfig(root=str(images), workers=0)
        pack(data, str(images / form), form=form, shard_samples=4)
    return {form: images / form for form in ("uint8", "jpeg")}


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def contents(root: Path) -> list[bytes | None]:
    """Pixels and labels; None for an unreadable image."""
    source = PackedImages(str(root), "train")
    found: list[bytes | None] = []
    for index in range(source.num_samples):
        try:
            pixels = np.asarray(source.load(index))
        except UnreadableImage:
            found.append(None)
        else:
            shape = str(
                (pixels.shape, int(source.labels[index]), source.classes, len(source.paths))
            )
            found.append(shape.encode() + pixels.tobytes())
    return found


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One of: a flipped bit, a wrong byte, zeros, a cut, a repeated part, a removed part."""
    changed = bytearray(content)
    at, kind = int(rng.integers(len(content))), int(rng.integers(6))
    length = int(rng.integers(1, 64))
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = int(rng.integers(256))
    elif kind == 2:
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == 3:
        del changed[at:]
    elif kind == 4:
        changed[at:at] = changed[at : at + length]
    else:
        del changed[at : at + length]
    return bytes(changed)


@pytest.mark.parametrize("form", ["uint8", "jpeg"])
def test_random_damage_is_refused_or_an_unreadable_image(packs, tmp_path, form):
    """Never a crash, another exception, or other pixels, labels or classes."""
    expected = contents(packs[form])
    assert None not in expected
    folder = tmp_path / "train"
    shutil.copytree(packs[form] / "train", folder)
    files = sorted(folder.iterdir())
    assert len(files) == 7
    rng, counts = np.random.default_rng(0), Counter[str]()
    for number in range(DAMAGES):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        try:
            found = contents(tmp_path)
        except InputError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            counts["refused"] += 1
        else:
            unreadable = found.count(None)
            assert len(found) == len(expected) and unreadable <= 4
            assert all(f in (e, None) for f, e in zip(found, expected, strict=True)), (path, number)
            counts["unreadable" if unreadable else "harmless"] += 1
        path.write_bytes(content)
    print(form, dict(counts))
    assert counts["refused"] > DAMAGES // 3 and counts["unreadable"] > DAMAGES // 20


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_samples": 2**70}, r"num_samples must be a whole number in \[1, 2\^31\)"),
        ({"shard_samples": 2**70}, "shard_samples must be"),
        ({"num_samples": 1e3}, "num_samples must be"),
        ({"num_samples": True}, "num_samples must be"),
        ({"num_samples": 2**31 - 1}, r"shard-00002\.npz: offsets must have shape"),
        ({"classes": [1, 2]}, "classes must be"),
        ({"classes": {}}, "classes must be"),
        ({"classes": ["a", "b", "a"]}, "classes 0 and 2 are both named 'a'; .*, and pack again"),
        ({"form": ["jpeg"]}, "form must be"),
    ],
)
def test_a_manifest_is_not_believed(packs, tmp_path, changes, named):
    shutil.copytree(packs["jpeg"], tmp_path / "pack")
    path = tmp_path / "pack" / "train" / "manifest.json"
    values = json.loads(path.read_text()) | changes
    values.pop("crc32c", None)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=named):
        PackedImages(str(tmp_path / "pack"), "train")


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2**63 - 1, -2, 100, None],  # differences that wrap around to positive ones
        [0, 10**6, 20, 30, None],
        [-5, 1, 2, 3, None],
    ],
    ids=["wraps", "outside", "negative"],
)
def test_offsets_outside_of_the_file_are_refused(packs, tmp_path, offsets):
    shutil.copytree(packs["jpeg"], tmp_path / "pack")
    path = tmp_path / "pack" / "train" / "shard-00000.npz"
    arrays = dict(np.load(path))
    last = arrays["offsets"][-1]
    arrays["offsets"] = np.array([last if n is None else n for n in offsets], np.int64)
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"does not fit shard-00000\.bin"):
        PackedImages(str(tmp_path / "pack"), "train")


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.npz", "shard-00001.bin"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "dangling", "device"])
def test_what_is_no_file_is_refused_at_once(packs, tmp_path, name, kind):
    shutil.copytree(packs["jpeg"], tmp_path / "pack")
    path = tmp_path / "pack" / "train" / name
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    with pytest.raises(InputError, match=name if name != "manifest.json" else "manifest"):
        PackedImages(str(tmp_path / "pack"), "train")


@pytest.mark.parametrize("form", ["uint8", "jpeg"])
@pytest.mark.parametrize("change", ["cut", "cut-to-nothing", "rewritten", "rewritten-before"])
def test_a_shard_that_changes_in_use_is_an_error_and_the_process_lives(
    packs, tmp_path, form, change
):
    shutil.copytree(packs[form], tmp_path / "pack")
    source = PackedImages(str(tmp_path / "pack"), "train")
    if change != "rewritten-before":
        before = np.asarray(source.load(5)).tobytes()
    path = tmp_path / "pack" / "train" / "shard-00001.bin"
    if change.startswith("cut"):
        os.truncate(path, 0 if change.endswith("nothing") else 100)
    else:
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(InputError, match=r"shard-00001\.bin was changed while it was in use"):
        source.load(5)
    source.load(0)
    if change != "rewritten-before":
        assert before  # arrays that were read stay whole


# ---------------------------------------------------------------------------------------------
# The tool
# ---------------------------------------------------------------------------------------------


def panorama(images: Path, root: Path, width: int, height: int) -> Path:
    shutil.copytree(images / "train", root / "train")
    shutil.copytree(images / "val", root / "val")
    path = root / "train" / "class0" / "pano.png"
    Image.new("RGB", (width, height), (9, 90, 200)).save(path)
    return path


def test_a_panorama_is_reduced_to_what_a_jpeg_file_holds(images, tmp_path, caplog, capsys):
    path = panorama(images, tmp_path / "set", 70000, 20)
    out = tmp_path / "pack"
    arguments = ["pack", str(tmp_path / "set"), str(out), "--workers", "0", "--form"]
    assert main([*arguments, "jpeg"]) == 0, capsys.readouterr().err
    assert f"{path} has a side of 70000 pixels" in caplog.text
    source = PackedImages(str(out), "train")
    index = [os.path.basename(name) for name in source.paths].index("pano.png")
    assert source.load(index).size == (63000, 18)
    assert MAX_JPEG_SIDE >= 63000 and source.num_samples == 11


def test_a_line_of_pixels_needs_the_other_form(images, tmp_path, capsys):
    path = panorama(images, tmp_path / "set", 70000, 1)
    arguments = ["pack", str(tmp_path / "set"), str(tmp_path / "pack"), "--workers", "0", "--form"]
    assert main([*arguments, "jpeg"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "70000" in error and "--form uint8" in error
    assert main([*arguments[:2], str(tmp_path / "pixels"), *arguments[3:], "uint8"]) == 0


def test_an_error_of_the_machine_ends_the_pack(images, tmp_path, monkeypatch):
    from deit_fast.data import sources

    def fails(path: str):
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(sources, "open_regular", fails)
    with pytest.raises(OSError, match="Input/output error"):
        pack(DataConfig(root=str(images), workers=0), str(tmp_path / "pack"))
    assert not list((tmp_path / "pack").rglob("*.npz"))


@pytest.mark.dist
@pytest.mark.slow
def test_workers_end_with_their_parent(images, tmp_path):
    """One waits for work and one is in the middle of a shard; nothing of them stays."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        shutil.copytree(images / split, root / split)
    code = (
        "import sys, time\n"
        "from deit_fast.config import DataConfig\n"
        "from deit_fast.data.image_folder import ImageFolder\n"
        "from deit_fast.tools.pack import pack\n"
        "if __name__ == '__main__':\n"
        "    pack(DataConfig(root=sys.argv[1], workers=2), sys.argv[2], shard_samples=1)\n"
    )
    # The first shard takes a worker longer than those of the other one.
    large = root / "train" / "class0" / "000.jpg"
    Image.new("RGB", (6000, 6000)).save(large)
    script = tmp_path / "packs.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), str(tmp_path / "pack")],
        start_new_session=True, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    folder = tmp_path / "pack" / "train"
    deadline = time.monotonic() + 120
    while not list(folder.glob("shard-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers outlived the pack")
    result = pack(DataConfig(root=str(root), workers=0), str(tmp_path / "pack"), shard_samples=1)
    assert result["kept"] >= 1 and not list(folder.glob(".tmp-*"))
    assert len(list(folder.glob("shard-*.bin"))) == 10


@pytest.mark.parametrize("form", ["uint8", "jpeg"])
def test_images_replaced_by_others_of_equal_name_and_size_are_refused(tmp_path, form):
    """A folder's fingerprint has names and sizes; a resumed pack would mix two data sets."""

    def write(shift: int) -> None:
        for split in ("train", "val"):
            for number in range(6):
                path = tmp_path / "set" / split / f"class{number % 2}" / f"{number}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (24, 20), (40 * number, shift, 9)).save(path)
        broken = tmp_path / "set" / "train" / "class0" / "0.bmp"
        broken.write_bytes(bytes(broken.stat().st_size))

    data, out = DataConfig(root=str(tmp_path / "set"), workers=0), tmp_path / "pack"
    write(0)
    pack(data, str(out), form=form, shard_samples=4)
    (out / "train" / "shard-00001.npz").unlink()
    write(0)
    assert pack(data, str(out), form=form, shard_samples=4)["shards"] == 1
    (out / "train" / "shard-00001.npz").unlink()
    write(200)
    with pytest.raises(InputError, match=r"of other images: .*/2\.bmp is not .* shard-00000\.bin;"):
        pack(data, str(out), form=form, shard_samples=4)

    manifest = out / "train" / "manifest.json"  # another Pillow may make other bytes
    write_json(manifest, read_json(manifest) | {"pillow": "1.0"})
    shutil.rmtree(out / "val")
    assert pack(data, str(out), form=form, shard_samples=4)["kept"] == 1
