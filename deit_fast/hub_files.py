"""The files of a split in a folder of a Hugging Face dataset; imports neither torch nor pyarrow.

    ROOT/data/train-00000-of-00002.parquet    as the Hub lays a data set out, or in ROOT itself
    ROOT/train/*.parquet                      a folder for each split, also of .arrow files
    ROOT/train/data-00000-of-00002.arrow      `DatasetDict.save_to_disk(ROOT)`

The held-out split is the first of `val`, `validation`, `valid`, `dev` and `test` that is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from deit_fast.errors import InputError

SUFFIXES = (".parquet", ".arrow")
_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev", "test")}
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)")
_SELECTION = "indices.arrow"
_CACHES = ("cache-", "tmp")  # `Dataset.map` leaves these beside the data


def split_files(root: str, split: str) -> tuple[str, list[str]]:
    """The folder that holds a split and the names of its files there, sorted.

    Args:
        split: "train" or "val".

    Raises:
        InputError: there are none; files of both kinds; a numbered file is missing; only some rows
            of the files are meant.
    """
    found = find_split(root, split)
    if found is None:
        raise InputError(f"{root} has no split {split!r}{_instead(root, split)}")
    folder, names = found
    if _SELECTION in names:
        raise InputError(
            f"{os.path.join(folder, _SELECTION)} selects rows of the files beside it, as early "
            f"versions of the package datasets wrote: load the data set and write it again by "
            f"`save_to_disk` of a current version, which stores those rows alone"
        )
    if len({os.path.splitext(name)[1] for name in names}) > 1:
        raise InputError(
            f"{folder} holds .parquet and .arrow files of one split: its images would count twice; "
            f"move one kind elsewhere"
        )
    _require_all(folder, names)
    return folder, names


def find_split(root: str, split: str) -> tuple[str, list[str]] | None:
    """As ``split_files``, without a look at the names; None where there are none."""
    for name in _NAMES[split]:
        for folder in (root, os.path.join(root, "data")):
            inner = os.path.join(folder, name)
            if files := tables(inner):
                return inner, files
            start = re.compile(rf"{name}(?![a-z0-9])", re.IGNORECASE)  # train-0, not trainer-0
            if files := [file for file in tables(folder) if start.match(file)]:
                return folder, files
    return None


def tables(folder: str) -> list[str]:
    """Names of the .parquet and .arrow files in a folder, sorted; empty where it is none."""
    return [name for name in _entries(folder) if name.endswith(SUFFIXES)
            and not name.startswith((".", *_CACHES))]  # fmt: skip


def holds_tables(root: str) -> bool:
    """Whether a folder looks like that of a Hugging Face dataset."""
    return find_split(root, "train") is not None or find_split(root, "val") is not None


def expected_files(root: str, split: str) -> str:
    """Part of a message: which files a split may have, and how to get those of the Hub."""
    names = " or ".join(f"{name}-*.parquet" for name in _NAMES[split][:2])
    return (
        f"expected {names} in {root} or {os.path.join(root, 'data')}, or a folder of .parquet or "
        f".arrow files of that name; a data set of the Hub is downloaded by `hf download NAME "
        f"--repo-type dataset --local-dir DIR`"
    )


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot list {error.filename}: {error.strerror}") from None


def _require_all(folder: str, names: Iterable[str]) -> None:
    """
    Raises:
        InputError: of files that are numbered `-00000-of-00002` one is missing, or there are those
            of two numberings.
    """
    numbers: dict[str, dict[int, set[int]]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(os.path.splitext(name)[0]):
            totals = numbers.setdefault(match[1], {})
            totals.setdefault(int(match[3]), set()).add(int(match[2]))
    for start, totals in numbers.items():
        if len(totals) > 1:
            shown = " and ".join(f"{start}-*-of-{total:05d}" for total in sorted(totals))
            raise InputError(f"{folder} holds files of two data sets, {shown}: remove those of one")
        (total, present), *_ = totals.items()
        missing = next((n for n in range(len(present) + 1) if n not in present), total)
        if missing < total:
            raise InputError(
                f"{folder} is not complete: {start}-{missing:05d}-of-{total:05d} is missing; "
                f"download or write the data set again"
            )


def _instead(root: str, split: str) -> str:
    """End of a message: where the split seems to be, or what is expected."""
    inner = [name for name in _entries(root)[:200] if find_split(os.path.join(root, name), split)]
    if inner:
        return f": its folder {inner[0]!r} has it; did you mean {os.path.join(root, inner[0])}?"
    return f": {expected_files(root, split)}"
