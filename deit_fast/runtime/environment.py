"""What a run depends on outside this package: versions, device, command, optional packages.

Imports only the standard library, so that `doctor` works where a package is missing or broken.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from deit_fast.errors import first_line
from deit_fast.runtime.files import read_file

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------------------------------------
# What a result was made with
# ---------------------------------------------------------------------------------------------


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions of the packages that decide a run's numbers, and the device's name."""
    import torch

    packages = ("deit-fast", "torch", "triton", "timm", "numpy", "pillow")
    versions = {package: package_version(package) or "not installed" for package in packages}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"python": platform.python_version(), **versions, "device": name}


def describe_command() -> str:
    """The command that started this process, torchrun and its arguments included, for a shell."""
    words = sys.orig_argv
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(OSError):  # systems without /proc
            launcher = read_file(Path(f"/proc/{os.getppid()}/cmdline")).decode().split("\0")[:-1]
            arguments = sys.argv[1:]
            if launcher[len(launcher) - len(arguments) :] == arguments:
                words = launcher
    return shlex.join(_without_folders(words))


def _without_folders(words: list[str]) -> list[str]:
    """A command line by the names of its programs; a console script without its interpreter."""
    if not words:
        return words
    program, *rest = words
    if rest and Path(rest[0]).is_absolute() and Path(rest[0]).parent.name == "bin":
        program, *rest = rest
    return [Path(program).name, *rest]


def package_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------
# Optional packages
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """An imported package, or the reason why it could not be imported."""

    module: ModuleType | None
    error: str = ""  # empty where the package is not installed


def load(name: str) -> Loaded:
    """Import a package; whatever its import raises is returned as text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Loaded(importlib.import_module(name))
    except ModuleNotFoundError as error:
        is_absent = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        return Loaded(None, "" if is_absent else first_line(error, with_type=True))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may even call sys.exit
        return Loaded(None, first_line(error, with_type=True))


@dataclass(frozen=True)
class Apex:
    """NVIDIA's apex, or what is installed in its place.

    Attributes:
        state: "real", "absent", "broken", "namesake" (PyPI's `apex` is another package) or
            "no CUDA code".
        why: what is broken or missing.
        optimizers: module with FusedAdam and FusedLAMB; None unless the state is "real".
    """

    state: str
    why: str = ""
    optimizers: ModuleType | None = None


def find_apex() -> Apex:
    """Look for NVIDIA's apex by the names that only it defines."""
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
