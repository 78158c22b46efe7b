"""Sources, loader, ingest and evaluation: bytes that depend on the view alone, and broken files."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import PIL
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as F

from deit_fast.config import DataConfig, ViewConfig
from deit_fast.data import (
    EvalLoader,
    ImageFolder,
    Synthetic,
    UnreadableImage,
    ViewLoader,
    ingest_batch,
    open_source,
    pixel_contract,
)
from deit_fast.data.eval import eval_pixels
from deit_fast.data.loader import make_batch
from deit_fast.data.open import require_trained_classes
from deit_fast.data.resize import crop_and_resize
from deit_fast.data.sources import decode, say_warnings
from deit_fast.errors import InputError
from deit_fast.views.order import EpochOrder, TrainBatches
from deit_fast.views.plan import RANDAUGMENT_OPERATIONS, ViewPlan
from deit_fast.views.rng import CUTMIX, MIXUP, philox
from helpers.images import RECIPE, SEED, SIZE, broken_files, digests, picture, write_split
from helpers.plans import view_with
from helpers.timm_augment import timms

BICUBIC = torchvision.transforms.InterpolationMode.BICUBIC


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_split(root / "train", 3, 7)
    write_split(root / "val", 3, 4, seed=1000)
    return root


@pytest.fixture(scope="module")
def source(root) -> ImageFolder:
    return ImageFolder(str(root), "train")


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


def test_folder_lists_as_torchvision_does(root, source):
    nested = root / "train" / "class1" / "deep" / "er"
    nested.mkdir(parents=True)
    for name in ("a.png", "B.PNG"):  # capitals first, as Python sorts
        picture(1, 8, 8).save(nested / name)
    picture(1, 8, 8).save(root / "train" / "class1" / "zz.Jpeg", "JPEG")
    (root / "train" / "class1" / "notes.txt").write_text("no image")
    try:
        ours = ImageFolder(str(root), "train")
        theirs = torchvision.datasets.ImageFolder(str(root / "train"))
        assert list(ours.paths) == [path for path, _ in theirs.samples]
        assert ours.labels.tolist() == theirs.targets and ours.labels.dtype == np.int64
        assert ours.classes == theirs.classes
        for index in (0, 7, 14, ours.num_samples - 1):
            assert ours.load(index).tobytes() == theirs[index][0].tobytes()
        assert ours.paths[-1] == ours.paths[ours.num_samples - 1]
        assert ours.paths[:2] == [ours.paths[0], ours.paths[1]]
        with pytest.raises(IndexError):
            ours.paths[ours.num_samples]
        assert ours.fingerprint() != source.fingerprint()
    finally:
        (root / "train" / "class1" / "zz.Jpeg").unlink()
        shutil.rmtree(nested.parent)
    assert ImageFolder(str(root), "train").fingerprint() == source.fingerprint()


def test_folder_fingerprint_sees_names_sizes_and_classes(tmp_path):
    def digest() -> str:
        return ImageFolder(str(tmp_path), "train").fingerprint()["dataset.sha256"]

    write_split(tmp_path / "train", 2, 2)
    seen = {digest()}
    file = tmp_path / "train" / "class0" / "000.jpg"
    file.write_bytes(file.read_bytes() + b"x")
    seen.add(digest())
    file.rename(file.with_name("0000.jpg"))
    seen.add(digest())
    (tmp_path / "train" / "class1").rename(tmp_path / "train" / "class2")
    seen.add(digest())
    assert len(seen) == 4


def test_hidden_folders_are_left_out_at_every_depth(tmp_path, caplog):
    write_split(tmp_path / "train", 2, 2)
    plain = ImageFolder(str(tmp_path), "train")
    deep = tmp_path / "train" / "class1" / "deep"
    for name in ("class1/deep/.ipynb_checkpoints", "class1/.git", ".cache"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        picture(1, 8, 8).save(folder / "000-checkpoint.jpg")
    for name in ("._000.jpg", ".DS_Store", "notes.txt", "a.gif", "../../a.jpg"):
        (deep / name).touch()
    caplog.set_level(logging.INFO, "deit_fast")
    source = open_source(DataConfig(root=str(tmp_path)), "train", SIZE)
    assert source.fingerprint() == plain.fingerprint() and not plain.left_out
    [line] = caplog.messages
    for words in (
        "2 files and hidden folders beside the classes (first: '.cache')",
        "2 hidden folders (first: 'class1/.git')",
        "2 hidden files (first: 'class1/deep/.",
        "2 files that are no image (first: 'class1/deep/",
    ):
        assert words in line


@pytest.mark.parametrize(
    "target", [".", "..", "../..", "../class0", "../class0/deep", "deep", "deep/er"]
)
def test_no_image_counts_twice_through_a_link(tmp_path, target):
    write_split(tmp_path / "train", 2, 1)
    for label in (0, 1):
        (tmp_path / "train" / f"class{label}" / "deep" / "er").mkdir(parents=True)
    picture(1, 8, 8).save(tmp_path / "train" / "class0" / "deep" / "001.jpg")
    link = tmp_path / "train" / "class1" / "link"
    link.symlink_to(target)
    with pytest.raises(InputError, match=r"/link.* are one folder, through a link, and its images"):
        ImageFolder(str(tmp_path), "train")


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path):
    write_split(tmp_path / "train", 2, 1)
    write_split(tmp_path / "far", 1, 2)
    (tmp_path / "train" / "class0" / "link").symlink_to(tmp_path / "far" / "class0")
    assert ImageFolder(str(tmp_path), "train").labels.tolist() == [0, 0, 0, 1]
    (tmp_path / "train" / "class1" / "link").symlink_to(tmp_path / "far" / "class0")
    with pytest.raises(InputError, match=r"class1/link and .*class0/link are one folder"):
        ImageFolder(str(tmp_path), "train")


def test_a_class_that_is_a_link_to_nothing_is_not_lost(tmp_path):
    write_split(tmp_path / "train", 2, 1)
    (tmp_path / "train" / "class2").symlink_to("/mnt/away")
    with pytest.raises(InputError, match="class2 is a link to nothing"):
        ImageFolder(str(tmp_path), "train")


def test_a_class_may_have_any_name(tmp_path, caplog):
    names = sorted(["caf\udce9", "\x1b[31mred", "new\nline"])
    for split, count in (("train", 2), ("val", 1)):
        write_split(tmp_path / split, 3, count)
        for label, name in enumerate(names):
            (tmp_path / split / f"class{label}").rename(tmp_path / split / name)
        (tmp_path / split / names[0] / "caf\udce9.txt").touch()
    caplog.set_level(logging.INFO, "deit_fast")
    source, held_out = (
        open_source(DataConfig(root=str(tmp_path)), split, SIZE) for split in ("train", "val")
    )
    assert source.classes == held_out.classes == names
    assert held_out.labels.tolist() == [0, 1, 2] and source.load(5).mode == "RGB"
    assert source.fingerprint() != held_out.fingerprint()
    assert caplog.messages and all(line.isprintable() for line in caplog.messages)


def test_one_folder_cannot_be_two_classes(tmp_path):
    write_split(tmp_path / "train", 2, 1)
    (tmp_path / "train" / "class2").symlink_to("class0")
    with pytest.raises(InputError, match=r"classes 'class0' and 'class2' of .* are one folder"):
        ImageFolder(str(tmp_path), "train")


def test_paths_are_packed(tmp_path):
    folder = tmp_path / "train" / "n01440764"
    folder.mkdir(parents=True)
    for number in range(300):
        (folder / f"n01440764_{number}.JPEG").touch()
    (folder / os.fsdecode(b"caf\xe9.jpg")).touch()  # a name that is no UTF-8
    source = ImageFolder(str(tmp_path), "train")
    assert all(os.path.exists(path) for path in source.paths) and len(source.paths) == 301
    assert len(pickle.dumps(source.paths)) < 301 * 45


def test_held_out_labels_follow_the_training_classes(tmp_path):
    write_split(tmp_path / "train", 3, 1)
    write_split(tmp_path / "val", 3, 1)
    for file in (tmp_path / "val" / "class1").iterdir():
        file.unlink()
    (tmp_path / "val" / "class1").rmdir()
    data = DataConfig(root=str(tmp_path))
    assert open_source(data, "val", SIZE).labels.tolist() == [0, 2]
    write_split(tmp_path / "more", 1, 1)
    (tmp_path / "more" / "class0").rename(tmp_path / "val" / "stranger")
    with pytest.raises(InputError, match="has class 'stranger', which the training split lacks"):
        open_source(data, "val", SIZE)


def test_labels_follow_the_names_of_a_runs_classes(tmp_path):
    write_split(tmp_path / "val", 3, 1)
    data, run = DataConfig(root=str(tmp_path)), ["new", "class2", "class1", "class0"]
    source = open_source(data, "val", SIZE, run)
    assert source.labels.tolist() == [3, 2, 1] and source.classes == run
    plain = open_source(data, "val", SIZE)
    assert source.fingerprint()["dataset.sha256"] == plain.fingerprint()["dataset.sha256"]
    with pytest.raises(InputError, match="has class 'class1', which the run lacks"):
        open_source(data, "val", SIZE, ["class0", "class2"])
    with pytest.raises(InputError, match="class name 'class1' stands for two labels"):
        open_source(data, "val", SIZE, ["class0", "class1", "class1", "class2"])


def test_a_split_without_images_of_a_class(tmp_path, caplog):
    write_split(tmp_path / "train", 3, 1)
    write_split(tmp_path / "val", 3, 1)
    data = DataConfig(root=str(tmp_path))
    (image,) = (tmp_path / "train" / "class1").iterdir()
    image.rename(image.with_suffix(".heic"))
    train = open_source(data, "train", SIZE)
    assert train.classes == ["class0", "class1", "class2"] and train.labels.tolist() == [0, 2]
    assert "no image of 1 of its classes, the first is 'class1': it holds files" in caplog.text
    with pytest.raises(InputError, match="1 of the held-out classes, such as 'class1'"):
        require_trained_classes(train, open_source(data, "val", SIZE))
    image.with_suffix(".heic").unlink()
    train = open_source(data, "train", SIZE)
    assert "'class1': its folder is empty" in caplog.text
    shutil.rmtree(tmp_path / "val" / "class1")
    require_trained_classes(train, open_source(data, "val", SIZE))
    assert "the accuracy does not count" not in caplog.text  # neither split has the class
    for file in (tmp_path / "val" / "class2").iterdir():
        file.unlink()
    require_trained_classes(train, open_source(data, "val", SIZE))
    assert "no image of 1 of the 3 classes, such as 'class2': the accuracy does not" in caplog.text


def test_images_of_unknown_formats_alone_are_named(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "1.heic").touch()
    words = r"no images in its 2 class folders: there are files such as 'cat/1.heic', convert them"
    with pytest.raises(InputError, match=words):
        open_source(DataConfig(root=str(tmp_path)), "train", SIZE)


def test_one_class_is_refused(tmp_path):
    write_split(tmp_path / "train", 1, 2)
    with pytest.raises(InputError, match="has one class, 'class0'"):
        open_source(DataConfig(root=str(tmp_path)), "train", SIZE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, ["does not exist", "train", "<class>"]),
        (lambda root: root.mkdir(), ["no split 'train'", "<class>"]),
        (lambda root: (root / "train").mkdir(parents=True), ["no class folders"]),
        (lambda root: (root / "train" / ".cache").mkdir(parents=True), ["no class folders"]),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), ["no images", ".webp"]),
    ],
)
def test_wrong_folders_are_one_clear_line(tmp_path, make, words):
    make(tmp_path / "set")
    with pytest.raises(InputError) as caught:
        open_source(DataConfig(root=str(tmp_path / "set")), "train", SIZE)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "set") in message
    assert all(word in message for word in words)


def test_missing_root_setting_is_named():
    with pytest.raises(InputError, match=r"data\.root is not set"):
        open_source(DataConfig(), "train", SIZE)


def test_synthetic_images_are_a_function_of_the_id():
    data = DataConfig(source="synthetic", synthetic_samples=80)
    train, val = open_source(data, "train", SIZE), open_source(data, "val", SIZE)
    assert (train.num_samples, val.num_samples, len(train.classes)) == (80, 20, 10)
    images = [train.load(index) for index in range(80)]
    assert images[3].shape == (SIZE, SIZE, 3) and images[3].dtype == np.uint8
    assert (images[3] == open_source(data, "train", SIZE).load(3)).all()
    assert len({image.tobytes() for image in images + [val.load(i) for i in range(20)]}) == 100
    assert train.fingerprint() != val.fingerprint()
    # The nearest class mean in colour and stripe spectrum finds the class: there is much to learn.
    features = [np.abs(np.fft.fft2(image.mean(axis=2)))[:9, :9].ravel() for image in images]
    features = np.array(
        [[*f / f.sum(), *i.mean((0, 1)) / i.mean()] for f, i in zip(features, images, strict=True)]
    )
    means = np.stack([features[:40][train.labels[:40] == label].mean(0) for label in range(10)])
    nearest = np.abs(features[40:, None] - means).sum(2).argmin(1)
    assert (nearest == train.labels[40:]).mean() > 0.8


# ---------------------------------------------------------------------------------------------
# Files that are not plain RGB JPEGs
# ---------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, files: dict[str, bytes | Image.Image]) -> ImageFolder:
    folder = tmp_path / "train" / "class0"
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content.save(folder / name)
    return ImageFolder(str(tmp_path), "train")


def test_every_mode_becomes_rgb(tmp_path):
    base = picture(3, 40, 30)
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    frames = [picture(n, 40, 30) for n in range(3)]
    (tmp_path / "train" / "class0").mkdir(parents=True)
    folder = tmp_path / "train" / "class0"
    frames[0].save(folder / "j.webp", save_all=True, append_images=frames[1:], lossless=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: a viewer would turn it
    base.save(folder / "k.jpg", exif=rotated)
    for name, image in {
        "a.jpg": base.convert("CMYK"),
        "b.png": base.convert("L"),
        "c.png": base.convert("P"),
        "d.png": grey16,
        "e.png": base.convert("RGBA"),
        "f.png": base.convert("1"),
        "g.tif": base,
        "h.bmp": base,
        "i.ppm": base,
    }.items():
        image.save(folder / name)
    source = ImageFolder(str(tmp_path), "train")
    assert source.num_samples == 11
    for index in range(11):
        image = source.load(index)
        assert image.mode == "RGB" and image.size == (40, 30)  # so EXIF did not turn it
        theirs = torchvision.datasets.folder.pil_loader(source.paths[index])
        assert image.tobytes() == theirs.tobytes()
    assert source.load(9).tobytes() == frames[0].tobytes()


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_warnings_of_images_are_counted_in_one_line(caplog, recwarn):
    """Also those in the processes of a loader, which are forked."""
    image, file = Image.new("P", (8, 8)), io.BytesIO()
    image.putpalette([0] * 768)
    image.save(file, "PNG", transparency=bytes(range(256)))
    with pytest.warns(UserWarning, match="Palette images"):
        Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    assert decode(file.getvalue(), "a.png").mode == "RGB"
    if not (child := os.fork()):
        decode(file.getvalue(), "a.png")
        os._exit(0)
    os.waitpid(child, 0)
    say_warnings()
    say_warnings()
    (line,) = caplog.messages
    assert line.startswith("Pillow warned at about 2 readings of images")
    assert not recwarn.list


def test_every_broken_file_is_unreadable_with_its_path(tmp_path):
    source = folder_of(tmp_path, broken_files())
    for index in range(source.num_samples):
        with pytest.raises(UnreadableImage) as caught:
            source.load(index)
        assert caught.value.path == source.paths[index] and len(caught.value.why) > 5
        assert source.paths[index] in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.why) == (caught.value.path, caught.value.why)
    os.unlink(source.paths[0])
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        source.load(0)


@pytest.fixture
def damaged(tmp_path) -> ImageFolder:
    """Samples 2, 3 (class 0) and the very last one cannot be read."""
    write_split(tmp_path / "train", 2, 4)
    source = ImageFolder(str(tmp_path), "train")
    for index, content in ((2, b""), (3, b"text"), (7, b"\xff\xd8\xff")):
        Path(source.paths[index]).write_bytes(content)
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_gives_way_to_its_next_neighbour(damaged, workers):
    recipe = ViewConfig(seed=SEED, image_size=SIZE, mixup_alpha=0, cutmix_alpha=0, augment="none")
    plan = ViewPlan(recipe, 8)
    batches = [
        (np.array([3, 2, 0]), np.array([0, 0, 0])),
        (np.array([7, 2, 2]), np.array([0, 0, 1])),
    ]
    first, second = ViewLoader(damaged, plan, batches, workers=workers, on_error="substitute")
    # Pixels and label of the neighbour, cropped by the plan of the sample itself.
    for batch, taken in ((first, [4, 4, 0]), (second, [0, 4, 4])):
        assert batch.labels.tolist() == damaged.labels[taken].tolist()
        for row, index in enumerate(taken):
            image = damaged.load(index)
            key = batch.sample_ids[row : row + 1], batch.view_ids[row : row + 1]
            box = plan.crop_boxes(*key, [image.width], [image.height])[0].tolist()
            pixels = batch.images[batch.plan[row, 0]].numpy()
            expected = crop_and_resize(np.asarray(image), box, SIZE, SIZE)
            np.testing.assert_array_equal(pixels, expected)
    assert first.sample_ids.tolist() == [3, 2, 0]
    assert first.substituted == [damaged.paths[2], damaged.paths[3]]
    assert second.substituted == [damaged.paths[2], damaged.paths[7]]  # once, though two views


def test_partners_are_substituted_with_their_labels(damaged):
    plan = ViewPlan(ViewConfig(image_size=SIZE, repeats=1, seed=SEED), 8)
    readable = [0, 1, 4, 4, 4, 5, 6, 0]
    for view in range(6):
        batch = make_batch(damaged, plan, np.arange(8), np.full(8, view), on_error="substitute")
        partner = plan.rows(np.arange(8), np.full(8, view))["partner"]
        labels = damaged.labels[readable]
        assert batch.labels.tolist() == labels.tolist()
        assert batch.partner_labels.tolist() == labels[partner].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_fail_is_one_line_from_any_process(damaged, workers):
    plan = ViewPlan(RECIPE, 8)
    batches = [(np.array([0, 1]), np.array([0, 0])), (np.array([3, 4]), np.array([0, 0]))] * 3
    with pytest.raises(InputError) as caught:
        list(ViewLoader(damaged, plan, batches, workers=workers, on_error="fail"))
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    assert any(path in message for path in damaged.paths) and "Error" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_is_an_error(tmp_path, workers):
    source = folder_of(tmp_path, {f"{n}.jpg": b"nothing" for n in range(3)})
    batches = [(np.array([1]), np.array([0]))]
    with pytest.raises(InputError, match="no image of the data set is readable") as caught:
        list(
            ViewLoader(source, ViewPlan(RECIPE, 3), batches, workers=workers, on_error="substitute")
        )
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------


def test_crop_and_resize_equal_torchvision(source):
    rng = np.random.default_rng(2)
    for image in [*map(source.load, range(6)), picture(1, 500, 375), picture(2, 1, 9)]:
        for _ in range(8):
            width, height = (int(rng.integers(1, side + 1)) for side in image.size)
            left = int(rng.integers(0, image.width - width + 1))
            top = int(rng.integers(0, image.height - height + 1))
            for size in (SIZE, 224):
                box = left, top, width, height
                ours = crop_and_resize(np.asarray(image), box, size, size)
                theirs = F.resized_crop(image, top, left, height, width, [size, size], BICUBIC)
                np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_view_is_the_same_in_any_batch_order_and_process(source, root):
    plan = ViewPlan(RECIPE, source.num_samples)
    rng = np.random.default_rng(0)
    keys = np.array([(s, v) for s in range(source.num_samples) for v in range(4)])
    reference = None
    for size, workers in ((len(keys), 0), (1, 0), (7, 1), (16, 2), (33, 2)):
        shuffled = rng.permutation(keys)
        parts = [shuffled[start : start + size] for start in range(0, len(keys), size)]
        batches = [(part[:, 0], part[:, 1]) for part in parts]
        loader = ViewLoader(source, plan, batches, workers=workers, on_error="fail")
        found = digests(loader)
        assert len(loader) == len(batches) and len(found) == len(keys)
        reference = reference or found
        assert found == reference
    for sample in range(source.num_samples):
        assert len({reference[sample, view] for view in range(4)}) == 4
    whole = hashlib.sha256("".join(reference[tuple(key)] for key in keys.tolist()).encode())
    code = (
        "import sys, numpy as np, test_data as t\n"
        "source = t.ImageFolder(sys.argv[1], 'train')\n"
        "keys = np.array([(s, v) for s in range(source.num_samples) for v in range(4)])\n"
        "plan = t.ViewPlan(t.RECIPE, source.num_samples)\n"
        "batch = t.make_batch(source, plan, keys[:, 0], keys[:, 1], on_error='fail')\n"
        "found = t.digests([batch])\n"
        "text = ''.join(found[tuple(key)] for key in keys.tolist())\n"
        "print(t.hashlib.sha256(text.encode()).hexdigest())\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert other.stdout.strip() == whole.hexdigest(), other.stderr


def test_loader_keeps_the_order_and_starts_anywhere(source):
    plan = ViewPlan(RECIPE, source.num_samples)
    batches = TrainBatches(EpochOrder(SEED, source.num_samples, 4, 2), 8, epochs=4)

    def run(workers: int, start: int) -> list[tuple[list[int], bytes]]:
        loader = ViewLoader(source, plan, batches, workers=workers, on_error="fail", start=start)
        return [(batch.sample_ids.tolist(), batch.images.numpy().tobytes()) for batch in loader]

    full = run(0, 0)
    assert [ids for ids, _ in full] == [batches[step][0].tolist() for step in range(len(batches))]
    assert run(2, 0) == full
    assert run(1, 5) == full[5:]
    assert run(0, len(batches)) == []
    with pytest.raises(InputError, match="start=9"):
        ViewLoader(source, plan, batches, workers=0, on_error="fail", start=9)
    with pytest.raises(InputError, match="not 21"):
        ViewLoader(source, ViewPlan(RECIPE, 20), batches, workers=0, on_error="fail")


def test_the_loader_leaves_torchs_generator_alone(source):
    plan = ViewPlan(RECIPE, source.num_samples)
    before = torch.get_rng_state()
    list(ViewLoader(source, plan, [([0], [0])], workers=0, on_error="fail"))
    assert torch.equal(torch.get_rng_state(), before)


class Counting:
    """A source that counts decodes by sample."""

    def __init__(self, source: ImageFolder) -> None:
        self.source, self.loads, self.finished = source, [], False
        self.labels, self.paths, self.classes = source.labels, source.paths, source.classes
        self.num_samples = source.num_samples

    def fetch(self, samples: list[int]) -> None:
        self.source.fetch(samples)

    def load(self, index: int) -> Image.Image:
        self.loads.append(index)
        return self.source.load(index)


def test_each_file_is_decoded_once_and_each_view_cut_once(source):
    counting = Counting(source)
    plan = ViewPlan(RECIPE, source.num_samples)
    samples, views = EpochOrder(SEED, source.num_samples, 2, 2).epoch(0)
    batch = make_batch(counting, plan, samples[:8], views[:8], on_error="fail")  # 2 pairs, 2 views
    assert sorted(counting.loads) == sorted(set(samples[:8].tolist())) and len(counting.loads) == 4
    assert batch.images.shape == (8, SIZE, SIZE, 3)
    split = make_batch(counting, plan, samples[:8:2], views[:8:2], on_error="fail")
    assert split.images.shape == (8, SIZE, SIZE, 3) and len(split) == 4  # own views and partners
    plain = ViewPlan(
        ViewConfig(seed=SEED, image_size=SIZE, mixup_alpha=0, cutmix_alpha=0), source.num_samples
    )
    assert len(make_batch(counting, plain, [0, 1], [0, 0], on_error="fail").images) == 2


def test_batch_fields(source):
    plan = ViewPlan(RECIPE, source.num_samples)
    batch = make_batch(source, plan, np.arange(21), np.full(21, 3), on_error="fail")
    rows = plan.rows(np.arange(21), np.full(21, 3))
    assert batch.plan.dtype == torch.int32 and batch.plan.shape == (21, 22)
    assert batch.sample_ids.dtype == torch.int64 and batch.view_ids.dtype == torch.int32
    assert batch.labels.tolist() == source.labels.tolist()
    assert batch.partner_labels.tolist() == source.labels[rows["partner"]].tolist()
    assert batch.target[2].dtype == torch.float32
    alone = int(np.flatnonzero(rows["partner"] == np.arange(21))[0])
    assert batch.lam[alone] == 1 and len(batch) == 21 and batch.substituted == []
    moved = batch.to("cpu")
    assert torch.equal(moved.images, batch.images) and moved.sample_ids is batch.sample_ids


def slow_view(source: ImageFolder, plan: ViewPlan, sample: int, view: int) -> np.ndarray:
    """One finished view in the recipe's own order: crop, flip, timm's operations, erasing, mixing.

    Pixel by pixel where it matters; shares nothing with loader and ingest.
    """
    quantile = NormalDist().inv_cdf
    mean, std = (np.array(values, np.float32) for values in (plan.view.mean, plan.view.std))

    def operand(row: np.void) -> np.ndarray:
        image = source.load(int(row["sample"]))
        left, top, width, height = plan.crop_boxes(
            [row["sample"]], [row["view"]], [image.width], [image.height]
        )[0].tolist()
        small = F.resized_crop(image, top, left, height, width, [SIZE, SIZE], BICUBIC)
        if row["flip"]:
            small = F.hflip(small)
        for operation, level in zip(row["operations"], row["levels"], strict=True):
            if operation:
                small = timms(small, RANDAUGMENT_OPERATIONS[operation], level / 1024)
        pixels = np.asarray(small).astype(np.float32)
        pixels = ((pixels / np.float32(255) - mean) / std).copy()
        top, left, height, width = row["erase"].tolist()
        key = int(row["noise_key"]) & 0xFFFFFFFF, int(row["noise_key"]) >> 32
        for y in range(top, top + height):
            for x in range(left, left + width):
                words = philox(y * SIZE + x, 0, 0, 0, key)[:3]
                pixels[y, x] = [quantile(((int(word) >> 16) + 0.5) / 65536) for word in words]
        return pixels

    own = plan.rows([sample], [view])[0]
    out = operand(own)
    if own["mix_kind"] == MIXUP:
        lam = np.float32(own["lam"] / 65536)
        other = operand(plan.rows([own["partner"]], [view])[0])
        out = out * lam + other * (np.float32(1) - lam)
    elif own["mix_kind"] == CUTMIX:
        top, left, height, width = own["box"].tolist()
        other = operand(plan.rows([own["partner"]], [view])[0])
        out[top : top + height, left : left + width] = other[
            top : top + height, left : left + width
        ]
    return out.transpose(2, 0, 1)


def test_finished_views_equal_a_slow_model(source):
    recipe = view_with(mix_prob=0.8)(seed=SEED, image_size=SIZE, repeats=2, erase_prob=0.6)
    plan = ViewPlan(recipe, source.num_samples)
    samples, views = np.arange(21), np.arange(21) // 7 * 2
    batch = make_batch(source, plan, samples, views, on_error="fail")
    images = ingest_batch(batch, recipe, torch.float32).numpy()
    rows = plan.rows(samples, views)
    assert {0, 1, 2} == set(rows["mix_kind"].tolist()) and rows["flip"].any()
    assert len(set(rows["operations"].ravel().tolist())) > 8
    for row in range(21):
        expected = slow_view(source, plan, int(samples[row]), int(views[row]))
        np.testing.assert_array_equal(images[row], expected)


def test_pixel_contract(monkeypatch):
    assert pixel_contract(DataConfig()) == {"contract.pixels": "pillow/11-12"}
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    with pytest.raises(InputError, match=r"13\.0\.0"):
        pixel_contract(DataConfig())
    monkeypatch.setattr(PIL, "__version__", "12.9.0")
    monkeypatch.setattr("deit_fast.data.fingerprint._RESIZE_SHA256", "0" * 64)
    with pytest.raises(InputError, match="other pixels"):
        pixel_contract(DataConfig())


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (40, 40), (33, 256), (257, 31)])
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (32, 0.9), (16, 1.0)])
def test_eval_pixels_equal_torchvision(shape, size, crop):
    image = picture(7, *shape)
    resized = F.resize(image, [int(size / crop)], BICUBIC)
    expected = np.asarray(F.center_crop(resized, [size, size]))
    np.testing.assert_array_equal(eval_pixels(image, size, crop), expected)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1), (5, 0), (13, 0)])
def test_evaluation_shows_every_image_once(root, world, workers):
    source = ImageFolder(str(root), "val")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    seen, pixels = [], {}
    for rank in range(world):
        loader = EvalLoader(source, SIZE, 0.875, mean, std, 5, workers, rank, world)
        batches = list(loader)
        assert len(batches) == len(loader)
        for images, labels, ids in batches:
            assert images.dtype == torch.float32 and images.shape[1:] == (3, SIZE, SIZE)
            assert labels.tolist() == source.labels[ids.numpy()].tolist()
            seen += ids.tolist()
            pixels |= dict(zip(ids.tolist(), images, strict=True))
    assert sorted(seen) == list(range(12))
    square = torch.from_numpy(eval_pixels(source.load(5), SIZE, 0.875).copy())
    tensor = F.normalize(square.permute(2, 0, 1).float() / 255, mean, std)
    assert torch.equal(pixels[5], tensor)


def test_evaluation_counts_substituted_files(damaged):
    args = (damaged, SIZE, 0.875, (0, 0, 0), (1, 1, 1), 3)
    loader = EvalLoader(*args, workers=0)
    labels = torch.cat([labels for _, labels, _ in loader]).tolist()
    assert labels == damaged.labels[[0, 1, 4, 4, 4, 5, 6, 0]].tolist()
    expected = [damaged.paths[2], damaged.paths[3], damaged.paths[7]]
    assert loader.substituted == expected
    list(loader)
    assert loader.substituted == expected  # a second pass reports no file twice
    with pytest.raises(InputError, match=r"002\.jpg") as caught:
        list(EvalLoader(*args, workers=1, on_error="fail"))
    assert "\n" not in str(caught.value)


def test_synthetic_data_runs_through_both_loaders():
    source = Synthetic(20, 4, SIZE)
    plan = ViewPlan(RECIPE, 20)
    batch = next(
        iter(ViewLoader(source, plan, [(range(20), [1] * 20)], workers=1, on_error="fail"))
    )
    assert torch.isfinite(ingest_batch(batch, RECIPE, torch.bfloat16)).all()
    images, labels, _ = next(iter(EvalLoader(source, SIZE, 0.875, (0,) * 3, (1,) * 3, 20, 0)))
    assert labels.tolist() == [0, 1, 2, 3] * 5
    assert math.isclose(images.max().item(), 1.0, abs_tol=0.3)
