"""The HTML report: complete, self-contained, escaped; and its refusals."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deit_fast import charts
from deit_fast.cli import main
from deit_fast.config import InputError, RunConfig, to_dict
from deit_fast.report import PNG_SIGNATURE, build_report, short_names, write_report

VOID = {"meta", "img", "br"}


def make_run(folder: Path, kind: str = "soft", top1: float = 0.9, **result: Any) -> Path:
    """A finished run of three epochs with four steps each."""
    folder.mkdir(parents=True)
    config = RunConfig(epochs=3, output=str(folder)).replace(loss={"kind": kind})
    rows: list[dict[str, Any]] = []
    for epoch in (1, 2, 3):
        for step in (4 * epoch - 2, 4 * epoch):
            rows.append(
                {"kind": "train", "step": step, "epoch": epoch, "loss": 3 / step,
                 "images_per_s": 100 + step, "data_wait": 0.1, "time": 1.0}
            )  # fmt: skip
        accuracy = top1 * epoch / 3
        rows.append(
            {"kind": "eval", "step": 4 * epoch, "epoch": epoch, "top1": accuracy, "loss": 1.0}
        )
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "top1": top1,
        "best_top1": top1,
        "best_epoch": 3,
        "per_class": {"cat": 0.75, "dog": 0.5},
        "steps": 12,
        "epochs": 3,
        "images_per_s": 1234.0,
        "substituted": ["a.jpg"],
        "distill": kind,
        "teacher": {"from": "cache", "teacher.spec": "timm:regnet"} if kind != "none" else None,
        "environment": {"torch": "2.14.1", "device": "CPU"},
        "command": f"deit-fast train --output {folder.name}",
        **result,
    }
    (folder / "result.json").write_text(json.dumps(content))
    return folder


class Checker(HTMLParser):
    """Balanced tags, and the text and attributes that were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def words(page: str) -> str:
    return " ".join(" ".join(check(page).text).split())


def test_page_holds_everything_and_needs_no_network(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "plain", "none", 0.8),
        make_run(tmp_path / "soft", "soft", 0.9, top1_class=0.88, top1_distill=0.89, ema_top1=0.91),
    ]
    for run in runs:
        (run / "samples.png").write_bytes(PNG_SIGNATURE + b"pixels")
    page = build_report(runs, "Two runs")
    checker = check(page)
    assert all(link.startswith("data:image/png;base64,") for link in checker.links)
    assert len(checker.links) == 1  # both runs saw the same views
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "script" not in checker.tags
    assert checker.tags.count("svg") == 5  # accuracy, two losses, throughput, data wait
    assert "prefers-color-scheme:dark" in page and "@media print" in page and "viewport" in page
    text = words(page)
    for part in (
        "90.00 %", "88.00 %", "89.00 %", "91.00 %", "80.00 %", "3 (90.00 %)", "1 234",
        "timm:regnet (cached)", "10.00 %", "10.00 points above the best run without distillation",
        "deit-fast train --output soft", "2.14.1", "loss.kind", "75.0 %",
    ):  # fmt: skip
        assert part in text, part


def test_settings_show_differences_only(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "none"), make_run(tmp_path / "b", "hard")]
    page = build_report(runs, "t")
    assert re.findall(r"<code>(.*?)</code>", page) == ["loss.kind"]
    alone = build_report(runs[:1], "t")
    assert re.findall(r"<code>(.*?)</code>", alone) == ["epochs", "loss.kind"]


def test_columns_without_a_value_are_left_out(tmp_path: Path) -> None:
    text = words(build_report([make_run(tmp_path / "a", "none")], "t"))
    assert "class head" not in text and "teacher" not in text.split("Learning curves")[0]
    assert "best epoch" in text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    run = make_run(
        tmp_path / "a'b\"<i>&",
        command=evil,
        per_class={evil: 0.5},
        environment={evil: evil},
        teacher={"teacher.spec": evil},
        distill=evil,
    )
    page = build_report([run], evil)
    checker = check(page)
    assert "script" not in checker.tags
    assert checker.tags.count("i") == page.count('<i class="key"')  # only the page's own
    assert evil in "".join(checker.text)


def test_curves_follow_the_steps(tmp_path: Path) -> None:
    page = build_report([make_run(tmp_path / "a", top1=0.9)], "t")
    titles = re.findall(r"<title>(a: .*?)</title>", page)
    assert "a: 30 % at epoch 1" in titles and "a: 90 % at epoch 3" in titles
    assert "a: 1.5 at epoch 0.5" in titles  # training loss after half an epoch
    assert "a: 112 at epoch 3" in titles  # images per second


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    before = build_report([run], "t")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "st')
    assert build_report([run], "t") == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", None, "does not exist: the run has not finished"),
        ("config.json", None, "does not exist"),
        ("metrics.jsonl", None, "does not exist"),
        ("result.json", b"{", "is damaged: Expecting property name"),
        ("result.json", b"[1]", "is damaged: not a JSON object"),
        ("config.json", b"\xff\xfe", "is damaged: not UTF-8 text"),
        ("metrics.jsonl", b'{"kind": "eval"}\nnonsense\n', "line 2 is damaged: Expecting value"),
        ("samples.png", b"GIF89a", "is damaged: not a PNG image"),
    ],
)
def test_damage_is_named(
    file: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "a")
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    out = tmp_path / "out.html"
    assert main(["report", str(run), "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"deit-fast: error: {run / file} {message}") and line.count("\n") == 1
    assert not out.exists()


def test_values_of_a_wrong_kind_leave_a_dash_not_a_crash(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "a",
        best_top1=None, per_class=[1], substituted=3, environment="x", teacher=7,
        images_per_s=math.nan, steps=True,
    )  # fmt: skip
    result = (run / "result.json").read_text()
    (run / "result.json").write_text(result.replace('"top1": 0.9', '"top1": "high"', 1))
    (run / "metrics.jsonl").write_text(
        '{"kind": "eval", "step": null, "epoch": "x", "top1": 0.5}\n'
        '{"kind": "eval", "step": 4, "epoch": 1, "top1": NaN, "loss": Infinity}\n'
        '{"kind": "eval", "step": 8, "epoch": 2, "top1": 0.25}\n{"kind": "train", "loss": []}\n'
    )
    page = build_report([run], "t")
    assert "1 run." in words(page)
    assert re.findall(r"<title>(a: .*?)</title>", page) == ["a: 25 % at epoch 2"]


def test_no_runs_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        build_report([], "t")
    with pytest.raises(InputError, match="gone does not exist"):
        build_report([tmp_path / "gone"], "t")


def test_the_verb_writes_the_file_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "a")
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--out", str(out), "--title", "My title"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert "<h1>My title</h1>" in out.read_text(encoding="utf-8")
    with pytest.raises(OSError):
        write_report([run], tmp_path, "t")


def test_short_names_tell_runs_apart() -> None:
    paths = [Path("x/seed-0/soft"), Path("x/seed-1/soft"), Path("y/hard")]
    assert short_names(paths) == ["seed-0/soft", "seed-1/soft", "y/hard"]
    assert short_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert short_names([Path("x/a"), Path("x/a")]) == ["a", "a"]


# ------------------------------------------------------------------------------------------ charts

finite = st.floats(-1e9, 1e9).map(lambda value: 0.0 if abs(value) < 1e-6 else value)


@given(finite, finite, st.integers(2, 8))
def test_ticks_enclose_the_data_evenly(a: float, b: float, count: int) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high)):
        high = low
    ticks = charts.ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= count + 2


@given(st.lists(st.floats(charts.TOP, charts.HEIGHT - charts.BOTTOM), min_size=1, max_size=15))
def test_names_of_lines_do_not_overlap(heights: list[float]) -> None:
    placed = charts.spread(heights)
    ordered = sorted(placed)
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    assert min(gaps, default=charts.LABEL_GAP) >= charts.LABEL_GAP - 1e-9
    assert min(placed) >= charts.TOP
    assert max(placed) <= charts.HEIGHT - charts.BOTTOM + charts.LABEL_GAP / 2 + 1e-9
    assert [placed[i] for i in sorted(range(len(placed)), key=heights.__getitem__)] == ordered


def test_long_lines_are_thinned_to_means_that_end_at_the_last_point() -> None:
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    thin = charts.thin(points)
    assert len(thin) <= charts.MAX_POINTS + 1
    assert thin[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.01 for _, y in thin[:-1])
    assert charts.thin(points[:10]) == points[:10]


def test_one_point_and_many_lines_still_make_a_chart() -> None:
    lines = [charts.Line(f"run {i}", i, [(1.0, 0.5)]) for i in range(20)]
    chart = charts.line_chart(lines, title="t", x_name="epoch", show=str, floor=None)
    check(chart)
    numbers = [float(n) for n in re.findall(r'(?:cx|cy|x|y)="([-\d.]+)"', chart)]
    assert all(map(math.isfinite, numbers))
    assert "stroke-dasharray" in chart  # colours repeat after eight lines
