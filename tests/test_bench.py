"""The bench harness: what is timed, what is skipped, what a result file must hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bench import common, plot
from bench.__main__ import run_bench, select

ROOT = Path(__file__).parent.parent
META = {
    "device": "a",
    "driver": "b",
    "versions": {"torch": "2"},
    "commit": "c",
    "date": "2026-01-01",
    "command": "d",
}


@pytest.fixture(scope="module")
def timer() -> common.Timer:
    return common.Timer("cpu")


def sleeper(milliseconds: float):
    return lambda: time.sleep(milliseconds / 1e3)


def test_times_and_ratios(timer: common.Timer) -> None:
    case = common.Case(
        "sleep",
        lambda: {"ours": sleeper(2), "slow": sleeper(12), "fast": sleeper(6)},
        bytes_moved=4_000_000,
        items=8,
    )
    rows = {row["impl"]: row for row in common.time_case("naps", case, timer, 0.3)}
    ours = rows["ours"]
    assert (ours["bench"], ours["case"]) == ("naps", "sleep")
    assert 2 <= ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"] < 12
    assert ours["ratio_to"] == rows["slow"]["ratio_to"] == "fast"
    assert ours["ratio"] == pytest.approx(rows["fast"]["ms"] / ours["ms"])
    assert ours["ratio"] > 1 > rows["slow"]["ratio"]
    assert "ratio" not in rows["fast"]
    assert ours["gbps"] == pytest.approx(4 / ours["ms"])
    assert ours["items_per_s"] == pytest.approx(8e3 / ours["ms"])
    assert "roofline_pct" not in ours


def test_what_was_not_measured_is_absent(timer: common.Timer) -> None:
    case = common.Case("alone", lambda: {"ours": sleeper(1)})
    (row,) = common.time_case("naps", case, timer, 0.01)
    assert set(row) == {"bench", "case", "impl", "ms", "ms_p20", "ms_p80"}


def test_implementations_take_turns(timer: common.Timer) -> None:
    calls: list[str] = []
    case = common.Case("turns", lambda: {name: lambda n=name: calls.append(n) for name in "abc"})
    common.time_case("turns", case, timer, 0.0)
    warm = 3 * (1 + common.WARMUP_CALLS)
    assert "".join(calls[:warm]) == "aaaabbbbcccc"
    assert "".join(calls[warm:]) == "abc" + "bca" + "cab"


def test_a_peer_that_fails_is_a_line_with_the_reason(timer: common.Timer) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel for this device\nmore lines")

    case = common.Case("c", lambda: {"ours": sleeper(1), "peer": fails, "other": "not installed"})
    rows = {row["impl"]: row for row in common.time_case("b", case, timer, 0.01)}
    assert rows["peer"]["skipped"] == "RuntimeError: no kernel for this device"
    assert rows["other"]["skipped"] == "not installed"
    assert not {"ms", "gbps", "ratio"} & (rows["peer"].keys() | rows["other"].keys())
    assert "ratio" not in rows["ours"]


def test_broken_benches_do_not_stop_the_run(
    timer: common.Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rows,) = run_bench("does_not_exist", "cpu", timer, 1.0)
    assert rows[0]["skipped"].startswith("ModuleNotFoundError")

    def build() -> dict:
        raise MemoryError

    module = ModuleType("bench.bench_fake")
    cases = [
        common.Case("broken", build),
        *(common.Case(n, lambda: {"ours": sleeper(60)}) for n in "ab"),
    ]
    module.cases = lambda device: cases  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench.bench_fake", module)
    broken, first, second = (rows[0] for rows in run_bench("fake", "cpu", timer, 0.1))
    assert broken["skipped"] == "MemoryError"
    assert first["ms"] >= 60
    assert second["skipped"].startswith("no time left")


@pytest.mark.parametrize("name", common.META)
@pytest.mark.parametrize("value", (None, ""))
def test_no_file_without_its_meta(tmp_path: Path, name: str, value: str | None) -> None:
    path = tmp_path / "out" / "x.json"
    with pytest.raises(ValueError, match=f"no result file without meta {name}:"):
        common.write_results(path, META | {name: value}, [])
    assert not path.exists()
    common.write_results(path, META, [{"bench": "b"}])
    assert json.loads(path.read_text()) == {"meta": META, "rows": [{"bench": "b"}]}


def test_default_path_names_device_date_and_commit() -> None:
    cpu, gpu = (common.default_path(d, META | {"device": "NVIDIA H100"}) for d in ("cpu", "cuda"))
    assert cpu.relative_to(ROOT).as_posix() == "bench/results/cpu/2026-01-01-c.json"
    assert gpu.relative_to(ROOT).as_posix() == "bench/results/nvidia-h100/2026-01-01-c.json"


def test_benches_are_found_by_their_file_names() -> None:
    assert {"distillation_loss", "ingest"} <= set(select("kernels")) <= set(select("all"))
    assert select("ingest") == ["ingest"]
    with pytest.raises(SystemExit, match="unknown bench 'nothing': all, kernels or one of"):
        select("nothing")


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['bench', '--help']\n"
        "try: runpy.run_module('bench', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--seconds" in done.stdout and done.stdout.endswith("False\n"), done.stderr


def test_command_line_writes_a_result_file(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "ingest", "--device", "cpu", "--seconds", "1"]
    command += ["--commit", "abc", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result) == {"meta", "rows"}
    assert result["meta"].keys() == set(common.META)
    assert "torch" in result["meta"]["versions"] and result["meta"]["commit"] == "abc"
    assert "--device cpu --seconds 1" in result["meta"]["command"]
    assert {row["impl"] for row in result["rows"]} == {"ours", "torchvision v2"}
    for row in result["rows"]:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert f"{row['ms']:.4g} ms" in done.stdout


def test_the_peers_of_the_loss_bench_compute_the_same_loss() -> None:
    """A ratio between different losses would mean nothing: values of all of them, from one case."""
    import torch

    from bench import bench_distillation_loss as bench

    for kind in ("soft", "hard"):
        zc, zd, teacher = torch.randn(3, 8, 50, dtype=torch.float64).float()
        first, second = torch.randint(50, (2, 8))
        target = first, second, torch.rand(8)
        ours = bench.ours(zc, zd, target, teacher, kind)
        torch.testing.assert_close(ours, bench.deit(zc, zd, target, teacher, kind))
        weight = 50 if kind == "soft" else 1
        theirs = bench.timm(zc, zd, target, teacher, kind)
        base = 0.5 * bench.base(zc, target)
        torch.testing.assert_close((ours - base) * weight, theirs - base)


# -------------------------------------------------------------------------------------------- plot


def result_file(path: Path, rows: list[dict], **meta: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_results(path, META | meta, rows)
    return path


ROWS = [
    {"bench": "b", "case": "one", "impl": "ours", "ms": 2.0, "ms_p20": 1.6, "ms_p80": 2.5,
     "ratio": 1.5, "ratio_to": "peer", "gbps": 9.0, "roofline_pct": 60.0},
    {"bench": "b", "case": "one", "impl": "peer", "ms": 3.0, "ms_p20": 3.0, "ms_p80": 3.0,
     "gbps": 6.0, "roofline_pct": 40.0},
    {"bench": "b", "case": "one", "impl": "slow", "ms": 6.0, "ms_p20": 5.0, "ms_p80": 12.0,
     "ratio": 0.5, "ratio_to": "peer", "gbps": 3.0, "roofline_pct": 20.0},
    {"bench": "b", "case": "two", "impl": "ours", "skipped": "no time left"},
]  # fmt: skip


def drawn(figure) -> list[tuple[float, float, float]]:
    """(value, low end, high end of the whisker) of each bar, read from what is on the axes."""
    (axes,) = figure.axes
    (bars,) = (group for group in axes.containers if hasattr(group, "patches"))
    whiskers = bars.errorbar.lines[2][0].get_segments()
    ends = [(float(low[0]), float(high[0])) for low, high in whiskers]
    return [(bar.get_width(), *end) for bar, end in zip(bars.patches, ends, strict=True)]


def test_chart_shows_the_ratios_of_the_file_and_their_spread(tmp_path: Path) -> None:
    (result,) = plot.read([result_file(tmp_path / "gpu" / "a.json", ROWS)])
    found = plot.charts(result)
    assert list(found) == ["gpu-b", "gpu-b-roofline"]
    # the peer's 3 ms over our 2.0 ms, 2.5 ms and 1.6 ms; over 6, 12 and 5 ms
    for bar, expected in zip(
        drawn(found["gpu-b"]), [(1.5, 1.2, 1.875), (0.5, 0.25, 0.6)], strict=True
    ):
        assert bar == pytest.approx(expected)
    roofline = drawn(found["gpu-b-roofline"])
    assert [bar[0] for bar in roofline] == [60.0, 40.0, 20.0]
    assert roofline[0] == pytest.approx((60, 60 * 2 / 2.5, 60 * 2 / 1.6))
    assert found["gpu-b"].axes[0].get_xlim()[1] > 1.875, "a whisker leaves the chart"


def test_chart_files_hold_the_numbers_and_are_the_same_twice(tmp_path: Path) -> None:
    (result,) = plot.read([result_file(tmp_path / "gpu" / "a.json", ROWS)])
    first = plot.save(plot.charts(result)["gpu-b"], tmp_path / "1", "x")
    second = plot.save(plot.charts(result)["gpu-b"], tmp_path / "2", "x")
    assert [path.suffix for path in first] == [".svg", ".png"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", first[0].read_text())
    assert {"1.50x  ours", "0.50x  slow"} <= set(texts)
    assert any("against peer" in text for text in texts)


def test_charts_can_be_read_by_day_and_by_night() -> None:
    def luminance(colour: str) -> float:  # WCAG 2
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for ground in plot.GROUNDS:
        for colour, least in ((plot.TEXT, 4.0), (plot.OURS, 3.0), (plot.PEER, 3.0)):
            one, two = sorted((luminance(colour), luminance(ground)))
            assert (two + 0.05) / (one + 0.05) >= least, (colour, ground)


def test_the_later_file_counts_and_other_files_are_refused(tmp_path: Path) -> None:
    old = result_file(tmp_path / "gpu" / "old.json", ROWS)
    new = result_file(tmp_path / "gpu" / "new.json", [ROWS[0] | {"ratio": 4.0}])
    other = result_file(tmp_path / "cpu" / "old.json", ROWS)
    found = plot.read([old, new, other])
    assert [(r.path.parent.name, r.path.name) for r in found] == [
        ("cpu", "old.json"),
        ("gpu", "new.json"),
    ]
    assert plot.comparisons(found[1])[0].value == 4.0
    (tmp_path / "x.json").write_text('{"rows": [{"seed": 0}], "meta": {}}')
    with pytest.raises(ValueError, match=r"x\.json: not a result of `python -m bench`"):
        plot.read([tmp_path / "x.json"])


def test_markdown_keeps_what_stands_around_it(tmp_path: Path) -> None:
    results = plot.read([result_file(tmp_path / "gpu" / "a.json", ROWS)])
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"# Head\n\n{plot.MARKS[0]}\nold\n{plot.MARKS[1]}\n\nTail\n")
    plot.write_markdown(results, page, tmp_path / "docs" / "plots")
    text = page.read_text()
    assert text.startswith("# Head\n") and text.endswith("\n\nTail\n") and "old" not in text
    assert "| one | ours | 2 | 1.6 to 2.5 | 9 | 60 | 1.50 | peer |" in text
    assert "| one | peer | 3 | 3 to 3 | 6 | 40 |  |  |" in text and "two" not in text
    assert "![gpu-b](plots/gpu-b.svg)" in text and "(../gpu/a.json)" in text
    page.write_text("# Head\n")
    with pytest.raises(ValueError, match="has not the marks"):
        plot.write_markdown(results, page, tmp_path)


def test_charts_of_the_docs_are_those_of_the_committed_results(tmp_path: Path) -> None:
    """`make plots` was run after the last result was committed."""
    if why := plot.unordered():
        pytest.skip(why)
    folder = ROOT / "docs" / "plots"
    wanted = set()
    for result in plot.read(plot.committed()):
        for stem, figure in plot.charts(result).items():
            wanted.add(f"{stem}.svg")
            plot.save(figure, tmp_path, stem)
            here, there = ((f / f"{stem}.svg").read_text() for f in (tmp_path, folder))
            pattern = r"<text[^>]*>([^<]*)</text>"  # another matplotlib draws other paths
            assert re.findall(pattern, here) == re.findall(pattern, there), stem
    assert wanted == {path.name for path in folder.iterdir()}
