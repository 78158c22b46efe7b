"""`doctor --report`: what a bug report needs, as one text file, and nothing that is a secret.

Of the environment only the variables in ``VARIABLES`` are told, and of them no value that looks
like a key; the home folder is written as `~` throughout. The rest is read from files that runs
leave: the configuration of the newest run and the last rows of its log.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from deit_fast.tools.doctor import Finding, render

PACKAGES = (
    "deit-fast", "torch", "torchvision", "triton", "timm", "numpy", "pillow", "safetensors", "tyro",
    "rich", "matplotlib", "nvidia-dali-cuda130", "apex", "pyarrow", "liger-kernel",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE", "NCCL_ALGO", "NCCL_PROTO", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_LOGS",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NNODES",
    "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT",
)  # fmt: skip
LOG_ROWS = 20
_SECRET = re.compile(r"(?i)(token|secret|passw|api[_-]?key|credential)|://[^/\s]*@")


def write_report(findings: list[Finding], output: Path, path: Path) -> None:
    """Write the report; ``output`` is the folder of runs whose newest one is told about."""
    path.write_text(compose(findings, output, os.environ))


def compose(findings: list[Finding], output: Path, environment: Mapping[str, str]) -> str:
    """The text of the report."""
    sections = {
        "machine": render(findings),
        "versions": "\n".join(_versions()),
        "environment": "\n".join(_variables(environment)) or "none of the variables that matter",
        **_newest_run(output),
    }
    head = f"deit_fast bug report, {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    text = "\n\n".join([head, *(f"== {name} ==\n{body}" for name, body in sections.items())])
    home = str(Path.home())
    return (text.replace(home, "~") if len(home) > 1 else text) + "\n"


def _versions() -> list[str]:
    lines = [f"python {platform.python_version()} ({sys.implementation.name})",
             f"{platform.system()} {platform.release()} {platform.machine()}"]  # fmt: skip
    for package in PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package}: absent")
    return lines


def _variables(environment: Mapping[str, str]) -> list[str]:
    return [f"{name}={_public(environment[name])}" for name in VARIABLES if name in environment]


def _public(text: str) -> str:
    """The text, or a note in its place where it may hold a key."""
    return "(left out: may be secret)" if _SECRET.search(text) else text


def _newest_run(output: Path) -> dict[str, str]:
    """Configuration and last log rows of the newest run in or below a folder."""
    configs = [path for path in output.glob("**/config.json") if path.is_file()]
    if not configs:
        return {"newest run": f"no run in {output}"}
    folder = max(configs, key=lambda path: (_newest_change(path.parent), str(path))).parent
    return {
        "newest run": str(folder),
        "its configuration": _read_config(folder / "config.json"),
        f"last {LOG_ROWS} rows of its log": _last_rows(folder / "metrics.jsonl"),
    }


def _newest_change(folder: Path) -> float:
    times = [p.stat().st_mtime for p in (folder / "config.json", folder / "metrics.jsonl")
             if p.exists()]  # fmt: skip
    return max(times)


def _read_config(path: Path) -> str:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return "\n".join(_public(f"{key} = {json.dumps(value)}") for key, value in _flat(values))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of a nested dictionary."""
    if not isinstance(values, dict):
        yield prefix.rstrip("."), values
        return
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key}.")


def _last_rows(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "\n".join(_public(line) for line in lines[-LOG_ROWS:]) or "empty"
