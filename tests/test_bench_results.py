"""Result files, predictions, the page made of them, counters and traces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from bench import counters, gpu, record, summary, trace
from bench.__main__ import choose
from helpers.bench import META

ROOT = Path(__file__).parent.parent
CASE = "deit_small student 224px B=256"


# ---------------------------------------------------------------------------------------------
# Result file and predictions
# ---------------------------------------------------------------------------------------------


def row(impl: str = "ours", **changes: Any) -> dict[str, Any]:
    base = {"bench": "step", "case": CASE, "impl": impl, "ms": 24.0, "ms_p20": 23.9, "ms_p80": 24.2}
    return base | changes


def test_rows_carry_the_prediction_for_this_device(tmp_path: Path) -> None:
    file = record.ResultFile.create(tmp_path / "r.json", META)
    file.put([row(), row("timm, compiled", ms=31.0), row("ours, other")])
    ours, timm, other = record.read(file.path)["rows"]
    assert ours["predicted"][0] < ours["predicted"][1] and timm["predicted"] != ours["predicted"]
    assert "predicted" not in other
    known = record.predictions()["rows"][0]["ms"]
    for name, expected in {
        "NVIDIA H200": known["H200"],
        "NVIDIA A100": None,
        "NVIDIA GH200 480GB": None,
        "NVIDIA H100 PCIe": None,
    }.items():
        elsewhere = record.ResultFile.create(tmp_path / f"{name}.json", META | {"device": name})
        elsewhere.put([row()])
        assert record.read(elsewhere.path)["rows"][0].get("predicted") == expected
    assert ours["predicted"] == known["H100"] != known["H200"]


def test_a_file_has_one_line_for_each_row(tmp_path: Path) -> None:
    """Committed files too, so that a diff shows the rows that changed."""
    content = {"meta": META, "rows": [row(), row("timm, compiled", ms=31.5)], "stages": []}
    record.write(tmp_path / "r.json", content)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == content
    assert sum(line.startswith('  {"bench": ') for line in text.splitlines()) == 2
    for path in (ROOT / "bench/results").rglob("*.json"):
        text = path.read_text()
        assert text == record.to_text(json.loads(text)), f"{path.name}: write it with to_text"


def test_a_row_with_impossible_figures_does_not_affect_other_rows(tmp_path: Path) -> None:
    """A profiler that sees nothing gives 0 ms, ncu may print nan."""
    file = record.ResultFile.create(tmp_path / "r.json", META)
    bad = {"case": "other"}
    file.put([row("good"), row("zero", ms=0.0), row("nan", gbps=float("nan"))])
    file.put([row("inf", ratio=float("inf"), **bad)])
    rows = {one["impl"]: one for one in record.read(file.path)["rows"]}
    assert rows["good"]["ms"] == 24.0
    assert (
        rows["zero"]["skipped"] == "ms is 0.0, not a positive number" and "ms" not in rows["zero"]
    )
    assert rows["nan"]["skipped"] == "gbps is nan" and rows["inf"]["skipped"] == "ratio is inf"


def test_every_prediction_is_for_a_case_that_the_scripts_measure(tmp_path: Path) -> None:
    measured: set[tuple[str, str]] = set()
    for stage in (*gpu.plan(tmp_path, "cuda"), *gpu.profile_plan(tmp_path, "cuda")):
        for command in stage.commands:
            words = command.arguments
            if words[1:3] == ("-m", "bench") and "--resume" in words:
                only = re.compile(words[words.index("--only") + 1])
                for name in words[3 : words.index("--only")]:
                    measured |= {(name, case.name) for case in choose(name, "cuda", only)}
    entries = record.predictions()["rows"]
    assert len(entries) > 20
    for entry in entries:
        assert (entry["bench"], entry["case"]) in measured, entry
        assert list(entry["ms"]) == record.predictions()["devices"] and entry["from"]
        assert all(0 < low < high for low, high in entry["ms"].values())
    keys = [record.key_of(entry) for entry in entries]
    assert len(set(keys)) == len(keys)


def test_faults_of_a_result_file_are_named(tmp_path: Path) -> None:
    good = {"meta": META, "rows": [row(), row("peer", ms=3), row("x", skipped="why")]}
    del good["rows"][2]["ms"]
    assert record.find_faults(good) == []
    for change, words in (
        ({"meta": META | {"commit": ""}}, "meta lacks commit"),
        ({"rows": [row(), row()]}, "repeats"),
        ({"rows": [row(ms=-1.0)]}, "ms is -1.0, not a positive number"),
        ({"rows": [row(gbps=float("nan"))]}, "gbps is nan"),
        ({"rows": [row(skipped="and measured")]}, "needs either ms or skipped"),
        ({"rows": [{"bench": "b"}]}, "row 0 lacks bench, case or impl"),
        ({"rows": {}}, "no list 'rows'"),
    ):
        (fault,) = record.find_faults(good | change)
        assert words in fault
        path = tmp_path / "r.json"
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=re.escape(f"{path}: not a result")):
            record.read(path)
    path.write_text('{"meta": ')
    with pytest.raises(ValueError, match=r"r\.json: Expecting"):
        record.read(path)


def test_a_tree_without_git_is_named_by_a_checksum_of_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain copy of the tree has no commit to show."""
    for name, text in (("kernels/a.py", "1"), ("csrc/b.cpp", "2"), ("bench/results/r.json", "3")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    first = record.tree_checksum(tmp_path)
    assert re.fullmatch(r"tree-[0-9a-f]{12}", first)
    (tmp_path / "kernels" / "__pycache__").mkdir()
    (tmp_path / "kernels/__pycache__/a.pyc").write_text("made by running it")
    (tmp_path / "bench/results/new.json").write_text("made by measuring")
    assert record.tree_checksum(tmp_path) == first
    (tmp_path / "csrc/b.cpp").write_text("2 ")
    assert record.tree_checksum(tmp_path) != first
    monkeypatch.setattr(record, "output_of", lambda *command: "")
    meta = record.collect_meta("cpu", "x", None)
    assert meta["commit"] == record.tree_checksum()
    assert record.collect_meta("cpu", "x", "abc")["commit"] == "abc"


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def test_the_summary_shows_all_sections(tmp_path: Path, capsys: Any) -> None:
    kernel = {"bench": "attention", "case": "B=256 H=6 N=198 D=64 bfloat16 forward"}
    rows = [
        row(items_per_s=10667.0, ratio=1.29, ratio_to="timm, compiled", device_ms=22.5,
            host_ms=9.0),
        row("timm, compiled", ms=31.0, items_per_s=8258.0),
        kernel | {"impl": "ours", "ms": 0.09, "ms_p20": 0.09, "ms_p80": 0.09, "gbps": 1740.0,
                  "roofline_pct": 58.0, "ratio": 1.1, "ratio_to": "sdpa cudnn"},
        kernel | {"impl": "liger", "skipped": "not installed"},
        {"bench": "trace", "case": "deit_small, ours", "impl": "ours", "ms": 22.5,
         "kernels": [{"kernel": "gemm", "calls": 72.0, "us": 10400.0}]},
        {"bench": "ncu", "case": "attention 1: backward_kernel", "impl": "ours", "ms": 0.16,
         "us": 160.0, "issue_active_pct": 71.0, "stall": "gmma 3.20"},
        row("ours, cached", provisional=True),
    ]  # fmt: skip
    file = record.ResultFile.create(tmp_path / "results.json", META)
    for one in rows:
        file.content["rows"].append(file._with_prediction(one))
    file.content["stages"] = [
        {"stage": "step", "outcome": "passed", "took_s": 60.0, "commands": []},
        {"stage": "ncu", "outcome": "skipped", "reason": "ncu is not on PATH"},
        {"stage": "sanitizer", "outcome": "stopped", "took_s": 75.0,
         "commands": [{"command": "memcheck", "outcome": "passed", "exit_status": 0},
                      {"command": "compile block", "outcome": "stopped"},
                      {"command": "compile step", "outcome": "passed", "exit_status": 0}]},
        {"stage": "loss", "outcome": "failed", "took_s": 3.0,
         "commands": [{"command": "loss", "outcome": "failed", "exit_status": 1}]},
    ]  # fmt: skip
    file.save()
    (tmp_path / "tests.jsonl").write_text(
        '{"run": 1, "collected": 3}\n{"run": 1, "test": "a", "outcome": "passed", "message": ""}\n'
        '{"run": 1, "test": "tests/test_attention.py::x", "outcome": "failed", '
        '"message": "wrong"}\n'
    )
    summary.main(["summary", str(tmp_path)])
    page = capsys.readouterr().out
    for words in (
        "1.29x of timm, compiled",
        "10,667",
        "22.5",
        "58",
        "1.10x of sdpa cudnn",
        "20.9 to 26.7, met",
        "0.06 to 0.075, 20 % slower",
        "not measured",
        "gmma 3.20",
        "10400.0",
        "stage ncu: skipped: ncu is not on PATH",
        "loss: failed, exit status 1",
        "    memcheck: passed",
        "    compile block: stopped",
        "tests: 1 passed, 1 failed, 0 skipped, 1 not run",
        "FAILED tests/test_attention.py::x: wrong",
        "no figure: attention: B=256 H=6 N=198 D=64 bfloat16 forward, liger: not installed",
        "provisional: step: deit_small student 224px B=256, ours, cached",
    ):
        assert words in page, words
    assert "compile step" not in page
    assert page.index("The training step") < page.index("Kernels") < page.index("Outcome")
    with pytest.raises(SystemExit, match=r"absent\.json: "):
        summary.main(["summary", str(tmp_path / "absent.json")])


def test_committed_results_make_a_page() -> None:
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        content = json.loads(path.read_text())
        if content.get("rows") and "bench" in content["rows"][0] and "meta" in content:
            assert record.find_faults(content) == [], path
            assert "Outcome" in summary.page(content)


# ---------------------------------------------------------------------------------------------
# Counters and traces
# ---------------------------------------------------------------------------------------------

NCU_COLUMNS = {  # a counter's name: its unit, its values for two kernels
    "ID": ("", "0", "1"),
    "Process ID": ("", "7", "7"),
    "Kernel Name": ("", "backward_kernel", "reduce(float *)"),
    "gpu__time_duration.sum": ("us", "161.25", "2.10"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "72.5", "5.0"),
    "dram__bytes_read.sum": ("Mbyte", "1,024.5", "1"),
    "launch__registers_per_thread": ("register/thread", "136", "24"),
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": ("inst", "3.25", ""),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "0.50", "1.5"),
    "sm__inst_executed_pipe_tensor_op_dmma.avg.pct_of_peak_sustained_active": ("%", "0", "0"),
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": ("%", "38.1", "0"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61.5", "nan"),
    "FBPA.TriageCompute.dramc__x": ("%", "n/a", ""),
}
NCU_LINES = [NCU_COLUMNS, *([column[i] for column in NCU_COLUMNS.values()] for i in range(3))]
NCU = "==PROF== Connected to process 7\n==PROF== Profiling: 0%....100% - 9 passes\n" + "\n".join(
    ",".join(f'"{cell}"' for cell in line) for line in NCU_LINES
)


def test_counters_are_read_from_the_csv_of_ncu() -> None:
    backward, reduce = counters.read_csv(NCU)
    assert backward["kernel"] == "backward_kernel" and backward["us"] == 161.25
    assert backward["issue_active_pct"] == 72.5 and backward["registers"] == 136
    assert backward["dram_read_bytes"] == 1024.5e6
    assert backward["stall"] == "gmma 3.25 wait 0.50"
    assert backward["tensor_pct"] == 38.1 and backward["dram_pct"] == 61.5
    assert "dram_pct" not in reduce
    assert reduce["us"] == 2.1 and reduce["stall"] == "wait 1.50" and "dram_bytes" not in reduce
    nanoseconds = NCU.replace('"us"', '"ns"')
    assert counters.read_csv(nanoseconds)[0]["us"] == pytest.approx(0.16, abs=0.01)
    assert counters.read_csv("==ERROR== no permission\n") == []


def test_ncu_does_not_change_clocks_and_each_target_is_one_case() -> None:
    for bench, case, implementation in counters.TARGETS:
        command = counters.command(bench, case, implementation)
        at = command.index("--clock-control")
        assert command[at + 1] == "none"
        assert len(choose(bench, "cuda", re.compile(case))) == 1


def event(
    name: str, start: float, end: float, device: DeviceType, is_region: bool = False
) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=is_region
    )


def test_the_device_is_busy_while_any_kernel_runs() -> None:
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("step: forward", 0, 9, cpu, True),
        event("step: forward", 10, 90, cuda, True),  # the region's twin on the device
        event("gemm", 10, 30, cuda),
        event("teacher", 20, 40, cuda),  # on another stream
        event("gemm", 60, 70, cuda),
        event("inside", 62, 65, cuda),
        # Inductor names the launch of its kernel on the host like the kernel.
        event("triton_poi_fused_add_0", 1, 2, cpu),
        event("triton_poi_fused_add_0", 70, 75, cuda),
    ]
    intervals = trace.device_intervals(events)
    assert trace.busy_us(intervals) == 45
    table = trace.by_kernel(intervals, calls=2)
    assert table[0] == {"kernel": "gemm", "calls": 1.0, "us": 15.0}
    assert "37.5%" in trace.table_text(table, 40)
    assert trace.busy_us([]) == 0
