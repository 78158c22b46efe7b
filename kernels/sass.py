"""What the machine code of a kernel holds, read from the output of nvdisasm."""

from __future__ import annotations

import re

_LABEL = re.compile(r"\s*(\.L_?\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)")


def longest_loop(sass: str) -> int:
    """Instructions from a label to a branch back to it, where no other loop lies between them."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        elif found := _INSTRUCTION.search(line):
            count += 1
            target = re.search(r"(\.L_?\w+)", line) if found[1] == "BRA" else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], count))
    innermost = [
        end - start
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    return max((length for length in innermost if length > 1), default=0)  # 1: the code's end


def count_instructions(sass: str) -> dict[str, int]:
    """What nvdisasm printed, counted: global accesses by width, spills, fp64 and matrix work, all.

    Widths per access: wide 16 bytes or more (also asynchronous and TMA copies), half 1 or 2 bytes,
    scalar 4 bytes; 8 bytes (an int64 label) count nowhere. ``wgmma``: those of the matrix
    instructions that run asynchronously (Hopper's); ``wgmma_waits``: waits for groups of them.
    ``longest_loop``: instructions of the longest loop that contains no other; 0 without a loop.
    """
    widths = ("wide", "half", "scalar")
    counts = {f"{width}_{kind}": 0 for kind in ("loads", "stores") for width in widths}
    counts |= {"spills": 0, "fp64": 0, "tensor": 0, "wgmma": 0, "wgmma_waits": 0}
    counts |= {"instructions": 0, "longest_loop": longest_loop(sass)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", sass)
    if not opcodes:
        raise RuntimeError("no instruction found in the output of nvdisasm; has its form changed?")
    for opcode in opcodes:
        name, *suffixes = opcode.split(".")
        counts["instructions"] += name != "NOP"  # they fill the last cache line of the code
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
