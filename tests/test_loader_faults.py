"""What is not a bad image is not substituted, and a loader that cannot work says what is short."""

from __future__ import annotations

import errno
import importlib
import itertools
import logging
import os
import re
import resource
import signal
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from deit_fast.cli import _os_message, main
from deit_fast.config import DataConfig, RunConfig, ViewConfig
from deit_fast.data import (
    EvalLoader,
    ImageFolder,
    UnreadableImage,
    ViewLoader,
    open_loader,
    sources,
    watch,
)
from deit_fast.data import dali as dali_module
from deit_fast.data import loader as loader_module
from deit_fast.data.loader import load_readable
from deit_fast.data.open import open_source
from deit_fast.data.sources import Source, decode
from deit_fast.data.tar_shards import TarShards
from deit_fast.data.watch import Watch, note_sample
from deit_fast.errors import InputError, translate_errors
from deit_fast.runtime import files
from deit_fast.runtime.signals import Preempted
from deit_fast.tools.pack import pack
from deit_fast.views.plan import ViewPlan
from helpers.images import encode, folder_of, picture, write_split
from helpers.processes import forked

PLAIN = ViewConfig(image_size=32, repeats=1, augment="none", mixup_alpha=0, cutmix_alpha=0)
evaluate_module = importlib.import_module("deit_fast.evaluation")  # not the function
SOURCES = ["folder", "tar", "packed-uint8", "packed-jpeg"]
OF_ONE_FILE = {"ENOENT", "EACCES", "EPERM", "ELOOP", "ENOTDIR", "ENXIO", "ENODEV"}
LOADERS = ["pillow", pytest.param("dali-cpu", marks=pytest.mark.dali)]


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("index")))


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, DataConfig]:
    """The same images in each form."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        write_split(root / "folder" / split, 2, 3)
        (root / "tar" / split).mkdir(parents=True)
        with tarfile.open(root / "tar" / split / "0.tar", "w") as archive:
            for label in range(2):
                for number in range(3):
                    file = root / "folder" / split / f"class{label}" / f"{number:03d}.jpg"
                    archive.add(file, f"{label}{number}.jpg")
                    (root / "label").write_text(str(label))
                    archive.add(root / "label", f"{label}{number}.cls")
    folder = DataConfig(root=str(root / "folder"), workers=0)
    for form in ("uint8", "jpeg"):
        pack(folder, str(root / f"packed-{form}"), form=form)
    return {
        name: DataConfig(root=str(root / name), source=name.partition("-")[0], workers=0)
        for name in SOURCES
    }


def batches_of(source: Source, views: int = 1) -> list:
    ids = np.arange(source.num_samples)
    return [(ids, np.full(len(ids), view)) for view in range(views)]


def opened(source: Source, data: DataConfig, loader: str, views: int = 1):
    plan = ViewPlan(PLAIN, source.num_samples)
    data = DataConfig(loader=loader, workers=data.workers, source=data.source, root=data.root)
    return open_loader(data, source, plan, batches_of(source, views), device="cpu")


def failing(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> Callable[[bool], None]:
    """A switch: from then on opening or reading any file fails with this error."""
    original = {"open": os.open, "pread": os.pread, "open_regular": files.open_regular}
    on = False

    def fails(*arguments, **named):
        if on:
            raise OSError(number, os.strerror(number))
        return original[what](*arguments, **named)

    class Unreadable:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self) -> bytes:
            if on:
                raise OSError(number, os.strerror(number))
            return self.file.read()

    if what == "open_regular":
        monkeypatch.setattr(
            sources, "open_regular", lambda path: Unreadable(files.open_regular(path))
        )
    else:
        monkeypatch.setattr(os, what, fails)

    def switch(value: bool) -> None:
        nonlocal on
        on = value

    return switch


def load_one(source: Source, switch: Callable[[bool], None], broken: int, index: int):
    """A sample; only the broken one meets the error."""
    switch(index == broken)
    try:
        return source.load(index)
    finally:
        switch(False)


# ---------------------------------------------------------------------------------------------
# Errors of the machine
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_every_error_number_is_the_files_or_the_machines(roots, kind, monkeypatch):
    """Every error that the system knows, while opening and while reading."""
    counts = {"substituted": 0, "raised": 0}
    reading = "open_regular" if kind == "folder" else "pread"
    for number, what in itertools.product(errno.errorcode, ("open", reading)):
        source = open_source(roots[kind], "train", 32)
        broken = source.paths[2]
        with monkeypatch.context() as patch:
            switch = failing(patch, what, number)
            load = partial(load_one, source, switch, 2)
            substituted: list[str] = []
            try:
                _, taken = load_readable(load, source.paths, 2, "substitute", substituted)
            except OSError as error:
                assert error.errno == number and error.filename is not None
                assert error.filename in broken or "shard-00000.bin" in error.filename
                counts["raised"] += 1
            else:
                assert taken == 3 and substituted == [broken]
                assert kind == "folder" and errno.errorcode[number] in OF_ONE_FILE
                counts["substituted"] += 1
    blamed = 2 * len(OF_ONE_FILE) if kind == "folder" else 0
    assert counts == {"substituted": blamed, "raised": 2 * len(errno.errorcode) - blamed}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_loader_raises_it_with_the_files_name(roots, kind, number, loader, monkeypatch):
    source = open_source(roots[kind], "train", 32)
    passed = opened(source, roots[kind], loader, views=20)
    switch = failing(monkeypatch, "open_regular" if kind == "folder" else "pread", number)
    batches = iter(passed)
    next(batches)
    switch(True)
    with (
        pytest.raises(OSError, match=r"\.jpg|0\.tar") as caught,
        translate_errors(torch.device("cpu"), "remedy"),
    ):
        list(batches)
    assert caught.value.errno == number and caught.value.filename is not None
    assert not isinstance(caught.value, ChildProcessError)


def test_a_broken_connection_of_a_file_system_is_no_dead_process():
    """Of a file server, for instance; a socket to a process has no file name."""
    named = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer", "/data/a.jpg")
    with pytest.raises(ConnectionResetError), translate_errors(torch.device("cpu"), "remedy"):
        raise named
    unnamed = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ChildProcessError), translate_errors(torch.device("cpu"), "remedy"):
        raise unnamed


def test_a_pass_waits_for_the_report_of_a_dead_process(roots, monkeypatch):
    """torch's handler runs a moment after the socket failed, and would interrupt the handling."""

    def report(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    class Dead:
        def __next__(self) -> None:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

        def __iter__(self) -> Dead:
            return self

    source = open_source(roots["folder"], "val", 32)
    passed = ViewLoader(
        source, ViewPlan(PLAIN, source.num_samples), batches_of(source), workers=1,
        on_error="fail",
    )  # fmt: skip
    monkeypatch.setattr(loader_module.Batches, "_loader", lambda *_: Dead())
    before = signal.signal(signal.SIGALRM, report)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            list(passed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_evaluate_reports_a_dead_process_in_one_line(roots, monkeypatch, capsys, tmp_path):
    def dies(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    source = open_source(roots["folder"], "val", 32)
    run = RunConfig(), source, torch.nn.Identity()
    monkeypatch.setattr(evaluate_module, "load_run", lambda *_: run)
    monkeypatch.setattr(evaluate_module, "evaluate_model", dies)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert main(["evaluate", str(tmp_path), "--device", "cpu"]) == 2
    assert "a process that loads images died" in capsys.readouterr().err


def test_a_process_that_dies_is_reported_with_its_file(roots):
    """A decoder that crashes on a file leaves no other trace of it."""
    source = open_source(roots["folder"], "train", 32)
    load = source.load

    def fatal(index: int) -> object:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(index)

    source.load = fatal
    plan = ViewPlan(PLAIN, source.num_samples)
    batches = [(np.arange(5), np.zeros(5, int))]
    loader = ViewLoader(source, plan, batches, workers=1, on_error="fail")
    with pytest.raises(RuntimeError, match=re.escape(f"while it read {source.paths[3]}")):
        list(loader)


def test_an_error_crosses_the_processes_with_its_name(roots, monkeypatch):
    source = open_source(roots["folder"], "train", 32)
    failing(monkeypatch, "open_regular", errno.ESTALE)(True)
    plan = ViewPlan(PLAIN, source.num_samples)
    passes = (
        ViewLoader(source, plan, batches_of(source), workers=1, on_error="substitute"),
        EvalLoader(source, 32, 0.9, (0.5,) * 3, (0.2,) * 3, batch_size=4, workers=1),
    )
    for passed in passes:
        with pytest.raises(OSError, match="Stale file handle") as caught:
            list(passed)
        assert caught.value.filename == source.paths[0]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max"), (errno.ENOMEM, "data.workers"),
        (errno.EIO, "system's log"), (errno.ESTALE, "mount"), (errno.ENOSPC, "another disk"),
    ],
)  # fmt: skip
def test_the_command_line_names_the_resource(number, remedy):
    line = _os_message(OSError(number, os.strerror(number), "/data/a.jpg"))
    assert line.startswith("/data/a.jpg: ") and remedy in line
    own = OSError(number, "a text of ours", "/dev/shm")
    assert _os_message(own) == "/dev/shm: a text of ours"


def read_with_few_descriptors(root: Path, content: bytes) -> None:
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60,) * 2)
    source = TarShards(str(root), "train")
    assert source.num_samples == 300
    assert all(source.read(index) == content for index in range(300))


def test_more_shards_than_descriptors(tmp_path):
    """300 shards with descriptors for 60 of them, in a process that has few others open: a quarter
    of all that it may open is for shards."""
    (tmp_path / "train").mkdir()
    content = encode(picture(1, 20, 20), "JPEG")
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "a.cls").write_text("0")
    for number in range(300):
        with tarfile.open(tmp_path / "train" / f"{number:03d}.tar", "w") as archive:
            archive.add(tmp_path / "a.jpg", f"{number}.jpg")
            archive.add(tmp_path / "a.cls", f"{number}.cls")
    assert forked(read_with_few_descriptors, tmp_path, content) == 0


def test_a_lost_folder_is_no_bad_image(tmp_path):
    write_split(tmp_path / "train", 2, 2)
    source = ImageFolder(str(tmp_path), "train")
    os.unlink(source.paths[0])
    with pytest.raises(UnreadableImage, match="No such file"):
        source.load(0)
    (tmp_path / "train").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError) as caught:
        source.load(1)
    assert caught.value.filename == source.paths[1]


def refuse_memory(kind: str, content: bytes, room: int) -> str:
    """What `decode` says in a process that may allocate ``room`` more bytes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            decode(encode(picture(1, 8, 8), kind), "first")  # imports the plugin
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            used, hard = pages * os.sysconf("SC_PAGE_SIZE"), resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_AS, (used, hard))
            held = []
            with suppress(MemoryError):  # fill the holes of the heap
                while True:
                    held.append(bytes(1 << 16))
            resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
            try:
                decode(content, "/data/large")
                text = "decoded"
            except Exception as error:
                text = f"{type(error).__name__} {error}"
            os.write(write, text.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}), ("JPEG", {"progressive": True}), ("TIFF", {}), ("BMP", {}),
        ("WEBP", {"method": 0}), ("WEBP", {"method": 0, "lossless": True}),
        ("WEBP", {"method": 0, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
    ],
    ids=["png", "progressive", "tiff", "bmp", "webp", "lossless-webp", "extended-webp"],
)  # fmt: skip
def test_a_good_image_is_never_unreadable_for_lack_of_memory(kind, options):
    """Some decoders report a lack of memory as a broken file."""
    content = encode(Image.new("RGB", (2500, 2000), "green"), kind, **options)
    said = [refuse_memory(kind, content, room << 20) for room in (1, 4, 10, 18, 24, 32, 80)]
    assert all(text == "decoded" or "out of memory" in text for text in said), said
    assert "2500 x 2000 pixels" in said[1] and "OSError" in said[1] and "/data/large" in said[1]
    assert said[-1] == "decoded"


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
              Preempted("SIGTERM", "saved")], ids=["dead-worker", "signal"],
)  # fmt: skip
def test_what_a_signal_handler_raises_passes_the_decoder(error, monkeypatch):
    """A handler runs in the middle of anything."""

    def handler(*_: object) -> None:
        raise error

    content = encode(picture(1, 20, 20), "JPEG")
    monkeypatch.setattr(Image.Image, "load", handler)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", handler)
    with pytest.raises(type(error)) as caught:
        decode(content, "a.jpg")
    assert caught.value is error


# ---------------------------------------------------------------------------------------------
# Bad images
# ---------------------------------------------------------------------------------------------


def test_too_many_pixels_are_unreadable_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=r"exceeds limit of 2000 pixels"):
        decode(encode(picture(1, 70, 30), "PNG"), "pano.png")


@pytest.mark.parametrize("kind", ["FIFO", "folder", "dangling-link", "device", "text"])
def test_what_is_no_image_is_replaced_at_once_and_named(tmp_path, kind):
    good = {name: encode(picture(1, 30, 30), "JPEG") for name in ("a.jpg", "b.jpg", "c.jpg")}
    source = folder_of(tmp_path, good)
    path = Path(source.paths[1])
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no image")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    plan = ViewPlan(PLAIN, 3)
    for workers in (0, 1):
        (batch,) = ViewLoader(
            source, plan, batches_of(source), workers=workers, on_error="substitute"
        )
        assert batch.substituted == [str(path)]
    with pytest.raises(InputError, match=r"b\.jpg") as caught:
        list(ViewLoader(source, plan, batches_of(source), workers=0, on_error="fail"))
    assert " at 0x" not in str(caught.value)


def test_a_long_row_of_bad_images_is_an_error():
    """Rights that expired, for instance: nobody waits until a million files are tried."""
    tried = []

    def load(index: int) -> None:
        tried.append(index)
        raise UnreadableImage(f"{index}.jpg", "PermissionError: Permission denied")

    paths = [f"{n}.jpg" for n in range(10**5)]
    with pytest.raises(InputError, match=r"from 7\.jpg on.*Permission denied"):
        load_readable(load, paths, 7, "substitute", [])
    assert len(tried) <= 1000


# ---------------------------------------------------------------------------------------------
# Loaders that cannot work
# ---------------------------------------------------------------------------------------------


def on_watch(workers: int = 2) -> Watch:
    found = Watch("process", workers, "{}.jpg".format)
    for worker in range(workers):
        found.join(worker)
    return found


@pytest.fixture
def alone(monkeypatch):
    """This thread is a worker in this test only."""
    monkeypatch.setattr(watch, "_this_thread", SimpleNamespace())


def test_a_worker_that_finishes_files_is_waited_for(alone):
    slow = on_watch(1)
    for sample in range(1000):
        note_sample(sample)
        for _ in range(9):  # 45 s a file
            slow.waited()


def test_a_worker_that_does_not_get_past_a_file_is_named_within_a_minute(alone, caplog):
    stuck = on_watch()
    note_sample(31)  # the second worker; the first one has no work
    with (
        caplog.at_level(logging.WARNING, "deit_fast"),
        pytest.raises(ChildProcessError, match=r"no batch for 50 s: process \d+ .*31\.jpg"),
    ):
        for _ in range(12):
            stuck.waited()
    assert "no batch for 30 s" in caplog.text and caplog.text.count("\n") == 1
    assert len(stuck.stuck()) == 1
    assert watch.POLL_SECONDS * (watch._GIVE_UP_AFTER + 1) < 60


def test_a_batch_that_is_lost_is_noticed(alone):
    idle = on_watch()
    with pytest.raises(ChildProcessError, match=r"/dev/shm has \d+ MiB free.*ulimit -n"):
        for _ in range(20):
            idle.waited()
    assert idle.stuck() == []
    not_begun = Watch("process", 2, str)  # importing, after a spawn
    for _ in range(100):
        not_begun.waited()


class Stuck(Source):
    """Sample 1 never arrives, as from a mount that does not answer."""

    classes, finished = ["a", "b"], True
    labels, paths = np.array([0, 1]), ["0.jpg", "1.jpg"]

    def __init__(self) -> None:
        self.pipe = os.pipe()

    def read(self, index: int) -> bytes:
        if index == 1:
            os.read(self.pipe[0], 1)
        return encode(picture(1, 32, 32), "JPEG")

    def load(self, index: int) -> np.ndarray:
        return np.asarray(decode(self.read(index), self.paths[index]))

    def _sha256(self) -> str:
        return ""


def test_a_stuck_process_ends_the_pass_and_is_killed(monkeypatch):
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.1)
    handler = signal.getsignal(signal.SIGCHLD)
    passed = iter(
        ViewLoader(
            Stuck(), ViewPlan(PLAIN, 2), [([0], [0]), ([1], [0])], workers=1, on_error="fail"
        )
    )
    assert next(passed).labels.tolist() == [0]
    with pytest.raises(
        ChildProcessError, match=r"process (\d+).* does not get past 1\.jpg"
    ) as error:
        next(passed)
    process = int(str(error.value).partition("process ")[2].split()[0])
    assert not Path(f"/proc/{process}").exists()
    assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, None) or handler is None


@pytest.mark.dali
def test_a_stuck_thread_ends_the_pass(monkeypatch):
    monkeypatch.setattr(dali_module, "POLL_SECONDS", 0.1)
    source = Stuck()
    passed = iter(
        dali_module.DaliLoader(
            source, ViewPlan(PLAIN, 2), [([1], [0])], DataConfig(loader="dali-cpu", workers=1),
        )
    )  # fmt: skip
    with pytest.raises(ChildProcessError, match=r"thread \d+.* does not get past 1\.jpg"):
        next(passed)
    os.write(source.pipe[1], b"x")  # the thread ends


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device "
         "(28)", errno.ENOSPC),
        ("unable to open shared memory object </torch_1_2_0> in read-write mode: Too many open "
         "files (24)", errno.EMFILE),
    ],
)  # fmt: skip
def test_a_full_dev_shm_is_an_error_of_the_pass(roots, text, number, monkeypatch):
    """torch's own thread would drop the batch and leave the loader waiting."""

    def full(_: torch.Tensor) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    source = open_source(roots["folder"], "train", 32)
    plan = ViewPlan(PLAIN, source.num_samples)
    with pytest.raises(OSError, match="/dev/shm") as caught:
        list(ViewLoader(source, plan, batches_of(source), workers=1, on_error="fail"))
    assert caught.value.errno == number
