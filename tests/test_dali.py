"""The DALI loader: its pixels, its index of files, and what it decodes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deit_fast.cache import CacheMismatch
from deit_fast.config import DataConfig, ViewConfig
from deit_fast.data import ImageFolder, UnreadableImage, jpeg_index, open_loader
from deit_fast.data import dali as dali_module
from deit_fast.data.jpeg_index import FileIndex
from deit_fast.errors import InputError
from deit_fast.views.plan import ViewPlan
from helpers.images import SEED, SIZE, encode, folder_of, odd_files, picture, write_split

pytestmark = pytest.mark.dali

PLAIN = ViewConfig(image_size=SIZE, repeats=1, augment="none", mixup_alpha=0, cutmix_alpha=0)


@pytest.fixture(autouse=True)
def index_folder(tmp_path_factory, monkeypatch) -> Path:
    """A folder for the index of files, for each test."""
    base = tmp_path_factory.mktemp("index")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base / "deit-fast" / "files"


@pytest.fixture
def source(tmp_path) -> ImageFolder:
    write_split(tmp_path / "train", 2, 4)
    return ImageFolder(str(tmp_path), "train")


def loaded(source, batches, recipe=PLAIN, **settings):
    data = DataConfig(**{"loader": "dali-cpu", "workers": 1, "on_error": "fail"} | settings)
    plan = ViewPlan(recipe, source.num_samples)
    return open_loader(data, source, plan, batches, device="cpu")


# ---------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------


def test_a_batch_of_many_chunks_equals_its_parts(source, monkeypatch):
    batches = [(np.tile(np.arange(8), 4), np.repeat(np.arange(4), 8))]
    recipe = ViewConfig(seed=SEED, image_size=SIZE, repeats=2)
    whole = next(iter(loaded(source, batches, recipe))).images
    monkeypatch.setattr("deit_fast.data.dali.CHUNK", 5)
    assert torch.equal(next(iter(loaded(source, batches, recipe))).images, whole)
    assert len(whole) == 32
    empty = next(iter(loaded(source, [([], [])], recipe)))
    assert empty.images.shape == (0, SIZE, SIZE, 3)


def test_unknown_recipes_are_refused(source):
    for name, value in (("crop", "simple"), ("augment", "three_augment"), ("color_jitter", 0.3)):
        augment = {"augment": "none"} | {name: value}
        with pytest.raises(InputError, match=rf"view\.{name}=.*, not {value}"):
            loaded(source, [], ViewConfig(image_size=SIZE, **augment))
    with pytest.raises(InputError, match=r"data\.loader=dali-gpu needs a CUDA device"):
        loaded(source, [], loader="dali-gpu")


# ---------------------------------------------------------------------------------------------
# What each decoder decodes
# ---------------------------------------------------------------------------------------------


def test_each_file_is_given_to_dali_once(source, monkeypatch):
    import deit_fast.data.dali as dali

    given: list[int] = []
    inputs = dali.decoder_inputs

    def count(files):
        given.append(sum(file.ndim == 1 for file in files))
        return inputs(files)

    monkeypatch.setattr(dali, "decoder_inputs", count)
    recipe = ViewConfig(seed=SEED, image_size=SIZE, repeats=3)
    partner = int(ViewPlan(recipe, 8).rows([0], [0])["partner"][0])
    samples, views = np.repeat([0, partner], 3), np.tile(np.arange(3), 2)
    next(iter(loaded(source, [(samples, views)], recipe)))
    assert given[0] == 2  # six views, partners of each other, from two files
    assert not any(given[1:])  # what follows the last batch


def use(index: FileIndex, source: ImageFolder) -> list[str]:
    """Read all files as the loader does; the names of those that DALI may decode."""
    passed = []
    for sample, path in enumerate(source.paths):
        with contextlib.suppress(UnreadableImage):
            if not index.is_left_to_pillow(sample) and index.passes(sample, source.read(sample)):
                passed.append(os.path.basename(path))
    return passed


def test_only_plain_jpegs_pass(tmp_path):
    source = folder_of(
        tmp_path, odd_files() | {"broken.jpg": encode(picture(1, 99, 80), "JPEG")[:900]}
    )
    index = FileIndex(source)
    plain = ["exif.jpg", "grey.jpg", "progressive.jpg"]
    assert use(index, source) == plain
    sizes = {
        os.path.basename(path): tuple(size.tolist())
        for path, size in zip(source.paths, index.sizes, strict=True)
        if size[0]
    }
    assert sizes == dict.fromkeys(plain, (40, 30))


class Starts:
    """Starts of a run that use all files; ``decoded``: what the last one checked by decoding."""

    def __init__(self, source: ImageFolder, monkeypatch) -> None:
        self.source, self.decoded = source, []
        decodes = jpeg_index.decodes_like_pillow

        def noted(encoded: bytes, path: str) -> bool:
            self.decoded.append(path)
            return decodes(encoded, path)

        monkeypatch.setattr(jpeg_index, "decodes_like_pillow", noted)

    def check(self) -> list[int]:
        self.decoded.clear()
        self.index = FileIndex(self.source)
        assert not self.decoded  # a start checks nothing
        for _ in range(2):
            use(self.index, self.source)
        self.index.close()
        return [list(self.source.paths).index(path) for path in self.decoded]


@pytest.fixture
def starts(source, monkeypatch) -> Starts:
    return Starts(source, monkeypatch)


def test_files_are_checked_at_their_first_use_and_when_they_change(source, starts, index_folder):
    assert starts.check() == [*range(8)]
    sizes = starts.index.sizes.copy()
    assert (sizes > 0).all()
    assert starts.check() == [] and (starts.index.sizes == sizes).all()
    os.utime(source.paths[3], (1, 1))
    picture(7, 33, 22).save(source.paths[5])
    assert starts.check() == [3, 5]
    assert starts.index.sizes[5].tolist() == [33, 22]
    assert (np.delete(starts.index.sizes, 5, 0) == np.delete(sizes, 5, 0)).all()
    Path(source.paths[6]).unlink()
    assert starts.check() == []
    picture(7, 33, 22).save(source.paths[6])
    assert starts.check() == [6] and starts.check() == []
    assert not list(Path(source.folder).rglob("*.npz")) and list(index_folder.glob("*.npz"))


def test_dali_decodes_no_file_before_its_check(source, monkeypatch):
    """Whatever the order of use, and with results of a run that used some of the files."""
    checked, given = set(), []
    decodes, inputs = jpeg_index.decodes_like_pillow, dali_module.decoder_inputs

    def noted(encoded: bytes, path: str) -> bool:
        checked.add(bytes(encoded))
        return decodes(encoded, path)

    def watched(files: list[np.ndarray]) -> tuple:
        given.extend(file.tobytes() for file in files if file.ndim == 1)
        assert checked >= set(given)
        return inputs(files)

    monkeypatch.setattr(jpeg_index, "decodes_like_pillow", noted)
    monkeypatch.setattr(dali_module, "decoder_inputs", watched)
    batches = [([5, 2], [0, 0]), ([2, 7], [1, 0]), ([5], [1])]
    assert len(list(loaded(source, batches))) == 3
    assert len(checked) == 3 and len(given) == 5
    list(loaded(source, [(np.arange(8), np.zeros(8, int))]))
    assert len(checked) == 8 and len(given) == 13


def test_a_file_that_was_replaced_is_not_stored_by_its_old_stamp(source, starts):
    index = FileIndex(source)
    use(index, source)
    old = source.read(4)
    assert not index.passes(4, old[:300])  # cut
    index.save()
    assert starts.check() == [4] and starts.index.sizes[4].all()


def test_results_are_stored_while_the_run_lasts(source, starts, monkeypatch):
    monkeypatch.setattr(jpeg_index, "_SECONDS_BETWEEN_SAVES", -1.0)
    passed = iter(loaded(source, [([0, 1], [0, 0]), ([2, 3], [0, 0]), ([4], [0])]))
    next(passed), next(passed), next(passed)
    assert set(starts.check()) < {*range(2, 8)}  # those of the first step at least are known
    del passed


def test_two_processes_learn_from_each_other(source, starts):
    one, two = FileIndex(source), FileIndex(source)
    for sample in range(4):
        assert not one.is_left_to_pillow(sample) and one.passes(sample, source.read(sample))
    assert not two.is_left_to_pillow(7) and two.passes(7, source.read(7))
    one.save()
    two.save()
    assert starts.check() == [4, 5, 6]
    starts.decoded.clear()
    assert len(use(two, source)) == 8 and len(starts.decoded) == 3  # without those of `one`


@pytest.mark.parametrize("damage", ["cut", "bit", "pickle", "scalar", "other"])
def test_a_damaged_index_is_made_again(source, starts, index_folder, damage, caplog, monkeypatch):
    assert starts.check() == [*range(8)]
    sizes = starts.index.sizes.copy()
    (file,) = index_folder.glob("*.npz")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:200])
    if damage == "bit":
        with np.load(file) as stored:
            arrays = dict(stored)
        arrays["sizes"][2, 0] ^= 1
        np.savez(file, **arrays)
    if damage == "pickle":
        np.savez(file, stamps=np.array([{}], object), sizes=1, lengths=1, sha256=1)
    if damage == "scalar":
        np.savez(file, stamps=np.uint64(1), sizes=np.int32(1), lengths=1, sha256=np.uint8(1))
    if damage == "other":
        monkeypatch.setattr("PIL.__version__", "11.9")
    with caplog.at_level(logging.WARNING, "deit_fast"):
        assert starts.check() == [*range(8)]
    assert "checking the files again" in caplog.text and (starts.index.sizes == sizes).all()
    assert starts.check() == []


def test_a_cache_folder_that_cannot_be_written_is_no_error(source, starts, index_folder, caplog):
    index_folder.parent.mkdir(parents=True)
    index_folder.write_text("a file where the folder should be")
    assert starts.check() == [*range(8)] and (starts.index.sizes > 0).all()
    assert caplog.text.count("checked again next time") == 1


def test_a_fifo_in_place_of_the_index_or_its_lock_stops_nothing(source, starts, index_folder):
    assert starts.check() == [*range(8)]
    (file,) = index_folder.glob("*.npz")
    for path in (file.with_suffix(".lock"), file):
        path.unlink()
        os.mkfifo(path)
        if path.suffix == ".lock":
            assert starts.check() == []
    with pytest.raises(InputError, match="is a FIFO, not a file"):
        starts.check()


def replace(path: str | Path, content: bytes) -> None:
    """Atomically: a loader that is running reads the old file or the new one, never a part."""
    path = Path(path)
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def test_a_file_that_shrinks_while_the_loader_runs_is_substituted(source):
    batches = [(np.arange(8), np.full(8, view)) for view in range(6)]
    passed = iter(loaded(source, batches, on_error="substitute"))
    next(passed)
    path = Path(source.paths[5])
    replace(path, path.read_bytes()[:300])
    rest = list(passed)
    assert rest[-1].substituted == [source.paths[5]] and len(rest) == 5
    assert rest[-1].labels.tolist() == source.labels[[0, 1, 2, 3, 4, 6, 6, 7]].tolist()


def test_a_file_that_breaks_unnoticed_is_named(source):
    """With the length and header of the checked file, so it reaches DALI and ends its pipeline."""
    batches = [(np.arange(8), np.full(8, view)) for view in range(8)]
    passed = iter(loaded(source, batches, on_error="substitute"))
    next(passed)
    path = Path(source.paths[5])
    content = path.read_bytes()
    header = content[: content.index(b"\xff\xc0") + 19]
    replace(path, header.ljust(len(content), b"\0"))
    with pytest.raises(InputError) as caught:
        list(passed)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def bomb(encoded: bytes, side: int = 20_000) -> bytes:
    """A JPEG of a few hundred bytes whose header promises 400 million pixels, 1.2 GB."""
    at = encoded.index(b"\xff\xc0") + 5
    return encoded[:at] + side.to_bytes(2, "big") * 2 + encoded[at + 4 :]


def peak() -> int:
    """Largest memory of this process so far, bytes."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def test_a_decompression_bomb_takes_no_memory(tmp_path):
    """In the data set from the start, and replacing another file while the loader runs."""
    jpegs = {f"{n}.jpg": encode(picture(n, 40, 30), "JPEG") for n in range(6)}
    source = folder_of(tmp_path, jpegs | {"1.jpg": bomb(jpegs["1.jpg"])})
    source.labels = np.arange(6)  # tells who was taken
    batches = [(np.arange(6), np.full(6, view)) for view in range(6)]
    next(iter(loaded(folder_of(tmp_path / "warm", jpegs), batches)))
    before = peak()
    passed = iter(loaded(source, batches, on_error="substitute"))
    first = next(passed)
    assert first.labels.tolist() == [0, 2, 2, 3, 4, 5] and first.substituted == [source.paths[1]]
    replace(source.paths[4], bomb(jpegs["4.jpg"]))  # as long as before
    *_, last = passed
    assert last.labels.tolist() == [0, 2, 2, 3, 5, 5] and last.substituted == source.paths[1:5:3]
    with pytest.raises(InputError, match="DecompressionBombError"):
        list(loaded(source, batches))
    assert peak() - before < 400e6


def test_another_image_of_the_same_length_is_cut_by_its_own_size(tmp_path):
    wide = encode(picture(1, 60, 20), "JPEG")
    high = encode(picture(2, 20, 60), "JPEG")
    longer = max(len(wide), len(high))
    source = folder_of(tmp_path, {"a.jpg": wide.ljust(longer, b"\0")})
    batches = [([0], [view]) for view in range(8)]
    passed = iter(loaded(source, batches))
    next(passed)
    replace(source.paths[0], high.ljust(longer, b"\0"))
    *_, last = passed
    (fresh,) = loaded(source, batches[-1:])
    assert torch.equal(last.images, fresh.images)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(99)}])
def test_a_header_says_the_size(options):
    from deit_fast.data.jpeg_index import header_size

    encoded = encode(picture(1, 51, 23), "JPEG", **options)
    assert header_size(encoded) == (51, 23)
    assert header_size(encoded[:2] + b"\xff" * 3 + encoded[2:]) == (51, 23)  # fill bytes
    where = next(at for at in range(len(encoded)) if header_size(encoded[:at]) == (51, 23))
    assert all(header_size(encoded[:at]) == (0, 0) for at in range(where))
    assert header_size(b"") == header_size(b"\x89PNG\r\n\x1a\n" + bytes(50)) == (0, 0)


@pytest.mark.timeout(60)
def test_a_forked_process_does_not_wait_for_a_pipelines_threads(source):
    """Such as a worker of evaluation, forked while the loader runs, that collects garbage."""
    passed = iter(loaded(source, [(np.arange(8), np.full(8, view)) for view in range(8)]))
    next(passed)
    child = os.fork()
    if child == 0:
        passed = None
        gc.collect()
        os._exit(0)
    deadline = time.monotonic() + 20
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == (child, 0)


DEAD_PIPELINE = """
import gc, os
os.register_at_fork(after_in_child=gc.collect)  # runs before the hooks of modules imported below
import numpy as np
from deit_fast.data import dali

gc.disable()
pixel = np.zeros((1, 1, 3), np.uint8)
pipeline = dali.decoder(
    lambda: dali.decoder_inputs([pixel]), 0.0,
    batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=2,
)
pipeline.run()
pipeline.itself = pipeline  # only the collector can free it
del pipeline
child = os.fork()
if child == 0:
    os._exit(0)
print(os.waitpid(child, 0)[1])
os._exit(0)
"""


def test_a_child_that_collects_garbage_at_once_does_not_wait_for_a_dead_pipeline():
    done = subprocess.run(
        [sys.executable, "-c", DEAD_PIPELINE], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "0\n", done.stderr


# ---------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------


def test_a_cache_serves_the_loaders_of_its_pixels(tmp_path):
    from deit_fast.models.convnet import small_convnet
    from deit_fast.precomputation import estimate, precompute
    from deit_fast.recipes import digits_student
    from deit_fast.tools.verify_against_teacher import verify_against_teacher
    from deit_fast.training.teacher import open_teacher

    write_split(tmp_path / "train", 10, 2)
    save_file(small_convnet(10).state_dict(), tmp_path / "teacher.safetensors")
    spec = f"deit_fast.models.convnet:small_convnet@{tmp_path}/teacher.safetensors"
    config = digits_student().replace(
        epochs=2, num_views=None, teacher=spec, teacher_batch=8, cache=str(tmp_path / "dali"),
        device="cpu", data={"root": str(tmp_path), "workers": 1, "loader": "dali-cpu"},
        view={"repeats": 1},
    )  # fmt: skip
    assert estimate(config)["images"] == 40
    assert precompute(config)["images"] == 40
    source = ImageFolder(str(tmp_path), "train")
    pillow, on_gpu = (config.replace(data={"loader": name}) for name in ("pillow", "dali-gpu"))
    for same in (config, pillow):
        open_teacher(same, source, torch.device("cpu"))
        checked = verify_against_teacher(config.cache, spec, same.data, samples=10, device="cpu")
        assert checked["failed"] == 0
    with pytest.raises(CacheMismatch, match=r"contract\.pixels.*pillow/11-12"):
        open_teacher(on_gpu, source, torch.device("cpu"))
    with pytest.raises(CacheMismatch, match=r"contract\.pixels"):
        verify_against_teacher(config.cache, spec, on_gpu.data, samples=10, device="cpu")
    # Another picture in a file of the same name and size, which the fingerprint cannot see.
    path = Path(source.paths[3])
    picture(99, 20, 20).save(path.with_suffix(".new"), "JPEG", quality=30)
    content = path.with_suffix(".new").read_bytes()
    assert len(content) < path.stat().st_size
    path.write_bytes(content.ljust(path.stat().st_size, b"\0"))
    with pytest.raises(InputError, match="saw other pixels of sample"):
        open_teacher(config, source, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpus_views_depend_on_neither_batch_nor_order(tmp_path):
    """250 batches of several sizes; the decoder on the GPU, near Pillow's pixels."""
    folder = tmp_path / "train" / "class0"
    folder.mkdir(parents=True)
    for number in range(16):
        picture(number, 300 + 10 * number, 250).save(folder / f"{number:02d}.jpg", quality=95)
    source = ImageFolder(str(tmp_path), "train")
    recipe = ViewConfig(seed=SEED, image_size=64, repeats=2)
    plan = ViewPlan(recipe, 16)
    data = DataConfig(loader="dali-gpu", workers=4)
    keys = np.array([(sample, view) for sample in range(16) for view in range(4)])
    rng = np.random.default_rng(0)
    batches = [(keys[:, 0], keys[:, 1])]
    batches += [tuple(keys[rng.permutation(64)[: rng.integers(1, 65)]].T) for _ in range(250)]
    reference: dict[tuple[int, int], torch.Tensor] = {}
    for batch in open_loader(data, source, plan, batches, device="cuda"):
        assert batch.images.is_cuda
        images = batch.plan[:, 0].tolist()
        views = zip(batch.sample_ids.tolist(), batch.view_ids.tolist(), images, strict=True)
        for sample, view, image in views:
            found = batch.images[image]
            assert torch.equal(reference.setdefault((sample, view), found.clone()), found)
    exact = next(iter(loaded(source, batches[:1], recipe, loader="pillow", workers=0)))
    mine = torch.stack([reference[tuple(key)] for key in keys.tolist()]).cpu().int()
    distance = (mine - exact.images[exact.plan[:, 0].long()].int()).abs().float().mean((1, 2, 3))
    assert distance.max() < 5 and distance.median() < 1.5
