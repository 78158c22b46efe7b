"""Wrong paths: what the message says, and that it comes without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_TEACHER = "--loss.kind none"
TEACHER = "train --data.root data --teacher timm:resnet18@"
WRONG = {
    # images
    "train --data.root dat": "folder dat does not exist (did you mean data?); expected dat/train",
    "train --data.root page.pth": "image folder page.pth is a file, not a folder",
    "train": "data.root is not set; expected a folder with train/<class>/<image>",
    "train --data.root data/train": "it is a split; did you mean its parent, data?",
    "train --data.root data/val/": "it is a split; did you mean its parent, data?",
    "train --data.root data/train/cat": "the folder of one class; did you mean data?",
    "train --data.root box": "its folder 'data' has it; did you mean box/data?",
    "train --data.root named": "rename its folder 'training', or link it: `ln -s training named",
    "train --data.root flat": "its folders, such as 'cat', look like classes: move most images of",
    "train --data.root flat/cat": "it holds images, which need a folder for each class, in train/",
    "train --data.root shallow": "shallow/train has no class folders: it holds images, which need",
    "train --data.root deep": "has one class, 'all': a classifier needs two or more; its "
    "folders, such as 'cat' and 'dog', look like the classes: move them up into deep/train",
    "train --data.root only": "only/train has one class, 'cat': a classifier needs two or more",
    "train --data.root unheld": "has no split 'val': move some images of each class from train/",
    "train --data.root tars": "it holds tar shards, which --data.source tar reads",
    "train --data.source tar --data.root nowhere": "error: folder nowhere of data.source=tar does "
    "not exist; expected nowhere/train/*.tar",
    "train --data.source packed --data.root dat": "error: folder dat of data.source=packed does "
    "not exist (did you mean data?); expected dat/train/manifest.json",
    "train --data.source hf --data.root page.pth": "error: folder page.pth of data.source=hf is a "
    "file, not a folder; expected train-*.parquet in page.pth or page.pth/data, or a folder of",
    "pack nowhere out --source hf": "error: folder nowhere of data.source=hf does not exist",
    "precompute --teacher timm:resnet18 --cache new --data.root flat": "look like classes",
    "evaluate run --data-root data/val": "did you mean its parent, data?",
    "analyze run --data-root nowhere": "error: data_root: folder nowhere does not exist; expected "
    "images, such as nowhere/val/<class>/<image>",
    "evaluate run --data-root hub": "hub has no split 'val': expected val-*.parquet or validation-",
    "cache info empty --data-root s3://b/x?y": "a user, a query or a # in a URL is not read",
    "pack data data/": "OUT data/ is ROOT itself: name a folder of its own for the shards",
    "pack data/train out": "did you mean its parent, data?",
    "cache info empty --data-root nowhere": "error: data_root: folder nowhere does not exist; exp",
    # weights and teachers
    f"{TEACHER}gone.pth": "weights file gone.pth does not exist",
    f"{TEACHER}s3://bucket/x.pth": "weights s3://bucket/x.pth are at a URL: copy them to a file",
    f"{TEACHER}page.pht": "weights file page.pht does not exist (did you mean page.pth?)",
    f"{TEACHER}page.pth": "weights file page.pth is a web page, not weights: download the file",
    f"{TEACHER}pointer.safetensors": "is a pointer of git-lfs, not the weights: run `git lfs pull`",
    f"{TEACHER}empty.pth": "weights file empty.pth is empty: download it again",
    f"{TEACHER}error.bin": "weights file error.bin is JSON text, not weights",
    f"{TEACHER}zip.safetensors": "is a checkpoint of torch.save: rename it to zip.pth",
    f"{TEACHER}names.txt": "weights file names.txt is a text file, not weights",
    f"{TEACHER}part.pth": "part.pth is cut off: its end is missing; download it again",
    f"{TEACHER}tensors.pth": "is a safetensors file: rename it to tensors.safetensors",
    f"{TEACHER}run": "run is a folder, not a file; did you mean run/model.safetensors?",
    TEACHER: "teacher 'timm:resnet18@' names no file after @",
    "train --data.root data --teacher resnet18": "(did you mean timm:resnet18?)",
    "train --data.root data --teacher page.pth": "a file needs its model's name before it",
    f"{TEACHER}run/model.safetensors --teacher-classes no.txt": "file no.txt does not exist",
    f"train --data.root data {NO_TEACHER} --model.weights page.pth": "is a web page, not weights",
    f"train --data.root data {NO_TEACHER} --resume-from gone.pt": "gone.pt does not exist",
    "precompute --data.root data --cache new": "precompute needs --teacher SPEC",
    "precompute --data.root data --cache new --teacher resnet18": "(did you mean timm:resnet18?)",
    "analyze run --teacher timm:resnet18@gone.pth": "weights file gone.pth does not exist",
    "cache verify empty --teacher resnet18 --data-root data": "(did you mean timm:resnet18?)",
    # caches and runs
    "train --data.root data": "loss.kind=hard needs --teacher SPEC or --cache DIR, or --loss.kind",
    "train --data.root data --cache empty": "empty is not a cache: it has no manifest.json",
    "cache info nowhere": "nowhere is no cache: it does not exist; check the path",
    "cache verify nowhere": "nowhere is no cache: it does not exist; check the path",
    "cache export nowhere --output x.pt": "nowhere is no cache: it does not exist; check the path",
    "evaluate rum": "run folder rum does not exist (did you mean run?)",
    "evaluate page.pth": "page.pth is a file: name the folder of the run",
    "evaluate runs": "it holds runs: name one of them, such as runs/a",
    "report empty --output page.html": "is not the folder of a run: empty/config.json does not",
    "analyze empty": "is not the folder of a run: empty/config.json does not exist",
}  # fmt: skip


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, str]:
    """The line on stderr of each command, from one process in which torch cannot be imported."""
    root = tmp_path_factory.mktemp("inputs")
    names = "data/train data/val box/data/train named/training flat deep/train/all unheld/train"
    for name in names.split():
        for label in ("cat", "dog"):
            (root / name / label).mkdir(parents=True)
            (root / name / label / "1.jpg").touch()
    for name in ("only/train/cat", "shallow/train", "tars/train", "empty", "run", "runs/a", "hub"):
        (root / name).mkdir(parents=True)
    for name in (
        "only/train/cat/1.jpg",
        "shallow/train/1.PNG",
        "tars/train/1.tar",
        "hub/train-00000-of-00001.parquet",
    ):
        (root / name).touch()
    tensors = (2).to_bytes(8, "little") + b"{}"
    files = {
        "page.pth": b"\n<!DOCTYPE html><html>not found</html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "empty.pth": b"",
        "error.bin": b'{"error": "Entry not found"}',
        "zip.safetensors": b"PK\x03\x04rest",
        "names.txt": b"cat\ndog\n",
        "part.pth": b"PK\x03\x04rest",
        "tensors.pth": tensors,
        "run/model.safetensors": tensors,
        "run/config.json": b"{}",
        "runs/a/config.json": b"{}",
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    before = sorted(root.rglob("*"))
    script = f"""
import contextlib, io, json, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm", "triton"):
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Guard())
from deit_fast.cli import main
found = {{}}
for command in {[*WRONG]!r}:
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            status = main(command.split())
        except AssertionError as error:
            status = error
    found[command] = box.getvalue() if status == 2 else f"status {{status}}: {{box.getvalue()}}"
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(root.rglob("*")) == before, "a command that was refused wrote something"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_path_is_one_line_that_helps_and_needs_no_torch(lines, command):
    line = lines[command]
    assert line.startswith("deit-fast: error: ") and line.count("\n") == 1, line
    assert WRONG[command] in line
