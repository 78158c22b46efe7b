"""A reader can look up every figure of speed or accuracy in README and docs.

A block (paragraph, list, table) with such a figure says where it comes from, by a comment in it or
by a link to the result file:

    <!-- measured: FILE -->   FILE, under bench/results/, has each figure, in the field of its unit
    <!-- computed: FROM -->   arithmetic
    <!-- published: WHERE --> somebody else's result
    <!-- setting: WHAT -->    not a result: a setting, a share by definition

Figures in code are not claims. A column of a table whose head is a unit holds figures of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bench import plot

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "bench" / "results"
KINDS = ("measured", "computed", "published", "setting")

NUMBER = r"(?<![\w.,/-])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
UNITS = {  # how a unit is written: fields that hold it, and what one of the field is in that unit
    r"x(?!\w)": (("ratio",), 1),
    r" ?(?:per cent|%)(?! of copy)": (("roofline_pct", "accuracy"), 1),
    r" ?% of copy": (("roofline_pct",), 1),
    r" ms\b": (("ms", "ms_p20", "ms_p80"), 1),
    r" us\b": (("ms", "ms_p20", "ms_p80"), 1000),
    r" GB/s": (("gbps",), 1),
    r" TB/s": (("gbps",), 0.001),
    r" ?k? ?(?:img|images|items|records|views)/s": (("items_per_s",), 1),
    r" (?:TFLOP|GFLOP)(?:/s)?\b": ((), 1),
    r" (?:percentage )?points\b": (("accuracy",), 1),
    r" (?:times|x) (?:as fast|faster|slower)": (("ratio",), 1),
}
HEADS = {
    "x": "x", "ms": " ms", "p20 to p80, ms": " ms", "us": " us", "GB/s": " GB/s", "%": " %",
    "items/s": " items/s", "img/s": " img/s", "% of copy": " % of copy",
}  # fmt: skip


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each paragraph, list item or table, without fenced code."""
    kept: list[str] = []
    start, fenced = 1, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.startswith("```"):
            fenced = not fenced
            line = ""
        elif fenced:
            continue
        starts_item = re.match(r"(- |\d+\. |#)", line)
        if (not line.strip() or starts_item) and kept:
            yield start, "\n".join(kept)
            kept = []
        if line.strip():
            if not kept:
                start = number
            kept.append(line)


def figures(block: str) -> Iterator[tuple[str, str]]:
    """(number as written, unit pattern) of each figure in a block."""
    text = re.sub(r"<!--.*?-->", "", block, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`|\$[^$]*\$", "", text))
    for unit in UNITS:
        for found in re.finditer(rf"({NUMBER})(?={unit})", text):
            yield found.group(1), unit
    for found in re.finditer(r"(?<![\w/])1/(\d+\.\d+)", text):  # "takes 1/1.72 of the time"
        yield found.group(1), r"x(?!\w)"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    if len(lines) < 3:
        return
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for column, head in enumerate(rows[0]):
        if head not in HEADS:
            continue
        unit = next(u for u in UNITS if re.match(u, HEADS[head]))
        for row in rows[2:]:
            for number in re.findall(NUMBER, row[column] if column < len(row) else ""):
                yield number, unit


def sources(block: str) -> dict[str, str]:
    """Kind and text of each mark; a link to a result file is a mark too."""
    block = re.sub(r"`[^`]*`", "", block)
    found = {kind: text.strip() for kind, text in re.findall(r"<!-- (\w+): (.*?) -->", block)}
    for target in re.findall(r"\]\(([^)]*bench/results/[^)]*\.json)\)", block):
        found["measured"] = target[target.index("bench/results/") :]
    return found


def values(content: Any, fields: tuple[str, ...]) -> list[float]:
    """All numbers of a result file in these fields; `accuracy`: the shares of a demo's file."""
    found = []
    for row in [*content.get("rows", []), *content.get("means", [])]:
        found += [row[name] for name in fields if name in row]
        if "accuracy" in fields and "bench" not in row:
            found += [100 * v for k, v in row.items() if isinstance(v, float) and k != "seed"]
    if "accuracy" in fields and "mean" in content:
        found += [100 * value for value in content["mean"].values()] + [content["gain"]]
    return found


def equal_as_written(number: str, value: float) -> bool:
    """Whether ``value`` rounds to ``number`` at the digits that are written, and is near it."""
    written = Decimal(number.replace(",", ""))
    step = Decimal(1).scaleb(written.as_tuple().exponent)
    if written >= 1000 and written == written.to_integral():  # four digits are shown of large ones
        step = max(step, Decimal(10) ** (len(str(int(written))) - 4))
    error = abs(Decimal(value) - written)
    return error <= step * Decimal("0.5000001") and error <= abs(written) / 20


def complaints(page: Path, text: str) -> list[str]:
    """What is wrong with the claims of a page."""
    wrong = []
    for line, block in blocks(text):
        found = list(figures(block))
        marks = sources(block)
        where = f"{page.name}:{line}"
        wrong += [f"{where}: the mark {kind!r} says nothing" for kind in KINDS
                  if kind in marks and not marks[kind]]  # fmt: skip
        if len(set(marks) & set(KINDS)) > 1:
            wrong.append(f"{where}: {' and '.join(sorted(marks))} in one block: split it")
        if not found or set(marks) & {"computed", "published", "setting"}:
            continue
        if "measured" not in marks:
            shown = ", ".join(number for number, _ in found[:4])
            wrong.append(f"{where}: {shown}: a figure without a source")
            continue
        path = ROOT / marks["measured"]
        if RESULTS not in path.resolve().parents or not path.is_file():
            wrong.append(f"{where}: {marks['measured']} is no file under bench/results")
            continue
        content = json.loads(path.read_text())
        for number, unit in found:
            fields, factor = UNITS[unit]
            if not any(equal_as_written(number, factor * v) for v in values(content, fields)):
                wrong.append(f"{where}: {number} ({unit}) is not in {marks['measured']}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_claims_have_a_source(page):
    assert not complaints(page, page.read_text())


def test_measured_files_are_committed_with_what_they_depend_on():
    named = {m for page in PAGES for m in
             re.findall(r"bench/results/[\w./-]+\.json", page.read_text())}  # fmt: skip
    assert named
    for name in named:
        meta = json.loads((ROOT / name).read_text())["meta"]
        assert meta["date"] and meta["command"] and meta["device"], name


def test_the_performance_page_is_that_of_the_committed_results(tmp_path):
    """`make plots` was run after the last result was committed."""
    if why := plot.unordered():
        pytest.skip(why)
    page = ROOT / "docs" / "performance.md"
    made = page.read_text().split(plot.MARKS[0])[1].split(plot.MARKS[1])[0].strip()
    assert made == plot.as_markdown(plot.read(plot.committed()), page, page.parent / "plots")


# ------------------------------------------------------------------------- that it can say no

FILE = "bench/results/cpu/2026-11-24-a4e57dbf5.json"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("It is 1.72x as fast.", "without a source"),
        (f"It is 1.72x as fast ([file]({FILE})).", ""),
        (f"It is 1.73x as fast ([file]({FILE})).", "1.73"),
        (f"It is 2x as fast ([file]({FILE})).", "2 "),  # 1.716 rounds to 2, and flatters
        (f"It takes 1/1.72 of the time ([file](../{FILE})).", ""),
        (f"<!-- measured: {FILE} -->\nA step of 176.3 ms, 90.8 images/s.", ""),
        (f"<!-- measured: {FILE} -->\nA step of 90.8 ms.", "90.8"),  # a rate, not a time
        (f"<!-- measured: {FILE} -->\n| case | ms | x |\n|---|---|---|\n| a | 302.6 | 1.72 |", ""),
        (
            f"<!-- measured: {FILE} -->\n| case | ms | x |\n|---|---|---|\n| a | 302.6 | 1.9 |",
            "1.9",
        ),
        ("| case | ms |\n|---|---|\n| a | 302.6 |", "without a source"),
        ("<!-- measured: bench/results/gone.json -->\n1.72x", "is no file"),
        ("<!-- measured: pyproject.toml -->\n1.72x", "is no file"),
        ("<!-- computed: from the bytes -->\nAt most 5.2x.", ""),
        ("<!-- computed:  -->\nAt most 5.2x.", "says nothing"),
        (f"<!-- computed: bytes -->\n9x ([file]({FILE})).", "split it"),
        ("Published: 81.2 % top-1.", "without a source"),
        ("<!-- published: the paper -->\n81.2 %.\n\nAnd ours 81.3 %.", "81.3"),
        (
            "```sh\nclip 10 % of it\n```\nUse `alpha 50 %`, 16 samples, 2 x 3, sm_80, 224 pixels.",
            "",
        ),
        ("17,000 img/s", "17,000"),
        ("10.6k img/s", "10.6"),
        ("3.2 GB/s and 19 us", "3.2"),
        ("it gains 9.6 percentage points", "9.6"),
    ],
)
def test_a_claim_is_told_from_its_like(text, complaint):
    found = complaints(ROOT / "README.md", text)
    assert (complaint in " ".join(found)) if complaint else not found, found
