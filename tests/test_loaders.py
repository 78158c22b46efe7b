"""What all loaders have in common: order, substitutes, clean ends, no leaks, contracts."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_fast.config import DataConfig, ViewConfig
from deit_fast.data import ImageFolder, open_loader, pixel_contract
from deit_fast.data.open import DeviceLoader
from deit_fast.errors import InputError
from deit_fast.views.order import EpochOrder, TrainBatches
from deit_fast.views.plan import ViewPlan
from helpers.images import (
    SEED,
    SIZE,
    broken_files,
    digests,
    encode,
    folder_of,
    odd_files,
    picture,
    write_split,
)

DALI = pytest.mark.dali
LOADERS = ["pillow", pytest.param("dali-cpu", marks=DALI)]
RECIPE = ViewConfig(seed=SEED, image_size=SIZE, repeats=2)
PLAIN = ViewConfig(
    seed=SEED, image_size=SIZE, repeats=1, augment="none", mixup_alpha=0, cutmix_alpha=0
)


@pytest.fixture(autouse=True)
def index_folder(tmp_path_factory, monkeypatch):
    """A folder for DALI's index of files, for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("index")))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_split(root / "train", 2, 6)
    return root


@pytest.fixture(scope="module")
def source(root) -> ImageFolder:
    return ImageFolder(str(root), "train")


def opened(loader, source, plan, batches, *, workers=0, on_error="fail", **more):
    data = DataConfig(loader=loader, workers=workers, on_error=on_error)
    return open_loader(data, source, plan, batches, device="cpu", **more)


def run_batches(source, size=4, epochs=2, **more):
    order = EpochOrder(SEED, source.num_samples, 2, 2)
    return TrainBatches(order, size, epochs, **more)


# ---------------------------------------------------------------------------------------------
# Order and identity
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
def test_a_view_is_the_same_in_any_batch_order_and_number_of_workers(source, loader):
    plan = ViewPlan(RECIPE, 12)
    keys = np.array([(sample, view) for sample in range(12) for view in range(2)])
    rng = np.random.default_rng(0)
    reference = None
    for size, workers in ((24, 0), (1, 2), (7, 1), (10, 3)):
        shuffled = rng.permutation(keys)
        batches = [shuffled[at : at + size].T for at in range(0, len(keys), size)]
        found = digests(opened(loader, source, plan, batches, workers=workers))
        assert len(found) == 24 and len(set(found.values())) == 24
        reference = reference or found
        assert found == reference


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pass_starts_and_stops_anywhere(source, loader):
    plan, batches = ViewPlan(RECIPE, 12), run_batches(source)

    def run(start: int, stop: int | None = None) -> list[tuple[list[int], bytes]]:
        passed = opened(loader, source, plan, batches, workers=1, start=start, stop=stop)
        found = [(batch.sample_ids.tolist(), batch.images.numpy().tobytes()) for batch in passed]
        assert len(found) == len(passed)
        return found

    full = run(0)
    assert [ids for ids, _ in full] == [batches[step][0].tolist() for step in range(len(batches))]
    assert run(4) == full[4:] and run(1, 3) == full[1:3] and run(len(batches)) == []
    with pytest.raises(InputError, match="start=99"):
        run(99)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_rank_gets_equally_many_batches(source, loader):
    plan = ViewPlan(PLAIN, 12)
    counts, seen = [], []
    for rank in range(3):
        batches = TrainBatches(EpochOrder(SEED, 12, 2, 1), 9, 2, rank=rank, world_size=3)
        found = [batch.sample_ids.tolist() for batch in opened(loader, source, plan, batches)]
        counts.append([len(ids) for ids in found])
        seen.append(found)
    assert counts[0] == counts[1] == counts[2] == [3] * len(counts[0]) and counts[0]
    assert seen[0] != seen[1]


@pytest.mark.dali
def test_dali_with_our_kernel_makes_pillows_pixels(source):
    plan = ViewPlan(RECIPE, 12)
    batches = [(np.arange(12), np.full(12, view)) for view in range(2)]
    ours = opened("pillow", source, plan, batches)
    for mine, theirs in zip(ours, opened("dali-cpu", source, plan, batches), strict=True):
        for name in ("images", "plan", "labels", "partner_labels", "lam", "sample_ids", "view_ids"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert len(torch.unique(mine.images)) > 200


# ---------------------------------------------------------------------------------------------
# Files that are no plain JPEGs
# ---------------------------------------------------------------------------------------------


@pytest.mark.dali
@pytest.mark.filterwarnings("ignore:Palette images")
def test_odd_files_look_alike_in_all_loaders(tmp_path):
    source = folder_of(tmp_path, odd_files())
    count = source.num_samples
    plan = ViewPlan(PLAIN, count)
    batches = [(np.arange(count), np.zeros(count, int))]
    found = {
        loader: next(iter(opened(loader, source, plan, batches))).images.int()
        for loader in ("pillow", "dali-cpu")
    }
    assert torch.equal(found["pillow"], found["dali-cpu"])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_broken_files_give_way_to_their_next_neighbour(tmp_path, loader):
    broken = broken_files()
    good = {f"{name}~.jpg": encode(picture(n, 40, 30), "JPEG") for n, name in enumerate(broken)}
    source = folder_of(tmp_path, broken | good)
    count, plan = source.num_samples, ViewPlan(PLAIN, source.num_samples)
    source.labels = np.arange(count)  # tells who was taken
    batches = [(np.arange(count), np.zeros(count, int)), (np.arange(2), np.ones(2, int))]
    first, second = opened(loader, source, plan, batches, on_error="substitute")
    names = [os.path.basename(path) for path in source.paths]
    taken = [next(k % count for k in range(i, 2 * count) if names[k % count] not in broken)
             for i in range(count)]  # fmt: skip
    assert first.labels.tolist() == taken
    assert sorted(map(os.path.basename, first.substituted)) == sorted(broken)
    assert second.labels.tolist() == taken[:2]  # the loader lives
    # Pixels of the neighbour, where the plan puts the sample itself.
    healed = folder_of(
        tmp_path / "healed",
        {name: Path(source.paths[index]).read_bytes()
         for name, index in zip(names, taken, strict=True)},
    )  # fmt: skip
    expected = next(iter(opened(loader, healed, plan, batches)))
    assert torch.equal(first.images, expected.images) and expected.substituted == []
    with pytest.raises(InputError) as caught:
        list(opened(loader, source, plan, batches))
    message = str(caught.value)
    assert "\n" not in message and "Error" in message and "data.on_error=fail" in message
    assert any(os.path.join("class0", name) in message for name in broken)


@pytest.mark.parametrize("loader", LOADERS)
def test_no_readable_image_is_an_error(tmp_path, loader):
    source = folder_of(tmp_path, {f"{n}.jpg": b"nothing" for n in range(3)})
    passed = opened(loader, source, ViewPlan(PLAIN, 3), [([1], [0])], on_error="substitute")
    with pytest.raises(InputError, match="no image of the data set is readable"):
        list(passed)


# ---------------------------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------------------------


def helpers() -> set[str]:
    """Threads and child processes of loaders that still run."""
    threads = {thread.name for thread in threading.enumerate() if "dali" in thread.name}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return threads | {
        pid for pid in children if "pytest" in Path(f"/proc/{pid}/cmdline").read_text()
    }


@pytest.mark.timeout(60)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_half_read_pass_and_an_exception_end_at_once(source, loader):
    plan, batches = ViewPlan(PLAIN, 12), run_batches(source, epochs=100_000)
    before = helpers()
    passed = iter(opened(loader, source, plan, batches, workers=2))
    next(passed)
    del passed
    assert helpers() == before

    def fails() -> None:
        for _ in opened(loader, source, plan, batches, workers=2):
            raise RuntimeError("of the loop's own")

    with pytest.raises(RuntimeError, match="of the loop's own"):
        fails()
    assert helpers() == before
    assert len(list(opened(loader, source, plan, batches, workers=2, stop=3))) == 3


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("loader", "number"),
    [("pillow", signal.SIGKILL), pytest.param("dali-cpu", signal.SIGTERM, marks=DALI)],
    ids=["pillow", "dali-cpu"],
)
def test_a_signal_ends_a_pass_and_its_processes(root, loader, number):
    code = (
        "import sys, test_loaders as t\n"
        "source = t.ImageFolder(sys.argv[1], 'train')\n"
        "plan = t.ViewPlan(t.PLAIN, 12)\n"
        "batches = t.run_batches(source, epochs=100000)\n"
        "for k, _ in enumerate(t.opened(sys.argv[2], source, plan, batches, workers=2)):\n"
        "    if k == 2: print('ready', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root), loader],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(20) == -number
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # its workers notice that it is gone
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("worker processes outlived the loader")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "workers"),
    [
        ("pillow", 0),
        ("pillow", 1),
        pytest.param("dali-cpu", 1, marks=DALI),
    ],
)
def test_fifty_passes_leak_neither_memory_nor_files(source, loader, workers):
    plan, batches = ViewPlan(RECIPE, 12), run_batches(source)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def one_pass() -> None:
        list(opened(loader, source, plan, batches, workers=workers, stop=3))

    for _ in range(10):  # pools fill, modules are imported
        one_pass()
    gc.collect()
    files, memory = len(os.listdir("/proc/self/fd")), resident()
    for _ in range(50):
        one_pass()
    gc.collect()  # a thread pool is a cycle, with two pipes
    assert len(os.listdir("/proc/self/fd")) <= files + 2
    # A lost batch is 0.04 MB, a lost pipeline 3 MB and more.
    assert resident() - memory < 40 * 2**20


# ---------------------------------------------------------------------------------------------
# Configuration and contracts
# ---------------------------------------------------------------------------------------------


@pytest.mark.dali
def test_contracts_differ_where_pixels_do():
    pillow = pixel_contract(DataConfig())
    assert pillow == {"contract.pixels": "pillow/11-12"}
    assert pixel_contract(DataConfig(loader="dali-cpu")) == pillow
    on_gpu = pixel_contract(DataConfig(loader="dali-gpu"))
    assert on_gpu["contract.pixels"] == "dali-decoded/gpu"
    assert on_gpu["contract.hw_decoder_load"] == 0.0 and on_gpu["contract.dali"] >= "2"


def test_a_decoder_needs_a_source_of_files():
    with pytest.raises(InputError, match=r"data\.source=synthetic"):
        DataConfig(loader="dali-cpu", source="synthetic")


def test_without_dali_one_line_names_the_extra(root):
    code = (
        "import sys\n"
        "sys.modules['nvidia.dali'] = None\n"
        "import test_loaders as t\n"
        "source = t.ImageFolder(sys.argv[1], 'train')\n"
        "for make in (lambda: t.pixel_contract(t.DataConfig(loader='dali-gpu')),\n"
        "             lambda: t.opened('dali-cpu', source, t.ViewPlan(t.PLAIN, 12), [])):\n"
        "    try: make()\n"
        "    except t.InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("pip install deit-fast[dali]" in line for line in lines), done


# ---------------------------------------------------------------------------------------------
# Copies to the device
# ---------------------------------------------------------------------------------------------


def test_the_loaders_own_work_runs_beside_the_computation(monkeypatch):
    """Which stream is current when, and what waits for what; on streams that only take notes."""
    current, notes = ["main"], []

    class Stream:
        def __init__(self, device: object = None) -> None:
            self.name = "side" if device is not None else "main"

        def record_event(self) -> str:
            return f"event of {notes[-1]}"

        def wait_event(self, event: str) -> None:
            notes.append(f"{self.name} waits for {event}")

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        current.append(stream.name)
        yield
        current.pop()

    class Value:
        def record_stream(self, stream: Stream) -> None:
            notes.append(f"kept for {stream.name}")

    class Batch:
        def __init__(self, number: int) -> None:
            self.number = number

        def device_tensors(self) -> list[Value]:
            return [Value(), Value()]

        def to(self, device: object) -> Batch:
            notes.append(f"copy {self.number} on {current[-1]}")
            return self

    class Loader:
        def __iter__(self) -> Iterator[Batch]:
            for number in range(3):
                notes.append(f"make {number} on {current[-1]}")
                yield Batch(number)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())

    def attach(batch: Batch) -> Batch:
        notes.append(f"attach {batch.number} on {current[-1]}")
        return batch

    for batch in DeviceLoader(Loader(), torch.device("cuda", 0), attach):
        assert current == ["main"]
        notes.append(f"use {batch.number}")
    steps = ("make", "attach", "copy")
    made = [f"{what} {number} on side" for number in range(3) for what in steps]
    kept = ["kept for main"] * 2
    used = [
        [f"main waits for event of copy {number} on side", *kept, f"use {number}"]
        for number in range(3)
    ]
    assert notes == [*made[:6], *used[0], *made[6:], *used[1], *used[2]]


@pytest.mark.gpu
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_on_the_gpu_are_those_of_the_cpu(source, loader):
    plan, batches = ViewPlan(RECIPE, 12), run_batches(source, epochs=20)
    data = DataConfig(loader=loader, workers=2)
    here = opened(loader, source, plan, batches, workers=2)
    there = open_loader(data, source, plan, batches, device="cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    for mine, other in zip(here, there, strict=True):
        for _ in range(20):
            busy = busy @ busy / 50  # the copies of the next batch overtake this
        for name in ("images", "plan", "labels", "partner_labels", "lam"):
            value = getattr(other, name)
            assert value.is_cuda and torch.equal(value.cpu(), getattr(mine, name)), name
