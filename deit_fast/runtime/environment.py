"""What a result was made with: versions, device, command."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions of what decides a run's numbers, and the device's name."""
    packages = ("deit-fast", "torch", "triton", "timm", "numpy", "pillow")
    versions = {name: _version(name) for name in packages}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"python": platform.python_version(), **versions, "device": name}


def describe_command() -> str:
    """The command line of this process, with the program's folder left out."""
    program = Path(sys.argv[0]).name
    return shlex.join(["deit-fast" if program == "__main__.py" else program, *sys.argv[1:]])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
