"""The start of a run on an image folder of ImageNet's size: to list it and to know its fingerprint.

The files are hard links to 32 JPEG files in 1000 folders, in a temporary folder (TMPDIR), and the
system has their names and sizes in memory. STARTUP_FILES is their number, 1,281,000 by default.

First: nothing is known of the folder. "ours, one pass" lists it, asks for each file's size and
makes the fingerprint. Its peer, "scandir and stat", only collects names and sizes of the images, by
class in the order of the system; "two passes" is how this project did it before, with threads that
ask for the sizes. The index is not written in this case.

Second: the folder was listed by an earlier start. "ours, index" opens the source, which checks the
times of each folder and maps the index, and takes its fingerprint. Its peers list the folder anew
and make no fingerprint. `own_mb` is the anonymous memory that a process needs for the source,
without pages of mapped files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from deit_fast.data import ImageFolder
from deit_fast.data.folder_index import TICK_NS
from deit_fast.data.folder_listing import ListingPass
from deit_fast.inputs import IMAGE_SUFFIXES, class_folders

from .bench_loader import write_photographs
from .common import Case, Row
from .two_passes import TwoPasses

FILES = int(os.environ.get("STARTUP_FILES", 1_281_000))
CLASSES = 1000


@cache
def linked_files() -> tempfile.TemporaryDirectory[str]:
    """The image folder, its source files and a cache folder; they live as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="deit-fast-bench-")
    root = Path(folder.name)
    write_photographs(root / "photographs")
    photographs = sorted(map(str, (root / "photographs").rglob("*.jpg")))
    for label in range(CLASSES):
        name = f"n{1_440_764 + 7 * label:08d}"
        target = root / "images" / "train" / name
        target.mkdir(parents=True)
        for number in range(label, FILES, CLASSES):
            os.link(photographs[number % len(photographs)], f"{target}/{name}_{number}.JPEG")
    time.sleep(TICK_NS / 1e9 + 1)  # else the index would not be trusted
    return folder


def cases(device: str) -> list[Case]:
    return [
        Case(f"first start, {FILES:,} files", build_first, items=FILES, on_host=True),
        Case(f"second start, {FILES:,} files", build_second, items=FILES, on_host=True,
             facts=own_memory, repeats=2),  # few rounds, which leave time for the facts
    ]  # fmt: skip


def build_first() -> dict[str, Callable[[], Any]]:
    split = os.path.join(linked_files().name, "images", "train")

    def one_pass() -> str:
        listed = ListingPass(split, class_folders(split))
        listed.run()
        return listed.listing().digest

    def two_passes() -> str:
        return TwoPasses(split, class_folders(split)).sha256()

    assert one_pass() == two_passes()
    return {
        "ours, one pass": one_pass,
        "scandir and stat": partial(scandir_and_stat, split),
        "two passes": two_passes,
    }


def scandir_and_stat(split: str) -> list[list[tuple[str, int]]]:
    found = []
    for name in class_folders(split):
        with os.scandir(os.path.join(split, name)) as entries:
            found.append([
                (entry.name, entry.stat().st_size)
                for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)
            ])  # fmt: skip
    return found


def build_second() -> dict[str, Callable[[], Any] | str]:
    with own_cache():
        open_ours()
    found: dict[str, Callable[[], Any] | str] = {"ours, index": open_ours}
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        return found | {"torchvision ImageFolder": f"{error}"}
    return found | {"torchvision ImageFolder": open_torchvision}


def open_ours() -> Any:
    with own_cache():
        source = ImageFolder(os.path.join(linked_files().name, "images"), "train")
        source.fingerprint()
        return source


def open_torchvision() -> Any:
    from torchvision.datasets import ImageFolder as TorchvisionFolder

    return TorchvisionFolder(os.path.join(linked_files().name, "images", "train"))


@contextmanager
def own_cache() -> Iterator[None]:
    """The cache folder is one beside the images in the block."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = os.path.join(linked_files().name, "cache")
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


MEMORY = """
import sys
import bench.bench_startup as startup
from bench.cache_stores import own_megabytes
class Folder:
    name = sys.argv[2]
startup.linked_files = lambda: Folder
open_source = startup.open_ours if sys.argv[1].startswith("ours") else startup.open_torchvision
import torchvision
before = own_megabytes()
source = open_source()
print(own_megabytes() - before)
"""


def own_memory(name: str) -> Row:
    command = [sys.executable, "-c", MEMORY, name, linked_files().name]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"own_mb": float(done.stdout)} if done.returncode == 0 else {}
