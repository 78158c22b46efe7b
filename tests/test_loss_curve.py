"""The golden loss curves: a change that moves the training's numbers has to say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import loss_curve

GOLDEN = Path(__file__).parent / "golden" / "loss-curves.json"


@pytest.mark.parametrize("family", loss_curve.FAMILIES)
def test_the_curve_is_the_golden_one(family: str) -> None:
    """Equal to the last digit on the instruction set of the recording, elsewhere up to rounding.

    A newer CPU has that instruction set too: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.
    After an intended change: python -m bench.loss_curve --out tests/golden/loss-curves.json
    """
    golden = json.loads(GOLDEN.read_text())
    losses = loss_curve.curve(family)
    assert len(losses) == loss_curve.STEPS
    if golden["made"] == loss_curve.where():
        assert losses == golden[family]
    assert losses[:10] == pytest.approx(golden[family][:10], rel=1e-5)
    assert losses == pytest.approx(golden[family], rel=1e-2)


def test_compare_names_the_first_step_that_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = json.loads(GOLDEN.read_text())
    moved = tmp_path / "moved.json"
    values = [*golden["soft"]]
    values[6] *= 1 + 1e-6
    moved.write_text(json.dumps(golden | {"soft": values}))
    assert loss_curve.compare(GOLDEN, GOLDEN) == 0
    assert "differs" not in capsys.readouterr().out
    assert loss_curve.compare(GOLDEN, moved) == 1
    out = capsys.readouterr().out
    assert "soft         differs from step 7 on, by at most 1.0e-06 of the loss" in out
    assert "hard         the same, 50 steps" in out
