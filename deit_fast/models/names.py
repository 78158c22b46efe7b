"""Networks by name: timm's, and those of factories."""

from __future__ import annotations

import importlib
import inspect

import timm
from torch import nn

from deit_fast.errors import InputError, first_line, is_out_of_memory


def is_timm_transformer(name: str) -> bool:
    """Whether a name is that of a timm transformer, which takes `img_size` and `args`."""
    return ":" not in name and timm.models.is_model_in_modules(name, ("deit", "vision_transformer"))


def build_from_factory(spec: str, num_classes: int | None) -> nn.Module:
    """The model that ``package.module:factory`` returns.

    The factory gets ``num_classes`` by name if it has a parameter of that name or takes any, else
    by position if it has exactly one parameter without a default, else it is called with nothing.

    Raises:
        InputError: the module or the factory does not exist, the factory needs other arguments or
            fails, or it returns no ``nn.Module``.
    """
    module_name, _, factory_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"model {spec!r}: cannot import {module_name!r}: {error}") from None
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise InputError(f"model {spec!r}: module {module_name!r} has no factory {factory_name!r}")
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError:  # some functions in C have none
        parameters = []
    by_name = any(
        p.kind is p.VAR_KEYWORD or (p.name == "num_classes" and p.kind is not p.POSITIONAL_ONLY)
        for p in parameters
    )
    needed = [p for p in parameters if p.default is p.empty and p.kind not in _ANY_NUMBER]
    takes_one = len(needed) == 1 and needed[0].kind is not inspect.Parameter.KEYWORD_ONLY
    others = [p.name for p in needed if not (by_name and p.name == "num_classes")]
    if others and (by_name or not takes_one):
        raise InputError(
            f"model {spec!r}: the factory needs {', '.join(others)}: name one that needs "
            f"num_classes at most"
        )
    if needed and not num_classes:
        raise InputError(f"model {spec!r}: the factory needs the number of classes: num_classes=")
    try:
        if by_name and num_classes:
            model = factory(num_classes=num_classes)
        else:
            model = factory(num_classes) if takes_one else factory()
    except InputError:
        raise
    except Exception as error:  # whatever code of others raises
        if is_out_of_memory(error):
            raise
        reason = first_line(error, with_type=True)
        raise InputError(f"model {spec!r}: the factory failed: {reason}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec!r}: the factory returned a {type(model).__name__}")
    return model


_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
