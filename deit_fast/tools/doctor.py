"""`doctor`: what this machine has, what is slow on it, and what to do about it.

A missing or broken package is a finding, never a crash; only the standard library is needed.
`doctor --report` writes the findings and more as the content of a bug report, without secrets.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deit_fast.config_file import by_dotted_key
from deit_fast.errors import printable
from deit_fast.runtime.environment import Loaded, find_apex, load, package_version
from deit_fast.runtime.files import parse_object, read_file

State = Literal["ok", "note", "problem"]

# Packages that every run needs: the oldest release, and the first one that is too new. As in
# pyproject.toml, but readable where this project is not installed.
REQUIRED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", None),
    "torchvision": ("0.26", None),
    "triton": ("3.6", None),
    "timm": ("1.0.25", None),
    "numpy": ("1.26", None),
    "safetensors": ("0.4", None),
    "tyro": ("1.0", None),
    "pillow": ("11", "13"),  # its major version decides the pixels of a view
}
SHM_BYTES_PER_WORKER = 2 * 256 * 224 * 224 * 3  # two prefetched batches of 256 uint8 views
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One fact about the machine; ``advice`` says what to do about it, in one sentence."""

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def examine(output: Path = Path("runs"), workers: int = 4) -> list[Finding]:
    """All findings about this machine.

    Args:
        output: folder for runs; it need not exist.
        workers: decoding processes for which shared memory must suffice.
    """
    torch = load("torch").module
    has_gpu = bool(_cuda_devices(torch))
    return [
        Finding("python", platform.python_version()),
        *[required(name, load({"pillow": "PIL"}.get(name, name))) for name in REQUIRED],
        dali(load("nvidia.dali"), has_gpu),
        *[
            Finding(name, package_version(name) or "absent (only building needs it)")
            for name in ("pybind11", "ninja")
        ],
        *gpus(torch, driver_version()),
        bf16(torch),
        triton_interpret(os.environ, has_gpu),
        extension(load("deit_fast._C"), has_gpu),
        apex(),
        cpus(len(os.sched_getaffinity(0)), workers),
        Finding("memory", _gib(_memory_bytes())),
        shared_memory(Path("/dev/shm"), workers),
        disk(output),
    ]


# ---------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------


def _version_of(package: str, module: Any) -> str:
    """Version that a module states, or else that of the installed package."""
    stated = getattr(module, "__version__", None) or package_version(package)
    return str(stated or "unknown version")


def _release(version: str) -> tuple[int, ...]:
    """(2, 14, 1) of "2.14.1+cu130"; `packaging` may be missing here."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def required(name: str, loaded: Loaded) -> Finding:
    """A package that every run needs."""
    least, below = REQUIRED[name]
    install = f'pip install "{name}>={least}{f",<{below}" if below else ""}"'
    if loaded.module is None:
        value = f"broken ({loaded.error})" if loaded.error else "missing"
        advice = f"{'Reinstall' if loaded.error else 'Install'} it: {install}."
        return Finding(name, value, "problem", advice)
    version = _version_of(name, loaded.module)
    release = _release(version)
    if release and release < _release(least):
        return Finding(name, version, "problem", f"Older than {least}: {install}.")
    if below and release >= _release(below):
        advice = f"Its pixels differ from those of existing caches: {install}."
        return Finding(name, version, "problem", advice)
    return Finding(name, version)


def dali(loaded: Loaded, has_gpu: bool) -> Finding:
    """NVIDIA DALI decodes on the GPU; it is optional."""
    if loaded.module is not None:
        version = _version_of("nvidia-dali", loaded.module)
        return Finding("dali", f"{version}, for data.loader=dali-cpu and dali-gpu")
    install = 'pip install "deit-fast[dali]"'
    if loaded.error:
        advice = f"Reinstall it or remove it: {install}."
        return Finding("dali", f"broken ({loaded.error})", "note", advice)
    if not has_gpu:
        return Finding("dali", "absent")
    advice = f"Images are decoded on the CPU; for data.loader=dali-gpu: {install}."
    return Finding("dali", "absent", "note", advice)


def extension(loaded: Loaded, has_gpu: bool) -> Finding:
    """deit_fast._C, the teacher-logit cache."""
    name = "deit_fast._C"
    if loaded.module is None:
        value = f"broken ({loaded.error})" if loaded.error else "not built"
        advice = (
            "Teacher logits can be neither written nor read: build it with `pip install -e .` "
            "(needs a C++ compiler)."
        )
        return Finding(name, value, "problem", advice)
    if getattr(loaded.module, "with_cuda", False):
        return Finding(name, "built with CUDA code")
    if not has_gpu:
        return Finding(name, "built without CUDA code")
    advice = "Cached logits are unpacked on the CPU: rebuild with nvcc on PATH, `pip install -e .`."
    return Finding(name, "built without CUDA code", "note", advice)


def apex() -> Finding:
    """NVIDIA apex, recognised by its symbols; the PyPI package `apex` is an unrelated toolkit."""
    found = find_apex()
    value, advice = {
        "absent": ("absent (optional; torch's fused AdamW is used)", ""),
        "broken": (f"broken ({found.why})", "Remove it: pip uninstall apex. It is optional."),
        "namesake": (
            "the PyPI namesake, not NVIDIA's",
            "Remove it: pip uninstall apex. NVIDIA's apex is built from source, and optional.",
        ),
        "no CUDA code": (
            f"NVIDIA's, without its CUDA code ({found.why})",
            "Build apex with --cpp_ext --cuda_ext, or remove it: it is optional.",
        ),
        "real": ("NVIDIA's, with FusedAdam", ""),
    }[found.state]
    return Finding("apex", value, "note" if advice else "ok", advice)


# ---------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------


def _cuda_devices(torch: Any) -> list[Any]:
    """Properties of the CUDA devices that torch sees."""
    try:
        return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:  # no torch, or a driver that does not respond
        return []


def driver_version() -> str:
    """Version of the NVIDIA driver; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.split() or [""])[0]


def gpus(torch: Any, driver: str) -> list[Finding]:
    """One finding per GPU, or one that says why there is none."""
    devices = _cuda_devices(torch)
    if not devices and driver:
        advice = "Install a torch built for CUDA."
        if getattr(getattr(torch, "version", None), "cuda", None):
            advice = "Check CUDA_VISIBLE_DEVICES, and that the driver supports torch's CUDA."
        return [Finding("gpu", f"driver {driver}, but torch sees no GPU", "problem", advice)]
    if not devices:
        advice = "Kernels run as their PyTorch reference: enough to develop, slow to train."
        return [Finding("gpu", "none", "note", advice)]
    findings = []
    for index, device in enumerate(devices):
        capability, memory = f"{device.major}.{device.minor}", _gib(device.total_memory)
        value = f"{device.name}, capability {capability}, {memory}, driver {driver or 'unknown'}"
        advice = "Before sm_80: no bf16 arithmetic; the kernels are not tuned for it."
        old: tuple[State, str] = ("note", advice) if device.major < 8 else ("ok", "")
        findings.append(Finding(f"gpu {index}", value, *old))
    return findings


def bf16(torch: Any) -> Finding:
    """Whether bf16 arithmetic is done in hardware."""
    devices = _cuda_devices(torch)
    if devices:
        if all(device.major >= 8 for device in devices):
            return Finding("bf16", "on the GPU")
        return Finding("bf16", "not on this GPU", "note", "Training runs in fp32, slower.")
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    native = "amx_bf16" in flags or "avx512_bf16" in flags
    return Finding("bf16", "on the CPU" if native else "not in hardware")


def triton_interpret(environment: Mapping[str, str], has_gpu: bool) -> Finding:
    """Triton's interpreter is for tests."""
    if environment.get("TRITON_INTERPRET", "0") in ("", "0"):
        return Finding("TRITON_INTERPRET", "not set")
    advice = "Kernels run in Triton's interpreter, far slower: unset it to train."
    return Finding("TRITON_INTERPRET", "set", "problem" if has_gpu else "note", advice)


# ---------------------------------------------------------------------------------------------
# Machine
# ---------------------------------------------------------------------------------------------


def cpus(count: int, workers: int) -> Finding:
    """Number of cores, compared with the decoding processes of one GPU."""
    if count > workers:
        return Finding("cpu", f"{count} cores")
    best = max(count - 1, 0)
    advice = f"{workers} decoding processes share {count} cores: pass --data.workers {best}."
    return Finding("cpu", f"{count} cores", "note", advice)


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def shared_memory(path: Path, workers: int) -> Finding:
    """Workers pass batches through shared memory; where it is full, they are killed."""
    need = workers * SHM_BYTES_PER_WORKER
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return Finding(str(path), "absent")
    value = f"{_gib(free)} free, {workers} workers need about {_gib(need)}"
    if free >= need:
        return Finding(str(path), value)
    advice = "Start the container with --shm-size=8g or --ipc=host, or pass --data.workers 0."
    return Finding(str(path), value, "problem", advice)


def disk(output: Path) -> Finding:
    """Space for checkpoints: about 0.35 GB each for DeiT-S."""
    folder = output.absolute()
    while not os.path.exists(folder):
        folder = folder.parent
    name = f"disk of {output}"
    if not os.access(folder, os.W_OK):
        advice = f"{folder} is not writable: choose another --output."
        return Finding(name, "not writable", "problem", advice)
    free = shutil.disk_usage(folder).free
    value = f"{_gib(free)} free"
    if free < GIB:
        return Finding(name, value, "problem", "Free some space, or choose another --output.")
    if free < 10 * GIB:
        return Finding(name, value, "note", "Space for few checkpoints and no large cache.")
    return Finding(name, value)


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def has_problem(findings: list[Finding]) -> bool:
    """Whether something prevents a run."""
    return any(finding.state == "problem" for finding in findings)


def render(findings: list[Finding], tty: bool = False) -> str:
    """A line per finding, then what to do, problems first; in colour on a terminal."""

    def paint(state: State) -> str:
        colour = {"ok": "32", "note": "33", "problem": "1;31"}[state]
        return f"\x1b[{colour}m{state:<7}\x1b[0m" if tty else f"{state:<7}"

    width = max(len(finding.name) for finding in findings)
    lines = [f"{paint(f.state)}  {f.name:<{width}}  {f.value}" for f in findings]
    advised = sorted((f for f in findings if f.advice), key=lambda f: f.state != "problem")
    verdict = "No problem found." + (" What is slow or worth knowing:" if advised else "")
    if has_problem(findings):
        verdict = "What to do, problems first:"
    return "\n".join(
        [*lines, "", verdict, *(f"{paint(f.state)}  {f.name}: {f.advice}" for f in advised)]
    )


# ---------------------------------------------------------------------------------------------
# Bug report
# ---------------------------------------------------------------------------------------------

PACKAGES = (
    "deit-fast", "torch", "torchvision", "triton", "timm", "numpy", "pillow", "safetensors", "tyro",
    "rich", "matplotlib", "nvidia-dali-cuda130", "apex", "pyarrow", "onnx",
    "onnxscript", "onnxruntime", "liger-kernel",
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


def bug_report(findings: list[Finding], output: Path, environment: Mapping[str, str]) -> str:
    """The content of a bug report, without secrets.

    Of the environment only ``VARIABLES`` are shown, without values that look like a key; the home
    folder is written as `~`. Of the newest run in or below ``output``, the configuration and the
    end of the log are shown.
    """
    variables = [
        f"{name}={_public(printable(environment[name]))}"
        for name in VARIABLES
        if name in environment
    ]
    versions = [
        f"python {platform.python_version()} ({sys.implementation.name})",
        f"{platform.system()} {platform.release()} {platform.machine()}",
        *(f"{name} {package_version(name) or 'absent'}" for name in PACKAGES),
    ]
    sections = {
        "machine": render(findings),
        "versions": "\n".join(versions),
        "environment": "\n".join(variables) or "none of the relevant variables is set",
        **_newest_run(output),
    }
    head = f"deit_fast bug report, {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    text = "\n\n".join([head, *(f"== {name} ==\n{body}" for name, body in sections.items())])
    home = str(Path.home())
    return (text.replace(home, "~") if len(home) > 1 else text) + "\n"


def _public(text: str) -> str:
    return "(left out: may be secret)" if _SECRET.search(text) else text


def _newest_run(output: Path) -> dict[str, str]:
    """Configuration and last log rows of the run in or below ``output`` that changed last."""
    runs = [path.parent for path in output.glob("**/config.json") if path.is_file()]
    if not runs:
        return {"newest run": f"no run in {output}"}

    def changed(run: Path) -> float:
        files = (run / "config.json", run / "metrics.jsonl")
        return max(file.stat().st_mtime for file in files if file.exists())

    run = max(runs, key=changed)
    return {
        "newest run": printable(run),
        "its configuration": _read_config(run / "config.json"),
        f"last {LOG_ROWS} rows of its log": _last_rows(run / "metrics.jsonl"),
    }


def _read_config(path: Path) -> str:
    try:
        values = by_dotted_key(parse_object(read_file(path), str(path)))
    except (OSError, ValueError) as error:
        return f"cannot be read: {printable(error)}"
    return "\n".join(_public(f"{key} = {json.dumps(value)}") for key, value in values.items())


def _last_rows(path: Path) -> str:
    try:
        lines = read_file(path).decode(errors="replace").splitlines()
    except (OSError, ValueError) as error:
        return f"cannot be read: {printable(getattr(error, 'strerror', error))}"
    return "\n".join(_public(printable(line)) for line in lines[-LOG_ROWS:]) or "empty"
