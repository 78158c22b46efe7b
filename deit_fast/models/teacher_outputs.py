"""Where the logits are in a teacher's output; a network of others returns more than a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deit_fast.errors import InputError

Place = str | int | None  # key or attribute, index, or None: the output itself


def take_logits(output: Any, place: Place) -> Tensor:
    """The logits in an output, at the place that ``find_logits`` returned."""
    if place is None:
        return output
    if isinstance(place, int) or isinstance(output, Mapping):
        return output[place]
    return getattr(output, place)


def find_logits(output: Any, rows: int, num_classes: int | None) -> Place:
    """The place of the logits in a network's output.

    A tensor is the logits. A dict has them under `logits`, an object (a dataclass, a named tuple,
    a ModelOutput) as its attribute `logits`. Of a tuple or list without it they are the only
    entry that is a float tensor [rows, n]; if several are, the only one with n = ``num_classes``.

    Args:
        rows: number of images.
        num_classes: classes C that the network was asked for or says it has, if any.

    Raises:
        InputError: there is no such entry, or more than one; the message is the end of a sentence.
    """
    if isinstance(output, Tensor):
        return None
    if (isinstance(output, Mapping) and "logits" in output) or hasattr(output, "logits"):
        return "logits"
    if not isinstance(output, (tuple, list)):
        raise InputError(f"its output is {describe(output)} without `logits`; {_REMEDY}")
    fitting = [
        index
        for index, entry in enumerate(output)
        if isinstance(entry, Tensor) and entry.is_floating_point() and entry.dim() == 2
        and len(entry) == rows
    ]  # fmt: skip
    if len(fitting) > 1:
        fitting = [index for index in fitting if output[index].shape[1] == num_classes]
    if len(fitting) != 1:
        raise InputError(f"which part of its output, {describe(output)}, is the logits is not "
                         f"clear; {_REMEDY}")  # fmt: skip
    return fitting[0]


_REMEDY = "return the logits [B, C], or a dict with them as `logits`"


def check_logits(logits: Any, rows: int) -> None:
    """Check the logits of ``rows`` images.

    Raises:
        InputError: they are no finite floats [rows, C]; the message is the end of a sentence.
    """
    if isinstance(logits, Tensor) and (
        logits.dim() != 2 or len(logits) != rows or not logits.numel()
    ):
        raise InputError(
            f"its logits of {rows} images have the shape {tuple(logits.shape)}, not ({rows}, C)"
        )
    require_floats("logits", logits)
    if not bool(torch.isfinite(logits).all()):
        raise InputError("its logits of noise are not finite")


def require_floats(name: str, value: Any) -> None:
    """
    Raises:
        InputError: it is no tensor of floats; the message is the end of a sentence.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"its {name} must be a tensor, not {describe(value)}")
    if not value.is_floating_point():
        raise InputError(
            f"its {name} must be floats, not {str(value.dtype).removeprefix('torch.')}"
        )


def require_equal_logits(logits: Tensor, expected: Tensor) -> None:
    """Check the logits of a pass that also gives features against those of the network as called.

    Raises:
        InputError: they differ by more than another algorithm of a GPU explains; the message is the
            end of a sentence.
    """
    largest = float((logits.float() - expected.float()).abs().max())
    if not largest <= 0.02 * float(expected.float().abs().max()):
        raise InputError(
            "its forward is not forward_head(forward_features(images)), so one pass cannot give "
            "its logits and features: ask for either"
        )


def are_probabilities(logits: Tensor) -> bool:
    """Whether the rows look like the result of a softmax."""
    rows = logits.double()
    sums_to_one = (rows.sum(1) - 1).abs().max() < 1e-2
    return rows.shape[1] > 1 and bool((rows >= 0).all() & sums_to_one)


def describe(value: Any) -> str:
    """What a network returned, for a message."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, list(value)[:8])) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(describe, value[:8])) or 'nothing'}"
    return f"a {type(value).__name__}"
