"""The doctor's findings, and that nothing on a broken machine stops it."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from deit_fast.cli import main
from deit_fast.runtime.environment import Loaded
from deit_fast.tools import doctor
from deit_fast.tools.doctor import Finding

ROOT = Path(__file__).parent.parent


def python(script: str, *folders: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def module(version: str, **names: object) -> Loaded:
    return Loaded(SimpleNamespace(__version__=version, **names))  # type: ignore[arg-type]


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# -------------------------------------------------------------------------------------------- apex

NVIDIA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass\n"}


@pytest.mark.parametrize(
    ("files", "value", "state"),
    [
        ({}, "absent", "ok"),
        ({"apex/__init__.py": "'''A toolkit for Pyramid.'''"}, "the PyPI namesake", "note"),
        ({**NVIDIA, "amp_C.py": ""}, "NVIDIA's, with FusedAdam", "ok"),
        (NVIDIA, "NVIDIA's, without its CUDA code (amp_C is missing)", "note"),
        (
            {**NVIDIA, "amp_C.py": "raise ImportError('undefined symbol: x')"},
            "NVIDIA's, without its CUDA code (ImportError: undefined symbol: x)",
            "note",
        ),
        ({"apex/__init__.py": "import velruse_gone"}, "broken (ModuleNotFoundError", "note"),
        ({"apex/__init__.py": "raise SystemExit(3)"}, "broken (SystemExit: 3)", "note"),
    ],
)
def test_apex_is_distinguished_from_its_namesake(
    files: dict[str, str], value: str, state: str, tmp_path: Path
) -> None:
    script = "from deit_fast.tools.doctor import apex; f = apex(); print(f.state, f.value, sep='|')"
    done = python(script, package(tmp_path, files))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{state}|{value}")


# ---------------------------------------------------------------------------------------- packages


def test_missing_packages_are_findings_and_status_1() -> None:
    blocked = ("torch", "torchvision", "timm", "triton", "PIL", "numpy", "rich", "tyro", "nvidia")
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
from deit_fast.cli import main
sys.exit(main(["doctor"]))
"""
    done = python(script)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for name in ("torch", "torchvision", "timm", "triton", "pillow", "numpy", "tyro"):
        assert any(line.split() == ["problem", name, "missing"] for line in lines), name
        assert any(line.startswith("problem") and f"{name}: " in line for line in lines), name


def test_broken_extension_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"broken_extension{suffix}").write_bytes(b"not an ELF file")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = doctor.load("broken_extension")
    assert loaded.module is None and loaded.error.startswith("ImportError: ")
    finding = doctor.extension(loaded, has_gpu=False)
    assert finding.state == "problem" and finding.value.startswith("broken (ImportError")


def test_extension_without_cuda_matters_only_beside_a_gpu() -> None:
    plain = module("", with_cuda=False)
    assert doctor.extension(Loaded(None), False).state == "problem"
    assert doctor.extension(plain, has_gpu=False).state == "ok"
    assert doctor.extension(plain, has_gpu=True).state == "note"
    assert doctor.extension(module("", with_cuda=True), has_gpu=True).state == "ok"


def test_load_distinguishes_missing_from_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "needs_other.py": "import a_package_that_is_not_there",
        "dies.py": "raise RuntimeError('driver too old\\nsecond line')",
    }
    monkeypatch.syspath_prepend(package(tmp_path, files))
    assert doctor.load("not_there_at_all") == Loaded(None, "")
    assert doctor.load("not_there_at_all.child") == Loaded(None, "")
    assert "a_package_that_is_not_there" in doctor.load("needs_other").error
    assert doctor.load("dies") == Loaded(None, "RuntimeError: driver too old")


@pytest.mark.parametrize(
    ("version", "state"),
    [("10.4.0", "problem"), ("11.0", "ok"), ("12.3.0", "ok"), ("13.0.0", "problem")],
)
def test_pillow_must_decode_the_pixels_of_existing_caches(version: str, state: str) -> None:
    assert doctor.required("pillow", module(version)).state == state


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.10.1", "problem"), ("2.11.0", "ok"), ("2.14.1+cu130", "ok"), ("3.0.0a1", "ok")],
)
def test_old_torch_is_a_problem(version: str, state: str) -> None:
    finding = doctor.required("torch", module(version))
    assert (finding.state, finding.value) == (state, version)


def test_versions_agree_with_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, (least, below) in doctor.REQUIRED.items():
        assert f'"{name}>={least}{f",<{below}" if below else ""}"' in text


# ------------------------------------------------------------------------------------- the machine


def fake_torch(*capabilities: tuple[int, int], cuda: str | None = "13.0") -> SimpleNamespace:
    devices = [
        SimpleNamespace(name="GPU", major=a, minor=b, total_memory=80 * 2**30)
        for a, b in capabilities
    ]
    return SimpleNamespace(
        cuda=SimpleNamespace(
            device_count=lambda: len(devices), get_device_properties=devices.__getitem__
        ),
        version=SimpleNamespace(cuda=cuda),
    )


def test_gpus() -> None:
    new, old = doctor.gpus(fake_torch((9, 0), (7, 5)), "580.1")
    assert (new.state, old.state) == ("ok", "note")
    assert new.value == "GPU, capability 9.0, 80.0 GiB, driver 580.1"
    assert [f.state for f in doctor.gpus(fake_torch(), "")] == ["note"]
    assert [f.state for f in doctor.gpus(None, "")] == ["note"]
    assert "built for CUDA" in doctor.gpus(fake_torch(cuda=None), "580.1")[0].advice
    assert "CUDA_VISIBLE_DEVICES" in doctor.gpus(fake_torch(), "580.1")[0].advice
    assert doctor.gpus(fake_torch(), "580.1")[0].state == "problem"


def test_bf16_needs_sm80_on_every_gpu() -> None:
    assert doctor.bf16(fake_torch((9, 0))).value == "on the GPU"
    assert doctor.bf16(fake_torch((9, 0), (7, 5))).state == "note"


def test_interpreter_is_a_problem_beside_a_gpu() -> None:
    on = {"TRITON_INTERPRET": "1"}
    assert doctor.triton_interpret(on, has_gpu=True).state == "problem"
    assert doctor.triton_interpret(on, has_gpu=False).state == "note"
    assert doctor.triton_interpret({"TRITON_INTERPRET": "0"}, has_gpu=True).state == "ok"


def test_shared_memory_against_the_workers_need(tmp_path: Path) -> None:
    assert doctor.shared_memory(tmp_path, workers=0).state == "ok"
    crowded = doctor.shared_memory(tmp_path, workers=10**9)
    assert crowded.state == "problem" and "--shm-size" in crowded.advice
    assert doctor.shared_memory(tmp_path / "gone", workers=4).value == "absent"


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert "GiB free" in doctor.disk(tmp_path / "a" / "b").value


def test_few_cores_name_a_better_setting() -> None:
    assert doctor.cpus(16, 4) == Finding("cpu", "16 cores")
    assert "--data.workers 1" in doctor.cpus(2, 4).advice


# --------------------------------------------------------------------------------------- rendering

FINDINGS = [
    Finding("python", "3.11"),
    Finding("gpu", "none", "note", "Slow."),
    Finding("torch", "[missing]", "problem", "Install it."),
]


def test_plain_lines_end_with_what_to_do_problems_first() -> None:
    lines = doctor.render(FINDINGS).splitlines()
    assert lines[0].split() == ["ok", "python", "3.11"]
    assert lines[-2:] == ["problem  torch: Install it.", "note     gpu: Slow."]
    assert doctor.has_problem(FINDINGS) and not doctor.has_problem(FINDINGS[:2])
    assert "\x1b" not in "".join(lines)


def test_terminal_gets_colours_and_literal_brackets() -> None:
    text = doctor.render(FINDINGS, tty=True)
    assert "\x1b[" in text and "[missing]" in text


def test_this_machine() -> None:
    findings = {finding.name: finding for finding in doctor.examine(workers=0)}
    assert findings["torch"].state == "ok" and findings["pillow"].state == "ok"
    assert {"gpu", "gpu 0"} & set(findings)


# ---------------------------------------------------------------------------------------- --report


def write_run(folder: Path, config: dict, rows: int, age: float) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"kind": "train", "step": step}) for step in range(1, rows + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for path in folder.iterdir():
        os.utime(path, (time.time() - age,) * 2)


def test_report_describes_the_newest_run_and_omits_secrets(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    runs = tmp_path / "home" / "runs"
    write_run(runs / "old", {"recipe": "old_recipe"}, rows=3, age=900)
    write_run(runs / "deep" / "new", {
        "recipe": "new_recipe", "data": {"root": f"{tmp_path}/home/images"},
        "teacher": "https://name:hunter2@host/file",
    }, rows=30, age=60)  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": "3",
        "NCCL_DEBUG": "INFO",
        "TORCH_LOGS": "my_token=hunter2",
        "WANDB_API_KEY": "hunter2",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "HOME": "/hunter2",
        "PATH": "/hunter2/bin",
    }
    text = doctor.bug_report(FINDINGS, runs, environment)
    assert "hunter2" not in text and "WANDB" not in text and str(tmp_path) not in text
    assert "OMP_NUM_THREADS=3\n" in text and "NCCL_DEBUG=INFO\n" in text
    assert "TORCH_LOGS=(left out" in text
    assert '"new_recipe"' in text and "old_recipe" not in text
    assert 'data.root = "~/images"' in text and "~/runs/deep/new" in text
    steps = [json.loads(line)["step"] for line in text.splitlines() if line.startswith("{")]
    assert steps == list(range(31 - doctor.LOG_ROWS, 31))
    assert "problem  torch: Install it." in text
    assert f"torch {importlib.metadata.version('torch')}\n" in text


@pytest.mark.parametrize("config", ["{", "[1]", ""])
def test_report_of_a_broken_or_missing_run(config: str, tmp_path: Path) -> None:
    assert f"no run in {tmp_path}" in doctor.bug_report(FINDINGS, tmp_path, {})
    (tmp_path / "config.json").write_text(config)
    text = doctor.bug_report(FINDINGS, tmp_path, {})
    assert "== newest run ==" in text and "No such file" in text
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert "metrics.jsonl is a FIFO" in doctor.bug_report(FINDINGS, tmp_path, {})


def test_report_verb_writes_one_file(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--report"]) == 0
    assert "read it before you send it" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["deit-fast-report.txt"]
    text = Path("deit-fast-report.txt").read_text()
    assert "== machine ==" in text and "== environment ==" in text
