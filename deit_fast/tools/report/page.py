"""The page: its sections in order, in one self-contained file."""

from __future__ import annotations

from html import escape
from pathlib import Path

from deit_fast.errors import InputError
from deit_fast.tools.report import analysis
from deit_fast.tools.report.curves import curves, samples, throughput
from deit_fast.tools.report.results import lead, per_class, results
from deit_fast.tools.report.runs import read_run, short_names
from deit_fast.tools.report.settings import commands, environment, settings, settings_title
from deit_fast.tools.report.style import STYLE


def write_report(runs: list[Path], out: Path, title: str) -> None:
    """Write the page about ``runs`` to ``out``.

    Raises:
        InputError: a run's folder or file is missing or damaged; names it.
        OSError: ``out`` cannot be written.
    """
    page = build_report(runs, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def build_report(runs: list[Path], title: str) -> str:
    """The page about ``runs`` as HTML.

    Raises:
        InputError: no runs; a run's folder or file is missing or damaged; names it.
    """
    if not runs:
        raise InputError("a report needs at least one run folder")
    names = short_names(runs)
    loaded = [read_run(path, name) for path, name in zip(runs, names, strict=True)]
    sections = [
        ("Results", results(loaded)),
        ("Learning curves", curves(loaded)),
        ("Accuracy per class", per_class(loaded)),
        ("Throughput", throughput(loaded)),
        ("Class and distillation token", analysis.tokens(loaded)),
        ("Classifiers and their calibration", analysis.classifiers(loaded)),
        ("Who disagrees with whom", analysis.disagreement(loaded)),
        ("The teacher, softened", analysis.teacher(loaded)),
        ("Where the tokens look", analysis.attention(loaded)),
        ("Left out of the analysis", analysis.left_out(loaded)),
        ("Views that the student saw", samples(loaded)),
        (settings_title(loaded), settings(loaded)),
        ("Environment", environment(loaded)),
        ("Commands", commands(loaded)),
    ]
    body = "".join(
        f"<section><h2>{escape(heading)}</h2>{content}</section>"
        for heading, content in sections
        if content
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{lead(loaded)}</p></header>"
        f"<main>{body}</main></body></html>\n"
    )
