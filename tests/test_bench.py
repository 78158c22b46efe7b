"""The bench harness: what is timed, what is skipped, what a result file must hold."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench import common, plot, record
from bench.__main__ import run_bench, select
from helpers.bench import chart_texts

ROOT = Path(__file__).parent.parent
META = {
    "device": "a",
    "driver": "b",
    "versions": {"torch": "2"},
    "commit": "c",
    "date": "2026-01-01",
    "command": "d",
}


class Clock:
    """A clock that a test advances; each reading adds a microsecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3


CLOCK = Clock()


@pytest.fixture(scope="module", autouse=True)
def no_real_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Timer, "clock", CLOCK)
        yield


@pytest.fixture(scope="module")
def timer() -> common.Timer:
    return common.Timer("cpu")


def sleeper(milliseconds: float) -> Callable[[], None]:
    return lambda: CLOCK.sleep(milliseconds)


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
    assert [ours[name] for name in ("ms_p20", "ms", "ms_p80")] == pytest.approx([2] * 3, rel=0.01)
    assert ours["ratio_to"] == rows["slow"]["ratio_to"] == "fast"
    assert ours["ratio"] == pytest.approx(3, rel=0.01)
    assert rows["slow"]["ratio"] == pytest.approx(0.5, rel=0.01)
    assert "ratio" not in rows["fast"]
    assert ours["gbps"] == pytest.approx(4 / ours["ms"])
    assert ours["items_per_s"] == pytest.approx(8e3 / ours["ms"])
    assert "roofline_pct" not in ours


class AlmostCuda(common.Timer):
    """A GPU timer without a GPU: its device times are constants."""

    def __init__(self) -> None:
        self.cuda, self.copy_gbps = True, 1000.0
        self.cleared: list[str] = []

    def wall(self, function, repeats=1):
        start = self.clock()
        for _ in range(repeats):
            function()
        return (self.clock() - start) / repeats

    def call(self, function, host_seconds=0.0):
        function()
        return 1e-3

    def clear(self) -> None:
        self.cleared.append("")


@pytest.mark.parametrize("on_host", (False, True))
def test_host_work_is_timed_by_the_host_clock_also_on_a_gpu(on_host: bool) -> None:
    """CUDA events around host work would measure only the microseconds between two records."""
    case = common.Case("nap", lambda: {"ours": sleeper(5)}, bytes_moved=1000, on_host=on_host)
    (row,) = common.time_case("naps", case, AlmostCuda(), 0.0)
    assert row["ms"] >= 5 if on_host else row["ms"] == 1
    assert ("roofline_pct" in row) != on_host


def test_cases_that_run_on_the_host_are_marked_on_host() -> None:
    from bench import bench_cache, bench_loader

    for case in bench_cache.cases("cuda"):
        assert case.on_host != case.name.startswith("on the device: ")
    assert all(case.on_host for case in bench_loader.cases("cuda"))


@pytest.mark.dali
def test_views_of_one_decoder_do_not_depend_on_their_batch() -> None:
    from bench import bench_loader

    built = bench_loader.build_decoder("dali-cpu", "cpu", 0.0, 2)
    assert not isinstance(built, str), built
    run, identical_pct = built
    run()
    assert identical_pct() == 100


def test_a_slow_loader_shows_in_the_fed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches made beforehand are taken away first, so four steps wait for four batches."""
    from bench import bench_step

    open_loader, waits = bench_step.open_loader, []

    def slow(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in open_loader(*args, **kwargs):
            waits.append("")
            yield batch

    monkeypatch.setattr(bench_step, "open_loader", slow)
    monkeypatch.setattr(bench_step.os, "cpu_count", lambda: 1)
    tiny = "deit_tiny_distilled_patch16_224"
    case = bench_step.fed_case(tiny, 32, 4, "cpu", "packed")
    steps = case.build()
    waited = {}
    for name, step in steps.items():
        assert not isinstance(step, str)
        step()
        counts = [len(waits)]
        for call in (partial(case.before, name), step):
            call()
            counts.append(len(waits))
        waited[name] = counts[1] - counts[0], counts[2] - counts[1]
    assert waited == {"ours, fed": (4, 4), "batch at hand": (0, 0)}


def test_a_failure_after_the_warm_up_is_a_row_and_its_memory_is_freed() -> None:
    calls = 0

    def fails_late() -> None:
        nonlocal calls
        calls += 1
        if calls > 1 + common.WARMUP_CALLS + 2:
            raise RuntimeError("out of memory")

    def fails() -> None:
        raise RuntimeError("no kernel")

    timer = AlmostCuda()
    case = common.Case("c", lambda: {"ours": sleeper(1), "late": fails_late, "early": fails})
    rows = {row["impl"]: row for row in common.time_case("b", case, timer, 0.0)}
    assert rows["late"]["skipped"] == "RuntimeError: out of memory" and "ms" not in rows["late"]
    assert rows["ours"]["ms"] == 1 and "ratio" not in rows["ours"]
    assert len(timer.cleared) == 2  # after the early failure, and after the case
    for only in (fails, "not installed"):
        (row,) = common.time_case("b", common.Case("c", lambda only=only: {"a": only}), timer, 0.0)
        assert "skipped" in row


def test_implementations_that_are_not_ready_in_time_are_left_out(timer: common.Timer) -> None:
    """A compilation takes a minute; nine of them must not take the time of all other benches."""
    case = common.Case("c", lambda: {name: sleeper(5) for name in "abcd"})
    until = CLOCK() + 0.05  # two warm-ups of 25 ms each
    rows = {row["impl"]: row for row in common.time_case("b", case, timer, 0.0, until)}
    assert "ms" in rows["a"] and "ms" in rows["b"]  # a figure and what to compare it with
    for name in "cd":
        assert rows[name]["skipped"].startswith("no time left") and "ms" not in rows[name]
    rows = {row["impl"]: row for row in common.time_case("b", case, timer, 0.0)}
    assert all("ms" in row for row in rows.values())


def test_a_compiled_peer_is_compiled_at_every_shape() -> None:
    """torch.compile gives up after eight shapes of one function and runs the ninth eagerly."""
    code = (
        "import torch, bench.common as common\n"
        "graphs = []\n"
        "def backend(graph, inputs):\n"
        "    graphs.append(graph)\n"
        "    return graph\n"
        "common.compile_every_shape()\n"
        "double = torch.compile(lambda x: x * 2, dynamic=False, backend=backend)\n"
        "for n in range(2, 22): double(torch.ones(n))\n"
        "print(len(graphs))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "20\n", done.stderr[-2000:]


def test_the_driver_version_is_found_without_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "output_of", lambda *command: "")
    monkeypatch.setattr(record, "DRIVER_FILE", tmp_path / "version")
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    for line in (text, text.replace(" Open Kernel Module for x86_64", " x86_64 Kernel Module")):
        (tmp_path / "version").write_text(line + "GCC version:  gcc version 13.3.0 (Ubuntu)\n")
        assert record.driver_version() == "580.95.05"
    (tmp_path / "version").unlink()

    class Library:
        def cuDriverGetVersion(self, found) -> None:
            found._obj.value = 13010

    monkeypatch.setattr(record.ctypes, "CDLL", lambda name: Library())
    assert record.driver_version() == "CUDA 13.1"


class Event:
    def __init__(self, name: str, start: float, end: float, kernels: tuple = ()) -> None:
        self.name, self.kernels = name, [SimpleNamespace(name=n, duration=d) for n, d in kernels]
        self.time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)


def test_kernels_are_counted_in_the_phase_that_launched_them() -> None:
    """Also those of autograd's own thread, which are not below the phase's event."""
    from bench.bench_step import phase_times

    events = [
        Event("step: forward", 0, 10, (("step: forward", 70.0),)),
        Event("aten::mm", 2, 4, (("gemm", 30.0), ("reduce", 5.0))),
        Event("step: backward", 10, 20),
        Event("aten::mm", 12, 14, (("gemm", 60.0),)),  # of another thread
        Event("aten::zero_", 25, 26, (("fill", 4.0),)),  # in no phase
    ]
    assert phase_times(events, cuda=True) == {"forward": 35.0, "backward": 60.0}
    assert phase_times(events, cuda=False) == {"forward": 10, "backward": 10}


def test_fields_that_were_not_measured_are_absent(timer: common.Timer) -> None:
    case = common.Case("alone", lambda: {"ours": sleeper(1)})
    (row,) = common.time_case("naps", case, timer, 0.01)
    assert set(row) == {"bench", "case", "impl", "ms", "ms_p20", "ms_p80", "first_call_s"}


def test_implementations_take_turns(timer: common.Timer) -> None:
    calls: list[str] = []
    case = common.Case("turns", lambda: {name: lambda n=name: calls.append(n) for name in "abc"})
    common.time_case("turns", case, timer, 0.0)
    made = "".join(calls)
    # Each is warmed up and then timed once beside those that are ready, for the file.
    assert (
        made[: 3 * (1 + common.WARMUP_CALLS) + 6] == "aaaa" + "a" + "bbbb" + "ab" + "cccc" + "abc"
    )
    assert made[3 * (1 + common.WARMUP_CALLS) + 6 :] == "abc" + "bca" + "cab"


def test_a_peer_that_fails_is_a_row_with_the_reason(timer: common.Timer) -> None:
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
    (only, *others) = (rows[0] for rows in run_bench("fake", "cpu", timer, -5.0))
    assert only["skipped"] == "MemoryError"  # the first case has its turn when all time is gone
    assert all(row["skipped"].startswith("no time left") for row in others)
    broken, first, second = (rows[0] for rows in run_bench("fake", "cpu", timer, 0.1))
    assert broken["skipped"] == "MemoryError"
    assert first["ms"] == pytest.approx(60, rel=0.01)
    assert second["skipped"].startswith("no time left")


@pytest.mark.parametrize("name", record.META)
@pytest.mark.parametrize("value", (None, ""))
def test_a_file_without_meta_is_refused(tmp_path: Path, name: str, value: str | None) -> None:
    path = tmp_path / "out" / "x.json"
    with pytest.raises(ValueError, match=f"no result file without meta {name}:"):
        record.write(path, {"meta": META | {name: value}, "rows": []})
    assert not path.exists()
    record.write(path, {"meta": META, "rows": ROWS})
    assert json.loads(path.read_text()) == {"meta": META, "rows": ROWS}


def test_default_path_names_device_date_and_commit() -> None:
    cpu, gpu = (record.default_path(d, META | {"device": "NVIDIA H100"}) for d in ("cpu", "cuda"))
    part = record.default_path("cpu", META, "step")
    assert part.name == "2026-01-01-c-step.json"  # or it would replace the file of all
    assert cpu.relative_to(ROOT).as_posix() == "bench/results/cpu/2026-01-01-c.json"
    assert gpu.relative_to(ROOT).as_posix() == "bench/results/nvidia-h100/2026-01-01-c.json"


def test_benches_are_found_by_their_file_names() -> None:
    assert {"distillation_loss", "ingest"} <= set(select("kernels")) <= set(select("all"))
    assert select("all")[-2:] == ["cache", "loader"]  # the card must not wait for the host's
    assert select("ingest") == ["ingest"]
    assert select("startup") == ["startup"] and "startup" not in select("all")
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result) == {"meta", "rows"}
    assert result["meta"].keys() == set(record.META)
    assert "torch" in result["meta"]["versions"] and result["meta"]["commit"] == "abc"
    assert "--device cpu --seconds 1" in result["meta"]["command"]
    assert {row["impl"] for row in result["rows"]} == {"ours", "torchvision v2"}
    for row in result["rows"]:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert f"{row['ms']:.4g} ms" in done.stdout


def fake_benches(monkeypatch: pytest.MonkeyPatch, **cases: list[common.Case]) -> None:
    """Modules bench.bench_NAME with these cases, and no others."""
    from bench import __main__ as program

    for name, found in cases.items():
        module = ModuleType(f"bench.bench_{name}")
        module.cases = lambda device, found=found: found  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"bench.bench_{name}", module)
    monkeypatch.setattr(program, "select", lambda what: list(cases) if what == "all" else [what])
    monkeypatch.setattr(common, "compile_every_shape", lambda: None)
    monkeypatch.setattr(program, "STARTED", time.perf_counter())


class Killed(BaseException):
    """Like an interrupt, it is not caught by any bench."""


def test_a_run_that_is_cut_short_keeps_its_rows_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import __main__ as program

    out = tmp_path / "x.json"
    ran: list[str] = []
    kill = True

    def case(name: str, fails: bool = False) -> common.Case:
        def build() -> dict:
            ran.append(name)
            if fails and kill:
                raise Killed
            return {"ours": sleeper(0.1)}

        return common.Case(name, build)

    fake_benches(
        monkeypatch, a=[case("first"), case("second")], b=[case("third", True)], c=[case("fourth")]
    )

    def main(*more: str) -> list[str]:
        ran.clear()
        program.main(["all", "--device", "cpu", "--commit", "1", "--out", str(out), *more])
        return [row["case"] for row in record.read(out)["rows"]]

    with pytest.raises(Killed):
        main()
    assert [row["case"] for row in record.read(out)["rows"]] == ["first", "second"]
    kill = False
    assert main("--resume") == ["first", "second", "third", "fourth"]
    assert ran == ["third", "fourth"]
    assert main() == ["first", "second", "third", "fourth"] == ran  # without it, from the start
    assert main("--only", "^f") == ["first", "fourth"] == ran


def test_timed_rows_are_on_disk_while_a_peer_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third implementation is killed in its first call; two have their figures and a ratio."""
    from bench import __main__ as program

    def compiles() -> None:
        raise Killed

    case = common.Case(
        "c", lambda: {"ours": sleeper(1), "peer": sleeper(3), "slow to compile": compiles}
    )
    fake_benches(monkeypatch, a=[case])
    out = tmp_path / "x.json"
    with pytest.raises(Killed):
        program.main(["a", "--device", "cpu", "--commit", "1", "--out", str(out)])
    ours, peer = record.read(out)["rows"]
    assert ours["impl"] == "ours" and ours["ratio"] > 1 and ours["ratio_to"] == "peer"
    assert ours["provisional"] and peer["provisional"]
    # Such a case is measured again, and a whole case is not.
    file = record.ResultFile.resume(out)
    assert file.finished_cases() == set()
    file.put([{key: value for key, value in ours.items() if key != "provisional"}])
    assert file.finished_cases() == {("a", "c")}
    file.put([{"bench": "a", "case": "c", "impl": "ours", "skipped": record.NO_TIME}])
    assert file.finished_cases() == set()


def test_a_broken_cuda_context_restarts_the_bench_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import __main__ as program

    out = tmp_path / "x.json"
    started: list[list[str]] = []

    def restart(executable: str, command: list[str]) -> None:
        started.append(command)
        raise Killed

    case = common.Case("c", lambda: {"ours": sleeper(0.1)})
    fake_benches(monkeypatch, a=[case], b=[case])
    monkeypatch.setattr(common.Timer, "is_lost", lambda timer: True)
    monkeypatch.setattr(program.os, "execv", restart)
    with pytest.raises(Killed):
        program.main(["all", "--device", "cpu", "--out", str(out), "--seconds", "50"])
    (command,) = started
    assert command[:4] == [sys.executable, "-m", "bench", "all"] and "--resume" in command
    assert 0 < int(command[-1]) <= 50 and command[-2] == "--seconds"
    assert [row["bench"] for row in record.read(out)["rows"]] == ["a"]


def test_a_whole_step_is_timed_by_the_wall_clock_over_calls_in_a_row(timer: common.Timer) -> None:
    """Also on a GPU: events around one call would hide what the host needs to launch it."""
    calls: list[str] = []

    def step() -> None:
        calls.append("")
        CLOCK.sleep(2)

    case = common.Case("s", lambda: {"ours": step}, items=8, repeats=5)
    for device in (timer, AlmostCuda()):
        calls.clear()
        (row,) = common.time_case("b", case, device, 0.0)
        assert row["ms"] == pytest.approx(2, rel=0.01)  # of one call, not five; not an event's 1 ms
        assert len(calls) == 1 + common.WARMUP_CALLS + 5 * (1 + common.MIN_ROUNDS)
        assert row["items_per_s"] == pytest.approx(8e3 / row["ms"])
    calls.clear()
    common.time_case("b", case, timer, 60.0)  # time that is not needed is left to later stages
    assert len(calls) == 1 + common.WARMUP_CALLS + 5 * (1 + common.MAX_ROUNDS_OF_REPEATS)


def test_facts_of_measured_rows_are_collected_after_all_cases_are_timed(
    timer: common.Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profiler may slow down what comes after it, and a step that no time was left for must not
    be compiled to tell its facts."""
    from bench import __main__ as program

    events: list[str] = []

    def facts(name: str) -> dict[str, Any]:
        events.append(f"facts of {name}")
        if name == "peer":
            raise RuntimeError("no profiler")
        return {"device_ms": 1.5}

    def case(name: str) -> common.Case:
        def build() -> dict:
            events.append(name)
            return {"ours": sleeper(1), "peer": sleeper(2), "late": "no time left"}

        def quick_facts(implementation: str) -> dict[str, Any]:
            if implementation == "peer":
                raise RuntimeError("no clock")
            events.append(f"after {name}")
            return {"host_ms": 0.5}

        return common.Case(name, build, facts=facts, quick_facts=quick_facts)

    fake_benches(monkeypatch, a=[case("first"), case("second")])
    out = tmp_path / "x.json"
    program.main(["a", "--device", "cpu", "--commit", "1", "--seconds", "20", "--out", str(out)])
    cases = ["first", "after first", "second", "after second"]
    assert events == [*cases, *2 * ["facts of ours", "facts of peer"]]
    by_name = {row["impl"]: row for row in record.read(out)["rows"] if row["case"] == "first"}
    assert by_name["ours"]["device_ms"] == 1.5 and "device_ms" not in by_name["peer"]
    assert by_name["ours"]["host_ms"] == 0.5 and "host_ms" not in by_name["peer"]
    assert by_name["peer"]["ms"] > 0 and "provisional" not in by_name["peer"]
    assert by_name["peer, quick facts"]["skipped"] == "RuntimeError: no clock"
    assert by_name["peer, facts"]["skipped"] == "RuntimeError: no profiler"
    row = {"bench": "a", "case": "c", "impl": "ours", "ms": 1.0}
    assert common.with_facts(case("c"), [row], timer, CLOCK() - 1) == [row]  # no time left
    events.clear()
    program.main(["a", "--device", "cpu", "--commit", "1", "--seconds", "0", "--out", str(out)])
    assert events == ["first", "after first"]  # what was measured has its quick facts all the same


def test_lazy_implementations_are_built_on_their_first_call() -> None:
    built: list[str] = []

    def make(name: str):
        built.append(name)
        return lambda: name

    first, second = (common.Lazy(lambda name=name: make(name)) for name in "ab")
    assert second() == "b" and second() == "b" and built == ["b"]
    assert first() == "a" and built == ["b", "a"]


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


def test_the_peers_of_the_cache_bench_make_the_same_records() -> None:
    """On the device ours is timed beside PyTorch's operations: they must do the same work."""
    import torch

    from bench import bench_cache as bench
    from deit_fast.cache import codec_from_config
    from deit_fast.config import CodecConfig

    config = CodecConfig(k=bench.K, temperatures=(bench.TAU,))
    codec = codec_from_config(config, bench.CLASSES, bench.TAU)
    logits = torch.randn(50, bench.CLASSES) * 3
    records = codec.encode(logits)
    made = bench.torch_encode(logits)
    assert made.shape == records.shape and made.dtype == records.dtype
    assert torch.equal(made[:, : 2 * bench.K], records[:, : 2 * bench.K])  # the ids
    for raw in (records, made):
        ours = codec.decode(raw, bench.TAU)
        theirs = bench.torch_decode(raw)
        for one, other in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(one, other, check_dtype=False)
    exact = codec.decode(records, bench.TAU)
    nearly = codec.decode(made, bench.TAU)
    torch.testing.assert_close(exact.log_probs, nearly.log_probs, rtol=0, atol=2e-3)
    torch.testing.assert_close(exact.log_tail, nearly.log_tail, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------- plot


def result_file(path: Path, rows: list[dict], **meta: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write(path, {"meta": META | meta, "rows": rows})
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
    pytest.importorskip("matplotlib")
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
    pytest.importorskip("matplotlib")
    (result,) = plot.read([result_file(tmp_path / "gpu" / "a.json", ROWS)])
    first = plot.save(plot.charts(result)["gpu-b"], tmp_path / "1", "x")
    second = plot.save(plot.charts(result)["gpu-b"], tmp_path / "2", "x")
    assert [path.suffix for path in first] == [".svg", ".png"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    texts = chart_texts(first[0])
    assert {"1.50x  ours", "0.50x  slow"} <= set(texts)
    assert any("against peer" in text for text in texts)


def test_charts_are_readable_on_light_and_dark_backgrounds() -> None:
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


def test_markdown_keeps_the_text_around_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = plot.read([result_file(tmp_path / "gpu" / "a.json", ROWS)])
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"# Head\n\n{plot.MARKS[0]}\nold\n{plot.MARKS[1]}\n\nTail\n")
    plot.write_markdown(results, page, tmp_path / "docs" / "plots")
    text = page.read_text()
    assert text.startswith("# Head\n") and text.endswith("\n\nTail\n") and "old" not in text
    assert "| one | ours | 2 | 1.6 to 2.5 | 9 | 60 | 1.50 | peer |" in text
    assert "| one | peer | 3 | 3 to 3 | 6 | 40 |  |  |" in text
    assert "| two |" not in text
    for low, high in record.predictions()["rows"][0]["ms"].values():
        assert f"| {low:g} to {high:g} |" in text
    assert "![gpu-b](plots/gpu-b.svg)" in text and "(../gpu/a.json)" in text
    page.write_text("# Head\n")
    with pytest.raises(ValueError, match="has no lines"):
        plot.write_markdown(results, page, tmp_path)


def test_charts_of_the_docs_match_the_committed_results(tmp_path: Path) -> None:
    """`make plots` was run after the last result was committed."""
    pytest.importorskip("matplotlib")
    if why := plot.unordered():
        pytest.skip(why)
    folder = ROOT / "docs" / "plots"
    expected = set()
    for result in plot.read(plot.committed()):
        for stem, figure in plot.charts(result).items():
            expected.add(f"{stem}.svg")
            plot.save(figure, tmp_path, stem)
            here, there = (chart_texts(f / f"{stem}.svg") for f in (tmp_path, folder))
            assert here == there, stem
    # The chart of students is that of test_fashion_results.
    assert expected | {"fashion-reuse.svg"} == {path.name for path in folder.iterdir()}


def test_every_codec_decodes_in_its_bench() -> None:
    from bench import bench_cache

    case = bench_cache.codec_case(8)
    for name, call in case.build().items():
        assert callable(call)
        call()
        assert case.facts is not None and case.facts(name)["kl_error"] >= -1e-9
