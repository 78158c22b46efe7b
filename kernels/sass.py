"""Reading machine code: tools of Triton's wheel, counts of instructions, resident blocks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def serialized_wgmma(log: str) -> list[str]:
    """Lines of ptxas's log which report that matrix instructions wait for each other."""
    return [line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]


class Instruction(NamedTuple):
    address: str
    guarded: bool  # by a predicate, so that it may do nothing
    opcode: str  # with its suffixes
    operands: list[str]
    target: int | None  # of a branch or call: index of an instruction

    def is_one_of(self, names: tuple[str, ...]) -> bool:
        """Whether its opcode has one of these names, with any further suffixes."""
        return f"{self.opcode}.".startswith(tuple(f"{name}." for name in names))

    def __str__(self) -> str:
        return f"{self.opcode} at 0x{self.address}"


_LABEL = re.compile(r"\s*(\.L_?\w+):")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_code(sass: str) -> list[Instruction]:
    """The instructions in the output of nvdisasm, in their order."""
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append(found)
    code = []
    for address, guard, opcode, rest in (line.groups() for line in lines):
        jump = re.search(r"\.L_?\w+", rest) if opcode.startswith(("BRA", "CALL")) else None
        target = labels.get(jump[0]) if jump else None
        operands = [operand.strip() for operand in rest.split(",")]
        code.append(Instruction(address, guard is not None, opcode, operands, target))
    return code


def next_of(code: list[Instruction], at: int) -> Iterator[int]:
    """Indices of the instructions that may run after this one."""
    now = code[at]
    if now.target is not None:
        yield now.target
    # "BRA P0, `(.L_x_1)" is conditional too.
    jumps = now.is_one_of(("BRA",)) and len(now.operands) == 1
    leaves = jumps or now.is_one_of(("EXIT", "RET"))
    if (now.guarded or not leaves) and at + 1 < len(code):
        yield at + 1


def loops_of(code: list[Instruction]) -> list[tuple[int, int]]:
    """Start and end of each loop: from the target of a branch back to behind the branch.

    A branch to itself is none: it fills the end of a program.
    """
    return [
        (one.target, at + 1)
        for at, one in enumerate(code)
        if one.is_one_of(("BRA",)) and one.target is not None and one.target < at
    ]


def longest_loop(code: list[Instruction]) -> int:
    """Instructions of the longest loop without another inside, 0 without a loop."""
    loops = loops_of(code)
    return max(
        (
            end - start
            for start, end in loops
            if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
        ),
        default=0,
    )


def count_instructions(sass: str) -> dict[str, int]:
    """Instructions in the output of nvdisasm, by kind.

    Global accesses by width: wide 16 bytes or more (asynchronous and TMA copies too), half 1 or 2
    bytes, scalar 4 bytes; those of 8 bytes (an int64 label) are not counted. ``tensor``: matrix
    instructions; ``wgmma``: the asynchronous ones among them (Hopper); ``wgmma_waits``: waits for
    groups of these. ``longest_loop``: instructions in the longest innermost loop, 0 without a loop.
    """
    widths = ("wide", "half", "scalar")
    counts = {f"{width}_{kind}": 0 for kind in ("loads", "stores") for width in widths}
    counts |= {"spills": 0, "fp64": 0, "tensor": 0, "wgmma": 0, "wgmma_waits": 0}
    code = parse_code(sass)
    counts |= {"instructions": 0, "longest_loop": longest_loop(code)}
    if not code:
        raise RuntimeError(
            "no instruction found in the output of nvdisasm; has its format changed?"
        )
    for one in code:
        name, *suffixes = one.opcode.split(".")
        counts["instructions"] += name != "NOP"  # padding of the last cache line
        if name in ("LDG", "LDGSTS", "UTMALDG", "STG", "UTMASTG"):
            if name.startswith("UTMA") or {"128", "256", "ENL2"} & set(suffixes):
                width = "wide"
            elif {"U16", "S16", "U8", "S8"} & set(suffixes):
                width = "half"
            elif "64" in suffixes:
                continue
            else:
                width = "scalar"
            counts[f"{width}_{'stores' if name in ('STG', 'UTMASTG') else 'loads'}"] += 1
        elif name in ("LDL", "STL"):
            counts["spills"] += 1
        elif name in ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "UTCQMMA"):
            counts["tensor"] += 1
            counts["wgmma"] += name in ("HGMMA", "QGMMA")
        elif name == "WARPGROUP":
            counts["wgmma_waits"] += "DEPBAR" in suffixes
        elif name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA") or any(
            "F64" in suffix or suffix.endswith("64H") for suffix in suffixes
        ):
            counts["fp64"] += 1
    return counts


class Multiprocessor(NamedTuple):
    """Resources that the resident blocks of one streaming multiprocessor (SM) share."""

    threads: int
    blocks: int  # at most, however small
    shared: int  # bytes, including the 1 KiB per block that the driver reserves
    registers: int = 64 * 1024
    partitions: int = 4  # each has a quarter of the registers and runs a quarter of the warps
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


def blocks_per_sm(arch: str, registers: int, warps: int, shared: int, tensor_memory: int) -> int:
    """How many blocks of a kernel are resident on one multiprocessor at once.

    Args:
        registers: of a thread.
        warps: of a block.
        shared: bytes of shared memory of a block.
        tensor_memory: columns of a block. Neither ptxas nor the driver limits them, but a block
            waits until its columns are free.

    The rules are those of NVIDIA's cuda_occupancy.h; test_aot.py compares both.
    """
    sm = MULTIPROCESSORS[arch]
    warp_registers = -(-registers * 32 // 256) * 256
    resident_warps = sm.registers // sm.partitions // warp_registers * sm.partitions
    # 1 KiB of each block belongs to the driver; memory is allocated in units of 128 bytes.
    block_shared = -(-(shared + 1024) // 128) * 128
    limits = [sm.blocks, sm.threads // (32 * warps), resident_warps // warps]
    limits.append(sm.shared // block_shared)
    if tensor_memory:
        limits.append(sm.tensor_memory // tensor_memory)
    return min(limits)
