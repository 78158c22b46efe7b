"""Channel statistics that a network's images are normalised with, and how they may be given."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from deit_fast.config import Deviation, RunConfig, Share, check, shown
from deit_fast.errors import InputError
from deit_fast.models.weights_facts import ModelFacts

_NAMES = ("mean", "std")


class Normalisation(NamedTuple):
    """Means and standard deviations of the three channels, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{number:.4g}" for number in part) for part in self)
        return f"mean {mean}, std {std}"

    def is_close(self, other: Normalisation) -> bool:
        """Whether the two differ by rounding to float32 at most."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(math.isclose(one, two, rel_tol=1e-6) for one, two in pairs)


def read_normalisation(mean: Any, std: Any, whose: str) -> Normalisation:
    """Check statistics: each is one number for all channels or three, in any container.

    Args:
        whose: start of the message, such as `teacher X`.

    Raises:
        InputError: other values, such as statistics of pixels in [0, 255].
    """
    found = [
        _channels(value, f"{whose}: {name}")
        for name, value in zip(_NAMES, (mean, std), strict=True)
    ]
    for name, numbers, most in zip(_NAMES, found, (1, 10), strict=True):
        if max(numbers) > most:
            raise InputError(
                f"{whose}: {name} {shown(numbers)} is of pixels in [0, 255]: divide mean and std "
                f"by 255"
            )
    return Normalisation(
        check(f"{whose}: mean", tuple[Share, Share, Share], found[0]),
        check(f"{whose}: std", tuple[Deviation, Deviation, Deviation], found[1]),
    )


def _channels(value: Any, what: str) -> list[float]:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu().flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) not in (1, 3):
        raise InputError(f"{what} must be one number or three, not {shown(value)}")
    return numbers if len(numbers) == 3 else numbers * 3


def registers_statistics(model: nn.Module) -> bool:
    """Whether its `mean` or `std` is a buffer or a parameter, which it may use in its forward."""
    return any(name in model._buffers or name in model._parameters for name in _NAMES)


def own_normalisation(model: nn.Module, whose: str) -> Normalisation | None:
    """The normalisation in a module's attributes `mean` and `std`; None where it has neither.

    Methods and submodules of these names do not count.

    Raises:
        InputError: as ``read_normalisation``, or only one of the two is there.
    """
    values = {name: getattr(model, name, None) for name in _NAMES}
    values = {
        name: None if callable(value) and not isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == 2:
        return None
    if missing:
        raise InputError(f"{whose}: it has an attribute {({*_NAMES} - {*missing}).pop()} but no "
                         f"{missing[0]}")  # fmt: skip
    return read_normalisation(values["mean"], values["std"], whose)


def require_normalisation(model: nn.Module, config: RunConfig) -> None:
    """Check that a model to train gets the images that its attributes `mean` and `std` ask for.

    A buffer or parameter of such a name is the model's own affair: it may use it in its forward.

    Raises:
        InputError: they differ from `view.mean` and `view.std`.
    """
    if registers_statistics(model):
        return
    own = own_normalisation(model, f"model {config.model.name}")
    views = Normalisation(config.view.mean, config.view.std)
    if own is not None and not own.is_close(views):
        mean, std = (" ".join(f"{number:.6g}" for number in part) for part in own)
        raise InputError(
            f"model {config.model.name} has the attributes {own}, the views have {views}: give "
            f"--view.mean {mean} --view.std {std}, or remove the attributes"
        )


def choose_normalisation(
    name: str,
    model: nn.Module,
    is_pretrained: bool,
    facts: ModelFacts | None,
    given: Normalisation | None,
    views: Normalisation,
) -> tuple[Normalisation, str]:
    """The normalisation of a teacher's images, and a text about whose word it is.

    Args:
        name: spec of the teacher without its file.
        is_pretrained: its weights are timm's own.
        facts: of its weights file.
        given: by the user.
        views: of the images that it gets.

    Raises:
        InputError: ``given`` contradicts the file; the module's own statistics are not usable.
    """
    remedy = "--teacher-mean R G B --teacher-std R G B changes that"
    if facts is not None:
        said = Normalisation(facts.mean, facts.std)
        if given is not None and not given.is_close(said):
            raise InputError(
                f"teacher {name}: its weights file says {said}, teacher_mean and teacher_std say "
                f"{given}: omit them"
            )
        return said, "as its weights file says"
    if given is not None:
        return given, "as teacher_mean and teacher_std say"
    if name.startswith("timm:"):
        data = timm.data.resolve_model_data_config(model)
        own = Normalisation(tuple(data["mean"]), tuple(data["std"]))
        return own, "of timm's entry" if is_pretrained else (
            f"of timm's entry are assumed, its file does not say; {remedy}"
        )
    if registers_statistics(model):
        raise InputError(
            f"teacher {name}: its mean or std is a buffer or parameter, so its network may "
            f"normalise by itself: give --teacher-mean 0 0 0 --teacher-std 1 1 1 if it does, else "
            f"the statistics that it expects"
        )
    own_or_none = own_normalisation(model, f"teacher {name}")
    if own_or_none is not None:
        return own_or_none, "as its attributes say"
    return views, f"of the views are assumed, neither its file nor its module says; {remedy}"
