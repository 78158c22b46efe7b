"""The commands of README and docs run here, on a few small images.

Every fenced block of README.md, CONTRIBUTING.md and docs/*.md is run, page by page, in one folder.
The commands of the pages in UNMODIFIED run as they are printed. On other pages the tables of
helpers/pages.py say which file replaces a name and which settings make a command small; each of
these pages says so. NOT_RUN lists what does not run, each with its reason. A command that no table
covers fails. README and the page about own images have a file of tests of their own.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.digits import write_few_digits
from helpers.foreign import raygen_sample, tinyvit_rows, write_fkd, write_raygen, write_tinyvit
from helpers.images import picture
from helpers.pages import (
    NOT_RUN,
    OWN_IMAGES,
    PAGES,
    REPLACED,
    ROOT,
    STAND_INS,
    UNMODIFIED,
    Shell,
    bare,
    blocks,
    commands,
    run_page,
    small,
    stand_in,
)  # fmt: skip

# ---------------------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that the pages speak of; the working folder of all commands."""
    from safetensors.torch import save_file

    from deit_fast.cli import main
    from deit_fast.models.convnet import small_convnet
    from deit_fast.tools.demo import write_digits

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
    write_digits(folder / "runs/demo/data")
    picture(1, 120, 90).save("photo.jpg")
    write_shards(folder / "images", folder / "SHARDS")
    if importlib.util.find_spec("pyarrow"):
        write_hub(folder / "images", folder / "HUB")
    for epoch in (0, 1):
        rows = tinyvit_rows([f"n01/{i}.JPEG" for i in range(6)], 5, 1000, epoch)
        write_tinyvit(folder / "TINYVIT", 5, epoch, [rows])
    write_raygen(folder / "DATACOMPDR", [[raygen_sample(f"{i:08x}", i) for i in range(3)]])
    write_fkd(folder / "FKD", "train/n01/1", 5, 4)
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


def write_hub(images: Path, hub: Path) -> None:
    from helpers.tables import table_of, write_parquet

    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((images / split).glob("*/*.png"))
        labels = [int(path.parent.name) for path in paths]
        table = table_of([path.read_bytes() for path in paths], labels, list("0123456789"))
        write_parquet(table, hub / "data", name)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OWN_IMAGES], ids=lambda page: page.name
)
def test_commands_run(page, folder, monkeypatch):
    run_page(page, Shell(monkeypatch, literal=page.name in UNMODIFIED))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in UNMODIFIED], ids=lambda page: page.name
)
def test_pages_say_what_their_test_replaces(page):
    """Each that has a command which the tables change."""
    changed = []
    for block in blocks(page):
        for command in commands(block.text) if block.language == "sh" else []:
            if any(re.match(pattern, bare(command)) for pattern in NOT_RUN):
                continue
            words = shlex.split(command)
            is_small = words[0] == "deit-fast" and small(words[1:]) != words[1:]
            if is_small or stand_in(command) != command:
                changed.append(command)
    assert bool(changed) == (REPLACED in page.read_text()), changed[:3]


def test_a_wrong_command_is_noticed(folder, monkeypatch):
    shell = Shell(monkeypatch)
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
