"""Fill the page's template; the template holds headings, notes and the style sheet."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import write_atomically
from deit_fast.tools.report import sections
from deit_fast.tools.report.charts import COLOURS, PROPERTIES, Line, dash, line_chart
from deit_fast.tools.report.sections import Table
from deit_fast.tools.run_folder import Run, read_run, short_names


def write_report(runs: Sequence[Path], out: Path, title: str) -> None:
    """Write the page about ``runs`` to ``out``.

    Raises:
        InputError: a run's folder or file is missing or damaged, or ``out`` is no file; names it.
        OSError: ``out`` cannot be written; the old page stays.
    """
    page = build_report(runs, printable(title))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode(errors="backslashreplace"))


def build_report(runs: Sequence[Path], title: str) -> str:
    """The page about ``runs`` as HTML.

    Raises:
        InputError: no runs; a run's folder or file is missing or damaged; names it.
    """
    if not runs:
        raise InputError("a report needs at least one run folder")
    names = short_names(runs)
    try:
        return render(title, **_sections([read_run(*item) for item in zip(runs, names, count())]))
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"a file of {', '.join(names)} is damaged or was edited ({type(error).__name__}: "
            f"{error}); `deit-fast analyze` writes analysis.json again, other files need a copy"
        ) from error


def _sections(runs: list[Run]) -> dict[str, Any]:
    """The template's variables, by the names of the functions that make them."""
    analysed = [run for run in runs if run.analysis]
    of_all = (
        sections.lead, sections.results, sections.curves, sections.per_class, sections.throughput,
        sections.samples, sections.settings, sections.environment, sections.commands,
    )  # fmt: skip
    of_analysed = (
        sections.tokens, sections.classifiers, sections.disagreement, sections.teachers,
        sections.attention, sections.left_out,
    )  # fmt: skip
    parts = {section.__name__: section(runs) for section in of_all}
    return parts | {section.__name__: section(analysed) for section in of_analysed}


def render(title: str, **parts: Any) -> str:
    """The page; ``parts`` are the template's variables, and sections without one are left out."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    environment.globals |= {"colours": len(COLOURS), "properties": PROPERTIES, "dash": dash}
    page = environment.get_template("page.html").render(title=title, **parts)
    return page.strip() + "\n"


def build_cache_page(
    rows: list[tuple[str, str]],
    entropy_counts: list[tuple[float, int]] | None,
    fingerprint: list[tuple[str, str]],
) -> str:
    """The page of `cache info --html`.

    Args:
        rows: names and values of the summary.
        entropy_counts: middle of each bin, nats, and its records.
        fingerprint: fields and values.
    """
    tables: list[dict[str, Any]] = [{"heading": "Summary", "table": Table([], rows, "text")}]
    if entropy_counts:
        line = Line("records", 0, [(x, float(count)) for x, count in entropy_counts])
        chart = line_chart("Records by entropy", [line], "entropy, nats", "{:g}".format, 0.0)
        tables.append({"heading": "Entropy of the teacher's probabilities", "chart": chart})
    tables.append({"heading": "Fingerprint", "table": Table([], fingerprint, "text")})
    return render("Teacher cache", tables=tables)
