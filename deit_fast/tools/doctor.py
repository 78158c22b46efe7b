"""`doctor`: what this machine has, what is slow on it, and what to do about it.

A missing or broken package is a finding, never a crash; nothing but the standard library is needed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from deit_fast.runtime.environment import Loaded, find_apex, load

State = Literal["ok", "note", "problem"]

# packages without which no run starts, with their least versions (pyproject.toml)
REQUIRED = {
    "torch": "2.11",
    "torchvision": "0.26",
    "triton": "3.6",
    "timm": "1.0.25",
    "numpy": "1.26",
    "safetensors": "0.4",
    "tyro": "1.0",
}
IMPORT_NAMES = {"pillow": "PIL", "nvidia-dali": "nvidia.dali"}
PILLOW_FROM, PILLOW_BELOW = "11", "13"  # the pixel contract
SHM_BYTES_PER_WORKER = 2 * 256 * 224 * 224 * 3  # two prefetched batches of 256 uint8 views
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One fact about the machine; ``advice`` says what to do about it, in one sentence."""

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def version_of(package: str, module: ModuleType | None = None) -> str:
    """Version of a package by its own word, or else by its metadata."""
    version = getattr(module, "__version__", None)
    if version:
        return str(version)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def examine(output: Path = Path("runs"), workers: int = 4) -> list[Finding]:
    """All findings about this process's machine.

    Args:
        output: folder where runs would go; it need not exist.
        workers: decoding processes that shared memory has to serve.
    """
    torch = load("torch").module
    dali = load("nvidia.dali")
    has_gpu = bool(_cuda_devices(torch))
    return [
        Finding("python", platform.python_version()),
        *[required(name, load(name)) for name in REQUIRED],
        pillow(load("PIL")),
        dali_finding(dali, has_gpu),
        *[build_tool(name) for name in ("pybind11", "ninja")],
        *gpus(torch, driver_version()),
        bf16(torch),
        triton_interpret(os.environ, has_gpu),
        extension(load("deit_fast._C"), has_gpu),
        apex(),
        cpus(_cpu_count(), workers),
        Finding("memory", _gib(_memory_bytes())),
        shared_memory(Path("/dev/shm"), workers),
        disk(output),
    ]


# ---------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------


def required(name: str, loaded: Loaded) -> Finding:
    """A package that every run needs."""
    least = REQUIRED[name]
    install = f'pip install "{name}>={least}"'
    if loaded.module is None:
        value = f"broken ({loaded.error})" if loaded.error else "missing"
        again = f"Reinstall it: {install}" if loaded.error else f"Install it: {install}"
        return Finding(name, value, "problem", f"{again}.")
    version = version_of(name, loaded.module)
    if _numbers(version) and _numbers(version) < _numbers(least):
        return Finding(name, version, "problem", f"Older than {least}: {install}.")
    return Finding(name, version)


def pillow(loaded: Loaded) -> Finding:
    """Pillow decides the pixels of a view, so its major version is part of every cache."""
    install = f'pip install "pillow>={PILLOW_FROM},<{PILLOW_BELOW}"'
    if loaded.module is None:
        value = f"broken ({loaded.error})" if loaded.error else "missing"
        return Finding("pillow", value, "problem", f"Images cannot be decoded: {install}.")
    version = version_of("pillow", loaded.module)
    if _numbers(PILLOW_FROM) <= _numbers(version) < _numbers(PILLOW_BELOW):
        return Finding("pillow", f"{version}, inside the pixel contract")
    advice = f"Its pixels differ from those that caches were made with: {install}."
    return Finding("pillow", f"{version}, outside the pixel contract", "problem", advice)


def dali_finding(loaded: Loaded, has_gpu: bool) -> Finding:
    """DALI decodes on the GPU; it is optional."""
    if loaded.module is not None:
        version = version_of("nvidia-dali", loaded.module)
        return Finding("dali", f"{version}, for data.loader=dali and dali-triton")
    if loaded.error:
        advice = 'Reinstall it or remove it: pip install "deit-fast[dali]".'
        return Finding("dali", f"broken ({loaded.error})", "note", advice)
    advice = (
        'Images are decoded on the CPU; for data.loader=dali: pip install "deit-fast[dali]".'
        if has_gpu
        else ""
    )
    return Finding("dali", "absent", "note" if has_gpu else "ok", advice)


def build_tool(name: str) -> Finding:
    """What builds the compiled extension; not needed once it is built."""
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "absent (only building needs it)")


def extension(loaded: Loaded, has_gpu: bool) -> Finding:
    """deit_fast._C, the teacher-logit cache."""
    name = "deit_fast._C"
    build = "build it with `pip install -e .` (needs a C++ compiler)"
    if loaded.module is None:
        value = f"broken ({loaded.error})" if loaded.error else "not built"
        advice = f"Teacher logits can be neither written nor read: {build}."
        return Finding(name, value, "problem", advice)
    if getattr(loaded.module, "with_cuda", False):
        return Finding(name, "built with CUDA code")
    if not has_gpu:
        return Finding(name, "built without CUDA code")
    advice = "Cached logits are unpacked on the CPU: rebuild with nvcc on PATH, `pip install -e .`."
    return Finding(name, "built without CUDA code", "note", advice)


def apex() -> Finding:
    """NVIDIA apex by its own symbols; the PyPI package `apex` is an unrelated toolkit."""
    found = find_apex()
    if found.state == "absent":
        return Finding("apex", "absent (optional; torch's fused AdamW is used)")
    if found.state == "broken":
        value = f"broken ({found.why})"
        return Finding("apex", value, "note", "Remove it: pip uninstall apex. It is optional.")
    if found.state == "namesake":
        advice = "Remove it: pip uninstall apex. NVIDIA's apex is built from source, and optional."
        return Finding("apex", "the PyPI namesake, not NVIDIA's", "note", advice)
    if found.state == "no CUDA code":
        advice = "Build apex with --cpp_ext --cuda_ext, or remove it: it is optional."
        return Finding("apex", f"NVIDIA's, without its CUDA code ({found.why})", "note", advice)
    return Finding("apex", "NVIDIA's, with FusedAdam")


# ---------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------


def _cuda_devices(torch: Any) -> list[Any]:
    """Properties of the CUDA devices that torch sees."""
    try:
        return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:  # no torch, or a driver that does not answer
        return []


def driver_version() -> str:
    """Version of the NVIDIA driver, or an empty text where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (answer.stdout.split() or [""])[0]


def gpus(torch: Any, driver: str) -> list[Finding]:
    """One finding per GPU, or one that says why there is none."""
    devices = _cuda_devices(torch)
    if not devices and driver:
        has_cuda = getattr(getattr(torch, "version", None), "cuda", None)
        cause = (
            "Check CUDA_VISIBLE_DEVICES, and that the driver is new enough for torch's CUDA."
            if has_cuda
            else "Install a torch built for CUDA."
        )
        return [Finding("gpu", f"driver {driver}, but torch sees no GPU", "problem", cause)]
    if not devices:
        advice = (
            "Kernels run as their PyTorch reference: fine for work on the code, slow for training."
        )
        return [Finding("gpu", "none", "note", advice)]
    findings = []
    for index, device in enumerate(devices):
        value = (
            f"{device.name}, capability {device.major}.{device.minor}, "
            f"{_gib(device.total_memory)}, driver {driver or 'unknown'}"
        )
        old = device.major < 8
        advice = (
            "Before sm_80: no bf16 arithmetic; the kernels are not tuned for it." if old else ""
        )
        findings.append(Finding(f"gpu {index}", value, "note" if old else "ok", advice))
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


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpus(count: int, workers: int) -> Finding:
    """Cores against the decoding processes of one GPU."""
    if count > workers:
        return Finding("cpu", f"{count} cores")
    best = max(count - 1, 0)
    advice = f"{workers} decoding processes share {count} cores: pass --data.workers {best}."
    return Finding("cpu", f"{count} cores", "note", advice)


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count else "unknown"


def shared_memory(path: Path, workers: int) -> Finding:
    """Worker processes hand batches over in shared memory; a full one kills them."""
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
    """Room for checkpoints: about 0.35 GB each for DeiT-S."""
    place = output.absolute()
    while not os.path.exists(place):
        place = place.parent
    name = f"disk of {output}"
    if not os.access(place, os.W_OK):
        advice = f"{place} cannot be written: choose another --output."
        return Finding(name, "not writable", "problem", advice)
    free = shutil.disk_usage(place).free
    value = f"{_gib(free)} free"
    if free < GIB:
        return Finding(name, value, "problem", "Free some space, or choose another --output.")
    if free < 10 * GIB:
        return Finding(name, value, "note", "Room for few checkpoints and no large cache.")
    return Finding(name, value)


# ---------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------


def has_problem(findings: list[Finding]) -> bool:
    """Whether anything stands in the way of a run."""
    return any(finding.state == "problem" for finding in findings)


def render(findings: list[Finding], tty: bool = False) -> str:
    """A coloured table on a terminal, plain lines elsewhere; what to do comes last."""
    rich = load("rich.table").module if tty else None
    return _plain_lines(findings) if rich is None else _rich_table(findings)


def _to_do(findings: list[Finding]) -> list[Finding]:
    advised = [finding for finding in findings if finding.advice]
    return sorted(advised, key=lambda finding: finding.state != "problem")


def _verdict(findings: list[Finding]) -> str:
    if has_problem(findings):
        return "What to do, problems first:"
    return (
        "No problem found. What is slow or worth knowing:" if _to_do(findings) else "All is well."
    )


def _plain_lines(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = [f"{f.state:<7}  {f.name:<{width}}  {f.value}" for f in findings]
    advice = [f"{f.state:<7}  {f.name}: {f.advice}" for f in _to_do(findings)]
    return "\n".join([*lines, "", _verdict(findings), *advice])


def _rich_table(findings: list[Finding]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        state = Text(finding.state, style=colours[finding.state])
        table.add_row(state, finding.name, Text(finding.value))
    console = Console(force_terminal=True)
    with console.capture() as capture:
        console.print(table)
        console.print(f"\n{_verdict(findings)}", style="bold")
        for finding in _to_do(findings):
            line = Text.assemble(
                (f"{finding.state:<7}  ", colours[finding.state]),
                (f"{finding.name}: ", "bold"),
                finding.advice,
            )
            console.print(line)
    return capture.get().rstrip()
