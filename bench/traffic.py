"""python -m bench traffic [--model NAME...] [--impl NAME...] [--json FILE] [--write | --check]

Counts the work of a compiled training step on an H100 in one transformer block: Inductor's Triton
launches and the bytes of each, matrix products with their shapes, calls of our operators with their
bytes. Inductor generates its code for an H100 on a machine without a GPU (bench/inductor.py);
nothing is timed. Needs the environment of the golden table: torch 2.11 (`make traffic`).

The counts of a block are those of a model of 4 blocks minus those of a model of 3, so that the
block's kernels are fused with both neighbours, as in a deep model. bench/counts.py defines what is
counted.

--write replaces tests/golden/traffic.json; --check compares with it and fails with one line for
each figure that is higher. --changed takes the counts of a model from there if the graph that
Inductor would compile has the digest in tests/golden/traffic-graphs.json: one release of Inductor
makes the same code of the same graph.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import record
from .counts import Counts, count_pass

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "traffic.json"
GRAPHS = GOLDEN.with_name("traffic-graphs.json")  # "model implementation" to its digest
TORCH, TIMM = "2.11.0", "1.0.31"
BATCH, TOKENS, DEPTH = 256, 198, 3
DROP_PATH = 0.1
MODELS = {
    name: f"{name}_distilled_patch16_224" for name in ("deit_tiny", "deit_small", "deit_base")
}
# Options of fuse, the kernels that are on for an H100 where none are named; None: timm's model.
IMPLEMENTATIONS: dict[str, dict[str, Any] | None] = {
    "timm": None,
    "fused": {"residual": "float32"},
    "fused-bf16": {"residual": "bfloat16"},
    "fused-bf16-mlp": {
        "residual": "bfloat16",
        "kernels": ("attention", "add_layer_norm", "bias_gelu", "mlp_backward"),
    },
}
PASSES = ("forward", "backward")

Parts = dict[str, dict[str, Counts]]
"""Of a model: "block" or "depth_3", then "forward" or "backward"."""
Table = dict[str, dict[str, Parts]]
"""Of models, then implementations."""


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def made_model(model: str, implementation: str, depth: int) -> tuple[Any, ...]:
    """Arguments of ``compile_for_h100`` for ``depth`` blocks, to be run as by ``TrainStep``."""
    import timm
    import torch

    from deit_fast.models.fuse import DEFAULT_KERNELS, fuse, patch_side
    from deit_fast.models.shadow import Shadows

    made: Any = timm.create_model(MODELS[model], depth=depth, drop_path_rate=DROP_PATH)
    made.set_distilled_training(True)
    made.train()
    inputs = torch.empty(BATCH, 3, 224, 224, device="meta")
    options = IMPLEMENTATIONS[implementation]
    if options is None:
        return made, [inputs]
    fuse(made, **{"kernels": DEFAULT_KERNELS["sm_90"]} | options)
    if side := patch_side(made):
        patches = (224 // side) ** 2
        inputs = torch.empty(BATCH, patches, 3 * side**2, dtype=torch.bfloat16, device="meta")
    return made, [inputs], lambda fake: Shadows(fake, torch.bfloat16).current()


def count_model(model: str, implementation: str, depth: int) -> dict[str, Counts]:
    """Of forward and backward."""
    from .inductor import compile_for_h100

    passes = compile_for_h100(*made_model(model, implementation, depth))
    return {name: count_pass(*phase) for name, phase in zip(PASSES, passes, strict=True)}


def digest(model: str, implementation: str, parts: Parts) -> str:
    """Of counts and of all that they depend on beside the releases of torch and timm.

    That is the graph that Inductor compiles, and how it is called and its code counted. The deeper
    of the two models has every part of the other.
    """
    from .inductor import joint_graph

    graph = joint_graph(*made_model(model, implementation, DEPTH + 1))
    made = hashlib.sha256(f"{graph}\n{mapped(parts, pack, 2)}".encode())
    for name in ("inductor.py", "counts.py"):
        made.update(Path(__file__).with_name(name).read_bytes())
    return made.hexdigest()


def unchanged(models: Sequence[str], implementations: Sequence[str]) -> Table:
    """The golden counts whose digest is still the same."""
    golden, digests = read(), json.loads(GRAPHS.read_text())
    found: Table = {model: {} for model in models}
    for model, implementation in itertools.product(models, implementations):
        parts = golden[model][implementation]
        if digest(model, implementation, parts) == digests[f"{model} {implementation}"]:
            found[model][implementation] = parts
    return found


def count(models: Sequence[str], implementations: Sequence[str], known: Table) -> Table:
    """Counts of all models.

    Args:
        known: counts of those that are not compiled.
    """
    table: Table = {model: {} for model in models}
    for model in models:
        for implementation in implementations:
            if found := known.get(model, {}).get(implementation):
                table[model][implementation] = found
                continue
            shallow = count_model(model, implementation, DEPTH)
            deep = count_model(model, implementation, DEPTH + 1)
            block = {phase: deep[phase].plus(shallow[phase], -1) for phase in PASSES}
            found = {"block": block, f"depth_{DEPTH}": shallow}
            table[model][implementation] = found
            print(f"{model} {implementation}: compiled", file=sys.stderr, flush=True)
    return table


def whole_model(parts: dict[str, dict[str, Counts]], depth: int) -> dict[str, Counts]:
    """Forward and backward of a model of ``depth`` blocks, by those of 3 and of one more."""
    shallow, block = parts[f"depth_{DEPTH}"], parts["block"]
    return {phase: shallow[phase].plus(block[phase], depth - DEPTH) for phase in PASSES}


# ---------------------------------------------------------------------------------------------
# The golden table
# ---------------------------------------------------------------------------------------------


def pack(counts: Counts) -> dict[str, dict[str, int]]:
    """As JSON: "name size" to calls, size in bytes or, of a product, m x n x k."""

    def text(size: Any) -> str:
        return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)

    return {
        field: {f"{name} {text(size)}": calls for (name, size), calls in sorted(counter.items())}
        for field, counter in counts._asdict().items()
    }


def unpack(packed: dict[str, dict[str, int]]) -> Counts:
    counts = Counts.empty()
    for field, entries in packed.items():
        counter: Counter[Any] = getattr(counts, field)
        for key, calls in entries.items():
            name, _, size = key.rpartition(" ")
            shape = tuple(map(int, size.split("x"))) if field == "gemms" else int(size)
            counter[name, shape] = calls
    return counts


def each(
    table: Any, levels: int, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) at this depth of nested dictionaries."""
    if levels == 0:
        yield path, table
        return
    for key, value in table.items():
        yield from each(value, levels - 1, (*path, key))


def mapped(table: Any, function: Any, levels: int = 4) -> Any:
    if levels == 0:
        return function(table)
    return {key: mapped(value, function, levels - 1) for key, value in table.items()}


def as_json(table: Table) -> str:
    made_with = {"torch": TORCH, "timm": TIMM, "batch": BATCH, "tokens": TOKENS}
    content = {"made_with": made_with, "models": mapped(table, pack)}
    return json.dumps(content, indent=1) + "\n"


def read(path: Path = GOLDEN) -> Table:
    """
    Raises:
        SystemExit: no such file.
    """
    if not path.exists():
        raise SystemExit(f"{path}: not found; `make traffic-golden` writes it")
    table: Table = mapped(json.loads(path.read_text())["models"], unpack)
    return table


def added(got: Table, golden: Table) -> list[str]:
    """One line for each figure that is higher than in the golden table."""
    lines = []
    for path, counts in each(got, 4):
        old: Any = golden
        for key in path:
            old = old.get(key, {})
        where = " ".join(path)
        if not old:
            lines.append(f"{where}: not in the golden table; `make traffic-golden` writes it")
            continue
        for name, value in counts.figures.items():
            known = old.figures[name]
            if value > known:
                lines.append(
                    f"{where}: {name}: {show(name, value)}, {show(name, known)} in the golden "
                    f"table, {show(name, value - known)} more"
                )
    return lines


def show(name: str, value: int) -> str:
    if "bytes" in name:
        return f"{value / 1e6:.2f} MB"
    return f"{value / 1e9:.1f} G" if "FLOPs" in name else str(value)


def as_text(table: Table) -> str:
    """A table of the blocks, then the kernels and calls of each."""
    heads = "launches  kernels GB  GEMMs  GFLOP  ours  ours GB  other"
    lines = [f"{f'block, B = {BATCH}':24s} {'phase':9s} {heads}"]
    for model, implementation in ((m, i) for m in table for i in table[m]):
        block = table[model][implementation]["block"]
        for phase in PASSES:
            f = list(block[phase].figures.values())
            lines.append(
                f"{model + ' ' + implementation:24s} {phase:9s} {f[0]:8d} {f[1] / 1e9:11.3f} "
                f"{f[2]:6d} {f[3] / 1e9:6.0f} {f[4]:5d} {f[5] / 1e9:8.3f} {f[6]:6d}"
            )
        total = sum(block[phase].bytes_without_attention for phase in PASSES)
        lines.append(f"{'':24s} sum without GEMMs and attention: {total / 1e9:.3f} GB")
    for (model, implementation, phase), counts in each(
        {m: {i: parts["block"] for i, parts in by.items()} for m, by in table.items()}, 3
    ):
        lines.append(f"\n{model} {implementation} {phase}")
        for field, counter in counts._asdict().items():
            for (name, size), calls in sorted(counter.items(), key=lambda item: -_size(item[0])):
                shown = "x".join(map(str, size)) if field == "gemms" else f"{size / 1e6:.2f} MB"
                lines.append(f"  {field:9s} {calls:4d}  {shown:>18s}  {name}")
    return "\n".join(lines)


def _size(key: tuple[str, Any]) -> int:
    return math.prod(key[1]) if isinstance(key[1], tuple) else key[1]


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def refusal() -> str | None:
    """Why this environment does not count what the golden table counts; None: it does."""
    from importlib.metadata import version

    found = {name: version(name).partition("+")[0] for name in ("torch", "timm")}
    needed = {"torch": TORCH, "timm": TIMM}
    if found == needed:
        return None
    have, need = (", ".join(f"{k} {v}" for k, v in d.items()) for d in (found, needed))
    return f"needs {need}; this environment has {have} (`make traffic` makes one)"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there too")
    parser.add_argument("--write", action="store_true", help="replace the golden table")
    parser.add_argument("--check", action="store_true", help="fail where a figure is higher")
    parser.add_argument("--changed", action="store_true", help="compile only what has a new graph")
    options = parser.parse_args(arguments[1:])
    if why := refusal():
        raise SystemExit(f"python -m bench traffic {why}")
    whole = options.model == list(MODELS) and options.impl == list(IMPLEMENTATIONS)
    if options.write and not whole:
        parser.error("--write counts everything: leave --model and --impl out")
    record.require_folder(options.json)
    golden = read() if options.check else None

    from .inductor import believe_in_h100  # after the arguments: --help must not wait for torch

    believe_in_h100()
    known = unchanged(options.model, options.impl) if options.changed else {}
    table = count(options.model, options.impl, known)
    print(as_text(table))
    if options.json:
        options.json.write_text(as_json(table))
    if options.write:
        GOLDEN.write_text(as_json(table))
        digests = {
            " ".join(path): digest(path[0], path[1], parts) for path, parts in each(table, 2)
        }
        GRAPHS.write_text(json.dumps(digests, indent=1) + "\n")
    if golden is not None and (lines := added(table, golden)):
        raise SystemExit("\n".join(lines))
