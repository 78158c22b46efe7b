"""What a command reads. Its paths are checked before torch is imported, so that an answer to a
wrong one takes no longer than help does; the engine checks the same where it opens them.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

from deit_fast.config import DataConfig, RunConfig
from deit_fast.errors import InputError, did_you_mean, printable
from deit_fast.hub_files import expected_files, find_split, holds_tables, split_files, tables
from deit_fast.runtime.files import cache_folder, open_regular
from deit_fast.runtime.weights_header import (
    MODEL_FILE,
    WEIGHTS_FILES,
    WeightsChoice,
    require_weights,
    split_key,
)
from deit_fast.storage.urls import SCHEMES, is_url, require_plain, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
_TEXT_BYTES = frozenset(b"\t\n\r\f") | frozenset(range(32, 127))
_MOST_LOOKED_AT = 200  # entries of a folder, where a message looks for what was meant


# ---------------------------------------------------------------------------------------------
# What a verb needs
# ---------------------------------------------------------------------------------------------


def require_train_inputs(config: RunConfig, is_dry: bool = False) -> None:
    """The paths that `train` reads.

    Args:
        is_dry: the cache need not be there yet.

    Raises:
        InputError: one is missing or of the wrong kind, or distillation has no teacher.
    """
    require_images(config.data, ("train", "val"))
    require_teacher_settings(config)
    has_checkpoint = any(Path(config.output, "checkpoints").glob("step-*.pt"))
    weights = config.model.weights
    if weights is not None and not weights.startswith("timm:") and not has_checkpoint:
        require_weights_file(weights)
    if config.resume_from is not None and not os.path.exists(config.resume_from):
        near = nearest_path(config.resume_from)
        raise InputError(f"resume_from: checkpoint {config.resume_from} does not exist{near}")
    for cache in config.caches:
        if may_exist(cache) or not is_dry:
            from deit_fast.cache.verify import require_for_run

            require_for_run(cache, config.loss.tau)
    if config.loss.kind != "none" or config.feature_targets:
        _require_teacher_files(config)


def with_local_output(config: RunConfig) -> RunConfig:
    """A run whose output is a URL gets a folder of the user's cache folder, and the URL as mirror.

    Raises:
        InputError: the URL is none that can be used, or another mirror is given too.
    """
    if config.mirror is not None:
        require_plain(config.mirror)
    if not is_url(config.output):
        return config
    url = require_plain(config.output)
    if config.mirror not in (None, url):
        raise InputError(f"output={url} is its own mirror: leave mirror={config.mirror} out")
    return config.replace(output=str(_folder_of_run(url)), mirror=url)


def _folder_of_run(url: str) -> Path:
    """Where a run whose output is a URL works."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_folder() / "runs" / f"{url.rpartition('/')[2][:40]}-{digest}"


def may_exist(path: str) -> bool:
    """Whether a path exists; True for a URL, of which that shows when it is opened."""
    return is_url(path) or os.path.lexists(path)


def require_precompute_inputs(config: RunConfig) -> None:
    """As ``require_train_inputs``, for `precompute`, which needs a teacher and a cache."""
    if config.teacher is None or config.cache is None:
        missing = "--teacher SPEC" if config.teacher is None else "--cache DIR"
        raise InputError(f"precompute needs {missing}")
    require_images(config.data, ("train",))
    _require_feature_settings(config)
    _require_teacher_files(config)


def _require_feature_settings(config: RunConfig) -> None:
    """
    Raises:
        InputError: settings of features that do not go together.
    """
    features = config.features
    if (features.reduce == "none") != (features.dim is None):
        raise InputError(
            f"features.reduce={features.reduce} with features.dim={features.dim}: set both, such "
            f"as --features.reduce pca --features.dim 64, or neither"
        )
    if "patches" in config.targets and len(config.view.sizes) > 1 and config.teacher_size is None:
        raise InputError(
            "targets patches with view.size_schedule: a view of another size has another number of "
            "patches; give --teacher-size, the one size of the teacher's images"
        )


def require_teacher_settings(config: RunConfig) -> None:
    """
    Raises:
        InputError: distillation without teacher or cache, a check of a cache without both, further
            caches without a first one, or settings of features that no online teacher can serve.
    """
    if config.cache is None and config.more_caches:
        raise InputError(
            f"more_caches={' '.join(config.more_caches)} without cache: name the first by --cache"
        )
    if config.cache in config.more_caches:
        raise InputError(f"more_caches names the folder of cache={config.cache} again")
    every = config.check_teacher_every
    if every is not None and None in (config.cache, config.teacher):
        raise InputError(
            f"check_teacher_every={every} compares a cache with its teacher: give --cache and "
            f"--teacher, not {config.cache} and {config.teacher}"
        )
    if config.cache is None and config.teacher is not None and config.feature_targets:
        _require_feature_settings(config)
        if config.features.reduce != "none":
            raise InputError(
                f"features.reduce={config.features.reduce} needs the statistics of a feature "
                f"cache, which an online teacher has not: precompute its features, or choose none"
            )
    if config.loss.kind != "none" and config.teacher is None and config.cache is None:
        raise InputError(
            f"loss.kind={config.loss.kind} needs --teacher SPEC or --cache DIR, or --loss.kind none"
        )


def _require_teacher_files(config: RunConfig) -> None:
    if config.teacher is None:
        return
    require_teacher(config.teacher)
    if config.teacher_classes is not None and not os.path.exists(config.teacher_classes):
        near = nearest_path(config.teacher_classes)
        raise InputError(f"teacher_classes: file {config.teacher_classes} does not exist{near}")


def require_run(path: str | Path) -> None:
    """
    Raises:
        InputError: there is no folder of a run.
    """
    if not os.path.isdir(path):
        if os.path.exists(path):
            raise InputError(f"{path} is a file: name the folder of the run")
        if (url := _as_url(path)) is not None:
            here = _folder_of_run(url)
            remedy = (
                f"name {here}, where it was trained" if here.is_dir()
                else f"copy it to a folder, such as by `aws s3 cp --recursive {url} DIR`"
            )  # fmt: skip
            raise InputError(f"run {url} is a URL, and here a folder is needed: {remedy}")
        raise InputError(f"run folder {path} does not exist{nearest_path(path)}")
    if os.path.lexists(Path(path, "config.json")):
        return
    runs = [name for name in _folders(path) if os.path.exists(Path(path, name, "config.json"))]
    hint = f"; it holds runs: name one of them, such as {Path(path, runs[0])}" if runs else ""
    raise InputError(f"{path} is not the folder of a run: {path}/config.json does not exist{hint}")


def _as_url(path: str | Path) -> str | None:
    """The URL that was given, which has lost a slash where it became a `Path`; None: it is none."""
    scheme, mark, rest = str(path).partition(":/")
    url = f"{scheme}://{rest.strip('/')}"
    return require_plain(url) if mark and scheme in SCHEMES else None


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def require_images(data: DataConfig, splits: Iterable[str]) -> None:
    """The folders of a configuration's images; what is in the class folders is not looked at.

    Raises:
        InputError: as ``require_image_folder`` and ``require_classes``, or data.root is not set.
    """
    if data.source == "synthetic":
        return
    if data.root is None:
        raise InputError(
            "data.root is not set; expected a folder with train/<class>/<image> and "
            "val/<class>/<image>, or with shards (data.source)"
        )
    if is_url(data.root):
        require_plain(data.root)
        if data.source not in ("tar", "packed"):
            raise InputError(
                f"data.root={shown(data.root)} is a URL, where data.source must be tar or packed, "
                f"not {data.source}: a folder of images must be mounted"
            )
        return
    for split in splits:
        if data.source == "folder":
            names = require_image_folder(data.root, split)
            if split == "train":
                require_classes(os.path.join(data.root, split), names)
        elif not os.path.isdir(data.root):
            raise InputError(
                f"folder {data.root} of data.source={data.source} {_why_no_folder(data.root)}; "
                f"{_expected(data, split)}"
            )
        elif data.source == "hf":
            split_files(data.root, split)


def _expected(data: DataConfig, split: str) -> str:
    """End of a message: what the folder of a split of shards or of the Hub's files holds."""
    root = str(data.root)
    if data.source == "hf":
        return expected_files(root, split)
    names = {"tar": "*.tar", "packed": "manifest.json"}
    return f"expected {os.path.join(root, split, names[data.source])}"


def require_data_root(root: str, split: str) -> None:
    """A folder in place of a run's: of images, or of shards where the split holds no folders.

    Raises:
        InputError: it is no folder; as ``require_image_folder``; as ``split_files``, where it holds
            files of the Hub.
    """
    if is_url(root):
        require_plain(root)
        return
    if not os.path.isdir(root):
        raise InputError(
            f"data_root: folder {root} {_why_no_folder(root)}; expected images, such as "
            f"{os.path.join(root, split, '<class>', '<image>')}"
        )
    if _source_at(root, split) != "folder":
        return
    if holds_tables(root) and not [*_entries(os.path.join(root, split))]:
        split_files(root, split)
    require_image_folder(root, split)


def data_at(data: DataConfig, root: str, split: str) -> DataConfig:
    """Settings of the images below another root, whatever form they have there.

    Raises:
        InputError: the root is a URL, and ``data`` does not say what shards are there.
    """
    if not is_url(root):
        return replace(data, root=root, source=_source_at(root, split))
    if data.source not in ("tar", "packed"):
        raise InputError(
            f"data_root {shown(root)} is a URL, and nothing says which shards are there: name a "
            f"folder"
        )
    return replace(data, root=root)


def _source_at(root: str, split: str) -> Literal["folder", "tar", "packed", "hf"]:
    """`data.source` of what a folder holds."""
    if find_split(root, split) is not None:
        return "hf"
    names = [*_entries(os.path.join(root, split))]
    if "manifest.json" in names:
        return "packed"
    return "tar" if any(name.endswith(".tar") for name in names) else "folder"


def require_image_folder(root: str, split: str) -> list[str]:
    """The names of the class folders of a split, sorted.

    Raises:
        InputError: no root, split or class folder; says what the folder is instead.
    """
    expected = f"expected {os.path.join(root, split, '<class>', '<image>')}"
    if not os.path.isdir(root):
        raise InputError(f"image folder {root} {_why_no_folder(root)}; {expected}")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        instead = _instead_of_split(root, split)
        instead = instead or f"; {expected}"
        raise InputError(f"image folder {root} has no split {split!r}{instead}")
    names = class_folders(folder)
    if not names:
        instead = _instead_of_classes(folder)
        raise InputError(f"{folder} has no class folders{instead}; {expected}")
    return names


def require_classes(folder: str | Path, names: list[str]) -> None:
    """
    Args:
        folder: of the training split.

    Raises:
        InputError: it has one class.
    """
    if len(names) != 1:
        return
    hint, inner = "", os.path.join(folder, names[0])
    if os.path.isdir(inner) and not _has_images(inner) and len(below := _folders(inner)) > 1:
        hint = (
            f"; its folders, such as {below[0]!r} and {below[1]!r}, look like the classes: move "
            f"them up into {folder}"
        )
    raise InputError(f"{folder} has one class, {names[0]!r}: a classifier needs two or more{hint}")


def class_folders(folder: str) -> list[str]:
    """Names of the class folders, sorted.

    Raises:
        InputError: the folder cannot be listed, or holds a link to nothing: a class would be lost.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            for entry in visible:
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise InputError(
                        f"{entry.path} is a link to nothing; mount its target or remove it"
                    )
            return sorted(entry.name for entry in visible if entry.is_dir())
    except OSError as error:
        raise cannot_list(error) from None


def cannot_list(error: OSError) -> InputError:
    return InputError(f"cannot list {error.filename}: {os.strerror(error.errno or 0)}")


_HUB_FILES = ": it holds files of a Hugging Face dataset, which --data.source hf reads"
_OTHER_NAMES = {
    "train": {"train", "training", "trainset", "train_set", "train_images", "trn"},
    "val": {"val", "valid", "validation", "test", "testing", "eval", "dev", "holdout", "held-out"},
}


def _instead_of_split(root: str, split: str) -> str:
    """What a folder without the split seems to be, and what to name or to do."""
    if find_split(root, split) is not None:
        return _HUB_FILES
    parent = os.path.dirname(os.path.normpath(root)) or os.curdir
    above = os.path.dirname(os.path.normpath(parent)) or os.curdir
    name = os.path.basename(os.path.abspath(root)).lower()
    if name in _OTHER_NAMES["train"] | _OTHER_NAMES["val"] and _is_dir(parent, "train"):
        return f": it is a split; did you mean its parent, {parent}?"
    splits = {os.path.join(above, other) for other in ("train", "val")}
    if os.path.normpath(parent) in map(os.path.normpath, splits) and _is_dir(above, "train"):
        return f": it is the folder of one class; did you mean {above}?"
    folders = _folders(root)
    inner = [item for item in folders if _is_dir(root, item, split)]
    if inner:
        return f": its folder {inner[0]!r} has it; did you mean {root}/{inner[0]}?"
    other = [item for item in folders if item.lower() in _OTHER_NAMES.get(split, ())]
    if other:
        return f": rename its folder {other[0]!r}, or link it: `ln -s {other[0]} {root}/{split}`"
    if split == "val" and _is_dir(root, "train"):
        return ": move some images of each class from train/<class> to val/<class>"
    if any(_has_images(os.path.join(root, item)) for item in folders[:20]):
        return (
            f": its folders, such as {folders[0]!r}, look like classes: move most images of each "
            f"to {root}/train/<class>, the others to {root}/val/<class>"
        )
    if _has_images(root):
        return ": it holds images, which need a folder for each class, in train/ and val/"
    return ""


def _instead_of_classes(folder: str) -> str:
    names = list(_entries(folder))
    if tables(folder):
        return _HUB_FILES
    if any(name.endswith(".tar") for name in names):
        return ": it holds tar shards, which --data.source tar reads"
    if "manifest.json" in names:
        return ": it holds packed images, which --data.source packed reads"
    if _has_images(folder):
        return ": it holds images, which need a folder for each class"
    return ""


def _has_images(folder: str) -> bool:
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in _entries(folder))


def _folders(folder: str | Path) -> list[str]:
    names = (name for name in _entries(folder) if not name.startswith("."))
    return sorted(name for name in names if _is_dir(folder, name))


def _entries(folder: str | Path) -> Iterator[str]:
    """The first names in a folder; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in islice(entries, _MOST_LOOKED_AT))
    except OSError:
        return


def _is_dir(*parts: str | Path) -> bool:
    return os.path.isdir(os.path.join(*parts))


def list_images(images: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Paths of files and of the images in folders and their subfolders, in the order given.

    Those of a folder are sorted by directory, then by name. Hidden files and folders are left out,
    and a folder that is met again through a link.

    Raises:
        InputError: a path does not exist, a folder cannot be listed, or there is no image.
    """
    given = [os.fspath(image) for image in images]
    paths: list[str] = []
    for path in given:
        if not os.path.lexists(path):
            raise InputError(f"image {printable(path)} does not exist{nearest_path(path)}")
        paths += _images_in(path) if os.path.isdir(path) else [path]
    if not paths:
        where = f"no image in {', '.join(map(printable, given))}" if given else "no image was given"
        raise InputError(f"{where}; expected {', '.join(IMAGE_SUFFIXES)}")
    return paths


def _images_in(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise cannot_list(error) from None

    met: set[str] = set()
    found = []
    for directory, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(directory)) in met:
            folders.clear()
            continue
        met.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (name for name in names if not name.startswith("."))
        found += [(directory, x) for x in visible if x.lower().endswith(IMAGE_SUFFIXES)]
    return [os.path.join(*pair) for pair in sorted(found)]


# ---------------------------------------------------------------------------------------------
# Weights and teachers
# ---------------------------------------------------------------------------------------------


def weights_path(run: str | os.PathLike[str], weights: WeightsChoice) -> str:
    """The chosen weights file in a run's folder; a file, or FILE#KEY, is itself the one.

    Raises:
        InputError: the folder has no such file; ``weights`` is no choice, or chooses of a file.
    """
    if weights not in WEIGHTS_FILES:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS_FILES)}, not {weights!r}")
    if not os.path.isdir(run):
        if weights != "last":
            raise InputError(
                f"weights={weights} chooses a file of a run's folder, and {printable(run)} is none"
            )
        return os.fspath(run)
    return str(require_weights(run, weights))


def require_teacher(spec: str) -> None:
    """
    Raises:
        InputError: it is no spec of a teacher, or its weights file is none.
    """
    name, mark, weights = spec.partition("@")
    if ":" not in name:
        hint = ""
        if os.path.isfile(spec):
            hint = f": a file needs its model's name before it, timm:NAME@{spec}"
        elif name.replace("_", "").replace(".", "").isalnum() and not os.path.exists(spec):
            hint = f" (did you mean timm:{spec}?)"
        raise InputError(
            f"teacher {spec!r} is neither timm:NAME[@FILE] nor package.module:factory[@FILE]{hint}"
        )
    if mark and not weights:
        raise InputError(f"teacher {spec!r} names no file after @: write timm:NAME@FILE")
    if weights:
        require_weights_file(weights)


def why_download(spec: str) -> str:
    """Why a teacher would come over a network, and what to do instead; empty where it would not."""
    if not spec.startswith("timm:") or "@" in spec:
        return ""
    return (
        f"teacher {spec} names no weights file, so timm would download one: give --teacher "
        f"{spec}@FILE, or --download"
    )


def fine_tune_command(name: str, weights: str, root: str | None = None) -> str:
    """What fits a teacher to other classes: `fine-tune it first: COMMAND`.

    Args:
        name: the teacher's spec without its weights file.
        weights: that file, or empty.
        root: the images.
    """
    start = weights or (name if name.startswith("timm:") else "FILE")
    return (
        f"fine-tune it first: deit-fast train --recipe finetune_teacher --data.root "
        f"{root or 'DIR'} --model.name {name.removeprefix('timm:')} --model.weights {start}"
    )


def require_weights_file(path: str | Path) -> None:
    """Look at the first bytes of a weights file.

    Args:
        path: FILE or FILE#KEY.

    Raises:
        InputError: there is no such file, or it cannot hold weights; says what it is.
        OSError: names the path.
    """
    file, _ = split_key(path)
    where = f"weights file {printable(file)}"
    if os.path.isdir(file):
        inner = file / MODEL_FILE
        hint = f"; did you mean {printable(inner)}?" if inner.exists() else ""
        raise InputError(f"{where} is a folder, not a file{hint}")
    try:
        with open_regular(file) as opened:
            first = opened.read(512)
            is_archive = zipfile.is_zipfile(opened)
    except FileNotFoundError:
        if (url := _as_url(file)) is not None:
            raise InputError(f"weights {url} are at a URL: copy them to a file first") from None
        near = nearest_path(file)
        raise InputError(f"weights file {printable(path)} does not exist{near}") from None
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not first:
        raise InputError(f"{where} is empty: download it again")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{where} is a pointer of git-lfs, not the weights: run `git lfs pull` in its "
            f"repository, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise InputError(
            f"{where} is a web page, not weights: download the file that the page links to, for "
            f"example with `curl -L`"
        )
    if text.startswith((b'{"', b"{'")) or text in (b"{}", b"{"):
        raise InputError(f"{where} is JSON text, not weights: download the weights file itself")
    if all(byte in _TEXT_BYTES for byte in first):
        raise InputError(f"{where} is a text file, not weights")
    is_torch, is_safetensors = first.startswith(b"PK\x03\x04"), first[8:9] == b"{"
    if file.suffix == ".safetensors" and is_torch:
        raise InputError(f"{where} is a checkpoint of torch.save: rename it to {file.stem}.pth")
    if file.suffix in (".pth", ".pt", ".bin", ".ckpt") and is_safetensors:
        raise InputError(f"{where} is a safetensors file: rename it to {file.stem}.safetensors")
    if is_torch and not is_archive:
        raise InputError(f"{where} is cut off: its end is missing; download it again")


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------


def nearest_path(path: str | Path) -> str:
    """End of a message about a path that does not exist: the most similar name beside it."""
    folder, name = os.path.split(os.path.normpath(path))
    near = did_you_mean(name, _entries(folder or os.curdir), f"{folder}/" if folder else "")
    return printable(near)


def _why_no_folder(path: str) -> str:
    if os.path.exists(path):
        return "is a file, not a folder"
    return f"does not exist{nearest_path(path)}"
