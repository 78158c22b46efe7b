"""The networks of teachers: timm's and factories', with the weights of a file."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn

from deit_fast.errors import InputError
from deit_fast.inputs import fine_tune_command
from deit_fast.models.names import build_from_factory, is_timm_transformer
from deit_fast.models.pretrained import load_pretrained, require_timm_name
from deit_fast.models.weights import adapt_names, fit_weights, load_weights
from deit_fast.models.weights_facts import ModelFacts, class_names, read_facts
from deit_fast.models.wide_students import make_wide

log = logging.getLogger("deit_fast")


def build_timm_network(
    name: str, weights: str, needs_head: bool = True
) -> tuple[nn.Module, ModelFacts | None]:
    """
    Args:
        weights: file, or empty: timm's pretrained weights.
        needs_head: without it the file may be that of a feature extractor, which has no classes.

    Raises:
        InputError: the file is of another model, has no head, or as ``load_pretrained``.
    """
    if not weights:
        return load_pretrained(name, "teacher", f"pass a file as timm:{name}@FILE"), None
    require_timm_name(name, "teacher")
    state = load_weights(weights)
    facts = read_facts(weights)
    head = timm.get_pretrained_cfg_value(name, "classifier") or "head"
    head = head[0] if isinstance(head, (tuple, list)) else head
    if facts is not None and facts.is_timm and _architecture(facts.name) != _architecture(name):
        raise InputError(
            f"weights file {weights} is of the model {facts.name}, the teacher names {name}: "
            f"name it timm:{facts.name}@{weights}"
        )
    named = state
    if f"{head}.weight" not in state:  # it may be there under another name or behind a prefix
        with torch.device("meta"):
            named, _ = adapt_names(timm.create_model(name), state, weights)
    has_head = f"{head}.weight" in named
    if needs_head and not has_head:
        raise InputError(
            f"weights file {weights} lacks {head}.weight, the classifier of {name}: without it "
            f"there are no logits, but features, such as --targets pooled"
        )
    classes = named[f"{head}.weight"].shape[0] if has_head else 0
    arguments: dict[str, Any] = {"num_classes": classes}
    if facts is not None and facts.is_timm and is_timm_transformer(name):
        arguments |= {"img_size": facts.image_size, **facts.arguments()}
    model = timm.create_model(name, **arguments)
    if facts is not None and facts.wide is not None:
        make_wide(name, model, facts.head, facts.wide)
    _say_other_name(f"timm:{name}", facts, is_same=facts is not None and facts.is_timm)
    _say_dtypes(f"timm:{name}", state.values())
    fit_weights(model, state, weights)
    return model, facts


def build_factory_network(
    name: str, weights: str, num_classes: int | None
) -> tuple[nn.Module, ModelFacts | None]:
    if not weights:
        log.info(
            "teacher %s: its weights are those that the factory made; %s@FILE loads others",
            name, name,
        )  # fmt: skip
        return in_float32(build_from_factory(name, num_classes), name), None
    state = load_weights(weights)
    facts = read_facts(weights)
    classes = class_names(weights) if facts is None else facts.classes
    model = in_float32(build_from_factory(name, len(classes) if classes else num_classes), name)
    _say_other_name(name, facts, is_same=facts is not None and facts.name == name)
    _say_dtypes(name, state.values())
    other_count = (
        f": if it has other classes than the data, {fine_tune_command(name, weights)}; or name its "
        f"outputs by --teacher-classes FILE, a line for each"
    )
    fit_weights(model, state, weights, of_other_count=other_count)
    return model, facts


def _architecture(name: str) -> str:
    """A timm model's name without the tag of its pretrained weights."""
    return name.partition(".")[0]


def _say_other_name(name: str, facts: ModelFacts | None, is_same: bool) -> None:
    if facts is not None and not is_same:
        log.warning("teacher %s: its weights file is of the model %s", name, facts.name)


def _say_dtypes(name: str, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether there are floating-point tensors of another dtype than float32; says which."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    others = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    if others:
        log.info("teacher %s: its %s weights are used as float32", name, ", ".join(others))
    return bool(others)


def in_float32(model: nn.Module, name: str) -> nn.Module:
    """The network with float32 weights: a CPU lacks operations in half precision, and autocast
    leaves float64 as it is."""
    return model.float() if _say_dtypes(name, [*model.parameters(), *model.buffers()]) else model
