"""A result file: what it holds, how it is written, what the committed predictions say of its rows.

    {"meta": {device, driver, versions, commit, date, command},
     "rows": [{"bench", "case", "impl", "ms", ...}],
     "stages": [...], "tests": {...}}          # only of `python -m bench gpu` and `gpu-profile`

One row describes one implementation of one case. A row that was not measured has "skipped" with the
reason and no "ms". A row of a case that is still being measured has "provisional": true; a later
row with the same bench, case and implementation replaces it. "predicted" is the range in ms that
predictions.json gives for the row on this device.

The file has one line for each row. Every write replaces the file as a whole, so a process that is
killed leaves the previous version.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
DRIVER_FILE = Path("/proc/driver/nvidia/version")
PREDICTIONS = HERE / "predictions.json"
META = ("device", "driver", "versions", "commit", "date", "command")
PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy", "pillow", "liger-kernel")
NO_TIME = "no time left, give --seconds more"
SOURCES = ("bench", "csrc", "deit_fast", "kernels", "tests")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".json"}

Row = dict[str, Any]
Content = dict[str, Any]
Key = tuple[str, str, str]


def key_of(row: Row) -> Key:
    return row["bench"], row["case"], row["impl"]


def require_folder(file: Path | None) -> None:
    """
    Raises:
        SystemExit: the folder of a file to be written does not exist.
    """
    if file is not None and not file.parent.is_dir():
        raise SystemExit(f"{file}: there is no such folder")


def folded(summary: str, body: str) -> str:
    """Markdown of which a page shows one line until a reader opens it."""
    return f"<details><summary>{summary}</summary>\n\n{body.strip()}\n\n</details>\n"


def replace_between(page: Path, marks: tuple[str, str], body: str) -> None:
    """Replace the lines between two marks of a page.

    Raises:
        ValueError: the page lacks the marks.
    """
    before, _, rest = page.read_text().partition(marks[0])
    _, found, after = rest.partition(marks[1])
    if not found:
        raise ValueError(f"{page} has no lines {marks[0]} and {marks[1]}")
    page.write_text(f"{before}{marks[0]}\n{body}\n{marks[1]}{after}")


# ---------------------------------------------------------------------------------------------
# Meta: what a figure depends on
# ---------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """First line that a command prints; empty where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True, cwd=HERE
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def find_tool(name: str) -> str:
    """Path of an NVIDIA tool, on PATH or in its usual folders; empty if it is not there."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [f"{home}/bin", *map(str, Path("/opt/nvidia").glob("nsight-compute/*"))]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or ""


def cpu_name() -> str:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def driver_version() -> str:
    """Version of NVIDIA's driver; if nothing names it, the CUDA version that it supports."""
    if version := output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        return version
    with suppress(OSError):
        if found := re.search(r" (\d+\.[\d.]+) ", DRIVER_FILE.read_text()):
            return found[1]
    supported = ctypes.c_int()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    major, minor = divmod(supported.value // 10, 100)
    return f"CUDA {major}.{minor}" if major else ""


def tree_checksum(root: Path = ROOT) -> str:
    """``tree-`` and 12 digits of SHA-256 over the sources, for a copy of the tree without git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root)
            if path.suffix not in SUFFIXES or "results" in relative.parts or path.is_symlink():
                continue
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{relative.as_posix()} {content}\n".encode())
    return f"tree-{digest.hexdigest()[:12]}"


def collect_meta(device: str, command: str, commit: str | None) -> Row:
    """The meta of a result file.

    Args:
        device: "cpu" or "cuda".
        command: the command line of the run.
        commit: the commit that is measured; None: what git reports, or ``tree_checksum`` where
            there is no git repository.
    """
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = device == "cuda"
    described = output_of("git", "describe", "--always", "--dirty", "--abbrev=9")
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "driver": driver_version() if cuda else f"{platform.system()} {platform.release()}",
        "versions": {name: version for name, version in versions.items() if version},
        "commit": commit or described or tree_checksum(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def default_path(device: str, meta: Row, what: str = "all") -> Path:
    """bench/results/<GPU name or cpu>/<date>-<commit>.json; of a part ...-<what>.json"""
    folder = meta["device"].lower().replace(" ", "-") if device == "cuda" else "cpu"
    part = "" if what == "all" else f"-{what}"
    return HERE / "results" / folder / f"{meta['date']}-{meta['commit']}{part}.json"


# ---------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------


@cache
def predictions() -> Content:
    """{"devices": ["H100", ...], "note", "rows": [{"bench", "case", "impl", "ms", "from"}]}

    ms: device -> [low, high].
    """
    content: Content = json.loads(PREDICTIONS.read_text())
    return content


def predicted_device(device: str) -> str | None:
    """The device of the predictions that this name of a GPU stands for, if one does."""
    words = device.split()
    if "PCIe" in words or "NVL" in words:  # slower cards
        return None
    return next((name for name in predictions()["devices"] if name in words), None)


def predicted(row: Row, device: str) -> list[float] | None:
    """The predicted range in ms; None where there is none for this row or this device."""
    if (name := predicted_device(device)) is None:
        return None
    for entry in predictions()["rows"]:
        if key_of(entry) == key_of(row):
            return list(entry["ms"][name])
    return None


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def require_meta(meta: Row, path: Path) -> None:
    """
    Raises:
        ValueError: a field of ``META`` is missing or empty: a figure without it is worth nothing.
    """
    missing = [name for name in META if not meta.get(name)]
    if missing:
        raise ValueError(f"no result file without meta {', '.join(missing)}: {path} is not written")


def to_text(content: Content) -> str:
    """JSON with one line for each row and each field of the meta: a diff shows what changed.

    Raises:
        ValueError: a number is not finite.
    """

    def lines(value: Any) -> str:
        one_line = partial(json.dumps, allow_nan=False)
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(map(one_line, value)) + "\n ]"
        if isinstance(value, dict) and value:
            fields = [f"{one_line(name)}: {one_line(field)}" for name, field in value.items()]
            return "{\n  " + ",\n  ".join(fields) + "\n }"
        return one_line(value)

    parts = [f" {json.dumps(name)}: {lines(value)}" for name, value in content.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(path: Path, content: Content) -> None:
    """Write the result file, or replace it as a whole.

    Raises:
        ValueError: as ``require_meta``.
    """
    require_meta(content["meta"], path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(to_text(content))
    os.replace(part, path)


def read(path: Path) -> Content:
    """
    Raises:
        ValueError: not a valid result file; the message names the file and the fault.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if faults := find_faults(content):
        raise ValueError(f"{path}: not a result of `python -m bench`: {faults[0]}")
    return content  # type: ignore[no-any-return]


def find_fault(row: Row) -> str:
    """What is wrong with the figures of a row; empty where nothing is."""
    for name, value in row.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not math.isfinite(value):
            return f"{name} is {value}"
        if name in ("ms", "ms_p20", "ms_p80", "ratio") and not (is_number and value > 0):
            return f"{name} is {value}, not a positive number"
    return "" if ("ms" in row) != ("skipped" in row) else "needs either ms or skipped"


def find_faults(content: Any) -> list[str]:
    """What is wrong with the content of a result file, one line each."""
    if not isinstance(content, dict):
        return ["not an object"]
    meta, rows = content.get("meta"), content.get("rows")
    if not isinstance(meta, dict) or not isinstance(rows, list):
        return ["no object 'meta' or no list 'rows'"]
    faults = [f"meta lacks {name}" for name in META if not meta.get(name)]
    seen: set[Key] = set()
    for number, row in enumerate(rows):
        try:
            key = key_of(row)
        except (KeyError, TypeError):
            faults.append(f"row {number} lacks bench, case or impl")
            continue
        if key in seen and "skipped" not in row:
            faults.append(f"row {number} repeats {key}")
        seen.add(key)
        if fault := find_fault(row):
            faults.append(f"row {number}, {key}: {fault}")
    return faults


def _without_fault(row: Row) -> Row:
    fault = find_fault(row)
    if not fault:
        return row
    return dict(zip(("bench", "case", "impl"), key_of(row), strict=True)) | {"skipped": fault}


class ResultFile:
    """A result file that grows row by row; every change is on disk when the call returns."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content

    @classmethod
    def create(cls, path: Path, meta: Row) -> ResultFile:
        """A new file, or an empty one in place of an old one.

        Raises:
            ValueError: as ``require_meta``.
        """
        file = cls(path, {"meta": meta, "rows": []})
        file.save()
        return file

    @classmethod
    def resume(cls, path: Path) -> ResultFile:
        """
        Raises:
            ValueError: as ``read``.
        """
        return cls(path, read(path))

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]  # type: ignore[no-any-return]

    def finished_cases(self) -> set[tuple[str, str]]:
        """(bench, case) of all cases that were measured completely or cannot be measured here."""
        cases = {(row["bench"], row["case"]) for row in self.rows}
        return cases - {
            (row["bench"], row["case"])
            for row in self.rows
            if row.get("provisional") or row.get("skipped") == NO_TIME
        }

    def put(self, rows: Iterable[Row]) -> None:
        """Add the rows of one case, in place of all earlier rows of that case.

        A row with impossible figures is stored as skipped, so that the other rows are kept.
        """
        rows = [self._with_prediction(_without_fault(row)) for row in rows]
        replaced = {(row["bench"], row["case"]) for row in rows}
        kept = [row for row in self.rows if (row["bench"], row["case"]) not in replaced]
        self.content["rows"] = kept + rows
        self.save()

    def _with_prediction(self, row: Row) -> Row:
        expected = predicted(row, self.content["meta"]["device"])
        return row if expected is None else row | {"predicted": expected}

    def save(self) -> None:
        write(self.path, self.content)
