"""Compile every kernel ahead of time and check its machine code. Needs no GPU.

    python -m deit_fast.kernels.aot [--arch sm_80 sm_90 sm_100] [--kernel NAME] [--json FILE]
    python -m deit_fast.kernels.aot --changed     # compile only what differs from the golden file
    python -m deit_fast.kernels.aot --changed --write  # after a change that keeps the IR: fast
    python -m deit_fast.kernels.aot --write       # after an intended change: write the golden file
    python -m deit_fast.kernels.aot --write --kernel NAME          # or only these kernels' lines
    python -m deit_fast.kernels.aot --markdown docs/performance.md  # its table, from those files

A kernel file takes part by defining ``aot_cases()``, which yields (name, launch, expectations): the
launch as its launcher makes it inside `launching.recording`, with tensors on the meta device. Every
case is compiled for every architecture; the cubin is read with the cuobjdump and nvdisasm of
Triton's own wheel. Exits with 1 and prints one line per broken rule where a kernel

- uses local memory (a stack or spills), fp64 instructions that its case does not announce, or more
  shared memory than a block has;
- has serialized wgmma instructions (sm_90): ptxas warns of it in its log (C7510, C7515 and other
  codes that begin with C75), or the machine code waits as often as it multiplies;
- has instructions that interfere with a wgmma which still runs (`wgmma_hazards`);
- fails what its case expects (see `EXPECTATIONS`);
- is worse than tests/golden/aot-triton-<version>.json says (see `WORSE`): more registers, narrower
  loads, fewer resident blocks, more instructions in total or in a loop.

Without a golden file for the installed triton all but the last are checked. To run another triton
than the installed one: PYTHONPATH=<folder with it> python -m deit_fast.kernels.aot.

The golden file also has a checksum of each kernel's intermediate representation after Triton's
first passes, which takes a sixteenth of the time. They inline functions and merge equal
expressions, so that the checksum does not depend on how a kernel is divided into functions. One
triton compiles one IR to one machine code: where the checksum is the same, ``--changed`` takes the
figures of the file, and checks these. Where even the source of all kernels is that of
tests/golden/kernel-sources.json, it computes no checksum either.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from operator import gt, lt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from .launching import TYPE_NAMES, Launch
from .sass import blocks_per_sm, count_instructions, serialized_wgmma, tool
from .wgmma_hazards import find_hazards

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
# Bytes of shared memory that one block may use. An A100's block has 163 KiB, but the same kernels
# must fit GPUs of sm_86, sm_89 and sm_120, for which there are no golden figures (--arch compiles
# for them).
SHARED_LIMIT = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), 99 * 1024)
SHARED_LIMIT |= {"sm_90": 227 * 1024, "sm_100": 227 * 1024}
REGISTER_SLACK = 8  # registers are allocated in units of 8 per thread
INSTRUCTION_SLACK = 1.05


MARKS = ("<!-- made by deit_fast.kernels.aot: begin -->", "<!-- end -->")

EXPECTATIONS = {
    "wide_loads": "True: rows are read and (see wide_stores) written in 16-byte words",
    "wide_stores": "default: wide_loads; False for a kernel that writes no rows",
    "no_scalar_half": "True: no global load or store of 1 or 2 bytes",
    "max_scalar_loads": "most 4-byte global loads: bounds unvectorised loads of float32 rows",
    "max_scalar_stores": "most 4-byte global stores; a loss per row is one",
    "max_regs": "most registers of a thread",
    "i64_rows": "True: row offsets are products of 64-bit integers, so that large tensors work",
    "max_fp64": "most double-precision instructions; default: none",
    "tensor_cores": "True: matrix instructions are present",
    "min_blocks": "fewest resident thread blocks on a multiprocessor",
    "only_on": "architectures for which the kernel is compiled; default: all",
}


class Case(NamedTuple):
    """One specialisation of a kernel, and what is expected of its machine code.

    ``signature``: Triton type of each argument ("*bf16", "i32", "fp32", ...); constexprs may be
    left out. ``attrs``: {argument: power of two that divides it}, exactly as Triton's launcher
    finds them, because 16-byte loads depend on it. ``options``: num_warps, num_stages. ``expect``:
    see `EXPECTATIONS`.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[str, int]
    options: dict[str, int]
    expect: dict[str, Any]


Figures = dict[str, int]
Table = dict[str, dict[str, Figures]]  # case -> architecture -> figures


def package_cases() -> Iterator[Case]:
    """The cases of all files beside this one, named FILE/CASE."""
    package = "deit_fast.kernels"
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name == "aot":
            continue
        cases = getattr(importlib.import_module(f"{package}.{module.name}"), "aot_cases", None)
        for name, launch, expect in cases() if cases else ():
            yield case_of(f"{module.name.removesuffix('_launch')}/{name}", launch, expect)


def case_of(name: str, launch: Launch, expect: dict[str, Any]) -> Case:
    """The case of a recorded launch."""
    kernel, _, arguments = launch
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    return Case(name, kernel, *signature(kernel, arguments), options, expect)


_POINTERS = TYPE_NAMES | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


def signature(
    kernel: Any, arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Types, constants and alignments that Triton's launcher would find for these arguments.

    Upper-case arguments are constants. Tensors on the meta device count as aligned, because those
    of the allocator are.
    """
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    types, constants, aligned = {}, {}, {}
    for name in kernel.arg_names:
        value = arguments[name]
        if value is None or name.isupper():
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{_POINTERS[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned[name] = 16
        elif isinstance(value, TensorDescriptor):
            tile = ", ".join(map(str, value.block_shape))
            types[name] = f"tensordesc<{_POINTERS[value.base.dtype]}[{tile}]>"
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and name not in fixed:
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "i32"
            if name not in fixed and value % 16 == 0:
                aligned[name] = 16
    return types, constants, aligned


def as_source(case: Case, arch: str) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What `triton.compile` takes: source, target, options."""
    names = case.fn.arg_names
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attrs = {
        (names.index(name),): [["tt.divisibility", value]] for name, value in case.attrs.items()
    }
    source = ASTSource(case.fn, signature, case.constexprs, attrs)
    # Set explicitly, because triton 3.10 changes the default.
    options = {"enable_fp_fusion": True, **case.options}
    return source, GPUTarget("cuda", int(arch[3:]), 32), options


def compile_case(case: Case, arch: str) -> Any:
    source, target, options = as_source(case, arch)
    return triton.compile(source, target=target, options=options)


def ir_checksum(case: Case, arch: str) -> int:
    """48 bits of SHA-256 over options and the IR after Triton's first passes (``make_ttir``).

    Without names and positions in the source.
    """
    source, target, options = as_source(case, arch)
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target, parsed, functions, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    text = str(stages["ttir"](module, {}))
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)|^#loc.*\n", "", text, flags=re.MULTILINE)
    text = without_names(text)
    return int(hashlib.sha256(f"{sorted(options.items())}\n{text}".encode()).hexdigest()[:12], 16)


def without_names(text: str) -> str:
    """IR with values numbered in the order of their definitions, and constants instead of names.

    MLIR uses a name again in another region, so that a definition gets a new number.
    """
    names: dict[str, str] = {}
    numbers = itertools.count()

    def renamed(found: re.Match[str]) -> str:
        name, definition = found.groups(default="")
        if definition or name not in names:
            names[name] = f"{name[0]}{next(numbers)}"
        return names[name] + definition

    lines = []
    for line in text.splitlines():
        if constant := re.match(r"\s*(%[\w.$-]+) = (arith\.constant .*)", line):
            names[constant[1]] = constant[2]
        else:
            lines.append(re.sub(r'(@"[^"]*"|[@%][\w.$-]+)((?::\d+)? = |: )?', renamed, line))
    return "\n".join(lines)


def compile_logged(case: Case, arch: str) -> tuple[Any, str]:
    """The compiled kernel and the log of ptxas, which Triton always runs with -v."""
    printed = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # ptxas does not run for a cached kernel
        compiled = compile_case(case, arch)
    log = printed.getvalue()
    if not re.search(r"Used \d+ registers", log):
        raise RuntimeError(f"no log of ptxas from triton {triton.__version__}: {log!r}")
    return compiled, log


def measure(
    case: Case, arch: str, known: Figures | None = None, same_source: bool = False
) -> tuple[Figures, list[str]]:
    """Figures of one case, and one line per rule that is broken but has no figure.

    If the source or the IR is that of the golden file, these are ``known``, its figures, and no
    line: no kernel in that file breaks a rule.
    """
    if same_source and known is not None:
        return known, []
    checksum = ir_checksum(case, arch)
    if known is not None and known["ir"] == checksum:
        return known, []
    compiled, log = compile_logged(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = tool("nvdisasm", "--print-code", "--no-dataflow", cubin.name)
    resources = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    ttir, metadata = compiled.asm["ttir"], compiled.metadata
    blocks = blocks_per_sm(
        arch, resources["REG"], metadata.num_warps, metadata.shared, metadata.tmem_size or 0
    )
    figures = {
        "registers": resources["REG"],
        "blocks_per_sm": blocks,
        "stack": resources["STACK"] + resources["LOCAL"],
        "shared": metadata.shared,
        **count_instructions(sass),
        "i64_muls": len(re.findall(r"arith\.muli [^\n]*: (?:tensor<\w*x)?i64", ttir)),
        "ir": checksum,
    }
    warnings = [f"ptxas log: {line}" for line in serialized_wgmma(log)]
    return figures, warnings + find_hazards(sass, metadata.num_warps)


def broken_rules(case: Case, arch: str, got: Figures) -> Iterator[str]:
    """Rules that the machine code breaks by itself, one line each."""
    expect = case.expect
    if got["stack"]:
        yield f"stack: {got['stack']} bytes of local memory"
    if got["spills"]:
        yield f"spills: {got['spills']} loads and stores of local memory (LDL, STL)"
    most = expect.get("max_fp64", 0)
    if got["fp64"] > most:
        hint = f"at most {most} expected" if most else "is a scalar passed as fp64?"
        yield f"fp64: {got['fp64']} double-precision instructions; {hint}"
    if got["wgmma_waits"] >= max(got["wgmma"], 1):
        yield f"wgmma waits: {got['wgmma_waits']} for {got['wgmma']} wgmma; they do not overlap"
    if got["shared"] > SHARED_LIMIT[arch]:
        yield f"shared memory: {got['shared']} bytes, a block has {SHARED_LIMIT[arch]}"
    if got["registers"] > expect.get("max_regs", 255):
        yield f"registers: {got['registers']}, at most {expect['max_regs']} expected"
    if expect.get("wide_loads") and not got["wide_loads"]:
        yield "wide loads: no 16-byte load (LDG.E.128)"
    if expect.get("wide_stores", expect.get("wide_loads")) and not got["wide_stores"]:
        yield "wide stores: no 16-byte store (STG.E.128)"
    for kind in ("loads", "stores"):
        if expect.get("no_scalar_half") and got[f"half_{kind}"]:
            yield f"2-byte {kind}: {got[f'half_{kind}']}, none expected"
        most = expect.get(f"max_scalar_{kind}", got[f"scalar_{kind}"])
        if got[f"scalar_{kind}"] > most:
            yield f"4-byte {kind}: {got[f'scalar_{kind}']}, at most {most} expected"
    if expect.get("i64_rows") and not got["i64_muls"]:
        yield "i64 rows: no 64-bit product in the TTIR; cast the row number with .to(tl.int64)"
    if got["blocks_per_sm"] < expect.get("min_blocks", 1):
        yield (
            f"blocks per multiprocessor: {got['blocks_per_sm']}, "
            f"at least {expect['min_blocks']} expected"
        )
    if expect.get("tensor_cores") and not got["tensor"]:
        yield "tensor cores: no HMMA, HGMMA or UTCHMMA"
    for name in expect.keys() - EXPECTATIONS.keys():
        yield f"expectation {name!r} is not known"


# What counts as worse than the golden file: (label, figure, whether new is worse than old). Where
# one more unit of registers costs a resident block, blocks_per_sm shows it.
WORSE: tuple[tuple[str, str, Callable[[int, int], bool]], ...] = (
    ("registers", "registers", lambda new, old: new > old + REGISTER_SLACK),
    ("blocks per multiprocessor", "blocks_per_sm", lt),
    ("wgmma waits", "wgmma_waits", gt),
    ("instructions", "instructions", lambda new, old: new > INSTRUCTION_SLACK * old),
    ("longest loop", "longest_loop", lambda new, old: new > INSTRUCTION_SLACK * old),
    ("i64 rows", "i64_muls", lt),
    ("bytes of shared memory", "shared", gt),
    ("wide loads", "wide_loads", lt),
    ("wide stores", "wide_stores", lt),
    ("2-byte loads", "half_loads", gt),
    ("2-byte stores", "half_stores", gt),
    ("4-byte loads", "scalar_loads", gt),
    ("4-byte stores", "scalar_stores", gt),
)


def regressions(got: Figures, golden: Figures) -> Iterator[str]:
    """Figures that are worse than those of the golden file, one line each."""
    for label, name, is_worse in WORSE:
        if is_worse(got[name], golden[name]):
            yield f"{label}: {got[name]}, {golden[name]} in the golden file"


_inherited: list[tuple[Case, str, Figures | None, bool]] = []


def _measure_inherited(number: int) -> tuple[Figures, list[str]]:
    return measure(*_inherited[number])


def gate(
    cases: Iterable[Case],
    archs: Iterable[str] = ARCHITECTURES,
    golden: Table | None = None,
    changed: bool = False,
) -> tuple[Table, list[str]]:
    """Figures of all cases, and one line per broken rule; changed: compile only changed IR."""
    known = golden if golden is not None and changed else {}
    same_source = read_sources().get(triton.__version__) == digest_sources()
    jobs = [
        (case, arch, known.get(case.name, {}).get(arch), same_source)
        for case in cases
        for arch in archs
        if arch in case.expect.get("only_on", (arch,))
    ]
    table: Table = {case.name: {} for case, *_ in jobs}
    broken = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # do not use kernels that another run compiled
        # A jit function cannot be pickled, so forked processes inherit the jobs.
        context = multiprocessing.get_context("fork")
        with context.Pool(min(4, os.cpu_count() or 1), _inherited.extend, (jobs,)) as pool:
            measured = pool.map(_measure_inherited, range(len(jobs)), chunksize=1)
    for (case, arch, *_), (got, others) in zip(jobs, measured, strict=True):
        table[case.name][arch] = got
        lines = [*others, *broken_rules(case, arch, got)]
        if golden is not None and arch in ARCHITECTURES:
            old = golden.get(case.name, {}).get(arch)
            lines += ["not in the golden file"] if old is None else regressions(got, old)
        broken += [f"{case.name} {arch}: {line}" for line in lines]
    return table, broken


SOURCES = GOLDEN / "kernel-sources.json"  # by version of triton: the kernels of its golden file


def digest_sources() -> str:
    """SHA-256 of all files of this package, which decide every case of a given triton."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.*")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def read_sources() -> dict[str, str]:
    return json.loads(SOURCES.read_text()) if SOURCES.exists() else {}


def golden_file(version: str) -> Path:
    return GOLDEN / f"aot-triton-{version}.json"


def read_golden(version: str) -> Table | None:
    path = golden_file(version)
    return json.loads(path.read_text()) if path.exists() else None


def merged(old: Table, new: Table, names: Iterable[str]) -> Table:
    """The figures of the named cases, in this order: new ones where available, else old ones."""
    both = old | new
    return {name: both[name] for name in names if name in both}


def write_table(path: Path, table: Table) -> None:
    """Write a golden file with one line per case and architecture, so that a diff is readable."""
    cases = []
    for name, by_arch in table.items():
        rows = [f"    {json.dumps(arch)}: {json.dumps(got)}" for arch, got in by_arch.items()]
        cases.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(cases) + "\n}\n")


# Heading of a printed column: figure.
COLUMNS = {
    "regs": "registers", "blocks": "blocks_per_sm", "stack": "stack", "shared": "shared",
    "ld128": "wide_loads", "st128": "wide_stores", "ld16": "half_loads", "st16": "half_stores",
    "ld32": "scalar_loads", "st32": "scalar_stores", "spills": "spills", "fp64": "fp64",
    "mma": "tensor", "wgmma": "wgmma", "waits": "wgmma_waits", "i64": "i64_muls",
}  # fmt: skip


def as_text(table: Table) -> str:
    rows = [
        [name, arch, *(str(got[figure]) for figure in COLUMNS.values())]
        for name, by_arch in table.items()
        for arch, got in by_arch.items()
    ]
    rows.insert(0, ["kernel", "arch", *COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def as_markdown(folder: Path = GOLDEN) -> str:
    """The golden files as one table, one line per case; one figure in a cell if all agree."""
    tables = {path.stem.removeprefix("aot-triton-"): path for path in folder.glob("aot-*.json")}
    versions = sorted(tables, key=lambda version: [int(part) for part in version.split(".")])
    golden = [json.loads(tables[version].read_text()) for version in versions]

    def cell(name: str, archs: Iterable[str], form: str) -> str:
        values = [
            form.format_map(table[name][arch])
            for arch in archs
            for table in golden
            if arch in table[name]
        ]
        if not values:  # not compiled for this architecture
            return ""
        return values[0] if len(set(values)) == 1 else ", ".join(values)

    columns = " | ".join(ARCHITECTURES)
    lines = [
        f"Triton {', '.join(versions)}, in this order where they differ. In parentheses: thread "
        "blocks that fit on a multiprocessor at once.",
        "",
        f"| kernel | registers {columns} | shared bytes | 16-byte loads + stores |",
        f"|---|{'---|' * len(ARCHITECTURES)}---|---|",
    ]
    for name in golden[0]:
        registers = [cell(name, [arch], "{registers} ({blocks_per_sm})") for arch in ARCHITECTURES]
        shared = cell(name, ARCHITECTURES, "{shared}")
        wide = cell(name, ARCHITECTURES, "{wide_loads} + {wide_stores}")
        lines.append(f"| {name} | {' | '.join([*registers, shared, wide])} |")
    return "\n".join(lines)


def write_markdown(path: Path) -> None:
    """Replace the text between the two marks of a document."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{path} has no lines {MARKS[0]} and {MARKS[1]}")
    path.write_text(f"{before}{MARKS[0]}\n{as_markdown()}\n{MARKS[1]}{after}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deit_fast.kernels.aot",
        description="Compiles every kernel for NVIDIA GPUs, without one, and checks the result.",
    )
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", default="", help="only cases whose name contains this")
    parser.add_argument("--changed", action="store_true", help="compile only what has a new IR")
    parser.add_argument("--write", action="store_true", help="write the golden file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="only write FILE's table")
    options = parser.parse_args(arguments)
    if options.markdown:
        write_markdown(options.markdown)
        return 0
    some_archs = options.arch != list(ARCHITECTURES)
    if options.write and some_archs:
        parser.error("--write covers all architectures: leave --arch out")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    whole = list(package_cases())
    cases = [case for case in whole if options.kernel in case.name]
    if not cases:
        parser.error(f"no kernel's name contains {options.kernel!r}")

    version = triton.__version__
    golden = read_golden(version) if options.changed or not options.write else None
    table, broken = gate(cases, options.arch, golden, options.changed)
    if golden is not None and not (options.kernel or some_archs):
        broken += [f"{name}: in the golden file only" for name in golden.keys() - table.keys()]
    print(f"triton {version}")
    print(as_text(table))
    if options.json:
        write_table(options.json, table)
    if broken:
        print(*broken, sep="\n", file=sys.stderr)
        return 1
    if options.write:
        names = [case.name for case in whole]
        write_table(golden_file(version), merged(read_golden(version) or {}, table, names))
        if not options.kernel:
            sources = read_sources() | {version: digest_sources()}
            SOURCES.write_text(json.dumps(sources, indent=2, sort_keys=True) + "\n")
    elif golden is None:
        print(f"no golden file for triton {version} to compare with; --write makes one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
