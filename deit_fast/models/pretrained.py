"""timm's pretrained weights, from its hub or from the hub's cache on this machine."""

from __future__ import annotations

import timm
from torch import nn

from deit_fast.errors import InputError, did_you_mean, first_line

PREFIX = "timm:"


def pretrained_name(spec: object) -> str | None:
    """NAME of `timm:NAME`; None for everything else, such as a file."""
    text = str(spec)
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def require_timm_name(name: str, whose: str) -> None:
    """
    Args:
        name: of a timm model, with or without the tag of its weights: NAME.TAG.
        whose: start of the message, such as `teacher`.

    Raises:
        InputError: timm has no such model.
    """
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        hint = did_you_mean(name, timm.list_models(), PREFIX)
        raise InputError(f"unknown {whose} '{PREFIX}{name}'{hint}")


def load_pretrained(name: str, whose: str, remedy: str) -> nn.Module:
    """A timm model with timm's weights, which are downloaded where the hub's cache lacks them.

    Args:
        name, whose: as of ``require_timm_name``.
        remedy: end of the message where there are no such weights.

    Raises:
        InputError: timm has no such model, or its weights cannot be had.
    """
    require_timm_name(name, whose)
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(
            f"{whose} '{PREFIX}{name}': no pretrained weights ({reason}); {remedy}"
        ) from None
