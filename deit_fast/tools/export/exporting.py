"""Export a student: write it, load it with the other program, compare, then give it its name."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from deit_fast.errors import CheckFailed, InputError, first_line, is_out_of_memory, printable
from deit_fast.models.fuse import unfuse
from deit_fast.prediction import PathLike, Student, load_student, weights_path
from deit_fast.runtime.environment import describe_environment
from deit_fast.runtime.files import require_writable, sync_folder, write_atomically
from deit_fast.runtime.weights_header import MODEL_FILE, WeightsChoice, split_key
from deit_fast.tools.export.formats import (
    ONNX_PACKAGES,
    Classifier,
    require_packages,
    timm_arguments,
    write_onnx,
    write_timm,
    write_torch,
)
from deit_fast.tools.export.hub_folder import write_hub_folder
from deit_fast.tools.export.parity import Parity, compare, sample_images
from deit_fast.tools.run_folder import folder_of

log = logging.getLogger("deit_fast")

ExportFormat = Literal["timm", "onnx", "torch", "hf"]
_SUFFIXES = {"timm": ".safetensors", "onnx": ".onnx", "torch": ".pt2", "hf": "-hf"}
FIGURES = "export.json"  # in the folder of format hf; beside the file of the others


@dataclass(frozen=True)
class ExportResult:
    """An exported student.

    Attributes:
        path: the file, or the folder of format hf.
        figures: JSON file with the comparison, versions and facts about the model.
        parity: how far its logits are from those of the run's model.
        load: Python that loads it.
    """

    path: Path
    figures: Path
    parity: Parity
    load: str


def export(
    run: PathLike,
    *,
    format: ExportFormat,
    output: PathLike | None = None,
    weights: WeightsChoice = "last",
    model: str | None = None,
    license: str | None = None,
) -> ExportResult:
    """Write a student in a format of another program, and compare the logits of both.

    The exported model has one input, normalised images float32 [B, 3, S, S] with any B, and one
    output, logits float32 [B, C]: the mean of both heads, or those of the one that was trained.
    It computes in float32. What is at ``output`` already is never replaced.

    Args:
        run: folder of a run, or a weights file that `train` wrote.
        format: `timm`: a state dict as safetensors. `onnx`: an ONNX file with the weights inside.
            `torch`: a program of torch.export. `hf`: a folder with model card that timm and the
            Hugging Face Hub read; nothing is uploaded.
        output: path to write; None: in RUN/export/.
        weights: which weights of a run's folder: `last`, their moving average `ema`, or `best`.
        model: the model, where it is ``package.module:factory``.
        license: for the model card of `hf`, such as `mit`; None: the card says that none was given.

    Raises:
        InputError: as ``load_student``; an output is there already; a package is missing; or the
            format cannot hold this student.
        CheckFailed: the exported logits differ from those of the run's model. Nothing is written.
    """
    if format not in get_args(ExportFormat):
        choices = ", ".join(get_args(ExportFormat))
        raise InputError(f"format must be one of {choices}, not {format!r}")
    if license is not None and format != "hf":
        raise InputError(f"--license is for the model card of --format hf, not of {format}")
    if format == "onnx":
        require_packages()
    source = split_key(weights_path(run, weights))[0]
    target = Path(output) if output is not None else _default_output(source, format)
    figures = target / FIGURES if format == "hf" else target.with_name(f"{target.name}.json")
    _require_suffix(target, format)
    for path in (target, figures):
        _require_absent(path)
    require_writable("--output", target, is_folder=format == "hf")

    student = load_student(run, weights=weights, device="cpu", model=model)
    facts = student.facts
    if format in ("timm", "hf") and not (facts.is_timm and facts.wide is None):
        kind = f"{facts.name} with model.head={facts.head}" if facts.wide else facts.name
        raise InputError(
            f"--format {format} holds models of timm, and this is {kind}: choose --format onnx or "
            f"torch"
        )
    images, pixels = sample_images(student)
    log.info("writing %s; its logits are compared on %s", target, pixels)
    expected = _reference(student, images)
    nearest = next(folder for folder in target.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=nearest) as scratch:
        made = Path(scratch, target.name)
        exported = _write(student, format, made, license)
        parity = compare(f"the student as {format}", expected, exported, images, pixels)
        result = ExportResult(target, figures, parity, _how_to_load(student, format, str(target)))
        own = made / FIGURES if format == "hf" else Path(scratch, figures.name)
        content = json.dumps(_figures(student, format, parity, target.name), indent=2) + "\n"
        write_atomically(own, content.encode())
        target.parent.mkdir(parents=True, exist_ok=True)
        _publish(made, target)
        if format != "hf":
            _publish(own, figures)
    return result


def _default_output(weights: Path, format: str) -> Path:
    name = "student" if weights.name == MODEL_FILE else f"student-{weights.stem}"
    return folder_of(weights) / "export" / f"{name}{_SUFFIXES[format]}"


def _require_suffix(path: Path, format: str) -> None:
    suffix = _SUFFIXES[format]
    if format != "hf" and path.suffix != suffix:
        raise InputError(
            f"--output {printable(path)}: a file of --format {format} ends in {suffix}, by which "
            f"its readers know it"
        )


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(
            f"{printable(path)} is there already: remove it, or choose another --output"
        )


def _reference(student: Student, images: torch.Tensor) -> torch.Tensor:
    """The run's logits. A residual stream in bfloat16 is one in float32 here and in all formats."""
    expected = student.logits(images)
    if student.facts.residual == "float32":
        return expected
    unfuse(student.model)
    exact = student.logits(images)
    log.info(
        "the run rounds its residual stream to %s, the export does not: logits differ by %.2g from "
        "the run's for that reason", student.facts.residual, (exact - expected).abs().max(),
    )  # fmt: skip
    return exact


def _write(student: Student, format: str, path: Path, license: str | None) -> Classifier:
    """
    Raises:
        InputError: the exporter of ONNX or of torch refuses the model.
    """
    if format == "timm":
        return write_timm(student, path)
    if format == "hf":
        path.mkdir()
        return write_hub_folder(student, path, license)
    try:
        return write_onnx(student, path) if format == "onnx" else write_torch(student, path)
    except (InputError, CheckFailed, OSError):
        raise
    except Exception as error:  # whatever operations of a factory's model do to the exporters
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"model {student.facts.name!r} cannot be written as {format}: "
            f"{first_line(error, with_type=True)}"
        ) from error


def _publish(made: Path, path: Path) -> None:
    """Give a complete file or folder its name, unless something has it."""
    try:
        if made.is_dir():
            made.rename(path)
        else:
            os.link(made, path)
    except OSError as error:
        _require_absent(path)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


def _how_to_load(student: Student, format: str, name: str) -> str:
    if format == "hf":
        return f"timm.create_model({f'local-dir:{name}'!r}, pretrained=True)"
    if format == "torch":
        return f"torch.export.load({name!r}).module()"
    if format == "onnx":
        return f"onnxruntime.InferenceSession({name!r})"
    arguments = {"checkpoint_path": name, **timm_arguments(student.facts)}
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({student.facts.name!r}, {given})"


def _figures(student: Student, format: str, parity: Parity, name: str) -> dict[str, Any]:
    """What export.json says. It is made to be given away: no folder of this machine is in it."""
    versions = describe_environment(student.device)
    if format == "onnx":
        versions |= {name: version(name) for name in ONNX_PACKAGES}
    return {
        "format": format,
        "weights": student.path.name,
        "model": dataclasses.asdict(student.facts),
        "parity": dataclasses.asdict(parity),
        "load": _how_to_load(student, format, name),
        "environment": versions,
    }
