"""What a user gets who installs the project: source archive, wheel, metadata."""

from __future__ import annotations

import email.message
import email.policy
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

import pytest

import deit_fast

ROOT = Path(__file__).parent.parent
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # LICENSE-2.0.txt
PACKAGED = ("csrc", "deit_fast", "kernels")
TEXTS = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "NOTICE", "README.md",
         "SECURITY.md", "pyproject.toml", "setup.py"}  # fmt: skip
MADE_BY_SETUPTOOLS = re.compile(r"PKG-INFO|setup\.cfg|deit_fast\.egg-info/.*")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; it sees nothing of this checkout but what its arguments name."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DEIT_FAST"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tracked_files() -> list[str]:
    try:
        names = run("git", "ls-files", cwd=ROOT).splitlines()
    except (AssertionError, FileNotFoundError):
        pytest.skip("this folder is no git checkout")
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made from the tracked files alone: setuptools would also take what an old build names."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked_files():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=folder / "tree")
    return folder / f"deit_fast-{deit_fast.__version__}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built by pip from the source archive; without CUDA, whose compiler takes minutes."""
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
        "--wheel-dir", sdist.parent, sdist, cwd=sdist.parent, DEIT_FAST_CUDA="0")  # fmt: skip
    [path] = sdist.parent.glob("deit_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.EmailMessage:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return BytesParser(policy=email.policy.default).parsebytes(archive.read(name))


def test_licence_is_the_published_text():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(.*?)\]", text, re.M)[1] == deit_fast.__version__
    headings = set(re.findall(r"^### (.*)$", text, re.M))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.M)[1] == deit_fast.__version__
    assert re.search(r"^license: (.*)$", text, re.M)[1] == "Apache-2.0"


# --------------------------------------------------------------------------- make, and Dockerfile


@pytest.mark.parametrize(
    ("stamps", "target", "installed"),
    [
        ([], "demo", ["."]),
        ([], "lint", [".[dev]"]),
        ([".installed-demo"], "demo", []),
        ([".installed-demo"], "lint", [".[dev]"]),
        ([".installed"], "demo", []),
        ([".installed"], "lint", []),
    ],
)
def test_make_installs_what_a_target_needs(tmp_path, stamps, target, installed):
    """An environment of development serves the demo too; that of the demo is completed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    for stamp in stamps:
        (tmp_path / stamp).touch()
    commands = run("make", "--dry-run", target, f"VENV={tmp_path}", cwd=ROOT)
    assert re.findall(r" -e '?(\S+?)'?$", commands, re.M) == installed


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def dockerfile() -> str:
    """Its instructions, each on one line, without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    return text.replace("\\\n", "")


def test_image_is_built_from_the_files_that_a_wheel_needs():
    """`COPY . .` takes what .dockerignore allows."""
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules
    licences = set(pyproject()["project"]["license-files"])
    assert allowed == {*PACKAGED, *licences, "README.md", "pyproject.toml", "setup.py"}
    assert all((ROOT / name).exists() for name in allowed)
    assert re.findall(r"^COPY (.*)$", dockerfile(), re.M) == [". .", "--from=wheel /wheels /wheels"]


def test_image_installs_what_the_project_names():
    """System packages as the build's own messages name them, extras and CUDA of pyproject.toml."""
    messages = (ROOT / "setup.py").read_text() + (ROOT / "Makefile").read_text()
    named = set(re.findall(r"apt-get install ([\w+-]+)", messages))
    named -= {"ninja-build"}  # pip brings ninja
    stages = re.findall(r"--no-install-recommends (.*?) *&&", dockerfile())
    assert len(stages) == 2 and all(set(stage.split()) == named for stage in stages)

    extras = pyproject()["project"]["optional-dependencies"]
    [requested] = re.findall(r"\.whl\)\[(.*?)\]", dockerfile())
    assert set(requested.split(",")) <= extras.keys()
    [cuda] = set(re.findall(r"nvidia/cuda:(\d+\.\d+)", dockerfile()))
    assert extras["dali"][0].startswith(f"nvidia-dali-cuda{cuda.replace('.', '')}>")
    wheels = pyproject()["tool"]["cibuildwheel"]
    assert f"cuda-nvcc-{cuda.replace('.', '-')} " in wheels["before-all"][1]
    assert wheels["environment"]["CUDA_HOME"].endswith(f"-{cuda}")


# ----------------------------------------------------------------------- source archive and wheel


@pytest.mark.slow
def test_source_archive_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        files = [PurePosixPath(m.name) for m in archive.getmembers() if m.isfile()]
    names = {str(path.relative_to(path.parts[0])) for path in files}
    names = {name for name in names if not MADE_BY_SETUPTOOLS.fullmatch(name)}
    expected = {name for name in tracked_files() if name.split("/")[0] in PACKAGED}
    assert names == expected | TEXTS


@pytest.mark.slow
def test_wheel_holds_each_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licences = {n.split("/")[-1] for n in archive.namelist() if "/licenses/" in n}
    tracked = [name for name in tracked_files() if name.startswith(("deit_fast/", "kernels/"))]
    extension = f"deit_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    expected = {re.sub(r"^kernels/", "deit_fast/kernels/", name) for name in tracked}
    assert names == expected | {extension}
    assert licences == {"LICENSE", "NOTICE"}
    assert "deit_fast/py.typed" in names  # type checkers read the annotations only beside it


@pytest.mark.slow
def test_metadata_is_fit_for_a_package_index(metadata):
    assert metadata["Name"] == "deit-fast"
    assert metadata["Version"] == deit_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    description = metadata.get_payload()
    assert description.startswith("# deit_fast")
    prose = re.sub(r"^```.*?^```$", "", description, flags=re.M | re.S)
    broken = [link for link in re.findall(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"", prose)
              if not "".join(link).startswith(("https://", "http://"))]  # fmt: skip
    assert not broken, "links to files that an index does not have"


@pytest.mark.slow
def test_installed_wheel_trains_two_steps(wheel, tmp_path):
    """In a fresh environment that shares with this one only the packages deit_fast depends on."""
    environment = tmp_path / "env"
    venv.create(environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index",
        wheel, cwd=tmp_path)  # fmt: skip
    [packages] = environment.glob("lib/python*/site-packages")
    # After the installation, so that pip sees nothing of what is there.
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"])

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    version = run(environment / "bin" / "deit-fast", "--version", cwd=elsewhere)
    assert version == f"deit-fast {deit_fast.__version__}\n"
    loaded = run(python, ROOT / ".ci" / "two_steps.py", "trial", cwd=elsewhere,
                 OMP_NUM_THREADS="1").splitlines()  # fmt: skip
    modules = [line for line in loaded if line.endswith((".py", ".so"))]
    assert any("_C." in line for line in modules)
    assert f"{packages}/deit_fast/kernels/__init__.py" in modules
    assert not [line for line in modules if not line.startswith(f"{packages}/deit_fast/")]
    assert (elsewhere / "trial" / "run" / "model.safetensors").is_file()
