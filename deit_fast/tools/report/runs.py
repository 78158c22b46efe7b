"""What a report reads of a run folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit_fast.errors import InputError
from deit_fast.tools.analysis.place import FILE_NAME, FOLDER, FORMAT

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: bytes | None
    analysis: dict[str, Any]  # empty where `deit-fast analyze` has not run
    strips: dict[str, bytes]  # its attention pictures, PNG by file name


def short_names(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.absolute().parts for path in runs]
    longest = max(len(p) for p in parts)
    for depth in range(1, longest + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in runs]


def read_run(path: Path, name: str) -> Run:
    """Read a run folder.

    Raises:
        InputError: the folder or a file of it is missing or damaged; names it.
    """
    if not path.is_dir():
        raise InputError(f"run folder {path} does not exist")
    rows = _read_rows(path / "metrics.jsonl")
    samples = path / "samples.png"
    analysis = _read_analysis(path / FOLDER / FILE_NAME)
    return Run(
        name=name,
        config=_read_object(path / "config.json"),
        result=_read_object(path / "result.json"),
        train=[row for row in rows if row.get("kind") == "train"],
        evaluations=[row for row in rows if row.get("kind") == "eval"],
        samples=_read_png(samples) if samples.exists() else None,
        analysis=analysis,
        strips=_read_strips(path / FOLDER, analysis),
    )


def _read_analysis(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    analysis = _read_object(path)
    if analysis.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {analysis.get('format')!r}, this version reads {FORMAT}: "
            f"run `deit-fast analyze` again"
        )
    return analysis


def _read_strips(folder: Path, analysis: dict[str, Any]) -> dict[str, bytes]:
    names = [row.get("picture") for row in objects(group(analysis, "attention"), "samples")]
    # by its last part alone: a name leads nowhere else
    return {name: _read_png(folder / Path(name).name) for name in names if isinstance(name, str)}


def _read_png(path: Path) -> bytes:
    try:
        image = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} does not exist") from None
    if not image.startswith(PNG_SIGNATURE):
        raise InputError(f"{path} is damaged: not a PNG image")
    return image


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        unfinished = ": the run has not finished" if path.name == "result.json" else ""
        raise InputError(f"{path} does not exist{unfinished}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: not UTF-8 text") from None


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(_read_text(path), str(path))


def _parse_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{place} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place} is damaged: not a JSON object")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line without its line feed was torn by a crash and is left out."""
    text = _read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_parse_object(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line]


def number(values: dict[str, Any], key: str) -> float | None:
    """A finite number, or None."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def group(values: dict[str, Any], key: str) -> dict[str, Any]:
    """An object, or an empty one."""
    group = values.get(key)
    return group if isinstance(group, dict) else {}


def objects(values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a list; empty where there is no list."""
    found = values.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
