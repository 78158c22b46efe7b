"""Nonsense for every flag of every verb: one line, status 2, and nothing changed on the disk.

A seeded sample runs by default. DEIT_FAST_SWEEP=N runs N inputs, against a finished run and a
cache, so that what is accepted is also used; DEIT_FAST_SEED chooses others.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deit_fast import cli
from deit_fast.arguments import PrecomputeArguments, TrainArguments
from deit_fast.config_file import dotted_keys
from deit_fast.models.convnet import small_convnet
from helpers.digits import write_few_digits

EVERYTHING = "DEIT_FAST_SWEEP" in os.environ
SAMPLE = int(os.environ.get("DEIT_FAST_SWEEP", 60))
SEED = int(os.environ.get("DEIT_FAST_SEED", 0))
SECONDS = 120  # more is a hang

# Values; `{}` is a folder with one path of each kind.
NONSENSE = [
    "", " ", "-", "--", "=", "x", "none", "None", "nan", "inf", "-inf", "0", "-1", "1e308",
    "-1e308", "0x10", "1_0", "1,5", str(2**31), str(2**63), str(2**70), "9" * 5000, "x" * 10_000,
    "\0", "a\0b", "\udcff", "\x1b[31mred", "a\nb", "{}/fifo", "{}/folder", "{}/text", "{}/dangling",
    "{}/loop", "{}/missing", "{}/text/below", "{}/sealed.json", "/dev/full", "/dev/zero", "/proc/x",
    "timm:x", "os:abort", "no.module:x", "timm:resnet18@{}/fifo",
]  # fmt: skip
WRITTEN_ANYWHERE = ("deit-fast-report.txt",)  # by `doctor --report`


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("values")
    write_few_digits(root / "data")
    save_file(small_convnet(10).state_dict(), root / "teacher.safetensors")
    for name in ("folder", "out"):
        (root / name).mkdir()
    (root / "text").write_text("text")
    (root / "sealed.json").write_text('{"crc32c": "00000000"}')
    os.mkfifo(root / "fifo")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    if EVERYTHING:
        assert cli.main(command("precompute", root, cache="cache")) == 0
        assert cli.main(command("train", root, cache="cache", output="run")) == 0
    return root


def command(verb: str, root: Path, cache: str = "out/cache", output: str = "out/run") -> list[str]:
    """A right command, but for a demo, whose outputs cannot be written."""
    run, made = (f"{root}/run", f"{root}/cache") if EVERYTHING else (f"{root}/missing",) * 2
    settings = [
        "--recipe", "digits_student", "--epochs", "1", "--view.repeats", "1", "--num-views", "1",
        "--batch-size", "32", "--data.root", f"{root}/data", "--data.workers", "0", "--teacher",
        f"deit_fast.models.convnet:small_convnet@{root}/teacher.safetensors",
        "--output", f"{root}/{output}", "--cache", f"{root}/{cache}",
    ]  # fmt: skip
    out = f"{root}/out"
    words = {
        "demo": ["--output", "/proc/x", "--save", "/proc/x"],
        "pack": [f"{root}/data", out, "--workers", "1"],
        "train": [*settings, "--max-steps", "1", "--cache", made],
        "precompute": settings,
        "evaluate": [run],
        "analyze": [run, "--max-images", "8", "--maps", "1"],
        "report": [run, "--output", f"{out}/report.html"],
        "cache info": [made],
        "cache verify": [made],
        "cache export": [made, "--output", f"{out}/cache.pt"],
        "recipes show": ["deit_small"],
    }
    return [*verb.split(), *words.get(verb, [])]


def flags(verb: str) -> list[str]:
    if verb in ("train", "precompute"):
        own = {"train": TrainArguments, "precompute": PrecomputeArguments}[verb]
        names = {*dotted_keys(), "config", *(own.__annotations__)}
        return sorted(f"--{name}".replace("_", "-") for name in names)
    parameters = inspect.signature(cli.VERBS[verb]).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [f"--{name}".replace("_", "-") for name in named]


def commands(root: Path) -> Iterator[list[str]]:
    values = [value.replace("{}", str(root)) for value in NONSENSE]
    for verb in cli.VERBS:
        right = command(verb, root)
        start = len(verb.split())
        for value in values:
            yield from ([*right, flag, value] for flag in flags(verb))
            for place in range(start, len(right)):
                if right[start].startswith("--") or right[place].startswith("--"):
                    break
                yield [*right[:place], value, *right[place + 1 :]]
            yield [*right, value]
            yield [value, *right]


def on_disk(root: Path) -> str:
    """Digest of the names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        digest.update(repr((str(path), path.read_bytes() if is_file else None)).encode())
    return digest.hexdigest()


class Hang(BaseException):
    """A command did not end; no handler of the product catches this."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(words: list[str], capsys: pytest.CaptureFixture) -> tuple[str, str]:
    """`refused`, `accepted` or what went wrong, with stderr."""
    capsys.readouterr()
    torch.manual_seed(0)
    try:
        with limited():
            status = cli.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Hang:
        return "hang", ""
    except BaseException as error:
        return f"crash {type(error).__name__}: {error}"[:300], ""
    err = capsys.readouterr().err
    lines = err.splitlines()
    if status in (0, 1):
        return "accepted", err
    errors = [line for line in lines if line.startswith("deit-fast: error: ")]
    is_right = status == 2 and len(errors) == 1 and lines[-1] == errors[0]
    readable = all(char.isprintable() or char == "\n" for char in err)
    return "refused" if is_right and readable else f"wrong: status {status}", err


def test_nonsense_for_every_flag(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "folder")
    chosen = list(commands(folder))
    random.Random(SEED).shuffle(chosen)
    chosen = chosen[:SAMPLE]
    clean = on_disk(folder)
    counts: Counter[str] = Counter()
    faults = []
    for words in chosen:
        outcome, err = judge(words, capsys)
        if outcome == "refused" and on_disk(folder) != clean:
            outcome = "wrong: changed the disk"
        counts[re.split("[: ]", outcome)[0]] += 1
        if outcome not in ("refused", "accepted"):
            faults.append((outcome, [word[:80] for word in words], err[-500:]))
            with capsys.disabled():
                print(faults[-1], flush=True)
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        if outcome != "refused" and on_disk(folder) != clean:
            for name in WRITTEN_ANYWHERE:
                (folder / "folder" / name).unlink(missing_ok=True)
            clean = on_disk(folder)
    with capsys.disabled():
        print(f"\n{len(chosen)} inputs: {dict(counts)}")
    assert not faults, faults[:5]
