"""The progress bar on a terminal of a given width, and what is left of it elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from deit_fast.runtime.progress import Progress

ROOT = Path(__file__).parent.parent
ROWS, SHORT, LONG = 24, "1931 img/s loss 1.465", "top-1 70.0 % lr 5.4e-04 wait 3 %"
WORK = """
import logging, os, sys, warnings
from deit_fast.cli import _log_to_stderr
from deit_fast.runtime.progress import Progress
_log_to_stderr()
with Progress("train", 4, paced=False) as progress:
    for step in range(4):
        progress.advance(line=f"step {step + 1}/4", figures={
            "speed": "1931 img/s", "loss": "loss 1.465", "lr": "lr 5.4e-04", "wait": "wait 3 %"})
        progress.show({"top1": "top-1 70.0 %"})
        if step % 2:
            with progress.part("eval", 2) as count:
                count()
                progress._bar and progress._bar.refresh()
                if not os.fork():
                    print("of a worker", file=sys.stderr)
                    os._exit(0)
                os.wait()
            logging.getLogger("deit_fast").info("epoch %d", step // 2 + 1)
"""


def on_a_terminal(columns: int, **environment: str) -> str:
    """What the work writes to a terminal, with control codes."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", WORK], stdin=child, stdout=child, stderr=child, env=env(environment)
    ) as work:
        os.close(child)
        written = b""
        try:
            while part := os.read(parent, 4096):
                written += part
        except OSError:  # EIO: the other end is closed
            pass
        os.close(parent)
    assert work.returncode == 0, written
    return written.decode().replace("\r\n", "\n")


def env(more: dict[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    return kept | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | more


@pytest.mark.parametrize(
    ("columns", "shown", "left_out"),
    [(50, "", SHORT), (80, f" {SHORT} top-1 70.0 %", "lr "), (120, f" {SHORT} {LONG}", "\n\n")],
)
def test_figures_follow_as_far_as_the_terminal_is_wide(columns, shown, left_out):
    text = on_a_terminal(columns, NO_COLOR="1")
    lines = text.split("\n")
    bar = next(line for line in reversed(lines) if "100 %" in line)
    assert "train ━━━━━━━━━━━━━━━━━━━━━━━━ 100 % 00:0" in bar and left_out not in bar
    assert bar.rstrip().endswith(shown or "00:00")
    assert any("eval  ━━━━━━━━━━━━" in line and " 50 % " in line for line in lines)
    # No line tears the bar: each begins where the bar was taken away.
    said = [line.rpartition("\x1b[2K")[2].rstrip() for line in lines]
    assert "epoch 1" in said and "epoch 2" in said and "step 1/4" not in text
    assert text.count("of a worker") == 2, "a forked process writes past the bar"


@pytest.mark.parametrize(
    "environment",
    [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {}],
    ids=lambda value: next(iter(value), "plain"),
)
def test_a_pipe_gets_lines_alone(environment):
    done = subprocess.run(
        [sys.executable, "-c", WORK], env=env(environment), capture_output=True, text=True
    )
    worker = "of a worker"
    lines = ["step 1/4", "step 2/4", worker, "epoch 1", "step 3/4", "step 4/4", worker, "epoch 2"]
    assert done.stderr.splitlines() == lines and done.stdout == ""


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"RANK": "1"}], ids=["dumb", "rank"])
def test_no_bar_without_a_cursor_or_in_another_rank(environment):
    text = on_a_terminal(80, **environment)
    assert "\x1b" not in text and "━" not in text


def test_lines_of_slow_work_show_small_rates_and_figures(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr("deit_fast.runtime.progress.time.perf_counter", lambda: now)
    caplog.set_level("INFO", logger="deit_fast")
    with Progress("units", 4, unit="unit") as progress:
        for at, count, figures in (
            (31.0, 0, {}),  # a unit that failed
            (100.0, 1, {"found": "35 images/s"}),
            (200.0, 3, {"found": "52 images/s"}),
        ):
            now = at
            progress.advance(count, figures=figures)
    assert [record.getMessage() for record in caplog.records] == [
        "units: 0 of 4 units (0 %), 0 units/s, 31 s so far",
        "units: 1 of 4 units (25 %), 0.01 units/s, 35 images/s, 5 min 0 s left",
        "units: 4 of 4 units (100 %), 0.02 units/s, 52 images/s, 3 min 20 s in all",
    ]
