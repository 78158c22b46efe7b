"""Modules whose class ``fuse`` changed: how they are changed back, copied, pickled and scripted.

``fuse`` gives a module a subclass of its own class and sets attributes on it. The classes of the
parts have names in ``deit_fast.models.fused``; that of a whole model is made from the model's, so
that subclasses of timm's can be fused too. A wrapper may make a class of its own from either:
``fully_shard`` does, and a parametrization.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import _autowrap_check, _Patcher
from torch.nn.utils import parametrize

from deit_fast.errors import InputError


class Swapped(nn.Module):
    """Base of the classes that ``fuse`` gives to modules.

    Attributes:
        swapped_from: the class of the module before, in the namespace of each such class.
        set_by_fuse: attributes that a fused module has and a plain one lacks.
        left_out: those of them that copies and pickles lack, because they hold for one object.
    """

    swapped_from: type[nn.Module]
    set_by_fuse: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in self.left_out}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        _check_pickles(type(self))
        return reduced

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: an unfused model with the same parameters."""
        return _plain_copy(self, {})


class SwappedModel(Swapped):
    """Base of the classes that ``swap_model`` makes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        if kind.__reduce__ is not object.__reduce__:  # a model's own builds a plain model
            return _plain_copy(self, {}).__reduce_ex__(protocol)
        state = self.__getstate__()
        _check_pickles(kind)
        return _rebuild, (kind.__bases__[0], kind.swapped_from), state


def _check_pickles(kind: type) -> None:
    if "swapped_from" not in vars(kind):
        raise InputError(
            f"{kind.__name__} has no pickle, its class exists in this process only: save "
            f"state_dict(), or pickle the model before it is wrapped"
        )


def _rebuild(base: type[SwappedModel], kind: type[nn.Module]) -> nn.Module:
    """A swapped model without its state, for copies and pickles."""
    return object.__new__(_model_class(base, kind))


def _model_class(base: Any, kind: Any) -> Any:
    return _made(base, kind)


@functools.cache
def _made(base: Any, kind: Any) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (base, kind), {"swapped_from": kind})


def swap_model(model: nn.Module, base: type[SwappedModel]) -> None:
    """Give a model the methods of ``base``, in place."""
    kind = type(model)
    if parametrize.is_parametrized(model):  # its class holds the parametrized tensors
        model.__class__ = _with_bases(kind, [_model_class(base, kind.__bases__[0])])
    else:
        model.__class__ = _model_class(base, kind)


def swap_back(module: nn.Module) -> None:
    """Restore the class of a module, in place; no effect on one whose class was not swapped."""
    if not isinstance(module, Swapped):
        return
    for name in module.set_by_fuse:
        module.__dict__.pop(name, None)
    module.__class__ = _plain_class(type(module))


def _plain_class(kind: type) -> type:
    if not issubclass(kind, Swapped):
        return kind
    if "swapped_from" in vars(kind):
        return kind.swapped_from
    return _with_bases(kind, [_plain_class(base) for base in kind.__bases__])


_BY_TYPE = ("__dict__", "__weakref__")  # what type() adds to every class


def _with_bases(wrapper: type, bases: list[type]) -> type:
    """The class that a wrapper made, made from other classes."""
    own = {name: value for name, value in vars(wrapper).items() if name not in _BY_TYPE}
    name = wrapper.__name__.replace(wrapper.__bases__[-1].__name__, bases[-1].__name__)
    return type(name, tuple(bases), own)


def _plain_copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """An unfused copy of a tree of modules, with the same parameters and buffers."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in made:
        copy = made[id(module)] = object.__new__(type(module))  # FSDP's __new__ would build another
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_modules"] = {
            name: None if child is None else _plain_copy(child, made)
            for name, child in module._modules.items()
        }
        swap_back(copy)
    return made[id(module)]


def is_traced(x: Any) -> bool:
    """Whether a forward runs for a tool that needs timm's own steps, not for its result.

    torch.fx reads them, and a program of ``torch.jit.trace`` or ``torch.export`` must not need this
    package. The transforms of ``torch.func`` and forward-mode differentiation have no rules for
    kernels.
    """
    if torch.compiler.is_compiling():
        # torch.compiler.is_exporting() is True in all that torch 2.11 compiles.
        return torch.compiler._is_exporting_flag
    return (
        isinstance(x, torch.fx.Proxy)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def annotated_as(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that gives a forward the annotations of timm's.

    torch.fx writes those of the traced forward into its code, which torch.jit.script may compile:
    they must be types. Those of this package are strings.
    """

    def annotate(forward: Callable[..., Any]) -> Callable[..., Any]:
        forward.__annotations__ = dict(original.__annotations__)
        return forward

    return annotate


@contextlib.contextmanager
def traced(x: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let torch.fx leave out what it leaves out while it traces timm's ``forward``.

    It does so where a name of the traced forward's module is one of the functions left out.
    """
    left_out: set[int] = getattr(getattr(x, "tracer", None), "_autowrap_function_ids", set())
    with _Patcher() as patcher:
        _autowrap_check(patcher, forward.__globals__, left_out)
        yield
