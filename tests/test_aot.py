"""Machine code of all kernels, without a GPU: the gate itself, and that it can fail.

Compiling happens in separate processes: other tests load Triton's interpreter into this one.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from deit_fast.kernels import aot, sass

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
OTHER_TRITON = ROOT / ".venv" / "triton-3.6.0"  # `make test` puts it there
GOLDEN_FILES = sorted(aot.GOLDEN.glob("aot-triton-*.json"))

GOOD = {
    "registers": 40, "blocks_per_sm": 3, "stack": 0, "shared": 64, "wide_loads": 4,
    "half_loads": 0, "scalar_loads": 2, "wide_stores": 2, "half_stores": 0, "scalar_stores": 1,
    "spills": 0, "fp64": 0, "tensor": 9, "wgmma": 8, "wgmma_waits": 3, "i64_muls": 2,
    "instructions": 1000, "longest_loop": 200,
}  # fmt: skip


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def assert_gate_passes(folder: Path, version: str, *arguments: str, **variables: str) -> None:
    file = folder / "figures.json"
    done = run("-m", "deit_fast.kernels.aot", "--json", str(file), *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"triton {version}\n")
    table = json.loads(file.read_text())
    archs = set(aot.ARCHITECTURES)
    only_on = {case.name: case.expect.get("only_on", archs) for case in aot.package_cases()}
    assert table
    for name, by_arch in table.items():
        assert by_arch.keys() == archs & set(only_on[name]), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_case_of_each_kernel_is_compiled_in_full(tmp_path):
    """The figures that compiling gives are the golden ones; `make aot` compiles all cases.

    The test below compares the IR of every case. Where that is the golden one, the same compiler
    gives the golden figures, so one case shows whether they are still read alike.
    """
    file = tmp_path / "figures.json"
    script = f"""
from deit_fast.kernels import aot
first = {{}}
for case in aot.package_cases():
    first.setdefault(case.fn, case)
aot.package_cases = lambda: iter(first.values())
raise SystemExit(aot.main(["--arch", "sm_90", "--json", {str(file)!r}]))
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {case.fn for case in aot.package_cases()}
    assert len(json.loads(file.read_text())) == len(kernels) > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a changed kernel is compiled: hundreds of cases take minutes
@pytest.mark.parametrize("version", [triton.__version__, "3.6.0"])
def test_changed_kernels_pass_the_gate(tmp_path, version):
    other = OTHER_TRITON if version != triton.__version__ else None
    if other is not None and not other.exists():
        pytest.skip(f"no {other.relative_to(ROOT)}: `make test` installs it")
    variables = {} if other is None else {"PYTHONPATH": str(other)}
    assert_gate_passes(tmp_path, version, "--changed", **variables)


def test_only_kernels_of_the_golden_sources_are_taken_as_they_are(monkeypatch):
    assert aot.read_sources().keys() == {
        path.stem.removeprefix("aot-triton-") for path in GOLDEN_FILES
    }
    case = next(aot.package_cases())
    assert aot.measure(case, "sm_90", GOOD, same_source=True) == (GOOD, [])
    monkeypatch.setattr(aot, "ir_checksum", lambda *_: pytest.fail("computed"))
    with pytest.raises(pytest.fail.Exception, match="computed"):
        aot.measure(case, "sm_90", GOOD)


def test_unchanged_kernels_are_not_compiled(tmp_path):
    """Where the code stands does not count, nor a comment; a factor or an option does."""
    kernel = """
import triton, triton.language as tl
@triton.jit
def scale(x, C: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, C)
    tl.store(x + at, 2 * tl.load(x + at))
"""
    script = """
import kernel_0, kernel_1, kernel_2, json
from deit_fast.kernels import aot
def case(module, **options):
    signature, constexprs = {"x": "*fp32"}, {"C": 1024}
    return aot.Case("scale", module.scale, signature, constexprs, {"x": 16}, options, {})
cases = [case(kernel_0), case(kernel_1), case(kernel_2), case(kernel_0, num_warps=8)]
sums = [aot.ir_checksum(case, "sm_90") for case in cases]
first, _ = aot.measure(cases[0], "sm_90")
assert first["ir"] == sums[0] and first["wide_loads"] > 0, first
assert aot.measure(cases[0], "sm_90") == (first, []), "no log from a kernel in Triton's cache"
assert aot.measure(cases[2], "sm_90", first)[0]["ir"] == sums[2]
aot.compile_case = None
assert aot.measure(cases[1], "sm_90", first)[0] is first
for case in cases[2:]:
    try:
        aot.measure(case, "sm_90", first)
    except TypeError:
        continue
    raise AssertionError(f"{case} was taken for unchanged")
print(json.dumps(sums))
"""
    (tmp_path / "kernel_0.py").write_text(kernel)
    (tmp_path / "kernel_1.py").write_text(kernel.replace("    at", "\n    # why\n    at"))
    (tmp_path / "kernel_2.py").write_text(kernel.replace("2 *", "3 *"))
    done = run("-c", script, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    sums = json.loads(done.stdout)
    assert sums[0] == sums[1] and len({*sums}) == 3


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_golden_figures_keep_the_rules(path):
    """Those of kernels that are not compiled for a test."""
    table = json.loads(path.read_text())
    for case in aot.package_cases():
        for arch, figures in table[case.name].items():
            assert list(aot.broken_rules(case, arch, figures)) == []


def test_gate_names_each_rule_that_a_bad_kernel_breaks():
    done = run("tests/helpers/bad_kernels.py")
    assert done.returncode == 0, done.stderr
    broken: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        case, rule = re.fullmatch(r"(.+) sm_90: ([^:]+?)(?::.*)?", line).groups()
        broken.setdefault(case, set()).add(rule)
    narrow = {"wide loads", "wide stores", "2-byte loads", "2-byte stores"}
    assert broken == {
        "run-time stride": narrow,
        "run-time stride, fp32": {"wide loads", "wide stores", "4-byte loads", "4-byte stores"},
        "misaligned": narrow,
        "int32 rows": {"i64 rows"},
        "double": {"fp64"},
        "few registers": {"registers"},
        "no matrices": {"tensor cores"},
        "typing error": {"expectation 'wide_load' is not known"},
        "spills": {"stack", "spills"},
        "tail after the loop": {"ptxas log", "wgmma waits"},
    }
    # The code of the warning and what it says
    assert re.search(r"ptxas log: .*\(C7515\).* serialized .*'weighted_sums'", done.stdout)


def test_shared_memory_limit_depends_on_the_architecture():
    case = aot.Case("x", None, {}, {}, {}, {}, {})
    got = GOOD | {"shared": 200 * 1024}
    assert list(aot.broken_rules(case, "sm_90", got)) == []
    (line,) = aot.broken_rules(case, "sm_80", got)
    # An A100 has more, but an RTX card that runs the same kernels has not.
    assert line == "shared memory: 204800 bytes, a block has 101376"


def test_double_precision_must_be_announced():
    got = GOOD | {"fp64": 11}
    for expect, end in (
        ({}, "is a scalar passed as fp64?"),
        ({"max_fp64": 10}, "at most 10 expected"),
    ):
        case = aot.Case("x", None, {}, {}, {}, {}, expect)
        (line,) = aot.broken_rules(case, "sm_90", got)
        assert line == f"fp64: 11 double-precision instructions; {end}"
    announced = aot.Case("x", None, {}, {}, {}, {}, {"max_fp64": 11})
    assert list(aot.broken_rules(announced, "sm_90", got)) == []


LOG = """ptxas-blackwell info    : 11 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'C75_forward' for 'sm_90a'
ptxas warning : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 106 registers, used 1 barriers, 7515 bytes smem
"""


def test_warnings_are_found_in_the_log_of_ptxas():
    assert sass.serialized_wgmma("") == []
    lines = LOG.splitlines()
    assert sass.serialized_wgmma(LOG) == [lines[1], lines[3]]


def test_a_triton_that_hands_out_no_log_is_an_error(monkeypatch):
    monkeypatch.setattr(aot, "compile_case", lambda *_: print(LOG))
    assert aot.compile_logged(None, "sm_90") == (None, LOG + "\n")
    monkeypatch.setattr(aot, "compile_case", lambda *_: print("compiled"))
    with pytest.raises(RuntimeError, match="no log of ptxas"):
        aot.compile_logged(None, "sm_90")


@pytest.mark.parametrize(
    ("wgmma", "waits", "broken"), [(0, 0, 0), (41, 13, 0), (13, 12, 0), (41, 41, 1), (0, 1, 1)]
)
def test_as_many_waits_as_products_mean_that_none_overlap(wgmma, waits, broken):
    case = aot.Case("x", None, {}, {}, {}, {}, {})
    got = GOOD | {"wgmma": wgmma, "wgmma_waits": waits}
    line = f"wgmma waits: {waits} for {wgmma} wgmma; they do not overlap"
    assert list(aot.broken_rules(case, "sm_90", got)) == [line] * broken


def test_a_kernel_is_compiled_for_the_architectures_that_run_it(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # the gate sets its own
    case = aot.Case("x", None, {}, {}, {}, {}, {"only_on": ("sm_90",)})
    assert aot.gate([case], ["sm_80", "sm_100"]) == ({}, [])


def test_a_case_can_ask_for_resident_blocks():
    case = aot.Case("x", None, {}, {}, {}, {}, {"min_blocks": 4})
    (line,) = aot.broken_rules(case, "sm_90", GOOD)
    assert line == "blocks per multiprocessor: 3, at least 4 expected"
    assert list(aot.broken_rules(case, "sm_90", GOOD | {"blocks_per_sm": 4})) == []


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "tensor_memory", "blocks"),
    [
        ("sm_90", 168, 4, 49536, 0, 3),
        ("sm_90", 169, 4, 49536, 0, 2),  # registers come in units of 8 a thread
        ("sm_90", 173, 4, 45440, 0, 2),
        ("sm_90", 128, 8, 53504, 0, 2),
        ("sm_90", 129, 8, 53504, 0, 1),
        ("sm_90", 80, 4, 76800, 0, 3),  # exactly: 228 KiB are three times 75 and 1
        ("sm_90", 80, 4, 76801, 0, 2),
        ("sm_90", 32, 8, 0, 0, 8),  # 2048 threads
        ("sm_86", 32, 8, 0, 0, 6),  # 1536
        ("sm_90", 16, 1, 0, 0, 32),
        ("sm_100", 80, 4, 0, 128, 4),  # 512 columns of tensor memory
        ("sm_100", 80, 4, 0, 512, 1),
        ("sm_80", 80, 4, 200 * 1024, 0, 0),
    ],
)
def test_resident_blocks(arch, registers, warps, shared, tensor_memory, blocks):
    assert sass.blocks_per_sm(arch, registers, warps, shared, tensor_memory) == blocks


OCCUPANCY = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
    cudaOccDeviceProp sm = {};
    sm.maxThreadsPerBlock = 1024, sm.warpSize = 32, sm.numSms = 1;
    sm.regsPerBlock = sm.regsPerMultiprocessor = 65536;
    sm.sharedMemPerBlock = 48 * 1024, sm.reservedSharedMemPerBlock = 1024;
    int registers, warps, shared;
    while (scanf("%d %d %d %zu %d %d %d", &sm.computeMajor, &sm.computeMinor,
                 &sm.maxThreadsPerMultiprocessor, &sm.sharedMemPerMultiprocessor,
                 &registers, &warps, &shared) == 7) {
        sm.sharedMemPerBlockOptin = sm.sharedMemPerMultiprocessor - 1024;
        cudaOccFuncAttributes kernel = {};
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
        kernel.maxDynamicSharedSizeBytes = sm.sharedMemPerBlockOptin;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        cudaOccDeviceState state = {};
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &sm, &kernel, &state, 32 * warps,
                                                    shared) != CUDA_OCC_SUCCESS)
            return 1;
        printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_resident_blocks_are_those_of_nvidias_calculator(tmp_path):
    """cuda_occupancy.h, which Triton's wheel has; it knows no tensor memory."""
    header = sass.TOOLS.parent / "include"
    compiler = shutil.which("c++")
    if compiler is None or not (header / "cuda_occupancy.h").exists():
        pytest.skip("no C++ compiler, or no cuda_occupancy.h beside Triton's ptxas")
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    program = tmp_path / "occupancy"
    subprocess.run(
        [compiler, "-w", "-I", header, tmp_path / "occupancy.cpp", "-o", program], check=True
    )
    registers, warps = (16, 32, 40, 80, 128, 136, 166, 168, 169, 173, 204, 255), (1, 2, 4, 8, 16)
    shared = (0, 1, 9000, 49536, 61440, 101376, 227 * 1024)
    cases = list(itertools.product(sass.MULTIPROCESSORS, registers, warps, shared))
    lines = []
    for arch, *rest in cases:
        sm = sass.MULTIPROCESSORS[arch]
        lines.append(" ".join(map(str, (*divmod(int(arch[3:]), 10), sm.threads, sm.shared, *rest))))
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0
    ours = [sass.blocks_per_sm(*case, 0) for case in cases]
    assert ours == [int(line) for line in done.stdout.split()] and len({*ours}) > 10


def test_figures_as_good_as_the_golden_ones_pass():
    better = GOOD | {"registers": 30, "shared": 0, "wide_loads": 5, "scalar_loads": 0}
    better |= {"blocks_per_sm": 4, "wgmma_waits": 2}
    slack = GOOD | {"registers": GOOD["registers"] + aot.REGISTER_SLACK, "instructions": 1050}
    slack |= {"longest_loop": 210}
    for got in (GOOD, better, slack):
        assert list(aot.regressions(got, GOOD)) == []


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("registers", 49, "registers: 49, 40 in the golden file"),
        ("blocks_per_sm", 2, "blocks per multiprocessor: 2, 3 in the golden file"),
        ("wgmma_waits", 4, "wgmma waits: 4, 3 in the golden file"),
        ("instructions", 1051, "instructions: 1051, 1000 in the golden file"),
        ("longest_loop", 211, "longest loop: 211, 200 in the golden file"),
        ("i64_muls", 1, "i64 rows: 1, 2 in the golden file"),
        ("shared", 65, "bytes of shared memory: 65, 64 in the golden file"),
        ("wide_loads", 3, "wide loads: 3, 4 in the golden file"),
        ("wide_stores", 0, "wide stores: 0, 2 in the golden file"),
        ("half_loads", 1, "2-byte loads: 1, 0 in the golden file"),
        ("half_stores", 8, "2-byte stores: 8, 0 in the golden file"),
        ("scalar_loads", 3, "4-byte loads: 3, 2 in the golden file"),
        ("scalar_stores", 2, "4-byte stores: 2, 1 in the golden file"),
    ],
)
def test_worse_figures_are_named(field, value, line):
    assert list(aot.regressions(GOOD | {field: value}, GOOD)) == [line]


def test_instructions_are_counted_by_width():
    # As nvdisasm prints them: predicates, cache hints, 32-byte loads of sm_100, a comment of bytes.
    code = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;        /* 0x0000df00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/             @!UP1 LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
        /*0040*/                   UTMALDG.2D [UR8], [UR6] ;
        /*0050*/               @P1 LDG.E.EF.U16 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0080*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0090*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P0 STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   LDL.LU R4, [R1] ;
        /*00d0*/                   STL.64 [R1], R4 ;
        /*00e0*/                   DFMA R4, R2, R2, R4 ;
        /*00f0*/                   F2F.F64.F32 R4, R2 ;
        /*0100*/                   MUFU.RCP64H R5, R4 ;
        /*0110*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0128*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;
        /*012c*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*012e*/                   WARPGROUP.ARRIVE ;
        /*012f*/                   DEPBAR.LE SB0, 0x2 ;
        /*0130*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR6] ;
        /*0140*/                   IMAD.WIDE R2, R2, 0x4, R4 ;
        /*0150*/                   NOP ;
    """
    assert sass.count_instructions(code) == {
        "wide_loads": 4, "half_loads": 2, "scalar_loads": 1,
        "wide_stores": 1, "half_stores": 1, "scalar_stores": 1,
        "spills": 2, "fp64": 3, "tensor": 4, "wgmma": 2, "wgmma_waits": 1,
        "instructions": 25, "longest_loop": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="nvdisasm"):
        sass.count_instructions("no instruction here")


def test_the_longest_loop_without_another_inside():
    line = "        /*{:04x}*/                   {} ;"
    code = "\n".join(
        [
            *(line.format(0, "MOV R1, R2"), ".L_x_0:", line.format(16, "MOV R1, R2")),
            *(".L_x_1:", line.format(32, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8]")),
            *(line.format(48, "FADD R1, R1, R2"), line.format(64, "@P0 BRA `(.L_x_1)")),
            *(line.format(80, "@P1 BRA `(.L_x_0)"), line.format(96, "BRA `(.L_x_3)")),
            *(".L_x_2:", line.format(112, "BRA `(.L_x_2)"), ".L_x_3:", line.format(128, "EXIT")),
        ]
    )
    assert sass.count_instructions(code)["longest_loop"] == 3


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_attentions_backward_fits_three_times_with_a_short_loop(path: Path) -> None:
    """DeiT's shapes on an H100; `head` is the form that one program a head takes."""
    golden = json.loads(path.read_text())
    for name, most in (("both", 290), ("head", 200)):
        figures = golden[f"attention/{name}-bf16-N=198-D=64"]["sm_90"]
        assert figures["blocks_per_sm"] >= 3 and figures["longest_loop"] <= most
        assert figures["wgmma_waits"] < figures["wgmma"] / 2


def test_some_kernels_can_be_written_anew():
    old = {name: {"sm_90": {"registers": 1}} for name in ("gone", "b", "a")}
    new = {"b": {"sm_90": {"registers": 2}}, "c": {"sm_90": {"registers": 3}}}
    got = aot.merged(old, new, ["a", "b", "c"])
    assert got == {"a": old["a"], "b": new["b"], "c": new["c"]} and list(got) == ["a", "b", "c"]


def test_last_program_of_the_loss_sees_what_the_others_stored():
    """Nothing of this shows in the interpreter, where programs run one after the other."""
    script = """
from deit_fast.kernels import aot
for case in aot.package_cases():
    if case.name == "distillation_loss/bf16-C=1000-soft-dense-pair-ce":
        print(aot.compile_case(case, "sm_90").asm["ptx"])
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^.*?\b(bar\.sync|atom\.\S+|st\.global|ld\.global\S*)", done.stdout, re.M)
    (at,) = (i for i, name in enumerate(found) if name.startswith("atom."))
    assert found[at] == "atom.global.gpu.acq_rel.add.u32"
    # All threads' stores come before the atomic, and all loads after it: one thread executes it.
    before, after = found[:at], found[at + 1 :]
    assert before[-1] == "bar.sync" and "st.global" in before
    first_load = next(i for i, name in enumerate(after) if name.startswith("ld."))
    assert "bar.sync" in after[:first_load]
    # Row losses are read from the L2: this processor's own cache may hold older ones.
    assert {name for name in after if name.startswith("ld.")} == {"ld.global.cg.b32"}


def test_golden_files_cover_the_same_kernels():
    assert aot.golden_file("3.6.0") in GOLDEN_FILES and len(GOLDEN_FILES) >= 2
    first, *others = (json.loads(path.read_text()) for path in GOLDEN_FILES)
    assert all(other.keys() == first.keys() for other in others), "`make aot-golden` writes all"


def test_document_shows_the_golden_files(tmp_path):
    copy = tmp_path / "performance.md"
    copy.write_text(re.sub(r"\| sm_90 \|[^\n]*", "| sm_90 | stale |", DOCUMENT.read_text()))
    assert copy.read_text() != DOCUMENT.read_text()
    aot.write_markdown(copy)
    assert copy.read_text() == DOCUMENT.read_text(), "`make aot-golden` writes the table anew"


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--kernel", "absent"], {}, "no kernel's name contains 'absent'"),
        (["--write", "--arch", "sm_90"], {}, "--write covers all"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 leaves nothing to compile"),
    ],
)
def test_wrong_calls_end_with_one_clear_line(arguments, variables, words):
    done = run("-m", "deit_fast.kernels.aot", *arguments, **variables)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]


def build_cuda_object(folder: Path) -> Path:
    """csrc/cuda/record_codec.cu compiled with the flags that setup.py gives."""
    script = f"""
import shutil, setuptools
from pathlib import Path
setuptools.setup = lambda **_: None
import setup
ninja, folder = setup.find_ninja(), Path({str(folder)!r})
setup.find_ninja = lambda: shutil.which("true")  # write the rules, build nothing yet
setup.build_native(folder, folder / "library.so")
print(setup.find_nvcc() and ninja)
"""
    written = run("-c", script)
    assert written.returncode == 0, written.stderr
    ninja = written.stdout.splitlines()[-1]
    if ninja == "None":
        pytest.skip("no nvcc")
    target = folder / "csrc_cuda_record_codec.cu.o"
    done = subprocess.run([ninja, "-C", folder, target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return target


def test_cuda_of_the_cache_has_wide_accesses_and_no_local_memory(tmp_path):
    target = build_cuda_object(tmp_path)
    subprocess.run(
        [sass.TOOLS / "cuobjdump", "--extract-elf", "all", target], cwd=tmp_path, check=True
    )
    cubins = {path.name.split(".")[-2]: str(path) for path in tmp_path.glob("*.cubin")}
    assert cubins.keys() == set(aot.ARCHITECTURES)
    for arch, cubin in cubins.items():
        usage = sass.tool("cuobjdump", "--dump-resource-usage", cubin)
        assert set(re.findall(r"(?:STACK|LOCAL):\d+", usage)) == {"STACK:0", "LOCAL:0"}, arch
        code = sass.tool("nvdisasm", "--print-code", cubin)
        sections = re.split(r"^//-+ \.text\.(\S+) -+$", code, flags=re.MULTILINE)[1:]
        counts = {
            name: sass.count_instructions(text)
            for name, text in zip(sections[::2], sections[1::2], strict=True)
        }
        assert all(got["spills"] == 0 for got in counts.values()), arch
        # Encoding sums exactly, in double and integers, by design.
        decoding = [got for name, got in counts.items() if "encode_rows" not in name]
        assert all(got["fp64"] == 0 for got in decoding), arch
        # Variants for unaligned rows or rows too wide to stage have narrow accesses.
        for kernel, access in (("decode_bytes", "wide_stores"), ("encode_rows", "wide_loads")):
            best = max((got[access] for name, got in counts.items() if kernel in name), default=0)
            assert best > 0, (arch, kernel, access)
