"""The HTML report: complete, self-contained, escaped; and its refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deit_fast.cli import main
from deit_fast.errors import InputError
from deit_fast.runtime.run_names import short_names
from deit_fast.tools.report import charts
from deit_fast.tools.report.page import build_report, write_report
from helpers.reports import add_analysis, check, make_run, shown_settings, words

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def test_the_page_is_complete_and_needs_no_network(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "plain", "none", 0.8),
        make_run(tmp_path / "soft", "soft", 0.9, top1_class=0.88, top1_distill=0.89, ema_top1=0.91),
    ]
    for run in runs:
        Image.new("L", (2, 2)).save(run / "samples.png")
    page = build_report(runs, "Two runs")
    checker = check(page)
    pictures = [link for link in checker.links if link.startswith("data:image/png;base64,")]
    assert len(pictures) == 1  # both runs saw the same views
    targets = [link[1:] for link in checker.links if link not in pictures]
    assert targets == checker.ids  # the table of contents, in order
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "script" not in checker.tags
    # accuracy, validation loss, a training loss of each kind, throughput, data wait
    assert page.count('role="img"') == 6
    assert "prefers-color-scheme:dark" in page and "@media print" in page and "viewport" in page
    text = words(page)
    for part in (
        "90.00 %", "88.00 %", "89.00 %", "91.00 %", "80.00 %", "3 (90.00 %)", "1 234",
        "timm:regnet (cached)", "10.00 %",
        "Gain by distillation, points +10.00 soft against plain, one run each, same seed",
        "deit-fast train --output soft", "2.14.1", "loss.kind", "75.0 %",
    ):  # fmt: skip
        assert part in text, part


def test_settings_show_differences_only(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "none"), make_run(tmp_path / "b", "hard")]
    page = build_report(runs, "t")
    assert shown_settings(page) == ["loss.kind"]
    assert shown_settings(build_report(runs[:1], "t")) == ["epochs", "loss.kind"]


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
    assert "i" not in checker.tags
    assert evil in "".join(checker.text)


def test_curves_follow_the_steps(tmp_path: Path) -> None:
    page = build_report([make_run(tmp_path / "a", top1=0.9)], "t")
    titles = re.findall(r"<title>(a: .*?)</title>", page)
    assert "a: 30 % at epoch 1" in titles and "a: 90 % at epoch 3" in titles
    assert "a: 1.5 at epoch 0.5" in titles  # training loss after half an epoch
    assert "a: 112 at epoch 3" in titles  # images per second


def test_an_incomplete_last_line_of_the_log_is_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    before = build_report([run], "t")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "st')
    assert build_report([run], "t") == before


def test_the_analysis_is_shown(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "plain", "none"), add_analysis(make_run(tmp_path / "soft"))]
    page = build_report(runs, "t")
    text = words(page)
    for part in (
        "0.031", "0.062 \u00b1 0.250", "0.938 \u00b1 0.250", "0.875 \u00b1 0.250", "95.50 %",
        "81.25 %", "83.75 %", "86.25 %", "82.90 %", "7.25 %", " 82.9 ", " 83.4 ", " 89.8 ",
        "class cat", "0.625", "0.312", "image 17 (label dog)", "image 17, label dog",
        "From left to right: image, class token, distillation token.",
        "undistilled: no run with loss.kind none was given",
    ):  # fmt: skip
        assert part in text, part
    titles = re.findall(r"<title>(.*?)</title>", page)
    assert "soft: 0.9375 at block (0: input) 2" in titles
    assert "soft: 0.875 at block (0: input) 3" not in titles  # the final norm is no block
    assert (
        "class: 50 % at confidence 0.25" in titles and "teacher: 100 % at confidence 0.95" in titles
    )
    assert not any("confidence 0.55" in title for title in titles)  # fewer than ten images
    (link,) = [link for link in check(page).links if link.startswith("data:image/png")]
    assert link.split(",")[1] in page
    assert "Teacher temperature" in text and "Teacher temperature" not in words(
        build_report(runs[:1], "t")
    )


def test_an_earlier_run_is_shown_without_its_untrained_head(tmp_path: Path, caplog) -> None:
    """Earlier versions averaged both heads whatever the loss trained."""
    heads = {"top1_class": 0.88, "top1_distill": 0.0265}
    run = make_run(tmp_path / "plain", "none", 0.642, loss=1.445, ema_top1=0.61, **heads)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row | heads if row["kind"] == "eval" else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    add_analysis(run)
    page = build_report([run], "t")
    text = words(page)
    assert "Top-1 accuracy 88.00 %" in text and "plain: 88 % at epoch 3" in page
    for absent in ("64.20 %", "2.65 %", "61.00 %", "86.25 %", "class head", "per class "):
        assert absent not in text, absent
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "shown are the figures of the class head alone" in said[0]
    assert "its means have an untrained head; run `deit-fast analyze` again" in said[1]
    make_run(tmp_path / "hard", "hard", 0.642, **heads)
    assert "64.20 %" in words(build_report([tmp_path / "hard"], "t"))


def test_earlier_analyses_called_the_mean_a_sum(tmp_path: Path) -> None:
    text = words(build_report([add_analysis(make_run(tmp_path / "a"))], "t"))
    assert "mean of logits, top-1 86.25 %" in text and "sum of" not in text


def test_a_teacher_of_several_runs_is_shown_once(tmp_path: Path) -> None:
    runs = [add_analysis(make_run(tmp_path / name)) for name in ("a", "b")]
    page = build_report(runs, "t")
    assert page.count("<p>timm:regnet; classes of image 17 (label dog)</p>") == 1
    assert page.count("Accuracy by confidence: ") == 2 * 2  # caption and label of each chart


def test_hostile_values_of_an_analysis_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    run = add_analysis(
        make_run(tmp_path / "a"),
        disagreement={"names": [evil], "shares": [[0.0]]},
        left_out={evil: evil},
        attention={"tiles": [evil], "samples": [
            {"id": 17, "label": evil, "picture": "../x/attention-17.png"}
        ]},
    )  # fmt: skip
    page = build_report([run], "t")
    checker = check(page)
    assert "script" not in checker.tags and evil in "".join(checker.text)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("analysis.json", b"{", "is damaged: Expecting property name"),
        ("analysis.json", b'{"format": 9}', "has format 9, this version reads 1: run `deit-fast"),
        ("attention-17.png", None, "does not exist"),
        ("attention-17.png", b"GIF89a", "is damaged: not a PNG image"),
    ],
)
def test_a_damaged_analysis_is_named(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = add_analysis(make_run(tmp_path / "a")) / "analysis" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        build_report([tmp_path / "a"], "t")
    assert str(error.value).startswith(f"{path} {message}")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("result.json", "teacher", "timm:regnet"),
        ("result.json", "per_class", [1]),
        ("analysis/analysis.json", "tokens", {"layers": [1, {"mean": "x"}, 2]}),
        ("analysis/analysis.json", "disagreement", {"names": ["a"], "shares": [["x"]]}),
        ("analysis/analysis.json", "attention", {"tiles": 4, "samples": [{"picture": 4}]}),
    ],
    ids=["teacher", "per_class", "tokens", "disagreement", "attention"],
)
def test_values_of_a_wrong_type_name_the_run(
    file: str, key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    add_analysis(make_run(tmp_path / "a"))
    path = tmp_path / "a" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert main(["report", str(tmp_path / "a"), "--output", str(tmp_path / "out.html")]) == 2
    line = capsys.readouterr().err
    assert "a file of a is damaged or was edited" in line and line.count("\n") == 1
    assert not (tmp_path / "out.html").exists()


def test_long_training_curves_are_smoothed_and_kept_as_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    rows = [
        {"kind": "train", "step": s, "epoch": 1, "loss": 2.0 + (-1) ** s} for s in range(1, 101)
    ]
    last = {"kind": "eval", "step": 100, "epoch": 10, "top1": 0.5}
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, last])
    (run / "metrics.jsonl").write_text(lines)
    page = build_report([run], "t")
    assert "Training loss (soft distillation), mean of 5 neighbours" in page
    titles = re.findall(r"<title>(a: .*?)</title>", page)
    assert "a: 1.8 at epoch 4.9" in titles  # (1 + 3 + 1 + 3 + 1) / 5 around step 49
    assert "a: 1 at epoch 4.9" not in titles and "opacity: 0.3" in page  # as logged: faint
    assert "a: 1 at epoch 0.1" in titles  # an end has no neighbours on both sides


def test_a_step_has_the_epoch_of_the_evaluations_around_it(tmp_path: Path) -> None:
    """Epochs of 8, 8 and 4 steps, the first evaluated before its end too; the last goes on."""
    run = make_run(tmp_path / "a")
    ends = {4: 1, 8: 1, 16: 2, 20: 3}
    rows = [{"kind": "eval", "step": s, "epoch": e, "top1": 0.5} for s, e in ends.items()]
    losses = {4: 9.0, 12: 8.0, 18: 7.0, 21: 6.0}
    rows += [{"kind": "train", "step": s, "epoch": 1, "loss": loss} for s, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    titles = re.findall(r"<title>(a: .*?)</title>", build_report([run], "t"))
    expected = {"a: 9 at epoch 0.5", "a: 8 at epoch 1.5", "a: 7 at epoch 2.5", "a: 6 at epoch 3.25"}
    assert expected <= {*titles}


def test_smoothing_is_the_mean_of_neighbours_and_keeps_straight_lines() -> None:
    slope = [(float(x), 3.0 * x) for x in range(200)]
    smoothed, width = charts.smooth(slope)
    assert width == 11
    assert [y for _, y in smoothed] == pytest.approx([y for _, y in slope])
    assert [x for x, _ in smoothed] == [x for x, _ in slope]
    noisy = [(float(x), float(x * x % 7)) for x in range(200)]
    assert charts.smooth(noisy)[0][50][1] == pytest.approx(
        sum(noisy[x][1] for x in range(45, 56)) / 11
    )
    assert charts.smooth(noisy[:39]) == (noisy[:39], 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", None, "does not exist: the run has not finished"),
        ("config.json", None, "does not exist"),
        ("metrics.jsonl", None, "does not exist"),
        ("result.json", b"{", "is damaged: Expecting property name"),
        ("result.json", b"[1]", "is damaged: not a JSON object"),
        ("config.json", b"\xff\xfe", "is damaged: not UTF-8 text"),
        (
            "metrics.jsonl",
            b'{"kind": "eval", "step": 1}\nnonsense\n',
            "line 2 is damaged: Expecting value",
        ),
        ("samples.png", b"GIF89a", "is damaged: not a PNG image"),
        ("samples.png", b"\x89PNG\r\n\x1a\n\0\0\0\0IEND....", "is damaged: a checksum differs"),
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
    assert main(["report", str(run), "--output", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("deit-fast: error: ") and line.count("\n") == 1
    assert f"{run / file} {message}" in line
    assert not out.exists()


def test_values_that_are_absent_or_not_finite_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", top1=None, best_top1=None, per_class=None, images_per_s=math.nan)
    (run / "metrics.jsonl").write_text(
        '{"kind": "eval", "step": 4, "epoch": 1, "top1": NaN, "loss": Infinity}\n'
        '{"kind": "eval", "step": 8, "epoch": 2, "top1": 0.25}\n{"kind": "train", "step": 8}\n'
    )
    page = build_report([run], "t")
    assert "Runs 1 " in words(page) and "nan" not in words(page) and "top-1" not in words(page)
    assert re.findall(r"<title>(a: .*?)</title>", page) == ["a: 25 % at epoch 2"]


def test_numbers_that_no_chart_can_show_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", top1=1e308, images_per_s=10**400, best_top1=0.5)
    rows = [
        {"kind": kind, "step": step, "epoch": step, "top1": 1e308, "loss": 2e7,
         "data_wait": -1e308, "images_per_s": 10**400}
        for step in range(1, 30) for kind in ("train", "eval")
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report([run], "t")
    assert "a: 2e+07 at epoch 3" in page and "e+308" not in words(page)
    (run / "result.json").write_text('{"per_class": {"cat": 1e308, "dog": 1e308}}')
    build_report([run], "t")
    (run / "result.json").write_text('{"per_class": {"cat": "x"}}')
    with pytest.raises(InputError, match="a file of a is damaged or was edited"):
        build_report([run], "t")


def test_texts_of_a_run_are_escaped_for_terminals(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "a\x1b[1m", per_class={"\x1b[31mcat\udcff": 0.5}, command="\x07\ud800"
    )
    write_report([run], tmp_path / "page.html", "\x1b]0;title")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not set(page) & {"\x1b", "\x07"}
    for text in (r"a\x1b[1m", r"\x1b[31mcat\udcff", r"\x07\ud800", r"\x1b]0;title"):
        assert text in page


def test_no_runs_or_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        build_report([], "t")
    with pytest.raises(InputError, match="gone does not exist"):
        build_report([tmp_path / "gone"], "t")


def test_the_report_verb_writes_the_file_and_prints_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "a")
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--output", str(out), "--title", "My title"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert "<h1>My title</h1>" in out.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is a folder"):
        write_report([run], tmp_path, "t")


def test_short_names_distinguish_runs() -> None:
    paths = [Path("x/seed-0/soft"), Path("x/seed-1/soft"), Path("y/hard")]
    assert short_names(paths) == ["seed-0/soft", "seed-1/soft", "y/hard"]
    assert short_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert short_names([Path("x/a"), Path("x/a")]) == ["a", "a"]


# ----------------------------------------------------------------------------------------- browser


def browse(*arguments: str) -> str:
    """Standard output of a headless browser that finds no network."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("browser")
    runs = [
        add_analysis(make_run(root / name, kind)) for name, kind in (("a", "hard"), ("b", "soft"))
    ]
    noise = np.random.default_rng(0).integers(0, 256, (64, 512, 3), np.uint8)
    for run in runs:
        Image.fromarray(noise).save(run / "samples.png")
    return build_report([*runs, make_run(root / "a-run-with-a-rather-long-name", "none")], "Three")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.skipif(os.name != "posix", reason="file URLs are POSIX paths")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways_or_a_network(
    width: int, whole_page: str, tmp_path: Path
) -> None:
    """In a frame of that width: a headless window cannot be narrower than 500 pixels."""
    measure = (
        "const f=document.querySelector('iframe'),d=f.contentDocument,e=d.documentElement;"
        "f.style.height=e.scrollHeight+'px';document.title=JSON.stringify({"
        "width:f.contentWindow.innerWidth,content:e.scrollWidth,height:e.scrollHeight,"
        "broken:[...d.images].filter(i=>!i.naturalWidth).length,images:d.images.length,"
        "requests:f.contentWindow.performance.getEntriesByType('resource')"
        ".filter(r=>!r.name.startsWith('data:')).length})"
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><body style="margin:0"><iframe onload="{escape(measure)}" '
        f'style="border:0;width:{width}px" srcdoc="{escape(whole_page)}"></iframe>'
    )
    window = max(width, 500)
    shot = tmp_path / "page.png"
    dom = browse(f"--window-size={window},800", "--dump-dom", wrapper.as_uri())
    found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert found["width"] == width and found["content"] <= width, found
    assert found["images"] == 3 and found["broken"] == found["requests"] == 0, found

    for scheme, background in ((0, (20, 23, 26)), (1, (255, 255, 255))):  # dark, light
        browse(
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={window},{found['height']}", f"--screenshot={shot}", wrapper.as_uri(),
        )  # fmt: skip
        pixels = np.asarray(Image.open(shot).convert("RGB"))[:, :width]
        drawn = (pixels != background).any(2)
        assert tuple(pixels[2, 2]) == background
        assert 0.03 < drawn.mean() < 0.6, drawn.mean()
        bands = np.array_split(drawn, 20)
        assert all(band.any() for band in bands[:-1]), "a part of the page is blank"
        colours = {tuple(c) for c in pixels[drawn][::50].tolist()}
        assert len(colours) > 50  # text, curves, pictures


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_prints_the_page(whole_page: str, tmp_path: Path) -> None:
    page, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(whole_page, encoding="utf-8")
    browse(f"--print-to-pdf={pdf}", page.as_uri())
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and content.count(b"/Type /Page\n") >= 3


# ------------------------------------------------------------------------------------------ charts


def drawn(caption: str, lines: list[charts.Line], show: charts.Show, **options: float) -> str:
    chart = charts.line_chart(caption, lines, "epoch", show, **options)
    assert chart is not None
    return chart.svg


def test_long_lines_are_thinned_to_means_that_end_at_the_last_point() -> None:
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    thin = charts.thin(points)
    assert len(thin) <= charts.MAX_POINTS + 1
    assert thin[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.01 for _, y in thin[:-1])
    assert charts.thin(points[:10]) == points[:10]


def test_one_point_and_many_lines_still_make_a_chart() -> None:
    lines = [charts.Line(f"run {i}", i, [(1.0, 0.5)]) for i in range(20)]
    chart = drawn("t", lines, str)
    check(chart)
    numbers = [float(n) for n in re.findall(r'(?:cx|cy|x|y)="([-\d.]+)"', chart)]
    assert numbers and all(map(math.isfinite, numbers))
    assert "stroke-dasharray" in chart  # colours repeat after eight lines


@pytest.mark.parametrize(
    "points",
    [[(2.0, 0.1734)], [(1.0, 0.5), (2.0, 0.5)], [(0.0, 0.0), (1.0, 0.0)], [(3.0, 1e-4)]],
    ids=["point", "level", "zeros", "small"],
)
def test_ticks_of_equal_values_differ(points: list[tuple[float, float]]) -> None:
    chart = drawn("t", [charts.Line("a", None, points)], charts.short_percent)
    ticks = re.findall(r">([^<>]+ %)</text>", chart)
    assert len(ticks) == len({*ticks}) > 2 and not any(tick.startswith("-") for tick in ticks)


def test_a_chart_takes_its_colours_from_the_page_and_its_axis_includes_the_floor() -> None:
    lines = [charts.Line("<b>$x$", 1, [(1.0, 5.0), (2.0, 6.0)])]
    chart = drawn('"t"', lines, "{:g} v".format, floor=0.0)
    assert "var(--c1)" in chart and "var(--dim)" in chart and "var(--rule)" in chart
    assert not re.search(r"#[0-9a-f]{6}|\bid=|url\(|font-family", chart)
    assert 'aria-label="&quot;t&quot;"' in chart and "&lt;b&gt;$x$: 5 v at epoch 1" in chart
    assert ">0 v</text>" in chart
