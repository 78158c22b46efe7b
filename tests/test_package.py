"""Rules of the house that a reader can rely on: who imports whom, and what imports without what."""

from __future__ import annotations

import ast
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
}

# Layers from the top down; a module imports from its own layer and from those below.
LAYERS = [
    {"cli", "__main__"},
    {"cache_verbs"},
    {"demo", "bug_report"},
    {"doctor"},
    {"recheck"},
    {"precompute", "train", "report", "analysis", "pack"},
    {"evaluate", "charts", "report_style"},
    {"data", "models", "losses", "cache"},
    {
        "views",
        "order",
        "draws",
        "kernels",
        "environment",
        "arguments",
        "recipes",
        "files",
        "outcome",
        "world",
    },
    {"config"},
]


LEFT_OUT = {"build", "dist", "runs", "wandb", "mlruns", "deit_fast.egg-info"}  # made, not kept


def python_files() -> list[Path]:
    return sorted([*(ROOT / "deit_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Absolute names that a file imports, at its top level alone or anywhere."""
    tree = ast.parse(path.read_text())
    guarded = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If)
               and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)}  # fmt: skip
    nodes = tree.body if top_level else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(room: str) -> int:
    found = [level for level, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{room} has no layer: add it to LAYERS"
    return found[0]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_run_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = "kernels" if parts[0] == "kernels" else parts[1]
    used = {name.split(".")[1] for name in imports(path, top_level=False)
            if name.startswith("deit_fast.")}  # fmt: skip
    used &= {room for rooms in LAYERS for room in rooms}
    if room == "kernels":
        assert not used, f"kernels know nothing of the engine, {path.name} imports {used}"
        return
    if room == "__init__":
        return
    above = {other for other in used if layer_of(other) < layer_of(room)}
    assert not above, f"{room} imports {above}, which stand above it"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_and_no_unsafe_load(path):
    tree = ast.parse(path.read_text())
    assert not imports(path, top_level=False) & {"pickle", "cPickle", "dill", "joblib"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and k.value.value is True]
            assert safe, f"{path.name}:{node.lineno}: torch.load without weights_only=True"


def test_engine_imports_without_the_packages_of_cli_reports_and_dali():
    """As on a machine that has torch, triton and timm, and nothing can be fetched."""
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({sorted(LATE)!r}))  # None: the import fails
for name in ("deit_fast.kernels", "deit_fast.cache", "deit_fast.losses", "deit_fast.views",
             "deit_fast.data.loader", "deit_fast.models", "deit_fast.train.loop",
             "deit_fast.precompute", "deit_fast.recheck", "deit_fast.cache.export",
             "deit_fast.cache.tinyvit", "deit_fast.evaluate", "deit_fast.report",
             "deit_fast.doctor", "bench.common", "bench.bench_step", "bench.bench_cache",
             "bench.bench_distillation_loss", "bench.bench_ingest", "bench.bench_loader",
             "bench.bench_attention", "bench.bench_add_layer_norm", "bench.bench_bias_gelu",
             "bench.bench_block"):
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_surface():
    import deit_fast

    for name in deit_fast.__all__:
        assert getattr(deit_fast, name).__doc__, f"deit_fast.{name} has no docstring"
    with pytest.raises(AttributeError, match="nope"):
        deit_fast.nope  # noqa: B018


def test_readme_tree_matches_the_disk():
    """Each path of the annotated tree exists, and each room on the disk stands in it."""
    text = (ROOT / "README.md").read_text()
    tree = text.split("```tree\n")[1].split("```")[0]
    named, stack = set(), []
    for line in tree.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        stack = [*stack[:depth], name]
        path = "".join(stack)
        assert (ROOT / path).exists(), f"README names {path}, which is not there"
        named.add(path.rstrip("/"))
    for path in python_files():
        parts = path.relative_to(ROOT).parts
        if path.name in ("__init__.py", "__main__.py"):
            continue
        room = "/".join(parts[:2]) if parts[0] == "deit_fast" else parts[0]
        assert room in named, f"{room} is not in README's tree"
    for path in ROOT.iterdir():
        kept = not path.name.startswith(".") and path.name not in LEFT_OUT
        if kept and (path.is_file() or any(path.glob("*.*"))):
            assert path.name in named, f"{path.name} is not in README's tree"
