"""Races of asynchronous matrix instructions (wgmma) in the machine code of Hopper, sm_90.

In machine code a wgmma is an HGMMA (IGMMA, QGMMA). It runs while the instructions after it do: it
reads shared memory and, for some, the registers of its operand A, and adds to other registers.
"gsb0" ends a group of them; "WARPGROUP.DEPBAR.LE gsb0, N" waits until at most the N newest groups
run. Until that wait a wgmma is in flight. Two known faults of compilers let others interfere:

- ptxas of CUDA 12.9 gives the registers of operand A to another value too early
  (https://github.com/triton-lang/triton/pull/11781).
- A barrier does not wait for wgmma in flight, and the wait after it is that of one warpgroup. In a
  block of several, Triton takes the barrier for enough, and lets one warpgroup write to shared
  memory that the wgmma of another still reads (https://github.com/triton-lang/triton/issues/11047).

The first check covers all registers of a wgmma. The second knows no addresses: it also reports a
write to memory that no wgmma reads. Both follow every path through the branches of a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from .sass import Instruction, next_of, parse_code

State = TypeVar("State")

MOST_GROUPS = 8  # that are counted; compilers have one or two in flight
WGMMA = ("HGMMA", "IGMMA", "QGMMA")
BARRIERS = ("BAR.SYNC", "BAR.RED")
SHARED_WRITES = ("STS", "STSM", "LDGSTS", "UTMALDG", "UBLKCP", "ATOMS", "SYNCS.EXCH")
# Instructions that may begin with a register but do not write it. (A store begins with an address.)
WRITE_NO_REGISTER = (
    *("BAR", "BRX", "CALL", "JMX", "NANOSLEEP", "RET", "WARPSYNC"),
    *("DSETP", "FCHK", "FSETP", "HSETP2", "ISETP"),  # only predicates
)


def find_hazards(sass: str, warps: int) -> list[str]:
    """A line for each rule that is broken: its name, the first hazard and the number of others.

    Args:
        sass: the output of ``nvdisasm --print-code``.
        warps: of a block. Four of them are a warpgroup.
    """
    code = parse_code(sass)
    starts = [at for at, instruction in enumerate(code) if instruction.is_one_of(WGMMA)]
    rules = {"wgmma registers": register_hazards}
    if warps > 4:
        rules["wgmma shared memory"] = shared_memory_hazards
    lines = []
    for name, rule in rules.items():
        found = [hazard for start in starts for hazard in rule(code, start)]
        others = f"; {len(found) - 1} more" if len(found) > 1 else ""
        lines += [f"{name}: {found[0]}{others}"] if found else []
    return lines


def follow(
    code: list[Instruction],
    start: int,
    state: State,
    step: Callable[[Instruction, State], State | None],
) -> None:
    """Call ``step`` for what runs after ``start``, on each path until it returns None.

    It gets the state that it returned for the instruction before.
    """
    paths = [(at, state) for at in next_of(code, start)]
    seen: set[tuple[int, State]] = set()
    while paths:
        at, state = path = paths.pop()
        if path in seen:
            continue
        seen.add(path)
        after = step(code[at], state)
        if after is not None:
            paths += [(following, after) for following in next_of(code, at)]


def ends_group(now: Instruction) -> bool:
    return now.operands[-1] == "gsb0"


def advance(now: Instruction, groups: int) -> int | None:
    """How many groups have ended, from that of a wgmma on; None after the wait for that group."""
    if now.is_one_of(("WARPGROUP.DEPBAR",)) and int(now.operands[-1], 16) < groups:
        return None
    return min(groups + ends_group(now), MOST_GROUPS)


def register_hazards(code: list[Instruction], start: int) -> list[str]:
    """Instructions that write operand A of a wgmma in flight, or read or write its sums.

    The next wgmma may add to the same sums.
    """
    wgmma = code[start]
    sums, matrix = sums_of(wgmma), matrix_of(wgmma)
    found: list[str] = []

    def step(now: Instruction, groups: int) -> int | None:
        after = advance(now, groups)
        if after is None:
            return None
        reads, writes = accesses(now)
        if now.is_one_of(WGMMA) and writes == sums:
            writes = set()
        if touched := writes & (matrix | sums) or reads & sums:
            verb = "writes" if touched & writes else "reads"
            purpose = "adds to" if touched & sums else "reads"
            found.append(
                f"{now} {verb} R{min(touched)}, "
                f"which {wgmma} {purpose} until the next WARPGROUP.DEPBAR"
            )
            return None
        return after

    follow(code, start, int(ends_group(wgmma)), step)
    return found


def shared_memory_hazards(code: list[Instruction], start: int) -> list[str]:
    """Writes to shared memory without a barrier after the wait for a wgmma.

    Only of a wgmma that is in flight across an earlier barrier: that is the case which Triton
    overlooks.
    """
    wgmma = code[start]
    found: list[str] = []

    def step(now: Instruction, state: tuple[int | None, bool]) -> tuple[int | None, bool] | None:
        groups, crossed = state
        is_barrier = now.is_one_of(BARRIERS)
        if groups is not None:
            after = advance(now, groups)
            return None if after is None and not crossed else (after, crossed or is_barrier)
        if now.is_one_of(SHARED_WRITES):
            found.append(
                f"{now} writes, without a barrier after the wait for {wgmma}, "
                "which was in flight across a barrier"
            )
        return None if is_barrier or now.is_one_of(SHARED_WRITES) else state

    first: tuple[int | None, bool] = (int(ends_group(wgmma)), False)
    follow(code, start, first, step)
    return found


def sums_of(wgmma: Instruction) -> set[int]:
    """Registers of the 64 x N sums of a warpgroup, 128 threads: float32 or two float16 in one."""
    columns, kind = re.findall(r"\.64x(\d+)x\d+\.(\w+)", wgmma.opcode)[0]
    first = int(wgmma.operands[0].removeprefix("R"))
    return set(range(first, first + int(columns) // (4 if kind == "F16" else 2)))


def matrix_of(wgmma: Instruction) -> set[int]:
    """Registers of operand A, 64 x 32 bytes; none if it is in shared memory."""
    operand = re.match(r"R(\d+)", wgmma.operands[1])
    return set(range(int(operand[1]), int(operand[1]) + 4)) if operand else set()


def accesses(now: Instruction) -> tuple[set[int], set[int]]:
    """Registers that an instruction reads and writes: of vectors, the first register.

    A vector of 2 or 4 registers begins at a multiple of its length, and a wgmma's registers are
    whole fours, so the first is among these if any is.
    """
    if now.is_one_of(WGMMA):
        return matrix_of(now), sums_of(now)
    named = [[int(n) for n in re.findall(r"\bR(\d+)", operand)] for operand in now.operands]
    first = 0
    while first + 1 < len(named) and re.fullmatch(r"!?U?P(\d|T)", now.operands[first]):
        first += 1
    is_target = re.match(r"R\d", now.operands[first]) and not now.is_one_of(WRITE_NO_REGISTER)
    writes = set(named.pop(first)) if is_target else set()
    return {n for numbers in named for n in numbers}, writes
