"""Optional packages: whether one is really there, and what is wrong with it where it is not."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType

from deit_fast.errors import first_line


@dataclass(frozen=True)
class Loaded:
    """A package that was imported, or why it was not."""

    module: ModuleType | None
    error: str = ""  # empty where the package is simply absent


def load(name: str) -> Loaded:
    """Import a package; whatever goes wrong in it comes back as text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Loaded(importlib.import_module(name))
    except ModuleNotFoundError as error:
        missing_itself = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        return Loaded(None, "" if missing_itself else first_line(error, with_type=True))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may even call sys.exit
        return Loaded(None, first_line(error, with_type=True))


@dataclass(frozen=True)
class Apex:
    """NVIDIA's apex, or what was found in its place.

    Attributes:
        state: "real", "absent", "broken", "namesake" (PyPI's `apex` is another package) or
            "no CUDA code".
        why: what is broken or missing.
        optimizers: module with FusedAdam and FusedLAMB, where it is real.
    """

    state: str
    why: str = ""
    optimizers: ModuleType | None = None


def find_apex() -> Apex:
    """Look for NVIDIA's apex by its own symbols."""
    package = load("apex")
    if package.module is None and not package.error:
        return Apex("absent")
    optimizers = load("apex.optimizers")
    if not hasattr(optimizers.module, "FusedAdam"):
        if package.error or optimizers.error:
            return Apex("broken", package.error or optimizers.error)
        return Apex("namesake")
    kernels = load("amp_C")
    if kernels.module is None:
        return Apex("no CUDA code", kernels.error or "amp_C is missing")
    return Apex("real", optimizers=optimizers.module)
