"""Builds `deit_fast._C`: the teacher-logit cache, the listing of image folders and the resize of
the Pillow loader (C++17) and, where nvcc is found, the CUDA part of the cache.

Everything else is in pyproject.toml. The build needs a C++ compiler, pybind11 and ninja, and no
torch. DEIT_FAST_CUDA=0 leaves CUDA out, DEIT_FAST_CUDA=1 insists on it; CXX names the compiler.
DEIT_FAST_CUDA_ARCHITECTURES=90 compiles for one architecture alone (80, 90 and 100 otherwise).
Objects stay in build/native-*, so a second build does only what changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
SOURCES = [
    "csrc/bindings.cpp",
    "csrc/crc32c.cpp",
    "csrc/folder_list.cpp",
    "csrc/guarded_map.cpp",
    "csrc/logit_cache.cpp",
    "csrc/record_codec.cpp",
    "csrc/resize.cpp",
    "csrc/tail_draws.cpp",
    "csrc/view_table.cpp",
]
CUDA_SOURCES = ["csrc/cuda/record_codec.cu"]
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
CUDA_ARCHITECTURES = ("80", "90", "100")
# No contraction: host and device round alike (csrc/arithmetic.h). No trapping: loops vectorise.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-trapping-math"
)
CUDA_FLAGS = "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"

NINJA_FILE = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule cuda
  command = {nvcc} -ccbin {cxx} {cuda_flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {link} $in -o $out
  description = link $out
{edges}
"""


def first_on_path(names: list[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def find_compiler() -> str:
    """The C++ compiler, after checking that it and Python's headers are there."""
    name = os.environ.get("CXX")
    found = first_on_path([name] if name else ["g++", "c++", "clang++"])
    if found is None:
        names_tried = f"CXX={name}" if name else "g++, c++ or clang++"
        raise PlatformError(f"no C++ compiler ({names_tried}) on PATH: apt-get install g++")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise PlatformError(f"no Python.h in {include}: apt-get install python3-dev")
    return found


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, PATH or the usual folder; none where DEIT_FAST_CUDA=0."""
    choice = os.environ.get("DEIT_FAST_CUDA", "")
    if choice not in ("", "0", "1"):
        raise PlatformError(f"DEIT_FAST_CUDA must be 0 or 1, not {choice!r}")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    found = first_on_path([*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"])
    if found is None and choice == "1":
        raise PlatformError(
            "DEIT_FAST_CUDA=1, but there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
        )
    return found


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = str(Path(ninja.BIN_DIR) / "ninja")
    if found is None:
        raise PlatformError("no ninja: pip install ninja, or apt-get install ninja-build")
    return found


def architecture_flags(nvcc: str) -> str:
    """Machine code for each architecture that this nvcc knows, and PTX of the last one."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    chosen = os.environ.get("DEIT_FAST_CUDA_ARCHITECTURES", ",".join(CUDA_ARCHITECTURES)).split(",")
    known = [a for a in chosen if f"compute_{a}" in listed.stdout.split()]
    if not known:
        raise PlatformError(f"{nvcc} knows none of sm_{', sm_'.join(chosen)}")
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in known]
    return " ".join([*flags, f"-gencode arch=compute_{known[-1]},code=compute_{known[-1]}"])


def quote(path: str | Path) -> str:
    """A path inside a ninja edge."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_native(folder: Path, library: Path) -> None:
    """Compile and link ``library`` in ``folder`` with ninja."""
    try:
        import pybind11
    except ImportError:
        raise PlatformError("no pybind11 in this Python: pip install pybind11") from None
    compiler, nvcc = find_compiler(), find_nvcc()
    includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
    flags = " ".join([CXX_FLAGS, *(f'-isystem "{path}"' for path in includes)])
    link = f"{compiler} -shared"
    if nvcc is not None:
        flags += " -DDEIT_FAST_WITH_CUDA"
        # nvcc finds its own static runtime; its symbols stay inside, away from torch's copy.
        link = f"{nvcc} -ccbin {compiler} -shared -cudart static -Xlinker --exclude-libs=ALL"
    elif os.environ.get("DEIT_FAST_CUDA") != "0":
        print("deit-fast: no nvcc found; building without the CUDA part", flush=True)

    edges, objects = [], []
    for source in SOURCES + (CUDA_SOURCES if nvcc else []):
        target = folder / (source.replace("/", "_") + ".o")
        rule = "cuda" if source.endswith(".cu") else "cxx"
        edges.append(f"build {quote(target)}: {rule} {quote(ROOT / source)}")
        objects.append(quote(target))
    edges.append(f"build {quote(library)}: link {' '.join(objects)}")

    folder.mkdir(parents=True, exist_ok=True)
    text = NINJA_FILE.format(
        cxx=compiler,
        nvcc=nvcc,
        flags=flags.replace("$", "$$"),
        cuda_flags=f"{CUDA_FLAGS} {architecture_flags(nvcc)}" if nvcc else "",
        link=link,
        edges="\n".join(edges),
    )
    (folder / "build.ninja").write_text(text)
    if subprocess.run([find_ninja(), "-C", str(folder)]).returncode != 0:
        raise CompileError("the extension deit_fast._C did not compile; see the messages above")


class NinjaBuild(build_ext):
    """setuptools decides where the library goes; ninja builds it in a folder that outlives pip."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        folder = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
        library = folder / target.name
        build_native(folder, library)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def package_description() -> str:
    """README.md for a package index, which has none of the files that it links to.

    Outside code, a relative link becomes its text and a relative picture is left out.
    """
    parts = re.split(r"(^```.*?^```$)", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    for index in range(0, len(parts), 2):
        text = re.sub(r"<picture>.*?</picture>\n?", "", parts[index], flags=re.S)
        text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n?", "", text)
        parts[index] = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return "".join(parts)


# A source archive takes `depends` along; ninja finds the headers by itself.
setup(
    ext_modules=[Extension("deit_fast._C", SOURCES, depends=[*CUDA_SOURCES, *HEADERS])],
    cmdclass={"build_ext": NinjaBuild},
    long_description=package_description(),
    long_description_content_type="text/markdown",
)
