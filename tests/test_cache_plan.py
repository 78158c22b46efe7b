"""`deit-fast cache plan`: sums that are exact, and what it proposes."""

from __future__ import annotations

import pytest

from deit_fast.cache.plan import options, recommend
from deit_fast.cli import main
from deit_fast.errors import InputError

IMAGENET = 1_281_167


def by_name(budget: int, **given):
    return {row.name.split(" ", 1)[1]: row for row in options(budget, **given)}


def test_sums_are_exact():
    found = by_name(
        20000, samples=IMAGENET, views=300, classes=1000, width=384, tokens=196, images_per_s=2000.0
    )
    topk = found["topk --codec.k 16"]
    assert (topk.bytes_per_view, topk.views, topk.total) == (72, 277, 277 * 72 * IMAGENET)
    assert topk.seconds == pytest.approx(277 * IMAGENET / 2000)
    assert found["hard"].views == 300  # all that the run shows
    assert found["fp8"].bytes_per_view == 196 * (384 + 4) and found["fp8"].views == 0
    assert found["fp16"].bytes_per_view == 2 * 196 * 384
    pooled = by_name(20000, samples=10, views=300, classes=1000, width=384, repeats=3)
    assert (pooled["int8"].views, pooled["int8"].total) == (51, 51 * 388 * 10)
    assert pooled["topk --codec.k 16"].views == 276 and pooled["int8"].seconds is None


def test_the_proposal_keeps_all_views_where_it_can():
    given = {"samples": 100, "views": 12, "classes": 1000}
    for budget, name, views in ((12 * 2000, "dense-fp16", 12), (12 * 2000 - 1, "dense-int8", 12),
                                (12 * 72, "topk --codec.k 16", 12), (23, "hard", 11)):  # fmt: skip
        rows = options(budget, **given)
        row, why = recommend(rows, 12)["logits"]
        assert row.name == f"--codec.name {name}" and row.views == views
        assert row.views * row.bytes_per_view <= budget and why
    with pytest.raises(InputError, match="--bytes-per-image is too small: a record has at least 2"):
        recommend(options(1, **given), 12)
    assert "topk --codec.k 16" not in by_name(100, **(given | {"classes": 10}))


def test_the_verb_prints_a_table_and_a_line_to_take(capsys):
    assert not main(["cache", "plan", "--bytes-per-image", "1000", "--num-samples", "10",
                     "--num-views", "12", "--width", "64", "--images-per-s", "1"])  # fmt: skip
    out = capsys.readouterr().out
    assert "--codec.name topk --codec.k 16" in out and "8640 bytes" in out
    assert "take, logits" in out and "take, features" in out
    line = next(line for line in out.splitlines() if line.startswith("take, features"))
    assert "--features.codec fp8" in line and "12 views fit" in line
