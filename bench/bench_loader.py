"""Loading of JPEG files on one core, and view plans: ours against timm's loader, same recipe.

`ours` and timm decode with Pillow, take a random resized crop (bicubic) and apply RandAugment (in
DeiT's recipe), in this process with one torch thread. The cases "to uint8" measure the host's part
of training: they end with a batch of bytes, and leave out what the device does afterwards (ours:
ingest, timm: its PrefetchLoader). The cases "to float32" also flip, normalise and erase on this
core. Mixing is left out. The files are crops of scikit-learn's two photographs, 500 x 375 pixels,
JPEG quality 94, which take about as much work as ImageNet's files.

`ours dali-cpu` is our loader with NVIDIA DALI, if that is installed, without prefetching: one
thread of DALI decodes, and our own functions crop, resize and augment, to the bytes of Pillow. (A
second thread reads the files and draws the plan, a tenth of the work.)

`ours packed` reads the same images from packed shards (`deit-fast pack`): decoded once, shorter
side 256, uint8.

On a GPU also its decoders: the hardware JPEG engine (`hw_decoder_load` is its share of the images)
and the CUDA decoder, with the given number of DALI threads, up to views on the GPU, four batches
ahead. `identical_pct` is the share of views whose bytes do not change when their batch is split in
two; at a load between 0 and 1 they may change.

`3 repeats` is repeated augmentation: timm decodes a file for each view, ours once for three views.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from deit_fast.config import DataConfig, ViewConfig
from deit_fast.data import ImageFolder, ViewLoader, ingest_batch
from deit_fast.data.jpeg_index import FileIndex
from deit_fast.data.packed_shards import PackedImages
from deit_fast.data.sources import Source
from deit_fast.errors import InputError
from deit_fast.tools.pack import pack
from deit_fast.views.plan import ViewPlan

from .common import Case

SIZE = 224
FILES = 32
PLANS = 4096


def write_photographs(folder: Path, files: int = FILES) -> None:
    """Crops of scikit-learn's two photographs as an image folder of two classes."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for number in range(files):
        target = folder / "train" / ("temple", "flower")[number % 2]
        target.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(load_sample_images().images[number % 2])
        width = int(rng.integers(400, image.width + 1))
        height = width * 3 // 4
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, max(image.height - height, 0) + 1))
        crop = image.crop((left, top, left + width, min(top + height, image.height)))
        crop.resize((500, 375), Image.Resampling.BICUBIC).save(
            target / f"{number:03d}.jpg", quality=94
        )


def one_core(function: Callable[[], Any]) -> Callable[[], Any]:
    """On one torch thread."""

    def run() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run


def build_loaders(augment: bool, repeats: int, whole: bool) -> dict[str, Callable[[], Any] | str]:
    from timm.data import ImageDataset, create_loader

    holder = tempfile.TemporaryDirectory()  # lives as long as the closures below
    root = Path(holder.name)
    write_photographs(root)

    recipe = ViewConfig(mixup_alpha=0, cutmix_alpha=0, augment="randaugment" if augment else "none")
    source = ImageFolder(str(root), "train")
    ids = np.repeat(np.arange(FILES), repeats)
    views = np.tile(np.arange(repeats), FILES)
    (root / "val").symlink_to(root / "train")
    data = DataConfig(root=str(root), workers=0)
    pack(data, str(root / "pack"))

    def ours(source: Source) -> Callable[[], None]:
        loader = ViewLoader(
            source, ViewPlan(recipe, FILES), [(ids, views)], workers=0, on_error="fail"
        )

        def run() -> None:
            assert holder
            for batch in loader:
                if whole:
                    ingest_batch(batch, recipe, torch.float32)

        return run

    dataset = ImageDataset(str(root / "train"))
    dataset.reader.samples = dataset.reader.samples * repeats
    timms = create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=len(ids),
        is_training=True,
        use_prefetcher=not whole,
        color_jitter=0.0,
        auto_augment="rand-m9-mstd0.5-inc1" if augment else None,
        re_prob=recipe.erase_prob,
        re_mode="pixel",
        interpolation="bicubic",
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    if not whole:
        timms = timms.loader  # what its PrefetchLoader wraps

    def run_timm() -> None:
        for _ in timms:
            pass

    return {
        "ours": one_core(ours(source)),
        "ours packed": one_core(ours(PackedImages(str(root / "pack"), "train"))),
        "ours dali-cpu": build_dali(source, recipe, ids, views, root, whole),
        "timm": one_core(run_timm),
    }


def build_dali(
    source: ImageFolder,
    recipe: ViewConfig,
    ids: np.ndarray,
    views: np.ndarray,
    folder: Path,
    whole: bool,
) -> Callable[[], Any] | str:
    try:
        from deit_fast.data.dali import DaliLoader

        index = FileIndex(source, folder)
    except (ImportError, InputError) as error:
        return str(error)
    plan = ViewPlan(recipe, FILES)
    batches = Endless((ids, views))
    data = DataConfig(loader="dali-cpu", workers=1, on_error="fail")
    loader = DaliLoader(source, plan, batches, data, depth=1, index=index)
    passed = iter(loader)

    def run() -> None:
        batch = next(passed)
        if whole:
            ingest_batch(batch, recipe, torch.float32)

    return one_core(run)


class Endless(Sequence[tuple[np.ndarray, np.ndarray]]):
    """The same batch at every step."""

    def __init__(self, batch: tuple[np.ndarray, np.ndarray]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        return self.batch


def build_decoder(
    kind: Literal["dali-cpu", "dali-gpu"], device: str, load: float, threads: int
) -> tuple[Callable[[], Any], Callable[[], float]] | str:
    """A function that makes a batch of FILES views while DALI prefetches, and the percentage of
    views that stay the same in batches of half the size; or the reason why DALI cannot run."""
    holder = tempfile.TemporaryDirectory()
    root = Path(holder.name)
    write_photographs(root)
    source = ImageFolder(str(root), "train")
    plan = ViewPlan(ViewConfig(mixup_alpha=0, cutmix_alpha=0), FILES)
    ids, views = np.arange(FILES), np.zeros(FILES, np.int64)
    try:
        from deit_fast.data.dali import DaliLoader

        index = FileIndex(source, root)
    except (ImportError, InputError) as error:
        return str(error)

    class Data(DataConfig):
        dali_hw_decoder_load = load  # a constant of every run

    data = Data(loader=kind, workers=threads, on_error="fail")

    def loader(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> DaliLoader:
        return DaliLoader(source, plan, batches, data, device, depth=4, index=index)

    passed = iter(loader(Endless((ids, views))))

    def run() -> None:
        assert holder
        next(passed).images.sum().item()  # until they are there

    def identical_pct() -> float:
        pieces = [(ids[first::2], views[first::2]) for first in (0, 1)]
        whole, *parts = (batch.images.clone() for batch in loader([(ids, views), *pieces]))
        same = [torch.equal(parts[i % 2][i // 2], whole[i]) for i in range(FILES)]
        return 100 * sum(same) / FILES

    return run, identical_pct


def decoder_case(load: float, threads: int) -> Case:
    impl = "ours dali-gpu"
    found: list[Callable[[], float]] = []

    def build() -> dict[str, Callable[[], Any] | str]:
        built = build_decoder("dali-gpu", "cuda", load, threads)
        if isinstance(built, str):
            return {impl: built}
        found[:] = built[1:]
        return {impl: built[0]}

    def facts(name: str) -> dict[str, Any]:
        return {"identical_pct": found[0]()}

    name = f"GPU decoder, hw_decoder_load {load}, {threads} threads"
    return Case(name, build, items=FILES, on_host=True, facts=facts)


def build_plans(crops: bool) -> dict[str, Callable[[], Any] | str]:
    plan = ViewPlan(ViewConfig(), 1_281_167)
    ids = np.random.default_rng(0).integers(0, plan.num_samples, PLANS)
    views, widths, heights = (np.full(PLANS, value) for value in (7, 500, 375))
    if crops:
        return {"ours": one_core(lambda: plan.crop_boxes(ids, views, widths, heights))}
    return {"ours": one_core(lambda: plan.rows(ids, views))}


def cases(device: str) -> list[Case]:
    def loaders(augment: bool, repeats: int, whole: bool = False) -> Callable[[], Any]:
        return lambda: build_loaders(augment, repeats, whole)

    builds = {
        "plan rows": (lambda: build_plans(False), PLANS),
        "plan crop boxes": (lambda: build_plans(True), PLANS),
        "to uint8, crop": (loaders(False, 1), FILES),
        "to uint8, DeiT recipe": (loaders(True, 1), FILES),
        "to uint8, DeiT recipe, 3 repeats": (loaders(True, 3), 3 * FILES),
        "to float32, crop": (loaders(False, 1, whole=True), FILES),
        "to float32, DeiT recipe": (loaders(True, 1, whole=True), FILES),
    }
    found = [Case(name, build, items=n, on_host=True) for name, (build, n) in builds.items()]
    if device == "cuda":
        settings = [(load, 8) for load in (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)]
        settings += [(load, threads) for threads in (2, 4, 16) for load in (0.0, 0.65)]
        found += [decoder_case(load, threads) for load, threads in settings]
    return found
