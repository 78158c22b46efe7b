"""Compiles every kernel of this package ahead of time and checks its machine code; needs no GPU.

    python -m deit_fast.kernels.aot [--arch sm_80 sm_90 sm_100] [--kernel NAME] [--json FILE]
    python -m deit_fast.kernels.aot --changed     # compiles only what the golden file does not know
    python -m deit_fast.kernels.aot --write       # after a wanted change: make the golden file anew
    python -m deit_fast.kernels.aot --write --kernel NAME          # or these kernels' lines of it
    python -m deit_fast.kernels.aot --markdown docs/performance.md  # its table, from those files

A kernel file takes part by defining ``aot_cases()``, which yields tuples like `Case`. Every case is
compiled for every architecture; the cubin is read with the cuobjdump and nvdisasm of Triton's own
wheel. Exits with 1 and one line per broken rule where a kernel

- uses local memory (a stack or spills), fp64 instructions that its case does not announce, or more
  shared memory than a block has;
- has serialized wgmma instructions (sm_90): ptxas warns of it in its log (C7510, C7515 and other
  codes that begin with C75), or the machine code waits as often as it multiplies;
- fails what its case expects (see `EXPECTATIONS`);
- got worse than tests/golden/aot-triton-<version>.json says: more registers, narrower loads, fewer
  thread blocks that fit on a multiprocessor at once, more instructions in all or in a loop.

Without a golden file for the triton at hand all but the last are checked all the same. Another
triton runs beside the installed one: PYTHONPATH=<folder with it> python -m deit_fast.kernels.aot.

The golden file also has a checksum of each kernel's intermediate representation as Triton's front
end makes it, a sixteenth of the work. One triton makes one machine code of it, so ``--changed``
takes the file's figures where it is the same, and checks the rules with them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from .launching import Launch, signature
from .sass import count_instructions

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one block can ask for. An A100's have 163 KiB, but what fits it has to
# fit the GPUs of sm_86, sm_89 and sm_120 as well, which have no golden figures (--arch compiles
# for them).
SHARED_LIMIT = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), 99 * 1024)
SHARED_LIMIT |= {"sm_90": 227 * 1024, "sm_100": 227 * 1024}
# Registers are allocated in units of 8 a thread. Where a unit more costs a resident block, the rule
# on blocks per multiprocessor says so.
REGISTER_SLACK = 8
INSTRUCTION_SLACK = 1.05


class Multiprocessor(NamedTuple):
    """What the resident blocks of one streaming multiprocessor (SM) share."""

    threads: int
    blocks: int  # the most that it holds, however small they are
    shared: int  # bytes, with those that the driver reserves in each block
    registers: int = 64 * 1024
    partitions: int = 4  # each has a quarter of the registers and runs every fourth warp
    tensor_memory: int = 512  # columns; compute capability 10 only


# Table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 * 1024),
    "sm_86": Multiprocessor(1536, 16, 100 * 1024),
    "sm_89": Multiprocessor(1536, 24, 100 * 1024),
    "sm_90": Multiprocessor(2048, 32, 228 * 1024),
    "sm_100": Multiprocessor(2048, 32, 228 * 1024),
    "sm_120": Multiprocessor(1536, 24, 100 * 1024),
}
MARKS = ("<!-- made by deit_fast.kernels.aot: begin -->", "<!-- end -->")

EXPECTATIONS = {
    "wide_loads": "True: the rows are read in 16-byte words, and written so (see wide_stores)",
    "wide_stores": "default: wide_loads; False for a kernel that writes no rows",
    "no_scalar_half": "True: no global load or store of 1 or 2 bytes",
    "max_scalar_loads": "most 4-byte global loads; bounds the unvectorised load of float32 rows",
    "max_scalar_stores": "the same of stores; a loss per row is one",
    "max_regs": "most registers of a thread",
    "i64_rows": "True: row offsets are products of 64-bit integers, so that large tensors work",
    "max_fp64": "most double-precision instructions; none where left out, an accident then",
    "tensor_cores": "True: matrix instructions are present",
    "min_blocks": "fewest thread blocks that fit on a multiprocessor at once",
    "only_on": "architectures that run the kernel; it is compiled for no other",
}


class Case(NamedTuple):
    """One specialisation of a kernel, with what its machine code must show.

    ``signature``: Triton type of each argument ("*bf16", "i32", "fp32", ...); constexprs may be
    left out. ``attrs``: {argument: power of two that divides it}. Give exactly what the launcher
    gives: pointers and integers that it finds divisible by 16 are what 16-byte loads hang on.
    ``options``: num_warps, num_stages. ``expect``: see `EXPECTATIONS`.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[Any, Any]
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
        for case in cases() if cases else ():
            case = case_of(*case) if len(case) == 3 else Case._make(case)
            yield case._replace(name=f"{module.name.removesuffix('_launch')}/{case.name}")


def case_of(name: str, launch: Launch, expect: dict[str, Any]) -> Case:
    """The case of a recorded launch."""
    kernel, _, arguments = launch
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    return Case(name, kernel, *signature(kernel, arguments), options, expect)


def as_source(case: Case, arch: str) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What `triton.compile` takes: source, target, options."""
    names = case.fn.arg_names
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attrs = {
        ((names.index(key),) if isinstance(key, str) else key): (
            [["tt.divisibility", value]] if isinstance(value, int) else value
        )
        for key, value in case.attrs.items()
    }
    source = ASTSource(case.fn, signature, case.constexprs, attrs)
    # Stated because triton 3.10 changes the default.
    options = {"enable_fp_fusion": True, **case.options}
    return source, GPUTarget("cuda", int(arch[3:]), 32), options


def compile_case(case: Case, arch: str) -> Any:
    source, target, options = as_source(case, arch)
    return triton.compile(source, target=target, options=options)


def ir_checksum(case: Case, arch: str) -> int:
    """48 bits of SHA-256 over options and IR; names and places in the source do not count."""
    source, target, options = as_source(case, arch)
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    text = str(source.make_ir(target, parsed, functions, backend.get_module_map(), context))
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)|^#loc.*\n", "", text, flags=re.MULTILINE)
    names: dict[str, str] = {}
    text = re.sub(
        r'@"[^"]*"|[@%][\w.$-]+', lambda name: names.setdefault(name[0], f"%{len(names)}"), text
    )
    return int(hashlib.sha256(f"{sorted(options.items())}\n{text}".encode()).hexdigest()[:12], 16)


def compile_logged(case: Case, arch: str) -> tuple[Any, str]:
    """The compiled kernel and what ptxas wrote when Triton ran it (Triton always passes -v)."""
    printed = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # from its cache no ptxas runs, and no log comes
        compiled = compile_case(case, arch)
    log = printed.getvalue()
    if not re.search(r"Used \d+ registers", log):
        raise RuntimeError(f"no log of ptxas from triton {triton.__version__}: {log!r}")
    return compiled, log


def serialized_wgmma(log: str) -> list[str]:
    """The lines of ptxas's log that say that matrix instructions wait for each other."""
    return [line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]


def blocks_per_sm(arch: str, registers: int, warps: int, shared: int, tensor_memory: int) -> int:
    """How many blocks of a kernel are resident on one multiprocessor at once.

    ``registers`` of a thread, ``warps`` and bytes of ``shared`` memory of a block; columns of
    ``tensor_memory``, which ptxas and the driver do not limit, but a block waits for its own.
    As in NVIDIA's cuda_occupancy.h, which test_aot.py compares it with.
    """
    sm = MULTIPROCESSORS[arch]
    of_a_warp = -(-registers * 32 // 256) * 256
    resident_warps = sm.registers // sm.partitions // of_a_warp * sm.partitions
    # Each block also has 1 KiB that belongs to the driver; memory comes in units of 128 bytes.
    of_a_block = -(-(shared + 1024) // 128) * 128
    limits = [sm.blocks, sm.threads // (32 * warps), resident_warps // warps]
    limits.append(sm.shared // of_a_block)
    if tensor_memory:
        limits.append(sm.tensor_memory // tensor_memory)
    return min(limits)


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(case: Case, arch: str, known: Figures | None = None) -> tuple[Figures, list[str]]:
    """Compile one case and count what matters in its machine code; also what ptxas warns of.

    `known` and no warning where the IR is that of the golden file, which has no kernel with one.
    """
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
    return figures, serialized_wgmma(log)


def broken_rules(case: Case, arch: str, got: Figures) -> Iterator[str]:
    """What the machine code itself does wrong, one line each."""
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


def regressions(got: Figures, golden: Figures) -> Iterator[str]:
    """Where the machine code is worse than the golden file says, one line each."""
    if got["registers"] > golden["registers"] + REGISTER_SLACK:
        yield f"registers: {got['registers']}, {golden['registers']} in the golden file"
    if got["blocks_per_sm"] < golden["blocks_per_sm"]:
        yield (
            f"blocks per multiprocessor: {got['blocks_per_sm']}, "
            f"{golden['blocks_per_sm']} in the golden file"
        )
    if got["wgmma_waits"] > golden["wgmma_waits"]:
        yield f"wgmma waits: {got['wgmma_waits']}, {golden['wgmma_waits']} in the golden file"
    if got["instructions"] > INSTRUCTION_SLACK * golden.get("instructions", got["instructions"]):
        yield f"instructions: {got['instructions']}, {golden['instructions']} in the golden file"
    loop = golden.get("longest_loop", got["longest_loop"])
    if got["longest_loop"] > INSTRUCTION_SLACK * loop:
        yield f"longest loop: {got['longest_loop']} instructions, {loop} in the golden file"
    if got["i64_muls"] < golden["i64_muls"]:
        yield f"i64 rows: {got['i64_muls']} products, {golden['i64_muls']} in the golden file"
    if got["shared"] > golden["shared"]:
        yield f"shared memory: {got['shared']} bytes, {golden['shared']} in the golden file"
    for kind in ("loads", "stores"):
        if (wide := got[f"wide_{kind}"]) < golden[f"wide_{kind}"]:
            yield f"wide {kind}: {wide}, {golden[f'wide_{kind}']} in the golden file"
        for width, size in (("half", "2-byte"), ("scalar", "4-byte")):
            if (count := got[f"{width}_{kind}"]) > golden[f"{width}_{kind}"]:
                yield f"{size} {kind}: {count}, {golden[f'{width}_{kind}']} in the golden file"


_inherited: list[tuple[Case, str, Figures | None]] = []


def _measure_inherited(number: int) -> tuple[Figures, list[str]]:
    return measure(*_inherited[number])


def gate(
    cases: Iterable[Case],
    archs: Iterable[str] = ARCHITECTURES,
    golden: Table | None = None,
    changed: bool = False,
) -> tuple[Table, list[str]]:
    """Compile all cases, or those whose IR changed; their figures, and one line per broken rule."""
    known = golden if golden is not None and changed else {}
    jobs = [
        (case, arch, known.get(case.name, {}).get(arch))
        for case in cases
        for arch in archs
        if arch in case.expect.get("only_on", (arch,))
    ]
    table: Table = {case.name: {} for case, *_ in jobs}
    broken = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a compiled kernel of another run proves nothing
        # Forked: a jit function cannot be sent, so the processes inherit the jobs.
        context = multiprocessing.get_context("fork")
        with context.Pool(min(4, os.cpu_count() or 1), _inherited.extend, (jobs,)) as pool:
            measured = pool.map(_measure_inherited, range(len(jobs)), chunksize=1)
    for (case, arch, _), (got, warnings) in zip(jobs, measured, strict=True):
        table[case.name][arch] = got
        lines = [*(f"ptxas log: {line}" for line in warnings), *broken_rules(case, arch, got)]
        if golden is not None and arch in ARCHITECTURES:
            old = golden.get(case.name, {}).get(arch)
            lines += ["not in the golden file"] if old is None else regressions(got, old)
        broken += [f"{case.name} {arch}: {line}" for line in lines]
    return table, broken


def golden_file(version: str) -> Path:
    return GOLDEN / f"aot-triton-{version}.json"


def read_golden(version: str) -> Table | None:
    path = golden_file(version)
    return json.loads(path.read_text()) if path.exists() else None


def merged(old: Table, new: Table, names: Iterable[str]) -> Table:
    """The figures of the named cases, in their order: the new ones, and of the others the old."""
    both = old | new
    return {name: both[name] for name in names if name in both}


def write_table(path: Path, table: Table) -> None:
    """One line per case and architecture, so that a diff shows what changed."""
    cases = []
    for name, by_arch in table.items():
        rows = [f"    {json.dumps(arch)}: {json.dumps(got)}" for arch, got in by_arch.items()]
        cases.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(cases) + "\n}\n")


HEADER = (
    *("kernel", "arch", "regs", "blocks", "stack", "shared", "ld128", "st128"),
    *("ld16", "st16", "ld32", "st32", "spills", "fp64", "mma", "wgmma", "waits", "i64"),
)
FIELDS = (
    *("registers", "blocks_per_sm", "stack", "shared", "wide_loads", "wide_stores"),
    *("half_loads", "half_stores", "scalar_loads", "scalar_stores", "spills", "fp64"),
    *("tensor", "wgmma", "wgmma_waits", "i64_muls"),
)


def as_text(table: Table) -> str:
    rows = [
        [name, arch, *(str(got[field]) for field in FIELDS)]
        for name, by_arch in table.items()
        for arch, got in by_arch.items()
    ]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (HEADER, *rows)
    )


def as_markdown(folder: Path = GOLDEN) -> str:
    """The golden files as one table, a line per case; a cell has one figure where all agree."""
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
        if not values:  # no GPU of this architecture runs it
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
    """Replace what stands between the two marks of a document."""
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
    parser.add_argument(
        "--changed", action="store_true", help="compile only kernels of another IR than the golden"
    )
    parser.add_argument("--write", action="store_true", help="make the golden file anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the golden files there as a table; end"
    )
    options = parser.parse_args(arguments)
    if options.markdown:
        write_markdown(options.markdown)
        return 0
    part = options.kernel != "" or options.arch != list(ARCHITECTURES)
    if options.write and options.arch != list(ARCHITECTURES):
        parser.error("--write covers all architectures: leave --arch out")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    whole = list(package_cases())
    cases = [case for case in whole if options.kernel in case.name]
    if not cases:
        parser.error(f"no kernel's name contains {options.kernel!r}")

    version = triton.__version__
    golden = None if options.write else read_golden(version)
    table, broken = gate(cases, options.arch, golden, options.changed)
    if golden is not None and not part:
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
    elif golden is None:
        print(f"no golden file for triton {version}: compared with nothing; --write makes it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
