"""`doctor --report`: the content of a bug report, as one text file without secrets.

Of the environment only ``VARIABLES`` are shown, without values that look like a key; the home
folder is written as `~`. Of the newest run, the configuration and the end of the log are shown.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from deit_fast.runtime.environment import package_version
from deit_fast.tools.doctor import Finding, render
from deit_fast.tools.run_folder import flatten

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
    """Write the report to ``path``; ``output`` is the folder whose newest run is described."""
    path.write_text(compose(findings, output, os.environ))


def compose(findings: list[Finding], output: Path, environment: Mapping[str, str]) -> str:
    """The text of the report."""
    variables = [
        f"{name}={_public(environment[name])}" for name in VARIABLES if name in environment
    ]
    sections = {
        "machine": render(findings),
        "versions": "\n".join(_versions()),
        "environment": "\n".join(variables) or "none of the relevant variables is set",
        **_newest_run(output),
    }
    head = f"deit_fast bug report, {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    text = "\n\n".join([head, *(f"== {name} ==\n{body}" for name, body in sections.items())])
    home = str(Path.home())
    return (text.replace(home, "~") if len(home) > 1 else text) + "\n"


def _versions() -> list[str]:
    packages = [f"{name} {package_version(name) or 'absent'}" for name in PACKAGES]
    python = f"python {platform.python_version()} ({sys.implementation.name})"
    return [python, f"{platform.system()} {platform.release()} {platform.machine()}", *packages]


def _public(text: str) -> str:
    return "(left out: may be secret)" if _SECRET.search(text) else text


def _newest_run(output: Path) -> dict[str, str]:
    """Configuration and last log rows of the run in or below ``output`` that changed last."""
    runs = {path.parent for path in output.glob("**/config.json") if path.is_file()}
    if not runs:
        return {"newest run": f"no run in {output}"}

    def changed(run: Path) -> tuple[float, str]:
        files = (run / "config.json", run / "metrics.jsonl")
        return max(file.stat().st_mtime for file in files if file.exists()), str(run)

    run = max(runs, key=changed)
    return {
        "newest run": str(run),
        "its configuration": _read_config(run / "config.json"),
        f"last {LOG_ROWS} rows of its log": _last_rows(run / "metrics.jsonl"),
    }


def _read_config(path: Path) -> str:
    try:
        values = flatten(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return "\n".join(_public(f"{key} = {json.dumps(value)}") for key, value in values.items())


def _last_rows(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "\n".join(_public(line) for line in lines[-LOG_ROWS:]) or "empty"
