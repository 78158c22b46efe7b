"""What the tools read of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit_fast.errors import InputError
from deit_fast.runtime.files import parse_object, read_json

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANALYSIS_FOLDER, ANALYSIS_FILE, ANALYSIS_FORMAT = "analysis", "analysis.json", 1


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Attributes:
        index: position among the runs that are shown, which decides the colour.
        analysis: empty where `deit-fast analyze` has not run.
        train, evaluations: rows of the log.
        samples: PNG of the first training views.
        maps: PNG files of the analysis that show attention, by name.
    """

    index: int
    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    analysis: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: bytes | None
    maps: dict[str, bytes]


def short_names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish the runs."""
    parts = [path.absolute().parts for path in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in runs]


def read_run(path: Path, name: str, index: int) -> Run:
    """Read a run folder.

    Raises:
        InputError: the folder or one of its files is missing or damaged; names it.
    """
    if not path.is_dir():
        raise InputError(f"run folder {path} does not exist")
    rows = _read_rows(path / "metrics.jsonl")
    samples, folder = path / "samples.png", path / ANALYSIS_FOLDER
    analysis = _read_analysis(folder / ANALYSIS_FILE)
    pictures = [row["picture"] for row in analysis.get("attention", {}).get("samples", [])]
    return Run(
        index=index,
        name=name,
        config=read_object(path / "config.json"),
        result=read_object(path / "result.json"),
        analysis=analysis,
        train=[row for row in rows if row.get("kind") == "train"],
        evaluations=[row for row in rows if row.get("kind") == "eval"],
        samples=_read_png(samples) if samples.exists() else None,
        # only the last part of a name, so that no name leads out of the folder
        maps={name: _read_png(folder / Path(name).name) for name in pictures},
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: the file is missing or damaged, or holds something else.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist{_unfinished(path)}") from None


def _read_analysis(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    analysis = read_object(path)
    if analysis.get("format") != ANALYSIS_FORMAT:
        raise InputError(
            f"{path} has format {analysis.get('format')!r}, this version reads {ANALYSIS_FORMAT}: "
            f"run `deit-fast analyze` again"
        )
    return analysis


def _read_png(path: Path) -> bytes:
    try:
        image = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} does not exist") from None
    if not image.startswith(PNG_SIGNATURE):
        raise InputError(f"{path} is damaged: not a PNG image")
    return image


def _unfinished(path: Path) -> str:
    return ": the run has not finished" if path.name == "result.json" else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist{_unfinished(path)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: not UTF-8 text") from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line without a line feed was cut off by a crash and is ignored."""
    content = _read_text(path).encode()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [parse_object(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line]
