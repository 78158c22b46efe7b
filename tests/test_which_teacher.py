"""The tables of the page "Which teacher" follow from its published rates and from the codecs."""

from __future__ import annotations

import re
from pathlib import Path

from deit_fast.cache import codec_from_config
from deit_fast.cache.feature_codecs import feature_codec
from deit_fast.config import CodecConfig

PAGE = Path(__file__).parent.parent / "docs" / "which-teacher.md"
IMAGES = 1_281_167


def table(head: str) -> list[list[str]]:
    """The rows of the table whose head begins with ``head``."""
    lines = PAGE.read_text().split(f"\n| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def equal(written: str, value: float) -> bool:
    """Whether ``value`` rounds to what is written."""
    digits = len(written.partition(".")[2])
    return abs(float(written.replace(",", "")) - value) <= 0.500001 * 10**-digits


def test_ceilings_and_hours_follow_from_the_published_rates():
    rates = {name: float(rate.replace(",", "")) for name, _, rate in table("model")}
    students = [rates[f"DeiT-{size} distilled"] for size in ("Ti", "S", "B")]
    rows = table("teacher")
    assert {row[0] for row in rows} == {name for name in rates if "DeiT" not in name}
    for name, *figures in rows:
        ceilings = [1 + student / 3 / rates[name] for student in students]
        hours = [views * IMAGES / rates[name] / 3600 for views in (1, 12, 48, 300)]
        assert all(map(equal, figures, ceilings + hours)), (name, figures, ceilings, hours)


def test_bytes_are_those_of_the_codecs():
    rows = table("target | codec")
    assert len(rows) == 19
    for target, codecs, size, one, twelve in rows:
        for name in re.findall(r"`([\w-]+)`", codecs):
            if "logits" in target or "label" in target:
                k = int((re.findall(r"k = (\d+)", codecs) or ["16"])[0])
                codec = codec_from_config(CodecConfig(name=name, k=k), 1000, 1.0)
            else:
                *grid, width = map(int, re.findall(r"\d+", target))
                codec = feature_codec(name, grid[0] * grid[1] if grid else 1, width)
            assert equal(size, codec.record_bytes), (target, name, codec.record_bytes)
            assert equal(one, IMAGES * codec.record_bytes / 1e9), (target, name)
            assert equal(twelve, 12 * IMAGES * codec.record_bytes / 1e9), (target, name)
