"""What grows with samples and views: in counted calls and bytes, and in the committed figures."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import bench_scale, record

pytest.importorskip("pyarrow")
RESULTS = sorted(Path(bench_scale.__file__).parent.glob("results/cpu/*-scale.json"))
LINEAR = 1.1  # exponent: a small share is independent of the size


def calls(work: Callable[[], Any]) -> int:
    """Number of calls of functions, Python's and C's, that a work makes."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that Python and numpy hold during a work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def growth(measure: Callable[[Callable[[], Any]], int], name: str, sizes: tuple[int, int]) -> float:
    """A measure of a family at the larger size, as a multiple of that at the smaller one."""
    found = []
    for size in sizes:
        work, arguments = bench_scale.prepared(name, size)
        work(*arguments)  # imports and tables that all sizes share
        found.append(measure(lambda work=work, arguments=arguments: work(*arguments)))
    return found[1] / found[0]


@pytest.mark.parametrize("name", [n.replace(" ", "-") for n in bench_scale.FAMILIES])
def test_ten_times_the_samples_need_ten_times_the_bytes_at_most(name):
    assert growth(peak, name.replace("-", " "), (20_000, 200_000)) < 10.5


@pytest.mark.parametrize("name", [n.replace(" ", "-") for n in bench_scale.FAMILIES])
def test_calls_do_not_grow_with_each_sample(name):
    """About a thousand calls for a shard of 4096 samples, but none for each sample."""
    name = name.replace("-", " ")
    sizes = 20_000, 200_000
    found = []
    for size in sizes:
        work, arguments = bench_scale.prepared(name, size)
        work(*arguments)
        found.append(calls(lambda work=work, arguments=arguments: work(*arguments)))
    assert found[1] - found[0] < (sizes[1] - sizes[0]) / 3, found


@pytest.mark.parametrize("what", ["open", "gather"])
def test_what_a_cache_needs_grows_with_its_views_by_their_files_alone(monkeypatch, what):
    monkeypatch.setattr(bench_scale, "OF_VIEWS", 2000)
    assert growth(calls, f"views {what}", (8, 64)) < 8.5
    assert growth(peak, f"views {what}", (8, 64)) < 8.5


def test_rows_and_records_cost_the_same_in_all_sizes():
    for name in ("plan rows", "cache gather"):
        few, many = (bench_scale.steady(name, size).build()["ours"] for size in (5_000, 200_000))
        few(), many()
        assert calls(many) == calls(few) and peak(many) < 1.1 * peak(few) + 10_000


def test_every_case_runs_at_small_sizes(monkeypatch):
    monkeypatch.setattr(bench_scale, "SAMPLES", (100, 1000))
    monkeypatch.setattr(bench_scale, "VIEWS", (1, 3))
    monkeypatch.setattr(bench_scale, "OF_VIEWS", 1000)
    made = [case for case in bench_scale.cases("cpu") if not case.name.startswith("loader")]
    assert len(made) == 2 * (len(bench_scale.FAMILIES) + 5 + 2)
    for case in made:
        case.build()["ours"]()


def test_a_fresh_process_tells_what_it_holds():
    grown = bench_scale.private_growth(bytearray, (50_000_000,))
    assert 50e6 < grown < 60e6


def test_the_loader_is_measured_at_its_begin_and_end():
    case = bench_scale.loader_case(1500)
    case.build()["ours"]()
    facts = case.facts("ours")
    assert facts["mb_begin"] > 1 and facts["mb_end"] > 1


def test_exponents_are_those_between_the_largest_sizes():
    rows = [{"case": f"a b N={n}", "ms": ms, "private_mb": n / 10} for n, ms in
            ((10, 5.0), (100, 1.0), (1000, 10.0))]  # fmt: skip
    rows += [{"case": "c V=4", "ms": 3.0}, {"case": "c V=16", "ms": 3.0}, {"case": "d N=1"}]
    assert bench_scale.exponents(rows) == {"a b": pytest.approx(1), "c": 0}
    assert bench_scale.exponents(rows, "private_mb") == {"a b": pytest.approx(1)}
    text = bench_scale.table({"rows": rows})
    assert "| a b | 10, 100, 1000 | 5, 1, 10 | ^1.00 | 1, 10, 100 | ^1.00 |" in text
    assert "| d | 1 | - |  |  |  |" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_nothing_grew_faster_than_samples_and_views_where_it_was_measured(path):
    rows = [row for row in record.read(path)["rows"] if "ms" in row]
    times, memory = bench_scale.exponents(rows), bench_scale.exponents(rows, "private_mb")
    assert set(bench_scale.FAMILIES) <= set(times)
    assert {"order", "plan", "tar open", "packed open", "arrow open"} <= set(memory)
    for name, value in memory.items():
        assert value < LINEAR, (name, "private_mb", value)
    for name, value in times.items():
        assert value < 1.3, (name, value)  # tables that leave the caches of a core
    for name in ("plan rows", "cache gather"):
        assert times[name] < 0.3
    loaders = [row for row in rows if row["case"].startswith("loader")]
    assert loaders
    for row in loaders:
        assert row["mb_end"] < 1.1 * row["mb_begin"] + 2
