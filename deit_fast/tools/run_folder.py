"""What the tools read of a run folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit_fast.config import LossConfig
from deit_fast.decisions import PREDICTIONS_FILE, PREDICTIONS_FORMAT
from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import parse_object, read_file, read_json
from deit_fast.runtime.metrics import METRICS, read_metrics
from deit_fast.runtime.weights_header import (
    MODEL_FILE,
    WEIGHTS_FILES,
    read_digest,
    read_texts,
)

log = logging.getLogger("deit_fast")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANALYSIS_FOLDER, ANALYSIS_FILE, ANALYSIS_FORMAT = "analysis", "analysis.json", 1


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Attributes:
        index: position among the runs that are shown, which decides the colour.
        analysis: empty where `deit-fast analyze` has not run, or saw other weights.
        predictions: see ``describe_decisions``; empty in runs of earlier versions.
        train, evaluations: rows of the log.
        data_id: tells apart the images, of training and held out, that runs were made with.
        samples: PNG of the first training views.
        maps: PNG files of the analysis that show attention, by name.
    """

    index: int
    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    analysis: dict[str, Any]
    predictions: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    data_id: str
    samples: bytes | None
    maps: dict[str, bytes]


def folder_of(weights: Path) -> Path:
    """The folder of the run that a weights file or a checkpoint is in."""
    folder = weights.parent
    return folder.parent if folder.name == "checkpoints" else folder


def read_run(path: Path, name: str, index: int) -> Run:
    """Read a run folder; in all texts, what a terminal or a page must not get is escaped.

    Raises:
        InputError: the folder or one of its files is missing or damaged, or is of another run;
            names it.
    """
    if not path.is_dir():
        raise InputError(f"run folder {path} does not exist")
    result = read_object(path / "result.json")
    config = read_object(path / "config.json")
    rows = _read_rows(path / METRICS, result.get("metrics"))
    head = _trained_head(config)
    if head != "both" and "top1_distill" in result:
        log.warning(
            "%s is of an earlier version, whose mean has an untrained head: shown are the figures "
            "of the %s head alone", printable(path), head,
        )  # fmt: skip
        result, *rows = [_of_one_head(row, head) for row in (result, *rows)]
    samples, folder = path / "samples.png", path / ANALYSIS_FOLDER
    weights = _read_weights(path, result.get("weights"))
    analysis = _read_analysis(folder / ANALYSIS_FILE, weights, head)
    pictures = [row["picture"] for row in analysis.get("attention", {}).get("samples", [])]
    return Run(
        index=index,
        name=printable(name),
        config=_printable(config),
        result=_printable(result),
        analysis=_printable(analysis),
        predictions=_printable(_read_predictions(path, bool(analysis), weights[MODEL_FILE])),
        train=[_printable(row) for row in rows if row["kind"] == "train"],
        evaluations=[_printable(row) for row in rows if row["kind"] == "eval"],
        data_id=_data_id(path / MODEL_FILE, config, result),
        samples=_read_png(samples) if os.path.lexists(samples) else None,
        # only the last part of a name, so that no name leads out of the folder
        maps={printable(name): _read_png(folder / Path(name).name) for name in pictures},
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


def _read_weights(run: Path, known: object) -> dict[str, str | None]:
    """Digests of the run's weights by file; weights of earlier versions have none.

    Args:
        known: those that result.json names.

    Raises:
        InputError: the folder has other weights.
    """
    weights: dict[str, str | None] = {}
    for name in WEIGHTS_FILES.values():
        path, expected = run / name, known.get(name) if isinstance(known, dict) else None
        found = read_digest(path) if os.path.lexists(path) else expected
        if expected is not None and found != expected:
            raise InputError(
                f"{path} has other weights than the run that wrote {run / 'result.json'}: "
                f"copy both from one run, or remove the weights"
            )
        weights[name] = found
    return weights


def _data_id(weights: Path, config: dict[str, Any], result: dict[str, Any]) -> str:
    """A digest of the fingerprints of both splits, which the weights' header names; where it names
    none, of the data's folder, classes and number of held-out images."""
    facts: list[Any] = []
    if os.path.lexists(weights):
        identity = parse_object(read_texts(weights).get("identity", "{}").encode(), str(weights))
        facts = [identity.get(f"{split}.images") for split in ("data", "val")]
        if None not in facts:
            facts += [identity.get(f"{split}.pixels") for split in ("data", "val")]
    if None in facts[:2] or not facts:
        data = config.get("data")
        folder = (data.get("root"), data.get("source")) if isinstance(data, dict) else None
        facts = [folder, result.get("classes"), result.get("samples")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _trained_head(config: dict[str, Any]) -> str:
    """``LossConfig.trained_head`` of a file that may be of another version, or damaged."""
    loss = config.get("loss")
    known = {key: loss[key] for key in ("kind", "alpha") if key in loss} if loss else {}
    return LossConfig(**known).trained_head


def _of_one_head(row: dict[str, Any], head: str) -> dict[str, Any]:
    """A result or a row of the log without what a head that was not trained has a part in."""
    own = row.get("top1_class" if head == "class" else "top1_distill")
    if own is None:
        return row
    mixed = ("top1_class", "top1_distill", "top5", "loss", "per_class", "ema_top1", "best_top1")
    return {key: value for key, value in row.items() if key not in mixed} | {"top1": own}


def _read_analysis(path: Path, weights: Mapping[str, str | None], head: str) -> dict[str, Any]:
    """Content of analysis.json, empty with a warning where it is of other weights, or where an
    earlier version has analysed a head that was not trained."""
    if not os.path.lexists(path):
        return {}
    analysis = read_object(path)
    if analysis.get("format") != ANALYSIS_FORMAT:
        raise InputError(
            f"{path} has format {analysis.get('format')!r}, this version reads {ANALYSIS_FORMAT}: "
            f"run `deit-fast analyze` again"
        )
    files = {str(choice): name for choice, name in WEIGHTS_FILES.items()}  # earlier: `model`
    found = analysis.get("weights_digest")  # earlier versions do not say
    expected = weights[files.get(str(analysis.get("weights")), MODEL_FILE)]
    if found is not None and expected is not None and found != expected:
        log.warning(
            "%s is left out: it is of other weights; run `deit-fast analyze` again", printable(path)
        )
        return {}
    _rename_means(analysis)
    if head != "both" and "mean_logits" in analysis.get("accuracy", {}):
        log.warning(
            "%s is left out: its means have an untrained head; run `deit-fast analyze` again",
            printable(path),
        )
        return {}
    return analysis


def _read_predictions(run: Path, is_analysed: bool, expected: str | None) -> dict[str, Any]:
    """Content of predictions.json: of the analysis, which knows the teacher's decisions too, where
    that is of the last weights and as many images; else of the run."""
    own = _predictions_of(run / PREDICTIONS_FILE, expected)
    if is_analysed:
        other = _predictions_of(run / ANALYSIS_FOLDER / PREDICTIONS_FILE, expected)
        if other and other.get("images") == own.get("images", other.get("images")):
            return other
    return own


def _predictions_of(path: Path, expected: str | None) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    content = read_object(path)
    if content.get("format") != PREDICTIONS_FORMAT:
        raise InputError(
            f"{path} has format {content.get('format')!r}, this version reads "
            f"{PREDICTIONS_FORMAT}: remove it"
        )
    found = content.get("weights_digest")
    return content if expected is None or found == expected else {}


def _rename_means(analysis: dict[str, Any]) -> None:
    """Earlier versions called the mean of logits, and that of softmaxes, their sum."""
    names = {"sum_logits": "mean_logits", "sum_softmax": "mean_softmax"}
    for part in ("accuracy", "calibration"):
        if isinstance(values := analysis.get(part), dict):
            analysis[part] = {names.get(name, name): value for name, value in values.items()}
    analysis["main"] = names.get(str(analysis.get("main")), analysis.get("main"))


def _read_png(path: Path) -> bytes:
    try:
        image = read_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    if not image.startswith(PNG_SIGNATURE):
        raise InputError(f"{path} is damaged: not a PNG image")
    if not _are_chunks_intact(image):
        raise InputError(f"{path} is damaged: a checksum differs")
    return image


def _are_chunks_intact(image: bytes) -> bool:
    """Whether a PNG has all its chunks: length, type, content and CRC-32 of type and content."""
    start, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if len(image) < start + 12:
            return False
        size, kind = struct.unpack_from(">I4s", image, start)
        end = start + 8 + size
        if image[end : end + 4] != struct.pack(">I", zlib.crc32(image[start + 4 : end])):
            return False
        start = end + 4
    return start == len(image)


def _printable(value: Any) -> Any:
    """A JSON value whose texts, keys too, are printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    return value


def _unfinished(path: Path) -> str:
    if path.name != "result.json":
        return ""
    return ": the run has not finished: run its train command again"


def _read_rows(path: Path, known: object) -> list[dict[str, Any]]:
    """All rows. A finished run knows how many it had; a resumed one may have more."""
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist")
    rows = read_metrics(path, strict=True)
    least = known.get("rows") if isinstance(known, dict) else None
    if isinstance(known, dict) and known.get("lost"):
        lost = printable(known["lost"])
        log.warning("%s lost %s rows while the run wrote it", printable(path), lost)
    if isinstance(least, int) and len(rows) < least:
        raise InputError(f"{path} is damaged: it has {len(rows)} of the run's {least} rows")
    return rows
