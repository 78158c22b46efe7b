"""Blocks of README and docs, and a shell that runs their commands in this process."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("sh", "python")
SHOWN = ("tree", "text", "{eval-rst}", "json")  # not commands
SECONDS = 120  # of a command in a process of its own

OWN_IMAGES = ("README.md", "own-images.md")  # run by tests/test_own_images.py
UNMODIFIED = ("quickstart.md", *OWN_IMAGES)
REPLACED = "In the test of this page"  # begins the remark on what the test replaces
STAND_INS = {
    "timm:regnety_160@weights.safetensors":
        "deit_fast.models.convnet:small_convnet@weights.safetensors",  # 84 million weights
    "--data.root DIR --compat deit": "--data.root more --compat deit",  # RASampler needs 256 images
    "--batch-size 1024 --batch-schedule 30 2048 60 4096":
        "--batch-size 16 --batch-schedule 1 32 2 8 --max-steps 4",  # two steps, one, four
    "--optim.decay-epochs 30": "--optim.decay-epochs 1",  # epochs 3, of two steps
    "--optim.decay-epochs 10": "--optim.decay-epochs 1",
    "step-000125100": "step-000000002",
    "--teacher-floor 0.5": "--teacher-floor 0",  # its weights are random
    "timm:vit_base_patch16_dinov3.lvd1689m": "helpers.feature_teacher:transformer",
    "--recipe deit_small_dinov3": "--recipe deit_small_dinov3 --features.grid 2",  # of 4 x 4
    "IMAGENET": "images",
    "DIR": "images",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "timm:regnety_160.deit_in1k": "deit_fast.models.convnet:small_convnet@weights.safetensors",
}  # fmt: skip
SMALL = {  # where a command does not say otherwise itself
    "--batch-size": "16", "--epochs": "3", "--device": "cpu", "--data.workers": "0",
    "--view.image-size": "32",
}  # fmt: skip
SMALL_TRAIN = {"--max-steps": "2", "--log-every": "1", "--optim.warmup-epochs": "0"}
SMALL_MODEL = {"--model.args": "patch_size=8 embed_dim=32 depth=2 num_heads=2"}
NOT_RUN = {
    r"make [\w-]+( \w+=\S+)*$": "test_make_targets_exist; what they run has tests of its own",
    r"python3 -m venv ": "the tests run inside an environment",
    r"source ": "the tests run inside an environment",
    r"python -m pip ": "installs",
    r"deit-fast demo": "minutes; tests/test_demo.py",
    r"hf download ": "needs a network",
    r"deit-fast .*s3://": "needs a bucket; tests/test_remote_shards.py has one",
    r"python -m deit_fast\.integrations\.ray ": "needs a bucket; tests/test_ray.py has a cluster",
    r"sbatch ": "needs Slurm; tests/test_examples.py plays its commands",
    r"kubectl ": "needs a cluster; tests/test_examples.py reads the file",
    r"python -m bench (?!plot|summary|roofline)": "minutes; test_bench.py; names checked below",
    r"python -m deit_fast\.kernels\.aot": "minutes; tests/test_aot.py",
    r"python -m pytest": "is the test suite",
}
NEEDS = {
    "source hf": "pyarrow",
    "--track tensorboard": "tensorboard",
    "--data.loader dali-cpu": "nvidia.dali",
}
STATUS = {"doctor": (0, 1)}  # 1: this machine has a problem


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def location(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            text = "\n".join(lines[start + 1 : number])
            yield Block(page, start + 2, lines[start][3:].strip(), text)
            start = None


def commands(text: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.split("  #")[0].split(" # ")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def stand_in(command: str) -> str:
    """A command with the files of the test in place of the names in STAND_INS."""
    for name, value in STAND_INS.items():
        command = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w])", value, command)
    return command


def small(words: list[str]) -> list[str]:
    """A verb's words with the settings that make it small, where it takes them."""
    if words[0] not in ("train", "precompute"):
        extra = {"--device": "cpu"} if words[0] in ("evaluate", "analyze") else {}
    else:
        extra = dict(SMALL)
        if words[0] == "train":
            extra |= SMALL_TRAIN
        factory = any(":" in words[i + 1] for i, w in enumerate(words) if w == "--model.name")
        extra |= {} if factory else SMALL_MODEL
    if words[:2] == ["cache", "verify"] and "--teacher" in words:
        extra = {"--device": "cpu", "--samples": "4"}
    return words + [word for flag, value in extra.items() if flag not in words
                    for word in (flag, *value.split())]  # fmt: skip


class Shell:
    """Runs the commands of one page."""

    launched: set[str] = set()  # noqa: RUF012  # verbs that torchrun has started in this session

    def __init__(self, monkeypatch: pytest.MonkeyPatch, literal: bool = False) -> None:
        self.monkeypatch, self.literal = monkeypatch, literal
        self.names: dict[str, object] = {"__name__": "__page__"}

    def run(self, command: str) -> str:
        """Run a command; why it failed or was not run, or nothing."""
        for needed, package in NEEDS.items():
            top = importlib.util.find_spec(package.split(".")[0])
            if needed in command and not (top and importlib.util.find_spec(package)):
                return ""
        if any(re.match(pattern, bare(command)) for pattern in NOT_RUN):
            return ""
        words = shlex.split(command if self.literal else stand_in(command))
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            if name == "PYTHONPATH":
                self.monkeypatch.syspath_prepend(Path(value).absolute())
            else:
                self.monkeypatch.setenv(name, value)
        if words[:3] == ["python", "-m", "bench"]:
            return self.in_process("bench.__main__", words[3:])
        if words[0] == "torchrun":
            after = words.index("deit_fast") + 1
            if words[after] not in self.launched:
                self.launched.add(words[after])
                rest = words[after:] if self.literal else small(words[after:])
                return self.outside([sys.executable, "-m", "torch.distributed.run",
                                     *words[1:after], *rest])  # fmt: skip
            words = ["deit-fast", *words[after:]]
        if words[:3] == ["python", "-m", "deit_fast"]:
            words = ["deit-fast", *words[3:]]
        if words[0] == "deit-fast":
            return self.in_process("deit_fast.cli", words[1:] if self.literal else small(words[1:]))
        if words[0] == "ls":
            return self.outside(words)
        return "is neither run nor listed in NOT_RUN"

    def in_process(self, module: str, words: list[str]) -> str:
        main = importlib.import_module(module).main
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(words)
        if (status or 0) in STATUS.get(words[0], (0,)):
            return ""
        return f"status {status}: {said.getvalue()[-1500:]}"

    def outside(self, words: list[str]) -> str:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=SECONDS)
        return "" if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-1500:]}"


def bare(command: str) -> str:
    """The command without variables set before it."""
    return re.sub(r"^(\w+=\S+ )+", "", command)


def run_page(page: Path, shell: Shell) -> None:
    """Run all blocks of a page in the working folder; fails at the first that fails."""
    for block in blocks(page):
        assert block.language in RUN + SHOWN, f"{block.location}: language {block.language!r}"
        if block.language == "python":
            exec(compile(block.text, block.location, "exec"), shell.names)
        elif block.language == "sh":
            for command in commands(block.text):
                failed = shell.run(command)
                assert not failed, f"{block.location}: {command}\n{failed}"
