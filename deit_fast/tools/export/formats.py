"""A student as a file of timm, ONNX or torch.export.

Each function writes one file, loads it again with the program that it is for, and returns what that
gives.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import timm
import torch
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.models.fuse import unfuse
from deit_fast.models.names import is_timm_transformer
from deit_fast.models.student import trained_head
from deit_fast.models.weights import digest_state, save_weights
from deit_fast.models.weights_facts import FACTS_KEY, ModelFacts
from deit_fast.runtime.environment import package_version
from deit_fast.runtime.files import write_atomically
from deit_fast.runtime.weights_header import DIGEST_KEY

if TYPE_CHECKING:
    from deit_fast.prediction import Student

Classifier: TypeAlias = "Callable[[Tensor], Tensor]"
"""Logits, float32 [B, C], of normalised images, float32 [B, 3, S, S]; both on the CPU."""

INPUT, OUTPUT, BATCH_AXIS = "images", "logits", "batch"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_BYTES = 2**31 - 2**24  # protobuf's limit, less what the graph takes


def require_packages() -> None:
    """
    Raises:
        InputError: a package that writes or runs ONNX is missing.
    """
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(
                f"--format onnx needs the package {name}: pip install 'deit-fast[onnx]'"
            ) from None


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


def timm_arguments(facts: ModelFacts) -> dict[str, Any]:
    """With which ``timm.create_model(facts.name, ...)`` builds the student's network."""
    arguments: dict[str, Any] = {"num_classes": len(facts.classes)}
    if is_timm_transformer(facts.name):
        arguments |= {"img_size": facts.image_size, **facts.arguments()}
    return arguments


def timm_state(student: Student) -> dict[str, Tensor]:
    """Weights for timm's network, under its names.

    timm's network returns the mean of both heads. Where only one was trained, its weights are
    doubled and those of the other are zero, so that the mean is exactly the trained head's logits.
    """
    state = {name: value.contiguous() for name, value in student.model.state_dict().items()}
    head = trained_head(student.model)
    if head != "both":
        for part in ("weight", "bias"):
            used, other = f"head.{part}", f"head_dist.{part}"
            used, other = (used, other) if head == "class" else (other, used)
            state[used], state[other] = 2 * state[used], torch.zeros_like(state[other])
    return state


def deployed(student: Student) -> nn.Module:
    """A network of one input and one output, on the CPU: timm's own, or that of the factory."""
    if not student.facts.is_timm:
        return student.model
    if student.facts.wide is not None:
        return unfuse(copy.deepcopy(student.model))
    network = timm.create_model(student.facts.name, **timm_arguments(student.facts))
    network.load_state_dict(timm_state(student))
    return network.eval()


def texts(student: Student, state: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of the exported weights, from which this package loads them too.

    Names of the run's images and of its files are not among them.
    """
    return {
        "format": "pt",
        FACTS_KEY: json.dumps(dataclasses.asdict(student.facts)),
        "identity": json.dumps({"data.classes": student.classes}),
        DIGEST_KEY: digest_state(state),
    }


# ---------------------------------------------------------------------------------------------
# The formats
# ---------------------------------------------------------------------------------------------


def write_timm(student: Student, path: Path) -> Classifier:
    """A state dict under timm's names, as safetensors."""
    state = timm_state(student)
    save_weights(path, state, texts(student, state))
    return timm.create_model(
        student.facts.name, checkpoint_path=str(path), **timm_arguments(student.facts)
    ).eval()


def write_onnx(student: Student, path: Path) -> Classifier:
    """One file with the weights inside.

    Raises:
        InputError: the weights exceed what such a file can hold.
    """
    import onnx
    import onnxruntime

    network = deployed(student)
    size = sum(value.nbytes for value in network.state_dict().values())
    if size > ONNX_BYTES:
        raise InputError(
            f"an ONNX file holds 2 GB, the student's weights have {size / 2**30:.1f} GiB: choose "
            f"--format torch"
        )
    program = torch.onnx.export(
        network, _example(student), dynamo=True, dynamic_shapes=({0: BATCH_AXIS},),
        input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # the exporter writes paths of this machine there
        del node.metadata_props[:]
    onnx.helper.set_model_props(model, _properties(student))
    write_atomically(path, model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


def write_torch(student: Student, path: Path) -> Classifier:
    """A program of torch.export, which needs torch and neither timm nor this package."""
    batch = {0: torch.export.Dim(BATCH_AXIS)}
    program = torch.export.export(deployed(student), _example(student), dynamic_shapes=(batch,))
    for node in program.graph.nodes:  # it holds paths of this machine
        node.meta.pop("stack_trace", None)
    content = io.BytesIO()
    properties = json.dumps(_properties(student))
    torch.export.save(program, content, extra_files={"deit_fast.json": properties})
    write_atomically(path, content.getbuffer())
    return torch.export.load(path).module()


def _example(student: Student) -> tuple[Tensor]:
    """Of a batch of 2: torch.export would fix a batch of 1."""
    return (torch.zeros(2, 3, student.image_size, student.image_size),)


def _properties(student: Student) -> dict[str, str]:
    """What a user of the file needs, as texts; lists are JSON."""
    facts = student.facts
    wide = {} if facts.wide is None else {"head": facts.head, "wide": str(facts.wide)}
    return wide | {
        "model": facts.name,
        "image_size": str(facts.image_size),
        "mean": json.dumps(facts.mean),
        "std": json.dumps(facts.std),
        "crop_pct": str(facts.eval_crop),
        "interpolation": "bicubic",
        "classes": json.dumps(facts.classes),
        "deit_fast": package_version("deit-fast") or "",
        "torch": torch.__version__,
    }
