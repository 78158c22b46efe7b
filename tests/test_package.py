"""Rules of the house that a reader can rely on: who imports whom, and what imports without what."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LATE = {
    "tyro",
    "rich",
    "tensorboard",
    "matplotlib",
    "sklearn",
    "nvidia.dali",
    "mlflow",
    "trackio",
    "wandb",
    "apex",
    "pyarrow",
    "ray",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "fsspec",
    "s3fs",
    "gcsfs",
    "aiohttp",
}

# Layers from the bottom up, by path; for each path the longest entry that it begins with. A file
# imports from its own layer and from those below.
LAYERS = [
    {
        "deit_fast/errors.py",
        "deit_fast/runtime/files.py",
        "deit_fast/config.py",
        "deit_fast/config_file.py",
    },
    {
        "deit_fast/recipes.py",
        "deit_fast/runtime",
        "deit_fast/views",
        "kernels",
        "deit_fast/arguments.py",
        "deit_fast/flags.py",
        "deit_fast/completion.py",
        "deit_fast/students.py",
    },
    {"deit_fast/storage"},
    {
        "deit_fast/data",
        "deit_fast/features",
        "deit_fast/models",
        "deit_fast/losses.py",
        "deit_fast/cache",
        "deit_fast/inputs.py",
        "deit_fast/hub_files.py",
    },
    {
        "deit_fast/evaluation.py",
        "deit_fast/prediction.py",
        "deit_fast/decisions.py",
        "deit_fast/teacher_accuracy.py",
    },
    {"deit_fast/training"},
    {
        "deit_fast/precomputation.py",
        "deit_fast/precompute_job.py",
        "deit_fast/remote_targets.py",
        "deit_fast/units.py",
        "deit_fast/target_caches.py",
    },
    {"deit_fast/tools"},
    {"deit_fast/api.py"},
    {
        "deit_fast/cli.py",
        "deit_fast/cache_verbs.py",
        "deit_fast/dry_runs.py",
        "deit_fast/predict_verb.py",
        "deit_fast/__main__.py",
        "deit_fast/integrations",
    },
]


LEFT_OUT = {"build", "dist", "runs", "wandb", "mlruns", "deit_fast.egg-info"}  # made, not kept


def python_files() -> list[Path]:
    return sorted([*(ROOT / "deit_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def dotted_name(path: Path) -> str:
    """`deit_fast.kernels.ingest` for kernels/ingest.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("deit_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, at_load: bool = False) -> set[tuple[str, str]]:
    """(module, name in it) that a file imports: at its top, late, and for type checkers alone.

    at_load: only at its top.
    """
    found: set[tuple[str, str]] = set()
    package = dotted_name(path if path.name == "__init__.py" else path.parent / "__init__.py")
    tree = ast.parse(path.read_text())
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {(base, alias.name) for alias in node.names}
    return found


def import_graph(at_load: bool = False) -> dict[Path, set[Path]]:
    """The files of this project that each file imports; ``at_load`` as in `imported_names`."""
    by_name = {dotted_name(path): path for path in python_files()}
    graph: dict[Path, set[Path]] = {}
    for path in by_name.values():
        names = imported_names(path, at_load) - {("deit_fast", "_C")}  # the extension
        modules = {f"{base}.{name}" if f"{base}.{name}" in by_name else base
                   for base, name in names}  # fmt: skip
        graph[path] = {by_name[module] for module in modules & by_name.keys()} - {path}
    return graph


def layer_of(path: Path) -> int:
    name = str(path.relative_to(ROOT))
    entries = [(len(entry), level) for level, layer in enumerate(LAYERS) for entry in layer
               if name == entry or name.startswith(f"{entry}/")]  # fmt: skip
    assert entries, f"{name} has no layer: add it to LAYERS"
    return max(entries)[1]


GRAPH = import_graph()
FILES = pytest.mark.parametrize("path", GRAPH, ids=lambda path: str(path.relative_to(ROOT)))


@FILES
def test_dependencies_run_one_way(path):
    if path == ROOT / "deit_fast" / "__init__.py":
        return  # the public names, imported on first use
    above = {str(other.relative_to(ROOT)) for other in GRAPH[path]
             if layer_of(other) > layer_of(path)}  # fmt: skip
    assert not above, f"{path.name} imports {above}, from a layer above its own"
    if path.parent == ROOT / "kernels":
        engine = {str(other) for other in GRAPH[path] if other.parent != path.parent}
        assert not engine, f"kernels know nothing of the engine, {path.name} imports {engine}"


def test_no_file_imports_itself_through_others():
    """No circle, also not by a late import or one for type checkers."""
    reached: dict[Path, bool] = {}  # False while its imports are followed

    def follow(path: Path, chain: list[Path]) -> None:
        reached[path] = False
        for other in GRAPH[path]:
            circle = " -> ".join(p.stem for p in [*chain, path, other])
            assert reached.get(other, True), f"a circle of imports: {circle}"
            if other not in reached:
                follow(other, [*chain, path])
        reached[path] = True

    for path in GRAPH:
        if path not in reached:
            follow(path, [])


def test_no_chain_of_imports_is_longer_than_fourteen_files():
    """Imports at load. It keeps the way from a verb down to a kernel short enough to read."""
    graph = import_graph(at_load=True)

    @functools.cache
    def chain(path: Path) -> list[Path]:
        return [path, *max((chain(other) for other in graph[path]), key=len, default=[])]

    longest = max(map(chain, graph), key=len)
    assert len(longest) <= 14, " -> ".join(str(path.relative_to(ROOT)) for path in longest)


def test_test_files_share_through_helpers_alone():
    """Code that two test files need is in tests/helpers, or is a fixture of conftest.py."""
    tests = ROOT / "tests"
    for path in [*tests.glob("*.py"), *(tests / "helpers").glob("*.py")]:
        names = {module.rpartition(".")[2] for module, _ in imported_names(path)}
        shared = names & {other.stem for other in tests.glob("*.py")}
        assert not shared, f"{path.name} imports {shared}: move what it needs to tests/helpers"


@FILES
def test_no_pickle_and_no_unsafe_load(path):
    tree = ast.parse(path.read_text())
    modules = {module for module, _ in imported_names(path)}
    assert not modules & {"pickle", "cPickle", "dill", "joblib"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and k.value.value is True]
            assert safe, f"{path.name}:{node.lineno}: torch.load without weights_only=True"


OPENERS = re.compile(
    r"open|os\.open|(np|numpy)\.(load|save\w*|memmap|fromfile)|load_file|save_file"
    r"|torch\.(load|save)|path\.open|tarfile\.open|.*\.(read|write)_(text|bytes)|.*\.tofile"
)
# Calls on what open_regular or open_atomically has opened, and on files of the system.
OPENED_ELSEWHERE = {
    "deit_fast/arguments.py": {"os.open"},  # /dev/null
    "deit_fast/cache/local_copy.py": {"os.open"},  # locks
    "deit_fast/cli.py": {"os.open"},  # /dev/null
    "deit_fast/data/watch.py": {"read_text"},  # /proc
    "deit_fast/remote_targets.py": {"os.open"},  # locks
    "deit_fast/runtime/locks.py": {"os.open"},
    "deit_fast/runtime/torch_files.py": {"torch.load", "torch.save"},
    "deit_fast/tools/doctor.py": {"read_text"},  # /proc and /sys
}


def test_files_are_opened_by_one_module():
    """So that no FIFO is waited for, and no file is half written."""
    for path in sorted((ROOT / "deit_fast").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name == "deit_fast/runtime/files.py" or path.is_relative_to(ROOT / "deit_fast/kernels"):
            continue
        allowed = OPENED_ELSEWHERE.get(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if OPENERS.fullmatch(function) and not allowed & {function, function.split(".")[-1]}:
                pytest.fail(f"{name}:{node.lineno}: {function}: use runtime/files.py")


def test_engine_imports_without_the_packages_of_cli_reports_and_dali():
    """As on a machine that has torch, triton and timm, and nothing can be fetched."""
    benches = [f"bench.{path.stem}" for path in sorted((ROOT / "bench").glob("bench_*.py"))]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({sorted(LATE)!r}))  # None: the import fails
for name in ("deit_fast.kernels", "deit_fast.cache", "deit_fast.losses", "deit_fast.views.plan",
             "deit_fast.data.loader", "deit_fast.models", "deit_fast.training.loop",
             "deit_fast.precomputation", "deit_fast.tools.verify_against_teacher",
             "deit_fast.cache.export", "deit_fast.cache.foreign.show", "deit_fast.evaluation",
             "deit_fast.tools.report.page", "deit_fast.tools.export.exporting",
             "deit_fast.tools.doctor", "bench.common", *{benches!r}):
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_extras_that_messages_name_are_in_pyproject():
    project = (ROOT / "pyproject.toml").read_text()
    for path in python_files():
        for name in re.findall(r"deit-fast\[(\w+)\]", path.read_text()):
            assert f"\n{name} = [" in project, f"{path.name} names the extra {name!r}"


def test_public_surface():
    import deit_fast

    for name in deit_fast.__all__:
        assert getattr(deit_fast, name).__doc__, f"deit_fast.{name} has no docstring"
    with pytest.raises(AttributeError, match="nope"):
        deit_fast.nope  # noqa: B018


def test_tree_of_contributing_matches_the_disk():
    """Each path of the annotated tree exists, and each folder of the project is in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text.split("```tree\n")[1].split("```")[0]
    named, stack = set(), []
    for line in tree.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        stack = [*stack[:depth], name]
        path = "".join(stack)
        assert (ROOT / path).exists(), f"CONTRIBUTING.md names {path}, which is not there"
        named.add(path.rstrip("/"))
    for path in python_files():
        parts = path.relative_to(ROOT).parts
        if path.name in ("__init__.py", "__main__.py"):
            continue
        room = "/".join(parts[:2]) if parts[0] == "deit_fast" else parts[0]
        assert room in named, f"{room} is not in the tree of CONTRIBUTING.md"
    for path in ROOT.iterdir():
        kept = not path.name.startswith(".") and path.name not in LEFT_OUT
        if kept and (path.is_file() or any(path.glob("*.*"))):
            assert path.name in named, f"{path.name} is not in the tree of CONTRIBUTING.md"
