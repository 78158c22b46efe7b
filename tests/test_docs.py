"""The commands of README and docs run here, on a few small images.

Every fenced block of README.md, CONTRIBUTING.md and docs/*.md is run, page by page, in one folder.
The tables below say which file replaces a name, which settings make a command small, and which
commands do not run, each with its reason. A command that no table covers fails.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.caches import tinyvit_rows, write_tinyvit
from helpers.digits import write_few_digits
from helpers.images import picture

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("sh", "python")
SHOWN = ("tree", "text", "{eval-rst}", "json")  # not commands
SECONDS = 120  # of a command in a process of its own

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
    r"sbatch ": "needs Slurm; tests/test_examples.py plays its commands",
    r"kubectl ": "needs a cluster; tests/test_examples.py reads the file",
    r"python -m bench (?!plot|summary|roofline)": "minutes; test_bench.py; names checked below",
    r"python -m deit_fast\.kernels\.aot": "minutes; tests/test_aot.py",
    r"python -m pytest": "is the test suite",
}
NEEDS = {"--track tensorboard": "tensorboard", "--data.loader dali-cpu": "nvidia.dali"}
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


# ---------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that the pages speak of; the working folder of all commands."""
    from safetensors.torch import save_file

    from deit_fast.cli import main
    from deit_fast.models.convnet import small_convnet

    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    write_few_digits(folder / "images", train=4, val=2)
    write_few_digits(folder / "more", train=26, val=1)
    weights = {name: value.contiguous() for name, value in small_convnet(10).state_dict().items()}
    save_file(weights, "weights.safetensors")
    teacher = folder / "runs/demo/seed-0/teacher"
    teacher.mkdir(parents=True)
    shutil.copy("weights.safetensors", teacher / "model.safetensors")
    (folder / "runs/demo/data").symlink_to(folder / "images")
    picture(1, 120, 90).save("photo.jpg")
    write_shards(folder / "images", folder / "SHARDS")
    for epoch in (0, 1):
        rows = tinyvit_rows([f"n01/{i}.JPEG" for i in range(6)], 5, 1000, epoch)
        write_tinyvit(folder / "TINYVIT", 5, epoch, [rows])
    results = sorted((ROOT / "bench/results/cpu").glob("2*.json"))
    for name in ("kernels.json", "results.json"):
        shutil.copy(results[-1], folder / name)
    base = "precompute --recipe deit_small_distilled --data.root images --cache CACHE --teacher "
    assert main(small(shlex.split(base + STAND_INS["timm:regnety_160@weights.safetensors"]))) == 0
    yield folder
    os.chdir(before)


def write_shards(images: Path, shards: Path) -> None:
    import io
    import tarfile

    for split in ("train", "val"):
        (shards / split).mkdir(parents=True)
        with tarfile.open(shards / split / "000.tar", "w") as archive:
            for path in sorted((images / split).glob("*/*.png")):
                label = path.parent.name.encode()
                for suffix, content in (("png", path.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.names: dict[str, object] = {"__name__": "__page__"}

    def run(self, command: str) -> str:
        """Run a command; why it failed or was not run, or nothing."""
        for needed, package in NEEDS.items():
            top = importlib.util.find_spec(package.split(".")[0])
            if needed in command and not (top and importlib.util.find_spec(package)):
                return ""
        if any(re.match(pattern, bare(command)) for pattern in NOT_RUN):
            return ""
        for name, value in STAND_INS.items():
            command = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w])", value, command)
        words = shlex.split(command)
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
                return self.outside([sys.executable, "-m", "torch.distributed.run",
                                     *words[1:after], *small(words[after:])])  # fmt: skip
            words = ["deit-fast", *words[after:]]
        if words[:3] == ["python", "-m", "deit_fast"]:
            words = ["deit-fast", *words[3:]]
        if words[0] == "deit-fast":
            return self.in_process("deit_fast.cli", small(words[1:]))
        if words[0] == "ls":
            return self.outside(words)
        return "is neither run nor listed in NOT_RUN"

    def in_process(self, module: str, words: list[str]) -> str:
        main = importlib.import_module(module).main
        status = main(words)
        said = self.capsys.readouterr()
        if (status or 0) in STATUS.get(words[0], (0,)):
            return ""
        return f"status {status}: {said.err[-1500:]}"

    def outside(self, words: list[str]) -> str:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=SECONDS)
        return "" if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-1500:]}"


def bare(command: str) -> str:
    """The command without variables set before it."""
    return re.sub(r"^(\w+=\S+ )+", "", command)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, folder, monkeypatch, capsys):
    shell = Shell(monkeypatch, capsys)
    for block in blocks(page):
        assert block.language in RUN + SHOWN, f"{block.location}: language {block.language!r}"
        if block.language == "python":
            exec(compile(block.text, block.location, "exec"), shell.names)
        elif block.language == "sh":
            for command in commands(block.text):
                failed = shell.run(command)
                assert not failed, f"{block.location}: {command}\n{failed}"


def test_a_wrong_command_is_noticed(folder, monkeypatch, capsys):
    shell = Shell(monkeypatch, capsys)
    assert "NOT_RUN" in shell.run("rm -r IMAGENET")
    wrong = shell.run("deit-fast train --recipe deit_small --data.rot DIR")
    assert "status 2" in wrong and "--data.rot" in wrong
    assert "status 2" in shell.run("deit-fast evaluate runs/none")


# --------------------------------------------------------------------------------- without running


def all_commands() -> list[tuple[str, str]]:
    return [(block.location, command) for page in PAGES for block in blocks(page)
            if block.language == "sh" for command in commands(block.text)]  # fmt: skip


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [(where, c.split()[1]) for where, c in all_commands() if c.startswith("make ")]
    text = "".join(page.read_text() for page in PAGES)
    named += [("in the text", name) for name in re.findall(r"`make ([a-z][\w-]*)", text)]
    assert len(named) > 5
    for where, name in named:
        assert name in targets, f"{where}: make {name}"


def test_benches_exist():
    from bench.__main__ import PROGRAMS, select

    text = "\n".join(page.read_text() for page in PAGES)
    names = set(re.findall(r"python -m bench ([\w-]+)", text)) - {*PROGRAMS, "NAME"}
    assert {"all", "kernels"} <= names
    for name in names:
        select(name)


def test_every_reason_is_needed():
    seen = [bare(command) for _, command in all_commands()]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in seen), f"{pattern} matches nothing"


def table_cells(page: Path, column: int) -> list[str]:
    rows = [line.strip().strip("|").split("|") for line in page.read_text().splitlines()
            if line.startswith("| ")]  # fmt: skip
    return [row[column].strip() for row in rows if len(row) > column]


def test_flags_of_the_migration_tables_exist():
    from deit_fast.config_file import dotted_keys

    known = {"--" + key.replace("_", "-") for key in dotted_keys()}
    cells = table_cells(ROOT / "docs" / "migration.md", 1)
    flags = [flag for cell in cells for flag in re.findall(r"`(--[\w.-]*\w)", cell)]
    assert len(flags) > 60
    assert not [flag for flag in flags if flag not in known]


def strings_of_the_code() -> str:
    """All texts in the engine's code, what an f-string puts in between as a dot."""
    texts = []
    for path in (ROOT / "deit_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_of_the_operations_page_are_those_of_the_code():
    code = strings_of_the_code()
    cells = table_cells(ROOT / "docs" / "operations.md", 0)
    messages = [cell.strip("`") for cell in cells if cell.startswith("`")]
    assert len(messages) > 20
    for message in messages:
        parts = [part.strip(" ();:,") for part in message.split("…")]
        longest = [part for part in parts if len(part) >= 5]
        assert longest, message
        for part in longest:
            assert part in code, f"{part!r} of the message {message!r} is not in the code"


@pytest.mark.parametrize("page", ["operations.md", "kernels.md"])
def test_tests_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert named and len(named) == text.count(".py::")
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_docs(page):
    """Those inside are Sphinx's business (make lint)."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / (path or page)
        assert file.exists(), f"{page}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page}: {target}"
