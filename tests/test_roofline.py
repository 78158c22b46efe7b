"""The predicted step: its sums, that each part follows its count, and that its counts are real."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import cards, record, roofline, scaling, step_parts, traffic
from bench.__main__ import main
from bench.step_parts import GROUPS, Step
from deit_fast.kernels import sass

ROOT = Path(__file__).parent.parent
OLDER_TRITON = ROOT / ".venv" / "triton-3.6.0"  # `make test` puts it there
BEFORE = ROOT / "tests" / "golden" / "traffic-4af605c.json"  # of that commit
DOCUMENT = ROOT / "docs" / "performance.md"
H100 = cards.CARDS["H100"]
SMALL = Step(H100, "deit_small", "fused", traffic.BATCH)

# Most that a step of DeiT-S on an H100 may be predicted to take, ms.
MOST_MS = {"fused": 22.6, "fused-bf16": 20.8, "fused-bf16-mlp": 19.5}


def test_groups_add_up_to_the_step() -> None:
    found = roofline.predict(SMALL)
    assert sum(map(found.group_ms, GROUPS)) == pytest.approx(found.device_ms)
    assert all(part.us > 0 and part.amount and part.rate for part in found.device + found.host)
    assert found.ms == max(found.device_ms, found.host_ms)
    assert found.images_per_s == pytest.approx(256 / found.ms * 1e3)
    assert found.hours == pytest.approx(1_281_167 * 300 * found.ms / 256 / 3.6e6)


def test_amount_over_rate_is_the_time() -> None:
    """What is printed of a part is all that its time consists of."""
    scale = {"": 1, "M": 1e6, "G": 1e9, "T": 1e12}
    checked = Counter[str]()
    for part in roofline.predict(SMALL).device:
        count = re.match(r"([\d.]+) ?([MGT]?)", part.amount)
        rate = re.match(r"([\d.]+) ?([GT]?)(us)?", part.rate)
        assert count and rate
        amount = float(count[1]) * scale[count[2]]
        if rate[3]:
            us = amount * float(rate[1])
        else:
            us = amount / (float(rate[1]) * scale[rate[2]]) * 1e6
        if part.us > 20:  # below, the amount has too few digits
            assert us == pytest.approx(part.us, rel=0.02), part
            checked[part.group] += 1
    assert set(checked) == set(GROUPS) - {"loss"}


def test_the_step_judged_by_hand_is_found_again() -> None:
    """Worked out before this program existed, of commit 4af605c less its attention's last gain."""
    found = roofline.predict(SMALL, traffic.read(BEFORE))
    assert found.ms == pytest.approx(24.6, rel=0.1)
    by_hand = {"GEMM": 10.4 + 0.7, "elementwise": 9.0, "attention": 2.5, "optimiser": 0.4}
    for group, ms in by_hand.items():
        assert found.group_ms(group) == pytest.approx(ms, rel=0.1), group


@pytest.mark.parametrize("implementation", MOST_MS)
def test_step_is_as_fast_as_was_reached(implementation: str) -> None:
    found = roofline.predict(SMALL._replace(implementation=implementation))
    assert found.ms <= MOST_MS[implementation]


@pytest.mark.parametrize(("implementation", "row"), [("fused", "ours"), ("timm", "timm, compiled")])
@pytest.mark.parametrize("model", ["deit_tiny", "deit_small"])
@pytest.mark.parametrize("card", record.predictions()["devices"])
def test_committed_ranges_hold_what_is_predicted(
    card: str, model: str, implementation: str, row: str
) -> None:
    """bench/predictions.json is what a GPU is compared with; this program must say the same."""
    key = ("step", f"{model} student 224px B=256", row)
    (entry,) = (e for e in record.predictions()["rows"] if record.key_of(e) == key)
    low, high = entry["ms"][card]
    found = roofline.predict(Step(cards.CARDS[card], model, implementation, 256))
    assert low <= found.ms <= high, f"{found.ms:.2f} ms: change the range in predictions.json"


# ---------------------------------------------------------------------------------------------
# Each part follows its count
# ---------------------------------------------------------------------------------------------


def changed(field: str, key: tuple[str, object], calls: int) -> roofline.Prediction:
    """The prediction with this number of extra calls in each block's backward."""
    table = traffic.read()
    parts = table["deit_small"]["fused"]
    getattr(parts["block"]["backward"], field)[key] += calls
    return roofline.predict(SMALL, table)


@pytest.mark.parametrize(
    ("field", "key", "group", "us"),
    [
        ("kernels", ("triton_red_fused_sum", 26_000_000), "elementwise", 10),
        ("operators", ("bias_gelu_backward", 26_000_000), "elementwise", 10),
        ("operators", ("new_operator", 26_000_000), "elementwise", 10),
        ("other", ("aten.sort", 26_000_000), "elementwise", 10),
        ("gemms", ("mm", (50688, 384, 384)), "GEMM", 30.06),  # 78.1 MB
        ("gemms", ("mm", (50688, 1536, 384)), "GEMM", 103.1),  # 59.8 GFLOP
        ("operators", ("attention_backward", 313_000_000), "attention", 160.4),  # instructions
        ("other", ("aten._scaled_dot_product 256x6x198x198x64", 0), "attention", 240.8),
    ],
)
def test_a_part_follows_its_count(
    field: str, key: tuple[str, object], group: str, us: float
) -> None:
    before, after = roofline.predict(SMALL), changed(field, key, 1)
    blocks = step_parts.DEPTH - traffic.DEPTH
    assert after.group_ms(group) - before.group_ms(group) == pytest.approx(
        blocks * us / 1e3, rel=0.01
    )
    more = after.group_ms("launches") - before.group_ms("launches")
    launched = step_parts.LAUNCHES.get(key[0], 1)
    assert more == pytest.approx(blocks * launched * step_parts.LAUNCH_US / 1e3)
    assert after.host_ms > before.host_ms
    for other in set(GROUPS) - {group, "launches"}:
        assert after.group_ms(other) == pytest.approx(before.group_ms(other))


def test_a_host_that_is_slower_than_its_gpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_parts, "HOST_LAUNCH_US", 100.0)
    found = roofline.predict(SMALL)
    assert found.ms == found.host_ms > found.device_ms


def test_time_follows_the_card_and_the_batch() -> None:
    found = roofline.predict(SMALL)
    faster = dataclasses.replace(H100, memory_tbps=2 * H100.memory_tbps)
    assert roofline.predict(SMALL._replace(card=faster)).group_ms("elementwise") == pytest.approx(
        found.group_ms("elementwise") / 2
    )
    half = roofline.predict(SMALL._replace(batch=128))
    for group in ("GEMM", "elementwise", "attention", "ingest"):
        assert half.group_ms(group) == pytest.approx(found.group_ms(group) / 2, rel=0.03), group
    assert half.group_ms("launches") == found.group_ms("launches")
    names = [roofline.predict(SMALL._replace(card=card)).ms for card in cards.CARDS.values()]
    assert names == sorted(names, reverse=True)


def test_rates_of_products_are_those_of_the_reference() -> None:
    assert cards.matrix_tflops(H100, 384) == pytest.approx(580, rel=0.01)
    assert cards.matrix_tflops(H100, 8192) < 0.75 * 989
    assert cards.bytes_per_us(H100) == pytest.approx(2.6e6)


@pytest.mark.parametrize(("model", "millions"), [("tiny", 5.9), ("small", 22.4), ("base", 87.3)])
def test_parameters_are_those_of_the_model(model: str, millions: float) -> None:
    from timm import create_model

    name = f"deit_{model}"
    count = sum(p.numel() for p in create_model(traffic.MODELS[name]).parameters())
    assert step_parts.parameters(name) == count == pytest.approx(millions * 1e6, rel=0.01)


def instructions(listing: str) -> tuple[int, list[int]]:
    """Instructions outside of loops, and of each loop."""
    code = sass.parse_code(listing)
    loops = [end - start for start, end in sass.loops_of(code)]
    return len(code) - sum(loops), loops


SASS = """
import sys, tempfile
from deit_fast.kernels import aot, sass
for case in aot.package_cases():
    if case.name == sys.argv[1]:
        if "bias_sums" in case.constexprs:  # as fused models call it
            signature, constants = case.signature | {"bias_sums": "*fp32"}, dict(case.constexprs)
            del constants["bias_sums"]
            aligned = case.attrs | {"bias_sums": 16}
            case = case._replace(signature=signature, constexprs=constants, attrs=aligned)
        compiled = aot.compile_case(case, "sm_90")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            print(compiled.metadata.num_warps)
            print(sass.tool("nvdisasm", "--print-code", "--no-dataflow", file.name))
"""


@pytest.mark.parametrize(
    ("operator", "kernel"), [("attention_forward", "whole"), ("attention_backward", "both")]
)
def test_instructions_are_those_of_the_machine_code(operator: str, kernel: str) -> None:
    if not OLDER_TRITON.exists():
        pytest.skip("triton 3.6.0 is missing; `make test` puts it into .venv/triton-3.6.0")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = f"{OLDER_TRITON}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", SASS, f"attention/{kernel}-bf16-N=198-D=64"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warps, _, listing = done.stdout.partition("\n")
    outside, loops = instructions(listing)
    known = step_parts.INSTRUCTIONS[operator]
    assert int(warps) == known.warps
    assert outside == pytest.approx(known.outside, rel=0.02), outside
    assert sum(loops) == pytest.approx(known.turn, rel=0.02), loops


# ---------------------------------------------------------------------------------------------
# Several GPUs
# ---------------------------------------------------------------------------------------------


def test_one_gpu_exchanges_nothing() -> None:
    one = roofline.predict(SMALL)
    (row,) = scaling.predict(one, [1])
    assert row.step_ms == one.ms and row.all_reduce_ms == 0
    assert row.efficiency == pytest.approx(1)
    assert row.loader_images_per_s == pytest.approx(one.images_per_s)


def test_bytes_of_an_exchange() -> None:
    rows = scaling.predict(roofline.predict(SMALL), [8, 64])
    assert [row.gpus for row in rows] == [8, 64]
    megabytes = 4 * step_parts.parameters("deit_small") / 1e6
    assert rows[0].megabytes == pytest.approx(2 * 7 / 8 * megabytes)
    assert rows[1].megabytes == pytest.approx(2 * 63 / 64 * megabytes)
    assert sum(scaling.buckets(90e6)) == 90e6 and len(scaling.buckets(90e6)) == 4


def test_the_backward_hides_the_exchange_but_for_the_last_bucket() -> None:
    for row in scaling.predict(roofline.predict(SMALL), [8, 64]):
        assert 0 < row.exposed_ms < row.all_reduce_ms / 2
        assert row.efficiency < 1
        assert row.loader_images_per_s == pytest.approx(8 * row.images_per_s / row.gpus)


def test_an_exchange_longer_than_the_backward_is_waited_for() -> None:
    slow = dataclasses.replace(H100, nvlink_gbps=5)
    row = scaling.scale(roofline.predict(SMALL._replace(card=slow)), 8)
    backward = sum(p.us for p in roofline.predict(SMALL).device if p.phase == "backward") / 1e3
    assert row.exposed_ms == pytest.approx(row.all_reduce_ms - backward)


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------


def test_prediction_is_marked_as_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "step.json"
    main(["roofline", "--card", "H200", "--gpus", "1,8", "--json", str(file)])
    said = capsys.readouterr().out
    assert said.startswith("PREDICTED, not measured: deit_small, fused, batch 256, H200")
    content = json.loads(file.read_text())
    assert content["predicted"] is True
    assert sum(p["us"] for p in content["parts"] if p["group"] != "host") == pytest.approx(
        content["device_ms"] * 1e3
    )
    assert len(content["gpus"]) == 2


def test_measured_rows_are_beside_the_prediction(tmp_path: Path) -> None:
    meta = {"device": "NVIDIA H100 80GB HBM3", "driver": "1", "versions": {"torch": "2.11.0"},
            "commit": "abc", "date": "2026-12-01", "command": "x"}  # fmt: skip
    case = "deit_small student 224px B=256"
    rows = [{"bench": "step", "case": case, "impl": "ours", "ms": 23.5, "device_ms": 23.0},
            {"bench": "step", "case": case, "impl": "timm, compiled", "ms": 30.5},
            {"bench": "step", "case": case, "impl": "ours, eager", "ms": 27.0}]  # fmt: skip
    record.write(tmp_path / "h100" / "2026-12-01-abc.json", {"meta": meta, "rows": rows})
    (line,) = roofline.measured(SMALL, tmp_path)
    assert line.startswith("measured 23.50 ms, device 23.00 ms: NVIDIA H100")
    (line,) = roofline.measured(SMALL._replace(implementation="timm"), tmp_path)
    assert line.startswith("measured 30.50 ms: ")
    assert not roofline.measured(SMALL._replace(card=cards.CARDS["A100"]), tmp_path)
    assert not roofline.measured(SMALL._replace(batch=64), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "V100"], "unknown card 'V100': choose from A100, H100, H200, B200"),
        (["--gpus", "12"], "--gpus 12: up to 8, or whole hosts of as many"),
        (["--json", "/no-such-folder/x.json"], "/no-such-folder/x.json: there is no such folder"),
        (["--markdown", "/no-such-folder/x.md"], "/no-such-folder/x.md: not found"),
    ],
)
def test_wrong_calls_end_with_one_clear_line(arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["roofline", *arguments])
    assert raised.value.code == words


def test_document_shows_the_predictions(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    text = DOCUMENT.read_text()
    page.write_text(re.sub(r"\| H100 \| deit_small \|[^\n]*", "| stale |", text))
    assert page.read_text() != text
    roofline.write_markdown(page)
    assert page.read_text() == text, "`make traffic-golden` writes the tables anew"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        roofline.write_markdown(page)
