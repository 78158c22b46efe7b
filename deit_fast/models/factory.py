"""Models that a factory of the user's builds, named as ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect

from torch import nn

from deit_fast.errors import InputError


def build_from_factory(spec: str, num_classes: int | None) -> nn.Module:
    """The model that ``package.module:factory`` returns.

    The factory is called with ``num_classes=`` if it has a parameter of that name.

    Raises:
        InputError: the module or the factory does not exist, or it returns no ``nn.Module``.
    """
    module_name, _, factory_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"model {spec!r}: cannot import {module_name!r}: {error}") from None
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise InputError(f"model {spec!r}: module {module_name!r} has no factory {factory_name!r}")
    parameters = inspect.signature(factory).parameters.values()
    has_parameter = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    model = factory(num_classes=num_classes) if has_parameter and num_classes else factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec!r}: the factory returned a {type(model).__name__}")
    return model
