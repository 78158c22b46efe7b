"""What a person can get wrong: one clear line that names it, a non-zero exit, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deit_fast import cli
from deit_fast.models.convnet import small_convnet
from helpers.digits import write_few_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, a teacher's weights and a cache of one view."""
    root = tmp_path_factory.mktemp("bad-input")
    write_few_digits(root / "data")
    torch.manual_seed(0)
    save_file(small_convnet(10).state_dict(), root / "teacher.safetensors")
    save_file(small_convnet(4).state_dict(), root / "four.safetensors")
    assert cli.main(["precompute", *base(root), "--cache", f"{root}/cache"]) == 0
    return root


def base(root: Path, teacher: str = "teacher") -> list[str]:
    return [
        "--recipe", "digits_student", "--epochs", "1", "--view.repeats", "1", "--num-views", "1",
        "--batch-size", "32", "--data.root", f"{root}/data", "--data.workers", "0",
        "--teacher", f"deit_fast.models.convnet:small_convnet@{root}/{teacher}.safetensors",
    ]  # fmt: skip


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that must fail."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("deit-fast: error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    assert error.splitlines()[-1] == lines[0]
    return lines[0]


def test_missing_folder(folder, capsys, tmp_path):
    line = refused(capsys, "train", *base(folder), "--data.root", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line


def test_no_images(folder, capsys, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
    line = refused(capsys, "train", *base(folder), "--data.root", tmp_path)
    assert str(tmp_path) in line and "image" in line


def test_class_count_of_teacher_and_data_differ(folder, capsys):
    line = refused(capsys, "train", *base(folder, "four"))
    assert "four.safetensors" in line and "(4, 64)" in line and "(10, 64)" in line
    assert "fine-tune it first: deit-fast train --recipe finetune_teacher --data.root" in line


def test_cache_of_another_teacher(folder, capsys, tmp_path):
    torch.manual_seed(1)
    save_file(small_convnet(10).state_dict(), folder / "other.safetensors")
    line = refused(
        capsys, "train", *base(folder, "other"), "--cache", folder / "cache",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert "teacher.weights_sha256" in line and "view." not in line
    assert not (tmp_path / "run").exists()


def test_cache_of_another_recipe(folder, capsys):
    line = refused(
        capsys, "train", *base(folder), "--cache", folder / "cache",
        "--view.erase-prob", "0.5", "--view.mixup-alpha", "0.2",
    )  # fmt: skip
    assert "view.erase_prob" in line and "view.mixup_alpha" in line and "teacher" not in line


def test_cache_of_another_data_set(folder, capsys, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    next((tmp_path / "data/train/7").iterdir()).rename(tmp_path / "data/train/7/renamed.png")
    line = refused(
        capsys, "train", *base(folder), "--cache", folder / "cache", "--data.root",
        tmp_path / "data",
    )  # fmt: skip
    assert "dataset.sha256" in line and "view." not in line


@pytest.mark.parametrize("damage", ["truncated", "bit flipped"])
def test_damaged_cache(folder, capsys, tmp_path, damage):
    shutil.copytree(folder / "cache", tmp_path / "cache")
    path = tmp_path / "cache/view-00000.dlc"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-40:]
    else:
        content[-3] ^= 1
    path.write_bytes(content)
    line = refused(
        capsys, "train", *base(folder), "--cache", tmp_path / "cache", "--output",
        tmp_path / "run",
    )  # fmt: skip
    assert "view-00000.dlc" in line
    if damage == "bit flipped":
        assert "block 0" in line and "with the command that precomputed the cache" in line
    assert cli.main(["cache", "verify", str(tmp_path / "cache")]) == 1
    assert "view-00000.dlc" in capsys.readouterr().out


def test_missing_cache_and_missing_view(folder, capsys, tmp_path):
    line = refused(capsys, "train", *base(folder), "--cache", tmp_path / "none")
    assert str(tmp_path / "none") in line
    line = refused(
        capsys, "train", *base(folder), "--cache", folder / "cache", "--epochs", "3",
        "--num-views", "3",
    )  # fmt: skip
    assert "lacks 2 of the run's 3 views, the first is 1: precompute them, or train with " in line
    assert line.rstrip().endswith("--num-views 1")


def test_cache_without_the_temperature_of_the_loss(folder, capsys, tmp_path):
    line = refused(
        capsys, "train", *base(folder), "--cache", folder / "cache", "--loss.kind", "soft",
        "--loss.tau", "3", "--output", tmp_path / "run",
    )  # fmt: skip
    assert f"cache {folder}/cache: the cache has no tail mass at temperature 3; recorded: 1" in line
    assert "set loss.tau to one of these, or precompute a cache with codec.temperatures" in line


FAULTY_CONFIGS = {
    "key twice": (b'{"seed": 1, "seed": 2}', "key 'seed' is there twice"),
    "dotted key": (b'{"view.image_size": 96}', """; write {"view": {"image_size": ...}}"""),
    "key of another group": (
        b'{"view": {"epochs": 1}}',
        "unknown setting 'view.epochs' (did you mean epochs?)",
    ),
    "no group": (b'{"view": 3}', "view is a group of settings, not 3"),
    "no text": (
        b'{"teacher": 3}',
        "teacher must be a text of 1 to 4096 characters without NUL, or none",
    ),
    "NUL": (b'{"output": "a\\u0000"}', "output must be a text of 1 to 4096 characters without NUL"),
    "hinton": (b'{"loss": {"reduction": "hinton"}}', "batchmean with loss.alpha = 2 a / (1 + a)"),
    "infinite": (b'{"optim": {"lr": 1e999}}', "optim.lr must be a number in (0, 100], not inf"),
    "lr_batch": (
        b'{"optim": {"lr": 1, "lr_batch": 0}}',
        "optim.lr_batch, here 0, is no longer a setting",
    ),
    "betas": (
        b'{"optim": {"betas": [1.5, 0.9]}}',
        "optim.betas, here 1.5 0.9, is no longer a setting",
    ),
    "long number": (b'{"seed": ' + b"9" * 5000 + b"}", "config.json is damaged: Exceeds the limit"),
    "nested endlessly": (b'{"seed": ' + b"[" * 10**6, "is damaged: maximum recursion depth"),
    "nested deeply": (
        b'{"seed": ' + b"[" * 400 + b"]" * 400 + b"}",
        "seed must be a whole number in [0, ",
    ),
    "long key": (b'{"' + b"x" * 10**6 + b'": 1}', "unknown setting 'xxx"),
    "list": (b"[]", "config.json is damaged: not a JSON object"),
    "empty": (b"", "config.json is damaged: Expecting value"),
    "not UTF-8": (b"\xff\xfe{}", "config.json is damaged: not UTF-8 text"),
}


@pytest.mark.parametrize("fault", FAULTY_CONFIGS)
def test_config_file_with_a_fault(capsys, tmp_path, fault):
    content, words = FAULTY_CONFIGS[fault]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    line = refused(capsys, "train", "--config", path, "--print-config")
    assert words in line and str(path) in line and len(line) < 500


FAULTY_TEXTS = {
    "key twice.yaml": ("seed: 1\nepochs: 2\nseed: 3\n", ', line 3: found duplicate key "seed"'),
    "open list.yml": ("track: [wandb\n", ", line 2: expected ',' or ']'"),
    "tab.yaml": ("view:\n\timage_size: 3\n", ", line 2: found character"),
    "python.yaml": (
        "seed: !!python/object:os.system 1\n",
        ", line 1: could not determine a constr",
    ),
    "two.yaml": ("seed: 1\n---\nseed: 2\n", ", line 2: but found another document"),
    "list.yaml": ("- seed\n", " is no mapping of settings to values"),
    "empty.yaml": ("", " is no mapping of settings to values"),
    "number.yaml": ("view:\n  1: 2\n", ": the key 1 is no text"),
    "date.yaml": ("output: 2026-01-01\n", "output must be a text of 1 to"),
    "deep.yaml": ("seed: " + "[" * 5000, ": maximum recursion depth"),
    "nul.yaml": ("seed: \0", ": unacceptable character"),
    "itself.yaml": ("track: &a [*a]", "track must be any number of values"),
    "near.yaml": ("view:\n  image_sise: 3\n", "'view.image_sise' (did you mean view.image_size?)"),
    "key twice.toml": ("seed = 1\nseed = 2\n", ": Cannot overwrite a value (at line 2"),
    "no value.toml": ("seed = \n", ": Invalid value (at line 1"),
    "type.toml": ("seed = 1.5\n", ": seed must be a whole number"),
}


@pytest.mark.parametrize("name", FAULTY_TEXTS)
def test_a_yaml_or_toml_file_with_a_fault(capsys, tmp_path, name):
    content, words = FAULTY_TEXTS[name]
    path = tmp_path / name
    path.write_text(content)
    line = refused(capsys, "train", "--config", path, "--print-config")
    assert f"config file {path}" in line and words in line and len(line) < 500


def test_a_nul_in_the_name_of_a_config_file(capsys):
    assert cli.main(["train", "--config", "a\0b"]) == 2
    assert "is no path: it holds a NUL character" in capsys.readouterr().err


def test_config_that_is_no_file(capsys, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, words in (
        (tmp_path / "fifo", "is a FIFO, not a file"),
        (tmp_path, "is a folder, not a file"),
        ("/dev/zero", "is a device, not a file"),
        (tmp_path / "missing", "does not exist"),
    ):
        assert f"{path} {words}" in refused(capsys, "train", "--config", path)


OUTPUTS = {
    "demo --output": "folder",
    "demo --save": "file",
    "demo --save-analysis": "file",
    "train --output": "folder",
    "precompute --cache": "folder",
    "analyze run --output": "file",
    "pack run": "folder",
    "report run --output": "file",
    "cache info run --html": "file",
    "cache export run --output": "file",
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    capsys, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "run").mkdir()
    os.mkfifo("fifo")
    wrong = ["file/below", "/proc/x", "/dev/full", "fifo", "dangling", "x" * 300]
    wrong.append("file" if OUTPUTS[command] == "folder" else "run")
    before = sorted(tmp_path.rglob("*"))
    for path in wrong:
        *words, last = command.split()
        line = refused(capsys, *words, last, path)
        assert path in line and (last in line or "OUT" in line)
        assert "choose another path" in line or "is a link to nowhere" in line
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_escapes_and_surrogates_are_shown_escaped(capsys):
    odd, shown = "a\x1b[31mb\udcff", r"a\x1b[31mb\udcff"
    for words in (
        ["report", odd], ["train", "--config", odd], ["train", "--device", odd], [odd],
        ["train", f"--{odd}"], ["recipes", "show", odd], ["cache", "info", odd],
        ["train", "--data.root", odd, "--loss.kind", "none"],
    ):  # fmt: skip
        assert shown in refused(capsys, *words)


@pytest.mark.parametrize("verb", ["report", "recipes list", "train --help"])
def test_output_in_a_locale_of_ascii(tmp_path, verb):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
                   "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    words = ["report", "\u00e9"] if verb == "report" else verb.split()
    done = subprocess.run(
        [sys.executable, "-m", "deit_fast", *words],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == (2 if verb == "report" else 0), done.stderr
    assert "Traceback" not in done.stderr


def test_arguments_that_timm_cannot_build(folder, capsys):
    for argument in ("depth=0", "num_heads=0", "in_chans=1", "depth=999999999", "weight_init=7"):
        line = refused(
            capsys, "train", *base(folder), "--loss.kind", "none", "--model.args", argument
        )
        assert argument.split("=")[0] in line or "args" in line


def test_unknown_config_key(folder, capsys, tmp_path):
    assert "did you mean" in refused(capsys, "train", "--optim.learning-rate", "1")
    (tmp_path / "run.json").write_text('{"view": {"image_sise": 32}}')
    line = refused(capsys, "train", "--config", tmp_path / "run.json")
    assert "view.image_sise" in line and "view.image_size" in line


def test_teacher_without_weights(folder, capsys):
    line = refused(capsys, "train", *base(folder), "--teacher", "timm:resnet18@no.safetensors")
    assert "no.safetensors does not exist" in line


def test_a_batch_larger_than_the_data(folder, capsys):
    line = refused(capsys, "train", *base(folder), "--batch-size", "1000")
    assert "batch_size=1000" in line and line.endswith("the largest is --batch-size 210")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_while_writing_a_cache(folder, capsys, small_disk):
    """The views that fit stay whole and readable; the next one is refused before its work."""
    arguments = [*base(folder), "--epochs", "20", "--num-views", "20"]
    line = refused(capsys, "precompute", *arguments, "--cache", small_disk / "cache")
    assert "no space" in line and "view-000" in line
    assert cli.main(["cache", "verify", str(small_disk / "cache")]) == 0
    assert "0 broken" in capsys.readouterr().out


def test_full_disk_while_saving_a_checkpoint(folder, capsys, small_disk):
    line = refused(
        capsys, "train", *base(folder), "--loss.kind", "none", "--output", small_disk / "run"
    )
    assert "no space" in line and "step-000000006.pt" in line
    left = [path.name for path in (small_disk / "run/checkpoints").iterdir()]
    assert left == [], "half a checkpoint was left behind"
