"""Instructions that interfere with a wgmma in flight: on short machine code, and on a real kernel.

A listing here is of sm_90 as nvdisasm prints it. Its wgmma have 64 x 16 sums: 8 registers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deit_fast.kernels.sass import parse_code
from deit_fast.kernels.wgmma_hazards import find_hazards

ROOT = Path(__file__).parent.parent

# Operand A in R4 to R7, sums in R24 to R31; the end of a group.
FROM_REGISTERS = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0"
# Both matrices in shared memory, sums in R40 to R47.
FROM_MEMORY = "HGMMA.64x16x16.F32.BF16 R40, gdesc[UR8], RZ, !UPT, gsb0"
OPEN_GROUP = FROM_MEMORY.removesuffix(", gsb0")
WAIT, WAIT_FOR_OLDER = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
STORE = "STS.128 [R2+UR5+0xe000], R60"


def listing(*lines: str) -> str:
    """Numbered instructions; a label is a line that ends with a colon."""
    addresses = iter(range(0, 16 * len(lines), 16))
    return "\n".join(
        line if line.endswith(":") else f"        /*{next(addresses):04x}*/            {line} ;"
        for line in lines
    )


def rules_broken(*lines: str, warps: int = 4) -> list[str]:
    return [line.partition(":")[0] for line in find_hazards(listing(*lines, "EXIT"), warps)]


@pytest.mark.parametrize(
    ("touch", "how"),
    [
        ("MOV R4, R60", "writes R4, which {} reads"),
        ("@!P0 FADD.FTZ R7, R60, R61", "writes R7, which {} reads"),
        ("LDS.128 R4, [R2+0x10]", "writes R4, which {} reads"),
        ("LDG.E.64 R6, desc[UR4][R2.64]", "writes R6, which {} reads"),
        ("SHFL.BFLY PT, R5, R60, 0x2, 0x1f", "writes R5, which {} reads"),
        ("LOP3.LUT P0, R5, R60, 0x1, RZ, 0xc0, !PT", "writes R5, which {} reads"),
        ("CS2R R24, SRZ", "writes R24, which {} adds to"),
        ("FMUL R60, R31, UR7", "reads R31, which {} adds to"),
        ("FMUL R31, R31, UR7", "writes R31, which {} adds to"),
        ("FMNMX R60, R61, |R25|, !PT", "reads R25, which {} adds to"),
        ("STG.E.128 desc[UR4][R2.64], R28", "reads R28, which {} adds to"),
        ("STS.128 [R2+UR5], R24", "reads R24, which {} adds to"),
        ("FSETP.GE.AND P0, PT, R26, RZ, PT", "reads R26, which {} adds to"),
        (FROM_MEMORY.replace("R40", "R0"), "writes R4, which {} reads"),
        (FROM_REGISTERS.replace("R4,", "R28,").replace("R24", "R40"), "reads R28, which {} adds"),
        (FROM_REGISTERS.replace("64x16", "64x32"), "writes R24, which {} adds to"),
    ],
    ids=range(16),
)
def test_a_register_that_is_touched_before_the_wait(touch, how):
    (line,) = find_hazards(listing(FROM_REGISTERS, touch, WAIT, "EXIT"), 4)
    name, _, rest = line.partition(": ")
    assert name == "wgmma registers"
    at = touch.split()[1 if touch.startswith("@") else 0] + " at 0x0010 "
    assert rest.startswith(at + how.format("HGMMA.64x16x16.F32.BF16 at 0x0000"))
    assert rest.endswith("until the next WARPGROUP.DEPBAR")
    assert rules_broken(FROM_REGISTERS, WAIT, touch) == []
    assert rules_broken(touch, WAIT, FROM_REGISTERS, WAIT) == []


@pytest.mark.parametrize(
    "other",
    [
        "FADD R60, R4, R5",  # operand A is read only
        "FSETP.GE.AND P0, PT, R4, RZ, PT",  # writes a predicate
        "BAR.SYNC.DEFER_BLOCKING R4, R5",
        "STS.128 [R2], R4",
        "LDS.128 R8, [R4+UR5]",
        "MOV R3, R32",  # beside both
        "UMOV UR4, UR24",  # another register file
        FROM_REGISTERS,  # the next step of the same sums
    ],
    ids=lambda other: other.split()[0],
)
def test_registers_that_may_be_used_before_the_wait(other):
    assert rules_broken(FROM_REGISTERS, other, WAIT, "MOV R4, R24") == []


def test_sums_of_halves_take_half_the_registers():
    halves = FROM_REGISTERS.replace("F32.BF16", "F16")
    assert rules_broken(halves, "MOV R28, R60", WAIT) == []
    assert rules_broken(halves, "MOV R27, R60", WAIT) == ["wgmma registers"]


def test_a_wait_may_leave_the_newest_group_in_flight():
    both = (FROM_REGISTERS, FROM_MEMORY, WAIT_FOR_OLDER)
    assert rules_broken(*both, "MOV R4, R60", WAIT) == []
    assert rules_broken(*both, "MOV R60, R40", WAIT) == ["wgmma registers"]
    same_group = (FROM_REGISTERS.removesuffix(", gsb0"), FROM_MEMORY, WAIT_FOR_OLDER)
    assert rules_broken(*same_group, "MOV R4, R60", WAIT) == ["wgmma registers"]
    assert rules_broken(*same_group, WAIT, "MOV R4, R60") == []


def test_every_path_is_followed():
    loop = (".L_x_0:", "MOV R4, R60", FROM_REGISTERS)
    assert rules_broken(*loop, WAIT, "@P0 BRA `(.L_x_0)") == []
    assert rules_broken(*loop, "@P0 BRA `(.L_x_0)", WAIT) == ["wgmma registers"]
    assert rules_broken(*loop, "@P0 EXIT", "BRA P1, `(.L_x_0)", WAIT) == ["wgmma registers"]
    skipped = ("BRA `(.L_x_1)", "MOV R4, R60", ".L_x_1:", WAIT)
    assert rules_broken(FROM_REGISTERS, *skipped) == []
    assert rules_broken(FROM_REGISTERS, "@!P0 " + skipped[0], *skipped[1:]) == ["wgmma registers"]
    with_condition = "BRA P1, `(.L_x_1)"
    assert rules_broken(FROM_REGISTERS, with_condition, *skipped[1:]) == ["wgmma registers"]
    assert rules_broken(FROM_REGISTERS, "EXIT", "MOV R4, R60") == []


@pytest.mark.parametrize(
    "write",
    [
        *("STS [R2], R60", "@P0 STSM.16.M88.4 [R2], R60", "@UP2 UTMALDG.2D [UR12], [UR4]"),
        *("LDGSTS.E.BYPASS.128 [R2+0x4000], desc[UR4][R60.64], P1", "ATOMS.ADD RZ, [R2], R60"),
        "@UP1 SYNCS.EXCH.64 URZ, [UR12], UR6",
    ],
    ids=lambda write: write.split(".")[0].split()[-1],
)
def test_a_write_after_the_wait_for_a_wgmma_that_crossed_a_barrier(write):
    crossing = (FROM_MEMORY, BARRIER, WAIT)
    (line,) = find_hazards(listing(*crossing, write, "EXIT"), 8)
    opcode = write.split()[1 if write.startswith("@") else 0]
    assert line == (
        f"wgmma shared memory: {opcode} at 0x0030 writes, without a barrier after the wait for "
        "HGMMA.64x16x16.F32.BF16 at 0x0000, which was in flight across a barrier"
    )
    assert rules_broken(*crossing, BARRIER, write, warps=8) == []
    assert rules_broken(*crossing, "BAR.RED.OR.DEFER_BLOCKING 0x0, P0", write, warps=8) == []
    assert rules_broken(*crossing, write, warps=4) == []  # one warpgroup waits for all
    assert rules_broken(*crossing, "LDS R60, [R2]", "STG.E [R2], R60", warps=8) == []
    assert rules_broken(FROM_MEMORY, WAIT, write, warps=8) == []  # Triton sees this case


def test_a_write_in_the_next_turn_of_a_loop():
    loop = (".L_x_0:", STORE, BARRIER, FROM_MEMORY, BARRIER, WAIT, "@P0 BRA `(.L_x_0)")
    assert rules_broken(*loop, warps=8) == ["wgmma shared memory"]
    assert rules_broken(*loop[:-1], BARRIER, loop[-1], warps=8) == []
    # One wgmma is always in flight: the wait is for that of the turn before.
    loop = (".L_x_0:", BARRIER, FROM_MEMORY, WAIT_FOR_OLDER, STORE, "@P0 BRA `(.L_x_0)", WAIT)
    assert rules_broken(*loop, warps=8) == ["wgmma shared memory"]
    assert rules_broken(*loop[:4], BARRIER, *loop[4:], warps=8) == []


def test_one_line_for_each_rule():
    code = (OPEN_GROUP, FROM_REGISTERS, BARRIER, "MOV R5, R40", WAIT, STORE, STORE)
    registers, memory = find_hazards(listing(*code, "EXIT"), 8)
    assert registers.startswith("wgmma registers: MOV at 0x0030 reads R40")
    assert registers.endswith("; 1 more")
    assert memory.startswith("wgmma shared memory: STS.128 at 0x0050") and "; 1 more" in memory
    assert find_hazards(listing("LDG.E.128 R4, desc[UR4][R2.64]", STORE, "EXIT"), 8) == []


def test_a_real_kernel_has_hazards_without_its_waits_or_its_barriers():
    """Attention's gradient of keys and values, whose two warpgroups cross barriers."""
    script = """
import json, re
from deit_fast.kernels import aot
from deit_fast.kernels.sass import tool
name = "attention/keys-bf16-N=577-D=64"
(case,) = (case for case in aot.package_cases() if case.name == name)
compiled = aot.compile_logged(case, "sm_90")
aot.compile_logged = lambda *_: compiled
listings, lines = [], []
for omitted in ("", "WARPGROUP.DEPBAR", "BAR.SYNC"):
    def changed_tool(*arguments):
        text = tool(*arguments)
        if arguments[0] != "nvdisasm":
            return text
        kept, waited = [], False
        for line in text.splitlines():
            waited |= "WARPGROUP.DEPBAR" in line
            # A barrier is omitted only after a wait: one that wgmma cross remains.
            if not omitted or omitted not in line or omitted == "BAR.SYNC" and not waited:
                kept.append(line)
            waited &= "HGMMA" not in line
        listings.append("\\n".join(kept))
        return listings[-1]
    aot.tool = changed_tool
    lines.append(aot.measure(case, "sm_90")[1])
print(json.dumps([listings[0], lines]))
"""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sass, (as_compiled, without_waits, without_barriers) = json.loads(done.stdout)
    assert as_compiled == []
    assert [line.split(":")[0] for line in without_waits] == ["wgmma registers"]
    assert [line.split(":")[0] for line in without_barriers] == ["wgmma shared memory"]

    code = parse_code(sass)
    # Each line of an instruction is read, and each branch has its target.
    assert len(code) == sass.count("/*") > 500
    assert all(one.target is not None for one in code if one.is_one_of(("BRA",)))
    # Registers come from both operands, and vectors are aligned (`wgmma_hazards.accesses`).
    wgmma = [one for one in code if one.is_one_of(("HGMMA",))]
    operands = [one.operands[1] for one in wgmma]
    assert any(operand.startswith("R") for operand in operands)
    assert any(operand.startswith("gdesc") for operand in operands)
    assert {int(one.operands[0][1:]) % 8 for one in wgmma} == {0}
    loads = [one for one in code if one.is_one_of(("LDS.128", "LDG.E.128", "LDSM.16.M88.4"))]
    assert loads and {int(one.operands[0][1:]) % 4 for one in loads} == {0}
